"""The rooms of `geomatch.tile`: what is asked for, where it comes from, how it is cut."""

"""The rooms of `geomatch.evaluate`: what is measured, and on what."""

"""The parts of `geomatch.embed`."""

"""Neighbours among descriptors, and the metrics of a ranking."""

"""Nearest neighbours of descriptors, and metrics of a ranking."""

"""Weights that other libraries trained."""

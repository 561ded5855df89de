"""Geodata: the ground grid, rasters, label layers, splits and footprints."""

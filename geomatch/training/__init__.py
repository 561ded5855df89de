"""The parts of `geomatch.train`: setup, batches, validation rounds, mining, metrics."""

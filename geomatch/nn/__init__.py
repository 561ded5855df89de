"""The encoder: network, losses, augmentation, training step, descriptors, checkpoints."""

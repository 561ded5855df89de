"""The network and what runs it: losses, augmentation, training step, descriptors, checkpoints."""

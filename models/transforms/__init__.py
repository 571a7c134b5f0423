"""Augmentations and geometry of images, boxes and masks."""

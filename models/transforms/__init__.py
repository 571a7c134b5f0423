"""Augmentation of images together with their boxes and masks."""

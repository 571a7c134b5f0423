"""The tasks, one file each: annotations, augmentation, metrics and rendering of predictions."""

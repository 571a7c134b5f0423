"""Hyperparameter search: space, trials, population-based training, plots."""

"""One training: the worker, the loop, checkpoints, the run and its driver."""

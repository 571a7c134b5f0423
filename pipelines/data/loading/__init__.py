"""From shards to batches: the order of samples, decoding, the pixel cache, loader processes."""

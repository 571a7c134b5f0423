"""From a source to shards: formats, a plan, one shard at a time, and a folder that appears as a
whole."""

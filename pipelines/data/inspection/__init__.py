"""Reports on packed data sets: survey, page, verification, overlap, shard plan."""

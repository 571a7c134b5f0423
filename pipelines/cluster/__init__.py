"""Everything that talks to Ray: connection, workers, tasks, tuner, jobs."""

"""Everything that talks to MLflow, and the event log that feeds it."""

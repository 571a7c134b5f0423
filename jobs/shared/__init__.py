"""What the verbs share: local services, progress display, terminal output, cache settings."""

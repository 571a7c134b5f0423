"""What each verb does, as plain functions."""

"""Predictions of a registered model, and its export."""

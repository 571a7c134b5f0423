"""How good a trained network is, and how sure that is: what `tessera evaluate` reports."""

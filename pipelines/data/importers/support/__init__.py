"""What importers share. The formats themselves are in the folder above."""

"""What importers share. No formats: the folder above is their registry."""

"""The importers. The folder is the registry: a file in it is a format of that name."""

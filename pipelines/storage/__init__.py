"""Where files lie: folders, object stores, web servers, and the cache of what came from afar."""

"""Files in folders, object stores and web servers; the cache, atomic writes, retries."""

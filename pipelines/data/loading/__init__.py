"""What `loading.py` is made of: the order of an epoch, decoding, and who makes batches."""

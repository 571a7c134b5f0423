"""What `importing.py` is made of: plan, units of work, receipts, and a folder that is whole or absent."""

"""What every family is made of: the contract, search spaces, shared layers."""

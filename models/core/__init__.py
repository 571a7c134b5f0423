"""The contract of families and tasks, and what it needs: errors, search spaces, weights, export."""

"""The typed async client of the director."""

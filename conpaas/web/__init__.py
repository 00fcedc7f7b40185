"""The web UI, a client of the SDK."""

"""Self-hosted platform-as-a-service: applications made of self-managed, elastic services."""

__version__ = "3.1.0"

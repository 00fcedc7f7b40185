"""Self-hosted platform-as-a-service: applications made of self-managed, elastic services."""

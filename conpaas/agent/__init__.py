"""The daemon on every other instance of a service: it holds the roles of its node."""

"""One folder for each service type."""

"""The front end's server: accounts, credits, clouds, the ledger of instances, the API."""

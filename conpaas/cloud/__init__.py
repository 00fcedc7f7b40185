"""One file for each kind of cloud."""

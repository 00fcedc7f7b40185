"""The command lines: conpaas and managerc."""

"""The daemon that runs one service."""

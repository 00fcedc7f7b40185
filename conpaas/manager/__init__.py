"""The daemon that runs one service: it plans, rolls out, watches, and holds nothing that can be lost."""

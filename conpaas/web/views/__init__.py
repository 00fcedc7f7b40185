"""The pages: each module reads, asks the SDK, and shows."""

"""Small pieces of what people read."""


def plural(count: int, word: str) -> str:
    """Return `1 instance`, `2 instances`."""
    return f"{count} {word}{'' if count == 1 else 's'}"

"""Names for things: short, random, safe in host names, URLs and file names."""

import secrets
import string

_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"  # nothing that looks like something else
_CODE_ALPHABET = string.ascii_letters + string.digits


def new(prefix: str) -> str:
    """Return a fresh id, such as `svc-7hq2mzkd4x` (50 random bits)."""
    return f"{prefix}-{''.join(secrets.choice(_ALPHABET) for _ in range(10))}"


def new_code_version() -> str:
    """Return a fresh id of a code version in the manner of mkstemp, such as `code-y3gOfi`."""
    return f"code-{''.join(secrets.choice(_CODE_ALPHABET) for _ in range(6))}"


def new_secret() -> str:
    """Return 256 random bits as URL-safe text: tokens, session keys, seeds."""
    return secrets.token_urlsafe(32)

"""What a daemon does without, to be small and to start at once. Asked for before anything else of ours is imported."""

import gc
import os
import sys

descriptions = True
"""Whether messages read the docstrings of their fields: forms and documentation need them, no daemon does."""


def keep_small() -> None:
    """Load what daemons share without what they never use; until all is `loaded`, look for no garbage."""
    global descriptions  # noqa: PLW0603 - told once, at the start of the process
    descriptions = False
    gc.disable()
    sys.modules["rich"] = None  # type: ignore[assignment]  # structlog loads it if it can: 5 MB
    known = os.environ.get("SSL_CERT_FILE")
    os.environ["SSL_CERT_FILE"] = os.devnull  # aiohttp would read all authorities of the world: we trust our own
    try:
        __import__("aiohttp")
    finally:
        if known is None:
            del os.environ["SSL_CERT_FILE"]
        else:
            os.environ["SSL_CERT_FILE"] = known


def loaded() -> None:
    """Look for garbage from now on, but not in what is here: modules and classes stay."""
    gc.freeze()
    gc.enable()

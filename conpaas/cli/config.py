"""Where the command line keeps who and where: one file that only its owner can read."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from conpaas.core import files
from conpaas.core.errors import BadInputError, NotAuthenticatedError

DEFAULT_URL = "http://127.0.0.1:9999"


@dataclass(frozen=True)
class Config:
    """A director and a token for it. `CONPAAS_URL` and `CONPAAS_TOKEN` go before what the file says."""

    directory: Path
    url: str = DEFAULT_URL
    token: str | None = None

    @property
    def file(self) -> Path:
        """Where it is kept."""
        return self.directory / "config.json"

    @classmethod
    def load(cls, env: Mapping[str, str] = os.environ) -> "Config":
        """Read file and environment; raise BadInputError if the file is damaged.

        The token of the file is for the director of the file: another URL never gets it.
        """
        base = env.get("XDG_CONFIG_HOME") or str(Path(env.get("HOME", "~")).expanduser() / ".config")
        stored = _stored(cls(Path(base) / "conpaas"))
        url = (env.get("CONPAAS_URL") or stored.url).rstrip("/")
        token = stored.token if url == stored.url else None
        return replace(stored, url=url, token=env.get("CONPAAS_TOKEN") or token)

    def save(self) -> None:
        """Write the file, mode 0600."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        words = {"url": self.url, "token": self.token}
        files.write_atomically(self.file, json.dumps(words, indent=2) + "\n", mode=0o600)

    def need_token(self) -> str:
        """Return the token; raise NotAuthenticatedError without one."""
        if self.token is None:
            raise NotAuthenticatedError(f"you are not logged in at {self.url}")
        return self.token


def _stored(empty: Config) -> Config:
    try:
        words = json.loads(empty.file.read_text(encoding="utf-8"))
        return replace(empty, url=str(words["url"]).rstrip("/"), token=words["token"])
    except FileNotFoundError:
        return empty
    except (ValueError, KeyError, TypeError) as exc:
        raise BadInputError(
            f"{empty.file} is damaged: {exc}", value=empty.file, hint="remove it and log in again"
        ) from exc

"""Secrets at rest: one key in the data folder that encrypts, and from which one-use tokens are derived."""

import base64
import hashlib
import hmac
from pathlib import Path
from typing import Self

from cryptography.fernet import Fernet, InvalidToken

from conpaas.core import files
from conpaas.core.errors import BadInputError

FILE = "vault.key"


class Vault:
    """Encrypts and decrypts short texts, and derives secrets that need not be kept."""

    def __init__(self, key: bytes) -> None:
        self._fernet = Fernet(key)
        self._root = base64.urlsafe_b64decode(key)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the key of `directory`, made (mode 0600) if there is none yet; raise BadInputError if it is damaged."""
        path = directory / FILE
        if not path.exists():
            files.write_atomically(path, Fernet.generate_key(), mode=0o600)
        try:
            return cls(path.read_bytes())
        except ValueError as exc:
            raise BadInputError(f"{FILE} is damaged", value=str(path), hint="restore it from a backup") from exc

    def seal(self, text: str) -> str:
        """Encrypt."""
        return self._fernet.encrypt(text.encode()).decode()

    def unseal(self, sealed: str) -> str:
        """Decrypt; raise BadInputError for what was sealed with another key."""
        try:
            return self._fernet.decrypt(sealed.encode()).decode()
        except InvalidToken as exc:
            raise BadInputError(
                "a secret of the database does not fit the key of the data folder",
                hint=f"restore {FILE} and the database together, from one backup",
            ) from exc

    def derive(self, purpose: str) -> str:
        """Return the secret for `purpose`: always the same, and told by nobody else."""
        return hmac.new(self._root, purpose.encode(), hashlib.sha256).hexdigest()

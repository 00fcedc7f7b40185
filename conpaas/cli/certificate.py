"""The user's certificate for managers: a key made here that never travels, renewed when it is about to end."""

import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from conpaas.core import files, run, tls
from conpaas.core.errors import BadInputError, NotAuthenticatedError
from conpaas.sdk import Conpaas

MARGIN = timedelta(minutes=5)
KEYMAKER_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class UserFiles:
    """Where key, certificate and CA of a user are, and in which deployment they count."""

    directory: Path

    @property
    def key(self) -> Path:
        return self.directory / "managerc.key"

    @property
    def certificate(self) -> Path:
        return self.directory / "managerc.crt"

    @property
    def ca(self) -> Path:
        return self.directory / "ca.crt"

    @property
    def facts(self) -> Path:
        return self.directory / "managerc.json"

    @property
    def deployment(self) -> str:
        """The deployment's id; raises NotAuthenticatedError if there is no certificate."""
        return self._fact("deployment")

    def valid(self, url: str | None) -> bool:
        """Tell whether there is a certificate, of the director at `url` if given, that counts for some minutes more."""
        try:
            _, end = tls.certificate_lifetime(self.certificate.read_bytes())
            ours = url in {None, self._fact("url")} and self.key.exists() and self.ca.exists()
        except (OSError, BadInputError, NotAuthenticatedError):
            return False
        return ours and end - MARGIN > datetime.now(UTC)

    def forget(self) -> None:
        """Remove everything; nothing there is fine."""
        for path in (self.facts, self.certificate, self.key, self.ca):
            path.unlink(missing_ok=True)

    def _fact(self, name: str) -> str:
        try:
            return str(json.loads(self.facts.read_text(encoding="utf-8"))[name])
        except (OSError, ValueError, KeyError) as exc:
            raise _none() from exc


async def renew(directory: Path, conpaas: Conpaas) -> UserFiles:
    """Make a new key and have the director certify it."""
    found = UserFiles(directory)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    request = directory / "managerc.csr"
    maker = [sys.executable, "-m", "conpaas.core.keymaker", str(found.key), str(request)]
    await run.run(maker, timeout_s=KEYMAKER_TIMEOUT_S)
    answer = await conpaas.certificate(request.read_text(encoding="ascii"))
    files.write_atomically(found.ca, answer.ca)
    files.write_atomically(found.certificate, answer.certificate)
    facts = {"deployment": answer.deployment, "user": answer.user, "url": conpaas.url}
    files.write_atomically(found.facts, json.dumps(facts))
    request.unlink()
    return found


async def ensure(directory: Path, conpaas: Conpaas | None) -> UserFiles:
    """Return a certificate that is valid, renewed if need be; without a director it must be there already."""
    found = UserFiles(directory)
    if found.valid(None if conpaas is None else conpaas.url):
        return found
    if conpaas is None:
        raise _none()
    return await renew(directory, conpaas)


def _none() -> NotAuthenticatedError:
    return NotAuthenticatedError(
        "you have no valid certificate for managers", hint="log in and get one: 'conpaas login', 'conpaas cert'"
    )

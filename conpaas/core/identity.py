"""Who is who: the names that certificates bear, and the TLS contexts that check them.

Uses the standard library alone, so that daemons stay small; keys and certificates are made in `core.tls`.
"""

import re
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conpaas.core.errors import BadInputError

Kind = Literal["director", "manager", "agent", "user"]

_ID = r"[a-z0-9-]{1,60}"
_EPOCH = r"0|[1-9][0-9]{0,17}"
_ONE_ID = re.compile(_ID)
_URI = re.compile(
    rf"spiffe://(?P<deployment>{_ID})/(?:"
    r"(?P<director>director)"
    rf"|user/(?P<user>{_ID})"
    rf"|service/(?P<service>{_ID})/(?:"
    rf"manager/(?P<epoch>{_EPOCH})/(?P<manager>{_ID})"
    rf"|agent/(?P<agent>{_ID})))"
)
_RESERVED_INSTANCES = {
    "manager",
    "u",
}  # an agent of that name would bear the host name of a manager or a user
_DOMAIN = "conpaas.internal"

_FIELDS_OF_KIND: dict[Kind, set[str]] = {
    "director": set(),
    "manager": {"service", "epoch", "instance"},
    "agent": {"service", "instance"},
    "user": {"user"},
}


@dataclass(frozen=True)
class Identity:
    """One party of a deployment, as its certificate names it.

    Make one with `director`, `manager`, `agent`, `for_user` or `parse`. Ids are 1 to 60 of a-z, 0-9 and `-`.
    Raises BadInputError for an id of another form, or for fields that the kind does not have.
    """

    deployment: str
    kind: Kind
    service: str | None = None
    instance: str | None = None
    user: str | None = None
    epoch: int | None = None

    def __post_init__(self) -> None:
        """Refuse what could not be written as a URI and read back."""
        fields = {"service": self.service, "instance": self.instance, "user": self.user, "epoch": self.epoch}
        present = {name for name, value in fields.items() if value is not None}
        if present != _FIELDS_OF_KIND[self.kind]:
            wanted = ", ".join(sorted(_FIELDS_OF_KIND[self.kind])) or "no further fields"
            raise BadInputError(f"the identity of a {self.kind} has {wanted}", value=sorted(present))
        for value in (self.deployment, self.service, self.instance, self.user):
            if value is not None and not _ONE_ID.fullmatch(value):
                raise _bad(value, "is not an id")
        if self.epoch is not None and not 0 <= self.epoch < 10**18:
            raise _bad(self.epoch, "is not an epoch")
        if self.instance in _RESERVED_INSTANCES:
            raise _bad(self.instance, "is a reserved word, not an instance")

    @classmethod
    def director(cls, deployment: str) -> "Identity":
        """Name the director of `deployment`."""
        return cls(deployment, "director")

    @classmethod
    def manager(cls, deployment: str, service: str, epoch: int, instance: str) -> "Identity":
        """Name the manager of `service` that was made at `epoch` on `instance`."""
        return cls(deployment, "manager", service=service, epoch=epoch, instance=instance)

    @classmethod
    def agent(cls, deployment: str, service: str, instance: str) -> "Identity":
        """Name the agent of `service` on `instance`."""
        return cls(deployment, "agent", service=service, instance=instance)

    @classmethod
    def for_user(cls, deployment: str, user: str) -> "Identity":
        """Name the user with the id `user`."""
        return cls(deployment, "user", user=user)

    @classmethod
    def parse(cls, uri: str) -> "Identity":
        """Read an identity from its `uri`; raise BadInputError for anything but the canonical form."""
        match = _URI.fullmatch(uri)
        if match is None:
            raise _bad(uri, "is not the URI of an identity")
        deployment, service = match["deployment"], match["service"]
        if match["director"]:
            return cls.director(deployment)
        if match["user"]:
            return cls.for_user(deployment, match["user"])
        if match["agent"]:
            return cls.agent(deployment, service, match["agent"])
        return cls.manager(deployment, service, int(match["epoch"]), match["manager"])

    @property
    def uri(self) -> str:
        """The one URI in the certificate: who this is, to those that authorise."""
        match self.kind:
            case "director":
                return f"spiffe://{self.deployment}/director"
            case "user":
                return f"spiffe://{self.deployment}/user/{self.user}"
            case "manager":
                return f"spiffe://{self.deployment}/service/{self.service}/manager/{self.epoch}/{self.instance}"
            case "agent":
                return f"spiffe://{self.deployment}/service/{self.service}/agent/{self.instance}"

    @property
    def host(self) -> str:
        """The one DNS name in the certificate: whom a client means to reach, given as TLS server name.

        It is never looked up. A manager's name has no epoch: a new manager answers to the name of the old
        one.
        """
        match self.kind:
            case "director":
                return f"director.{self.deployment}.{_DOMAIN}"
            case "user":
                return f"u.{self.user}.{self.deployment}.{_DOMAIN}"
            case "manager":
                return f"manager.{self.service}.{self.deployment}.{_DOMAIN}"
            case "agent":
                return f"{self.instance}.{self.service}.{self.deployment}.{_DOMAIN}"


def peer_identity(ssl_object: ssl.SSLObject | None, deployment: str) -> Identity | None:
    """Tell who is at the other end of a TLS connection, by the certificate that TLS has verified.

    None without TLS, without a certificate, with any number of URIs but one, or with one of another
    deployment.
    """
    certificate = ssl_object.getpeercert() if ssl_object is not None else None
    names: Iterable[tuple[str, str]] = (certificate or {}).get("subjectAltName", ())  # type: ignore[assignment]
    uris = [value for kind, value in names if kind == "URI"]
    if len(uris) != 1:
        return None
    try:
        identity = Identity.parse(uris[0])
    except BadInputError:
        return None
    return identity if identity.deployment == deployment else None


def server_context(cert_file: Path, key_file: Path, ca_file: Path, *, require_client: bool) -> ssl.SSLContext:
    """Make the TLS settings of a server that trusts clients of the CA in `ca_file` and no others.

    With `require_client` a client without a certificate gets no connection; without, it has no identity. A
    certificate of another CA, or one that has expired, is refused in both cases. Raises OSError (ssl.SSLError
    is one) for files that are missing or do not fit together.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, ca_file)
    context.verify_mode = ssl.CERT_REQUIRED if require_client else ssl.CERT_OPTIONAL
    context.num_tickets = 0  # no resumption: each connection shows a certificate that is valid now
    context.load_cert_chain(cert_file, key_file)
    return context


def client_context(cert_file: Path | None, key_file: Path | None, ca_file: Path) -> ssl.SSLContext:
    """Make the TLS settings of a client that trusts the CA in `ca_file` alone and checks the server's name.

    Give `Identity.host` of the server as `server_hostname`. Without `cert_file` the client stays anonymous.
    Raises OSError (ssl.SSLError is one) for files that are missing or do not fit together.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, ca_file)  # checks host names and requires a certificate by itself
    if cert_file is not None:
        context.load_cert_chain(cert_file, key_file)
    return context


def _context(protocol: int, ca_file: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cafile=ca_file)
    return context


def _bad(value: object, what: str) -> BadInputError:
    return BadInputError(
        f"{value!r} {what}",
        value=value,
        hint="ids are 1 to 60 of a-z, 0-9 and '-'; an identity is spiffe://DEPLOYMENT/…",
    )

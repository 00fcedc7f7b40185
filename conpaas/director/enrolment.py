"""The CA of the deployment, and how instances come to their certificates."""

import hashlib
import hmac
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from conpaas.core import files, identity, ids, tls
from conpaas.core.clock import Clock
from conpaas.core.errors import BadInputError, ForbiddenError, NotAuthenticatedError, NotFoundError
from conpaas.core.identity import Identity
from conpaas.core.messages.internal import Certificate
from conpaas.core.states import NodeState
from conpaas.core.trust import Caller
from conpaas.director.db.database import Database
from conpaas.director.db.models import Instance, Service
from conpaas.director.events import record
from conpaas.director.ledger import enter, instance_of, service_of
from conpaas.director.settings import DirectorSettings
from conpaas.director.vault import Vault

log = structlog.get_logger()

RENEW_AT = 2 / 3
"""Share of its life after which a certificate is renewed."""
_PURPOSE = "enrolment token of "


class Trust:
    """The CA and the director's own certificate, in one folder of the data directory."""

    def __init__(self, authority: tls.Authority, directory: Path, settings: DirectorSettings, clock: Clock) -> None:
        self.authority = authority
        self.deployment = authority.deployment
        self.identity = Identity.director(authority.deployment)
        self._directory = directory
        self._settings = settings
        self._clock = clock
        self._certificate = directory / "director.crt"
        self._key = directory / "director.key"
        self._ca = directory / tls.CERTIFICATE_FILE
        self._contexts: list[ssl.SSLContext] = []
        self._renew_own_at = datetime.min.replace(tzinfo=UTC)

    @classmethod
    def load(cls, settings: DirectorSettings, clock: Clock) -> "Trust":
        """Read the CA, made if there is none yet; raise BadInputError if it is another deployment's, or damaged."""
        directory = settings.data_dir / "ca"
        try:
            authority = tls.Authority.load(directory)
        except FileNotFoundError:
            authority = tls.Authority.create(settings.deployment or ids.new("dep"))
            authority.save(directory)
        if settings.deployment and authority.deployment != settings.deployment:
            raise BadInputError(
                f"the data folder belongs to deployment {authority.deployment}, not to {settings.deployment}",
                value=settings.deployment,
                hint="use another data folder, or leave the setting 'deployment' out",
            )
        trust = cls(authority, directory, settings, clock)
        trust.renew_own()
        return trust

    @property
    def ca(self) -> str:
        """The CA's certificate, PEM."""
        return self.authority.certificate_pem.decode()

    def renew_own(self) -> None:
        """Give the director a new key and certificate when the present one has lived two thirds of its life."""
        now = self._clock.now()
        if now < self._renew_own_at:
            return
        key, csr = tls.make_key_and_csr()
        certificate = self.authority.sign(csr, self.identity, lifetime_s=self._settings.certificate_s, now=now)
        files.write_atomically(self._key, key, mode=0o600)
        files.write_atomically(self._certificate, certificate)
        for context in self._contexts:  # new connections show the new one
            context.load_cert_chain(self._certificate, self._key)
        self._renew_own_at = now + timedelta(seconds=self._settings.certificate_s * RENEW_AT)

    def server_context(self) -> ssl.SSLContext:
        """Return the TLS settings of the port for instances; a client without a certificate is anonymous."""
        context = identity.server_context(self._certificate, self._key, self._ca, require_client=False)
        self._contexts.append(context)
        return context

    def client_context(self) -> ssl.SSLContext:
        """Return the TLS settings with which the director calls managers."""
        context = identity.client_context(self._certificate, self._key, self._ca)
        self._contexts.append(context)
        return context

    def sign(self, csr: str, whom: Identity) -> Certificate:
        """Return a certificate for the key of `csr`."""
        life_s = self._settings.certificate_s
        pem = self.authority.sign(csr.encode(), whom, lifetime_s=life_s, now=self._clock.now())
        return Certificate(certificate=pem.decode(), renew_in_s=life_s * RENEW_AT)


class Enrolment:
    """Gives certificates to instances: the first one for a one-use token, the next ones for the one before."""

    def __init__(self, db: Database, trust: Trust, vault: Vault, clock: Clock) -> None:
        self._db = db
        self._trust = trust
        self._vault = vault
        self._clock = clock

    def token(self, instance: str) -> str:
        """Return the one-use token of an instance. It is derived, so that only its use need be kept."""
        return f"{instance}.{self._vault.derive(_PURPOSE + instance)}"

    async def enrol(self, token: str, csr: str) -> Certificate:
        """Give an instance its first certificate.

        The token works once, and within its time: again only for the same key, if the answer was lost. Raises
        NotAuthenticatedError for a token that is none or too old, ForbiddenError for one that is used or whose
        instance is no longer wanted.
        """
        instance_id = self._instance_of(token)
        key = _key_of(csr)
        now = self._clock.now()
        async with self._db.write() as session:
            try:
                instance = await instance_of(session, instance_id)
            except NotFoundError as exc:
                raise NotAuthenticatedError("this enrolment token is not valid", hint=_ENROL_HINT) from exc
            service = await service_of(session, instance.service_id)
            check_wanted(instance, service)
            if instance.enrol_until < now:
                raise NotAuthenticatedError("this enrolment token is too old", hint=_ENROL_HINT)
            if instance.enrol_key not in {"", key}:
                log.warning("enrolment-token-reused", instance=instance.id)
                raise ForbiddenError("this enrolment token has been used", hint=_ENROL_HINT)
            certificate = self._trust.sign(csr, self._identity(instance))
            if instance.kind == "manager" and instance.epoch > service.epoch:
                await _take_over(session, service, instance, now)
            instance.enrol_key = key
            instance.booted = instance.booted or now
            if instance.state in {NodeState.REQUESTED, NodeState.BOOTING}:
                enter(instance, NodeState.CONFIGURING if instance.kind == "manager" else NodeState.BOOTING, now)
        log.info("enrolled", instance=instance.id, kind=instance.kind, service=service.id)
        return certificate

    async def note_stage(self, token: str, stage: str, detail: str) -> None:
        """Take down how far an instance has come that has not enrolled yet; raise NotAuthenticatedError for others."""
        instance_id = self._instance_of(token)
        async with self._db.write() as session:
            instance = await instance_of(session, instance_id)
            if instance.enrol_key or instance.ended is not None or instance.enrol_until < self._clock.now():
                raise NotAuthenticatedError("this enrolment token is used, or too old", hint=_ENROL_HINT)
            instance.stage = f"{stage}: {detail}" if detail else stage
        log.info("boot-stage", instance=instance_id, stage=stage, detail=detail)

    def _instance_of(self, token: str) -> str:
        """Return whose enrolment token it is; raise NotAuthenticatedError if it is none."""
        instance_id, _, _ = token.partition(".")
        if not hmac.compare_digest(token.encode(), self.token(instance_id).encode()):
            raise NotAuthenticatedError("this enrolment token is not valid", hint=_ENROL_HINT)
        return instance_id

    async def renew(self, caller: Caller, csr: str) -> Certificate:
        """Give an instance its next certificate; raise ForbiddenError if it is no longer wanted."""
        if caller.instance is None:
            raise ForbiddenError("only instances renew certificates here")
        async with self._db.read() as session:
            try:
                instance = await instance_of(session, caller.instance)
            except NotFoundError as exc:
                raise ForbiddenError(f"there is no instance {caller.instance}") from exc
            service = await service_of(session, instance.service_id)
        check_wanted(instance, service)
        if (instance.kind, instance.service_id) != (caller.kind, caller.service):
            raise ForbiddenError("this certificate is not of this instance", value=instance.id)
        return self._trust.sign(csr, self._identity(instance))

    def _identity(self, instance: Instance) -> Identity:
        deployment = self._trust.deployment
        if instance.kind == "manager":
            return Identity.manager(deployment, instance.service_id, instance.epoch, instance.id)
        return Identity.agent(deployment, instance.service_id, instance.id)


_ENROL_HINT = "each token enrols one instance once, within minutes of its creation"


def check_wanted(instance: Instance, service: Service) -> None:
    """Raise ForbiddenError if the instance has been given up, or is a manager that has been replaced."""
    if instance.ended is not None:
        raise ForbiddenError(f"instance {instance.id} is no longer wanted", value=instance.id)
    if instance.kind == "manager" and instance.epoch < service.epoch:
        raise ForbiddenError(f"this manager was replaced: its epoch {instance.epoch} is over", value=instance.epoch)


async def _take_over(session: AsyncSession, service: Service, manager: Instance, now: datetime) -> None:
    """Let a manager made at another place replace the present one, whose instance stays until all is as wanted."""
    service.epoch = manager.epoch
    query = select(Instance).where(
        Instance.service_id == service.id,
        Instance.kind == "manager",
        Instance.epoch < manager.epoch,
        Instance.ended.is_(None),
    )
    for old in await session.scalars(query):
        enter(old, NodeState.DRAINING, now, "its successor takes over")
    message = f"epoch {service.epoch}: {manager.id} on '{manager.cloud}' takes over"
    record(session, "manager-moved", at=now, actor="director", service=service, message=message)


def _key_of(csr: str) -> str:
    """Return the SHA-256 of the public key of a request; raise BadInputError if it cannot be read."""
    try:
        request = x509.load_pem_x509_csr(csr.encode())
        key = request.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    except ValueError as exc:
        raise BadInputError("the certificate signing request cannot be read") from exc
    return hashlib.sha256(key).hexdigest()

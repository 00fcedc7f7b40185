"""What the ssh driver decides without asking anybody: which hosts, what is to be made there, what answers mean."""

import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from typing import TypeAlias

from conpaas.cloud.ssh import SshHost, SshSettings
from conpaas.core import plugins, service
from conpaas.core.bundle import Bundle
from conpaas.core.cloud import Finding, Vm, VmRequest, VmState
from conpaas.core.errors import BadInputError, ConpaasError, NoCapacityError, PeerError, QuotaExceededError
from conpaas.core.messages.base import Json
from conpaas.core.service import ServiceType

USER_BASE = 0x7100_0000
"""Daemons of root's run under a user id from here on that no distribution uses, nor the local cloud."""
ANY = "any"
"""The size that every host has."""

_TOKEN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")

Seen: TypeAlias = Json | ConpaasError
"""What a host shows when it is looked at, or why it does not."""


def eligible(settings: SshSettings, request: VmRequest) -> list[SshHost]:
    """Return the hosts that a request may have: in an order that is its token's own, the cheapest first."""
    if not _TOKEN.fullmatch(request.token):
        raise BadInputError(f"{request.token!r} is no id of an instance", value=request.token)
    if request.size not in {"", ANY}:
        hosts = {host.name: host for host in settings.hosts}
        if request.size not in hosts:
            raise BadInputError(
                f"there is no host '{request.size}'",
                value=request.size,
                hint=f"its sizes are: {', '.join([ANY, *hosts])}",
            )
        return [hosts[request.size]]

    def rank(host: SshHost) -> tuple[object, ...]:
        return (host.price or 0, hashlib.sha256(f"{request.token} {host.name}".encode()).digest())

    return sorted(settings.hosts, key=rank)


def is_of(answer: Json, token: str) -> bool:
    """Tell whether a host carries the instance with this token, and is not being given back."""
    return bool(answer["taken"] and answer["ours"] and answer["token"] == token and answer["state"] != VmState.GONE)


def vm(host: SshHost, answer: Json) -> Vm:
    """Return the instance that a host of ours shows."""
    return Vm(
        id=f"{answer['token']}@{host.name}",
        token=answer["token"],
        state=VmState(answer["state"]),
        address=str(host.address),
        reason=answer["reason"],
        size=host.name,
    )


def none_free(what: str, seen: Sequence[Seen]) -> ConpaasError:
    """Say why no host could be had: one cannot be asked, all are in use by us, or some are by others."""
    errors = [answer for answer in seen if isinstance(answer, ConpaasError)]
    unasked = next((error for error in errors if isinstance(error, PeerError)), None)
    if unasked is not None:
        return unasked
    if len(errors) == len(seen):
        return errors[0]
    ours = sum(1 for answer in seen if not isinstance(answer, ConpaasError) and answer["taken"] and answer["ours"])
    counted = f"{what}: {ours} of {len(seen)} hosts are in use"
    if ours == len(seen):
        return QuotaExceededError(counted, value=ours, hint="remove a node, or add a host to this cloud")
    others = f"{len(seen) - ours - len(errors)} by others"
    return NoCapacityError("; ".join([counted, others, *(error.message for error in errors)]))


def listen(host: SshHost) -> str:
    """Return where a host's daemon listens."""
    return host.listen or str(host.address)


def requirements(settings: SshSettings, host: SshHost, bundle: Bundle | None) -> Json:
    """Return what a host must have to be used at all."""
    manifest = None if bundle is None else bundle.manifest.model_dump()
    return {
        "as_root": settings.as_root,
        "disk_bytes": settings.disk_mib << 20,
        "manifest": manifest,
        "memory_bytes": settings.memory_mib << 20,
        "os_release": host.os_release,
    }


def spec(settings: SshSettings, deployment: str, host: SshHost, request: VmRequest, bundle: Bundle | None) -> Json:
    """Return all that the host must know, so that any driver, or none, can go on."""
    context = request.context(listen(host))
    words = json.loads(context)
    names = {"{kind}": words["kind"], "{context}": f"{host.directory}/home/context.json"}
    user = USER_BASE + (zlib.crc32(host.directory.encode()) & 0xFF_FFFF)
    return {
        **requirements(settings, host, bundle),
        "token": request.token,
        "deployment": deployment,
        "name": request.name,
        "address": str(host.address),
        "kind": words["kind"],
        "context": context,
        "packages": packages(settings, words.get("service_type", "")),
        "bundle": "" if bundle is None else bundle.sha256,
        "argv": [names.get(word, word) for word in settings.command],
        "user": user if settings.as_root else None,
        "ports": [(listen(host), port) for port in sorted({*request.ports, *request.inner_ports})],
        "remove_packages": settings.remove_packages,
        "systemd": settings.systemd,
        "unit_directory": host.unit_directory,
        "policy_file": host.policy_file,
    }


def packages(settings: SshSettings, service_type: str) -> list[str]:
    """Return the Debian packages that a service type needs, if we are to see to it that they are there."""
    kinds = plugins.discover(service.PACKAGE, "SERVICE", ServiceType)
    if not settings.install_engines or service_type not in kinds:
        return []
    return sorted({package for engine in kinds[service_type].engines for package in engine.package.split()})


def lease_finding(host: SshHost, answer: Json) -> Finding:
    """Say who has a host."""
    name = f"{host.name}: lease"
    if not answer["taken"]:
        return Finding(name=name, ok=True, detail="the host is free")
    if not answer["ours"]:
        return Finding(name=name, ok=True, detail="another deployment has the host")
    return Finding(
        name=name,
        ok=not answer["reason"] or answer["state"] == "PENDING",
        detail=f"{answer['token']} has it: {answer['state']} {answer['reason']}".rstrip(),
    )

"""OpenNebula's words: templates as it reads them, and what its documents say about VMs and images."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element

from conpaas.core.cloud import Vm, VmState
from conpaas.core.errors import BadInputError, PeerError

TOKEN, DEPLOYMENT, SIZE = "CONPAAS_TOKEN", "CONPAAS_DEPLOYMENT", "CONPAAS_SIZE"
"""Tags of what we make: in a VM's USER_TEMPLATE, in an image's TEMPLATE."""
MIB = 1 << 20
MAX_ID = (1 << 31) - 1

Vector = Mapping[str, str | int]
Template = Mapping[str, str | int | Vector | Sequence[Vector]]
"""Attributes by name: plain ones, vectors, and vectors that are there several times."""


# -- what we write --------------------------------------------------------------------------------------------------

_UNWRITABLE = re.compile(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|\]\]>|\\\Z")
_NOT_IN_NAMES = re.compile(r"[&|:\\\";/'#{}$<>\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_MAX_NAME_BYTES = 128


def quote(value: str | int) -> str:
    r"""Return a value between quotes, as templates have it: `\"` is a quote, and nothing else is special.

    Raises BadInputError for what cannot be written so: `]]>`, a backslash at the end, and what XML does not have.
    """
    text = str(value)
    if found := _UNWRITABLE.search(text):
        raise BadInputError(f"{text[:40]!r} has {found[0]!r}: OpenNebula cannot keep it", value=text[:200])
    return '"' + text.replace('"', '\\"') + '"'


def _vector(vector: Vector) -> str:
    return "[" + ",".join(f"{name}={quote(value)}" for name, value in vector.items()) + "]"


def render(template: Template) -> str:
    """Return a template as text, a line for each attribute."""
    lines = []
    for name, value in template.items():
        if isinstance(value, str | int):
            lines.append(f"{name}={quote(value)}")
        else:
            vectors = [value] if isinstance(value, Mapping) else value
            lines.extend(f"{name}={_vector(vector)}" for vector in vectors)
    return "\n".join(lines)


def proper_name(text: str) -> str:
    """Return `text` as an object may be named: without the characters that names must not have, in 128 bytes."""
    allowed = _NOT_IN_NAMES.sub("-", text).strip() or "-"
    return allowed.encode()[:_MAX_NAME_BYTES].decode(errors="ignore").strip()


# -- what we read ---------------------------------------------------------------------------------------------------


def text_of(element: Element, path: str) -> str:
    """Return what an element says at `path`; empty if it says nothing."""
    return (element.findtext(path) or "").strip()


def number_of(element: Element, path: str) -> int:
    """Return the number at `path`; PeerError if there is none."""
    text = text_of(element, path)
    try:
        return int(text)
    except ValueError as exc:
        raise PeerError(f"the answer of OpenNebula has no number, but {text[:40]!r}, as {path}") from exc


def id_of(text: str) -> int | None:
    """Return the id of an object that one of our ids names; None if it cannot be one of OpenNebula's."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 else MAX_ID + 1
    return number if number <= MAX_ID else None


_STATES = {
    0: "INIT",
    1: "PENDING",
    2: "HOLD",
    3: "ACTIVE",
    4: "STOPPED",
    5: "SUSPENDED",
    6: "DONE",
    7: "FAILED",
    8: "POWEROFF",
    9: "UNDEPLOYED",
    10: "CLONING",
    11: "CLONING_FAILURE",
}
_ACTIVE = 3
_PENDING_STATES = {0, 1, 2, 10}
_LCM_RUNNING, _LCM_UNKNOWN = 3, 16
_LCM_NAMES = {
    5: "SAVE_STOP",
    6: "SAVE_SUSPEND",
    10: "EPILOG_STOP",
    16: "UNKNOWN",
    18: "SHUTDOWN_POWEROFF",
    29: "SHUTDOWN_UNDEPLOY",
    30: "EPILOG_UNDEPLOY",
    36: "BOOT_FAILURE",
    37: "BOOT_MIGRATE_FAILURE",
    38: "PROLOG_MIGRATE_FAILURE",
    39: "PROLOG_FAILURE",
    40: "EPILOG_FAILURE",
    41: "EPILOG_STOP_FAILURE",
    42: "EPILOG_UNDEPLOY_FAILURE",
    44: "PROLOG_MIGRATE_POWEROFF_FAILURE",
    46: "PROLOG_MIGRATE_SUSPEND_FAILURE",
    47: "BOOT_UNDEPLOY_FAILURE",
    48: "BOOT_STOPPED_FAILURE",
    49: "PROLOG_RESUME_FAILURE",
    50: "PROLOG_UNDEPLOY_FAILURE",
    61: "PROLOG_MIGRATE_UNKNOWN_FAILURE",
}
"""Those that are worth telling: the others are passing, or mean that all is well."""
_LCM_STARTING = {0, 1, 2, 9, 15, 20, 21, 22, 31, 32}
_LCM_ENDING = {11, 12, 23}
"""EPILOG, SHUTDOWN, CLEANUP_DELETE: on its way to DONE. A cancel that fails brings it back to RUNNING."""
_LCM_FAILURES = {36, 37, 38, 39, 40, 41, 42, 44, 46, 47, 48, 49, 50, 61}


def state_of(state: int, lcm: int) -> VmState:
    """Return what STATE and LCM_STATE come to.

    UNKNOWN, a host that is silent, is no end: it comes back. POWEROFF and its like are, for us: nobody resumes them.
    """
    if state in _PENDING_STATES:
        return VmState.PENDING
    if state != _ACTIVE:
        return VmState.GONE if state == 6 else VmState.FAILED
    if lcm in _LCM_ENDING:
        return VmState.GONE
    if lcm in _LCM_FAILURES:
        return VmState.FAILED
    return VmState.PENDING if lcm in _LCM_STARTING else VmState.RUNNING


def _reason(vm: Element, state: int, lcm: int) -> str:
    """Say why a VM does not run, or not yet. An ERROR stays there when it is long over: only failures quote it."""
    if state in _PENDING_STATES:
        waits = "" if state <= 1 else _STATES[state]
        return text_of(vm, "USER_TEMPLATE/SCHED_MESSAGE") or waits
    name = _LCM_NAMES.get(lcm, "") if state == _ACTIVE else _STATES.get(state, f"STATE {state}")
    failed = state == 11 or (state == _ACTIVE and lcm in _LCM_FAILURES)
    error = text_of(vm, "USER_TEMPLATE/ERROR") if failed else ""
    return f"{name}: {error}" if error else name


IMAGE_STATES = {
    0: "INIT",
    1: "READY",
    2: "USED",
    3: "DISABLED",
    4: "LOCKED",
    5: "ERROR",
    6: "CLONE",
    7: "DELETE",
    8: "USED_PERS",
    9: "LOCKED_USED",
    10: "LOCKED_USED_PERS",
}


def image_trouble(image: Element) -> str:
    """Name the state of an image that cannot be used, with the server's reason if it gives one."""
    state = number_of(image, "STATE")
    name, error = IMAGE_STATES.get(state, f"STATE {state}"), text_of(image, "TEMPLATE/ERROR")
    return f"{name}: {error}" if error else name


@dataclass(frozen=True)
class Disk:
    """A disk of a VM that is an image."""

    id: int
    """Within the VM, as detaching it needs."""
    target: str
    """`vdb`"""
    changing: bool
    """It is being attached or detached."""


@dataclass(frozen=True)
class Machine:
    """A VM, anybody's."""

    number: int
    deployment: str
    vm: Vm
    disks: Mapping[int, Disk] = field(default_factory=dict)
    """By the id of their image."""

    @property
    def gone(self) -> bool:
        """Whether it has ended, or is about to."""
        return self.vm.state is VmState.GONE


def machine(vm: Element) -> Machine:
    """Read a `VM` element of its long form."""
    number, state, lcm = number_of(vm, "ID"), number_of(vm, "STATE"), number_of(vm, "LCM_STATE")
    seen = state_of(state, lcm)
    return Machine(
        number=number,
        deployment=text_of(vm, f"USER_TEMPLATE/{DEPLOYMENT}"),
        vm=Vm(
            id=str(number),
            token=text_of(vm, f"USER_TEMPLATE/{TOKEN}"),
            state=seen,
            address=_address(vm),
            reason="" if seen is VmState.GONE else _reason(vm, state, lcm),
            size=text_of(vm, f"USER_TEMPLATE/{SIZE}"),
        ),
        disks=dict(_disks(vm)),
    )


def machines(pool: Element) -> list[Machine]:
    """Read a `VM_POOL` element of long forms."""
    return [machine(vm) for vm in pool.iterfind("VM")]


def _address(vm: Element) -> str | None:
    """Return the address of the first network: it is leased long before the VM runs."""
    for nic in vm.iterfind("TEMPLATE/NIC"):
        for name in ("IP", "IP6_GLOBAL", "IP6_ULA"):
            if found := text_of(nic, name):
                return found
    return None


def _disks(vm: Element) -> list[tuple[int, Disk]]:
    return [
        (
            number_of(disk, "IMAGE_ID"),
            Disk(number_of(disk, "DISK_ID"), text_of(disk, "TARGET"), text_of(disk, "ATTACH").upper() == "YES"),
        )
        for disk in vm.iterfind("TEMPLATE/DISK")
        if text_of(disk, "IMAGE_ID")  # volatile disks have none
    ]

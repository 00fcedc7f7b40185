"""Quotas of a user of an OpenNebula, as `one.user.info` shows them."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from conpaas.cloud._opennebula_model import MIB, text_of
from conpaas.core.cloud import Room

_OF_VMS = (("instances", "VMS", 1), ("cores", "CPU", 1), ("memory", "MEMORY", MIB), ("disk", "SYSTEM_DISK_SIZE", MIB))
_OF_A_DATASTORE = (("volumes", "IMAGES", 1), ("volume space", "SIZE", MIB))
_DEFAULT = -1


def rooms(user: Element, datastore: int | None) -> list[Room]:
    """Return the quotas of VMs, and of the datastore, that have a limit: bytes of what is counted in MiB there."""
    kinds: list[tuple[str, str, Sequence[tuple[str, str, int]]]] = [("VM_QUOTA/VM", "", _OF_VMS)]
    if datastore is not None:
        kinds.append(("DATASTORE_QUOTA/DATASTORE", str(datastore), _OF_A_DATASTORE))
    found = []
    for path, own_id, metrics in kinds:
        own, default = _entry(user, path, own_id), _entry(user, f"DEFAULT_USER_QUOTAS/{path}", own_id)
        for name, metric, unit in metrics:
            limit = _number(own, metric, _DEFAULT)
            if limit == _DEFAULT:
                limit = _number(default, metric, _DEFAULT)
            if limit >= 0:
                found.append(Room(name=name, used=_number(own, f"{metric}_USED", 0) * unit, limit=limit * unit))
    return found


def _entry(user: Element, path: str, own_id: str) -> Element | None:
    return next((entry for entry in user.iterfind(path) if not own_id or text_of(entry, "ID") == own_id), None)


def _number(entry: Element | None, name: str, otherwise: float) -> float:
    text = "" if entry is None else text_of(entry, name)
    return float(text) if text else otherwise

"""What a real OpenNebula 6.10 said and was told, and documents of the same shape.

`opennebula/NAME.request.xml` and `.response.xml` are recorded exchanges. The functions here write answers as that
server does, to the byte: tests/unit/test_opennebula.py writes each record again and compares.
"""

import re
import xmlrpc.client
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

RECORDS = Path(__file__).parent / "opennebula"
_HEAD = '<?xml version="1.0" encoding="UTF-8"?>'

Value = str | Mapping[str, str]
Attributes = Sequence[tuple[str, Value]]
"""Of a template: names may repeat; a mapping is a vector."""


def names() -> list[str]:
    """Return the names of all records."""
    return sorted(path.name.removesuffix(".response.xml") for path in RECORDS.glob("*.response.xml"))


@cache
def request(name: str) -> tuple[str, tuple[Any, ...]]:
    """Return the method and the parameters of a recorded call."""
    parameters, method = xmlrpc.client.loads((RECORDS / f"{name}.request.xml").read_bytes())
    assert method is not None
    return method, parameters


@cache
def response(name: str) -> bytes:
    """Return a recorded answer as it came."""
    return (RECORDS / f"{name}.response.xml").read_bytes()


@cache
def answer(name: str) -> list[Any]:
    """Return the array in a recorded answer; raises xmlrpc.client.Fault for a fault."""
    parameters, _ = xmlrpc.client.loads(response(name))
    found = parameters[0]
    assert isinstance(found, list)
    return found


def value(name: str) -> Any:
    """Return what a recorded answer says: of a success the value, of a failure the words."""
    return answer(name)[1]


# -- XML-RPC --------------------------------------------------------------------------------------------------------


def _lines(*lines: str) -> bytes:
    """Write the lines of an answer; within a string, lines end as they were sent."""
    return "".join(f"{line}\r\n" for line in (_HEAD, "<methodResponse>", *lines, "</methodResponse>")).encode()


def _array(*values: str) -> bytes:
    head, tail = "<param><value><array><data>", "</data></array></value></param>"
    return _lines("<params>", head, *(f"<value>{value}</value>" for value in values), tail, "</params>")


def success(value: str | int) -> bytes:
    """Write `[true, value, 0]`, as in every record but the failures."""
    shown = f"<i4>{value}</i4>" if isinstance(value, int) else f"<string>{escape(value)}</string>"
    return _array("<boolean>1</boolean>", shown, "<i4>0</i4>")


def failure(text: str, code: int, object_id: int = -1) -> bytes:
    """Write `[false, text, code, object id, -1]`, as in err_*."""
    words = f"<string>{escape(text)}</string>"
    return _array("<boolean>0</boolean>", words, f"<i4>{code}</i4>", f"<i4>{object_id}</i4>", "<i8>-1</i8>")


def fault(code: int, text: str) -> bytes:
    """Write a fault, as in err_missing_args, err_no_method and err_type_fault."""
    return _lines(
        "<fault>",
        "<value><struct>",
        "<member><name>faultCode</name>",
        f"<value><i4>{code}</i4></value></member>",
        "<member><name>faultString</name>",
        f"<value><string>{escape(text)}</string></value></member>",
        "</struct></value>",
        "</fault>",
    )


# -- documents ------------------------------------------------------------------------------------------------------


def document(name: str) -> ElementTree.Element:
    """Return a recorded document."""
    return ElementTree.fromstring(value(name))


def attributes(element: ElementTree.Element | None) -> list[tuple[str, Value]]:
    """Return the attributes of a template in a document."""
    assert element is not None
    return [
        (child.tag, {part.tag: part.text or "" for part in child} if len(child) else child.text or "")
        for child in element
    ]


def cdata(name: str, value: Value) -> str:
    """Write an attribute: values are CDATA, vectors in the order of their names."""
    if isinstance(value, str):
        return f"<{name}><![CDATA[{value}]]></{name}>"
    return f"<{name}>{''.join(cdata(part, value[part]) for part in sorted(value))}</{name}>"


def template(tag: str, attributes: Iterable[tuple[str, Value]]) -> str:
    """Write a template: its attributes in the order of their names, as in every record."""
    ordered = sorted(attributes, key=lambda attribute: attribute[0])
    return f"<{tag}>{''.join(cdata(*attribute) for attribute in ordered)}</{tag}>"


def plain(**values: str | int) -> str:
    """Write elements without CDATA."""
    return "".join(f"<{name}>{value}</{name}>" for name, value in values.items())


# -- templates as they are sent -------------------------------------------------------------------------------------

_NAME, _SPACE = re.compile(r"[A-Za-z0-9_]+"), re.compile(r"[ \t\n]*")
_QUOTED, _BARE = re.compile(r'"((?:\\"|[^"])*)"'), re.compile(r"[^=# \t\n,\[\]]+")


class SyntaxTroubleError(ValueError):
    """The server would not take this template."""


def parse(text: str) -> list[tuple[str, Value]]:
    r"""Read a template by the rules of OpenNebula's own lexer (src/parsers/template_parser.l).

    A quoted value ends at the first quote without a backslash before it; only `\"` is special in it; `]]>` in a value
    is an error. Names become upper case in vectors.
    """
    if "]]>" in text:
        raise SyntaxTroubleError("]]>")
    found: list[tuple[str, Value]] = []
    place = _skip(text, 0)
    while place < len(text):
        name, place = _take(_NAME, text, place)
        place = _expect("=", text, _skip(text, place))
        place = _skip(text, place)
        if text[place : place + 1] == "[":
            vector, place = _parse_vector(text, _skip(text, place + 1))
            found.append((name.upper(), vector))
        else:
            single, place = _parse_value(text, place)
            found.append((name.upper(), single))
        place = _skip(text, place)
    return found


def _parse_vector(text: str, place: int) -> tuple[dict[str, str], int]:
    vector: dict[str, str] = {}
    while True:
        name, place = _take(_NAME, text, place)
        place = _skip(text, _expect("=", text, _skip(text, place)))
        vector[name.upper()], place = _parse_value(text, place)
        place = _skip(text, place)
        if text[place : place + 1] == "]":
            return vector, place + 1
        place = _skip(text, _expect(",", text, place))


def _parse_value(text: str, place: int) -> tuple[str, int]:
    if text[place : place + 1] != '"':
        return _take(_BARE, text, place)
    match = _QUOTED.match(text, place)
    if match is None:
        raise SyntaxTroubleError(f"no end of the value at {place}")
    return match[1].replace('\\"', '"'), match.end()


def _take(pattern: re.Pattern[str], text: str, place: int) -> tuple[str, int]:
    match = pattern.match(text, place)
    if match is None:
        raise SyntaxTroubleError(f"{text[place : place + 20]!r} at {place}")
    return match[0], match.end()


def _expect(sign: str, text: str, place: int) -> int:
    if text[place : place + 1] != sign:
        raise SyntaxTroubleError(f"no {sign} at {place}")
    return place + 1


def _skip(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match is not None
    return match.end()


# -- what is described ----------------------------------------------------------------------------------------------

_RIGHTS = {
    f"{who}_{right}": int(who == "OWNER" and right != "A") for who in ("OWNER", "GROUP", "OTHER") for right in "UMA"
}
PERMISSIONS = f"<PERMISSIONS>{plain(**_RIGHTS)}</PERMISSIONS>"
_VM_HEAD = ("ID", "UID", "GID", "UNAME", "GNAME", "NAME")
_VM_STATE = ("LAST_POLL", "STATE", "LCM_STATE", "PREV_STATE", "PREV_LCM_STATE", "RESCHED", "STIME", "ETIME")
_IN_CDATA = {"VM_MAD", "TM_MAD"}
_SHORT_DISK = (
    *("DISK_ID", "DATASTORE", "DATASTORE_ID", "IMAGE", "IMAGE_ID", "SIZE", "TYPE", "CLONE", "CLONE_TARGET"),
    *("LN_TARGET", "DISK_SNAPSHOT_TOTAL_SIZE"),
)
_SHORT_NIC = ("IP", "MAC", "NETWORK", "NETWORK_ID", "NIC_ID", "SECURITY_GROUPS")

Fields = Mapping[str, str | int]


def vm(fields: Fields, template_of: Attributes, user_template: Attributes, history: Sequence[Fields]) -> str:
    """Write a VM as in vm_info_* and vmpool_infoextended."""
    return (
        f"<VM>{_some(fields, _VM_HEAD)}{PERMISSIONS}{_some(fields, _VM_STATE)}"
        f"<DEPLOY_ID>{fields['DEPLOY_ID']}</DEPLOY_ID><MONITORING></MONITORING><SCHED_ACTIONS></SCHED_ACTIONS>"
        f"{template('TEMPLATE', template_of)}{template('USER_TEMPLATE', user_template)}{_history(history)}"
        "<BACKUPS><BACKUP_CONFIG/><BACKUP_IDS></BACKUP_IDS></BACKUPS></VM>"
    )


def short_vm(fields: Fields, template_of: Attributes, history: Sequence[Fields]) -> str:
    """Write a VM as in vmpool_info: without our tags."""
    ours = dict(template_of)
    parts = plain(CPU=str(ours["CPU"]), MEMORY=str(ours["MEMORY"]), VCPU=str(ours["VCPU"]))
    for name, wanted in (("DISK", _SHORT_DISK), ("NIC", _SHORT_NIC)):
        for vector in (value for tag, value in template_of if tag == name and not isinstance(value, str)):
            parts += f"<{name}>{''.join(cdata(part, vector.get(part, '')) for part in wanted)}</{name}>"
    last = f"<HISTORY_RECORDS>{_short_history(history[-1])}</HISTORY_RECORDS>" if history else "<HISTORY_RECORDS/>"
    states = _some(fields, ("LAST_POLL", "STATE", "LCM_STATE", "RESCHED", "STIME", "ETIME", "DEPLOY_ID"))
    return (
        f"<VM>{_some(fields, _VM_HEAD)}{states}<TEMPLATE>{parts}{cdata('GRAPHICS', ours['GRAPHICS'])}</TEMPLATE>"
        f"<MONITORING/><USER_TEMPLATE></USER_TEMPLATE>{last}</VM>"
    )


def _some(fields: Fields, wanted: Sequence[str]) -> str:
    return plain(**{name: fields[name] for name in wanted})


def _history(records: Sequence[Fields]) -> str:
    if not records:
        return "<HISTORY_RECORDS/>"
    written = (
        "".join(
            cdata(name, str(value)) if name in _IN_CDATA else f"<{name}>{value}</{name}>"
            for name, value in record.items()
        )
        for record in records
    )
    return f"<HISTORY_RECORDS>{''.join(f'<HISTORY>{record}</HISTORY>' for record in written)}</HISTORY_RECORDS>"


def _short_history(record: Fields) -> str:
    words = {name: cdata(name, str(record[name])) for name in ("HOSTNAME", "VM_MAD", "TM_MAD", "ACTION")}
    numbers = {name: f"<{name}>{record[name]}</{name}>" for name in ("OID", "SEQ", "HID", "CID", "DS_ID")}
    parts = words | numbers
    order = ("OID", "SEQ", "HOSTNAME", "HID", "CID", "DS_ID", "VM_MAD", "TM_MAD", "ACTION")
    return f"<HISTORY>{''.join(parts[name] for name in order)}</HISTORY>"


_IMAGE_HEAD = ("TYPE", "DISK_TYPE", "PERSISTENT", "REGTIME")
_IMAGE_FILE = ("SOURCE", "PATH", "FORMAT", "FS")
_IMAGE_STATE = (
    *("SIZE", "STATE", "PREV_STATE", "RUNNING_VMS", "CLONING_OPS", "CLONING_ID", "TARGET_SNAPSHOT"),
    *("DATASTORE_ID", "DATASTORE"),
)


def image(fields: Fields, vms: Sequence[int], template_of: Attributes) -> str:
    """Write an image as in imagepool_info."""
    file = "".join(cdata(name, str(fields[name])) for name in _IMAGE_FILE)
    ids = "".join(f"<ID>{vm}</ID>" for vm in vms)
    snapshots = template("SNAPSHOTS", [("ALLOW_ORPHANS", "NO"), ("CURRENT_BASE", "-1"), ("NEXT_SNAPSHOT", "0")])
    return (
        f"<IMAGE>{_some(fields, _VM_HEAD)}{PERMISSIONS}{_some(fields, _IMAGE_HEAD)}{file}{_some(fields, _IMAGE_STATE)}"
        f"<VMS>{ids}</VMS><CLONES></CLONES><APP_CLONES></APP_CLONES>{template('TEMPLATE', template_of)}{snapshots}"
        "<BACKUP_INCREMENTS></BACKUP_INCREMENTS><BACKUP_DISK_IDS></BACKUP_DISK_IDS></IMAGE>"
    )


def user(fields: Fields, own: Attributes, quotas: Attributes) -> str:
    """Write a user as in user_info; quotas by VM and by datastore as `Quota::check_quota` of the server makes them."""
    groups = f"<GROUPS><ID>{fields['GID']}</ID></GROUPS>"
    head = f"{_some(fields, ('ID', 'GID'))}{groups}{_some(fields, ('GNAME', 'NAME'))}"
    kinds = ("DATASTORE", "NETWORK", "VM", "IMAGE")
    limits = "".join(template(f"{kind}_QUOTA", [quota for quota in quotas if quota[0] == kind]) for kind in kinds)
    none = "".join(f"<{kind}_QUOTA></{kind}_QUOTA>" for kind in kinds)
    return (
        f"<USER>{head}{cdata('PASSWORD', str(fields['PASSWORD']))}{cdata('AUTH_DRIVER', 'core')}<ENABLED>1</ENABLED>"
        f"{template('TEMPLATE', own)}{limits}<DEFAULT_USER_QUOTAS>{none}</DEFAULT_USER_QUOTAS></USER>"
    )


def pool(name: str, members: Iterable[str]) -> str:
    """Write a pool."""
    return f"<{name}>{''.join(members)}</{name}>"

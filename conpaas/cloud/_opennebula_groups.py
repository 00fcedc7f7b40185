"""Security groups of an OpenNebula: one for each set of ports, made when it is first needed."""

from collections.abc import Collection

from conpaas.cloud._opennebula_model import number_of, proper_name, render, text_of
from conpaas.cloud._opennebula_rpc import NameTakenError, Server
from conpaas.core.errors import CloudBusyError

_MINE = -3


async def group_of(server: Server, deployment: str, ports: Collection[int]) -> int:
    """Return the id of the group that lets everybody in to `ports`, and everything out."""
    numbers = [str(port) for port in sorted(ports)]
    name = proper_name(f"conpaas-{deployment}-{'-'.join(numbers) or 'none'}")
    found = await _find(server, name)
    if found is not None:
        return found
    rules = [{"PROTOCOL": "ALL", "RULE_TYPE": "outbound"}, {"PROTOCOL": "ICMP", "RULE_TYPE": "inbound"}]
    if numbers:
        rules.append({"PROTOCOL": "TCP", "RULE_TYPE": "inbound", "RANGE": ",".join(numbers)})
    try:
        return int(await server.ask("one.secgroup.allocate", render({"NAME": name, "RULE": rules})))
    except NameTakenError as exc:  # by another driver, meanwhile
        found = await _find(server, name)
        if found is None:
            raise CloudBusyError(exc.message, value=exc.value) from exc
        return found


async def _find(server: Server, name: str) -> int | None:
    pool = await server.read("one.secgrouppool.info", _MINE, -1, -1)
    ids = [number_of(group, "ID") for group in pool.iterfind("SECURITY_GROUP") if text_of(group, "NAME") == name]
    return min(ids, default=None)

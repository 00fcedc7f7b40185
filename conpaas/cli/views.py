"""What the tables of the command line say about each kind of message."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from conpaas.cli.output import Column
from conpaas.core import units
from conpaas.core.messages.model import NodeView, OperationView, ServiceView
from conpaas.core.states import NodeState
from conpaas.sdk import prices


def ago(moment: datetime | None) -> str:
    """Say how long ago `moment` was."""
    return "never" if moment is None else units.ago((datetime.now(UTC) - moment).total_seconds())


def _at(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _url(service: ServiceView) -> str:
    return service.urls.get("application") or next(iter(service.urls.values()), "")


def _progress(operation: OperationView) -> str:
    return operation.error or operation.message


def _metric(name: str) -> Column:
    return name.replace("_", " "), lambda point: f"{point.values[name]:.2f}" if name in point.values else ""


_PER_HOUR: Column = ("Per hour", lambda it: prices.hourly(it.cost))
_SO_FAR: Column = ("So far", lambda it: prices.so_far(it.cost))


def clouds_of(service: ServiceView) -> str:
    """Name the clouds that a service is on, its own first."""
    there = (node.cloud for node in service.nodes if node.state is not NodeState.GONE)
    return ", ".join(dict.fromkeys((service.cloud, *there)))


def _where(node: NodeView) -> str:
    fell_over = node.meant_for and node.meant_for != node.cloud
    return f"{node.cloud} (meant for {node.meant_for})" if fell_over else node.cloud


def services(applications: Mapping[str, str]) -> Sequence[Column]:
    """Return the columns of a list of services; `applications` has their names by id."""
    return (
        ("Name", lambda s: s.name),
        ("Type", lambda s: s.type),
        ("Application", lambda s: applications.get(s.application, s.application)),
        ("State", lambda s: str(s.state)),
        ("Since", lambda s: ago(s.since)),
        ("Instances", lambda s: str(len(s.nodes))),
        ("Cloud", clouds_of),
        ("Address", _url),
        _PER_HOUR,
        _SO_FAR,
        ("Id", lambda s: s.id),
    )


def node_id(node: NodeView) -> str:
    """Return a node's name for people: as its cloud reports it."""
    return node.cloud_id or node.id


NODES: Sequence[Column] = (
    ("Instance", node_id),
    ("Role(s)", lambda n: " ".join(n.roles) if n.kind == "agent" else " ".join(("manager", *n.roles))),
    ("State", lambda n: str(n.state)),
    ("Address", lambda n: n.address),
    ("Cloud", _where),
    ("Size", lambda n: n.size),
    _PER_HOUR,
    _SO_FAR,
    ("Created", lambda n: ago(n.created)),
    ("Reason", lambda n: n.reason or n.stage),
)
CODE: Sequence[Column] = (
    ("Version", lambda c: c.id),
    ("", lambda c: "active" if c.active else ""),
    ("File", lambda c: c.filename),
    ("Size", lambda c: units.show_size(c.size)),
    ("Created", lambda c: ago(c.created)),
    ("Description", lambda c: c.description),
)
OPERATIONS: Sequence[Column] = (
    ("Id", lambda o: o.id),
    ("Kind", lambda o: o.kind),
    ("Service", lambda o: o.service),
    ("State", lambda o: str(o.state)),
    ("Begun", lambda o: ago(o.created)),
    ("By", lambda o: o.actor),
    ("Progress", _progress),
)
EVENTS: Sequence[Column] = (
    ("When", lambda e: _at(e.at)),
    ("Who", lambda e: e.actor),
    ("What", lambda e: e.kind),
    ("Service", lambda e: e.service or ""),
    ("Message", lambda e: e.message),
    ("Before", lambda e: e.before),
    ("After", lambda e: e.after),
)
STATES: Sequence[Column] = (
    ("State", lambda c: str(c.state)),
    ("When", lambda c: _at(c.at)),
    ("By", lambda c: c.actor),
    ("Reason", lambda c: c.reason),
)
APPLICATIONS: Sequence[Column] = (
    ("Name", lambda a: a.name),
    ("Services", lambda a: str(a.services)),
    _PER_HOUR,
    _SO_FAR,
    ("Created", lambda a: ago(a.created)),
    ("Id", lambda a: a.id),
)
TOKENS: Sequence[Column] = (
    ("Id", lambda t: t.id),
    ("Name", lambda t: t.name),
    ("Scopes", lambda t: " ".join(t.scopes)),
    ("Expires", lambda t: t.expires.astimezone().strftime("%Y-%m-%d")),
    ("Last used", lambda t: ago(t.last_used)),
)
KEYS: Sequence[Column] = (
    ("Id", lambda k: k.id),
    ("Name", lambda k: k.name),
    ("Fingerprint", lambda k: k.fingerprint),
    ("Added", lambda k: ago(k.created)),
)
TYPES: Sequence[Column] = (
    ("Type", lambda t: t.name),
    ("Title", lambda t: t.title),
    ("Roles", lambda t: " ".join(role.name for role in t.roles if role.scalable)),
    ("Usable", lambda t: "yes" if t.enabled else f"no: {t.reason}"),
    ("Description", lambda t: t.description),
)
USERS: Sequence[Column] = (
    ("User", lambda u: u.username),
    ("Name", lambda u: f"{u.first_name} {u.last_name}".strip()),
    ("Email", lambda u: u.email),
    ("Credits", lambda u: str(u.credits)),
    ("", lambda u: " ".join(word for word, is_so in (("admin", u.admin), ("disabled", u.disabled)) if is_so)),
    ("Since", lambda u: ago(u.created)),
    ("Id", lambda u: u.id),
)
INSTANCES: Sequence[Column] = (
    ("Instance", node_id),
    ("Kind", lambda i: i.kind),
    ("State", lambda i: str(i.state)),
    ("Address", lambda i: i.address),
    ("Cloud", _where),
    ("Size", lambda i: i.size),
    ("Service", lambda i: i.service),
    ("Owner", lambda i: i.owner),
    ("Charged", lambda i: str(i.charged)),
    _PER_HOUR,
    _SO_FAR,
    ("Created", lambda i: ago(i.created)),
)
LOGS: Sequence[Column] = (
    ("Node", lambda entry: entry.node),
    ("Log", lambda entry: entry.name),
    ("Size", lambda entry: units.show_size(entry.size)),
)
METRICS: Sequence[Column] = (
    ("At", lambda p: p.at.astimezone().strftime("%H:%M:%S")),
    ("Node", lambda p: p.node or "all"),
    *(
        _metric(name)
        for name in ("request_rate", "error_rate", "throughput", "response_p50", "response_p95", "response_p99", "cpu")
    ),
)
ENGINES: Sequence[Column] = (
    ("Type", lambda e: e.type),
    ("Program", lambda e: e.program),
    ("Package", lambda e: e.package),
    ("Installed", lambda e: e.path or "no"),
)


def service_lines(service: ServiceView) -> list[str]:
    """Return what `status` says of one service, above its nodes."""
    facts: dict[str, Any] = {
        "state": f"{service.state}, since {ago(service.since)}",
        "reason": service.reason,
        "type": f"{service.type} on {clouds_of(service)}",
        "fallback": ", ".join(service.wanted.fallback),
        "sizes": " ".join(f"{cloud}={size}" for cloud, size in service.wanted.sizes.items()),
        "price": prices.both(service.cost),
        "code": service.wanted.code or "",
        "nodes wanted": " ".join(f"{role}={count}" for role, count in service.wanted.roles.items()),
        **{f"address ({purpose})": url for purpose, url in service.urls.items()},
        "manager": service.manager,
        **service.facts,
    }
    if service.operation is not None:
        facts["operation"] = f"{service.operation.kind}: {service.operation.message}"
    width = max(len(name) for name in facts)
    lines = [f"{name.ljust(width)}  {value}" for name, value in facts.items() if value]
    return [f"{service.name} ({service.id})", *(f"  {line}" for line in lines)]

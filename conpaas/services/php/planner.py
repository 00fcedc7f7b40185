"""Who does what in a PHP service, and in which order it comes about. Pure decisions."""

from collections.abc import Mapping, Sequence
from functools import partial

from pydantic import ValidationError

from conpaas.core import rpc, units
from conpaas.core.errors import BadInputError
from conpaas.core.messages.base import Message
from conpaas.core.messages.model import Wanted
from conpaas.core.service import MANAGER, Assignment, Node, Planner, Situation, Stage, Step, check_roles
from conpaas.services.php import SERVICE
from conpaas.services.php.messages import (
    HTTP_PORT,
    CodeConfig,
    PhpConfig,
    PhpSettings,
    ProxyConfig,
    SessionsConfig,
    WebConfig,
)

SCALABLE = ("proxy", "php", "web")
"""The order in which roles get the first nodes there are."""
SESSIONS = "sessions"
FORM_BYTES = 1 << 20
"""What a request may have beside the file that it uploads."""
PATIENCE_S = 30
"""A script may wait for others, for so long, beside the time for which it computes."""


class PhpPlanner(Planner):
    """One node alone does it all; the first node dedicated to a role takes that role off the shared one."""

    def check(self, before: Wanted, after: Wanted) -> None:
        """Raise BadInputError for unknown roles, too few or too many nodes, or settings out of bounds."""
        check_roles(SERVICE, before, after)
        if after.running and not after.roles.get("proxy"):
            raise BadInputError(
                "at least 1 'proxy' must stay", value=0, hint="stop the service to give back all its nodes"
            )
        _settings(after)

    def assign(self, wanted: Mapping[str, int], nodes: Sequence[Node]) -> Assignment:
        """Give nodes what they have, then the oldest others what is open; what nobody is for, a proxy does too."""
        if not any(wanted.values()):
            return Assignment({})
        duty = _keep(wanted, nodes)
        others = sorted((node for node in nodes if node.id not in duty), key=lambda node: bool(node.roles))
        open_slots = _open_slots(wanted, duty)
        duty |= {node.id: role for node, role in zip(others, open_slots, strict=False)}
        _ensure_proxy(duty)
        roles = {node.id: {duty[node.id]} for node in nodes if node.id in duty}
        shared = next((node for node, role in duty.items() if role == "proxy"), None)
        if shared is not None:
            shared = next(node.id for node in nodes if duty.get(node.id) == "proxy")
            roles[shared] |= set(SCALABLE) - set(duty.values())
        everyone = {node: frozenset(held) for node, held in roles.items()}
        return Assignment({**everyone, MANAGER: frozenset({SESSIONS})}, missing=sum(wanted.values()) - len(everyone))

    def stages(self, situation: Situation) -> list[Stage]:
        """Sessions, code everywhere, back-ends, proxies; then what has moved away, the consumers first.

        Sessions that are taken over from a manager before come in until every back-end has been told where they are.
        """
        configs = _configs(situation)
        steps = partial(_steps, situation, configs)
        stages = [steps(SESSIONS), _preparation(situation, configs), [*steps("php"), *steps("web")], steps("proxy")]
        if situation.predecessor:
            alone = configs[SESSIONS].model_copy(update={"source": ""})
            stages.insert(3, _steps(situation, {SESSIONS: alone}, SESSIONS))
        stages += [_ends(situation, "proxy"), [*_ends(situation, "php"), *_ends(situation, "web")]]
        if not situation.assignment.roles:
            stages.append([Step(MANAGER, SESSIONS, None)])
        return [stage for stage in stages if stage]

    def urls(self, situation: Situation) -> dict[str, str]:
        """Return the address of the first proxy."""
        proxies = situation.assignment.holders("proxy")
        return {"application": f"http://{situation.nodes[proxies[0]].address}:{HTTP_PORT}/"} if proxies else {}

    def facts(self, situation: Situation, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
        """Return what the card shows."""
        total = self.summary(metrics)
        facts = {"PHP": _settings(situation.wanted).php_version}
        if "request_rate" in total:
            facts["Requests"] = f"{total['request_rate']:.3g}/s"
            facts["Throughput"] = f"{units.show_size(round(total.get('throughput', 0)))}/s"
        if total.get("response_p95"):
            facts["Response time"] = f"{total['response_p95']:.0f} ms (95 %)"
        return facts

    def summary(self, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Add up rates; take the response times of the proxies, the median weighted by their requests."""
        proxies = [values for values in metrics.values() if "request_rate" in values]
        if not proxies:
            return {}
        names = ("request_rate", "error_rate", "throughput")
        total = {name: sum(values.get(name, 0.0) for values in proxies) for name in names}
        total |= {name: max(values.get(name, 0.0) for values in proxies) for name in ("response_p95", "response_p99")}
        weights = [(values.get("response_p50", 0.0), values["request_rate"]) for values in proxies]
        if total["request_rate"]:
            total["response_p50"] = sum(p50 * rate for p50, rate in weights) / total["request_rate"]
        else:
            total["response_p50"] = 0.0
        total["php_queue"] = sum(values.get("php_queue", 0.0) for values in metrics.values())
        return total


def _settings(wanted: Wanted) -> PhpSettings:
    try:
        return PhpSettings.model_validate(wanted.settings)
    except ValidationError as exc:
        raise rpc.bad_input(exc) from exc


# -- who ------------------------------------------------------------------------------------------------------------


def _main(node: Node) -> str | None:
    """Return the role that a node is there for; the others, if any, it only stands in for."""
    return next((role for role in SCALABLE if role in node.roles), None)


def _keep(wanted: Mapping[str, int], nodes: Sequence[Node]) -> dict[str, str]:
    """Return the duties that stay where they are: of each role the oldest, as many as are wanted."""
    kept: dict[str, str] = {}
    for role in SCALABLE:
        holders = [node.id for node in nodes if _main(node) == role]
        kept |= dict.fromkeys(holders[: wanted.get(role, 0)], role)
    return kept


def _open_slots(wanted: Mapping[str, int], duty: Mapping[str, str]) -> list[str]:
    """Return the roles that still want nodes, those with fewest nodes first."""
    have = list(duty.values())
    slots = [
        (number, place, role)
        for place, role in enumerate(SCALABLE)
        for number in range(have.count(role), wanted.get(role, 0))
    ]
    return [role for _, _, role in sorted(slots)]


def _ensure_proxy(duty: dict[str, str]) -> None:
    """If no proxy is left, and no node free to become one, make one of those of which there are most."""
    if duty and "proxy" not in duty.values():
        held = list(duty.values())
        chosen = max(duty, key=lambda node: held.count(duty[node]))
        duty[chosen] = "proxy"


# -- what -----------------------------------------------------------------------------------------------------------


def _configs(situation: Situation) -> dict[str, Message]:
    settings = _settings(situation.wanted)
    code = CodeConfig(
        code=None if situation.code is None else situation.code.sha256,
        previous=None if situation.previous_code is None else situation.previous_code.sha256,
        document_root=settings.document_root,
    ).model_dump()
    password = situation.secret(SESSIONS)
    manager = situation.nodes.get(MANAGER)
    shared = settings.model_dump(exclude={"document_root"})
    return {
        SESSIONS: SessionsConfig.model_validate({"password": password, "source": situation.predecessor}),
        "web": WebConfig(**code),
        "php": PhpConfig.model_validate(
            {**code, **shared, "sessions": manager.address if manager else "", "sessions_password": password}
        ),
        "proxy": ProxyConfig(
            **code,
            web=_addresses(situation, "web"),
            php=_addresses(situation, "php"),
            max_body_bytes=units.parse_size(settings.upload_max_filesize) + FORM_BYTES,
            timeout_s=max(60, settings.max_execution_time + PATIENCE_S),
        ),
    }


def _addresses(situation: Situation, role: str) -> dict[str, str]:
    return {node: situation.nodes[node].address for node in situation.assignment.holders(role)}


def _steps(situation: Situation, configs: Mapping[str, Message], role: str) -> list[Step]:
    return [Step(node, role, configs[role]) for node in situation.assignment.holders(role)]


def _preparation(situation: Situation, configs: Mapping[str, Message]) -> list[Step]:
    """Unpack new code on all nodes that serve old code, before the first one switches."""
    if situation.previous_code is None or situation.previous_code == situation.code:
        return []
    return [
        Step(node, role, configs[role].model_copy(update={"prepare": True}))
        for role in SCALABLE
        for node in situation.assignment.holders(role)
        if role in situation.nodes[node].roles
    ]


def _ends(situation: Situation, role: str) -> list[Step]:
    return [
        Step(node.id, role, None)
        for node in situation.nodes.values()
        if role in node.roles and role not in situation.assignment.roles.get(node.id, frozenset())
    ]

"""A service type from outside, found by its entry point: `front` nodes that name their `back` nodes.

Small and quick, with no engine but `sleep`, for tests of everything around a service.
"""

import asyncio
import json
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import SecretStr, ValidationError

from conpaas.core import files, rpc
from conpaas.core.errors import CommandFailedError, EngineMissingError
from conpaas.core.messages.base import Message, Secret
from conpaas.core.messages.model import Wanted
from conpaas.core.service import (
    MANAGER,
    Assignment,
    Command,
    CommandContext,
    Engine,
    EngineSpec,
    Health,
    Node,
    Planner,
    Role,
    RoleAgent,
    ServiceType,
    Situation,
    Stage,
    Step,
    check_roles,
)


class EchoSettings(Message):
    """What users can set."""

    greeting: str = "hello"
    """What is said."""
    broken: bool = False
    """Whether every apply fails."""
    engine_missing: bool = False
    """Whether the engine is said to be missing."""


class EchoConfig(Message):
    """Configuration of either role."""

    greeting: str
    peers: tuple[str, ...] = ()
    code: str | None = None
    broken: bool = False
    engine_missing: bool = False
    password: Secret = SecretStr("")


class Say(Message):
    """Arguments of the command `say`."""

    word: str


async def say(arguments: Say, context: CommandContext) -> dict[str, Any]:
    """Answer the word and how many nodes would hear it."""
    return {"word": arguments.word, "nodes": len(context.nodes)}


class EchoPlanner(Planner):
    """The first nodes are `front`, the others `back`; `memory` lives on the manager's instance."""

    def check(self, before: Wanted, after: Wanted) -> None:
        check_roles(SERVICE, before, after)
        try:
            EchoSettings.model_validate(after.settings)
        except ValidationError as exc:
            raise rpc.bad_input(exc) from exc

    def assign(self, wanted: Mapping[str, int], nodes: Sequence[Node]) -> Assignment:
        roles: dict[str, frozenset[str]] = {}
        missing = 0
        free = list(nodes)
        for role in ("front", "back"):
            count = wanted.get(role, 0)
            holders = [node for node in free if role in node.roles][:count]
            spare = [node for node in free if not node.roles]
            holders += spare[: count - len(holders)]
            free = [node for node in free if node not in holders]
            roles.update({node.id: frozenset({role}) for node in holders})
            missing += count - len(holders)
        if any(wanted.values()):
            roles[MANAGER] = frozenset({"memory"})
        return Assignment(roles, missing)

    def stages(self, situation: Situation) -> list[Stage]:
        settings = EchoSettings.model_validate(situation.wanted.settings)
        assignment = situation.assignment
        backs = tuple(situation.nodes[node].address for node in assignment.holders("back"))

        def config(peers: tuple[str, ...] = ()) -> EchoConfig:
            return EchoConfig(
                greeting=settings.greeting,
                peers=peers,
                code=situation.code.sha256 if situation.code else None,
                broken=settings.broken,
                engine_missing=settings.engine_missing,
                password=SecretStr(situation.secret("echo")),
            )

        leaving = [
            Step(node.id, role, None)
            for node in situation.nodes.values()
            for role in sorted(node.roles - assignment.roles.get(node.id, frozenset()))
            if node.id != MANAGER
        ]
        if MANAGER not in assignment.roles:
            return [leaving, [Step(MANAGER, "memory", None)]]
        return [
            [Step(MANAGER, "memory", config())],
            [Step(node, "back", config()) for node in assignment.holders("back")],
            [Step(node, "front", config(backs)) for node in assignment.holders("front")],
            leaving,
        ]

    def urls(self, situation: Situation) -> dict[str, str]:
        fronts = [situation.nodes[node].address for node in situation.assignment.holders("front")]
        return {"application": f"http://{fronts[0]}:8080/"} if fronts else {}

    def facts(self, situation: Situation, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
        return {"echoes": str(len(metrics))}

    def summary(self, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        return {"request_rate": sum(values.get("request_rate", 0.0) for values in metrics.values())}


class EchoAgent(RoleAgent[EchoConfig]):
    """Keeps one `sleep` running and its configuration in a file."""

    config = EchoConfig

    async def apply(self, config: EchoConfig) -> None:
        if config.engine_missing:
            raise EngineMissingError("the engine 'echo' is not installed", value="echo")
        if config.broken:
            raise CommandFailedError("told to fail")
        if config.code is not None:
            await self.host.unpacked(config.code)
        files.write_atomically(self.host.directory / "echo.json", json.dumps(config.model_dump(mode="json")))
        await self.host.engines.ensure(EngineSpec("sleep", ("sleep", "100000"), self.host.directory))

    async def health(self) -> Health:
        trouble = self.host.engines.trouble("sleep")
        return Health(not trouble, trouble)

    async def metrics(self) -> dict[str, float]:
        return {"request_rate": 1.0}

    async def stop(self, drain_s: float) -> None:
        await asyncio.wait_for(self.host.engines.stop("sleep", number=signal.SIGTERM, timeout_s=drain_s), drain_s + 10)


SERVICE = ServiceType(
    name="echo",
    title="Echo",
    description="Says hello on every node",
    icon="box",
    roles=(
        Role(name="front", title="Front", minimum=1, initial=1),
        Role(name="back", title="Back"),
        Role(name="memory", title="Memory", scalable=False),
    ),
    settings=EchoSettings,
    planner="conpaas_echo:EchoPlanner",
    agents=dict.fromkeys(("front", "back", "memory"), "conpaas_echo:EchoAgent"),
    engines=(Engine(program="sleep", package="coreutils"),),
    takes_code=False,
    commands=(Command(name="say", title="Say a word", arguments=Say, run="conpaas_echo:say"),),
)

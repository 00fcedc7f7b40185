"""A service type from outside whose role keeps data: `store` nodes write notes down on their volumes and serve them."""

import asyncio
import signal
import sys
from collections.abc import Mapping, Sequence

from pydantic import Field, ValidationError

from conpaas.core import files, rpc, tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.messages.base import Message
from conpaas.core.messages.model import Wanted
from conpaas.core.service import (
    Assignment,
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

PORT = 8080
FILE = "notes.txt"


class NotesSettings(Message):
    """What users can set."""

    note: str = Field(default="", pattern="^[^\\n]*$")
    """What is to be written down: each change is one line more."""


class NotesConfig(Message):
    """Configuration of a store."""

    note: str


class NotesPlanner(Planner):
    """Every node is a `store`; none knows of another."""

    def check(self, before: Wanted, after: Wanted) -> None:
        check_roles(SERVICE, before, after)
        try:
            NotesSettings.model_validate(after.settings)
        except ValidationError as exc:
            raise rpc.bad_input(exc) from exc

    def assign(self, wanted: Mapping[str, int], nodes: Sequence[Node]) -> Assignment:
        count = wanted.get("store", 0)
        stores = sorted(nodes, key=lambda node: not node.roles)[:count]
        return Assignment({node.id: frozenset({"store"}) for node in stores}, count - len(stores))

    def stages(self, situation: Situation) -> list[Stage]:
        config = NotesConfig(note=NotesSettings.model_validate(situation.wanted.settings).note)
        stores = situation.assignment.holders("store")
        leaving = [node.id for node in situation.nodes.values() if "store" in node.roles and node.id not in stores]
        return [
            [Step(node, "store", config) for node in stores],
            [Step(node, "store", None) for node in leaving],
        ]

    def urls(self, situation: Situation) -> dict[str, str]:
        stores = situation.assignment.holders("store")
        return {"notes": f"http://{situation.nodes[stores[0]].address}:{PORT}/{FILE}"} if stores else {}


class Store(RoleAgent[NotesConfig]):
    """Keeps its notes in one file on its volume, served by an engine."""

    config = NotesConfig

    async def apply(self, config: NotesConfig) -> None:
        notes = self.host.data / FILE
        lines = notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []
        if config.note not in {"", *lines[-1:]}:
            lines.append(config.note)
        files.write_atomically(notes, "".join(f"{line}\n" for line in lines))
        argv = (sys.executable, "-m", "http.server", str(PORT), "--bind", self.host.address)
        await self.host.engines.ensure(EngineSpec("http", (*argv, "--directory", str(self.host.data)), self.host.data))
        await tasks.wait_for(self._answers, timeout_s=30, what="the store answers", clock=SYSTEM_CLOCK)

    async def _answers(self) -> bool | None:
        try:
            _, writer = await asyncio.open_connection(self.host.address, PORT)
        except OSError:
            return None
        writer.close()
        return True

    async def health(self) -> Health:
        trouble = self.host.engines.trouble("http")
        return Health(not trouble, trouble)

    async def stop(self, drain_s: float) -> None:
        await self.host.engines.stop("http", number=signal.SIGTERM, timeout_s=drain_s)


SERVICE = ServiceType(
    name="notes",
    title="Notes",
    description="Writes notes down, and keeps them",
    icon="notebook",
    roles=(Role(name="store", title="Store", minimum=1, initial=1, ports=(PORT,), volume=1 << 24),),
    settings=NotesSettings,
    planner="conpaas_notes:NotesPlanner",
    agents={"store": "conpaas_notes:Store"},
    engines=(Engine(program="python3", package="python3"),),
    takes_code=False,
)

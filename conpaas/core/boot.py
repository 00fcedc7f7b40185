"""The first program on a virtual machine: finds out who this machine is, and becomes its manager or agent.

                                                           the disk is grown
    a context is found (`_boot_sources`)      CONTEXT      names, clock, randomness are its own
    the network is as it says                 NETWORK      root's rights are given up
    the daemon asks for its certificate       ENROLLING
    it has one                                STARTING     the rest is told by the director's own questions

Each stage is a line on the console, `conpaas-boot: STAGE DETAIL`, and a report to the director. Without a context it
prints `conpaas-boot: waiting` and goes on as soon as there is one: a machine may be saved then, and go on as many
others. Started again by its supervisor, it only becomes the daemon again.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
from pydantic import ValidationError

from conpaas.core import _boot_machine as machine
from conpaas.core import _boot_network as network
from conpaas.core import _boot_sources as sources
from conpaas.core import daemon, footprint, logs, plugins, run
from conpaas.core._boot_sources import Found
from conpaas.core._boot_stages import Stages
from conpaas.core.clock import SYSTEM_CLOCK, Clock
from conpaas.core.errors import BadInputError, CommandFailedError, ConpaasError, PeerError
from conpaas.core.messages.internal import Context
from conpaas.core.service import PACKAGE, ServiceType

HOME = Path("/var/lib/conpaas")
"""Every instance that this machine ever was has a folder of its own in it."""
KNOWN = Path("/run/conpaas/context")
"""Holds the path of the context while the machine is up: the next start only becomes the daemon again."""
LOOK_S = 0.2
COMPLAINED_S = 2.0
METADATA_AFTER, METADATA_EVERY = 50, 25
"""In looks, not in time: that a machine which is to be saved loads what it needs is not held against its disks. One
that does not say that it is of a cloud with a metadata service asks for one all the same, later."""
_VERSION_S = 60.0

log = structlog.get_logger()


def main() -> None:
    """Run the program. An error ends it with exit code 1; its supervisor starts it anew."""
    logs.set_up()
    console = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    stages = Stages(console, clock=SYSTEM_CLOCK)
    try:
        path = Path(KNOWN.read_text(encoding="utf-8")) if KNOWN.exists() else asyncio.run(prepare(stages))
        asyncio.run(network.shut_metadata())
    except (ConpaasError, OSError) as exc:
        stages.failed(_words(exc))
        sys.exit(1)
    machine.become_user()
    become_daemon(path, stages)


def become_daemon(path: Path, stages: Stages) -> None:
    """Run the daemon whose context is at `path`; what it prints goes to a log that is bounded like its engines'."""
    kind = read(path.read_text(encoding="utf-8")).kind
    output = os.open(path.parent / "logs" / "daemon" / f"{kind}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    words = ["run", kind, "--context", str(path)]
    sys.argv[1:], sys.orig_argv[1:] = words, ["-I", "-m", "conpaas", *words]  # what an upgrade starts in our place
    daemon.main(kind, str(path), stages=stages)


async def prepare(stages: Stages, *, clock: Clock = SYSTEM_CLOCK) -> Path:
    """Make the machine what its context says; return where the daemon finds that.

    Raises BadInputError, CommandFailedError.
    """
    machine.set_clock()
    await _grow(stages)
    found, context = await find(stages, Look(), clock=clock)
    machine.set_clock()
    machine.stir(context.token.get_secret_value().encode())
    stages.reached("CONTEXT", f"{found.where}: {context.kind} {context.instance}")
    machine.name_machine(found.host_name or context.instance, context.instance)
    how = "as it was" if found.network is None else await network.apply(found.network)
    stages.reached("NETWORK", f"{how}, towards the director {daemon.address_towards(context.director)}")
    folder = machine.folder_for(context.instance, HOME)
    path = folder / "context.json"
    machine.give(path, found.text)
    if not (folder / "member.pem").exists():
        plugins.load("conpaas.core.keymaker:make")  # else a Python of its own would make the key
        stages.reached("ENROLLING", f"at {context.director}")
    if (folder / "volumes.json").exists():
        await machine.name_disks()  # it has volumes, and was rebooted
    KNOWN.parent.mkdir(parents=True, exist_ok=True)
    KNOWN.write_text(str(path), encoding="utf-8")
    return path


async def _grow(stages: Stages) -> None:
    """Use all of the disk; a machine that cannot is small, but works."""
    try:
        grown = await machine.grow_root()
    except CommandFailedError as exc:
        grown = f"the disk is not used as a whole: {exc.message}"
    if grown:
        stages.say(grown)


# -- finding a context ----------------------------------------------------------------------------------------------


@dataclass
class Look:
    """Looks at all places where a context may be, again and again."""

    _vainly: int = 0
    _leasing: bool = False

    async def __call__(self) -> Found | None:
        """Return what is there now. Raises BadInputError, CommandFailedError, PeerError for what is, but is no use."""
        if found := sources.read_file(sources.FILE):
            return found
        for device, name in sources.labelled(sources.block_devices()).items():
            if name in sources.DISKS:
                return await sources.read_disk(device, name)
        looks = self._vainly - (0 if sources.is_ec2() else METADATA_AFTER)
        self._vainly += 1
        return None if looks < 0 or looks % METADATA_EVERY else await self._metadata()

    async def _metadata(self) -> Found | None:
        if not self._leasing:
            await network.apply(network.Network(), wait=sources.is_ec2())
            self._leasing = True
        return await sources.read_metadata()


async def find(stages: Stages, look: Callable[[], Awaitable[Found | None]], *, clock: Clock) -> tuple[Found, Context]:
    """Look for a context until there is a good one; what is wrong with a bad one is said once."""
    said: set[str] = set()
    while True:
        try:
            found = await look()
            if found is not None:
                return found, read(found.text, found.where)
            text, pause_s = "waiting", LOOK_S
        except PeerError as exc:
            text, pause_s = f"CONTEXT {_words(exc)}", LOOK_S
        except (BadInputError, CommandFailedError) as exc:
            text, pause_s = f"CONTEXT {_words(exc)}", COMPLAINED_S
        if not said:
            await machine.load_drivers()
            preload()
            await run_engines()
        if text not in said:
            stages.say(text)
            said.add(text)
        await clock.sleep(pause_s)


def read(text: str, where: str = "") -> Context:
    """Read a context document. Raises BadInputError that quotes nothing of it: it holds a secret."""
    try:
        return Context.model_validate_json(text, extra="ignore")
    except ValidationError as exc:
        wrong = [f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg']}" for one in exc.errors(include_input=False)]
        raise BadInputError(f"{where} holds no context: {'; '.join(wrong)}") from None


def preload() -> None:
    """Load what either daemon needs: a machine that waits has the time, and one that is saved then keeps it."""
    plugins.load("conpaas.core.keymaker:make")
    for process in daemon.PROCESSES.values():
        plugins.load(process)
    for kind in plugins.discover(PACKAGE, "SERVICE", ServiceType).values():
        for reference in (kind.planner, *kind.agents.values()):
            plugins.load(reference)
    footprint.loaded()


async def run_engines() -> None:
    """Have each engine say its version: a machine that is saved then has programs and libraries in memory."""
    for kind in plugins.discover(PACKAGE, "SERVICE", ServiceType).values():
        for engine in kind.engines:
            for program in filter(None, map(run.find, engine.program.split("|"))):
                with contextlib.suppress(CommandFailedError):  # who needs it will say so
                    await run.run([str(program), "-v"], timeout_s=_VERSION_S, check=False)


def _words(exc: Exception) -> str:
    return exc.message if isinstance(exc, ConpaasError) else f"{type(exc).__name__}: {exc}"

"""`managerc` against a live manager: every action of the slides, with what it prints, and what it does."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from click.testing import CliRunner

from conpaas.cli.managerc import managerc
from conpaas.core.messages.model import ServiceView
from conpaas.core.run import find
from conpaas.core.states import ServiceState
from tests.fakes.load import fetch
from tests.fakes.stand import Stand, agents, stand
from tests.system.test_life import archive

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(find("haproxy") is None, reason="the engines of php are not installed"),
]


@dataclass
class Terminal:
    """A user's terminal: who is logged in, and the manager talked to."""

    here: Stand
    service: str
    url: str
    env: dict[str, str]
    words: tuple[str, ...] = ()

    async def says(self, *words: str, code: int = 0) -> list[str]:
        """Run one action; return the lines it prints."""
        argv = [self.url, *words, *self.words]
        done = await asyncio.to_thread(CliRunner().invoke, managerc, argv, env=self.env, prog_name="managerc")
        assert done.exit_code == code, (words, done.output, done.exception)
        return (done.stdout if code == 0 else done.stderr).rstrip("\n").split("\n")

    async def view(self) -> ServiceView:
        return await self.here.client.service(self.service)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def terminal(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Terminal]:
    async with stand() as here:
        service = await here.client.create(type="php", name="blog")
        view = await here.until(service.id, lambda view: view.manager and view.operation is None, what="a manager")
        token = (await here.client.create_token("terminal")).secret
        assert token is not None
        home = tmp_path_factory.mktemp("home")
        env = {"CONPAAS_URL": here.url, "CONPAAS_TOKEN": token.get_secret_value(), "XDG_CONFIG_HOME": str(home)}
        yield Terminal(here, service.id, view.manager.replace("https", "http"), env)


async def test_every_action_of_the_slides(terminal: Terminal, tmp_path: Path) -> None:
    says = terminal.says
    actions = [line.split()[0] for line in await says("help") if re.match(r"[a-z]\w+ +[A-Z]", line)]
    assert len(actions) == 16

    assert await says("getState") == ["INIT"]
    assert await says("listServiceNodes") == ["Service Node      Role(s)"]
    assert await says("startup", "--wait") == ["startup: RUNNING"]
    assert await says("getState") == ["RUNNING"]
    assert "started already" in (await says("startup", code=1))[0]

    node = agents(await terminal.view())[0]
    table = [f"{'Service Node':<17} Role(s)", f"{node.cloud_id:<17} PHP, PROXY, WEB"]
    assert await says("listServiceNodes") == table
    one = [
        f"{'Service Node':<17} {'Address':<16} Role(s)",
        f"{node.cloud_id:<17} {node.address:<16} PHP, PROXY, WEB",
    ]
    assert await says("getServiceNode", node.cloud_id) == one
    assert "no service node" in (await says("getServiceNode", "vm-none", code=1))[0]

    assert await says("add", "web=1", "php=1", "--wait") == ["add: RUNNING"]
    roles = sorted(line.split()[1] for line in (await says("listServiceNodes"))[1:])
    assert roles == ["PHP", "PROXY", "WEB"]
    for words, said in ((("php=0",), "changes nothing|1 or more|as many"), (("php=abc",), "not a change of roles")):
        assert re.search(said, (await says("add", *words, code=1))[0])
    assert "no role" in (await says("add", "nonesuch=1", code=1))[0]
    assert "cannot remove" in (await says("remove", "php=5", code=1))[0]
    assert await says("remove", "web=1", "php=1", "--wait") == ["remove: RUNNING"]
    assert len(await says("listServiceNodes")) == 2

    before = json.loads("\n".join(await says("getConfiguration")))
    assert before["settings"]["memory_limit"] == "128M"
    assert await says("updateConfiguration", "memory_limit=256M", "--wait") == ["updateConfiguration: RUNNING"]
    after = json.loads("\n".join(await says("getConfiguration")))
    assert after["settings"] == {**before["settings"], "memory_limit": "256M"}
    assert "memory_limit" in (await says("updateConfiguration", "memory_limit=lots", code=1))[0]

    file = archive(tmp_path / "site.tar.gz", {"index.php": "<?php echo ini_get('memory_limit');"})
    uploaded = (await says("uploadCodeVersion", str(file), "--description", "first"))[0]
    version = re.findall(r"code-\w+", uploaded)[0]
    listed = await says("listCodeVersions")
    assert version in listed[1]
    assert "code-default" in listed[2]
    activated = await says("updateConfiguration", "--code", version, "--wait")
    assert activated == ["updateConfiguration: RUNNING"]
    url = urlsplit((await terminal.view()).urls["application"])
    assert (await fetch(url.hostname or "", url.port or 0, "/")).body == b"268435456"
    copy = tmp_path / "copy.tar.gz"
    await says("downloadCodeVersion", version, str(copy))
    assert copy.read_bytes() == file.read_bytes()

    monitoring = [line[:18].strip() for line in await says("getHighLevelMonitoring")]
    assert monitoring == ["Request rate", "Error rate", "Throughput", "Response time"]
    assert any("enrolled" in line for line in await says("getLog"))
    assert await says("getLog", node.cloud_id)
    assert "no such log" in (await says("getLog", node.cloud_id, "nonesuch.log", code=1))[0]

    assert await says("shutdown", "--wait") == ["shutdown: STOPPED"]
    assert await says("getState") == ["STOPPED"]
    changes = "\n".join(await says("getStateChanges"))
    order = [changes.index(state) for state in ("INIT", "PROLOGUE", "RUNNING", "ADAPTING", "EPILOGUE", "STOPPED")]
    assert order == sorted(order)
    assert (await terminal.view()).state is ServiceState.STOPPED
    actors = {event.actor for event in (await terminal.here.client.history(service=terminal.service)).items}
    assert actors <= {"user:admin", "director", f"manager:{terminal.service}"}, actors


def all_of(leader: int) -> bytes:
    """Return what was printed on a terminal whose other end is closed; it may come in pieces."""
    said = b""
    with open(leader, "rb", buffering=0) as terminal, suppress(OSError):  # an error is the end
        while piece := terminal.read(10_000):
            said += piece
    return said


async def test_in_a_terminal_and_without_the_director(terminal: Terminal) -> None:
    """The director is away: the manager answers all the same, on a real terminal, by the certificate that is there."""
    printed = await terminal.says("listServiceNodes")  # gets the certificate
    leader, follower = os.openpty()
    env = {**os.environ, **terminal.env, "TERM": "xterm", "COLUMNS": "100"}
    del env["CONPAAS_TOKEN"]
    argv = [sys.executable, "-m", "conpaas.cli.managerc", terminal.url, "listServiceNodes"]
    await terminal.here.end_director()
    try:
        process = await asyncio.create_subprocess_exec(
            *argv, "--service", terminal.service, stdin=follower, stdout=follower, stderr=follower, env=env
        )
        os.close(follower)
        assert await asyncio.wait_for(process.wait(), 60) == 0
    finally:
        await terminal.here.start_director()
    assert all_of(leader).decode().splitlines() == printed
    again = Terminal(terminal.here, terminal.service, terminal.url, {**terminal.env, "CONPAAS_TOKEN": "forged"})
    assert await again.says("getState", code=4)

"""The role agents of PHP with real engines, under load."""

import asyncio
import json
import os
import re
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from conpaas.core import run, tasks
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import BadInputError, EngineMissingError, PeerError
from conpaas.core.service import Health, RoleAgent
from conpaas.services import php as package
from conpaas.services.php import haproxy
from conpaas.services.php.messages import (
    HTTP_PORT,
    PHP_PORT,
    SESSIONS_PORT,
    WEB_PORT,
    PhpConfig,
    ProxyConfig,
    SessionsConfig,
    WebConfig,
)
from conpaas.services.php.php import PhpAgent
from conpaas.services.php.proxy import ProxyAgent
from conpaas.services.php.sessions import SessionsAgent
from conpaas.services.php.web import WebAgent
from tests.fakes.engines_host import Machines, engine_pids, kill_engine, kill_machine, unprivileged
from tests.fakes.load import Load, Reply, fetch

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        not all(run.find(name) for name in ("haproxy", "nginx", "php-fpm8.2", "redis-server")),
        reason="the engines of php are not installed",
    ),
]

ONE = {
    "index.php": "<?php echo 'version ', require 'version.inc';",
    "version.inc": "<?php return 'one';",
    "style.css": "one",
    "info.php": "<?php echo json_encode(['server' => $_SERVER, 'post' => $_POST, 'files' => $_FILES]);",
    "ini.php": "<?php echo ini_get($_GET['name']);",
    "slow.php": "<?php usleep((int) $_GET['ms'] * 1000); echo 'slept';",
    "visits.php": "<?php session_start(); echo $_SESSION['n'] = ($_SESSION['n'] ?? 0) + 1;",
    "broken.php": "<?php this is no PHP",
    "private/.htaccess": "Require all denied\n",
    "private/key.txt": "secret",
    ".env": "secret",
}
TWO = {**ONE, "version.inc": "<?php return 'two';", "style.css": "two", "new.css": "new"}
PASSWORD = {"password": "s3cret"}


@pytest.fixture
async def machines(new_address: Callable[[], str]) -> AsyncIterator[Machines]:
    with unprivileged():
        machines = Machines(new_address)
        try:
            yield machines
        finally:
            await machines.close()


def address(agent: RoleAgent[Any]) -> str:
    return agent.host.address


async def behind(
    proxy: ProxyAgent, *, php: Sequence[PhpAgent] = (), web: Sequence[WebAgent] = (), **more: object
) -> None:
    """Give the proxy these members."""
    config = {
        "php": {agent.host.instance: address(agent) for agent in php},
        "web": {agent.host.instance: address(agent) for agent in web},
        "drain_s": 30.0,
        **more,
    }
    await proxy.apply(ProxyConfig.model_validate(config))


async def until(true: Callable[[], Awaitable[object]], within_s: float = 45) -> None:
    """Ask until it is so."""

    async def so() -> bool | None:
        return True if await true() else None

    await tasks.wait_for(so, timeout_s=within_s, what="the test", clock=SYSTEM_CLOCK, period_s=0.02)


async def _healthy(agent: RoleAgent[Any]) -> bool:
    return (await agent.health()).ok


async def page(agent: RoleAgent[Any], path: str = "/", port: int = HTTP_PORT, **options: Any) -> Reply:
    return await fetch(address(agent), port, path, **options)


@pytest.fixture
async def php(machines: Machines) -> PhpAgent:
    """One PHP back-end that serves version one."""
    agent = machines.agent(PhpAgent, "php-1")
    await agent.apply(PhpConfig(code=machines.code(ONE)))
    return agent


@pytest.fixture
async def proxy(machines: Machines, php: PhpAgent) -> ProxyAgent:
    """A proxy in front of it."""
    agent = machines.agent(ProxyAgent, "proxy-1")
    await behind(agent, php=[php])
    return agent


# -- one role -------------------------------------------------------------------------------------------------------


async def test_php_serves_programs_and_files_and_is_healthy(php: PhpAgent) -> None:
    assert (await page(php, "/", PHP_PORT)).body == b"version one"
    assert (await page(php, "/style.css", PHP_PORT)).body == b"one"
    assert await php.health() == Health(ok=True)
    assert (await php.metrics())["php_idle"] >= 1


async def test_applying_the_same_twice_starts_nothing(machines: Machines, php: PhpAgent) -> None:
    before = engine_pids(php)
    await php.apply(PhpConfig(code=machines.code(ONE)))

    assert engine_pids(php) == before


async def test_a_restarted_agent_finds_its_engines(machines: Machines, php: PhpAgent) -> None:
    pids = engine_pids(php)
    machines.end_agent(php)
    again = machines.agent(PhpAgent, "php-1", address(php))
    await again.apply(PhpConfig(code=machines.code(ONE)))

    assert engine_pids(again) == pids


async def test_php_sees_the_port_that_the_client_used_and_who_it_is(proxy: ProxyAgent) -> None:
    server = json.loads((await page(proxy, "/info.php/a/b?c=d")).body)["server"]

    assert server["HTTP_HOST"] == f"{address(proxy)}:{HTTP_PORT}"
    assert server["SERVER_PORT"] == str(HTTP_PORT)
    assert server["SERVER_NAME"] == address(proxy)
    assert server["PATH_INFO"] == "/a/b"
    assert server["QUERY_STRING"] == "c=d"
    assert server["SCRIPT_NAME"] == "/info.php"
    assert server["REMOTE_ADDR"].startswith("127.")
    assert "HTTP_PROXY" not in server or not server["HTTP_PROXY"]


async def test_forms_and_uploads_arrive(proxy: ProxyAgent) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    found = json.loads((await page(proxy, "/info.php", method="POST", headers=form, body=b"a=1")).body)
    assert found["post"] == {"a": "1"}

    upload = b'--B\r\nContent-Disposition: form-data; name="f"; filename="x.txt"\r\n\r\nhello\r\n--B--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=B"}
    files = json.loads((await page(proxy, "/info.php", method="POST", headers=kind, body=upload)).body)["files"]
    assert (files["f"]["size"], files["f"]["error"]) == (5, 0)


async def test_a_syntax_error_is_a_500_of_its_page_and_takes_nobody_out(proxy: ProxyAgent, php: PhpAgent) -> None:
    for _ in range(5):
        assert (await page(proxy, "/broken.php")).status == 500

    assert (await php.health()).ok
    assert (await page(proxy)).status == 200
    rows = await haproxy.counters(proxy.host.directory)
    assert [row["status"] for row in rows if row["svname"] == "php-1"] == ["UP"]
    assert "PHP Parse error" in (php.host.logs / "php.log").read_text()


async def test_the_first_code_version_is_a_page_that_counts_visits(machines: Machines, php: PhpAgent) -> None:
    code = machines.tree(str(Path(package.__file__).parent / "default_code"))
    await php.apply(PhpConfig(code=code))

    found = await page(php, "/", PHP_PORT)
    assert found.status == 200
    assert b"Welcome to ConPaaS" in found.body
    assert (await page(php, "/style.css", PHP_PORT)).headers["content-type"] == "text/css"
    assert not (php.host.logs / "php.log").exists()


@pytest.mark.parametrize("path", ["/.env", "/private/key.txt", "/version.inc", "/private/", "/.htaccess", "/nothing"])
async def test_what_is_not_for_visitors_is_not_shown(
    machines: Machines, proxy: ProxyAgent, php: PhpAgent, path: str
) -> None:
    web = machines.agent(WebAgent, "web-1")
    await web.apply(WebConfig(code=machines.code(ONE)))
    await behind(proxy, php=[php], web=[web], code=machines.code(ONE))

    for agent, port in ((proxy, HTTP_PORT), (php, PHP_PORT), (web, WEB_PORT)):
        assert (await page(agent, path, port)).status in {403, 404}


async def test_files_come_from_the_web_servers_and_pages_from_php(
    machines: Machines, proxy: ProxyAgent, php: PhpAgent
) -> None:
    code = machines.code(ONE)
    web = machines.agent(WebAgent, "web-1")
    await web.apply(WebConfig(code=code))
    await behind(proxy, php=[php], web=[web], code=code)

    await page(proxy, "/style.css")
    await page(proxy, "/style.css")
    await page(proxy, "/")
    rows = await haproxy.counters(proxy.host.directory)
    assert {row["svname"]: row["stot"] for row in rows if row["type"] == "2"} == {"web-1": "2", "php-1": "1"}


async def test_a_front_controller_answers_what_is_no_file(machines: Machines, php: PhpAgent) -> None:
    code = machines.code(ONE)
    await php.apply(PhpConfig(code=code, front_controller="always"))
    assert (await page(php, "/any/thing?x=1", PHP_PORT)).body == b"version one"

    await php.apply(PhpConfig(code=code, front_controller="auto"))
    assert (await page(php, "/any/thing", PHP_PORT)).status == 404

    rewriting = machines.code({**ONE, ".htaccess": "RewriteEngine On\nRewriteRule . /index.php [L]\n"})
    await php.apply(PhpConfig(code=rewriting))
    assert (await page(php, "/any/thing", PHP_PORT)).body == b"version one"


async def test_a_document_root_hides_the_rest_and_a_missing_one_is_an_error(machines: Machines, php: PhpAgent) -> None:
    code = machines.code({"public/index.php": "<?php echo 'public';", "config.php": "<?php echo 'config';"})
    await php.apply(PhpConfig(code=code, document_root="public"))
    assert (await page(php, "/", PHP_PORT)).body == b"public"
    assert (await page(php, "/config.php", PHP_PORT)).status == 404

    with pytest.raises(BadInputError, match="no folder 'htdocs'"):
        await php.apply(PhpConfig(code=code, document_root="htdocs"))
    assert (await page(php, "/", PHP_PORT)).body == b"public"


async def test_a_missing_engine_says_what_to_install(machines: Machines) -> None:
    agent = machines.agent(PhpAgent, "php-1")
    with pytest.raises(EngineMissingError, match=r"php-fpm5\.3 is not installed") as caught:
        await agent.apply(PhpConfig(php_version="5.3"))
    assert "conpaas engines install php" in caught.value.hint


async def test_preparing_leaves_what_is_served(machines: Machines, php: PhpAgent) -> None:
    one, two = machines.code(ONE), machines.code(TWO)
    await php.apply(PhpConfig(code=two, previous=one, prepare=True))

    assert (await page(php, "/", PHP_PORT)).body == b"version one"
    assert machines.forgotten == [frozenset({one, two})]


async def test_a_body_beyond_the_limit_is_refused(proxy: ProxyAgent, php: PhpAgent) -> None:
    await behind(proxy, php=[php], max_body_bytes=1000)

    assert (await page(proxy, "/info.php", method="POST", body=b"x" * 1001)).status == 413
    assert (await page(proxy, "/info.php", method="POST", body=b"x" * 1000)).status == 200


async def test_a_long_folder_name_does_not_matter(machines: Machines) -> None:
    name = "x" * 90
    php, proxy = machines.agent(PhpAgent, f"php-{name}"), machines.agent(ProxyAgent, f"proxy-{name}")
    await php.apply(PhpConfig(code=machines.code(ONE)))
    await behind(proxy, php=[php])

    assert (await page(proxy)).body == b"version one"


async def test_what_an_application_writes_stays_over_another_version_and_back(
    machines: Machines, php: PhpAgent
) -> None:
    writer = {"index.php": "<?php file_put_contents('note', 'x', FILE_APPEND); echo filesize('note');"}
    code = machines.code(writer)
    await php.apply(PhpConfig(code=code))
    assert (await page(php, "/", PHP_PORT)).body == b"1"

    await php.apply(PhpConfig(code=machines.code(ONE), previous=code))
    await php.apply(PhpConfig(code=code))
    assert (await page(php, "/", PHP_PORT)).body == b"2"


async def test_stopping_ends_everything(proxy: ProxyAgent, php: PhpAgent) -> None:
    pids = [*engine_pids(proxy).values(), *engine_pids(php).values()]
    assert len(pids) == 3
    await proxy.stop(30)
    await php.stop(30)

    for pid in pids:
        await until(partial(_gone, pid))
    assert not list((php.host.directory / "run").glob("*-*.sock"))


async def _gone(group: int) -> bool:
    """Tell whether no process of a group is left; whoever adopted its orphans may take a moment to bury them."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


# -- sessions -------------------------------------------------------------------------------------------------------


async def test_sessions_are_shared_and_outlive_their_store(
    machines: Machines, php: PhpAgent, proxy: ProxyAgent
) -> None:
    store = machines.agent(SessionsAgent, "manager")
    await store.apply(SessionsConfig.model_validate(PASSWORD))
    config = PhpConfig.model_validate(
        {"code": machines.code(ONE), "sessions": address(store), "sessions_password": "s3cret"}
    )
    other = machines.agent(PhpAgent, "php-2")
    await asyncio.gather(php.apply(config), other.apply(config))
    await behind(proxy, php=[php, other])

    first = await page(proxy, "/visits.php")
    cookie = {"Cookie": first.headers["set-cookie"].partition(";")[0]}
    seen = [int((await page(proxy, "/visits.php", headers=cookie)).body) for _ in range(6)]
    assert seen == [2, 3, 4, 5, 6, 7]

    assert (await store.metrics())["sessions"] == 1
    await store.stop(30)
    await store.apply(SessionsConfig.model_validate(PASSWORD))
    assert (await page(proxy, "/visits.php", headers=cookie)).body == b"8"


async def test_sessions_are_taken_over_from_another_store_once(
    machines: Machines, php: PhpAgent, proxy: ProxyAgent
) -> None:
    before, after = machines.agent(SessionsAgent, "before"), machines.agent(SessionsAgent, "after")
    await before.apply(SessionsConfig.model_validate(PASSWORD))
    code = {"code": machines.code(ONE), "sessions_password": "s3cret"}
    await php.apply(PhpConfig.model_validate({**code, "sessions": address(before)}))
    await behind(proxy, php=[php])
    first = await page(proxy, "/visits.php")
    cookie = {"Cookie": first.headers["set-cookie"].partition(";")[0]}

    async def visits() -> int:
        return int((await page(proxy, "/visits.php", headers=cookie)).body)

    moving = SessionsConfig.model_validate({**PASSWORD, "source": address(before)})
    await after.apply(moving)
    assert await visits() == 2  # still in the one before, and copied
    await until_equal(before, after)
    await after.apply(moving)
    await php.apply(PhpConfig.model_validate({**code, "sessions": address(after)}))
    assert await visits() == 3
    await after.apply(SessionsConfig.model_validate(PASSWORD))
    await after.apply(moving)  # as a manager does whose round begins again
    assert await visits() == 4
    await before.stop(30)
    assert await visits() == 5


async def until_equal(*stores: SessionsAgent) -> None:
    """Wait until all stores have come equally far in one replication."""
    async with asyncio.timeout(45):
        while len({await _offset(store) for store in stores}) > 1:
            await asyncio.sleep(0.01)


async def _offset(store: SessionsAgent) -> str:
    replication = await store._ask("INFO replication")
    return next(line for line in replication.splitlines() if line.startswith("master_repl_offset:"))


async def test_sessions_that_cannot_be_reached_are_left_behind(machines: Machines) -> None:
    store = machines.agent(SessionsAgent, "manager")
    gone = machines.agent(SessionsAgent, "gone")
    await store.apply(SessionsConfig.model_validate({**PASSWORD, "source": address(gone)}))

    assert "role:master" in await store._ask("INFO replication")
    assert (await store.health()).ok


async def test_the_session_store_wants_its_password(machines: Machines) -> None:
    store = machines.agent(SessionsAgent, "manager")
    await store.apply(SessionsConfig.model_validate(PASSWORD))
    reader, writer = await asyncio.open_connection(address(store), SESSIONS_PORT)
    writer.write(b"KEYS *\r\n")
    assert (await reader.readline()).startswith(b"-NOAUTH")
    writer.close()
    await writer.wait_closed()
    assert (await store.health()).ok


# -- nothing is lost ------------------------------------------------------------------------------------------------


async def test_backends_come_and_go_without_a_failed_request(
    machines: Machines, proxy: ProxyAgent, php: PhpAgent
) -> None:
    others = [machines.agent(PhpAgent, f"php-{number}") for number in (2, 3)]
    config = PhpConfig(code=machines.code(ONE))
    async with Load(address(proxy), HTTP_PORT, ["/", "/slow.php?ms=100"]) as load:
        for _ in range(2):
            await asyncio.gather(*(other.apply(config) for other in others))
            await behind(proxy, php=[php, *others])
            await load.more(50)
            await behind(proxy, php=[php])
            for other in others:
                await other.stop(30)
            await load.more(20)

    assert not load.failures
    assert await haproxy.servers(proxy.host.directory) == {
        ("php", "php-1"): haproxy.Server(f"{address(php)}:{PHP_PORT}", open=True)
    }


async def test_a_backend_may_be_known_by_a_name(
    proxy: ProxyAgent, php: PhpAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_up(host: str, *_: Any, **__: Any) -> list[Any]:
        if host != "ec2-1.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address(php), 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    await proxy.apply(ProxyConfig(php={"php-2": "ec2-1.example"}, drain_s=30.0))

    assert await haproxy.servers(proxy.host.directory) == {
        ("php", "php-2"): haproxy.Server(f"{address(php)}:{PHP_PORT}", open=True)
    }
    assert (await page(proxy)).body == b"version one"
    with pytest.raises(PeerError, match=r"lost\.example"):
        await proxy.apply(ProxyConfig(php={"php-3": "lost.example"}))
    assert (await page(proxy)).body == b"version one"


async def test_code_is_switched_without_a_failed_or_mixed_answer(
    machines: Machines, proxy: ProxyAgent, php: PhpAgent
) -> None:
    one, two = machines.code(ONE), machines.code(TWO)
    good = {b"version one", b"version two"}
    async with Load(address(proxy), HTTP_PORT, good=lambda reply: reply.status == 200 and reply.body in good) as load:
        for before, after in ((one, two), (two, one), (one, two)):
            await php.apply(PhpConfig(code=after, previous=before, prepare=True))
            await php.apply(PhpConfig(code=after, previous=before))
            await behind(proxy, php=[php], code=after, previous=before)
            await load.more(20)

    assert not load.failures
    assert (await page(php, "/", PHP_PORT)).body == b"version two"


async def test_new_files_are_found_and_old_ones_served_by_web_servers_through_a_switch(
    machines: Machines, proxy: ProxyAgent, php: PhpAgent
) -> None:
    one, two = machines.code(ONE), machines.code(TWO)
    web = machines.agent(WebAgent, "web-1")
    await web.apply(WebConfig(code=one))
    await behind(proxy, php=[php], web=[web], code=one)
    async with Load(address(proxy), HTTP_PORT, ["/style.css", "/"]) as load:
        await asyncio.gather(php.apply(PhpConfig(code=two)), web.apply(WebConfig(code=two)))
        await behind(proxy, php=[php], web=[web], code=two)

    assert not load.failures
    assert (await page(proxy, "/new.css")).body == b"new"
    assert (await page(proxy, "/style.css")).body == b"two"
    assert "new.css web" in (await haproxy.command(proxy.host.directory, "show map static.map"))


async def test_settings_change_without_a_failed_request_also_of_long_scripts(
    machines: Machines, proxy: ProxyAgent, php: PhpAgent
) -> None:
    code = machines.code(ONE)
    async with Load(address(proxy), HTTP_PORT, ["/", "/slow.php?ms=700"], clients=8) as load:
        for memory in ("64M", "256M"):
            await php.apply(PhpConfig(code=code, memory_limit=memory))
            limit = (await page(php, "/ini.php?name=memory_limit", PHP_PORT)).body
            assert int(limit) == int(memory[:-1]) << 20
            await behind(proxy, php=[php], timeout_s=60 + int(memory[:-1]))

    assert not load.failures
    assert len(list((php.host.directory / "fpm").glob("*.conf"))) == 1
    assert len(engine_pids(php)) == 2


async def test_a_killed_backend_costs_no_request_and_is_soon_out(
    machines: Machines, proxy: ProxyAgent, php: PhpAgent
) -> None:
    other = machines.agent(PhpAgent, "php-2")
    await other.apply(PhpConfig(code=machines.code(ONE)))
    await behind(proxy, php=[php, other])
    async with Load(address(proxy), HTTP_PORT) as load:
        kill_machine(other)
        await until(lambda: _down(proxy, "php-2"))

    assert not load.failures


def test_a_dead_backend_is_out_within_two_seconds_as_far_as_it_is_our_doing() -> None:
    """How soon it really is depends on how busy the machine is."""
    period_ms, failures = (int(re.findall(rf"{word} (\d+)", haproxy.SERVER_OPTIONS)[0]) for word in ("inter", "fall"))
    assert period_ms * failures <= 2000


async def _down(proxy: ProxyAgent, name: str) -> bool:
    rows = await haproxy.counters(proxy.host.directory)
    return next(row["status"] for row in rows if row["svname"] == name).startswith("DOWN")


@pytest.mark.parametrize("engine", ["nginx", "fpm"])
async def test_a_killed_engine_comes_back_and_costs_no_request(
    machines: Machines, proxy: ProxyAgent, php: PhpAgent, engine: str
) -> None:
    other = machines.agent(PhpAgent, "php-2")
    await other.apply(PhpConfig(code=machines.code(ONE)))
    await behind(proxy, php=[php, other])
    name = next(name for name in engine_pids(other) if name.startswith(engine))
    async with Load(address(proxy), HTTP_PORT) as load:
        kill_engine(other, name)
        await until(lambda: _healthy(other))

    assert not load.failures


async def test_a_busy_backend_is_not_taken_for_a_dead_one(machines: Machines, proxy: ProxyAgent, php: PhpAgent) -> None:
    async with asyncio.TaskGroup() as group:
        slow = [group.create_task(page(proxy, "/slow.php?ms=2500")) for _ in range(24)]
    assert [task.result().status for task in slow] == [200] * 24
    rows = await haproxy.counters(proxy.host.directory)
    assert [row["chkdown"] for row in rows if row["svname"] == "php-1"] == ["0"]


async def test_a_backend_that_leaves_finishes_what_it_has_begun(
    machines: Machines, proxy: ProxyAgent, php: PhpAgent
) -> None:
    other = machines.agent(PhpAgent, "php-2")
    await other.apply(PhpConfig(code=machines.code(ONE)))
    await behind(proxy, php=[other])
    async with asyncio.TaskGroup() as group:
        slow = group.create_task(page(proxy, "/slow.php?ms=4000"))
        await until(lambda: haproxy._busy(proxy.host.directory, ["php/php-2"]))
        await behind(proxy, php=[php])
        await other.stop(30)
    assert slow.result().body == b"slept"


async def test_a_restarted_proxy_agent_and_a_crashed_haproxy_agree_with_the_configuration(
    machines: Machines, proxy: ProxyAgent, php: PhpAgent
) -> None:
    other = machines.agent(PhpAgent, "php-2")
    await other.apply(PhpConfig(code=machines.code(ONE)))
    await behind(proxy, php=[php, other])
    kill_engine(proxy, "haproxy")
    await until(lambda: _healthy(proxy))
    assert set(await haproxy.servers(proxy.host.directory)) == {("php", "php-1"), ("php", "php-2")}

    machines.end_agent(proxy)
    again = machines.agent(ProxyAgent, "proxy-1", address(proxy))
    await behind(again, php=[other])
    assert set(await haproxy.servers(again.host.directory)) == {("php", "php-2")}


# -- metrics --------------------------------------------------------------------------------------------------------


async def test_metrics_tell_rates_errors_and_times(proxy: ProxyAgent) -> None:
    await proxy.metrics()
    for path in ["/"] * 20 + ["/broken.php"] * 2:
        await page(proxy, path)
    await asyncio.gather(*(page(proxy, "/slow.php?ms=3000") for _ in range(2)))
    values = await proxy.metrics()

    assert values["request_rate"] > values["error_rate"] > 0
    assert values["throughput"] > 0
    assert values["backends_up"] == 1
    assert values["response_p50"] < 2000 < 2900 <= values["response_p99"]
    await proxy.stop(1)


# -- applications that nobody here wrote ----------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/usr/share/adminer").is_dir(), reason="adminer is not installed")
async def test_adminer_runs_unmodified(machines: Machines, proxy: ProxyAgent, php: PhpAgent) -> None:
    code = machines.tree("/usr/share/adminer")
    web = machines.agent(WebAgent, "web-1")
    await asyncio.gather(php.apply(PhpConfig(code=code)), web.apply(WebConfig(code=code)))
    await behind(proxy, php=[php], web=[web], code=code)

    found = await page(proxy, "/adminer/")
    assert found.status == 200
    assert b"Login - Adminer" in found.body
    assert (await page(proxy, "/adminer/static/default.css")).headers["content-type"] == "text/css"


@pytest.mark.skipif(not Path("/usr/share/dokuwiki").is_dir(), reason="dokuwiki is not installed")
async def test_a_page_is_written_and_read_in_dokuwiki(machines: Machines, proxy: ProxyAgent, php: PhpAgent) -> None:
    """As its authors ship it: configuration and data inside the code, an application that writes files and sessions."""
    config = PhpConfig(code=dokuwiki(machines))
    await php.apply(config)
    await behind(proxy, php=[php], code=config.code)

    edit = await page(proxy, "/doku.php?id=start&do=edit")
    assert edit.status == 200
    cookie = "; ".join(re.findall(r"(DokuWiki=[^;]+)", edit.headers["set-cookie"]))
    fields = dict(re.findall(rb'<input type="hidden" name="(\w+)" value="([^"]*)"', edit.body))
    form = {name.decode(): value.decode() for name, value in fields.items()}
    form |= {"wikitext": "Hello from the test", "do[save]": "Save", "summary": ""}
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Cookie": cookie}
    saved = await page(proxy, "/doku.php", method="POST", headers=headers, body=urlencode(form).encode())
    assert saved.status == 302, (edit.body, saved.body)

    assert b"Hello from the test" in (await page(proxy, "/doku.php/start")).body
    assert (await page(proxy, "/lib/exe/css.php")).headers["content-type"].startswith("text/css")
    assert (await page(proxy, "/data/pages/start.txt")).status == 403
    assert (await page(proxy, "/lib/images/license/button/cc-by-sa.png")).status == 200


def dokuwiki(machines: Machines) -> str:
    """Undo what Debian does to DokuWiki: it spreads it over the machine."""
    code = machines.tree("/usr/share/dokuwiki")
    folder = machines.directory / "unpacked" / code
    (folder / "inc/preload.php").unlink()
    (folder / "conf").mkdir()
    for name in ("acronyms", "entities", "interwiki", "mime", "scheme", "smileys"):
        shutil.copy(f"/etc/dokuwiki/{name}.conf", folder / "conf")
    for name in ("dokuwiki", "license", "mediameta", "plugins", "plugins.required"):
        shutil.copy(f"/etc/dokuwiki/{name}.php", folder / "conf")
    (folder / "conf/local.php").write_text(
        "<?php $conf['useacl'] = $conf['updatecheck'] = 0; $conf['savedir'] = './data'; $conf['userewrite'] = 2;"
    )
    for name in (
        "attic",
        "cache",
        "index",
        "locks",
        "log",
        "media",
        "media_attic",
        "media_meta",
        "meta",
        "pages",
        "tmp",
    ):
        (folder / "data" / name).mkdir(parents=True)
    (folder / "data/.htaccess").write_text("Order allow,deny\nDeny from all\n")
    return code

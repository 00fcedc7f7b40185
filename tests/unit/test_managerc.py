"""`managerc`, against a manager with real certificates."""

import asyncio
import json
import re
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from click.testing import CliRunner, Result

from conpaas.cli.managerc import managerc
from conpaas.core import identity, rpc, tls
from conpaas.core.errors import ForbiddenError
from conpaas.core.identity import Identity
from conpaas.core.messages import manager, public
from conpaas.core.messages.base import Endpoint
from conpaas.core.messages.internal import StateHistory, UploadQuery
from conpaas.core.messages.model import CodeVersionView, LogChunk, LogName, OperationView, StateChange, Wanted
from conpaas.core.rpc import Call
from conpaas.core.states import OperationState, ServiceState
from tests.fakes.api import THEN, TOKEN, FakeApi, node, serving

DEPLOYMENT, USER = "dep-1", "usr-1"
Run = Callable[..., Result]


class Deployment(FakeApi):
    """A director that certifies users, and one manager."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.authority = tls.Authority.create(DEPLOYMENT)
        self.directory = directory
        self.who = Identity.manager(DEPLOYMENT, "svc-1", 1, "ins-1")
        """What the manager's certificate says."""
        self.manager_url = ""
        self.states = [ServiceState.ADAPTING, ServiceState.RUNNING]
        self.asked: list[Any] = []
        self.callers: set[str] = set()
        self.certified = 0

    async def get_certificate(self, call: Call[None], body: public.CertificateRequest) -> public.UserCertificate:
        self.certified += 1
        signed = self.authority.sign(body.csr.encode(), Identity.for_user(DEPLOYMENT, USER), lifetime_s=86400)
        ca = self.authority.certificate_pem.decode()
        return public.UserCertificate(certificate=signed.decode(), ca=ca, deployment=DEPLOYMENT, user=USER)

    # -- the manager

    async def _caller(self, request: web.Request, endpoint: Endpoint) -> None:
        assert request.transport is not None
        caller = identity.peer_identity(request.transport.get_extra_info("ssl_object"), DEPLOYMENT)
        if caller is None or caller.user != USER:
            raise ForbiddenError("not yours")
        self.callers.add(caller.uri)

    def manager_routes(self) -> list[web.RouteDef]:
        handlers: dict[Endpoint, rpc.Handler] = {
            manager.ADD: self.change,
            manager.REMOVE: self.change,
            manager.STARTUP: self.change,
            manager.SHUTDOWN: self.change,
            manager.UPDATE_CONFIGURATION: self.change,
            manager.LIST_NODES: self.manager_nodes,
            manager.GET_STATE: self.manager_state,
            manager.GET_STATES: self.manager_states,
            manager.GET_CONFIGURATION: self.manager_configuration,
            manager.LIST_CODE: self.manager_code,
            manager.UPLOAD_CODE: self.manager_upload,
            manager.DOWNLOAD_CODE: self.manager_download,
            manager.GET_MONITORING: self.manager_monitoring,
            manager.LIST_ALL_LOGS: self.manager_logs,
            manager.READ_NODE_LOG: self.manager_log,
        }
        return [rpc.route(endpoint, handler, self._caller) for endpoint, handler in handlers.items()]

    async def change(self, call: Call[None], body: Any) -> OperationView:
        self.asked.append((call.http.path, body))
        return OperationView(
            id="op-1",
            service="svc-1",
            kind="scale",
            state=OperationState.RUNNING,
            generation=8,
            created=THEN,
            deadline=THEN,
        )

    async def manager_nodes(self, call: Call[None]) -> manager.Nodes:
        return manager.Nodes(nodes=(node(1, "sessions", kind="manager"), node(2, "proxy", "php"), node(3, "web")))

    async def manager_state(self, call: Call[None]) -> manager.ManagerState:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return manager.ManagerState(state=state, generation=8)

    async def manager_states(self, call: Call[None]) -> StateHistory:
        return StateHistory(changes=(StateChange(state=ServiceState.INIT, at=THEN, actor="user:ada"),))

    async def manager_configuration(self, call: Call[None]) -> manager.Configuration:
        return manager.Configuration(wanted=Wanted(running=True, settings={"php_version": "8.2", "limit": 30}))

    async def manager_code(self, call: Call[None]) -> manager.CodeVersions:
        return manager.CodeVersions(items=(self._code(),))

    async def manager_upload(self, call: Call[None]) -> CodeVersionView:
        name = call.query(UploadQuery).filename
        self.blobs[name] = b"".join([chunk async for chunk in call.chunks()])
        return self._code()

    async def manager_download(self, call: Call[None]) -> web.Response:
        return web.Response(body=b"bytes of " + call.params["version"].encode())

    async def manager_monitoring(self, call: Call[None]) -> manager.Monitoring:
        return manager.Monitoring(request_rate=12.345, throughput=2048, response_p50=1, response_p95=2, response_p99=3)

    async def manager_logs(self, call: Call[None]) -> manager.ManagerLogs:
        names = (LogName(node="manager", name="manager.log"), LogName(node="ins-2", name="php.error.log"))
        return manager.ManagerLogs(logs=names)

    async def manager_log(self, call: Call[None]) -> LogChunk:
        return LogChunk(text=f"{call.params['node']}: {call.params['name']}\n", next=9, size=9)

    def _code(self) -> CodeVersionView:
        return CodeVersionView(
            id="code-y3gOfi", filename="site.tar", sha256="0" * 64, size=1536, created=THEN, active=True
        )


@asynccontextmanager
async def serving_both(deployment: Deployment, address: str) -> AsyncIterator[None]:
    key, csr = tls.make_key_and_csr()
    files = [deployment.directory / name for name in ("m.crt", "m.key", "ca.crt")]
    certificate = deployment.authority.sign(csr, deployment.who, lifetime_s=3600)
    for file, pem in zip(files, (certificate, key, deployment.authority.certificate_pem), strict=True):
        file.write_bytes(pem)
    app = web.Application(middlewares=[rpc.errors_to_replies])
    app.add_routes(deployment.manager_routes())
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    context = identity.server_context(*files, require_client=True)
    await web.TCPSite(runner, address, 0, ssl_context=context).start()
    deployment.manager_url = f"http://{address}:{runner.addresses[0][1]}/"
    try:
        async with serving(deployment):
            yield
    finally:
        await runner.cleanup()


@contextmanager
def running(deployment: Deployment, address: str) -> Iterator[Deployment]:
    ready, over = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        async with serving_both(deployment, address):
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(45)
    try:
        yield deployment
    finally:
        loops[0].call_soon_threadsafe(over.set)
        thread.join(45)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def deployment(home: Path, address: str) -> Iterator[Deployment]:
    made = Deployment(home)
    made.add("blog")
    with running(made, address):
        yield made


@pytest.fixture
def run(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("CONPAAS_URL", deployment.url)
    monkeypatch.setenv("CONPAAS_TOKEN", TOKEN)

    def invoke(*words: str) -> Result:
        return CliRunner().invoke(managerc, [deployment.manager_url, *words], prog_name="managerc")

    return invoke


HELP = """\
Usage: managerc URL ACTION [options]

Action could be one of:
[ACTION]                [DESCRIPTION]
add                     Add more service nodes to a deployment
downloadCodeVersion     Download a code version
getConfiguration        Get the configuration of a deployment
getHighLevelMonitoring  Get the average request rate and throughput
getLog                  Get raw logging
getServiceNode          Get information about a single service node
getState                Get the state of a deployment
getStateChanges         Get the state change history of a deployment
help                    Print the help menu
listCodeVersions        List identifiers of all code versions stored by a deployment
listServiceNodes        Get a list of service nodes
remove                  Remove some service nodes from a deployment
shutdown                Shutdown a deployment
startup                 Startup a deployment
updateConfiguration     Update the configuration of a deployment
uploadCodeVersion       Upload a new code version
"""


@pytest.mark.parametrize(("words", "code"), [(("help",), 0), ((), 2), (("--help",), 0)])
def test_the_help_menu_is_the_one_of_the_slides(run: Run, words: tuple[str, ...], code: int) -> None:
    result = run(*words)

    assert result.stdout == HELP
    assert result.exit_code == code


def test_help_needs_no_manager(home: Path) -> None:
    assert CliRunner().invoke(managerc, ["help"], prog_name="managerc").stdout == HELP


def test_list_service_nodes_is_the_table_of_the_slides(run: Run) -> None:
    assert run("listServiceNodes").stdout == (
        "Service Node      Role(s)\n"
        "i-2               PROXY, PHP\n"
        "i-3               WEB\n"
    )  # fmt: skip


def test_get_service_node_is_the_table_of_the_slides(run: Run) -> None:
    expected = (
        "Service Node      Address          Role(s)\n"
        "i-3               127.9.0.3        WEB\n"
    )  # fmt: skip

    assert run("getServiceNode", "i-3").stdout == expected
    assert run("getServiceNode", "ins-3").stdout == expected


def test_an_unknown_node_is_an_error(run: Run) -> None:
    result = run("getServiceNode", "i-9")

    assert result.exit_code == 1
    assert result.stderr == "error: there is no service node 'i-9'\nhint: 'listServiceNodes' lists them\n"


@pytest.mark.parametrize(("action", "path"), [("add", "/nodes/add"), ("remove", "/nodes/remove")])
def test_nodes_are_added_and_removed_by_role(run: Run, deployment: Deployment, action: str, path: str) -> None:
    assert run(action, "web=2", "php=+1").stdout == f"{action}: begun, as operation op-1\n"

    asked, body = deployment.asked[0]
    assert (asked, body.roles) == (path, {"web": 2, "php": 1})
    assert body.key is not None


@pytest.mark.parametrize("word", ["web", "web=0", "web=-1", "web=x"])
def test_counts_that_make_no_sense_are_refused(run: Run, deployment: Deployment, word: str) -> None:
    assert run("add", word).exit_code == 1
    assert deployment.asked == []


@pytest.mark.parametrize("action", ["startup", "shutdown"])
def test_startup_and_shutdown_can_be_waited_for(run: Run, deployment: Deployment, action: str) -> None:
    assert run(action).stdout == f"{action}: begun, as operation op-1\n"
    assert run(action, "--wait").stdout == f"{action}: RUNNING\n"
    assert [path for path, _ in deployment.asked] == [f"/{action}", f"/{action}"]


def test_a_wait_that_ends_in_error_is_exit_code_3(run: Run, deployment: Deployment) -> None:
    deployment.states = [ServiceState.ADAPTING, ServiceState.ERROR]

    assert run("startup", "--wait").exit_code == 3


def test_state_and_history_are_shown(run: Run) -> None:
    assert run("getState").stdout == "ADAPTING\n"
    assert re.search(r"^INIT .* user:ada$", run("getStateChanges").stdout, re.MULTILINE)


def test_settings_keep_the_kind_they_have(run: Run, deployment: Deployment) -> None:
    assert json.loads(run("getConfiguration").stdout)["settings"] == {"php_version": "8.2", "limit": 30}

    assert run("updateConfiguration", "php_version=8.4", "limit=60", "--code", "code-1").exit_code == 0

    _, body = deployment.asked[0]
    assert body.settings == {"php_version": "8.4", "limit": 60}
    assert body.code == "code-1"


def test_an_update_of_nothing_is_refused(run: Run, deployment: Deployment) -> None:
    assert run("updateConfiguration").exit_code == 1
    assert deployment.asked == []


def test_monitoring_says_request_rate_and_throughput(run: Run) -> None:
    text = run("getHighLevelMonitoring").stdout

    assert "Request rate      12.35 requests/s\n" in text or "Request rate      12.34 requests/s\n" in text
    assert "Throughput        2K/s\n" in text


def test_logs_are_raw_and_the_managers_unless_another_is_named(run: Run) -> None:
    assert run("getLog").stdout == "manager: manager.log\n"
    assert run("getLog", "i-2").stdout == "ins-2: php.error.log\n"
    assert run("getLog", "i-9").exit_code == 1


def test_code_goes_up_and_down(run: Run, deployment: Deployment, tmp_path: Path) -> None:
    (tmp_path / "site.tar").write_bytes(b"tar")
    target = tmp_path / "fetched.tar"

    up = run("uploadCodeVersion", str(tmp_path / "site.tar"))
    down = run("downloadCodeVersion", "code-y3gOfi", str(target))

    assert up.stdout == "Code version code-y3gOfi has been uploaded\n"
    assert deployment.blobs["site.tar"] == b"tar"
    assert down.exit_code == 0
    assert target.read_bytes() == b"bytes of code-y3gOfi"
    assert "code-y3gOfi  active  site.tar  1.5K" in run("listCodeVersions").stdout


def test_json_is_the_managers_documents(run: Run) -> None:
    assert json.loads(run("getState", "--json").stdout)["state"] == "ADAPTING"
    assert [found["id"] for found in json.loads(run("listServiceNodes", "--json").stdout)] == ["ins-2", "ins-3"]


# -- whom it talks to


def test_the_certificate_is_got_by_itself_and_kept(run: Run, deployment: Deployment, home: Path) -> None:
    run("getState")
    run("getState")

    assert deployment.certified == 1
    assert deployment.callers == {f"spiffe://{DEPLOYMENT}/user/{USER}"}
    assert stat.S_IMODE((home / "conpaas" / "managerc.key").stat().st_mode) == 0o600


def test_with_a_certificate_and_the_service_named_no_director_is_needed(
    run: Run, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("getState")
    monkeypatch.delenv("CONPAAS_TOKEN")

    assert run("getState", "--service", "svc-1").exit_code == 0
    refused = run("getState")
    assert refused.exit_code == 4
    assert "--service" in refused.stderr


def test_the_manager_of_another_service_is_not_the_named_one(run: Run) -> None:
    result = run("getState", "--service", "svc-2")

    assert result.exit_code == 5
    assert "certificate" in result.stderr


def started_with(home: Path, address: str, who: Identity, monkeypatch: pytest.MonkeyPatch) -> Result:
    made = Deployment(home)
    made.add("blog")
    made.who = who
    with running(made, address):
        monkeypatch.setenv("CONPAAS_URL", made.url)
        monkeypatch.setenv("CONPAAS_TOKEN", TOKEN)
        result = CliRunner().invoke(managerc, [made.manager_url, "startup"])
        assert made.asked == []
    return result


@pytest.mark.parametrize(
    ("who", "message"),
    [
        (Identity.manager(DEPLOYMENT, "svc-9", 1, "ins-1"), "not of a service of yours"),
        (Identity.agent(DEPLOYMENT, "svc-1", "ins-1"), "no manager of this deployment"),
        (Identity.for_user(DEPLOYMENT, "usr-9"), "no manager of this deployment"),
    ],
)
def test_who_is_not_the_manager_of_a_service_of_ours_is_told_nothing(
    home: Path, address: str, who: Identity, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = started_with(home, address, who, monkeypatch)

    assert result.exit_code == 1
    assert message in result.stderr


def test_a_manager_of_another_authority_is_told_nothing(
    run: Run, deployment: Deployment, home: Path, new_address: Callable[[], str]
) -> None:
    (home / "other").mkdir()
    other = Deployment(home / "other")
    with running(other, new_address()):
        result = CliRunner().invoke(managerc, [other.manager_url, "startup"])

    assert result.exit_code == 5
    assert "certificate verify failed" in result.stderr
    assert other.asked == []


@pytest.mark.parametrize(
    ("url", "code"), [("http://", 1), ("http://[::1", 1), ("http://host:port/", 1), ("127.0.0.1:9", 5)]
)
def test_urls_that_lead_nowhere_are_errors(run: Run, url: str, code: int) -> None:
    result = CliRunner().invoke(managerc, [url, "getState"])

    assert result.exit_code == code
    assert result.stderr.startswith("error: ")

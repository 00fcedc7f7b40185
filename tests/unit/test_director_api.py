"""The director over HTTP, as people meet it: good words, bad words, live events, and a quiet end."""

import asyncio
import contextlib
import io
import socket
import tarfile
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from conpaas import __version__
from conpaas.core import rpc
from conpaas.core.errors import (
    BadArchiveError,
    BadInputError,
    ConflictError,
    ForbiddenError,
    NotAuthenticatedError,
    NotFoundError,
    PeerError,
    StaleGenerationError,
    TooLargeError,
)
from conpaas.core.messages import public
from conpaas.core.messages.agent import LogQuery
from conpaas.core.messages.internal import UploadQuery
from conpaas.core.messages.manager import CommandBody
from conpaas.core.messages.model import MetricPoint, ServiceView
from conpaas.core.states import OperationState, ServiceState
from conpaas.director.api_monitoring import thin
from conpaas.director.app import Director
from conpaas.director.db.models import MetricRow
from conpaas.director.settings import Limits
from tests.fakes.director import DATABASES, PASSWORD, START, database_url, settings_for


class Served:
    """A director that serves, and a client who is logged in as its administrator."""

    def __init__(self, director: Director, client: rpc.Client, token: str) -> None:
        self.director, self.client, self.token, self.call = director, client, token, client.call

    async def create(self, name: str = "blog", kind: str = "php") -> ServiceView:
        form = public.CreateService(type=kind, name=name)
        view: ServiceView = await self.call(public.CREATE_SERVICE, form)
        return view

    async def raw(self, method: str, path: str, **words: Any) -> tuple[int, dict[str, Any]]:
        headers = {"Authorization": f"Bearer {self.token}", **words.pop("headers", {})}
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, self.director.url + path, headers=headers, **words) as answer,
        ):
            return answer.status, await answer.json(content_type=None)


@contextlib.asynccontextmanager
async def serve(directory: Path, **words: Any) -> AsyncIterator[Director]:
    director = Director(settings_for(directory, **words))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(director.run())
        ready = group.create_task(director.ready.wait())
        await asyncio.wait([running, ready], return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if running.done():
            await running
        try:
            yield director
        finally:
            director.stop.set()


@pytest.fixture(params=DATABASES)
async def api(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Served]:
    url = await database_url(request.param)
    async with serve(tmp_path / "data", database=url, limits=Limits(upload_bytes=100_000)) as director:
        anonymous = rpc.Client(director.url)
        session = await anonymous.call(public.LOGIN, public.Credentials(username="admin", password=PASSWORD))
        token = session.token.get_secret_value()
        client = rpc.Client(director.url, headers={"Authorization": f"Bearer {token}"})
        try:
            yield Served(director, client, token)
        finally:
            await anonymous.close()
            await client.close()


def site(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


# -- the catalogue and the account ----------------------------------------------------------------------------------


async def test_it_says_what_it_is_to_anybody(api: Served) -> None:
    anonymous = rpc.Client(api.director.url)
    try:
        version = await anonymous.call(public.GET_VERSION)
        assert (version.version, version.deployment) == (__version__, api.director.trust.deployment)
        with pytest.raises(NotAuthenticatedError, match="who are you"):
            await anonymous.call(public.GET_ME)
    finally:
        await anonymous.close()


async def test_the_catalogue_shows_types_and_clouds_with_reasons(api: Served) -> None:
    types = {kind.name: kind for kind in (await api.call(public.LIST_TYPES)).items}
    assert types["php"].takes_code
    assert "memory_limit" in str(types["php"].settings) or types["php"].settings["properties"]

    clouds = {cloud.name: cloud for cloud in (await api.call(public.LIST_CLOUDS)).items}
    assert (clouds["sim"].enabled, clouds["sim"].default) == (True, True)
    assert (clouds["broken"].enabled, clouds["broken"].reason) == (False, "there is no driver 'nonesuch'")


async def test_an_account_has_tokens_and_a_password(api: Served) -> None:
    made = await api.call(public.CREATE_TOKEN, public.CreateToken(name="ci", scopes=("read",)))
    reader = rpc.Client(api.director.url, headers={"Authorization": f"Bearer {made.secret.get_secret_value()}"})
    try:
        assert (await reader.call(public.GET_ME)).username == "admin"
        with pytest.raises(ForbiddenError, match="may not write"):
            await reader.call(public.CREATE_APPLICATION, public.CreateApplication(name="x"))
        await api.call(public.DELETE_TOKEN, token=made.id)
        with pytest.raises(NotAuthenticatedError):
            await reader.call(public.GET_ME)
    finally:
        await reader.close()
    await api.call(public.LOGOUT)
    with pytest.raises(NotAuthenticatedError):
        await api.call(public.GET_ME)


# -- applications and services --------------------------------------------------------------------------------------


async def test_applications_hold_services(api: Served) -> None:
    application = await api.call(public.CREATE_APPLICATION, public.CreateApplication(name="shop"))
    form = public.CreateService(type="echo", name="front", application=application.id)
    view = await api.call(public.CREATE_SERVICE, form)

    assert view.application == application.id
    assert [(a.name, a.services) for a in (await api.call(public.LIST_APPLICATIONS)).items] == [("shop", 1)]
    with pytest.raises(ConflictError, match="has 1 services"):
        await api.call(public.DELETE_APPLICATION, application=application.id)
    with pytest.raises(ConflictError):
        await api.call(public.CREATE_APPLICATION, public.CreateApplication(name="shop"))
    renamed = await api.call(public.RENAME_APPLICATION, public.Rename(name="store"), application=application.id)
    assert (renamed.name, renamed.services) == ("store", 1)

    await api.call(public.TERMINATE, service=view.id)
    await until_gone(api, view.id)
    await api.call(public.DELETE_APPLICATION, application=application.id)
    assert (await api.call(public.LIST_APPLICATIONS)).items == ()


async def test_services_come_in_pages_oldest_first(api: Served) -> None:
    for name in ("a", "b", "c"):
        await api.create(name, "echo")

    first = await api.call(public.LIST_SERVICES, query=public.ServiceQuery(limit=2))
    rest = await api.call(public.LIST_SERVICES, query=public.ServiceQuery(limit=2, cursor=first.next))

    assert [view.name for view in (*first.items, *rest.items)] == ["a", "b", "c"]
    assert rest.next is None
    with pytest.raises(BadInputError, match="cursor"):
        await api.call(public.LIST_SERVICES, query=public.ServiceQuery(cursor="-1"))


async def test_an_answer_that_is_known_is_not_sent_again(api: Served) -> None:
    view = await api.create()
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {api.token}"}) as session:
        url = f"{api.director.url}/api/v1/services/{view.id}"
        await until_quiet(api)
        async with session.get(url) as answer:
            tag = answer.headers["ETag"]
        async with session.get(url, headers={"If-None-Match": tag}) as answer:
            assert answer.status == 304
        await api.call(public.RENAME_SERVICE, public.Rename(name="other"), service=view.id)
        async with session.get(url, headers={"If-None-Match": tag}) as answer:
            assert (answer.status, (await answer.json())["name"]) == (200, "other")


async def test_if_match_changes_only_what_was_seen(api: Served) -> None:
    view = await api.create(kind="echo")
    change = public.ChangeSettings(settings={"greeting": "hi"})
    for stale in (f'"{view.generation + 1}"', str(view.generation - 1)):
        with pytest.raises(StaleGenerationError):
            await api.call(public.CHANGE_SETTINGS, change, service=view.id, headers={"If-Match": stale})
    with pytest.raises(BadInputError, match="If-Match"):
        await api.call(public.CHANGE_SETTINGS, change, service=view.id, headers={"If-Match": "abc"})

    headers = {"If-Match": f'"{view.generation}"'}
    operation = await api.call(public.CHANGE_SETTINGS, change, service=view.id, headers=headers)

    assert operation.state is OperationState.DONE
    shown = await api.call(public.GET_SERVICE, service=view.id)
    assert (shown.generation, shown.wanted.settings["greeting"]) == (view.generation + 1, "hi")


async def test_a_service_starts_scales_and_stops_by_the_api(api: Served) -> None:
    view = await api.create(kind="echo")
    start = await api.call(public.START, public.Keyed(key="s"), service=view.id)
    assert (await api.call(public.START, public.Keyed(key="s"), service=view.id)).id == start.id
    with pytest.raises(ConflictError, match="started already"):
        await api.call(public.START, public.Keyed(), service=view.id)
    scale = await api.call(public.SCALE, public.Scale(roles={"back": 2}), service=view.id)
    assert (scale.kind, scale.actor, scale.state) == ("scale", "user:admin", OperationState.RUNNING)
    cancelled = await api.call(public.CANCEL_OPERATION, operation=scale.id)
    assert cancelled.state is OperationState.CANCELLED
    await api.call(public.STOP, public.Keyed(), service=view.id)

    listed = (await api.call(public.LIST_OPERATIONS, query=public.OperationQuery(service=view.id))).items
    assert [operation.kind for operation in listed] == ["stop", "undo", "scale", "start", "create"]
    history = (await api.call(public.GET_HISTORY, query=public.HistoryQuery(service=view.id))).items
    assert {event.kind for event in history} >= {"service-created", "start", "scale", "undo", "stop"}
    states = (await api.call(public.GET_STATES, service=view.id)).changes
    assert [change.state for change in states][:3] == [ServiceState.INIT, ServiceState.PROLOGUE, ServiceState.EPILOGUE]


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        ({"nonesuch": 1}, "no role 'nonesuch'"),
        ({"back": -1}, "cannot remove 1 'back' nodes: there are 0"),
        ({"front": -1}, "at least 1 'front' must stay"),
        ({"back": 0}, "how many"),
        ({"back": 10**9}, "too many"),
    ],
)
async def test_nodes_that_cannot_be_are_refused(api: Served, roles: dict[str, int], says: str) -> None:
    view = await api.create(kind="echo")
    await api.call(public.START, public.Keyed(), service=view.id)

    with pytest.raises(BadInputError, match=says) as caught:
        await api.call(public.SCALE, public.Scale(roles=roles), service=view.id)

    assert caught.value.hint
    assert (await api.call(public.GET_SERVICE, service=view.id)).wanted.roles == {"front": 1, "back": 0}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 422, "Invalid JSON"),
        (b'{"roles": {"back": "abc"}}', 422, "roles.back"),
        (b'{"roles": {}}', 422, "roles"),
        (b'{"roles": {"back": 1}, "more": 1}', 422, "more"),
        (b"[" * 100_000, 422, ""),
        (b'"' + b"x" * 2_000_000 + b'"', 413, "bytes"),
        (b"\xff\xfe", 422, ""),
    ],
)
async def test_words_that_are_off_are_told_what_is(api: Served, body: bytes, status: int, says: str) -> None:
    view = await api.create(kind="echo")

    got, problem = await api.raw("POST", f"/api/v1/services/{view.id}/scale", data=io.BytesIO(body))

    assert got == status
    assert says in problem["detail"]
    assert problem["code"] in {"bad-input", "too-large"}


@pytest.mark.parametrize("name", ["", " ", "x" * 81, "x" * 10_000, "a\nb", "a\x00b"])
async def test_names_that_are_none_are_refused(api: Served, name: str) -> None:
    status, problem = await api.raw("POST", "/api/v1/services", json={"type": "echo", "name": name})

    assert (status, problem["code"]) == (422, "bad-input")
    assert (await api.call(public.LIST_SERVICES)).items == ()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/api/v1/nonesuch", 404), ("DELETE", "/api/v1/services", 405), ("GET", "/api/v1/services?limit=x", 422)],
)
async def test_paths_that_are_off_get_a_problem_document(api: Served, method: str, path: str, status: int) -> None:
    got, problem = await api.raw(method, path)

    assert (got, problem["status"]) == (status, status)


# -- code -----------------------------------------------------------------------------------------------------------


async def test_code_is_uploaded_activated_downloaded_and_deleted(api: Served) -> None:
    view = await api.create()
    archive = site(index_php=b"<?php echo 1;")
    query = UploadQuery(filename="my site.tar.gz", description="first")

    version = await api.call(public.UPLOAD_CODE, service=view.id, query=query, data=archive)
    operation = await api.call(public.ACTIVATE_CODE, public.Keyed(), service=view.id, version=version.id)

    assert operation.state is OperationState.DONE
    listed = (await api.call(public.LIST_CODE, service=view.id)).items
    assert [(each.id, each.active) for each in listed] == [(version.id, True), ("code-default", False)]
    async with api.client.stream(public.DOWNLOAD_CODE, service=view.id, version=version.id) as answer:
        assert await answer.read() == archive
        assert answer.headers["Content-Disposition"] == "attachment; filename*=UTF-8''my%20site.tar.gz"
    with pytest.raises(ConflictError, match="is active"):
        await api.call(public.DELETE_CODE, service=view.id, version=version.id)
    second = await api.call(public.UPLOAD_CODE, service=view.id, query=query, data=site(b_php=b"<?php echo 2;"))
    await api.call(public.DELETE_CODE, service=view.id, version=second.id)
    with pytest.raises(NotFoundError):
        await api.call(public.DELETE_CODE, service=view.id, version=second.id)


@pytest.mark.parametrize(
    ("body", "error"),
    [(b"", BadArchiveError), (b"no archive", BadArchiveError), (b"x" * 100_001, TooLargeError)],
)
async def test_uploads_that_are_no_code_leave_nothing(api: Served, body: bytes, error: type[Exception]) -> None:
    view = await api.create()

    with pytest.raises(error):
        await api.call(public.UPLOAD_CODE, service=view.id, query=UploadQuery(), data=body)

    assert len((await api.call(public.LIST_CODE, service=view.id)).items) == 1


async def test_an_upload_that_is_cut_off_leaves_nothing(api: Served) -> None:
    view = await api.create()
    reader, writer = await asyncio.open_connection("127.0.0.1", api.director.ports[0])
    head = (
        f"POST /api/v1/services/{view.id}/code HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.token}\r\n"
        "Content-Length: 50000\r\n\r\n"
    )
    writer.write(head.encode() + b"x" * 1000)
    await writer.drain()
    incoming = api.director.settings.data_dir / "blobs" / "incoming"
    await until(lambda: any(incoming.iterdir()))

    writer.close()
    await writer.wait_closed()

    await until(lambda: not any(incoming.iterdir()))
    assert len((await api.call(public.LIST_CODE, service=view.id)).items) == 1
    assert reader.at_eof() or True


# -- live -----------------------------------------------------------------------------------------------------------


async def test_whoever_watches_sees_what_there_is_and_what_changes(api: Served) -> None:
    before = await api.create("before", "echo")
    seen: list[public.Live] = []

    async def watch() -> None:
        async for live in api.client.events(public.GET_EVENTS):
            seen.append(live)  # noqa: PERF401  (read by the test as they come)

    task = asyncio.ensure_future(watch())
    await until(lambda: any(live.kind == "credits" for live in seen))
    assert [live.kind for live in seen][:2] == ["hello", "service"]
    assert seen[1].service is not None
    assert seen[1].service.id == before.id

    view = await api.create("after", "echo")
    await api.call(public.START, public.Keyed(), service=view.id)
    await api.call(public.TERMINATE, service=view.id)
    await until(lambda: any(live.kind == "removed" and live.id == view.id for live in seen))

    kinds = {live.kind for live in seen}
    assert kinds >= {"service", "operation", "credits", "event", "removed"}
    assert next(live.credits for live in seen if live.credits is not None) == 9998
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_stranger_sees_nothing_of_it(api: Served) -> None:
    subscription_cm = api.director.bus.subscribe("usr-stranger")
    with subscription_cm as subscription:
        await api.create(kind="echo")
        assert await subscription.next(0.3) is None


async def test_a_slow_watcher_is_told_to_look_anew_and_blocks_nobody(api: Served) -> None:
    with api.director.bus.subscribe("usr-a") as subscription:
        for number in range(500):
            api.director.bus.publish(public.Live(kind="credits", credits=number), "usr-a")
        assert subscription.overflown
        subscription.clear()
        assert await subscription.next(0.01) is None


async def test_a_stop_ends_the_streams_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Director, "stop_timeout_s", 3600.0)
    async with serve(tmp_path) as director:
        client = rpc.Client(director.url)
        session = await client.call(public.LOGIN, public.Credentials(username="admin", password=PASSWORD))
        await client.close()
        headers = {"Authorization": f"Bearer {session.token.get_secret_value()}"}
        async with aiohttp.ClientSession(headers=headers) as http:
            stream = await http.get(f"{director.url}/api/v1/events")
            await stream.content.readline()
            director.stop.set()
            async with asyncio.timeout(45):
                await stream.read()


# -- managers that are not there ------------------------------------------------------------------------------------


async def test_what_only_a_manager_knows_is_a_clear_error_while_there_is_none(api: Served) -> None:
    view = await api.create(kind="echo")
    calls = [
        api.call(public.GET_MONITORING, service=view.id),
        api.call(public.LIST_LOGS, service=view.id),
        api.call(public.READ_LOG, service=view.id, node="manager", name="x", query=LogQuery()),
        api.call(public.RUN_COMMAND, CommandBody(), service=view.id, name="say"),
    ]
    for call in calls:
        with pytest.raises(PeerError):
            await call
    with pytest.raises(PeerError):
        async for _ in api.client.events(public.FOLLOW_LOG, service=view.id, node="manager", name="x"):
            pass


async def test_metrics_are_shown_by_service_and_by_node(api: Served) -> None:
    view = await api.create(kind="echo")
    now = api.director.clock.now()
    async with api.director.db.write() as session:
        for node in ("", "vm-1"):
            session.add(MetricRow(service_id=view.id, at=now, node=node, values={"request_rate": 2.0}))

    everything = await api.call(public.GET_METRICS, service=view.id)
    one = await api.call(public.GET_METRICS, service=view.id, query=public.MetricsQuery(node="vm-1", minutes=5))

    assert sorted(point.node for point in everything.points) == ["", "vm-1"]
    assert [(point.node, point.values) for point in one.points] == [("vm-1", {"request_rate": 2.0})]


def test_many_points_are_averaged() -> None:
    points = [
        MetricPoint(at=START + timedelta(seconds=5 * number), node="n", values={"a": float(number)})
        for number in range(12)
    ]

    thinned = thin(points, 30)

    assert 2 <= len(thinned) <= 3
    assert thin(points, 5) == points
    assert sum(point.values["a"] for point in thin(points, 10_000_000)) == 5.5


# -- administration -------------------------------------------------------------------------------------------------


async def test_an_administrator_sees_everybodys_instances_and_users(api: Served) -> None:
    view = await api.create(kind="echo")

    [row] = (await api.call(public.LIST_INSTANCES)).items
    assert (row.service, row.owner, row.kind, row.charged) == (view.id, "admin", "manager", 1)
    [user] = (await api.call(public.LIST_USERS)).items
    assert (user.username, user.credits) == ("admin", 9998)
    granted = await api.call(public.GRANT, public.Grant(amount=2), user=user.id)
    assert granted.credits == 10_000
    with pytest.raises(ConflictError):
        await api.call(public.CHANGE_USER, public.ChangeUser(admin=False), user=user.id)


# -- bad days -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", [0, 1])
async def test_garbage_and_silence_on_a_port_end_nothing(api: Served, port: int) -> None:
    number = api.director.ports[port]
    silent = socket.create_connection(("127.0.0.1", number))
    for garbage in (
        b"\x00\xff" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"",
        b"POST / HTTP/1.1\r\n" * 50,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", number)
        with contextlib.suppress(ConnectionError):
            writer.write(garbage)
            writer.write_eof()
            async with asyncio.timeout(45):
                await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    assert (await api.call(public.GET_ME)).username == "admin"
    silent.close()


async def test_a_second_director_on_the_same_data_says_so(tmp_path: Path) -> None:
    async with serve(tmp_path) as director:
        with pytest.raises(ConflictError, match="another director"):
            await Director(director.settings).run()


async def until(check: Any, timeout_s: float = 45.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not check():
            await asyncio.sleep(0.01)


async def until_gone(api: Served, service: str) -> None:
    async with asyncio.timeout(45):
        while any(view.id == service for view in (await api.call(public.LIST_SERVICES)).items):
            await asyncio.sleep(0.02)


async def until_quiet(api: Served) -> None:
    """Wait for the end of what creating a service does in the background."""
    background = api.director.background
    await until(lambda: not background._tasks)

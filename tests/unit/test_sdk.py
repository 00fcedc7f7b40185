"""The SDK against a director as its clients see it."""

import asyncio
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from conpaas.core import rpc
from conpaas.core.errors import (
    BadInputError,
    ConflictError,
    DeadlineError,
    NotAuthenticatedError,
    NotFoundError,
    PeerError,
)
from conpaas.core.messages import public
from conpaas.core.messages.base import Endpoint
from conpaas.core.messages.model import EventView, OperationView
from conpaas.core.messages.public import Live
from conpaas.core.states import OperationState
from conpaas.sdk import Conpaas, OperationFailedError, connect, login, solve
from tests.fakes.api import THEN, TOKEN, FakeApi, serving


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    async with serving(FakeApi()) as running:
        yield running


@pytest.fixture
async def conpaas(api: FakeApi) -> AsyncIterator[Conpaas]:
    async with connect(api.url, TOKEN) as client:
        yield client


async def test_a_login_gives_a_token_that_connects(api: FakeApi) -> None:
    session = await login(api.url, "ada", "right")

    async with connect(api.url, session.token.get_secret_value()) as conpaas:
        assert (await conpaas.me()).username == "ada"


async def test_a_wrong_password_is_the_directors_own_error(api: FakeApi) -> None:
    with pytest.raises(NotAuthenticatedError, match="wrong user name") as caught:
        await login(api.url, "ada", "wrong")

    assert caught.value.hint == "try again"


async def test_a_director_that_is_away_is_a_peer_error() -> None:
    async with connect("http://127.0.0.1:9", TOKEN) as conpaas:
        with pytest.raises(PeerError, match=r"127\.0\.0\.1:9"):
            await conpaas.services()


async def test_all_pages_of_a_list_are_read(api: FakeApi, conpaas: Conpaas) -> None:
    for number in range(5):
        api.add(f"blog-{number}")

    assert [service.name for service in await conpaas.services()] == [f"blog-{number}" for number in range(5)]


async def test_a_service_is_found_by_name_and_by_id(api: FakeApi, conpaas: Conpaas) -> None:
    made = api.add("blog")

    assert (await conpaas.find("blog")).id == (await conpaas.find(made.id)).id == made.id


async def test_an_unknown_name_says_where_to_look(conpaas: Conpaas) -> None:
    with pytest.raises(NotFoundError, match="no service 'blog'") as caught:
        await conpaas.find("blog")

    assert "conpaas ls" in caught.value.hint


async def test_a_name_of_two_services_is_refused_with_their_ids(api: FakeApi, conpaas: Conpaas) -> None:
    api.add("blog")
    api.add("blog")

    with pytest.raises(BadInputError, match="2 services") as caught:
        await conpaas.find("blog")

    assert "svc-1, svc-2" in caught.value.hint


async def test_a_command_whose_answer_is_lost_is_sent_again_with_the_same_key(api: FakeApi, conpaas: Conpaas) -> None:
    service = api.add("blog")
    api.lose_answers = 1

    await conpaas.start(service.id)

    keys = [body.key for _, _, body in api.calls]
    assert len(keys) == 2
    assert keys[0] == keys[1] is not None
    assert len(api.operations) == 1


async def test_each_command_has_a_key_of_its_own_unless_one_is_given(api: FakeApi, conpaas: Conpaas) -> None:
    service = api.add("blog")

    await conpaas.scale(service.id, {"web": 2})
    await conpaas.scale(service.id, {"web": 2})
    await conpaas.scale(service.id, {"web": 2}, key="mine")

    first, second, third = (body.key for _, _, body in api.calls)
    assert first != second
    assert third == "mine"


async def test_a_change_can_depend_on_what_was_seen(api: FakeApi, conpaas: Conpaas) -> None:
    service = api.add("blog")

    await conpaas.scale(service.id, {"web": 2}, generation=service.generation)

    assert api.calls[0][1]["If-Match"] == '"7"'


async def test_waiting_reports_each_step_once_and_returns_the_end(api: FakeApi, conpaas: Conpaas) -> None:
    service = api.add("blog")
    seen: list[OperationView] = []

    operation = await conpaas.wait(await conpaas.start(service.id), on_progress=seen.append)

    assert operation.state is OperationState.DONE
    assert [step.message for step in seen] == ["1 of 2 nodes serving", "2 of 2 nodes serving"]


async def test_waiting_for_an_operation_that_fails_raises_its_reason(api: FakeApi, conpaas: Conpaas) -> None:
    service = api.add("blog")
    api.fail_with = "no node booted"

    with pytest.raises(OperationFailedError, match="start failed: no node booted") as caught:
        await conpaas.start(service.id, wait=True)

    assert caught.value.operation is not None
    assert caught.value.operation.state is OperationState.FAILED


async def test_waiting_for_a_cancelled_operation_says_so(api: FakeApi, conpaas: Conpaas) -> None:
    operation = await conpaas.start(api.add("blog").id)
    await conpaas.cancel(operation.id)

    with pytest.raises(OperationFailedError, match="start was cancelled"):
        await conpaas.wait(operation)


async def test_a_wait_can_end_before_the_operation(api: FakeApi, conpaas: Conpaas) -> None:
    api.polls = 1000
    operation = await conpaas.start(api.add("blog").id)

    with pytest.raises(DeadlineError, match="not done after 0 s"):
        await conpaas.wait(operation, timeout_s=0)


async def test_an_archive_is_streamed_with_its_name_and_progress(
    api: FakeApi, conpaas: Conpaas, tmp_path: Path
) -> None:
    archive = tmp_path / "site.zip"
    archive.write_bytes(b"x" * 600_000)
    seen: list[tuple[int, int | None]] = []

    version = await conpaas.upload(
        api.add("blog").id, archive, description="new", on_progress=lambda sent, total: seen.append((sent, total))
    )

    assert (version.filename, version.description, version.size) == ("site.zip", "new", 600_000)
    assert seen[-1] == (600_000, 600_000)
    assert len(seen) > 1


async def test_a_directory_is_packed_first(api: FakeApi, conpaas: Conpaas, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.php").write_text("<?php")
    service = api.add("blog")

    version = await conpaas.upload(service.id, tmp_path / "site")
    fetched = await conpaas.download(service.id, version.id, tmp_path / "fetched.tar.gz")

    assert version.filename == "site.tar.gz"
    with tarfile.open(fetched) as tar:
        assert tar.getnames() == ["index.php"]


async def test_a_stream_can_be_uploaded_and_activated(api: FakeApi, conpaas: Conpaas) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"one"
        yield b"two"

    version = await conpaas.upload(api.add("blog").id, chunks(), "site.tar", activate=True)

    assert api.blobs[version.id] == b"onetwo"
    assert [operation.kind for operation in api.operations.values()] == ["activate"]


async def test_a_missing_file_is_bad_input(api: FakeApi, conpaas: Conpaas, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no file or directory"):
        await conpaas.upload(api.add("blog").id, tmp_path / "nothing")


async def test_deleting_the_active_version_is_the_directors_refusal(api: FakeApi, conpaas: Conpaas) -> None:
    with pytest.raises(ConflictError, match="is active"):
        await conpaas.delete_code(api.add("blog").id, "code-default")


async def test_events_go_on_after_the_stream_was_cut_off(api: FakeApi, conpaas: Conpaas) -> None:
    api.live = [Live(kind="hello"), Live(kind="credits", credits=9998)]
    seen: list[str] = []

    async for event in conpaas.events():
        seen.append(event.kind)
        if len(seen) == 4:
            break

    assert seen == ["hello", "credits", "hello", "credits"]


async def test_an_event_may_be_large(api: FakeApi, conpaas: Conpaas) -> None:
    """Before and after of a change of scripts: they have up to 100 KB each."""
    before = EventView(id=1, at=THEN, kind="configure", actor="user:ada", before="x" * 1_000_000)
    api.live = [Live(kind="event", event=before)]

    assert (await anext(conpaas.events())).event == before


async def test_a_stream_that_has_died_silently_is_opened_again(
    api: FakeApi, conpaas: Conpaas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "SILENT_S", 0.1)
    api.live, api.silent = [Live(kind="hello")], True
    events = conpaas.events()

    assert [(await anext(events)).kind, (await anext(events)).kind] == ["hello", "hello"]


async def test_events_end_with_an_error_that_stays(api: FakeApi) -> None:
    async with connect(api.url, "wrong") as conpaas:
        with pytest.raises(NotAuthenticatedError):
            await anext(conpaas.events())


async def test_a_followed_log_goes_on_where_it_was(api: FakeApi, conpaas: Conpaas) -> None:
    texts: list[str] = []

    async for chunk in conpaas.follow_log(api.add("blog").id, "manager", "manager.log"):
        texts.append(chunk.text)
        if len(texts) == 3:
            break

    assert texts == ["line at 0\n", "line at 10\n", "line at 20\n"]


async def test_a_challenge_is_solved_so_that_it_verifies() -> None:
    altcha = pytest.importorskip("altcha")
    challenge = altcha.create_challenge(algorithm="SHA-256", cost=1, counter=5, hmac_secret="key")

    answer = await solve(challenge.to_dict())

    assert (await asyncio.to_thread(altcha.verify_solution, answer, "key")).verified


async def test_what_is_no_challenge_is_a_peer_error() -> None:
    with pytest.raises(PeerError, match="captcha"):
        await solve({"puzzle": 1})


def test_there_is_a_method_for_every_public_endpoint() -> None:
    """Each endpoint's constant is used somewhere in the SDK."""
    endpoints = {name for name, value in vars(public).items() if isinstance(value, Endpoint)}
    sources = (Path(public.__file__).parents[2] / "sdk").glob("*.py")
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources)

    assert {name for name in endpoints if f"public.{name}" not in text} == set()

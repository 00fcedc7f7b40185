"""One skeleton: ready when the ports are open, and three grades of stopping, by real signals to real processes."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from conpaas.core.process import Process, Site
from tests.fakes.process import Talkative

ROOT = Path(__file__).parents[2]
CLOSED = ["second closed", "first closed"]


class Child:
    """A process of its own and the lines it has written so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.ports: list[int] = []

    async def until(self, word: str) -> str:
        """Return the next line that begins with `word`."""
        assert self.process.stdout is not None
        async with asyncio.timeout(45):
            while line := (await self.process.stdout.readline()).decode().strip():
                self.lines.append(line)
                if line.startswith(word):
                    return line
        raise AssertionError(f"no '{word}' in {self.lines}")

    async def end(self) -> list[str]:
        """Wait for the end; return the lines not read yet."""
        known = len(self.lines)
        with pytest.raises(AssertionError, match="no 'nothing'"):
            await self.until("nothing")
        await self.process.wait()
        return self.lines[known:]

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def url(self, path: str, site: int = 0) -> str:
        return f"http://127.0.0.1:{self.ports[site]}{path}"


@asynccontextmanager
async def child(stop_timeout_s: float = 30, fate: str = "") -> AsyncIterator[Child]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.fakes.process",
        str(stop_timeout_s),
        *([fate] if fate else []),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    one = Child(process)
    try:
        if fate == "slow":
            await one.until("opening")
        else:
            one.ports = [int(word) for word in (await one.until("ready")).split()[1:]]
        yield one
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def fetch(http: aiohttp.ClientSession, url: str) -> str:
    async with http.get(url) as response:
        return await response.text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_idle_it_stops_at_once_and_closes_in_reverse_order(number: int) -> None:
    async with child() as one:
        one.signal(number)
        assert await one.end() == ["stopping", *CLOSED]
        assert one.process.returncode == 0


async def test_after_the_first_signal_the_call_under_way_completes_and_no_new_connection_is_taken(
    http: aiohttp.ClientSession,
) -> None:
    async with child() as one:
        call = asyncio.create_task(fetch(http, one.url("/slow")))
        held = asyncio.create_task(fetch(http, one.url("/slow", site=1)))
        await one.until("call begun")
        await one.until("call begun")
        one.signal()
        await one.until("stopping")
        await _until_refused(one.url("/nothing"))
        call.cancel()  # its client goes away: that ends the call too
        await one.until("call cut off")
        assert not held.done()
        held.cancel()
        assert await one.end() == ["call cut off", *CLOSED]
        assert one.process.returncode == 0


async def _until_refused(url: str) -> None:
    """Ask until nobody listens; a connection that came in just before is held and not answered, or broken off."""
    async with asyncio.timeout(45), aiohttp.ClientSession() as other:
        while True:
            try:
                await asyncio.wait_for(fetch(other, url), 0.5)
            except aiohttp.ClientConnectorError:
                return
            except (TimeoutError, aiohttp.ClientError):
                pass


async def test_a_call_under_way_gets_its_whole_answer_before_any_resource_closes(
    http: aiohttp.ClientSession, capsys: pytest.CaptureFixture[str]
) -> None:
    process = Talkative(30)
    running = asyncio.create_task(process.run(signals=False))
    await process.ready.wait()
    call = asyncio.create_task(fetch(http, f"http://127.0.0.1:{process.ports[0]}/slow"))
    await _said("call begun", capsys)
    process.stop.set()
    await _said("stopping", capsys)
    assert not running.done()
    process.release.set()
    assert await call == "done"
    await running
    assert capsys.readouterr().out.split("\n")[:-1] == ["call completed", *CLOSED]


async def test_an_upload_under_way_comes_to_its_end(
    http: aiohttp.ClientSession, capsys: pytest.CaptureFixture[str]
) -> None:
    process = Talkative(30)
    running = asyncio.create_task(process.run(signals=False))
    await process.ready.wait()
    rest = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield b"x" * 1000
        await rest.wait()
        for _ in range(10):
            yield b"x" * 100_000

    url = f"http://127.0.0.1:{process.ports[0]}/upload"
    sending = asyncio.create_task(http.put(url, data=pieces()))
    await _said("upload begun", capsys)
    process.stop.set()
    await _said("stopping", capsys)
    rest.set()
    assert await (await sending).text() == "1001000"
    await running


async def test_idle_connections_do_not_hold_up_the_stop(http: aiohttp.ClientSession) -> None:
    process = Talkative(1000)
    running = asyncio.create_task(process.run(signals=False))
    await process.ready.wait()
    await fetch(http, f"http://127.0.0.1:{process.ports[0]}/nothing")  # kept alive now
    _, silent = await asyncio.open_connection("127.0.0.1", process.ports[1])
    process.stop.set()
    await running
    silent.close()
    await asyncio.gather(silent.wait_closed(), return_exceptions=True)


async def _said(word: str, capsys: pytest.CaptureFixture[str], times: int = 1) -> None:
    heard = ""
    async with asyncio.timeout(20):
        while heard.count(word) < times:
            heard += capsys.readouterr().out
            await asyncio.sleep(0.005)


async def test_what_takes_too_long_is_cut_off(http: aiohttp.ClientSession) -> None:
    async with child(stop_timeout_s=0.3) as one:
        under_way = [asyncio.create_task(fetch(http, one.url("/slow", site=site))) for site in (0, 1)]
        for _ in under_way:
            await one.until("call begun")
        one.signal()
        try:
            assert await one.end() == ["stopping", *["call cut off"] * 2, *CLOSED]
            assert one.process.returncode == 0
        finally:
            answers = await asyncio.gather(*under_way, return_exceptions=True)
        assert all(isinstance(answer, aiohttp.ClientError) for answer in answers)


@pytest.mark.looptime
async def test_it_is_cut_off_after_the_time_out_once_for_all_ports(
    http: aiohttp.ClientSession, capsys: pytest.CaptureFixture[str]
) -> None:
    process = Talkative(20)
    running = asyncio.create_task(process.run(signals=False))
    await process.ready.wait()
    under_way = [asyncio.create_task(fetch(http, f"http://127.0.0.1:{port}/slow")) for port in process.ports]
    await _said("call begun", capsys, times=2)
    loop = asyncio.get_running_loop()
    process.stop.set()
    began = loop.time()
    await running
    assert 20 <= loop.time() - began < 21
    answers = await asyncio.gather(*under_way, return_exceptions=True)
    assert all(isinstance(answer, aiohttp.ClientError) for answer in answers)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_aborts_at_once(http: aiohttp.ClientSession, second: int) -> None:
    async with child(stop_timeout_s=1000) as one:
        under_way = [asyncio.create_task(fetch(http, one.url("/slow", site=site))) for site in (0, 1)]
        for _ in under_way:
            await one.until("call begun")
        one.signal()
        await one.until("stopping")
        one.signal(second)
        try:
            assert await one.end() == ["call cut off"] * 2 + CLOSED
            assert one.process.returncode == 0
        finally:
            answers = await asyncio.gather(*under_way, return_exceptions=True)
        assert all(isinstance(answer, aiohttp.ClientError) for answer in answers)


async def test_a_stream_of_events_has_no_end_and_does_not_hold_up_the_stop(http: aiohttp.ClientSession) -> None:
    async with child(stop_timeout_s=1000) as one, http.get(one.url("/stream")):
        await one.until("stream begun")
        one.signal()
        assert await one.end() == ["stopping", "stream ended", *CLOSED]


async def test_a_signal_while_it_opens_ends_it_and_gives_back_what_it_has() -> None:
    async with child(fate="slow") as one:
        one.signal()
        assert await one.end() == CLOSED
        assert one.process.returncode == 0


@pytest.mark.parametrize("fate", ["break", "end"])
async def test_a_loop_that_breaks_or_ends_ends_the_process(fate: str) -> None:
    process = Talkative(1, fate)
    with pytest.raises(ExceptionGroup) as caught:
        await process.run(signals=False)
    error = caught.value.exceptions[0]
    assert str(error) == {"break": "this loop is broken", "end": "the loop 'turn' ended"}[fate]


async def test_resources_close_in_reverse_order_when_a_loop_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExceptionGroup):
        await Talkative(1, "break").run(signals=False)
    assert capsys.readouterr().out.split("\n")[-3:-1] == CLOSED


async def test_a_broken_loop_ends_a_real_process_with_an_error() -> None:
    async with child(fate="break") as one:
        await one.end()
        assert one.process.returncode == 1


class Late(Process):
    """Acts between the opening of its port and its readiness."""

    name = "late"
    seen = ""

    async def open(self, stack: AsyncExitStack) -> list[Site]:
        return [Site("127.0.0.1", 0, [web.get("/", self.answer)])]

    async def answer(self, _: web.Request) -> web.Response:
        return web.Response(text="here")

    async def serving(self) -> None:
        assert not self.ready.is_set()
        async with aiohttp.ClientSession() as session:
            self.seen = await fetch(session, f"http://127.0.0.1:{self.ports[0]}/")


async def test_it_is_ready_only_when_its_ports_are_open() -> None:
    process = Late()
    process.stop.set()
    await process.run(signals=False)
    assert process.seen == "here"
    assert process.ready.is_set()


async def test_a_port_that_is_taken_is_an_error_and_leaves_nothing_open(capsys: pytest.CaptureFixture[str]) -> None:
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]

    class Second(Talkative):
        async def open(self, stack: AsyncExitStack) -> list[Site]:
            return [*await super().open(stack), Site("127.0.0.1", port, [])]

    async with taken:
        process = Second(1)
        with pytest.raises(OSError, match="address already in use"):
            await process.run(signals=False)
    assert not process.ready.is_set()
    assert capsys.readouterr().out.split("\n")[-3:-1] == CLOSED

"""Members get and keep an identity, whatever is lost on the way: the director, an answer, the power."""

import asyncio
import ssl
import stat
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web
from pydantic import SecretStr
from structlog.testing import capture_logs

from conpaas.core import files, keymaker, member, rpc, tls
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import ForbiddenError, NotAuthenticatedError, PeerError
from conpaas.core.identity import Identity, client_context, peer_identity, server_context
from conpaas.core.member import Member, authenticator
from conpaas.core.messages.base import Endpoint, Who, who
from conpaas.core.messages.internal import ENROL, RENEW, Certificate, Context, Enrol, Renew
from conpaas.core.messages.model import Ack
from conpaas.core.process import Process, Site
from conpaas.core.rpc import Call
from conpaas.core.trust import Caller, Target
from tests.fakes.ports import free_port
from tests.fakes.waiting import until

KEYS = keymaker  # while it is loaded, members of this process make their keys by themselves

DELAYS_S = member.ENROL_DELAYS_S
ME = Identity.agent("dep-test", "svc-1", "i-1")
WHOAMI = Endpoint(method="GET", path="/me", summary="Who", allow=who(Who.MANAGER, Who.AGENT), response=Ack)


class Office(Process):
    """The part of a director that hands out certificates, with knobs for what goes wrong."""

    name = "office"

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__()
        self.folder, self._port = folder, port
        self.authority = tls.Authority.create("dep-test")
        self.csrs: list[str] = []
        self.seen: list[Caller] = []
        self.lose_answers = 0
        self.refuse = False
        self.lifetime_s = 3600.0
        self.wrong: Callable[[bytes], bytes] | None = None
        """Makes what is answered to a request, in place of the certificate."""

    async def open(self, stack: AsyncExitStack) -> list[Site]:
        key, csr = tls.make_key_and_csr()
        pair, ca = self.folder / "office.pem", self.folder / "ca.crt"
        pair.write_bytes(key + self.authority.sign(csr, Identity.director("dep-test"), lifetime_s=3600))
        ca.write_bytes(self.authority.certificate_pem)
        check = authenticator("dep-test", lambda _: Target(owner="u", service="svc-1"))
        serve = partial(rpc.route, authenticate=check)
        routes = [serve(ENROL, self.enrol), serve(RENEW, self.renew), serve(WHOAMI, self.whoami)]
        return [Site("127.0.0.1", self._port, routes, server_context(pair, pair, ca, require_client=False))]

    async def enrol(self, call: Call[Caller], body: Enrol) -> Certificate:
        assert body.token.get_secret_value() == "one-use"
        return self._certify(call, body.csr)

    async def renew(self, call: Call[Caller], body: Renew) -> Certificate:
        return self._certify(call, body.csr)

    def _certify(self, call: Call[Caller], csr: str) -> Certificate:
        if self.refuse:
            raise ForbiddenError("this token was used")
        self.csrs.append(csr)
        if self.lose_answers:
            self.lose_answers -= 1
            assert call.http.transport is not None
            call.http.transport.abort()  # the certificate is made and on its way: and lost
        good = partial(self.authority.sign, identity=ME, lifetime_s=self.lifetime_s)
        certificate = (self.wrong or good)(csr.encode())
        return Certificate(certificate=certificate.decode(), renew_in_s=self.lifetime_s * 2 / 3)

    async def whoami(self, call: Call[Caller]) -> Ack:
        self.seen.append(call.caller)
        return Ack()

    def context(self) -> Context:
        return Context(
            deployment="dep-test",
            kind="agent",
            instance="i-1",
            service="svc-1",
            service_type="echo",
            owner="u",
            epoch=0,
            address="127.0.0.1",
            director=f"https://127.0.0.1:{self.ports[0] if self.ports else self._port}",
            ca=self.authority.certificate_pem.decode(),
            token=SecretStr("one-use"),
        )


@asynccontextmanager
async def open_office(office: Office) -> AsyncIterator[Office]:
    task = asyncio.create_task(office.run(signals=False))
    async with asyncio.timeout(45):
        await office.ready.wait()
    try:
        yield office
    finally:
        office.stop.set()
        await task


@pytest.fixture
async def office(tmp_path: Path) -> AsyncIterator[Office]:
    folder = tmp_path / "office"
    folder.mkdir()
    async with open_office(Office(folder)) as office:
        yield office


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "member"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "ENROL_DELAYS_S", (0.01,) * 1000)


@asynccontextmanager
async def joined(office: Office, folder: Path) -> AsyncIterator[Member]:
    async with AsyncExitStack() as stack:
        one = Member(office.context(), folder, clock=SYSTEM_CLOCK)
        await one.open(stack)
        yield one


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


COMPLETE = {"ca.crt", "member.pem", "renew-at"}


# -- enrolment --------------------------------------------------------------------------------------------------------


async def test_a_member_enrols_once_and_keeps_its_identity(office: Office, folder: Path) -> None:
    async with joined(office, folder) as one:
        await one.director.call(WHOAMI)
    async with joined(office, folder) as one:
        await one.director.call(WHOAMI)
    assert [(caller.kind, caller.service, caller.instance) for caller in office.seen] == [("agent", "svc-1", "i-1")] * 2
    assert len(office.csrs) == 1
    assert names(folder) == COMPLETE
    assert stat.S_IMODE((folder / "member.pem").stat().st_mode) == 0o600


async def test_without_a_key_maker_at_hand_a_process_makes_the_key(
    office: Office, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "conpaas.core.keymaker")
    async with joined(office, folder) as one:
        await one.director.call(WHOAMI)


async def test_while_the_director_is_away_it_keeps_asking(tmp_path: Path, folder: Path) -> None:
    office = Office(tmp_path, free_port())

    async def enrol() -> None:
        async with joined(office, folder):
            pass

    enrolling = asyncio.create_task(enrol())
    await until((folder / "next.csr").exists)
    assert not enrolling.done()
    asked = (folder / "next.csr").read_text()
    async with open_office(office):
        await asyncio.wait_for(enrolling, 45)
    assert office.csrs == [asked]


def test_it_asks_for_as_long_as_a_token_can_live() -> None:
    assert sum(DELAYS_S) >= 1800


@pytest.mark.parametrize("lost", [1, 3])
async def test_after_a_lost_answer_the_same_request_is_sent_again(office: Office, folder: Path, lost: int) -> None:
    office.lose_answers = lost
    async with joined(office, folder) as one:
        await one.director.call(WHOAMI)
    assert len(office.csrs) == lost + 1
    assert len(set(office.csrs)) == 1


async def test_after_a_death_before_the_answer_the_same_request_is_sent_again(office: Office, folder: Path) -> None:
    office.lose_answers = 10**6

    async def enrol() -> None:
        async with joined(office, folder):
            pass

    enrolling = asyncio.create_task(enrol())
    await until(lambda: office.csrs)
    enrolling.cancel()
    await asyncio.gather(enrolling, return_exceptions=True)
    office.lose_answers = 0
    async with joined(office, folder):
        pass
    assert len(set(office.csrs)) == 1


async def test_a_token_that_is_refused_is_an_error_at_once(office: Office, folder: Path) -> None:
    office.refuse = True
    with pytest.raises(ForbiddenError, match="this token was used"):
        async with joined(office, folder):
            pass
    assert "member.pem" not in names(folder)


async def test_a_director_of_another_ca_gets_neither_token_nor_request(
    office: Office, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member, "ENROL_DELAYS_S", (0.01, 0.01))
    context = office.context().model_copy(update={"ca": tls.Authority.create("dep-test").certificate_pem.decode()})
    async with AsyncExitStack() as stack:
        with pytest.raises(PeerError, match="certificate verify failed"):
            await Member(context, folder, clock=SYSTEM_CLOCK).open(stack)
    assert office.csrs == []


async def test_a_member_does_not_take_another_member_for_its_director(office: Office, folder: Path) -> None:
    async with joined(office, folder) as one:
        impostor = one.client(office.context().director, Identity.agent("dep-test", "svc-1", "i-2"))
        with pytest.raises(PeerError):
            await impostor.call(WHOAMI)
        await impostor.close()


# -- answers that are no good -----------------------------------------------------------------------------------------


YESTERDAY = datetime.now(UTC) - timedelta(days=1)
OTHER = tls.Authority.create("dep-test")
WRONG: dict[str, Callable[[tls.Authority, bytes], bytes]] = {
    "of another key": lambda ca, _: ca.sign(tls.make_key_and_csr()[1], ME, lifetime_s=60),
    "of another CA": lambda _, csr: OTHER.sign(csr, ME, lifetime_s=60),
    "of another member": lambda ca, csr: ca.sign(csr, Identity.agent("dep-test", "svc-1", "i-2"), lifetime_s=60),
    "expired": lambda ca, csr: ca.sign(csr, ME, lifetime_s=60, now=YESTERDAY),
    "rubbish": lambda _ca, _csr: b"rubbish",
    "nothing": lambda _ca, _csr: b"",
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_certificate_that_does_not_fit_is_refused_at_enrolment(
    office: Office, folder: Path, wrong: str
) -> None:
    office.wrong = partial(WRONG[wrong], office.authority)
    with pytest.raises(PeerError, match="a certificate that does not fit"):
        async with joined(office, folder):
            pass
    assert names(folder) == {"ca.crt", "next.csr", "next.key"}
    office.wrong = None
    async with joined(office, folder) as one:
        await one.director.call(WHOAMI)
    assert len(set(office.csrs)) == 1


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_certificate_that_does_not_fit_is_refused_at_renewal_and_the_old_one_stays(
    office: Office, folder: Path, wrong: str
) -> None:
    async with joined(office, folder) as one:
        before = (folder / "member.pem").read_bytes()
        office.wrong = partial(WRONG[wrong], office.authority)
        with pytest.raises(PeerError, match="a certificate that does not fit"):
            await one.renew()
        assert (folder / "member.pem").read_bytes() == before
        await one.director.close()
        await one.director.call(WHOAMI)
        office.wrong = None
        await one.renew()
        assert (folder / "member.pem").read_bytes() != before


# -- renewal ----------------------------------------------------------------------------------------------------------


async def test_renewal_swaps_key_and_certificate_together_for_both_directions(office: Office, folder: Path) -> None:
    async with joined(office, folder) as one:
        before = (folder / "member.pem").read_text()
        await one.renew()
        after = (folder / "member.pem").read_text()
        assert before.split("-----BEGIN CERTIFICATE")[0] != after.split("-----BEGIN CERTIFICATE")[0]
        assert len(set(office.csrs)) == 2
        assert names(folder) == COMPLETE
        await one.director.close()  # the next connection shows the new one
        await one.director.call(WHOAMI)
        assert await _shown_by(one) == _certificate(after)


async def _shown_by(one: Member) -> str:
    """Return the certificate that a server of the member shows."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=one.server_tls)
    async with server:
        _, writer = await asyncio.open_connection(
            *server.sockets[0].getsockname(), ssl=one.client_tls, server_hostname=ME.host
        )
        tls_object = writer.get_extra_info("ssl_object")
        assert peer_identity(tls_object, "dep-test") == ME
        shown = ssl.DER_cert_to_PEM_cert(tls_object.getpeercert(binary_form=True))
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
    return shown


def _certificate(pem: str) -> str:
    return pem[pem.index("-----BEGIN CERTIFICATE") :]


@pytest.mark.parametrize("dies_at", ["csr", "pair", "renew-at"])
async def test_a_death_in_the_middle_of_a_renewal_leaves_a_pair_that_works(
    office: Office, folder: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    class PowerCut(BaseException):
        """Nothing catches it, nothing cleans up."""

    async with joined(office, folder) as one:
        write, unlink = files.write_atomically, Path.unlink

        def dying_write(path: Path, data: bytes | str, *, mode: int = 0o644) -> None:
            if dies_at == "pair" and path.name == "next.pem":
                raise PowerCut
            write(path, data, mode=mode)
            if dies_at == "renew-at" and path.name == "renew-at":
                raise PowerCut

        def dying_unlink(path: Path, missing_ok: bool = False) -> None:
            if dies_at == "csr" and path.name == "next.csr":
                raise PowerCut
            unlink(path, missing_ok=missing_ok)

        with monkeypatch.context() as broken:
            broken.setattr(files, "write_atomically", dying_write)
            broken.setattr(Path, "unlink", dying_unlink)
            with pytest.raises(PowerCut):
                await one.renew()
    async with joined(office, folder) as one:
        await one.director.call(WHOAMI)
        await one.renew()
        await one.director.close()
        await one.director.call(WHOAMI)
    assert names(folder) == COMPLETE
    assert len(office.seen) == 2


async def test_a_request_whose_key_is_gone_is_made_anew(office: Office, folder: Path) -> None:
    (folder / "next.csr").write_bytes(tls.make_key_and_csr()[1])
    async with joined(office, folder) as one:
        await one.director.call(WHOAMI)


class Calendar:
    """A clock that notes how long it was told to sleep, and jumps."""

    def __init__(self) -> None:
        self.time = datetime.now(UTC)
        self.sleeps: list[float] = []

    def now(self) -> datetime:
        return self.time

    def monotonic(self) -> float:
        return self.time.timestamp()

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.time += timedelta(seconds=seconds)
        if len(self.sleeps) > 3:
            await asyncio.Event().wait()
        await asyncio.sleep(0)


async def _three_rounds(office: Office, folder: Path, calendar: Calendar) -> None:
    async with AsyncExitStack() as stack:
        one = Member(office.context(), folder, clock=calendar)
        await one.open(stack)
        renewing = asyncio.create_task(one.renew_loop())
        await until(lambda: len(calendar.sleeps) >= 4)
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)


async def test_it_renews_at_two_thirds_of_each_life(office: Office, folder: Path) -> None:
    calendar = Calendar()
    await _three_rounds(office, folder, calendar)
    assert calendar.sleeps == [pytest.approx(2400)] * 4
    assert len(set(office.csrs)) == 4


async def test_a_renewal_that_fails_is_tried_again_each_minute_with_the_same_request(
    office: Office, folder: Path
) -> None:
    calendar = Calendar()
    async with joined(office, folder):
        pass
    office.lose_answers = 2
    with capture_logs() as lines:
        await _three_rounds(office, folder, calendar)
    assert calendar.sleeps[1:3] == [member.RENEW_RETRY_S] * 2
    assert calendar.sleeps[3] == pytest.approx(2400)
    assert len(set(office.csrs[1:])) == 1
    assert [line["event"] for line in lines if line["log_level"] == "warning"] == ["certificate-not-renewed"] * 2


async def test_after_a_restart_the_renewal_is_still_due_when_it_was(office: Office, folder: Path) -> None:
    async with joined(office, folder):
        pass
    calendar = Calendar()
    calendar.time += timedelta(seconds=2000)
    await _three_rounds(office, folder, calendar)
    assert calendar.sleeps[0] == pytest.approx(400, abs=100)


# -- who calls --------------------------------------------------------------------------------------------------------


async def test_nobody_is_nobody(office: Office, folder: Path) -> None:
    async with joined(office, folder):
        pass
    stranger = rpc.Client(
        office.context().director,
        tls=client_context(None, None, folder / "ca.crt"),
        server_hostname=Identity.director("dep-test").host,
    )
    with pytest.raises(NotAuthenticatedError):
        await stranger.call(WHOAMI)
    await stranger.close()
    assert office.seen == []


async def test_without_tls_everybody_is_nobody() -> None:
    async def handler(_: Call[Caller]) -> Ack:
        raise AssertionError("reached")

    app = web.Application(middlewares=[rpc.errors_to_replies])
    app.add_routes([rpc.route(WHOAMI, handler, authenticator("dep-test", lambda _: Target(service="svc-1")))])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    client = rpc.Client(f"http://127.0.0.1:{runner.addresses[0][1]}")
    with pytest.raises(NotAuthenticatedError):
        await client.call(WHOAMI)
    await client.close()
    await runner.cleanup()

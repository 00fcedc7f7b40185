"""An account at Amazon EC2, by libcloud: moto's server behind a proxy that makes up for what it does otherwise.

    answers name their XML namespace without the last slash, and errors name one at all: libcloud finds nothing in them
    DetachVolume wants what Amazon can do without
    there is no quota, no throttling, no lost answer, no login that fails

Only answers of the real thing are put in moto's place; nothing of the driver is loosened.
"""

import asyncio
import re
import secrets
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from aiohttp import ClientSession, web
from libcloud.pricing import get_pricing

from conpaas.cloud import libcloud
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import Cloud, CloudContext
from tests.fakes import ec2_moto
from tests.fakes._libcloud_deadline import PATIENT_S, hurried
from tests.fakes.clouds import Fault

SECRET = "wJalrXUtnFEMI-libcloud"
REGION = "us-east-1"
_AUTH = f"AWS4-HMAC-SHA256 Credential=test/20250101/{REGION}/ec2/aws4_request, SignedHeaders=host, Signature=0"
_VERBS = {
    "RunInstances": ("create",),
    "TerminateInstances": ("delete",),
    "CreateVolume": ("create_volume",),
    "DeleteVolume": ("delete_volume",),
    "AttachVolume": ("attach",),
    "DetachVolume": ("detach",),
    "GetConsoleOutput": ("console",),
}
RECORDED: Mapping[Fault, tuple[int, str, str]] = {
    Fault.THROTTLED: (503, "RequestLimitExceeded", "Request limit exceeded."),
    Fault.CREDENTIALS: (
        401,
        "AuthFailure",
        "AWS was not able to validate the provided access credentials",
    ),
    Fault.UNKNOWN_IMAGE: (400, "InvalidAMIID.NotFound", "The image id '[ami-0123]' does not exist"),
    Fault.NO_CAPACITY: (
        500,
        "InsufficientInstanceCapacity",
        "We currently do not have sufficient t3.nano capacity in the Availability Zone you requested.",
    ),
}
"""Code, name and words of Amazon's answers."""
FAULTS: Mapping[str, frozenset[Fault]] = {
    "create": frozenset({*RECORDED, Fault.LOST_ANSWER, Fault.LATE, Fault.HANG, Fault.GARBAGE, Fault.UNREACHABLE}),
    "list": frozenset({Fault.THROTTLED, Fault.CREDENTIALS, Fault.GARBAGE}),
    "describe": frozenset({Fault.THROTTLED, Fault.CREDENTIALS, Fault.UNREACHABLE}),
    "delete": frozenset({Fault.THROTTLED, Fault.LOST_ANSWER, Fault.GARBAGE}),
    "create_volume": frozenset({Fault.THROTTLED, Fault.LOST_ANSWER}),
}


class Ec2Harness:
    """One region of moto's."""

    quota = 4

    def __init__(self, directory: Path, moto: str, session: ClientSession) -> None:
        self._directory, self._moto, self._session = directory, moto, session
        self._headers = {"Authorization": _AUTH, "x-moto-account-id": f"{secrets.randbelow(10**12):012}"}
        self._faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self._foreign: set[str] = set()
        self._closing = asyncio.Event()
        self._turn = asyncio.Lock()
        self.client_tokens: list[str] = []
        self.image = ""
        self.url = ""

    def open(self, deployment: str = "dep-ours", **settings: Any) -> Cloud:
        context = CloudContext(
            name="amazon",
            deployment=deployment,
            directory=self._directory,
            clock=SYSTEM_CLOCK,
            deadline_s=PATIENT_S,
        )
        words: dict[str, Any] = {
            "provider": "ec2",
            "url": self.url,
            "key": "AKIAEXAMPLE",
            "secret": SECRET,
            "region": REGION,
            "image": self.image,
            "size": "t3.nano",
        }
        return libcloud.CLOUD.open(libcloud.LibcloudSettings(**words | settings), context)

    async def fail(self, verb: str, fault: Fault, times: int = 1) -> None:
        self._faults[verb].extend([fault] * times)

    async def kill(self, vm: str) -> None:
        await self.ask(Action="StopInstances", **{"InstanceId.1": vm})

    async def make_foreign(self) -> str:
        tags = {"ResourceType": "instance", "Tag.1.Key": "conpaas-deployment", "Tag.1.Value": "dep-theirs"}
        answer = await self.ask(
            Action="RunInstances",
            ImageId=self.image,
            InstanceType="t3.nano",
            MinCount="1",
            MaxCount="1",
            **{f"TagSpecification.1.{name}": value for name, value in tags.items()},
        )
        vm = str(re.findall(r"<instanceId>([^<]+)<", answer)[0])
        self._foreign.add(vm)
        return vm

    async def lives(self, vm: str) -> bool:
        return vm in await self._instances("running")

    async def leftovers(self) -> list[str]:
        volumes = await self.ask(Action="DescribeVolumes", **{"Filter.1.Name": "tag-key", "Filter.1.Value.1": "Name"})
        found = set(re.findall(r"<volumeId>([^<]+)<", volumes)) | await self._instances("running", "stopped", "pending")
        return sorted(found - self._foreign)

    async def ask(self, **params: str) -> str:
        """Ask moto itself."""
        return (await self._pass(params, self._headers))[1]

    async def _pass(self, params: Mapping[str, str], headers: Mapping[str, str]) -> tuple[int, str]:
        """Return moto's answer. One at a time: its threads walk through what another one of them changes."""
        url = f"{self._moto}/?{urlencode(params)}"
        async with self._turn, self._session.get(url, headers=headers) as answer:
            return answer.status, await answer.text()

    async def _instances(self, *states: str) -> set[str]:
        wanted = {f"Filter.1.Value.{number}": state for number, state in enumerate(states, 1)}
        answer = await self.ask(Action="DescribeInstances", **{"Filter.1.Name": "instance-state-name"}, **wanted)
        return set(re.findall(r"<instanceId>([^<]+)<", answer))

    # The proxy

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Pass a request of libcloud's on to moto, unless it is to meet something else."""
        params = dict(request.query)
        fault = self._next(params)
        if fault is not None and fault in RECORDED:
            return self._error(*RECORDED[fault])
        if fault is Fault.GARBAGE:
            return web.Response(text="<html><h1>It works!</h1></html>", content_type="text/html")
        if fault is Fault.HANG:
            await self._closing.wait()
        if fault in {Fault.HANG, Fault.UNREACHABLE}:
            return self._cut(request)
        if params["Action"] == "RunInstances":
            self.client_tokens.append(params["ClientToken"])
        if params["Action"] == "RunInstances" and await self._is_full():
            words = f"You have requested more vCPU capacity than your current limit of {self.quota} allows."
            return self._error(400, "VcpuLimitExceeded", words)
        if params["Action"] == "DetachVolume":
            params |= await self._attachment(params["VolumeId"])
        headers = self._headers | {"Authorization": request.headers["Authorization"]}
        status, text = await self._pass(params, headers)
        if fault is Fault.LATE:
            await self._closing.wait()
        if fault in {Fault.LATE, Fault.LOST_ANSWER}:
            return self._cut(request)
        if status >= 400:
            text = re.sub(r' xmlns="[^"]*"', "", text)
        text = text.replace('/doc/2016-11-15"', '/doc/2016-11-15/"')
        return web.Response(text=text, status=status, content_type="text/xml")

    def _next(self, params: Mapping[str, str]) -> Fault | None:
        faults = self._faults_of(params)
        return faults.popleft() if faults else None

    def is_slow(self, _method: str, url: str) -> bool:
        """Tell whether such a request would meet now what only a deadline ends."""
        faults = self._faults_of(dict(parse_qsl(urlsplit(url).query)))
        return bool(faults and faults[0] in {Fault.HANG, Fault.LATE})

    def _faults_of(self, params: Mapping[str, str]) -> deque[Fault]:
        """Return the faults that such requests are to meet."""
        names = [value for name, value in params.items() if name.startswith("Filter.") and name.endswith(".Name")]
        reads = {"DescribeInstances": ("describe" if "instance-id" in names else "list",)}
        verbs = {**_VERBS, **reads}.get(params["Action"], ())
        return next((self._faults[verb] for verb in verbs if self._faults[verb]), deque())

    async def _is_full(self) -> bool:
        used = await self._instances("pending", "running", "stopped") - self._foreign
        return len(used) >= self.quota

    async def _attachment(self, volume: str) -> dict[str, str]:
        answer = await self.ask(Action="DescribeVolumes", **{"VolumeId.1": volume})
        found = {"InstanceId": r"<instanceId>([^<]+)<", "Device": r"<device>([^<]+)<"}
        return {name: match[1] for name, pattern in found.items() if (match := re.search(pattern, answer))}

    def _error(self, status: int, code: str, words: str) -> web.Response:
        text = f"<Response><Errors><Error><Code>{code}</Code><Message>{words}</Message></Error></Errors></Response>"
        return web.Response(text=text, status=status, content_type="text/xml")

    def _cut(self, request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    def close(self) -> None:
        """Let the requests that hang end."""
        self._closing.set()


@asynccontextmanager
async def harness(directory: Path) -> AsyncIterator[Ec2Harness]:
    """Give a new account of this process' moto server."""
    get_pricing("compute", "ec2_linux")  # libcloud reads its list of prices once: not while a deadline runs
    moto = await asyncio.to_thread(ec2_moto.url)
    async with ClientSession() as session:
        account = Ec2Harness(directory, moto, session)
        registered = await account.ask(Action="RegisterImage", Name="conpaas 3.0", RootDeviceName="/dev/sda1")
        account.image = re.findall(r"<imageId>([^<]+)<", registered)[0]
        app = web.Application()
        app.add_routes([web.get("/", account.answer)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        account.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            with hurried(account.url, account.is_slow):
                yield account
        finally:
            account.close()
            await asyncio.wait_for(runner.cleanup(), 30)

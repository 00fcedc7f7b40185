"""Amazon EC2 as a test sees it: moto, and in front of it what moto lacks.

That is: idempotency by client token, a quota, groups that are in use, lists that lag, the price list, and bad days.
"""

import asyncio
import json
import secrets
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, urlencode
from xml.etree import ElementTree as ET

import aiohttp
from aiohttp import web

from tests.fakes import ec2_errors, ec2_moto
from tests.fakes.clouds import Fault
from tests.fakes.ec2_errors import AmazonError

Form = Mapping[str, str]

GARBAGE = "<html><body><h1>Welcome to Hotel Wi-Fi</h1><p>Please sign in.</p></body></html>"
SIGNATURE = "AWS4-HMAC-SHA256 Credential=direct/20260101/us-east-1/ec2/aws4_request, SignedHeaders=host, Signature=0"

PRICES = {"t2.nano": "0.0058000000", "t2.small": "0.0230000000", "t2.medium": "0.0464000000"}


class Proxy:
    """One account. Everything that reaches moto goes through here."""

    def __init__(self, quota: int) -> None:
        self.url = ""
        self.quota = quota
        self.account = f"{secrets.randbelow(10**12):012}"
        self.calls: list[tuple[str, Form]] = []
        """Every call that was made, in order: the action, and its parameters as they are on the wire."""
        self.on_run: Callable[[str], None] | None = None
        self.on_end: Callable[[str], None] | None = None
        self.answers: dict[str, deque[AmazonError | str]] = defaultdict(deque)
        """By action, what the next calls are answered with instead: an error, or a text."""
        self.held: dict[str, asyncio.Event] = {}
        """By action, what the next calls wait for before they are obeyed."""
        self.made: list[str] = []
        """Ids of all instances and volumes, in the order in which they were made."""
        self.living: set[str] = set()
        self._faults: dict[str, deque[Fault]] = defaultdict(deque)
        self._hidden: list[tuple[str, set[str]]] = []
        self._tokens: dict[str, tuple[Form, bytes]] = {}
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._turn = asyncio.Lock()
        self._closing = asyncio.Event()
        self._session: aiohttp.ClientSession
        self._runner: web.AppRunner

    async def open(self) -> None:
        moto = await asyncio.to_thread(ec2_moto.url)
        self._session = aiohttp.ClientSession(moto, connector=aiohttp.TCPConnector(limit=16))
        app = web.Application(client_max_size=1 << 22)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        self._closing.set()
        await self._runner.cleanup()
        await self._session.close()

    def fail(self, verb: str, fault: Fault, times: int) -> None:
        """Let the next calls of a verb meet a fault."""
        if fault is Fault.STALE and not verb.startswith("create"):
            self._hidden += [(self.made[-1], {verb})] * times
        elif fault is not Fault.NEVER_BOOTS:  # nothing ever runs at moto
            self._faults[verb].extend([fault] * times)

    def is_slow(self, action: str) -> bool:
        """Tell whether a call of an action may be the next to meet what only a deadline ends."""
        verbs, begins = {_VERBS.get(action), *_LOOKS.get(action, ())}, _BEGINS.get(action, ())
        return any(
            verb in verbs or (verb in begins and _is_met_first(verb, fault))
            for verb, faults in self._faults.items()
            for fault in faults
            if fault in _SLOW
        )

    async def ask(self, action: str, **parameters: str) -> ET.Element:
        """Make a call that no fault meets; return the answer without its namespaces."""
        status, _, body = await self._forward({"Action": action, "Version": "2016-11-15", **parameters})
        assert status == 200, body
        return _plain(body)

    # One request

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        action, form = _parse(request, body)
        self.calls.append((action, form))
        verb = verb_of(action, form)
        fault = None if form.get("DryRun") == "true" else self._fault(action, verb)
        is_json = "X-Amz-Target" in request.headers
        if action in self.held:
            await self.held[action].wait()
        if self.answers[action]:
            answer = self.answers[action].popleft()
            return web.Response(text=answer) if isinstance(answer, str) else answer.json() if is_json else answer.xml()
        if fault is not None and fault in ec2_errors.BY_FAULT:
            error = ec2_errors.BY_FAULT[fault]
            return error.json() if is_json else error.xml()
        if fault is Fault.GARBAGE:
            return web.Response(text=GARBAGE, content_type="text/html")
        if fault is Fault.UNREACHABLE:
            return self._hang_up(request)
        if fault is Fault.HANG:
            await self._closing.wait()
            return self._hang_up(request)
        response = await self._answer(request, action, form, verb, hide=fault is Fault.STALE)
        if fault is Fault.LOST_ANSWER:
            return self._hang_up(request)
        if fault is Fault.LATE:
            await self._closing.wait()
        return response

    def _fault(self, action: str, verb: str) -> Fault | None:
        """Take the fault that a call meets, if any."""
        if self._faults[verb]:
            return self._faults[verb].popleft()
        for later in _BEGINS.get(action, ()):
            faults = self._faults[later]
            if faults and _is_met_first(later, faults[0]):
                first = "DescribeImages" if faults[0] is Fault.UNKNOWN_IMAGE else "DescribeAvailabilityZones"
                if later != "examine" or action == first:
                    return faults.popleft()
        return None

    def _hang_up(self, request: web.Request) -> web.Response:
        if request.transport is not None:  # else the client was faster
            request.transport.abort()
        return web.Response()

    async def _answer(
        self, request: web.Request, action: str, form: Form, verb: str, *, hide: bool
    ) -> web.StreamResponse:
        if action == "GetProducts":
            return _products(json.loads(await request.read()))
        if action == "GetServiceQuota":
            return _json({"Quota": {"ServiceCode": "ec2", "Value": float(self.quota)}})
        if "ClientToken" in form and form.get("DryRun") != "true":
            return await self._once(action, form, hide=hide)
        headers = {name: request.headers[name] for name in _PASSED if name in request.headers}
        if action == "TerminateInstances":
            return await self._terminate(form)
        status, content_type, body = await self._forward(form, headers, await request.read())
        if status == 200 and verb in ("describe", "list", "lookup", "describe_volume", "list_volumes", "lookup_volume"):
            body = self._hide(verb, body)
        return web.Response(body=body, status=status, headers={"Content-Type": content_type} | _request_id())

    async def _forward(
        self, form: Form, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> tuple[int, str, bytes]:
        own = {
            "Authorization": SIGNATURE,
            "Content-Type": "application/x-www-form-urlencoded; charset=utf-8",
            "x-moto-account-id": self.account,
        }
        data = urlencode(form).encode() if body is None else body
        # One at a time: moto's threads walk through what another one of them changes.
        async with self._turn, self._session.post("/", data=data, headers=own | dict(headers or {})) as response:
            return response.status, response.headers.get("Content-Type", ""), await response.read()

    async def _once(self, action: str, form: Form, *, hide: bool) -> web.Response:
        """Make an instance or a volume, at most once for each client token."""
        token = f"{action} {form['ClientToken']}"
        async with self._locks[token], self._locks["quota"]:
            if token in self._tokens:
                known, body = self._tokens[token]
                return self._again(known, form, body)
            if action == "RunInstances" and len(self.living) >= self.quota:
                return ec2_errors.too_many_cores(self.quota).xml()
            status, _, body = await self._forward(form)
            if status == 200:
                self._tokens[token] = (form, body)
                self._made(action, body, hide=hide)
            return web.Response(body=body, status=status, content_type="text/xml")

    def _again(self, known: Form, form: Form, body: bytes) -> web.Response:
        if known != form:
            return ec2_errors.MISMATCH.xml()
        made = _ids(body, "instanceId")
        if made and made[0] not in self.living:
            return ec2_errors.TERMINATED.xml()
        return web.Response(body=body, content_type="text/xml")

    def _made(self, action: str, body: bytes, *, hide: bool) -> None:
        kind = "instanceId" if action == "RunInstances" else "volumeId"
        made = _ids(body, kind)[0]
        self.made.append(made)
        if hide:
            suffix = "" if action == "RunInstances" else "_volume"
            verbs = {f"describe{suffix}", f"list{suffix and '_volumes'}", f"lookup{suffix}"}
            self._hidden += [(made, {verb}) for verb in verbs]
        if action == "RunInstances":
            self.living.add(made)
            if self.on_run is not None:
                self.on_run(made)

    async def _terminate(self, form: Form) -> web.Response:
        """End an instance; to end one that has ended is fine at Amazon, and an error at moto."""
        vm = form["InstanceId.1"]
        async with self._locks[vm]:
            if vm in self.made and vm not in self.living:
                return web.Response(text=ec2_errors.ENDED.format(vm), content_type="text/xml")
            status, _, body = await self._forward(form)
            if status == 200:
                self.living.discard(vm)
                if self.on_end is not None:
                    self.on_end(vm)
            return web.Response(body=body, status=status, content_type="text/xml")

    def _hide(self, verb: str, body: bytes) -> bytes:
        """Leave out of an answer what this list does not know yet."""
        gone = {made for made, verbs in self._hidden if verb in verbs}
        if not gone:
            return body
        self._hidden = [(made, verbs) for made, verbs in self._hidden if verb not in verbs]
        root = _plain(body)
        for parent in [*root.iter("reservationSet"), *root.iter("volumeSet")]:
            for item in list(parent):
                ids = {element.text for element in item.iter() if element.tag in ("instanceId", "volumeId")}
                if ids & gone:
                    parent.remove(item)
        return bytes(ET.tostring(root))


_PASSED = ("Authorization", "Content-Type", "X-Amz-Target")

_VERBS = {
    "RunInstances": "create",
    "TerminateInstances": "delete",
    "GetConsoleOutput": "console",
    "DescribeInstanceTypes": "sizes",
    "DescribeImages": "images",
    "GetServiceQuota": "quota",
    "CreateVolume": "create_volume",
    "AttachVolume": "attach",
    "DetachVolume": "detach",
    "DeleteVolume": "delete_volume",
}

_SLOW = (Fault.HANG, Fault.LATE)

_LOOKS = {
    "DescribeInstances": ("describe", "lookup", "list"),
    "DescribeVolumes": ("describe_volume", "lookup_volume", "list_volumes"),
}

_BEGINS = {
    "DescribeInstances": ("create", "delete", "console"),
    "DescribeVolumes": ("create_volume", "attach", "detach", "delete_volume"),
    "DescribeAvailabilityZones": ("examine",),
    "DescribeImages": ("examine",),
}
"""What a call may be the beginning of: it is this one that hangs then."""


def _is_met_first(verb: str, fault: Fault) -> bool:
    """Tell whether the first call of a verb meets its fault, and not the one that matters."""
    return verb == "examine" or fault is Fault.HANG


def verb_of(action: str, form: Form) -> str:
    """Return for which verb of the driver a call is made."""
    wanted = filters_of(form)
    if action == "DescribeInstances":
        if "instance-id" in wanted:
            return "describe"
        if "tag:conpaas:token" in wanted:
            return "lookup"
        return "list" if set(wanted) == {"tag:conpaas:deployment", "tag-key"} else ""
    if action == "DescribeVolumes":
        if "volume-id" in wanted:
            return "describe_volume"
        return "lookup_volume" if "tag:conpaas:token" in wanted else "list_volumes"
    return _VERBS.get(action, "")


def filters_of(form: Form) -> dict[str, list[str]]:
    """Return the filters of a call."""
    found: dict[str, list[str]] = {}
    for key, name in form.items():
        parts = key.split(".")
        if parts[0] == "Filter" and parts[2:] == ["Name"]:
            prefix = f"Filter.{parts[1]}.Value."
            found[name] = [value for other, value in form.items() if other.startswith(prefix)]
    return found


def _parse(request: web.Request, body: bytes) -> tuple[str, dict[str, str]]:
    target = request.headers.get("X-Amz-Target")
    if target is not None:
        return target.partition(".")[2], {}
    form = {key: values[0] for key, values in parse_qs(body.decode(), keep_blank_values=True).items()}
    return form["Action"], form


def _plain(body: bytes) -> ET.Element:
    """Return an answer without its namespaces."""
    root = ET.fromstring(body)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def _ids(body: bytes, kind: str) -> list[str]:
    return [element.text or "" for element in _plain(body).iter(kind)]


def _request_id() -> dict[str, str]:
    return {"x-amzn-RequestId": ec2_errors.REQUEST_ID}


def _products(question: dict[str, Any]) -> web.Response:
    """Answer as the price list does."""
    wanted = {entry["Field"]: entry["Value"] for entry in question["Filters"]}
    assert wanted["tenancy"] == "Shared"
    products = [
        {
            "product": {"attributes": {"instanceType": kind, "regionCode": wanted["regionCode"]}, "sku": kind},
            "terms": {
                "OnDemand": {
                    f"{kind}.JRTCKXETXF": {
                        "priceDimensions": {
                            f"{kind}.JRTCKXETXF.6YS6EN2CT7": {"unit": "Hrs", "pricePerUnit": {"USD": PRICES[kind]}}
                        }
                    }
                }
            },
        }
        for kind in wanted["instanceType"].split(",")
        if kind in PRICES
    ]
    document = {"FormatVersion": "aws_v1", "PriceList": [json.dumps(product) for product in products]}
    return _json(document)


def _json(document: dict[str, Any]) -> web.Response:
    return web.Response(text=json.dumps(document), content_type="application/x-amz-json-1.1", headers=_request_id())

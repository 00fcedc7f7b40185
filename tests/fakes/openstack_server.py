"""An OpenStack of one project: identity, compute, image, network and volume service, as far as a driver asks them.

Answers have the shape of the API reference: codes, names of fields, wording of errors. What a real one does not do is
not done here either: a token looks like one, lists come in pages, an instance is BUILD before it is ACTIVE.
"""

import asyncio
import json
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from aiohttp import web

from tests.fakes.clouds import Fault

PASSWORD = "correct-horse-battery"
ADMIN_PASSWORD = "root-password-of-the-instance"
TOKEN = "gAAAAABtoken"
PROJECT, USER, REGION = "paas", "conpaas", "RegionTwo"
IMAGE, BROKEN_IMAGE = "6f1b9d0e-8a39-4f0e-9c42-1d7a3f5b2c01", "6f1b9d0e-8a39-4f0e-9c42-1d7a3f5b2c02"
NETWORK, OPEN_NETWORK = "b9c1e1f2-52d5-4f57-a4a6-0d5c1a3be7a4", "b9c1e1f2-52d5-4f57-a4a6-0d5c1a3be7a5"
PAGE = 3
BOOT_S = 0.02
ZONES = ("nova", "rack-2")
FLAVORS = (("1", "m1.tiny", 512, 1, 1), ("2", "m1.small", 2048, 20, 1), ("3", "m1.medium", 4096, 40, 2))

RATE_WORDS = "This request was rate-limited."
LOGIN_WORDS = "The request you have made requires authentication."
IMAGE_WORDS = "Can not find requested image"
DISK_WORDS = "VolumeSizeExceedsAvailableQuota: Requested volume or snapshot exceeds allowed gigabytes quota."

FAULT: web.RequestKey[Any] = web.RequestKey("fault", object)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Refusal(Exception):  # noqa: N818 - an answer, not a mistake
    """An answer that is an error, in the manner of the compute service."""

    def __init__(self, code: int, kind: str, words: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(words)
        self.answer = web.json_response(
            {kind: {"code": code, "message": words}}, status=code, headers=headers, content_type="application/json"
        )


@dataclass
class Server:
    """An instance."""

    body: dict[str, Any]
    made: float
    number: int
    id: str = field(default_factory=lambda: str(uuid4()))
    boots: bool = True
    status: str = ""
    """What it has become; empty: it boots, and runs."""
    fault: str = ""
    task: str | None = None
    floating: str = ""
    hidden_from: set[str] = field(default_factory=set)


@dataclass
class Disk:
    """A volume."""

    body: dict[str, Any]
    id: str = field(default_factory=lambda: str(uuid4()))
    server: str = ""
    attachment: str = ""
    device: str = ""
    hidden_from: set[str] = field(default_factory=set)

    def show(self) -> dict[str, Any]:
        attached = {
            "id": self.id,
            "attachment_id": self.attachment,
            "volume_id": self.id,
            "server_id": self.server,
            "host_name": None,
            "device": self.device,
        }
        return {
            "id": self.id,
            "name": self.body.get("name"),
            "description": self.body.get("description"),
            "size": self.body["size"],
            "status": "in-use" if self.server else "available",
            "availability_zone": self.body.get("availability_zone") or ZONES[0],
            "attachments": [attached] if self.server else [],
            "metadata": self.body.get("metadata", {}),
            "volume_type": "lvm",
            "snapshot_id": None,
            "created_at": "2025-01-01T00:00:00.000000",
        }


class OpenStack:
    """The services behind one address. `faults` are what the next requests meet, by the verb of a driver."""

    def __init__(self, quota: int) -> None:
        self.quota = quota
        self.servers: dict[str, Server] = {}
        self.disks: dict[str, Disk] = {}
        self.faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self.requests: list[str] = []
        """Every one, in order: method and path."""
        self.on_request: Callable[[str], None] | None = None
        """Told of each before it is looked at."""
        self.delay_s = 0.0
        """How long each answer of the compute service takes."""
        self.held: asyncio.Event | None = None
        """What the requests to the compute service wait for."""
        self.waiting = 0
        """How many have waited for it."""
        self.tokens: set[str] = set()
        self.expired = False
        """No login and no token is accepted."""
        self.let_in: list[tuple[int, int]] = [(5555, 5555), (8080, 8080)]
        """Ports that the group `conpaas` opens to everybody."""
        self.no_groups = False
        self._count = 0
        self._closing = asyncio.Event()
        self.url = ""

    async def start(self, host: str = "127.0.0.1") -> web.AppRunner:
        app = web.Application(middlewares=[self._answer], client_max_size=1 << 20)
        app.add_routes(
            [
                web.post("/identity/v3/auth/tokens", self._log_in),
                web.get("/identity/v3/auth/tokens", self._show_token),
                web.get("/compute/v2.1/servers/detail", self._list),
                web.post("/compute/v2.1/servers", self._create),
                web.get("/compute/v2.1/servers/{id}", self._show),
                web.delete("/compute/v2.1/servers/{id}", self._delete),
                web.post("/compute/v2.1/servers/{id}/action", self._act),
                web.post("/compute/v2.1/servers/{id}/os-volume_attachments", self._attach),
                web.delete("/compute/v2.1/servers/{id}/os-volume_attachments/{disk}", self._detach),
                web.get("/compute/v2.1/flavors/detail", self._flavors),
                web.get("/compute/v2.1/limits", self._limits),
                web.get("/compute/v2.1/os-availability-zone", self._zones),
                web.get("/compute/v2.1/os-keypairs", self._keys),
                web.get("/image/v2/images", self._images),
                web.get("/image/v2/images/{id}", self._image),
                web.get("/network/v2.0/networks", self._networks),
                web.get("/network/v2.0/security-groups", self._groups),
                web.get("/volume/v3/volumes/detail", self._list_disks),
                web.get("/volume/v3/volumes/{id}", self._show_disk),
                web.post("/volume/v3/volumes", self._create_disk),
                web.delete("/volume/v3/volumes/{id}", self._delete_disk),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, host, 0)
        await site.start()
        self.url = f"http://{host}:{runner.addresses[0][1]}"
        return runner

    def close(self) -> None:
        """Let the requests that hang end."""
        self._closing.set()

    # What every request meets

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        if self.on_request is not None:
            self.on_request(self.requests[-1])
        try:
            if request.path.startswith("/identity"):
                return await handler(request)
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if self.held is not None:
                self.waiting += 1
                await self.held.wait()
            return await self._meet(request, handler)
        except Refusal as refusal:
            return refusal.answer

    async def _meet(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.expired or request.headers.get("X-Auth-Token") not in self.tokens:
            return self._unauthorized()
        faults = self._faults_of(request.method, request.path)
        fault = faults.popleft() if faults else None
        if fault in _REFUSALS:
            raise _refusal(fault)
        if fault is Fault.GARBAGE:
            return web.Response(text="<html><body><h1>It works!</h1></body></html>", content_type="text/html")
        if fault is Fault.HANG:
            await self._closing.wait()
        if fault in {Fault.HANG, Fault.UNREACHABLE}:
            return self._cut(request)
        request[FAULT] = fault
        answer = await handler(request)
        if fault is Fault.LATE:
            await self._closing.wait()
        return self._cut(request) if fault in {Fault.LATE, Fault.LOST_ANSWER} else answer

    def _faults_of(self, method: str, path: str) -> deque[Fault]:
        """Return the faults that such requests are to meet."""
        return next((self.faults[verb] for verb in _verbs(method, path) if self.faults[verb]), deque())

    def is_slow(self, method: str, url: str) -> bool:
        """Tell whether such a request would meet now what only a deadline ends."""
        faults = self._faults_of(method, urlsplit(url).path)
        return bool(faults and faults[0] in {Fault.HANG, Fault.LATE})

    def _cut(self, request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    def _unauthorized(self) -> web.Response:
        return web.json_response({"error": {"code": 401, "title": "Unauthorized", "message": LOGIN_WORDS}}, status=401)

    # Identity

    async def _log_in(self, request: web.Request) -> web.Response:
        auth = (await request.json())["auth"]
        user = auth["identity"]["password"]["user"]
        known = (user["name"], user["password"], auth["scope"]["project"]["name"]) == (USER, PASSWORD, PROJECT)
        if self.expired or not known:
            return self._unauthorized()
        self._count += 1
        token = f"{TOKEN}{self._count}"
        self.tokens.add(token)
        return web.json_response(self._token(), status=201, headers={"X-Subject-Token": token})

    async def _show_token(self, request: web.Request) -> web.Response:
        token = request.headers["X-Subject-Token"]
        if self.expired or token not in self.tokens:
            return self._unauthorized()
        return web.json_response(self._token(), headers={"X-Subject-Token": token})

    def _token(self) -> dict[str, Any]:
        services = (
            ("compute", "Compute Service", "/compute/v2.1"),
            ("image", "glance", "/image"),
            ("network", "neutron", "/network"),
            ("volumev3", "cinder", "/volume/v3"),
        )
        catalogue = [
            {
                "type": kind,
                "name": name,
                "id": str(uuid4()),
                "endpoints": [
                    {"id": str(uuid4()), "interface": interface, "region": region, "region_id": region, "url": url}
                    for region in ("RegionOne", REGION)
                    for interface in ("public", "internal", "admin")
                    for url in [
                        f"{self.url}{path}" if (region, interface) == (REGION, "public") else "http://127.0.0.1:1"
                    ]
                ],
            }
            for kind, name, path in services
        ]
        return {
            "token": {
                "methods": ["password"],
                "expires_at": "2199-01-01T00:00:00.000000Z",
                "issued_at": "2025-01-01T00:00:00.000000Z",
                "catalog": catalogue,
                "user": {"id": str(uuid4()), "name": USER, "domain": {"id": "default", "name": "Default"}},
                "project": {"id": str(uuid4()), "name": PROJECT, "domain": {"id": "default", "name": "Default"}},
                "roles": [{"id": str(uuid4()), "name": "member"}],
            }
        }

    # Compute

    def add(self, body: dict[str, Any]) -> Server:
        """Make an instance, anybody's."""
        self._count += 1
        server = Server(body, made=asyncio.get_running_loop().time(), number=self._count)
        self.servers[server.id] = server
        return server

    def status(self, server: Server) -> str:
        age = asyncio.get_running_loop().time() - server.made
        return server.status or ("ACTIVE" if server.boots and age >= BOOT_S else "BUILD")

    async def _create(self, request: web.Request) -> web.Response:
        body = (await request.json())["server"]
        if body["imageRef"] != IMAGE:
            raise _refusal(Fault.UNKNOWN_IMAGE)
        if body["flavorRef"] not in {flavor[0] for flavor in FLAVORS}:
            raise Refusal(400, "badRequest", "Invalid flavorRef provided.")
        if body.get("availability_zone") not in (None, *ZONES):
            raise Refusal(400, "badRequest", "The requested availability zone is not available")
        if len(self.servers) >= self.quota:
            used = f"Requested 1, but already used {len(self.servers)} of {self.quota} instances"
            raise Refusal(403, "forbidden", f"Quota exceeded for instances: {used}")
        server = self.add(body)
        server.boots = request[FAULT] is not Fault.NEVER_BOOTS
        if request[FAULT] is Fault.STALE:
            server.hidden_from = {"list", "describe"}
        answer = {
            "id": server.id,
            "links": [{"rel": "self", "href": f"{self.url}/compute/v2.1/servers/{server.id}"}],
            "OS-DCF:diskConfig": "MANUAL",
            "security_groups": [{"name": "default"}],
            "adminPass": ADMIN_PASSWORD,
        }
        return web.json_response({"server": answer}, status=202)

    async def _list(self, request: web.Request) -> web.Response:
        servers = list(self.servers.values())
        if request[FAULT] is Fault.STALE and servers:
            servers.pop()
        servers = [server for server in servers if "list" not in server.hidden_from]
        for server in self.servers.values():
            server.hidden_from.discard("list")
        marker = request.query.get("marker")
        start = next((at + 1 for at, server in enumerate(servers) if server.id == marker), 0)
        page = servers[start : start + PAGE]
        answer: dict[str, Any] = {"servers": [self._view(server) for server in page]}
        if start + PAGE < len(servers):
            href = f"{self.url}/compute/v2.1/servers/detail?marker={page[-1].id}"
            answer["servers_links"] = [{"rel": "next", "href": href}]
        return web.json_response(answer)

    async def _show(self, request: web.Request) -> web.Response:
        server = self._server(request)
        if "describe" in server.hidden_from or request[FAULT] is Fault.STALE:
            server.hidden_from.discard("describe")
            raise self._no_server(server.id)
        return web.json_response({"server": self._view(server)})

    async def _delete(self, request: web.Request) -> web.Response:
        server = self._server(request)
        del self.servers[server.id]
        for disk in self.disks.values():
            if disk.server == server.id:
                disk.server = disk.attachment = disk.device = ""
        return web.Response(status=204)

    async def _act(self, request: web.Request) -> web.Response:
        server = self._server(request)
        assert "os-getConsoleOutput" in await request.json()
        return web.json_response({"output": f"booting {server.body['name']}\n" * 4000})

    def _server(self, request: web.Request) -> Server:
        server = self.servers.get(request.match_info["id"])
        if server is None:
            raise self._no_server(request.match_info["id"])
        return server

    def _no_server(self, server: str) -> Refusal:
        return Refusal(404, "itemNotFound", f"Instance {server} could not be found.")

    def _view(self, server: Server) -> dict[str, Any]:
        status = self.status(server)
        addresses = [
            {
                "addr": f"10.20.{server.number // 250}.{server.number % 250 + 1}",
                "version": 4,
                "OS-EXT-IPS:type": "fixed",
                "OS-EXT-IPS-MAC:mac_addr": "fa:16:3e:00:00:01",
            }
        ]
        if server.floating:
            addresses.append({"addr": server.floating, "version": 4, "OS-EXT-IPS:type": "floating"})
        view = {
            "id": server.id,
            "name": server.body["name"],
            "status": status,
            "tenant_id": PROJECT,
            "user_id": USER,
            "hostId": "",
            "image": {"id": server.body["imageRef"], "links": []},
            "flavor": {"id": server.body["flavorRef"], "links": []},
            "addresses": {"private": addresses} if status != "BUILD" else {},
            "links": [{"rel": "self", "href": f"{self.url}/compute/v2.1/servers/{server.id}"}],
            "metadata": server.body.get("metadata", {}),
            "created": "2025-01-01T00:00:00Z",
            "updated": "2025-01-01T00:00:00Z",
            "key_name": server.body.get("key_name"),
            "config_drive": "",
            "OS-EXT-AZ:availability_zone": server.body.get("availability_zone") or ZONES[0],
            "OS-EXT-STS:task_state": "spawning" if status == "BUILD" else server.task,
            "OS-EXT-STS:vm_state": _VM_STATES.get(status, status.lower()),
            "OS-EXT-STS:power_state": 1,
            "os-extended-volumes:volumes_attached": [],
        }
        if server.fault:
            view["fault"] = {"code": 500, "created": "2025-01-01T00:00:00Z", "message": server.fault}
        return view

    async def _flavors(self, _request: web.Request) -> web.Response:
        flavors = [
            {
                "id": flavor,
                "name": name,
                "ram": ram,
                "disk": disk,
                "vcpus": cores,
                "swap": "",
                "OS-FLV-EXT-DATA:ephemeral": 0,
                "OS-FLV-DISABLED:disabled": False,
                "os-flavor-access:is_public": True,
                "links": [],
            }
            for flavor, name, ram, disk, cores in FLAVORS
        ]
        return web.json_response({"flavors": flavors})

    async def _limits(self, _request: web.Request) -> web.Response:
        absolute = {
            "maxTotalInstances": self.quota,
            "totalInstancesUsed": len(self.servers),
            "maxTotalCores": -1,
            "totalCoresUsed": len(self.servers),
            "maxTotalRAMSize": 51200,
            "totalRAMUsed": 512 * len(self.servers),
        }
        return web.json_response({"limits": {"rate": [], "absolute": absolute}})

    async def _zones(self, _request: web.Request) -> web.Response:
        states = [*((zone, True) for zone in ZONES), ("closed", False)]
        zones = [{"zoneName": zone, "zoneState": {"available": open_}, "hosts": None} for zone, open_ in states]
        return web.json_response({"availabilityZoneInfo": zones})

    async def _keys(self, _request: web.Request) -> web.Response:
        key = {"name": "ops", "fingerprint": "aa:bb", "public_key": "ssh-ed25519 AAAA"}
        return web.json_response({"keypairs": [{"keypair": key}]})

    # Image and network

    async def _images(self, _request: web.Request) -> web.Response:
        images = [
            _image(IMAGE, "conpaas 3.0", "private"),
            _image(BROKEN_IMAGE, "an older one", "shared", status="queued"),
            _image(str(uuid4()), "debian-12", "public"),
        ]
        return web.json_response({"images": images, "first": "/v2/images", "schema": "/v2/schemas/images"})

    async def _image(self, request: web.Request) -> web.Response:
        image = request.match_info["id"]
        if image == IMAGE:
            return web.json_response(_image(IMAGE, "conpaas 3.0", "private"))
        if image == BROKEN_IMAGE:
            return web.json_response(_image(BROKEN_IMAGE, "an older one", "shared", status="queued"))
        return web.Response(status=404, text=f"<html><h1>404 Not Found</h1>No image found with ID {image}</html>")

    async def _networks(self, _request: web.Request) -> web.Response:
        networks = [
            {"id": network, "name": name, "subnets": [], "status": "ACTIVE", "port_security_enabled": secured}
            for network, name, secured in ((NETWORK, "private", True), (OPEN_NETWORK, "lab", False))
        ]
        return web.json_response({"networks": networks})

    async def _groups(self, _request: web.Request) -> web.Response:
        if self.no_groups:
            return web.Response(status=404, text="<html><h1>404 Not Found</h1>The resource could not be found.</html>")
        default, ours = str(uuid4()), str(uuid4())
        rules = {
            default: [_rule(default, "egress"), _rule(default, "ingress", source=default)],
            ours: [
                _rule(ours, "egress"),
                *(_rule(ours, "ingress", ports) for ports in self.let_in),
                _rule(ours, "ingress", (6000, 9000), source=ours),
            ],
        }
        groups: list[dict[str, Any]] = [
            {"id": group, "tenant_id": PROJECT, "name": name, "description": "", "security_group_rules": rules[group]}
            for group, name in ((default, "default"), (ours, "conpaas"))
        ]
        return web.json_response({"security_groups": groups})

    # Volumes

    async def _create_disk(self, request: web.Request) -> web.Response:
        body = (await request.json())["volume"]
        if body.get("availability_zone") not in (None, *ZONES):
            raise Refusal(400, "badRequest", f"Availability zone '{body['availability_zone']}' is invalid")
        disk = Disk(body)
        self.disks[disk.id] = disk
        if request[FAULT] is Fault.STALE:
            disk.hidden_from = {"list", "describe"}
        return web.json_response({"volume": disk.show() | {"status": "creating"}}, status=202)

    async def _list_disks(self, request: web.Request) -> web.Response:
        disks = list(self.disks.values())
        if request[FAULT] is Fault.STALE and disks:
            disks.pop()
        shown = [disk.show() for disk in disks if "list" not in disk.hidden_from]
        for disk in disks:
            disk.hidden_from.discard("list")
        return web.json_response({"volumes": shown})

    async def _show_disk(self, request: web.Request) -> web.Response:
        disk = self._disk(request.match_info["id"])
        if "describe" in disk.hidden_from or request[FAULT] is Fault.STALE:
            disk.hidden_from.discard("describe")
            raise self._no_disk(disk.id)
        return web.json_response({"volume": disk.show()})

    async def _delete_disk(self, request: web.Request) -> web.Response:
        disk = self._disk(request.match_info["id"])
        if disk.server:
            raise Refusal(400, "badRequest", "Invalid volume: Volume status must be available or error")
        del self.disks[disk.id]
        return web.Response(status=202)

    async def _attach(self, request: web.Request) -> web.Response:
        server = self._server(request)
        disk = self._disk((await request.json())["volumeAttachment"]["volumeId"])
        if disk.server:
            raise Refusal(400, "badRequest", f"Invalid volume: volume {disk.id} already attached")
        taken = {other.device for other in self.disks.values() if other.server == server.id}
        disk.server, disk.attachment = server.id, str(uuid4())
        disk.device = next(device for letter in "bcdef" if (device := f"/dev/vd{letter}") not in taken)
        answer = {"device": disk.device, "id": disk.id, "serverId": server.id, "volumeId": disk.id}
        return web.json_response({"volumeAttachment": answer})

    async def _detach(self, request: web.Request) -> web.Response:
        disk = self._disk(request.match_info["disk"])
        if disk.server != request.match_info["id"]:
            raise Refusal(404, "itemNotFound", f"Instance is not attached to volume {disk.id}")
        disk.server = disk.attachment = disk.device = ""
        return web.Response(status=202)

    def _disk(self, disk: str) -> Disk:
        if disk not in self.disks:
            raise self._no_disk(disk)
        return self.disks[disk]

    def _no_disk(self, disk: str) -> Refusal:
        return Refusal(404, "itemNotFound", f"Volume {disk} could not be found.")


_REFUSALS: dict[Fault | None, Callable[[], Refusal]] = {
    Fault.THROTTLED: lambda: Refusal(429, "overLimit", RATE_WORDS, {"Retry-After": "2"}),
    Fault.UNKNOWN_IMAGE: lambda: Refusal(400, "badRequest", IMAGE_WORDS),
    Fault.NO_DISK: lambda: Refusal(413, "overLimit", DISK_WORDS),
}


def _refusal(fault: Fault | None) -> Refusal:
    return _REFUSALS[fault]()


_VM_STATES = {
    "BUILD": "building",
    "SHUTOFF": "stopped",
    "MIGRATING": "active",
    "REBOOT": "active",
    "SOFT_DELETED": "soft-delete",
}
_VERBS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("GET", "/servers/detail", ("list", "examine")),
    ("POST", "/servers", ("create",)),
    ("GET", "/volumes/detail", ("list_volumes",)),
    ("POST", "/volumes", ("create_volume",)),
    ("GET", "/flavors/detail", ("sizes",)),
    ("GET", "/images", ("images",)),
    ("GET", "/os-availability-zone", ("zones",)),
    ("GET", "/limits", ("quota",)),
    ("POST", "/action", ("console",)),
    ("POST", "/os-volume_attachments", ("attach",)),
)


def _verbs(method: str, path: str) -> tuple[str, ...]:
    """Return the verbs of a driver that a request is the heart of."""
    for kind, end, verbs in _VERBS:
        if method == kind and path.endswith(end):
            return verbs
    if "/os-volume_attachments/" in path:
        return ("detach",)
    thing = {"servers": ("describe", "delete"), "volumes": ("describe_volume", "delete_volume")}.get(
        path.split("/")[-2]
    )
    return () if thing is None else (thing[0 if method == "GET" else 1],)


def _rule(
    group: str, direction: str, ports: tuple[int, int] | None = None, source: str | None = None
) -> dict[str, Any]:
    return {
        "id": str(uuid4()),
        "tenant_id": PROJECT,
        "security_group_id": group,
        "direction": direction,
        "ethertype": "IPv4",
        "protocol": "tcp" if ports else None,
        "port_range_min": ports[0] if ports else None,
        "port_range_max": ports[1] if ports else None,
        "remote_group_id": source,
        "remote_ip_prefix": None,
    }


def _image(image: str, name: str, visibility: str, status: str = "active") -> dict[str, Any]:
    return {
        "id": image,
        "name": name,
        "visibility": visibility,
        "status": status,
        "created_at": "2025-01-01T00:00:00Z",
        "updated_at": "2025-01-01T00:00:00Z",
        "min_ram": 0,
        "min_disk": 0,
        "owner": PROJECT,
        "tags": [],
    }


def user_data(server: Server) -> str:
    """Return what an instance is given, still in base64."""
    return str(json.loads(json.dumps(server.body))["user_data"])

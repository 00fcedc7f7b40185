"""An OpenNebula that answers as the recorded one did, and runs nothing.

Each answer says which record of `opennebula/` it is shaped like. What is in no record, and in no line of what was seen
on that server, follows OpenNebula's own source and says where: quotas of users, datastores, security groups, images
that change. Parameters are checked as strictly as the server does; more of them than its version knows is a complaint.
"""

import asyncio
import inspect
import itertools
import xmlrpc.client
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.tasks import Background
from tests.fakes import opennebula_records as records
from tests.fakes.clouds import Fault
from tests.fakes.opennebula_records import Value, attributes

AUTHENTICATION, AUTHORIZATION, NO_EXISTS, ACTION, INTERNAL, ALLOCATE = 0x100, 0x200, 0x400, 0x800, 0x2000, 0x4000
PENDING, RUNNING, DONE, POWEROFF = (1, 0), (3, 3), (6, 0), (8, 0)
PROLOG, BOOT, EPILOG, SHUTDOWN, HOTPLUG, BOOT_FAILURE, UNKNOWN = ((3, lcm) for lcm in (1, 2, 11, 12, 17, 36, 16))
STATE_NAMES = {PROLOG: "PROLOG", BOOT: "BOOT", EPILOG: "EPILOG", SHUTDOWN: "SHUTDOWN", HOTPLUG: "HOTPLUG"}
STATE_NAMES |= {RUNNING: "RUNNING", PENDING: "PENDING", UNKNOWN: "UNKNOWN", (3, 34): "HOTPLUG_EPILOG_POWEROFF"}
READY, USED, LOCKED, ERROR, DELETE, USED_PERS = 1, 2, 4, 5, 7, 8
NO_HOST = "Mon Nov 23 05:31:22 2026: Cannot dispatch VM: No host with enough capacity to deploy the VM"
"""Of the scheduler (src/scheduler/src/sched/Scheduler.cc, VirtualMachineXML::log)."""

_OF_A_VM = {"CPU", "VCPU", "MEMORY", "DISK", "NIC", "CONTEXT", "GRAPHICS", "OS", "SUBMIT_ON_HOLD"}
_ONCE = {"NAME", "TEMPLATE_ID", "TEMPLATE_NAME"}

Version = tuple[int, ...]


class _Failure(Exception):  # noqa: N818 - what the server answers
    def __init__(self, text: str, code: int, object_id: int = -1) -> None:
        super().__init__(text)
        self.answer = (text, code, object_id)


@dataclass
class User:
    """An account at the fake."""

    uid: int
    name: str
    password: str
    quotas: list[tuple[str, dict[str, int]]] = field(default_factory=list)
    """As they are set: `("VM", {"VMS": 4})`."""


@dataclass
class FakeVm:
    """A VM at the fake."""

    number: int
    owner: User
    name: str
    template: list[tuple[str, Value]]
    user_template: dict[str, str]
    state: tuple[int, int] = PENDING
    seen: list[tuple[int, int]] = field(default_factory=lambda: [PENDING])
    """All states that it was in."""
    boots: bool = True
    waits_for: str = ""
    deployed: bool = False
    locked: bool = False

    def move(self, state: tuple[int, int]) -> None:
        self.state = state
        self.seen.append(state)

    def vectors(self, name: str) -> list[dict[str, str]]:
        return [value for tag, value in self.template if tag == name and isinstance(value, dict)]

    @property
    def context(self) -> dict[str, str]:
        """What the instance finds in `context.sh`."""
        return self.vectors("CONTEXT")[0]


@dataclass
class FakeImage:
    """An image at the fake."""

    number: int
    owner: User
    name: str
    type: int
    size: int
    persistent: bool
    template: list[tuple[str, Value]]
    state: int = READY
    datastore: int = 101
    vms: list[int] = field(default_factory=list)
    path: str = "/tmp/none"
    format: str = "dummy_format"
    source: str = "dummy_path"
    """Where its datastore keeps it; empty until it does."""


class FakeOpenNebula:
    """One server. Times are in seconds; with none, what they are of cannot be seen."""

    def __init__(self, version: str = "6.10.0.1") -> None:
        self.version, self.said = version, ""
        self.users = [User(0, "oneadmin", "opennebula"), User(2, "conpaas", "pw-of-conpaas")]
        self.vms: dict[int, FakeVm] = {}
        self.images: dict[int, FakeImage] = {}
        self.groups: dict[int, tuple[User, str, list[tuple[str, Value]]]] = {}
        self.leases = 200
        self.network_state = 1
        self.datastore_full = False
        self.schedule_s, self.prolog_s, self.end_s, self.hotplug_s, self.lock_s = 0.01, 0.0, 0.0, 0.01, 0.01
        self.attach_fails = self.cancel_fails = self.deploy_fails = self.copy_fails = 0
        """How many of the next ones do."""
        self.on_boot: Callable[[int, Mapping[str, str]], Awaitable[str | None]] | None = None
        """Awaited when a VM boots, with its number and its context: start its daemon here, and return the address
        that it is to have; None: the one that was leased. Then it is RUNNING."""
        self.on_end: Callable[[int], Awaitable[None]] | None = None
        """Awaited when a VM has been terminated or killed."""
        self.faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        """Of the next calls, by method."""
        self.held: dict[str, asyncio.Event] = {}
        """A call of this method waits in the server's queue, before it is obeyed, until the event is set."""
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.counts: Counter[str] = Counter()
        self.complaints: list[str] = []
        self.most_at_once = self._now = 0
        self.endpoint = ""
        self._numbers, self._image_numbers = itertools.count(1), itertools.count(1)
        self._background, self._closing = Background(), asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._add_image(self.users[1], "conpaas-node", 0, 1024, persistent=False)
        self.images[0] = self.images.pop(1)
        self.images[0].number = 0

    @property
    def numbers(self) -> Version:
        return tuple(int(part) for part in self.version.split("."))

    def is_slow(self, method: str) -> bool:
        """Tell whether the next call of a method meets what only a deadline ends."""
        faults = self.faults[method]
        return method in self.held or bool(faults and faults[0] in (Fault.HANG, Fault.LATE))

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/RPC2", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=1, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self.endpoint = f"http://127.0.0.1:{port}/RPC2"

    async def close(self) -> None:
        self._closing.set()
        if self._runner is not None:
            await self._runner.cleanup()
        await self._background.close()

    # -- the wire ---------------------------------------------------------------------------------------------------

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            return await self._answer(request)
        finally:
            self._now -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        parameters, method = xmlrpc.client.loads(await request.read())
        assert method is not None
        fault = self.faults[method].popleft() if self.faults[method] else None
        self.counts[method] += 1
        if fault is Fault.HANG:
            await self._closing.wait()
        if fault is Fault.THROTTLED:
            return web.Response(status=503, headers={"Retry-After": "1", "Connection": "close"}, text="busy")
        if fault is Fault.GARBAGE or self._closing.is_set():
            return web.Response(text="<html><body>It works!</body></html>", headers={"Connection": "close"})
        if method in self.held:
            await self.held[method].wait()
        body = await self._obey(method, parameters, fault)
        if fault is Fault.LATE:
            await self._closing.wait()
        if fault is Fault.LOST_ANSWER and request.transport is not None:
            request.transport.abort()
        return web.Response(body=body, content_type="text/xml", headers={"Connection": "close"})

    async def _obey(self, method: str, parameters: tuple[Any, ...], fault: Fault | None) -> bytes:
        if method not in METHODS or self.numbers < METHODS[method].since:
            return records.fault(-506, f"Method '{method}' not defined")  # err_no_method
        key, *rest = parameters
        self.calls.append((method, tuple(rest)))
        if trouble := self._check(method, rest):
            return records.fault(-501, trouble)
        try:
            answer = METHODS[method].handler(self, self._user(str(key), fault), fault, *rest)
            return records.success(await answer if inspect.isawaitable(answer) else answer)
        except _Failure as exc:
            text, code, object_id = exc.answer
            return records.failure(f"[{method}] {text}", code, object_id)

    def _check(self, method: str, parameters: list[Any]) -> str:
        """Check parameters as err_missing_args and err_type_fault show; complain of those that nobody reads."""
        needed, optional = METHODS[method].needed, METHODS[method].optional_in(self.numbers)
        if len(parameters) < len(needed):
            return "Not enough parameters"
        if len(parameters) > len(needed) + len(optional):
            self.complaints.append(f"{method} of {self.version} takes no {parameters}")
        kinds = {"i": (int, "integer"), "s": (str, "string"), "b": (bool, "boolean")}
        for value, sign in zip(parameters, needed + optional, strict=False):
            kind, name = kinds[sign]
            if type(value) is not kind:
                return f"Parameter that is supposed to be {name} is not"
        return ""

    def _user(self, key: str, fault: Fault | None) -> User:
        for user in self.users:
            if key == f"{user.name}:{user.password}" and fault is not Fault.CREDENTIALS:
                return user
        raise _Failure("User couldn't be authenticated, aborting call.", AUTHENTICATION)  # err_bad_auth

    # -- VMs --------------------------------------------------------------------------------------------------------

    def instantiate(
        self, user: User, fault: Fault | None, number: int, name: str, _hold: bool, extra: str, _copy: bool = False
    ) -> int:
        """As in template_instantiate, err_no_template, err_quota."""
        if number != 0 or fault is Fault.UNKNOWN_IMAGE:
            raise _Failure(f"Error getting virtual machine template [{number}].", NO_EXISTS, number)
        template = attributes(records.document("template_info").find("TEMPLATE"))
        added = self._parse(extra)
        replaced = {tag for tag, _ in added}
        merged = [(tag, value) for tag, value in template if tag not in replaced] + added
        # The server's code for what goes wrong here is not the one of err_no_lease, which is of one.vm.allocate: see
        # VMTemplateInstantiate::request_execute
        try:
            return self._make(user, fault, name, merged)
        except _Failure as exc:
            text, code, object_id = exc.answer
            if code != INTERNAL:
                raise
            raise _Failure(f"Error allocating a new virtual machine. {text}", ALLOCATE, object_id) from exc

    def allocate(self, user: User, fault: Fault | None, text: str, _hold: bool = False) -> int:
        """As in err_bad_template_syntax, err_no_lease, err_restricted; a success is as in template_instantiate."""
        template = self._parse(text)
        name = next((str(value) for tag, value in template if tag == "NAME"), "")
        for disk in (value for tag, value in template if tag == "DISK" and isinstance(value, dict)):
            number = int(disk.get("IMAGE_ID", -1))
            if number not in self.images or fault is Fault.UNKNOWN_IMAGE:
                # ImageManager::acquire_image
                raise _Failure(f"Image with ID: {number} does not exist", INTERNAL)
        return self._make(user, fault, name, template)

    def _parse(self, text: str) -> list[tuple[str, Value]]:
        try:
            return records.parse(text)
        except records.SyntaxTroubleError as exc:
            raise _Failure(f"Parse error: syntax error, unexpected {exc}", INTERNAL) from exc

    def _make(self, user: User, fault: Fault | None, name: str, template: list[tuple[str, Value]]) -> int:
        self._check_quota(user)
        ours: list[tuple[str, Value]] = [(tag, value) for tag, value in template if tag in _OF_A_VM]
        tags = {tag: str(value) for tag, value in template if tag not in _OF_A_VM | _ONCE}
        vm = FakeVm(-1, user, name, ours, tags)
        self._lease(vm)
        vm.number = next(self._numbers)
        self._complete(vm)
        self.vms[vm.number] = vm
        vm.boots = fault is not Fault.NEVER_BOOTS
        vm.waits_for = NO_HOST if fault is Fault.NO_CAPACITY else ""
        self._background.start(f"VM {vm.number}", self._live(vm))
        return vm.number

    def _check_quota(self, user: User) -> None:
        """As in err_quota."""
        for kind, limits in user.quotas:
            limit = limits.get("VMS", -2) if kind == "VM" else -2
            if 0 <= limit <= self.used(user):
                text = f"user [{user.uid}] limit of {limit} reached for VMS quota in VM"
                raise _Failure(f"User [{user.uid}] : {text}.", AUTHORIZATION)

    def used(self, user: User) -> int:
        return sum(vm.owner is user and vm.state != DONE for vm in self.vms.values())

    def _lease(self, vm: FakeVm) -> None:
        """Give each NIC its address, at once, as in vm_info_pending; or as in err_no_lease and err_restricted."""
        recorded = _recorded("NIC")
        for number, nic in enumerate(vm.vectors("NIC")):
            network = int(nic.get("NETWORK_ID", 0))
            if network not in (0, 2):
                raise _Failure(f"Virtual network with ID: {network} does not exist", INTERNAL)
            taken = {other["IP"] for vm in self.vms.values() if vm.state != DONE for other in vm.vectors("NIC")}
            first = IPv4Address(f"127.{20 + network}.0.10")
            free = [str(first + place) for place in range(self.leases) if str(first + place) not in taken]
            if not free or self.network_state != 1:
                raise _Failure(f"Cannot get IP/MAC lease from virtual network {network}.", INTERNAL)
            mac = "02:00:" + ":".join(f"{byte:02x}" for byte in IPv4Address(free[0]).packed)
            wished = dict(nic)
            groups = ",".join(sorted({"0", *wished.get("SECURITY_GROUPS", "0").split(",")}))
            nic.update(
                recorded | wished | {"IP": free[0], "MAC": mac, "NIC_ID": str(number), "NETWORK_ID": str(network)}
            )
            nic["SECURITY_GROUPS"] = groups

    def _complete(self, vm: FakeVm) -> None:
        """Add what the server adds, as in vm_info_pending."""
        for number, nic in enumerate(vm.vectors("NIC")):
            nic["TARGET"] = f"one-{vm.number}-{number}"
        for disk in vm.vectors("DISK"):
            disk.update(_recorded("DISK") | disk | {"DISK_ID": "0", "TARGET": "vda"})
        self._address(vm)
        for tag, value in attributes(records.document("vm_info_pending").find("TEMPLATE")):
            if tag not in dict(vm.template):
                vm.template.append((tag, str(vm.number) if tag == "VMID" else value))

    def _address(self, vm: FakeVm) -> None:
        """Put what a VM finds in its CONTEXT disk there."""
        for context in vm.vectors("CONTEXT"):
            recorded = {name: value for name, value in _recorded("CONTEXT").items() if name.startswith("ETH0_")}
            nic = vm.vectors("NIC")[0] if vm.vectors("NIC") else {}
            own = {"ETH0_IP": nic.get("IP", ""), "ETH0_MAC": nic.get("MAC", ""), "DISK_ID": "1", "TARGET": "hda"}
            context.update(recorded | own if context.get("NETWORK") == "YES" else own)

    async def _live(self, vm: FakeVm) -> None:
        """Take a VM through 1/0, 3/1, 3/2 to 3/3; or to 3/36, as in vm_info_boot_failure."""
        await SYSTEM_CLOCK.sleep(self.schedule_s)
        if vm.waits_for:
            vm.user_template["SCHED_MESSAGE"] = vm.waits_for
            return
        if vm.state != PENDING:
            return
        vm.deployed = True
        vm.move(PROLOG)
        if self.prolog_s:
            await SYSTEM_CLOCK.sleep(self.prolog_s)
        vm.move(BOOT)
        if self.deploy_fails:
            self.deploy_fails -= 1
            vm.user_template["ERROR"] = f"Mon Nov 23 05:31:22 2026: DEPLOY: node1:{vm.name}:dummy"
            vm.move(BOOT_FAILURE)
            return
        if self.on_boot is not None and vm.boots:
            address = await self.on_boot(vm.number, vm.context)
            for nic in vm.vectors("NIC")[:1] if address else ():
                nic["IP"] = str(address)
                self._address(vm)
        vm.move(RUNNING)

    def vm_info(self, user: User, _: Fault | None, number: int, _decrypt: bool = False) -> str:
        """As in vm_info_*, err_no_vm."""
        return self._document(self._vm(user, number))

    def _vm(self, user: User, number: int) -> FakeVm:
        vm = self.vms.get(number)
        if vm is None:
            raise _Failure(f"Error getting virtual machine [{number}].", NO_EXISTS, number)
        if vm.owner is not user and user.uid != 0:
            raise _Failure(f"User [{user.uid}] : Not authorized to perform USE VM [{number}].", AUTHORIZATION)
        return vm

    def _document(self, vm: FakeVm) -> str:
        tags = list(vm.user_template.items())
        return records.vm(self._fields(vm), vm.template, tags, self._history(vm))

    def _fields(self, vm: FakeVm) -> dict[str, str | int]:
        state, lcm = vm.state
        fields = _fields("vm_info_done" if vm.state == DONE else "vm_info_running")
        who: dict[str, str | int] = {"ID": vm.number, "UID": vm.owner.uid, "UNAME": vm.owner.name, "NAME": vm.name}
        deploy_id = f"node1:{vm.name}:dummy" if vm.deployed else ""
        states: dict[str, str | int] = {"STATE": state, "LCM_STATE": lcm, "PREV_STATE": state, "PREV_LCM_STATE": lcm}
        return fields | who | states | {"DEPLOY_ID": deploy_id}

    def _history(self, vm: FakeVm) -> list[dict[str, str | int]]:
        if not vm.deployed:
            return []
        recorded = records.document("vm_info_running").find("HISTORY_RECORDS/HISTORY")
        assert recorded is not None
        return [{part.tag: part.text or "" for part in recorded} | {"OID": vm.number}]

    def _pool(self, user: User, flag: int, state: int) -> list[FakeVm]:
        """-3: the user's own, -1: and the group's, -2: all that may be seen; any state but DONE, or any."""
        assert flag in (-1, -2, -3), flag
        assert state in (-1, -2), state
        return [
            vm
            for vm in self.vms.values()
            if (vm.owner is user or (flag == -2 and user.uid == 0)) and (state == -2 or vm.state != DONE)
        ]

    def vmpool_info(self, user: User, _: Fault | None, flag: int, _start: int, _end: int, state: int, *__: str) -> str:
        """As in vmpool_info; before 5.8 as in vmpool_infoextended (`VirtualMachinePool` of that version)."""
        found = self._pool(user, flag, state)
        if self.numbers < (5, 8):
            return records.pool("VM_POOL", map(self._document, found))
        short = (records.short_vm(self._fields(vm), vm.template, self._history(vm)) for vm in found)
        return records.pool("VM_POOL", short)

    def vmpool_infoextended(
        self, user: User, _: Fault | None, flag: int, _start: int, _end: int, state: int, *__: str
    ) -> str:
        """As in vmpool_infoextended."""
        return records.pool("VM_POOL", map(self._document, self._pool(user, flag, state)))

    def vm_action(self, user: User, _: Fault | None, action: str, number: int) -> int:
        """As in vm_action_terminate, err_terminate_done, err_bad_action, err_wrong_state, err_locked."""
        if action != "terminate-hard":
            raise _Failure(f'Action "{action}" is not supported', ACTION)
        vm = self._vm(user, number)
        if vm.locked:
            raise _Failure(f"User [{user.uid}] : VM is locked. [{number}].", AUTHORIZATION)
        if vm.state in (RUNNING, UNKNOWN, POWEROFF, BOOT_FAILURE):
            self._terminate(vm)
        elif vm.state == PENDING:
            self._done(vm)
        elif vm.state != DONE:  # DispatchManager::terminate
            trouble = f"Could not terminate VM {number}, wrong state {STATE_NAMES[vm.state]}."
            raise _Failure(f'Error performing action "{action}": {trouble}', ACTION)
        return number

    def _terminate(self, vm: FakeVm) -> None:
        if not self.end_s and not self.cancel_fails:
            self._done(vm)
            return
        vm.move(SHUTDOWN)
        self._background.start(f"end of VM {vm.number}", self._end(vm))

    async def _end(self, vm: FakeVm) -> None:
        await SYSTEM_CLOCK.sleep(self.end_s)
        if self.cancel_fails:
            self.cancel_fails -= 1
            vm.user_template["ERROR"] = f"Mon Nov 23 05:31:22 2026: CANCEL: {vm.number} node1:{vm.name}:dummy"
            vm.move(RUNNING)
            return
        vm.move(EPILOG)
        await SYSTEM_CLOCK.sleep(self.end_s)
        self._done(vm)

    def _done(self, vm: FakeVm) -> None:
        failed = vm.state == BOOT_FAILURE  # VirtualMachine::release_disk_images
        vm.move(DONE)
        for image in self.images.values():
            if vm.number in image.vms:
                self._release(image, vm, failed=failed)
        if self.on_end is not None:
            self._background.start(f"on_end {vm.number}", self._tell_end(vm.number))

    async def _tell_end(self, number: int) -> None:
        if self.on_end is not None:
            await self.on_end(number)

    async def kill(self, number: int, state: tuple[int, int] = POWEROFF) -> None:
        """Let a VM end by itself: its host's monitor sees that, and says POWEROFF."""
        self.vms[number].move(state)
        if self.on_end is not None:
            await self.on_end(number)

    # -- disks ------------------------------------------------------------------------------------------------------

    def vm_attach(self, user: User, _: Fault | None, number: int, text: str) -> int:
        """As in vm_attach, err_attach_wrong_state; in 3/17 the disk is there already, and says ATTACH.

        DispatchManager::attach; images that cannot be had: ImageManager::acquire_image
        """
        vm = self._vm(user, number)
        if not vm.deployed:
            raise _Failure("VM is not running in any host", ACTION)
        if vm.state not in (RUNNING, POWEROFF):
            state = STATE_NAMES.get(vm.state, "FAILURE")
            raise _Failure(f"Could not attach a new disk to VM {number}, wrong state {state}.", ACTION)
        wished = dict(self._parse(text))["DISK"]
        assert isinstance(wished, dict)
        image = self.images.get(int(wished["IMAGE_ID"]))
        if image is None:
            raise _Failure(f"Image with ID: {wished['IMAGE_ID']} does not exist", ACTION)
        if image.state != READY:
            why = "it is locked" if image.state == LOCKED else "it is persistent and already in use"
            raise _Failure(f"Cannot acquire image {image.number}, {why}", ACTION)
        image.state, image.vms = USED_PERS, [number]
        self._background.start(f"attach {image.number}", self._attach(vm, image, dict(wished)))
        return number

    async def _attach(self, vm: FakeVm, image: FakeImage, wished: dict[str, str]) -> None:
        ids = {int(disk["DISK_ID"]) for name in ("DISK", "CONTEXT") for disk in vm.vectors(name)}
        targets = {disk["TARGET"] for disk in vm.vectors("DISK")}
        prefix = str(dict(image.template)["DEV_PREFIX"])
        disk = _recorded("DISK") | wished
        disk |= {"DISK_ID": str(max(ids) + 1), "IMAGE": image.name, "CLONE": "NO", "SAVE": "YES", "ATTACH": "YES"}
        disk["TARGET"] = next(t for t in (f"{prefix}{letter}" for letter in "abcdefgh") if t not in targets)
        before = vm.state
        vm.move(HOTPLUG)
        vm.template.append(("DISK", disk))
        await SYSTEM_CLOCK.sleep(self.hotplug_s)
        if self.attach_fails:
            self.attach_fails -= 1
            vm.user_template["ERROR"] = f"Mon Nov 23 05:31:22 2026: ATTACHDISK: {vm.name}:dummy"
            vm.template.remove(("DISK", disk))
            self._release(image, vm)
        else:
            del disk["ATTACH"]
        vm.move(before)

    def vm_detach(self, user: User, _: Fault | None, number: int, disk_id: int) -> int:
        """As in err_detach_nodisk; a success is as in vm_attach."""
        vm = self._vm(user, number)
        if vm.state not in (RUNNING, POWEROFF):
            state = STATE_NAMES.get(vm.state, "FAILURE")
            raise _Failure(f"Could not detach disk from VM {number}, wrong state {state}.", ACTION)
        disk = next((disk for disk in vm.vectors("DISK") if disk["DISK_ID"] == str(disk_id)), None)
        if disk is None:
            raise _Failure(f"Could not detach disk with DISK_ID {disk_id}, it does not exist.", ACTION)
        self._background.start(f"detach {disk['IMAGE_ID']}", self._detach(vm, disk))
        return number

    async def _detach(self, vm: FakeVm, disk: dict[str, str]) -> None:
        before = vm.state
        disk["ATTACH"] = "YES"
        vm.move(HOTPLUG if before == RUNNING else (3, 34))
        await SYSTEM_CLOCK.sleep(self.hotplug_s)
        vm.template.remove(("DISK", disk))
        self._release(self.images[int(disk["IMAGE_ID"])], vm)
        vm.move(before)

    def _release(self, image: FakeImage, vm: FakeVm, *, failed: bool = False) -> None:
        image.vms.remove(vm.number)
        image.state = ERROR if failed else READY

    # -- images -----------------------------------------------------------------------------------------------------

    async def image_allocate(self, user: User, fault: Fault | None, text: str, datastore: int, *_: bool) -> int:
        """As in image_allocate; the failures are of ImageAllocate::request_execute and ImagePool::allocate.

        Of a PATH the size is found out before the answer, and the file is copied after it.
        """
        wished = {tag: str(value) for tag, value in self._parse(text)}
        if datastore != 101:
            raise _Failure(f"Error getting datastore [{datastore}].", NO_EXISTS, datastore)
        size = await self._stat(wished)
        if self.datastore_full or fault is Fault.NO_DISK:
            raise _Failure("Not enough space in datastore", ACTION)
        for image in self.images.values():
            if image.owner is user and image.name == wished["NAME"]:
                why = f"NAME is already taken by IMAGE {image.number}."
                raise _Failure(f"Error allocating a new image. {why}", ALLOCATE)
        kind = {"OS": 0, "DATABLOCK": 2}[wished["TYPE"]]
        image = self._add_image(user, wished["NAME"], kind, size, persistent=wished["PERSISTENT"] == "YES")
        # Image::insert: since 6.0 whoever copies the file finds its format out, before it was the DRIVER that said it
        taken = {"NAME", "TYPE", "SIZE", "PERSISTENT", "PATH"}
        taken |= {"FORMAT", "DRIVER"} if self.numbers >= (6,) else set()
        image.template = [(tag, value) for tag, value in wished.items() if tag not in taken]
        image.state, image.path, image.format, image.source = LOCKED, wished.get("PATH", ""), "", ""
        self._background.start(f"make image {image.number}", self._fill(image))
        return image.number

    async def _stat(self, wished: Mapping[str, str]) -> int:
        """Find the size out, in MiB: ImageManager::stat_image, and `fs_size` of the datastore's driver (libfs.sh)."""
        path = wished.get("PATH")
        if path is None:
            return int(wished["SIZE"])
        content = await self._fetch(path)
        if not content:
            trouble = "Failed to get image head" if path.startswith("http") else "File not found"
            raise _Failure(f"Cannot parse image SIZE: {trouble}", INTERNAL)
        qcow2 = content[:4] == b"QFI\xfb"
        return -(-(int.from_bytes(content[24:32], "big") if qcow2 else len(content)) >> 20)

    async def _fetch(self, path: str) -> bytes:
        """Return a file of the front-end's, or of somebody's whom it can reach; empty if there is none."""
        if not path.startswith(("http://", "https://")):
            return Path(path).read_bytes() if Path(path).is_file() else b""
        try:
            async with aiohttp.ClientSession() as session, session.get(path) as answer:
                return await answer.read() if answer.ok else b""
        except aiohttp.ClientError:
            return b""

    def _add_image(self, user: User, name: str, kind: int, size: int, *, persistent: bool) -> FakeImage:
        number = next(self._image_numbers)
        self.images[number] = FakeImage(number, user, name, kind, size, persistent, [("DEV_PREFIX", "vd")])
        return self.images[number]

    async def _fill(self, image: FakeImage) -> None:
        """Make or copy an image: ImageManager::_mkfs and _cp, and `fs/cp` of the datastore's driver."""
        await SYSTEM_CLOCK.sleep(self.lock_s)
        copied = await self._fetch(image.path) if image.path else b"new"
        if image.state != LOCKED:
            return
        if self.copy_fails or not copied:
            self.copy_fails = max(0, self.copy_fails - 1)
            why = f"Error copying image in the datastore: Error copying {image.path} to /ds/{image.number}"
            image.template.append(("ERROR", f"Mon Nov 23 05:31:22 2026: {why}"))
            image.state = ERROR
            return
        image.state, image.source = READY, f"/ds/{image.number}"
        image.format = "qcow2" if copied[:4] == b"QFI\xfb" else "raw"

    def _image(self, user: User, number: int) -> FakeImage:
        image = self.images.get(number)
        if image is None:
            raise _Failure(f"Error getting image [{number}].", NO_EXISTS, number)
        if image.owner is not user and user.uid != 0:
            raise _Failure(f"User [{user.uid}] : Not authorized to perform USE IMAGE [{number}].", AUTHORIZATION)
        return image

    def image_info(self, user: User, _: Fault | None, number: int, _decrypt: bool = False) -> str:
        """As in imagepool_info, err_image_no_exists."""
        return self._image_document(self._image(user, number))

    def imagepool_info(self, user: User, _: Fault | None, flag: int, _start: int, _end: int) -> str:
        """As in imagepool_info."""
        assert flag in (-1, -2, -3), flag
        own = (image for image in self.images.values() if image.owner is user)
        return records.pool("IMAGE_POOL", map(self._image_document, own))

    def _image_document(self, image: FakeImage) -> str:
        (recorded,) = records.document("imagepool_info")
        fields: dict[str, str | int] = {part.tag: part.text or "" for part in recorded if not len(part)}
        who: dict[str, str | int] = {
            "ID": image.number,
            "UID": image.owner.uid,
            "UNAME": image.owner.name,
            "NAME": image.name,
        }
        kind: dict[str, str | int] = {"TYPE": image.type, "PERSISTENT": int(image.persistent), "SIZE": image.size}
        state: dict[str, str | int] = {"STATE": image.state, "PREV_STATE": image.state, "RUNNING_VMS": len(image.vms)}
        file: dict[str, str | int] = {"PATH": image.path, "FORMAT": image.format, "SOURCE": image.source}
        return records.image(fields | who | kind | state | file, image.vms, image.template)

    def image_delete(self, user: User, _: Fault | None, number: int, *__: bool) -> int:
        """As in err_image_delete_in_use; a success is as in image_allocate."""
        image = self._image(user, number)
        if image.state in (USED, USED_PERS):
            why = f"There are {len(image.vms)} VMs using it."
            raise _Failure(f"Cannot delete image. {why}", ACTION)
        image.state = DELETE
        if not image.source:  # ImageManager::delete_image: its datastore has nothing to remove
            del self.images[number]
            return number
        self._background.start(f"delete image {number}", self._forget(image))
        return number

    async def _forget(self, image: FakeImage) -> None:
        await SYSTEM_CLOCK.sleep(self.lock_s)
        del self.images[image.number]

    # -- the rest ---------------------------------------------------------------------------------------------------

    def system_version(self, _: User, __: Fault | None) -> str:
        """As in system_version."""
        return self.said or self.version

    def user_info(self, user: User, _: Fault | None, number: int, *__: bool) -> str:
        """As in user_info; quotas as `Quota::check_quota` makes them: each metric has its limit and what is USED."""
        assert number == -1, number
        recorded = records.document("user_info")
        fields = {part.tag: part.text or "" for part in recorded if not len(part)}
        used: dict[str, float] = {"VMS": self.used(user)}
        volumes = [image for image in self.images.values() if image.owner is user and image.type == 2]
        used |= {"IMAGES": len(volumes), "SIZE": sum(image.size for image in volumes)}
        quotas: list[tuple[str, Value]] = []
        for kind, limits in user.quotas:
            shown = {name: str(limit) for name, limit in limits.items()}
            shown |= {f"{name}_USED": str(used.get(name, 0)) for name in limits if name != "ID"}
            quotas.append((kind, shown))
        own = attributes(recorded.find("TEMPLATE"))
        return records.user(fields | {"ID": str(user.uid), "NAME": user.name}, own, quotas)

    def template_info(self, _: User, __: Fault | None, number: int, *___: bool) -> str:
        """As in template_info, err_no_template."""
        if number != 0:
            raise _Failure(f"Error getting virtual machine template [{number}].", NO_EXISTS, number)
        return str(records.value("template_info"))

    def vn_info(self, _: User, __: Fault | None, number: int, *___: bool) -> str:
        """As in vn_info; a network that is not there is as in err_image_no_exists."""
        if number not in (0, 2):
            raise _Failure(f"Error getting virtual network [{number}].", NO_EXISTS, number)
        recorded = str(records.value("vn_info"))
        state = f"<STATE><![CDATA[{self.network_state}]]></STATE>"
        sized = recorded.replace("<SIZE><![CDATA[250]]></SIZE>", f"<SIZE><![CDATA[{self.leases}]]></SIZE>")
        return sized.replace("<STATE><![CDATA[1]]></STATE>", state).replace("<ID>0</ID>", f"<ID>{number}</ID>", 1)

    def datastore_info(self, user: User, _: Fault | None, number: int, *__: bool) -> str:
        """As Datastore::to_xml writes it."""
        if number not in (100, 101):
            raise _Failure(f"Error getting datastore [{number}].", NO_EXISTS, number)
        head = records.plain(ID=number, UID=0, GID=0, UNAME="oneadmin", GNAME="oneadmin", NAME="dimg")
        mads = "".join(records.cdata(name, "dummy") for name in ("DS_MAD", "TM_MAD", "BASE_PATH"))
        kind = records.plain(TYPE=101 - number, DISK_TYPE=0, STATE=0)
        room = records.plain(TOTAL_MB=20480, FREE_MB=20480, USED_MB=0)
        clusters = "<CLUSTERS><ID>0</ID></CLUSTERS>"
        return f"<DATASTORE>{head}{records.PERMISSIONS}{mads}{kind}{clusters}{room}<IMAGES></IMAGES></DATASTORE>"

    def secgroup_allocate(self, user: User, _: Fault | None, text: str) -> int:
        """As SecurityGroupPool::allocate does it."""
        wished = self._parse(text)
        name = next(str(value) for tag, value in wished if tag == "NAME")
        for number, (_owner, taken, _rules) in self.groups.items():
            if name == taken:
                raise _Failure(f"NAME is already taken by SecurityGroup {number}.", INTERNAL)
        number = 100 + len(self.groups)
        self.groups[number] = (user, name, [(tag, value) for tag, value in wished if tag == "RULE"])
        return number

    def secgrouppool_info(self, _: User, __: Fault | None, flag: int, _start: int, _end: int) -> str:
        """As SecurityGroup::to_xml writes them."""
        assert flag == -3, flag
        return records.pool(
            "SECURITY_GROUP_POOL",
            (
                f"<SECURITY_GROUP>{records.plain(ID=number, UID=owner.uid, GID=0, UNAME=owner.name, NAME=name)}"
                f"{records.PERMISSIONS}{records.template('TEMPLATE', rules)}</SECURITY_GROUP>"
                for number, (owner, name, rules) in self.groups.items()
            ),
        )


def _recorded(name: str) -> dict[str, str]:
    """Return a vector of the VM in vm_info_pending."""
    found = dict(attributes(records.document("vm_info_pending").find("TEMPLATE")))[name]
    assert isinstance(found, dict)
    return dict(found)


def _fields(name: str) -> dict[str, str | int]:
    return {part.tag: part.text or "" for part in records.document(name) if not len(part)}


@dataclass(frozen=True)
class Method:
    """A call: the kinds of its parameters after the user's key, and since which version there are the optional ones."""

    handler: Callable[..., Any]
    needed: str = ""
    optional: str = ""
    optional_since: Version = (5, 4)
    since: Version = (5, 4)

    def optional_in(self, version: Version) -> str:
        return self.optional if version >= self.optional_since else ""


_F = FakeOpenNebula
METHODS: dict[str, Method] = {
    "one.system.version": Method(_F.system_version),
    "one.user.info": Method(_F.user_info, "i", "b", (6, 0)),
    "one.template.info": Method(_F.template_info, "i", "bb"),
    "one.template.instantiate": Method(_F.instantiate, "is", "bsb"),
    "one.vn.info": Method(_F.vn_info, "i", "b", (5, 10)),
    "one.datastore.info": Method(_F.datastore_info, "i", "b", (5, 10)),
    "one.vm.allocate": Method(_F.allocate, "s", "b"),
    "one.vm.info": Method(_F.vm_info, "i", "b", (5, 10)),
    "one.vm.action": Method(_F.vm_action, "si"),
    "one.vm.attach": Method(_F.vm_attach, "is"),
    "one.vm.detach": Method(_F.vm_detach, "ii"),
    "one.vmpool.info": Method(_F.vmpool_info, "iiii", "s", (5, 8)),
    "one.vmpool.infoextended": Method(_F.vmpool_infoextended, "iiii", "s", since=(5, 8, 5)),
    "one.image.allocate": Method(_F.image_allocate, "si", "b", (5, 6)),
    "one.image.info": Method(_F.image_info, "i", "b", (5, 10)),
    "one.image.delete": Method(_F.image_delete, "i", "b", (6, 6)),
    "one.imagepool.info": Method(_F.imagepool_info, "iii"),
    "one.secgroup.allocate": Method(_F.secgroup_allocate, "s"),
    "one.secgrouppool.info": Method(_F.secgrouppool_info, "iii"),
}

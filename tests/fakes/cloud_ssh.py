"""An account at the ssh cloud: real SSH servers, each the only door to a "host" that is a folder of the test's.

Every session passes a wrapper, which gives it the host's own PATH (with an `apt-get`, `dpkg-query` and `systemctl`
that only write down what they are told) and, on a bad day, does what the test has laid down. Unless a test wants a
Python of its own for each call, it is a fork of one that has started already: see `_ssh_python`.
"""

import getpass
import json
import os
import random
import secrets
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import asyncssh
import pytest

from conpaas.cloud import _ssh_host, ssh
from conpaas.cloud._ssh_connection import Connections
from conpaas.cloud._ssh_driver import SshCloud
from conpaas.core import files, run
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.cloud import Cloud, CloudContext
from tests.fakes import _ssh_python
from tests.fakes.clouds import Fault, request
from tests.fakes.waiting import until

SLEEPER = ("/bin/sleep", "1000")
SSHD = Path("/usr/sbin/sshd")
HOST_VERBS = {"create": "lease", "describe": "look", "list": "look", "quota": "look", "examine": "check"}
_HOST = frozenset({Fault.LOST_ANSWER, Fault.LATE, Fault.HANG, Fault.GARBAGE, Fault.UNREACHABLE})
"""What can go wrong with one host."""
_SILENT = {Fault.LATE.value, Fault.HANG.value}
PATIENT_S, IMPATIENT_S = 40.0, 3.0
"""Deadlines of a call: of one that meets what only a deadline ends, the host must have begun with it by then."""
FAULTS: Mapping[str, frozenset[Fault]] = MappingProxyType(
    {
        "create": _HOST | {Fault.NO_CAPACITY, Fault.CREDENTIALS, Fault.NEVER_BOOTS, Fault.NO_DISK},
        **dict.fromkeys(("describe", "list", "delete"), _HOST | {Fault.CREDENTIALS}),
        **dict.fromkeys(("console", "quota"), frozenset({Fault.CREDENTIALS, Fault.GARBAGE})),
        "examine": frozenset({Fault.GARBAGE, Fault.UNREACHABLE}),
        "sizes": frozenset({Fault.CREDENTIALS}),
    }
)
WORDS: Mapping[Fault, str] = MappingProxyType(
    {
        Fault.CREDENTIALS: "Permission denied",
        Fault.GARBAGE: "Welcome to Rubbish",
        Fault.NO_DISK: "No space left",
    }
)
_TOKEN = secrets.token_hex()
_KEY = asyncssh.generate_private_key("ssh-ed25519")
SECRETS = (_KEY.export_private_key().decode(), _KEY.export_private_key().decode().splitlines()[2])

_WRAPPER = """#!/bin/bash
# Runs what the client asks for, as this host; HOST is the host's folder, the last word of a command is its verb.
HOST={host}
PATH=$HOST/bin:/usr/sbin:/usr/bin:/sbin:/bin
HOME=$HOST
export HOST PATH HOME
cd "$HOST" || exit 1
obey() {{
    case $SSH_ORIGINAL_COMMAND in
        "python3 -I -c "*" upload") ;;  # it reads to the end, of which the other Python would not hear
        "python3 -I -c "*) [ {python} ] && {{ forked; return; }} ;;
    esac
    sh -c "$SSH_ORIGINAL_COMMAND"
}}
forked() {{
    exec 3<>/dev/tcp/{python} 4<&0
    printf '%s\\n' {token} "$HOST" "$SSH_ORIGINAL_COMMAND" >&3
    cat <&4 >&3 &
    exec 4<&-
    cat <&3
}}
fault=
for laid in {faults}/"${{SSH_ORIGINAL_COMMAND##* }}".*; do
    [ -e "$laid" ] || continue
    taken={faults}/taken.$$
    if mv "$laid" "$taken" 2>/dev/null; then
        fault=$(cat "$taken")
        rm "$taken"
        break
    fi
done
case $SSH_ORIGINAL_COMMAND in
    *" lease" | *" check") if [ -p os-release ]; then cp os-release.good good.$$; mv good.$$ os-release; fi ;;
esac
case $fault in
    "lost answer") obey >/dev/null; kill -9 $PPID ;;
    "late answer") answer=$(obey); sleep {late_s}; echo "$answer" ;;
    hang) exec sleep 1000 ;;
    garbage) head -c 1 >/dev/null; echo "Welcome to Rubbish 1.0"; exit 0 ;;
    unreachable) head -c 1 >/dev/null; kill -9 $PPID ;;  # not before the client knows that it has begun
    "never boots") rm os-release; mkfifo os-release; obey ;;  # a preparation stops there, until the next lease
    "no capacity")
        head -c 1 >/dev/null
        echo 'conpaas-answer {{"taken": true, "ours": false, "cores": 1, "memory": 1, "disk": 1}}' ;;
    "no disk")
        mkdir -p "$HOST/node"
        unshare {user_namespace} sh -c 'mount -t tmpfs -o size=4k none "$HOST/node"
            head -c 4096 /dev/zero > "$HOST/node/full"; exec sh -c "$SSH_ORIGINAL_COMMAND"'
        rmdir "$HOST/node" ;;
    *) obey ;;
esac
"""

_TOOLS = {
    "apt-get": """#!/bin/sh
# Writes down what it is told, and whether servers would start; `install` and `purge` change the list of packages.
if [ -e "$HOST/policy-rc.d" ]; then starts=no; else starts=yes; fi
echo "$* | DEBIAN_FRONTEND=$DEBIAN_FRONTEND starts=$starts" >>"$HOST/apt.log"
if [ -e "$HOST/apt-fails" ]; then cat "$HOST/apt-fails" >&2; exit 100; fi
mode=
for word; do
    case $word in
        install|purge|update) mode=$word ;;
        -*|*::*) ;;
        *) case $mode in
            install) echo "$word" >>"$HOST/packages"; echo "lib$word" >>"$HOST/packages" ;;
            purge) sed -i "/^$word\\$/d" "$HOST/packages" ;;
        esac ;;
    esac
done
while [ -e "$HOST/apt-waits" ]; do sleep 0.02; done
""",
    "dpkg-query": """#!/bin/sh
while read -r package; do echo "$package installed"; done <"$HOST/packages"
""",
    "dpkg": """#!/bin/sh
echo "$*" >>"$HOST/dpkg.log"
""",
    "systemctl": """#!/bin/sh
# Starts the units that it is told to, and ends them; nothing else.
echo "$*" >>"$HOST/systemctl.log"
for unit; do :; done
case $1 in
    enable)
        command=$(sed -n 's/^ExecStart=//p' "$HOST/units/$unit")
        setsid $command </dev/null >>"$HOST/unit.log" 2>&1 & echo $! >"$HOST/unit.pid" ;;
    disable) [ ! -e "$HOST/unit.pid" ] || kill "$(cat "$HOST/unit.pid")" ;;
esac
exit 0
""",
}


class SshServer:
    """One host: a folder, an address and an SSH server."""

    def __init__(self, folder: Path, faults: Path, late_s: float, python: str) -> None:
        self.folder, self.node = folder, folder / "node"
        self.address, self.port = _free_place()
        self.pid = 0
        self._lay_out(faults, late_s, python)

    def _lay_out(self, faults: Path, late_s: float, python: str) -> None:
        for path in (self.folder, self.folder / "bin", self.folder / "units"):
            path.mkdir(parents=True)
        key = asyncssh.generate_private_key("ssh-ed25519")
        self.host_key = key.export_public_key().decode().strip()
        self._file("host_key", key.export_private_key(), 0o600)
        for name, text in _TOOLS.items():
            self._file(f"bin/{name}", text.encode(), 0o755)
        (self.folder / "bin" / "python3").symlink_to(Path(sys.executable).resolve())
        self._file("packages", b"base-files\n")
        for name in ("os-release", "os-release.good"):
            self._file(name, b'ID=debian\nPRETTY_NAME="Debian GNU/Linux 12 (test)"\n')
        words = {
            "host": self.folder,
            "faults": faults,
            "late_s": late_s,
            "python": python,
            "token": _TOKEN,
            "user_namespace": "-m" if os.geteuid() == 0 else "-rm",
        }
        self._file("wrapper", _WRAPPER.format(**words).encode(), 0o700)
        lines = [
            f"ListenAddress {self.address}:{self.port}",
            f"HostKey {self.folder}/host_key",
            f"AuthorizedKeysFile {faults.parent}/authorized_keys",
            f"ForceCommand {self.folder}/wrapper",
            "AuthenticationMethods publickey",
            "UsePAM no",
            "StrictModes no",
            "PidFile none",
            "UseDNS no",
            "PrintMotd no",
            "MaxStartups 100",
            "PermitRootLogin yes",
            "SetEnv SHLVL=9",  # else bash would read the start files of whoever runs the tests
        ]
        self._file("sshd_config", "\n".join([*lines, ""]).encode())

    def _file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        path = self.folder / name
        path.write_bytes(content)
        path.chmod(mode)

    async def start(self) -> None:
        argv = ["setpriv", "--pdeathsig", "KILL", str(SSHD), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        self.pid = run.spawn(argv, cwd=self.folder, env={}, log=self.folder / "sshd.log")
        try:
            await until(self._listens)
        except TimeoutError:
            pytest.fail((self.folder / "sshd.log").read_text())

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((self.address, self.port)) == 0

    def drop_sessions(self) -> None:
        """Break every connection."""
        for pid in _descendants(self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Break every connection, and listen no more."""
        if self.pid:
            self.drop_sessions()
            run.signal_group(self.pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.pid = 0

    def settings(self) -> dict[str, Any]:
        return {
            "address": self.address,
            "port": self.port,
            "user": getpass.getuser(),
            "host_key": self.host_key,
            "directory": str(self.node),
            "unit_directory": str(self.folder / "units"),
            "policy_file": str(self.folder / "policy-rc.d"),
            "os_release": str(self.folder / "os-release"),
        }

    def lease(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.node / "lease.json").read_text())
        return found

    def processes(self) -> list[int]:
        """Return the processes of this host's instance: whatever runs below its folder."""
        return _below(self.node)

    def running(self, program: str) -> list[int]:
        """Return those processes of this host's instance that run a program."""
        return [pid for pid in self.processes() if f" {program}\0" in _words(pid)]

    def is_dead(self) -> bool:
        """Kill the instance, also what a preparation under way has just started; tell whether nothing was left."""
        return _killed(self.processes()) and not _ssh_host._is_locked(self.node / "supervisor")

    def is_over(self) -> bool:
        """Kill all of the host, also who has yet to begin with the instance; tell whether nothing was left."""
        return _killed(_below(self.folder))

    def text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""


class SshHarness:
    """Hosts whose daemon is `sleep`, or what the test says."""

    quota = 3

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self._faults = directory / "faults"
        self._faults.mkdir()
        self.deadline_s = PATIENT_S
        self._authorize()
        self._under_way: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._full: Counter[str] = Counter()
        count = settings.pop("count", self.quota)
        folders = [directory / f"host-{number}" for number in range(count)]
        self._python = 0
        python = "" if settings.pop("own_pythons", False) else self._start_python()
        self.hosts = [SshServer(folder, self._faults, 2 * IMPATIENT_S, python) for folder in folders]
        self._settings = settings
        self._foreign: list[str] = []
        self._drivers = 0

    def _start_python(self) -> str:
        """Start the Python that hosts' calls are forks of; return where it listens, as bash names it."""
        with socket.create_server(_free_place(), backlog=100) as server:
            python = Path(sys.executable).resolve()  # one that has no library of ours
            argv = [str(python), "-I", _ssh_python.__file__, str(server.fileno()), _ssh_host.__file__]
            self._python = run.spawn(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                cwd=self.directory,
                env={"TOKEN": _TOKEN},
                log=self.directory / "python.log",
                pass_fds=(server.fileno(),),
            )
            return "{}/{}".format(*server.getsockname())

    def _stop_python(self) -> None:
        if self._python:
            for pid in (*_descendants(self._python), self._python):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(self._python, 0)
            self._python = 0

    def _authorize(self) -> None:
        _put(self.directory / "authorized_keys", _KEY.export_public_key().decode())

    def settings(self, **changes: Any) -> ssh.SshSettings:
        words = {
            "hosts": [host.settings() for host in self.hosts],
            "key": _KEY.export_private_key().decode(),
            "as_root": os.geteuid() == 0,
            "systemd": "no",
            "disk_mib": 0,
            "memory_mib": 1,
            "connect_s": PATIENT_S,
            "command": SLEEPER,
        }
        return ssh.SshSettings.model_validate({**words, **self._settings, **changes})

    def open(self, deployment: str = "dep-ours", **changes: Any) -> Cloud:
        self._drivers += 1
        context = CloudContext(
            name="ssh",
            deployment=deployment,
            directory=self.directory / "drivers",
            clock=SYSTEM_CLOCK,
            deadline_s=self.deadline_s,
        )
        driver = ssh.CLOUD.open(self.settings(**changes), context)
        assert isinstance(driver, SshCloud)
        driver._connections.call = self._impatient(driver._connections)  # type: ignore[method-assign, assignment]
        for verb in FAULTS:
            setattr(driver, verb, self._refusing(verb, getattr(driver, verb)))
        return driver

    def _impatient(self, connections: Connections) -> Callable[..., Awaitable[Any]]:
        """Let no call wait long for an answer that will not come, and those that are only slow have their time."""
        call = connections.call

        async def made(host: ssh.SshHost, verb: str, **words: Any) -> Any:
            laid = {_text(path) for path in self._faults.glob(f"{verb}.*")}
            connections._deadline_s = min(self.deadline_s, IMPATIENT_S) if laid & _SILENT else self.deadline_s
            self._under_way[verb] += 1
            try:
                return await call(host, verb, **words)
            finally:
                self._under_way[verb] -= 1

        return made

    def _refusing(self, verb: str, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """Let the hosts know nobody's key while a call is made that is to be refused."""

        async def made(*words: Any) -> Any:
            if self._full[verb]:
                self._full[verb] -= 1
                self._lay(verb, Fault.NO_DISK, len(self.hosts))
                try:
                    return await call(*words)
                finally:
                    for path in self._laid(verb):
                        path.unlink(missing_ok=True)
            if not self._refused[verb]:
                before = self._laid(verb)
                try:
                    return await call(*words)
                finally:
                    meets = self._under_way[HOST_VERBS.get(verb, verb)]  # also when it was cancelled
                    if before and not meets and self._laid(verb) == before:  # it ended before it came to it
                        before[0].unlink(missing_ok=True)
            self._refused[verb] -= 1
            _put(self.directory / "authorized_keys", "")
            for host in self.hosts:
                host.drop_sessions()
            try:
                return await call(*words)
            finally:
                self._authorize()

        return made

    async def fail(self, verb: str, fault: Fault, times: int = 1) -> None:
        match fault:
            case Fault.CREDENTIALS:
                self._refused[verb] += times
            case Fault.NO_DISK:
                self._full[verb] += times
            case Fault.NO_CAPACITY:
                self._lay(verb, fault, times * len(self.hosts))
            case _:
                self._lay(verb, fault, times)

    def _laid(self, verb: str) -> list[Path]:
        return sorted(self._faults.glob(f"{HOST_VERBS.get(verb, verb)}.*"))

    def _lay(self, verb: str, fault: Fault, times: int) -> None:
        for _ in range(times):
            _put(self._faults / f"{HOST_VERBS.get(verb, verb)}.{random.getrandbits(64)}", fault.value)

    def host(self, vm: str) -> SshServer:
        """Return the host that carries an instance, anybody's."""
        name = vm.rpartition("@")[2]
        return next(host for host in self.hosts if name == f"{host.address}:{host.port}")

    async def kill(self, vm: str) -> None:
        await until(self.host(vm).is_dead)

    async def make_foreign(self) -> str:
        driver = self.open("dep-theirs")
        vm = await driver.create(request("i-theirs"))
        await driver.close()
        self._foreign.append(vm.id)
        await until(lambda: self.host(vm.id).processes())
        return vm.id

    async def lives(self, vm: str) -> bool:
        return bool(self.host(vm).processes())

    async def leftovers(self) -> list[str]:
        """Return files, units and processes of our instances."""
        foreign = [self.host(vm) for vm in self._foreign]
        ours = [host for host in self.hosts if host not in foreign]
        files = [str(path) for host in ours for path in (host.node, host.folder / "policy-rc.d") if path.exists()]
        units = [str(path) for host in ours for path in (host.folder / "units").iterdir()]
        return [*files, *units, *(f"process {pid}" for host in ours for pid in host.processes())]

    async def close(self) -> None:
        for host in self.hosts:
            host.stop()
        self._stop_python()
        for host in self.hosts:
            await until(host.is_over)


def _free_place() -> tuple[str, int]:
    """Return an address of the test's own, and a port that is free there."""
    address = f"127.{random.randrange(150, 250)}.{random.randrange(250)}.{random.randrange(2, 250)}"
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


def _put(path: Path, text: str) -> None:
    """Write a file that others may be reading, or taking away."""
    files.write_atomically(path, text, durable=False)


def _text(path: Path) -> str:
    """Return what a file says; nothing if it was taken away."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _all_processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[1-9]*")]


def _below(folder: Path) -> list[int]:
    return [pid for pid in _all_processes() if str(folder) in _words(pid)]


def _killed(pids: list[int]) -> bool:
    """Kill processes; tell whether there were none."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return not pids


def _words(pid: int) -> str:
    """Return where a process is and what it was called with; nothing if it has ended."""
    process = Path(f"/proc/{pid}")
    try:
        return f"{(process / 'cwd').readlink()} {(process / 'cmdline').read_text(errors='replace')}"
    except OSError:
        return ""


def _descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for one in _all_processes():
        with suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text(errors="replace").rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(one)
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


@asynccontextmanager
async def harness(_directory: Path, **settings: Any) -> AsyncIterator[SshHarness]:
    if not SSHD.exists():
        pytest.fail("the tests of the ssh cloud need an SSH server: apt-get install openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd of root asks for it
    with tempfile.TemporaryDirectory(prefix="conpaas-ssh-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o711)  # unlike a test's own one: daemons run as users of their own
        account = SshHarness(Path(folder), **settings)
        try:
            for host in account.hosts:
                await host.start()
            yield account
        finally:
            await account.close()

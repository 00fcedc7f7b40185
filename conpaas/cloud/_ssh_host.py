"""The host's half of the ssh driver: sent to a host with each call, and run there by the host's own Python.

Standard library alone, and written so that Python 3.9 reads it: a host that is too old must be able to say so. All
that is known of an instance is on its host, below the configured folder:

    lease.json      who has the host, what is to be made of it, whether it is given back; made first, removed last
    state.json      how far that is: stage, error, and what must be undone
    worker          locked by whoever prepares or undoes
    supervisor      locked by the process that keeps the daemon running, whose id it holds
    host.py         this program, for the supervisor
    home/           the daemon's own folder: context.json, versions/, what its engines write
    log/            what preparation and daemon have printed

Called as `VERB` with one JSON line on standard input, then the verb's payload. It answers with one line: ANSWER and
JSON, with `error` and `message` if it failed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess  # noqa: TID251 - it runs where nothing of ours is
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

ANSWER = "conpaas-answer "
MARKER = "CONPAAS_NODE"
CONSOLE_BYTES = 64 * 1024
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SOURCE = globals().get("SOURCE", b"")
"""This program; what runs it sets it."""

_BUNDLE, _LEASE, _STATE, _PACKAGES, _PROGRAM = "bundle.tar.gz", "lease.json", "state.json", "packages.json", "host.py"
_WORKER, _SUPERVISOR = "worker", "supervisor"
_START_S, _KILL_S, _TOOL_S, _APT_S = 20.0, 20.0, 60.0, 1800.0
_POLL_S = 0.02
_RESTART_FIRST_S, _RESTART_LAST_S, _STEADY_S, _STOP_S = 0.1, 10.0, 10.0, 10.0
_LOG_BYTES, _LOG_CHECK_S = 4 * 1024 * 1024, 60.0
_BOOT_S = 180.0  # a machine that started this long ago may not have come to our unit yet
_PR_SET_CHILD_SUBREAPER = 36

_NOTHING_MADE = {"stage": "", "done": 0, "undo": [], "error": "", "unit": "", "installed": [], "worker": None}

Json = dict[str, Any]


class HostError(Exception):
    """Something that the driver is to know: `code` says of what kind."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


# -- leases ---------------------------------------------------------------------------------------------------------


def lease(base: Path, asked: Json) -> Json:
    """Take the host for the instance of `spec`, unless somebody has it; return who has it then.

    The same token of the same deployment finds what it has made.
    """
    spec = asked["spec"]
    with _alone(base, make=True):
        have = _read(base / _LEASE)
        if have is None:
            try:
                _check_disk(base, spec)
                have = {**spec, "nonce": secrets.token_hex(8), "boot": _boot(), "ending": False}
                _write(base / _LEASE, have)
            except BaseException:
                _remove_folder(base)
                raise
    if (have["token"], have["deployment"]) == (spec["token"], spec["deployment"]) and _needs(base, have) == "prepare":
        with contextlib.suppress(OSError):  # no room for a process; it is leased, and whoever looks goes on
            _detach(base, _prepare, have["nonce"])
    return _view(base, have, spec["deployment"])


def look(base: Path, asked: Json) -> Json:
    """Return who has the host, as far as a deployment may know, and how its instance is."""
    have = _read(base / _LEASE)
    return {"taken": False, **_facts()} if have is None else _view(base, have, asked["deployment"])


def _view(base: Path, have: Json, deployment: str) -> Json:
    if have["deployment"] != deployment:
        return {"taken": True, "ours": False, **_facts()}
    state, reason = _state(base, have)
    needs = _needs(base, have) if state in {"PENDING", "GONE"} else ""
    told = {key: have[key] for key in ("token", "address")}
    return {"taken": True, "ours": True, "state": state, "reason": reason, "needs": needs, **told, **_facts()}


def _state(base: Path, have: Json) -> tuple[str, str]:
    """Return the state of an instance, as the driver's contract names it, and why."""
    made = _read(base / _STATE) or {}
    if have["ending"]:
        return "GONE", made.get("error", "")
    if made.get("error"):
        return "FAILED", made["error"]
    if made.get("stage") != "started":
        return "PENDING", made.get("stage", "waiting for ConPaaS to be copied")
    if _is_locked(base / _SUPERVISOR):
        return "RUNNING", ""
    if _boot() == have["boot"]:
        return "FAILED", "the supervisor of its daemon has ended"
    if made.get("unit") and time.monotonic() < _BOOT_S:  # which on Linux counts from the boot
        return "PENDING", "the machine has just been started again"
    return "FAILED", "the machine was started again"


def _needs(base: Path, have: Json) -> str:
    """Say what must come from outside for the instance to go on: `undo`, `bundle`, `prepare`; empty: nothing."""
    if _is_locked(base / _WORKER):
        return ""
    if have["ending"]:
        return "undo"
    unpacked = base / "home" / "versions" / have["bundle"]
    return "prepare" if not have["bundle"] or (base / _BUNDLE).exists() or unpacked.exists() else "bundle"


def _find(base: Path, asked: Json) -> Json | None:
    """Return the lease that a call is about, None if it is not there (any more)."""
    have = _read(base / _LEASE)
    if have is None or (have["token"], have["deployment"]) != (asked["token"], asked["deployment"]):
        return None
    return have


def _facts() -> Json:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cores": os.cpu_count() or 1, "memory": memory, "disk": shutil.disk_usage("/").total}


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


@contextlib.contextmanager
def _alone(base: Path, make: bool = False) -> Iterator[bool]:
    """Keep every other call from the lease; gives whether there is a folder at all."""
    while True:
        if make:
            base.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            folder = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            yield False
            return
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            if base.exists() and os.path.samestat(os.fstat(folder), base.stat()):  # not removed while we waited
                yield True
                return
        finally:
            os.close(folder)


def _is_locked(path: Path) -> bool:
    """Tell whether a living process holds the lock of a file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _read(path: Path) -> Json | None:
    try:
        document: Json = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return document


def _write(path: Path, document: Json) -> None:
    """Write a document, whole, for nobody else to read."""
    fresh = path.with_name(".new-" + path.name)
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        _remove(fresh)
        raise


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _remove_folder(path: Path) -> None:
    """Remove a folder, unless others keep something in it."""
    with contextlib.suppress(FileNotFoundError):
        try:
            path.rmdir()
        except OSError as exc:
            if exc.errno not in {errno.ENOTEMPTY, errno.EBUSY}:
                raise


# -- what an instance needs -----------------------------------------------------------------------------------------


def check(base: Path, asked: Json) -> Json:
    """Look at all that an instance will need; return the findings."""
    spec = {**asked["spec"], "ports": [] if (base / _LEASE).exists() else asked["spec"]["ports"]}
    return {"findings": list(_findings(base, spec)), **look(base, asked)}


def _findings(base: Path, spec: Json) -> Iterator[Json]:
    yield _system(Path(spec["os_release"]))
    yield _python(spec["manifest"])
    if spec["as_root"]:
        hint = "log in as root or as a user with passwordless sudo, or set 'as_root' of this cloud to false"
        yield _finding("root's rights", os.geteuid() == 0, f"the user id is {os.geteuid()}", hint)
        closed = [str(path) for path in base.parents if path.exists() and not path.stat().st_mode & 0o001]
        hint = "choose a 'directory' that every user may enter: the daemon runs as a user of its own"
        yield _finding("folder", not closed, f"closed to others: {', '.join(closed)}" if closed else str(base), hint)
    place = next(path for path in (base, *base.parents) if path.exists())
    free = shutil.disk_usage(place).free
    yield _finding("disk", free >= spec["disk_bytes"], f"{free >> 20} MiB are free at {place}", "free some space there")
    memory = _available()
    yield _finding("memory", memory >= spec["memory_bytes"], f"{memory >> 20} MiB are free", "end what else runs there")
    for address, port in spec["ports"]:
        trouble = _cannot_listen(address, port)
        yield _finding(f"port {port}", not trouble, trouble or "free", "end what uses it, or set the host's 'listen'")
    late_s = time.time() - spec["now"]
    detail = f"{late_s:+.0f} s from the director's"
    yield _finding("clock", abs(late_s) < 60, detail, "set the clock: certificates are valid by it")


def _finding(name: str, ok: bool, detail: str, hint: str) -> Json:
    return {"name": name, "ok": ok, "detail": detail, "hint": "" if ok else hint}


def _system(release: Path) -> Json:
    words = {}
    with contextlib.suppress(FileNotFoundError):
        for line in release.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition("=")
            words[key] = value.strip("\"'")
    known = {"debian", "ubuntu"} & {words.get("ID", ""), *words.get("ID_LIKE", "").split()}
    detail = words.get("PRETTY_NAME", f"{release} does not say")
    return _finding("operating system", bool(known), detail, "ConPaaS prepares Debian and Ubuntu")


def _python(manifest: Json | None) -> Json:
    have = f"{sys.executable} {platform.python_version()}, {platform.machine()}, {' '.join(platform.libc_ver())}"
    hint = ""
    if sys.version_info < (3, 11):  # noqa: UP036 - the host's, not the director's
        hint = "install Python 3.11 or newer and name it as the host's 'python'"
    elif manifest is None:
        pass  # nothing of ours is to run on it
    elif (manifest["python"], manifest["machine"]) != (sys.implementation.cache_tag, platform.machine()):
        hint = f"the director's libraries are for {manifest['python']} on {manifest['machine']}: use the same release"
    elif _numbers(platform.libc_ver()[1]) < _numbers(manifest["glibc"]):
        hint = f"the director's libraries need glibc {manifest['glibc']}: use a newer release"
    return _finding("Python", not hint, have, hint)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def _available() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _cannot_listen(address: str, port: int) -> str:
    """Say why nobody can listen there; empty if somebody could."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as exc:
            return f"{address}: {exc.strerror}"
    return ""


def _check_disk(base: Path, spec: Json) -> None:
    free = shutil.disk_usage(base).free
    if free < spec["disk_bytes"]:
        raise HostError("disk-full", f"{free >> 20} MiB are free, {spec['disk_bytes'] >> 20} MiB are needed")


# -- preparing ------------------------------------------------------------------------------------------------------


def upload(base: Path, asked: Json) -> Json:
    """Take the bundle from the rest of the input, and go on."""
    if _find(base, asked) is None:
        return {}
    digest, fresh = hashlib.sha256(), base / f".new-{secrets.token_hex(4)}"
    try:
        with fresh.open("wb") as file:
            for chunk in iter(lambda: sys.stdin.buffer.read(1 << 20), b""):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != asked["bundle"]:
            raise HostError("damaged", f"the bundle was damaged on its way: {digest.hexdigest()}")
        with _alone(base):
            if _find(base, asked) is not None:
                fresh.replace(base / _BUNDLE)
    finally:
        _remove(fresh)
    return prepare(base, asked)


def prepare(base: Path, asked: Json) -> Json:
    """Go on with preparing, in a process that needs nobody."""
    have = _find(base, asked)
    if have is not None:
        _detach(base, _prepare, have["nonce"])
    return {}


def _detach(base: Path, act: Callable[[Path, str], None], nonce: str) -> None:
    """Run `act` in a process that outlives this call and its connection."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if os.fork() == 0:
            os.setpgid(0, 0)
            _print_to(os.open(os.devnull, os.O_WRONLY))
            act(base, nonce)
    except BaseException:  # noqa: BLE001 - the end of this process; what matters is in state.json
        traceback.print_exc()
    finally:
        os._exit(0)


def _log(base: Path, name: str) -> int:
    (base / "log").mkdir(mode=0o755, exist_ok=True)
    return os.open(base / "log" / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)


def _print_to(output: int) -> None:
    """Let this process read nothing, and print to `output`."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(output)


@contextlib.contextmanager
def _working(base: Path, nonce: str) -> Iterator[Json | None]:
    """Wait until nobody else works on this host; gives the lease, None if it is another's by then."""
    with _alone(base) as there:
        file = (base / _WORKER).open("ab") if there and _is_of_lease(base, nonce) else None
    if file is None:
        yield None
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        there = _is_of_lease(base, nonce)
        if there:
            _print_to(_log(base, "prepare"))
        yield _read(base / _LEASE) if there else None


def _is_of_lease(base: Path, nonce: str) -> bool:
    return (_read(base / _LEASE) or {}).get("nonce") == nonce


def _prepare(base: Path, nonce: str) -> None:
    """Take the steps that are not done; undo them if one fails."""
    with _working(base, nonce) as have:
        if have is None:
            return
        made = {**_NOTHING_MADE, **(_read(base / _STATE) or {})}
        if made["error"] or made["stage"] == "started":
            return
        try:
            for number, (stage, step) in list(enumerate(_steps(have)))[made["done"] :]:
                if (_read(base / _LEASE) or have)["ending"]:
                    return
                made.update(stage=stage, worker=None if step is _install else _this_process())
                _write(base / _STATE, made)
                step(base, have, made)
                made["done"] = number + 1
            made.update(stage="started", worker=None)
        except (HostError, OSError, tarfile.TarError) as exc:
            made.update(error=f"{made['stage']}: {exc}", worker=None)
            _write(base / _STATE, made)
            _take_back(base, have, made)
        _write(base / _STATE, made)


def _this_process() -> list[int | str]:
    return [os.getpid(), _start_time(os.getpid())]


def _start_time(pid: int) -> str:
    """Return when a process began; empty if there is none of that id."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


Step = Callable[[Path, Json, Json], None]


def _steps(have: Json) -> list[tuple[str, Step]]:
    return [
        ("checking the machine", _check),
        (f"installing {', '.join(have['packages']) or 'nothing'}", _install),
        ("unpacking ConPaaS", _unpack),
        ("starting its daemon", _start),
    ]


def _check(base: Path, have: Json, _made: Json) -> None:
    wrong = [one for one in _findings(base, {**have, "now": time.time()}) if not one["ok"]]
    if wrong:
        raise HostError("unfit", "; ".join(f"{one['name']}: {one['detail']} ({one['hint']})" for one in wrong))


def _install(base: Path, have: Json, made: Json) -> None:
    """Install the missing packages, without starting their servers; note which ones came by it."""
    if not have["packages"]:
        return
    before = _installed()
    missing = [package for package in have["packages"] if package not in before]
    if missing and not have["as_root"]:
        raise HostError("unfit", f"run: apt-get install --no-install-recommends {' '.join(missing)}")
    if missing:
        if not (base / _PACKAGES).exists():  # else we were interrupted: what was before that is there
            _write(base / _PACKAGES, {"before": sorted(before), "units": sorted(_units())})
        guard = Path(have["policy_file"])
        made["undo"] += ["packages"] if guard.exists() else ["packages", "guard"]
        _write(base / _STATE, made)
        if not guard.exists():
            guard.write_text("#!/bin/sh\nexit 101\n", encoding="ascii")  # Debian asks it before it starts a server
            guard.chmod(0o755)
        _run(["dpkg", "--configure", "-a"], _APT_S)  # if somebody was interrupted
        apt = ["apt-get", "-q", "-y", "-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=300"]
        _run([*apt, "update"], _APT_S, check=False)  # the lists that are there may do
        _run([*apt, "install", "--no-install-recommends", "--no-remove", *missing], _APT_S)
    _note_installed(base, have, made)
    _unguard(base, have, made)


def _note_installed(base: Path, have: Json, made: Json) -> None:
    known = _read(base / _PACKAGES)
    if known is None:
        return
    made["installed"] = sorted(_installed() - set(known["before"]))
    _write(base / _STATE, made)
    new = sorted(_units() - set(known["units"]))
    if new and _has_systemd(have):
        _run(["systemctl", "disable", "--now", *new], _TOOL_S)
    _remove(base / _PACKAGES)


def _installed() -> set[str]:
    known = _run(["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n"], _TOOL_S)
    return {line.split()[0] for line in known.splitlines() if line.endswith(" installed")}


def _units() -> set[str]:
    return {path.name for path in Path("/lib/systemd/system").glob("*.service") if "@" not in path.name}


def _unpack(base: Path, have: Json, _made: Json) -> None:
    """Unpack the bundle to where the daemon looks for its versions."""
    home = base / "home"
    versions = home / "versions"
    versions.mkdir(mode=0o755, parents=True, exist_ok=True)
    home.chmod(0o700)
    if have["bundle"]:
        target, fresh = versions / have["bundle"], versions / ".new"
        if not target.exists():
            shutil.rmtree(fresh, ignore_errors=True)
            _extract(base / _BUNDLE, fresh)
            fresh.rename(target)
        link = versions / "current"
        _remove(link)
        link.symlink_to(have["bundle"])
        _remove(base / _BUNDLE)
    context = home / "context.json"
    _remove(context)
    with os.fdopen(os.open(context, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(have["context"])
    if have["as_root"]:
        for folder, _, names in os.walk(home):
            for path in (folder, *(os.path.join(folder, name) for name in names)):  # noqa: PTH118
                os.chown(path, have["user"], have["user"], follow_symlinks=False)


def _extract(archive: Path, target: Path) -> None:
    """Unpack an archive of plain files, whose hash was compared."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            path = target / member.name
            content = tar.extractfile(member)
            if content is None or target not in path.parents or ".." in path.parts:
                raise HostError("damaged", f"the bundle holds {member.name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                shutil.copyfileobj(content, file)
            path.chmod(0o755 if member.mode & 0o100 else 0o644)


def _start(base: Path, have: Json, made: Json) -> None:
    """Start the supervisor, by systemd where there is one, and wait until it has begun."""
    (base / _PROGRAM).write_bytes(SOURCE)
    made["undo"].append("start")
    if _has_systemd(have):
        made["unit"] = f"conpaas-node-{have['nonce']}.service"
    _write(base / _STATE, made)
    if made["unit"]:
        (Path(have["unit_directory"]) / made["unit"]).write_text(_unit(base, have), encoding="utf-8")
        _run(["systemctl", "daemon-reload"], _TOOL_S)
        _run(["systemctl", "enable", "--now", made["unit"]], _TOOL_S)
    else:
        log = _log(base, "prepare")
        subprocess.Popen(
            _supervise_argv(base),
            cwd=base / "home",  # it is known by that, too
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        os.close(log)
    if not _wait(lambda: _is_locked(base / _SUPERVISOR), _START_S):
        raise HostError("unfit", f"the supervisor did not begin within {_START_S:g} s")


def _has_systemd(have: Json) -> bool:
    if have["systemd"] == "auto":
        return bool(have["as_root"]) and Path("/run/systemd/system").exists()
    return bool(have["systemd"] == "yes")


def _supervise_argv(base: Path) -> list[str]:
    return [sys.executable, "-I", str(base / _PROGRAM), "supervise"]


def _unit(base: Path, have: Json) -> str:
    return f"""[Unit]
Description=ConPaaS instance {have["token"]}
After=network-online.target
Wants=network-online.target

[Service]
WorkingDirectory={base}/home
ExecStart={" ".join(_supervise_argv(base))}
Restart=on-failure
RestartSec=1
LimitNOFILE=65536
TasksMax=infinity

[Install]
WantedBy=multi-user.target
"""


def _run(argv: list[str], timeout_s: float, check: bool = True) -> str:
    """Run a tool of the system; return what it prints."""
    env = {
        **os.environ,
        "PATH": os.environ.get("PATH", "") + ":" + PATH,
        "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
    }
    sys.stdout.write(f"$ {' '.join(argv)}\n")
    sys.stdout.flush()
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, env=env, check=False
        )
    except FileNotFoundError as exc:
        raise HostError("unfit", f"{argv[0]} is not installed") from exc
    except subprocess.TimeoutExpired as exc:
        raise HostError("unfit", f"{argv[0]} did not end within {timeout_s:g} s") from exc
    said = done.stderr.decode("utf-8", "replace").strip()
    sys.stderr.write(said[-4000:] + "\n")
    if check and done.returncode:
        raise HostError("unfit", f"{argv[0]} exited {done.returncode}: {said[-500:]}")
    return done.stdout.decode("utf-8", "replace")


def _wait(check: Callable[[], bool], timeout_s: float) -> bool:
    """Ask until it holds; tell whether it did in time."""
    deadline = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)  # noqa: TID251 - a process of its own, without a loop
    return True


# -- giving back ----------------------------------------------------------------------------------------------------


def delete(base: Path, asked: Json) -> Json:
    """Give the host back; tell whether that is done after `wait_s`. It goes on by itself if not."""
    with _alone(base) as there:
        have = _find(base, asked) if there else None
        if have is None:
            return {"gone": True}
        if not have["ending"]:
            _write(base / _LEASE, {**have, "ending": True})
    nonce = have["nonce"]
    _end_worker(base)
    _detach(base, _undo, nonce)
    return {"gone": _wait(lambda: not _is_of_lease(base, nonce), asked["wait_s"])}


def _end_worker(base: Path) -> None:
    """End a preparation that is under way: all of it can be undone. Only apt-get is left in peace."""
    pid, began = (_read(base / _STATE) or {}).get("worker") or (0, "")
    if pid and _start_time(pid) == began:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _undo(base: Path, nonce: str) -> None:
    """Take back what was done, last first; then all that is ours, the lease last."""
    with _working(base, nonce) as have:
        if have is None:
            return
        made = {**_NOTHING_MADE, **(_read(base / _STATE) or {}), "worker": None}
        try:
            _take_back(base, have, made)
            for name in ("home", "log"):
                shutil.rmtree(base / name, onerror=_gone_is_fine)
        except (HostError, OSError) as exc:
            _write(base / _STATE, {**made, "error": f"cannot be given back: {exc}"})
            raise
        with _alone(base):
            for path in (*base.glob(".new-*"), *(base / name for name in (_BUNDLE, _PACKAGES, _PROGRAM))):
                _remove(path)
            for name in (_SUPERVISOR, _WORKER, _STATE, _LEASE):
                _remove(base / name)
            _remove_folder(base)


def _gone_is_fine(_function: Any, _path: Any, error: Any) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


def _take_back(base: Path, have: Json, made: Json) -> None:
    """Undo what is recorded, last first."""
    for what in reversed(list(made["undo"])):
        {"start": _stop, "guard": _unguard, "packages": _uninstall}[what](base, have, made)
        made["undo"].remove(what)
        _write(base / _STATE, made)


def _unguard(_base: Path, have: Json, made: Json) -> None:
    if "guard" in made["undo"]:
        _remove(Path(have["policy_file"]))


def _uninstall(base: Path, have: Json, made: Json) -> None:
    """Remove the packages that came with the instance, and no others."""
    _note_installed(base, have, made)
    if have["remove_packages"] and made["installed"]:
        _run(["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300", "purge", *made["installed"]], _APT_S)


def _stop(base: Path, have: Json, made: Json) -> None:
    """End the supervisor, the daemon and its engines."""
    unit = Path(have["unit_directory"]) / made["unit"]
    if made["unit"] and unit.exists():
        _run(["systemctl", "disable", "--now", made["unit"]], _TOOL_S)
        _remove(unit)
        _run(["systemctl", "daemon-reload"], _TOOL_S)

    def none_left() -> bool:
        left = _processes(base, have)
        _kill(left)
        return not left

    if not _wait(none_left, _KILL_S):
        raise HostError("busy", f"processes {_processes(base, have)} do not end")


def _kill(pids: list[int]) -> None:
    for pid in pids:
        if pid > 1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _processes(base: Path, have: Json) -> list[int]:
    """Return the living processes of the instance, also those that have made themselves independent."""
    mark = f"\0{MARKER}={have['nonce']}\0".encode()
    home = str(base / "home")
    found = [int(path.name) for path in Path("/proc").glob("[1-9]*") if _is_of(path, mark, home, have["user"])]
    if _is_locked(base / _SUPERVISOR):
        found.append(int((base / _SUPERVISOR).read_text(encoding="ascii") or 0))
    return found


def _is_of(process: Path, mark: bytes, home: str, user: int | None) -> bool:
    try:
        stat = (process / "stat").read_text(encoding="utf-8", errors="replace")
        if stat.rpartition(")")[2].split()[0] in "ZX":
            return False
        if user is not None and process.stat().st_uid == user:
            return True
        place = os.readlink(process / "cwd")  # noqa: PTH115
        return place == home or place.startswith(home + "/") or mark in b"\0" + (process / "environ").read_bytes()
    except OSError:  # it has ended, or belongs to somebody else
        return False


def console(base: Path, asked: Json) -> Json:
    """Return the end of what preparation and daemon have printed."""
    text = ""
    if _find(base, asked) is not None:
        for path in sorted((base / "log").glob("*.log"), key=lambda path: path.name != "prepare.log"):
            text += path.read_bytes()[-CONSOLE_BYTES:].decode("utf-8", "replace")
    return {"text": text[-CONSOLE_BYTES:]}


# -- supervising ----------------------------------------------------------------------------------------------------


def supervise(base: Path) -> NoReturn:
    """Keep the daemon running, until this process is told to end: then it tells the daemon, and waits a little."""
    have = _read(base / _LEASE)
    if have is None or have["ending"]:
        sys.exit(0)
    lock = (base / _SUPERVISOR).open("a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # engines outlive the daemon; somebody must reap them
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    pause_s = _RESTART_FIRST_S
    while True:
        began = time.monotonic()
        daemon = _fork_daemon(base, have)
        if _watch(base, have, daemon):
            sys.exit(0)
        pause_s = _RESTART_FIRST_S if time.monotonic() - began > _STEADY_S else min(pause_s * 2, _RESTART_LAST_S)
        if signal.sigtimedwait({signal.SIGTERM}, pause_s) is not None:
            sys.exit(0)


def _watch(base: Path, have: Json, daemon: int) -> bool:
    """Wait for the daemon's end; tell whether we are to end as well."""
    while True:
        got = signal.sigtimedwait({signal.SIGTERM, signal.SIGCHLD}, _LOG_CHECK_S)
        if got is None:
            _bound_log(base / "log" / f"{have['kind']}.log")
        elif got.si_signo == signal.SIGTERM:
            os.kill(daemon, signal.SIGTERM)
            _wait(lambda: _reap(daemon), _STOP_S)
            return True
        elif _reap(daemon):
            return False


def _reap(daemon: int) -> bool:
    """Collect all that has ended; tell whether the daemon has."""
    ended = False
    try:
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return ended
            ended = ended or pid == daemon
    except ChildProcessError:
        return True


def _bound_log(path: Path) -> None:
    """Go on with an empty log once it is too long; its last quarter is kept beside it."""
    if path.stat().st_size > _LOG_BYTES:
        with path.open("rb+") as file:
            file.seek(-_LOG_BYTES // 4, os.SEEK_END)
            path.with_name(path.name + ".1").write_bytes(file.read())
            file.truncate(0)


def _fork_daemon(base: Path, have: Json) -> int:
    log = _log(base, have["kind"])
    child = os.fork()
    if child:
        os.close(log)
        return child
    try:
        home = str(base / "home")
        _print_to(log)
        os.setsid()
        if have["user"] is not None:
            os.setgroups([])
            os.setgid(have["user"])
            os.setuid(have["user"])
        os.chdir(home)
        os.umask(0o022)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGCHLD})
        env = {"PATH": PATH, "HOME": home, "LANG": "C.UTF-8", MARKER: have["nonce"]}
        argv = have["argv"] or [sys.executable, "-I", f"{home}/versions/current", "run", have["kind"]]
        argv = argv if have["argv"] else [*argv, "--context", f"{home}/context.json"]
        os.execve(argv[0], argv, env)  # noqa: S606 - an argument list of the driver's
    except BaseException:  # noqa: BLE001 - the end of this process, told in the daemon's log
        traceback.print_exc()
    finally:
        os._exit(1)


# -- calls ----------------------------------------------------------------------------------------------------------

VERBS = {
    "check": check,
    "console": console,
    "delete": delete,
    "lease": lease,
    "look": look,
    "prepare": prepare,
    "upload": upload,
}
_ERRNOS = {errno.ENOSPC: "disk-full", errno.EDQUOT: "disk-full"}


def main(verb: str) -> None:
    """Do what is asked on standard input, and answer."""
    try:
        asked = json.loads(sys.stdin.buffer.readline())
        answer = VERBS[verb](Path(asked["directory"]), asked)
    except HostError as exc:
        answer = {"error": exc.code, "message": str(exc)}
    except OSError as exc:
        answer = {"error": _ERRNOS.get(exc.errno or 0, "system"), "message": str(exc)}
    sys.stdout.write(ANSWER + json.dumps(answer) + "\n")


if __name__ == "__main__":
    if sys.argv[-1] == "supervise":
        supervise(Path(__file__).resolve().parent)
    else:
        main(sys.argv[-1])

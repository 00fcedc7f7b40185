"""The first process of a local instance: makes the instance's world, then starts, restarts and ends what runs in it.

Standard library alone, so that it starts at once and stays small. Run as a file it is told all by its arguments
(`SPEC CLAIM REPLY`, see `main`); a zygote calls `launch` in a fork of itself. Linux only.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

MARKER = "CONPAAS_LOCAL_MARK"
"""The environment variable that every process of an instance bears; its value is the instance's `mark`."""
READY = b"ready"
"""What is written to the reply pipe when the instance lives; else why it does not: an error number and its words."""
DAEMON_USER = "conpaas"

_RESTART_FIRST_S, _RESTART_LAST_S = 0.1, 10.0
_STEADY_S = 10.0  # a daemon that ran this long did not fail at its start: the back-off begins anew
_PIPE_BYTES = 65536
_KILL_PAUSE_S = 0.005

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 15, 36, 38
_CAPABILITY_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class Spec(NamedTuple):
    """One instance, as its driver wants it."""

    id: str
    mark: str
    """Unlike that of any other instance on this machine, whatever its id."""
    kind: str
    """The daemon: names its log and its process."""
    home: str
    """The instance's directory, made by the driver and owned by `user`."""
    context: str
    """The contextualization document's path."""
    records: str
    """Where `<id>.pid` is written: process id, start time and boot id of the first process."""
    user: int | None
    """To be dropped to, as user and as group; None: stay who we are."""
    namespaces: bool
    """Make PID and mount namespaces; else a plain process tree."""
    hidden: tuple[str, ...]
    """Directories that look empty from inside, but for `home`."""
    private_tmp: bool
    argv: tuple[str, ...]
    """The daemon as a command."""
    env: dict[str, str]
    log_bytes: int
    """Of the log and of the older one that is kept, each."""
    stop_s: float
    stamp: str
    """Of the code that a zygote has loaded; empty without one."""

    @classmethod
    def read(cls, text: str | bytes) -> "Spec":
        """Read what `write` wrote."""
        return cls(**json.loads(text))

    def write(self) -> str:
        """Return the specification as JSON."""
        return json.dumps(self._asdict())


Daemon = Callable[[Spec], None]
"""Becomes the daemon, in a process of its own; what it returns is not looked at."""


def launch(spec: Spec, claim: int, reply: int, daemon: Daemon) -> None:
    """Make the instance, and return once its first process is known by its pid file. The caller then exits.

    `claim` stays open in the first process for as long as it lives. To `reply` goes READY, or why there is no
    instance; in that case nothing of it is left but files. A death of this process at any point is safe: the
    first process begins only after its pid file is whole.
    """
    try:
        records = os.open(spec.records, os.O_RDONLY | os.O_DIRECTORY)
        if spec.namespaces:
            _make_namespaces(spec)
        begin, release = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(release)
            _be_first(spec, begin, (claim, reply), daemon)
        os.close(begin)
        _write_pid_file(spec, records, pid)
        os.write(release, b"g")
    except OSError as exc:
        os.write(reply, _words(exc))


def _words(exc: OSError) -> bytes:
    return f"{exc.errno or 0} {exc.strerror or exc}{f': {exc.filename}' if exc.filename else ''}".encode()


def _write_pid_file(spec: Spec, records: int, pid: int) -> None:
    line = {"pid": pid, "start": start_time(pid), "boot": boot_id()}
    name = f"{spec.id}.pid"
    file = os.open(f"{name}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=records)
    os.write(file, json.dumps(line).encode())
    os.close(file)
    os.rename(f"{name}.new", name, src_dir_fd=records, dst_dir_fd=records)


def boot_id() -> str:
    """Return what tells this boot of the machine from all others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def start_time(pid: int) -> int:
    """Return when a process of ours, not yet reaped, started, in clock ticks since the machine did."""
    return int(_stat(pid)[19])


def _stat(pid: int | str) -> list[str]:
    """Return the fields of /proc/PID/stat from the third one, the state, on."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()


# The world of the instance


def _make_namespaces(spec: Spec) -> None:
    """Leave the machine's PID and mount namespaces; the next child is the first process of the new ones."""
    user, group, root = os.geteuid(), os.getegid(), os.geteuid() == 0
    _call("unshare", _CLONE_NEWNS | _CLONE_NEWPID | (0 if root else _CLONE_NEWUSER))
    if not root:
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="ascii")
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    home = os.open(spec.home, os.O_PATH | os.O_DIRECTORY)  # only now: the old namespace's mounts cannot be bound
    if spec.private_tmp:
        _mount(f"/proc/self/fd/{home}/tmp", "/tmp", None, _MS_BIND)  # noqa: S108 - to make it private
        _mount("tmpfs", "/dev/shm", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=1777")  # noqa: S108
    for directory in spec.hidden:
        if Path(directory).is_dir():
            _mount("tmpfs", directory, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
    Path(spec.home).mkdir(parents=True, exist_ok=True)
    _mount(f"/proc/self/fd/{home}", spec.home, None, _MS_BIND)
    os.close(home)
    os.chdir("/")
    if root and spec.user is not None:
        _name_user(spec, spec.user)


def _name_user(spec: Spec, user: int) -> None:
    """Give the instance's user a name: some programs, Java's among them, do not start without."""
    place = Path(spec.hidden[0])
    for name, line in (
        ("passwd", f"{DAEMON_USER}:x:{user}:{user}:ConPaaS instance:{spec.home}:/bin/sh"),
        ("group", f"{DAEMON_USER}:x:{user}:"),
    ):
        own = place / f".{name}"
        own.write_bytes(Path("/etc", name).read_bytes().rstrip(b"\n") + f"\n{line}\n".encode())
        own.chmod(0o644)
        _mount(str(own), f"/etc/{name}", None, _MS_BIND)


def _drop(spec: Spec) -> None:
    """Give up every privilege, for good."""
    if spec.user is not None:
        os.setgroups([])
        os.setresgid(spec.user, spec.user, spec.user)
        os.setresuid(spec.user, spec.user, spec.user)
    elif spec.namespaces and os.geteuid() != 0:
        _call("capset", (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)  # /proc/self is its own again


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _call("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])


def _call(name: str, *args: object) -> None:
    if getattr(_libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name} does not work here: {os.strerror(number)}")


# The first process


def _be_first(spec: Spec, begin: int, kept: tuple[int, int], daemon: Daemon) -> NoReturn:
    """Wait for the pid file, take possession, run the daemon until told to end. `kept`: claim and reply."""
    claim, reply = kept
    try:
        if os.read(begin, 1) != b"g":
            os._exit(0)  # whoever launched us died: nobody knows of us
        os.setsid()
        _keep_only({claim, reply})
        try:
            if spec.namespaces:
                _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
            else:
                _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            _drop(spec)
            first = _First(spec, daemon)
        except OSError as exc:
            os.write(reply, _words(exc))
            os._exit(1)
        retitle(spec.mark, ["conpaas-init", spec.id])
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        with contextlib.suppress(BrokenPipeError):  # nobody waits any more
            os.write(reply, READY)
        os.close(reply)
        first.run()
    except BaseException:  # noqa: BLE001 - it ends the instance, and the log must say why
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


def _keep_only(descriptors: set[int]) -> None:
    """Close everything but `descriptors` and the standard three, which become /dev/null."""
    nothing = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    opened = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    for number in opened - descriptors - {0, 1, 2}:
        with contextlib.suppress(OSError):  # the listing's own is closed already
            os.close(number)


class _First:
    """Supervises the daemon as an init system would, reaps orphans, keeps the log bounded."""

    def __init__(self, spec: Spec, daemon: Daemon) -> None:
        self._spec, self._daemon = spec, daemon
        self._log_path = Path(spec.home, f"{spec.kind}.log")
        self._log = self._open_log()
        self._output, self._inlet = os.pipe()
        os.set_blocking(self._output, False)
        os.dup2(self._log, 2)  # what breaks here is told in the same log
        self._wake, wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        self._child = 0
        self._started = self._next_start = 0.0
        self._delay_s = _RESTART_FIRST_S
        self._end_at: float | None = None

    def run(self) -> None:
        """Return when the daemon has ended after a SIGTERM, or its time to do so is over; then nothing is left."""
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while self._end_at is None or (self._child and time.monotonic() < self._end_at):
            if not self._child and self._end_at is None and time.monotonic() >= self._next_start:
                self._start()
            ready = {descriptor for descriptor, _ in poll.poll(self._timeout_ms())}
            if self._output in ready:
                self._copy_output()
            if self._wake in ready:
                self._on_signals(os.read(self._wake, 256))
        self._copy_output()
        if not self._spec.namespaces:  # else the kernel does it, for we are process 1
            _kill_descendants()

    def _timeout_ms(self) -> float | None:
        until = self._end_at if self._end_at is not None else (None if self._child else self._next_start)
        return None if until is None else max(0.0, until - time.monotonic()) * 1000 + 1

    def _on_signals(self, numbers: bytes) -> None:
        if (signal.SIGTERM in numbers or signal.SIGINT in numbers) and self._end_at is None:
            self._end_at = time.monotonic() + self._spec.stop_s
            if self._child:
                os.kill(self._child, signal.SIGTERM)
        for pid, status in _reaped():
            if pid == self._child:
                self._ended(status)

    def _ended(self, status: int) -> None:
        now = time.monotonic()
        self._child = 0
        if now - self._started >= _STEADY_S:
            self._delay_s = _RESTART_FIRST_S
        self._next_start = now + self._delay_s
        code = os.waitstatus_to_exitcode(status)
        self._say(f"{self._spec.kind} ended with {code}")
        self._delay_s = min(self._delay_s * 2, _RESTART_LAST_S)

    def _say(self, what: str) -> None:
        self._write(f"{json.dumps({'event': what, 'process': 'init'})}\n".encode())

    def _start(self) -> None:
        self._started = time.monotonic()
        pid = os.fork()
        if pid:
            self._child = pid
            return
        code = 1
        try:
            self._become_daemon()
            self._daemon(self._spec)
            code = 0
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        except BaseException:  # noqa: BLE001 - whatever it is, it ends this process and must be told
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _become_daemon(self) -> None:
        spec = self._spec
        os.setsid()
        os.dup2(self._inlet, 1)
        os.dup2(self._inlet, 2)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.closerange(3, 1024)
        if not spec.namespaces:
            _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.chdir(spec.home)
        os.umask(0o022)
        os.environ.clear()
        os.environ.update(spec.env)

    # The log

    def _open_log(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        return os.open(self._log_path, flags, 0o640)

    def _copy_output(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._write(os.read(self._output, _PIPE_BYTES))

    def _write(self, data: bytes) -> None:
        """Append to the log; what a full disk does not take is lost, for nobody must wait for a log."""
        with contextlib.suppress(OSError):
            if os.fstat(self._log).st_size + len(data) > self._spec.log_bytes:
                self._log_path.replace(f"{self._log_path}.1")
                os.close(self._log)
                self._log = self._open_log()
            os.write(self._log, data)


def _reaped() -> Iterator[tuple[int, int]]:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended


def _kill_descendants() -> None:
    """Kill all that descends from this process; as subreaper, none can get away."""
    while True:
        list(_reaped())
        parents = {int(path.name): _parent(path.name) for path in Path("/proc").glob("[1-9]*")}
        family = {os.getpid()}
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        family.discard(os.getpid())
        if not family:
            return
        for pid in family:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        select.select([], [], [], _KILL_PAUSE_S)


def _parent(pid: str) -> int:
    try:
        return int(_stat(pid)[1])
    except (OSError, IndexError):
        return 0


# How the processes look from outside


def placeholder() -> str:
    """Return a value of MARKER that leaves room for any mark, for the environment of a process that will `retitle`."""
    return "_" * 80


def retitle(mark: str, argv: list[str]) -> None:
    """Show this process, to ps and in /proc, as `argv` with MARKER set to `mark`, though it was not executed.

    Writes over the memory that the kernel shows, no further than its ends; the marker only over a placeholder.
    """
    fields = _stat("self")
    begin, end, env_begin, env_end = (int(field) for field in fields[45:49])
    text = b"\0".join(word.encode() for word in argv)[: end - begin - 1]
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)
    environment = ctypes.string_at(env_begin, env_end - env_begin)
    place = environment.find(f"{MARKER}={placeholder()}".encode())
    if place >= 0:
        start = env_begin + place + len(MARKER) + 1
        ctypes.memmove(start, mark.encode().ljust(len(placeholder()), b"\0"), len(placeholder()))
    _call("prctl", _PR_SET_NAME, Path(argv[0]).name.encode()[:15], 0, 0, 0)


def execute(spec: Spec) -> None:
    """Become the daemon by executing its command."""
    os.execve(spec.argv[0], spec.argv, spec.env)  # noqa: S606 - an argument list of the driver's


def main() -> None:
    """Launch the instance that the arguments describe: specification, and descriptors of claim and reply."""
    spec, claim, reply = Spec.read(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for descriptor in (claim, reply):
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - the function's own form
    launch(spec, claim, reply, execute)


if __name__ == "__main__":
    main()

"""The engines (nginx, php-fpm, …) of service types: which are here, and how to install the others."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import click

from conpaas.cli import views
from conpaas.cli.output import Output
from conpaas.cli.session import with_output
from conpaas.core import plugins, run
from conpaas.core.errors import EngineMissingError, NotFoundError
from conpaas.core.messages.base import Message
from conpaas.core.service import PACKAGE, ServiceType

INSTALL_TIMEOUT_S = 900.0
_GUARD = Path("/usr/sbin/policy-rc.d")
"""Debian asks this program before it starts a server; exit code 101 is a no."""


class EngineView(Message):
    """One engine of one service type."""

    type: str
    program: str
    package: str
    path: str = ""
    """Empty if it is not installed."""


@click.group()
def engines() -> None:
    """The programs that service types run, on this machine."""


@engines.command("ls")
@with_output
async def list_engines(out: Output) -> None:
    """List engines and whether they are installed here."""
    found = [engine for kind in _types().values() for engine in _engines(kind)]
    out.show(found, views.ENGINES, empty="No service type needs any.")


@engines.command()
@click.argument("service_type")
@with_output
async def install(out: Output, service_type: str) -> None:
    """Install what SERVICE_TYPE needs, by apt-get; the servers themselves are not started.

    Without root's rights it prints the command to run.
    """
    kind = _types().get(service_type)
    if kind is None:
        raise NotFoundError(
            f"there is no service type '{service_type}'", value=service_type, hint=f"there are: {', '.join(_types())}"
        )
    packages = [package for engine in kind.engines for package in engine.package.split()]
    missing = await _not_installed(packages)
    if not missing:
        out.say(f"all engines of {kind.name} are installed")
        return
    if os.geteuid() != 0:
        command = f"sudo apt-get install -y --no-install-recommends {' '.join(missing)}"
        raise EngineMissingError(f"{kind.name} needs {', '.join(missing)}", value=missing, hint=f"run: {command}")
    await _install(missing)
    out.say(f"installed {', '.join(missing)}")


def _types() -> dict[str, ServiceType]:
    return plugins.discover(PACKAGE, "SERVICE", ServiceType)


def _engines(kind: ServiceType) -> list[EngineView]:
    views_of: list[EngineView] = []
    for engine in kind.engines:
        paths = (run.find(program) for program in engine.program.split("|"))
        path = next((str(path) for path in paths if path is not None), "")
        views_of.append(EngineView(type=kind.name, program=engine.program, package=engine.package, path=path))
    return views_of


async def _not_installed(packages: list[str]) -> list[str]:
    known = await run.run(
        ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *packages], timeout_s=60, check=False
    )
    installed = {line.split()[0] for line in known.stdout.decode().splitlines() if line.endswith(" installed")}
    return [package for package in packages if package not in installed]


def _units() -> set[str]:
    return {path.name for path in Path("/lib/systemd/system").glob("*.service")}


async def _install(packages: list[str]) -> None:
    """Install packages; servers that come with them do not start, now or at the next boot."""
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    before = _units()
    with _nothing_starts():
        argv = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages]
        await run.run(argv, timeout_s=INSTALL_TIMEOUT_S, env=env)
    new = sorted(name for name in _units() - before if "@" not in name)
    if new and Path("/run/systemd/system").exists():
        await run.run(["systemctl", "disable", "--now", *new], timeout_s=60)


@contextlib.contextmanager
def _nothing_starts() -> Iterator[None]:
    if _GUARD.exists():
        yield
        return
    _GUARD.write_text("#!/bin/sh\nexit 101\n", encoding="ascii")
    _GUARD.chmod(0o755)
    try:
        yield
    finally:
        _GUARD.unlink()

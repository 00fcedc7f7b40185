"""`conpaas quickstart`: a running director with the sample application on the local cloud, by one command."""

import sys
from dataclasses import replace
from pathlib import Path

import click

import conpaas
from conpaas.cli.check import Check
from conpaas.cli.config import Config
from conpaas.cli.demo import ADMIN, Demo, Started, site
from conpaas.cli.output import Output
from conpaas.cli.session import with_output, yes_option
from conpaas.core.errors import NotFoundError
from conpaas.core.messages.model import ServiceView
from conpaas.director.settings import default_data_dir

_PACKAGE = Path(conpaas.__file__).parent


@click.command()
@click.option("--check", is_flag=True, help="Try everything in a temporary folder and leave nothing behind.")
@click.option("--down", is_flag=True, help="Terminate all services and stop the director.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="The director's folder; else its usual one.")
@click.option("--port", default=9999, show_default=True, type=click.IntRange(1, 65535), help="Of API and web UI.")
@click.option(
    "--example", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Deploy this PHP source tree."
)
@yes_option
@with_output
async def quickstart(
    out: Output, data_dir: Path | None, port: int, example: Path | None, *, check: bool, down: bool, yes: bool
) -> None:
    """Start a director with the sample application on this machine and say where to look.

    Run again, it finds what runs and says the same. With --check it instead proves that everything works: under
    load it scales to 5 nodes and back, activates a second code version and kills a backend; it exits 0 only if no
    request failed and no process, port or file is left.
    """
    if check:
        await Check(example or _example(), out.note).run()
        return
    demo = Demo(data_dir or default_data_dir(), port, say=out.note)
    if down:
        await _down(demo, out, yes=yes)
        return
    started = await demo.ensure_director()
    async with demo.connected() as client:
        service = await demo.deploy(client, example or _example())
    await _remember(demo, started, out)
    _show(out, demo, started, service)


async def _down(demo: Demo, out: Output, *, yes: bool) -> None:
    if demo.known() is None:
        raise NotFoundError(f"no director was started in {demo.data_dir}", value=demo.data_dir)
    if not yes:
        click.confirm("Destroy all services of this director and stop it?", abort=True, err=True)
    await demo.ensure_director()  # services outlive a director that has ended: they need one to be ended
    async with demo.connected() as client:
        await demo.terminate_all(client)
    await demo.stop_director()
    out.say(f"all is ended; accounts and settings stay in {demo.data_dir}")


async def _remember(demo: Demo, started: Started, out: Output) -> None:
    """Log the command line in, unless it is at home elsewhere."""
    config = Config.load()
    if config.token is not None:
        if config.url != started.url:
            out.note(f"'conpaas' stays logged in at {config.url}; 'conpaas login {started.url}' changes that")
        return
    async with demo.connected() as client:
        session = await client.login(ADMIN, started.password)
    replace(config, url=started.url, token=session.token.get_secret_value()).save()


def _show(out: Output, demo: Demo, started: Started, service: ServiceView) -> None:
    facts = {"ui": started.url, "login": ADMIN, "password": started.password, "site": site(service)}
    if out.as_json:
        out.document({**facts, "password_file": str(demo.file), "log": str(demo.log)})
        return
    out.say(f"Web UI:    {facts['ui']}")
    out.say(f"Login:     {facts['login']}")
    out.say(f"Password:  {facts['password']}    (kept in {demo.file})")
    out.say(f"Site:      {facts['site']}")
    out.say(f"Terminal:  source {Path(sys.prefix) / 'bin' / 'activate'}; conpaas --help")
    out.say("End it all with 'conpaas quickstart --down'.")


def _example() -> Path:
    """Return the sample application: the installed package's own copy, or the checkout's."""
    for place in (_PACKAGE / "examples" / "guestbook", _PACKAGE.parent / "examples" / "guestbook"):
        if place.is_dir():
            return place
    raise NotFoundError("the sample application is not installed", hint="name its folder by --example")

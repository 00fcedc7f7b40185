"""The command `conpaas` and where each of its verbs lives."""

from collections.abc import Sequence

import click

from conpaas.cli.session import Root, json_option

_VERBS = {
    "conpaas.cli.account": ("login", "logout", "register", "whoami", "passwd", "token", "key", "cert"),
    "conpaas.cli.services": (
        "create",
        "ls",
        "rename",
        "start",
        "stop",
        "terminate",
        "scale",
        "move",
        "settings",
        "scripts",
    ),
    "conpaas.cli.code": ("upload", "checkout", "code", "rollback"),
    "conpaas.cli.watch": ("status", "nodes", "logs", "metrics", "history", "states", "open", "ops"),
    "conpaas.cli.catalogue": ("types", "app", "command"),
    "conpaas.cli.clouds": ("cloud",),
    "conpaas.cli.admin": ("admin",),
    "conpaas.cli.engines": ("engines",),
    "conpaas.cli.daemons": ("run",),
    "conpaas.cli.quickstart": ("quickstart",),
    "conpaas.cli.completion": ("completion",),
}


@click.group(
    cls=Root,
    lazy={verb: module for module, verbs in _VERBS.items() for verb in verbs},
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done; 1 an error; 2 wrong words; 3 an operation failed; 4 not logged in; "
    "5 the director or a manager cannot be reached; 130 interrupted.",
)
@click.version_option(package_name="conpaas")
@json_option
def root() -> None:
    """ConPaaS: applications out of elastic services, on any cloud.

    Log in with 'conpaas login URL', then: 'conpaas create php --name blog', 'conpaas start blog', 'conpaas upload
    blog site.tar.gz --activate', 'conpaas scale blog web=+2 php=+1', 'conpaas status --watch'.

    CONPAAS_URL and CONPAAS_TOKEN say where and who, instead of 'conpaas login'.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves by SystemExit with the exit code."""
    root.main(args=None if arguments is None else list(arguments), prog_name="conpaas")

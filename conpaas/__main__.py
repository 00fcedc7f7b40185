"""The one executable: `conpaas run manager|agent` starts a small daemon, everything else is the command line.

`conpaas run instance` is the first boot of a virtual machine, which becomes one of the two.
A daemon must not load what only people need (click, rich, …): so nothing of ours is imported before it is known.
"""

import argparse
import sys
from collections.abc import Sequence

from conpaas.core import footprint, plugins

_DAEMONS = ("manager", "agent")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; `arguments` None means those of this process. Leaves by SystemExit with the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["run", "instance"]:
        footprint.keep_small()
        plugins.load("conpaas.core.boot:main")()
    elif words[:1] == ["run"] and words[1:2] and words[1] in _DAEMONS:
        footprint.keep_small()
        parser = argparse.ArgumentParser(prog=f"conpaas run {words[1]}", description=f"Run the {words[1]} daemon.")
        parser.add_argument("--context", required=True, metavar="FILE", help="The contextualization document.")
        plugins.load("conpaas.core.daemon:main")(words[1], parser.parse_args(words[2:]).context)
    else:
        plugins.load("conpaas.cli.root:main")(words)


if __name__ == "__main__":
    main()

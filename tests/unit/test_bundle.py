"""What daemons need on a machine without ConPaaS: one archive, complete, the same from every equal installation."""

import asyncio
import hashlib
import io
import os
import platform
import sys
import tarfile
from pathlib import Path

import pytest

import conpaas
from conpaas.core import bundle, run
from conpaas.core.bundle import Bundle, Bundler, Manifest
from conpaas.core.errors import BadArchiveError, CommandFailedError, ConflictError

SYSTEM_PYTHON = str(Path(sys.executable).resolve())
"""Without the environment's libraries."""
IMPORT_ALL = """
import pkgutil, sys
sys.path.insert(0, sys.argv[1])
import conpaas
names = [info.name for info in pkgutil.walk_packages(conpaas.__path__, "conpaas.")]
for name in names:
    if not name.endswith("__main__"):
        __import__(name)
assert conpaas.__file__.startswith(sys.argv[1]), conpaas.__file__
print(*names)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle.make(tmp_path_factory.mktemp("bundle"))


def names(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def pack(path: Path, members: dict[str, str]) -> str:
    """Write a small archive; return its hash."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest(**changes: str) -> str:
    fields = {"version": "1.0", "python": str(sys.implementation.cache_tag), "machine": platform.machine()}
    return Manifest(**{**fields, **changes}).model_dump_json()


async def test_a_python_without_our_libraries_can_import_all_of_it(made: Bundle, tmp_path: Path) -> None:
    home = await asyncio.to_thread(bundle.unpack, made.path, tmp_path, made.sha256)
    done = await run.run([SYSTEM_PYTHON, "-I", "-S", "-c", IMPORT_ALL, str(home)], timeout_s=60)

    assert {"conpaas.agent.app", "conpaas.manager.app", "conpaas.core.keymaker"} <= set(done.stdout.decode().split())


async def test_it_starts_the_daemon_of_its_own_version_through_a_link(made: Bundle, tmp_path: Path) -> None:
    await asyncio.to_thread(bundle.unpack, made.path, tmp_path, made.sha256)
    (tmp_path / "current").symlink_to(made.sha256)
    argv = [SYSTEM_PYTHON, "-I", "-S", str(tmp_path / "current"), "run", "agent", "--help"]
    done = await run.run(argv, timeout_s=60, cwd=Path("/"), env={})

    assert b"Run the agent daemon" in done.stdout


def test_it_holds_what_daemons_need_and_nothing_else(made: Bundle) -> None:
    found = names(made.path)
    folders = {name.split("/")[1] for name in found if name.startswith("conpaas/") and name.count("/") > 1}

    assert found[0] == bundle.MANIFEST
    assert folders == {"agent", "core", "manager", "services"}
    assert not [name for name in found if "sqlalchemy" in name or "asyncssh" in name or name.endswith(".pyc")]
    assert not [name for name in found if ".." in name or name.startswith("/")]
    assert any("LICENSE" in name for name in found)


def test_equal_installations_give_equal_bytes_under_any_umask(made: Bundle, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        again = bundle.make(tmp_path / "elsewhere")
    finally:
        os.umask(before)

    assert again.sha256 == made.sha256
    assert again.path.stat().st_mode & 0o777 == 0o644
    assert hashlib.sha256(again.path.read_bytes()).hexdigest() == again.sha256
    with tarfile.open(made.path) as tar:
        assert {(member.uid, member.gid, member.mtime, member.uname) for member in tar} == {(0, 0, 0, "")}


def test_it_says_what_it_is_and_runs_on(made: Bundle) -> None:
    told = bundle.read_manifest(made.path)

    assert told == made.manifest
    assert told.version == conpaas.__version__
    assert (told.python, told.machine) == (sys.implementation.cache_tag, platform.machine())
    assert bundle.misfit(told) == ""


async def test_it_is_made_once_however_often_it_is_asked_for(
    tmp_path: Path, made: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def count(directory: Path) -> Bundle:
        calls.append(directory)
        return made

    monkeypatch.setattr(bundle, "make", count)
    bundler = Bundler(tmp_path)

    assert set(await asyncio.gather(*(bundler.get() for _ in range(5)))) == {made}
    assert calls == [tmp_path]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"python": "cpython-399"}, "made for cpython-399"),
        ({"machine": "riscv64"}, "on riscv64"),
        ({"glibc": "9.99"}, "needs glibc 9.99"),
    ],
)
def test_what_does_not_run_here_is_refused_with_the_reason(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    sha256 = pack(tmp_path / "alien", {bundle.MANIFEST: manifest(**changes), "x.py": ""})

    with pytest.raises(ConflictError, match=words):
        bundle.unpack(tmp_path / "alien", tmp_path, sha256)
    assert not (tmp_path / sha256).exists()


def test_unpacking_twice_is_unpacking_once(tmp_path: Path) -> None:
    sha256 = pack(tmp_path / "good", {bundle.MANIFEST: manifest(), "x.py": "x = 1"})
    home = bundle.unpack(tmp_path / "good", tmp_path, sha256)
    (tmp_path / "good").unlink()

    assert bundle.unpack(tmp_path / "good", tmp_path, sha256) == home == tmp_path / sha256
    assert (home / "x.py").read_text() == "x = 1"


def test_damage_is_noticed_before_anything_is_unpacked(tmp_path: Path) -> None:
    sha256 = pack(tmp_path / "good", {bundle.MANIFEST: manifest(), "x.py": "x = 1"})
    whole = (tmp_path / "good").read_bytes()
    (tmp_path / "good").write_bytes(whole[:-1] + b"\1")

    with pytest.raises(BadArchiveError, match="is not the bundle"):
        bundle.unpack(tmp_path / "good", tmp_path, sha256)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil"])
def test_nothing_is_written_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    sha256 = pack(tmp_path / "bad", {bundle.MANIFEST: manifest(), name: "x"})

    with pytest.raises(BadArchiveError):
        bundle.unpack(tmp_path / "bad", tmp_path, sha256)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("members", [{}, {"x.py": ""}, {bundle.MANIFEST: "{"}, {bundle.MANIFEST: "{}"}])
def test_what_is_no_bundle_is_refused(tmp_path: Path, members: dict[str, str]) -> None:
    pack(tmp_path / "other", members)

    with pytest.raises(BadArchiveError, match="is no bundle"):
        bundle.read_manifest(tmp_path / "other")


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")

    with pytest.raises(BadArchiveError, match="is no bundle"):
        bundle.read_manifest(tmp_path / "text")


def test_a_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "LIBRARIES", ("no-such-library",))

    with pytest.raises(CommandFailedError, match="no-such-library"):
        bundle.make(tmp_path)
    assert list(tmp_path.iterdir()) == []

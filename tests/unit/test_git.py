"""Code comes out of git repositories whole, and nothing else does: no option, no local file, no private address."""

import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from conpaas.core import archive, run
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import BadArchiveError, BadInputError, ConflictError, ForbiddenError, TooLargeError
from conpaas.core.tasks import wait_for
from conpaas.director import git
from conpaas.director.git import Allowed
from conpaas.director.settings import Limits
from tests.fakes.code_rig import GIT_ENVIRONMENT, Rig, commit, make_repository, open_rig
from tests.fakes.code_rig import git as run_git
from tests.fakes.ports import free_port

FILES = {"index.php": "<?php echo 1;", "lib/a.php": "<?php"}
ACTOR = "user:usr-a"


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, monkeypatch) as rig:
        yield rig


async def test_the_newest_commit_becomes_a_version(rig: Rig, tmp_path: Path) -> None:
    made = await make_repository(tmp_path / "site", FILES)

    view = await rig.store.checkout("svc-a", f"file://{tmp_path}/site", "", ACTOR)

    assert view.filename == f"git-{made[:7]}.tar.gz"
    assert view.description == f"file://{tmp_path}/site at {made[:7]}: First light"
    unpacked = tmp_path / "unpacked"
    archive.unpack(rig.store.path(view.sha256), unpacked)
    assert sorted(path.name for path in unpacked.rglob("*") if path.is_file()) == ["a.php", "index.php"]
    assert rig.leftovers() == []


async def test_a_branch_can_be_chosen(rig: Rig, tmp_path: Path) -> None:
    site = tmp_path / "site"
    await make_repository(site, FILES)
    await run_git("checkout", "--quiet", "-b", "next", cwd=site)
    made = await commit(site, {"index.php": "<?php echo 2;"}, "Second thoughts")

    view = await rig.store.checkout("svc-a", f"file://{site}", "next", ACTOR)

    assert view.description.endswith(f"/site next at {made[:7]}: Second thoughts")


async def test_equal_trees_of_different_commits_share_a_blob(rig: Rig, tmp_path: Path) -> None:
    for name in ("one", "two"):
        await make_repository(tmp_path / name, FILES)
        await commit(tmp_path / name, {"index.php": f"<?php // {name}"})
        await commit(tmp_path / name, FILES, f"Back to {name}")

    views = [await rig.store.checkout("svc-a", f"file://{tmp_path}/{name}", "", ACTOR) for name in ("one", "two")]

    assert len({view.filename for view in views}) == 2
    assert len({view.sha256 for view in views}) == 1


async def test_over_the_network_too(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await make_repository(tmp_path / "served" / "site", FILES)
    rig.store._settings = rig.settings.model_copy(update={"git_allow_private": True})

    async with daemon(tmp_path / "served") as port:
        view = await rig.store.checkout("svc-a", f"git://127.0.0.1:{port}/site", "main", ACTOR)
        with pytest.raises(BadInputError, match="cannot fetch git://127"):
            await rig.store.checkout("svc-a", f"git://127.0.0.1:{port}/nothing", "", ACTOR)

    assert view.filename.startswith("git-")


@asynccontextmanager
async def daemon(directory: Path) -> AsyncIterator[int]:
    port = free_port()
    argv = ["git", "daemon", "--listen=127.0.0.1", f"--port={port}", "--export-all", f"--base-path={directory}"]

    async def answers() -> bool | None:
        with socket.socket() as client:
            return True if client.connect_ex(("127.0.0.1", port)) == 0 else None

    async with run.pipe([*argv, "--reuseaddr", str(directory)], env=GIT_ENVIRONMENT):
        await wait_for(answers, timeout_s=45, what="git daemon", clock=SYSTEM_CLOCK)
        yield port


@pytest.mark.parametrize(
    "url",
    [
        "",
        "site",
        "/etc",
        "../site",
        "-u evil",
        "--upload-pack=touch evil",
        "ext::sh -c touch% evil",
        "ext::https://example.org/a",
        "https:example.org/a",
        "https://",
        "https:///site.git",
        "https://example.org",
        "https://example.org/",
        "https://-oProxyCommand=evil/a",
        "ssh://-oProxyCommand=evil/a",
        "ssh://-oProxyCommand=evil@example.org/a",
        "ftp://example.org/a",
        "git@example.org:a.git",
        "https://example.org:port/a",
        "https://example.org:0/a",
        "https://[::1/a",
        "https://example.org/a\n--upload-pack=evil",
        "https://example.org/a b",
        "https://exa\x00mple.org/a",
        "file:///etc",
        "FILE:///etc",
        "x" * 1000,
        "https://🎉/\u202e",
    ],
)
async def test_what_is_no_address_of_a_repository_is_refused(url: str, tmp_path: Path) -> None:
    async def fetch() -> None:
        source = git.parse(url, "", Allowed())
        await git.clone(source, tmp_path / "target.git", allowed=Allowed(), limit_bytes=1_000_000)

    with pytest.raises(BadInputError) as caught:
        await fetch()

    assert caught.value.hint
    assert not (tmp_path / "target.git").exists()


@pytest.mark.parametrize("branch", ["-x", "--upload-pack=evil", "a b", "a\nb", "a:b", "a..\x00", "x" * 201])
def test_what_is_no_branch_is_refused(branch: str) -> None:
    with pytest.raises(BadInputError, match="not the name of a branch"):
        git.parse("https://example.org/a", branch, Allowed())


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "10.1.2.3", "192.168.0.1", "169.254.169.254", "0.0.0.0"),
        *("[::1]", "[::ffff:127.0.0.1]", "[fe80::1]", "[fc00::1]", "2130706433", "127.1", "0x7f000001"),
    ],
)
@pytest.mark.parametrize("scheme", git.SCHEMES)
async def test_private_addresses_are_refused_unless_a_setting_allows_them(
    scheme: str, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    source = git.parse(f"{scheme}://{host}/a.git", "", Allowed())

    with pytest.raises((ForbiddenError, BadInputError), match=r"is not a public address|there is no host"):
        await git.clone(source, tmp_path / "target.git", allowed=Allowed(), limit_bytes=1_000_000)


async def test_a_public_name_is_pinned_to_the_address_that_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    async def public(host: str, port: int) -> str:
        return "192.0.2.7"

    monkeypatch.setattr(git, "_public_address", public)
    monkeypatch.setattr(git, "_proxied", lambda scheme: False)

    _, options, _ = await git._pinned(git.parse("https://example.org/a.git", "", Allowed()), Allowed())
    assert "http.curloptResolve=example.org:443:192.0.2.7" in options
    assert "http.followRedirects=false" in options
    url, _, _ = await git._pinned(git.parse("git://example.org/a.git", "", Allowed()), Allowed())
    assert url == "git://192.0.2.7:9418/a.git"
    _, _, ssh = await git._pinned(git.parse("ssh://me@example.org/a.git", "", Allowed()), Allowed())
    assert ssh == ["-o", "HostName=192.0.2.7"]


async def test_a_password_in_an_address_is_never_shown(rig: Rig, tmp_path: Path) -> None:
    await make_repository(tmp_path / "site", FILES)

    view = await rig.store.checkout("svc-a", f"file://me:hunter2@localhost{tmp_path}/site", "", ACTOR)
    assert "hunter2" not in view.model_dump_json()
    for url in (f"file://me:hunter2@localhost{tmp_path}/none", "gopher://me:hunter2@localhost/x"):
        with pytest.raises(BadInputError) as caught:
            await rig.store.checkout("svc-a", url, "", ACTOR)
        assert "hunter2" not in str(caught.value.problem())


@pytest.mark.parametrize(
    ("name", "branch", "words"),
    [("none", "", "cannot fetch"), ("site", "nowhere", "nowhere"), ("empty", "", "has no commits")],
)
async def test_what_cannot_be_fetched_says_why_and_leaves_nothing(
    rig: Rig, tmp_path: Path, name: str, branch: str, words: str
) -> None:
    await make_repository(tmp_path / "site", FILES)
    (tmp_path / "empty").mkdir()
    await run_git("init", "--quiet", cwd=tmp_path / "empty")

    with pytest.raises(BadInputError, match=words) as caught:
        await rig.store.checkout("svc-a", f"file://{tmp_path}/{name}", branch, ACTOR)

    assert caught.value.hint
    assert rig.leftovers() == []
    assert len(await rig.store.list("svc-a")) == 1


async def test_links_and_submodules_are_refused(rig: Rig, tmp_path: Path) -> None:
    await make_repository(tmp_path / "linked", FILES)
    (tmp_path / "linked" / "evil").symlink_to("/etc/passwd")
    await commit(tmp_path / "linked", {})
    made = await make_repository(tmp_path / "super", FILES)
    await run_git("update-index", "--add", "--cacheinfo", f"160000,{made},sub", cwd=tmp_path / "super")
    await run_git("commit", "--quiet", "-m", "sub", cwd=tmp_path / "super")

    with pytest.raises(BadArchiveError, match="'evil' is a symbolic link"):
        await rig.store.checkout("svc-a", f"file://{tmp_path}/linked", "", ACTOR)
    with pytest.raises(BadArchiveError, match="'sub' is a submodule"):
        await rig.store.checkout("svc-a", f"file://{tmp_path}/super", "", ACTOR)
    assert rig.leftovers() == []


async def test_a_repository_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    site = tmp_path / "site"
    await make_repository(site, FILES)
    (site / "noise").write_bytes(random.Random(1).randbytes(3_000_000))
    await commit(site, {})
    allowed = Allowed(file=True)
    source = git.parse(f"file://{site}", "", allowed)

    with pytest.raises(TooLargeError, match="larger than 976"):
        await git.clone(source, tmp_path / "target.git", allowed=allowed, limit_bytes=1_000_000)


async def test_a_bomb_is_seen_before_it_is_unpacked(tmp_path: Path) -> None:
    site = tmp_path / "site"
    await make_repository(site, {"zeros": "0" * 3_000_000})
    allowed = Allowed(file=True)
    repository = tmp_path / "target.git"
    made = await git.clone(git.parse(f"file://{site}", "", allowed), repository, allowed=allowed, limit_bytes=1_000_000)

    with pytest.raises(TooLargeError, match="larger than 1M"):
        await git.export(repository, made, tmp_path / "tree", archive.Limits(bytes=1 << 20))
    with pytest.raises(TooLargeError, match="more than 0 files"):
        await git.export(repository, made, tmp_path / "tree", archive.Limits(files=0))
    assert not (tmp_path / "tree").exists()


async def test_many_files_with_odd_names_are_all_there(tmp_path: Path) -> None:
    names = [f"d{number % 7}/{number} 🎉 'x'\n" for number in range(500)]
    await make_repository(tmp_path / "site", dict.fromkeys(names, "x"))
    repository = tmp_path / "site" / ".git"
    made = await git.head(repository)
    assert made is not None

    await git.export(repository, made, tmp_path / "tree", archive.DEFAULT_LIMITS)

    found = {str(path.relative_to(tmp_path / "tree")) for path in (tmp_path / "tree").rglob("*") if path.is_file()}
    assert found == set(names)


async def test_hooks_and_filters_of_a_repository_do_not_run(rig: Rig, tmp_path: Path) -> None:
    site = tmp_path / "site"
    await make_repository(site, {**FILES, ".gitattributes": "* filter=evil\n"})
    for name in ("post-checkout", "post-index-change", "reference-transaction"):
        hook = site / ".git" / "hooks" / name
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        hook.chmod(0o755)

    await rig.store.checkout("svc-a", f"file://{site}", "", ACTOR)

    assert not (tmp_path / "ran").exists()


async def test_a_repository_of_ours_is_made_once_and_collected_when_large(tmp_path: Path) -> None:
    repositories = git.Repositories(tmp_path / "git", 200_000)
    path = await repositories.open("svc-a")
    assert await repositories.open("svc-a") == path
    assert await git.head(path) is None
    await repositories.make_room(path)

    (path / "large").write_bytes(bytes(300_000))
    with pytest.raises(TooLargeError, match=r"larger than 195\.3K"):
        await repositories.make_room(path)

    repositories.remove("svc-a")
    repositories.remove("svc-a")
    assert not path.exists()


async def test_the_number_of_versions_is_limited_for_checkouts_too(rig: Rig, tmp_path: Path) -> None:
    rig.store._settings = rig.settings.model_copy(update={"limits": Limits(code_versions=1)})

    with pytest.raises(ConflictError, match="is the limit"):
        await rig.store.checkout("svc-a", f"file://{tmp_path}/none", "", ACTOR)

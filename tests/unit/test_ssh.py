"""`git push` to the director: real git, real ssh, and everything that is neither."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import asyncssh
import pytest
from sqlalchemy import select

from conpaas.core import archive, run
from conpaas.core.errors import BadInputError, ConflictError
from conpaas.director import ssh
from conpaas.director.db.models import SshKey, User
from conpaas.director.git import Repositories
from conpaas.director.settings import Limits
from tests.fakes.code_rig import Rig, commit, git, make_repository, open_rig

HOST = "127.0.0.1"
FILES = {"index.php": "<?php echo 1;"}


@dataclass
class Served:
    """A director's SSH port, and a user's machine."""

    rig: Rig
    port: int
    home: Path
    site: Path

    async def push(
        self, *arguments: str, to: str = "blog", key: str = "alice", env: Mapping[str, str] | None = None
    ) -> run.Completed:
        url = f"ssh://git@{HOST}:{self.port}/{to}.git"
        environment = {"GIT_SSH_COMMAND": self.ssh(key), **(env or {})}
        return await git("push", *arguments, url, "HEAD:main", cwd=self.site, env=environment, check=False)

    def ssh(self, key: str) -> str:
        options = "-F /dev/null -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        return f"ssh {options} -o LogLevel=ERROR -o IdentitiesOnly=yes -i {self.home}/{key}"

    async def versions(self, service: str = "svc-a") -> list[str]:
        return [view.id for view in await self.rig.store.list(service)]


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    async with open_rig(tmp_path, monkeypatch, Limits(upload_bytes=1_000_000, code_versions=10)) as rig:
        home = tmp_path / "home"
        home.mkdir()
        await rig.add_user("usr-b")
        await rig.add_service("svc-b", user="usr-b", name="bobs")
        for name, user in (("alice", "usr-a"), ("bob", "usr-b"), ("mallory", "")):
            key = asyncssh.generate_private_key("ssh-ed25519")
            key.write_private_key(str(home / name))
            (home / name).chmod(0o600)
            if user:
                await rig.add_key(user, key.export_public_key().decode(), key.get_fingerprint())
        await make_repository(tmp_path / "site", FILES)
        async with ssh.serve(rig.settings, rig.db, rig.store, rig.activate, host=HOST, port=0) as port:
            yield Served(rig, port, home, tmp_path / "site")


async def test_a_push_becomes_a_code_version_and_says_which(served: Served) -> None:
    done = await served.push()

    version, default = await served.versions()
    assert done.returncode == 0, done.stderr
    assert f"is code version {version} of 'blog'".encode() in done.stderr
    assert default == "code-default"
    view = await served.rig.store.get("svc-a", version)
    assert archive.check(served.rig.store.path(view.sha256)).files == 1
    assert (view.description.endswith("First light"), served.rig.activated) == (True, [])
    assert served.rig.leftovers() == []


async def test_a_push_with_the_option_activates_it(served: Served) -> None:
    done = await served.push("-o", "activate")

    version, _ = await served.versions()
    assert done.returncode == 0, done.stderr
    assert served.rig.activated == [("svc-a", version, "user:usr-a")]
    assert b"is being activated" in done.stderr


async def test_an_option_of_another_name_activates_nothing(served: Served) -> None:
    done = await served.push("-o", "deactivate", "-o", "x\\activate", env={"GIT_PUSH_OPTION_0": "activate"})

    assert done.returncode == 0, done.stderr
    assert served.rig.activated == []


async def test_each_push_of_something_new_is_a_version_and_one_of_nothing_is_none(served: Served) -> None:
    await served.push()
    await served.push()
    assert len(await served.versions()) == 2
    await commit(served.site, {"index.php": "<?php echo 2;"})
    await served.push()
    assert len(await served.versions()) == 3

    newest, *_ = await served.versions()
    assert f"was code version {newest} already".encode() in (await served.push()).stderr


async def test_what_was_pushed_before_a_crash_becomes_a_version_with_the_next_push(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(*_: object) -> None:
        raise ConflictError("the director died here")

    with monkeypatch.context() as patch:
        patch.setattr(served.rig.store, "push", crash)
        done = await served.push()
        assert (done.returncode != 0, b"the director died here" in done.stderr) == (True, True)
    assert await served.versions() == ["code-default"]

    done = await served.push()
    assert (done.returncode, len(await served.versions())) == (0, 2)


async def test_a_service_is_named_by_its_id_too_and_what_is_there_can_be_fetched(served: Served) -> None:
    assert (await served.push(to="svc-a")).returncode == 0

    url = f"ssh://git@{HOST}:{served.port}/svc-a.git"
    await git("clone", url, "copy", cwd=served.home, env={"GIT_SSH_COMMAND": served.ssh("alice")})
    assert (served.home / "copy" / "index.php").read_text() == FILES["index.php"]


async def test_the_first_branch_of_another_name_is_the_default_one(served: Served) -> None:
    url = f"ssh://git@{HOST}:{served.port}/blog.git"
    environment = {"GIT_SSH_COMMAND": served.ssh("alice")}
    await git("push", url, "HEAD:master", cwd=served.site, env=environment)
    assert len(await served.versions()) == 2

    await commit(served.site, {"index.php": "<?php echo 2;"})
    await git("push", url, "HEAD:feature", cwd=served.site, env=environment)
    assert len(await served.versions()) == 2


async def test_others_services_do_not_exist(served: Served) -> None:
    for to in ("bobs", "svc-b", "nothing", "../svc-b", "", "x" * 5000, "'; touch x; '", "🎉"):
        done = await served.push(to=to)
        assert done.returncode != 0
        assert b"you have no service" in done.stderr, to
    assert await served.versions("svc-b") == ["code-default"]
    assert not served.rig.store.repositories.path("svc-b").exists()


async def test_two_services_of_one_name_are_told_apart_by_id(served: Served) -> None:
    await served.rig.add_service("svc-c", name="blog")

    done = await served.push()
    assert b"you have 2 services called 'blog'" in done.stderr
    assert (await served.push(to="svc-c")).returncode == 0
    assert len(await served.versions("svc-c")) == 2


async def test_strange_keys_and_names_are_turned_away(served: Served) -> None:
    done = await served.push(key="mallory")
    assert b"Permission denied" in done.stderr

    for user, key, password in (("root", "alice", None), ("git", None, "x"), ("", "alice", None)):
        with pytest.raises((asyncssh.PermissionDenied, asyncssh.ConnectionLost)):
            await connect(served, user=user, key=key, password=password)
    assert await served.versions() == ["code-default"]


async def connect(
    served: Served, *, user: str = "git", key: str | None = "alice", password: str | None = None
) -> asyncssh.SSHClientConnection:
    return await asyncssh.connect(
        HOST,
        served.port,
        username=user,
        client_keys=[] if key is None else [str(served.home / key)],
        password=password,
        known_hosts=None,
        config=[],
        agent_path=None,
    )


@pytest.mark.parametrize(
    "command",
    [
        *(None, "sh", "git-receive-pack", "git-shell -c x", "scp -t /etc", "\x00\xff"),
        *("git-upload-archive 'blog.git'", "git-receive-pack 'a' 'b'"),
        *("git-receive-pack 'unclosed", "git-receive-pack blog.git; id"),
    ],
)
async def test_nothing_but_git_is_served(served: Served, command: str | None) -> None:
    async with await connect(served) as connection:
        done = await connection.run(command, stdin=asyncssh.DEVNULL)

    assert done.exit_status == 1
    assert "hint:" in str(done.stderr)


async def test_no_shell_no_forwarding_no_files(served: Served) -> None:
    async with await connect(served) as connection:
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.open_connection(HOST, served.port)
        with pytest.raises(asyncssh.ChannelListenError):
            await connection.forward_remote_port(HOST, 0, HOST, 1)
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.start_sftp_client()


async def test_one_who_hangs_up_in_the_middle_leaves_no_process_and_no_version(served: Served) -> None:
    connection = await connect(served)
    process = await connection.create_process("git-receive-pack 'blog.git'", encoding=None)
    await process.stdout.readuntil(b"capabilities^{}")
    connection.abort()
    await connection.wait_closed()

    assert (await served.push()).returncode == 0
    assert len(await served.versions()) == 2


async def test_rubbish_in_the_middle_of_a_push_is_git_s_to_refuse(served: Served) -> None:
    async with await connect(served) as connection:
        done = await connection.run("git-receive-pack 'blog.git'", input=os.urandom(100_000), encoding=None)

    assert done.exit_status != 0
    assert (await served.push()).returncode == 0


async def test_a_push_larger_than_the_limit_is_refused_and_a_bad_tree_makes_no_version(served: Served) -> None:
    (served.site / "noise").write_bytes(os.urandom(1_500_000))
    await commit(served.site, {})
    done = await served.push()
    assert (done.returncode != 0, await served.versions()) == (True, ["code-default"])

    await git("reset", "--quiet", "--hard", "HEAD^", cwd=served.site)
    (served.site / "evil").symlink_to("/etc/passwd")
    await commit(served.site, {})
    done = await served.push()
    assert b"'evil' is a symbolic link" in done.stderr
    assert await served.versions() == ["code-default"]
    assert served.rig.leftovers() == []


async def test_silence_garbage_and_port_scans_hurt_nobody(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for rubbish in (
            None,
            b"GET / HTTP/1.1\r\n\r\n",
            os.urandom(10_000),
            b"SSH-2.0-x\r\n" + bytes(9000),
            b"\n" * 9000,
        ):
            client = stack.enter_context(socket.create_connection((HOST, served.port)))
            if rubbish is not None:
                with contextlib.suppress(OSError):
                    client.sendall(rubbish)
        for _ in range(20):
            socket.create_connection((HOST, served.port)).close()

        assert (await served.push()).returncode == 0


async def test_too_many_connections_are_turned_away_and_come_back_later(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "CONNECTIONS", 1)
    async with await connect(served):
        with pytest.raises((asyncssh.Error, OSError)):
            await connect(served)

    async with asyncio.timeout(45):
        while (await served.push()).returncode != 0:  # the server may not have noticed the end yet
            pass


async def test_a_silent_connection_is_ended_after_the_login_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "LOGIN_TIMEOUT_S", 0.1)
    async with (
        open_rig(tmp_path, monkeypatch) as rig,
        ssh.serve(rig.settings, rig.db, rig.store, rig.activate, host=HOST, port=0) as port,
        asyncio.timeout(45),
    ):
        reader, writer = await asyncio.open_connection(HOST, port)
        assert (await reader.read()).startswith(b"SSH-2.0-ConPaaS")
        writer.close()
        await writer.wait_closed()


async def test_a_removed_key_and_one_of_a_disabled_user_are_strange(served: Served) -> None:
    async with served.rig.db.write() as session:
        (await session.scalars(select(User).where(User.id == "usr-a"))).one().disabled = True
        await session.delete((await session.scalars(select(SshKey).where(SshKey.user_id == "usr-b"))).one())

    for key, to in (("alice", "blog"), ("bob", "bobs")):
        assert b"Permission denied" in (await served.push(key=key, to=to)).stderr


async def test_the_server_keeps_its_key_and_says_when_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_rig(tmp_path, monkeypatch) as rig:
        path = rig.settings.data_dir / "ssh_host_key"
        keys = []
        for _ in range(2):
            async with ssh.serve(rig.settings, rig.db, rig.store, rig.activate, host=HOST, port=0) as port:
                keys.append(await asyncssh.get_server_host_key(HOST, port, config=[]))
        assert keys[0] == keys[1] is not None
        assert path.stat().st_mode & 0o777 == 0o600

        path.write_text("rubbish")
        with pytest.raises(BadInputError, match="is not a private key"):
            async with ssh.serve(rig.settings, rig.db, rig.store, rig.activate, host=HOST, port=0):
                pass


async def test_a_port_that_is_taken_is_an_expected_error(served: Served) -> None:
    rig = served.rig
    with pytest.raises(ConflictError, match="cannot listen on 127"):
        async with ssh.serve(rig.settings, rig.db, rig.store, rig.activate, host=HOST, port=served.port):
            pass


async def test_stopping_ends_what_is_under_way(tmp_path: Path, served: Served) -> None:
    repositories = Repositories(tmp_path / "data" / "git", 1_000_000)
    rig = served.rig
    async with asyncio.timeout(45):
        async with ssh.serve(rig.settings, rig.db, rig.store, rig.activate, host=HOST, port=0) as port:
            connection = await connect(Served(rig, port, served.home, served.site))
            process = await connection.create_process("git-receive-pack 'blog.git'", encoding=None)
            assert await process.stdout.read(10)
        await connection.wait_closed()
    assert repositories.services() == {"svc-a"}

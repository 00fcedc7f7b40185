"""Code by git, with real tools: pushed over SSH to the director, and fetched by it over HTTP."""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from aiohttp import web

from conpaas.core import run
from conpaas.core.messages.model import ServiceView
from tests.fakes.code_rig import GIT_ENVIRONMENT, commit, git, make_repository
from tests.fakes.load import Load, fetch
from tests.fakes.stand import Stand, stand

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not all(map(run.find, ("haproxy", "git", "ssh"))), reason="engines, git or ssh are missing"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def here() -> AsyncIterator[Stand]:
    """A deployment that may fetch code from this machine."""
    async with stand(CONPAAS_GIT_ALLOW_PRIVATE="true", no_proxy="127.0.0.1") as one:
        yield one


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def blog(here: Stand) -> ServiceView:
    service = await here.client.create(type="php", name="blog")
    await here.client.start(service.id, wait=True)
    return await here.running(service.id, 1)


async def page(here: Stand, service: str, path: str = "/") -> bytes:
    url = urlsplit((await here.client.service(service)).urls["application"])
    return (await fetch(url.hostname or "", url.port or 0, path)).body


async def conpaas(here: Stand, *words: str, home: Path) -> run.Completed:
    """Run the command line, logged in as the stand's administrator."""
    token = (await here.client.create_token("cli")).secret
    assert token is not None
    env = {
        **os.environ,
        "XDG_CONFIG_HOME": str(home),
        "CONPAAS_URL": here.url,
        "CONPAAS_TOKEN": token.get_secret_value(),
    }
    return await run.run([sys.executable, "-m", "conpaas", *words], timeout_s=120, env=env, check=False)


async def test_a_push_becomes_a_version_and_with_an_option_the_site(
    here: Stand, blog: ServiceView, tmp_path: Path
) -> None:
    key = tmp_path / "id_ed25519"
    make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "ada@laptop", "-f", str(key)]
    await run.run(make, timeout_s=60)
    port = (await here.client.version()).ssh_port
    url = f"ssh://git@127.0.0.1:{port}/blog.git"
    options = "-F /dev/null -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    env = {"GIT_SSH_COMMAND": f"ssh {options} -o LogLevel=ERROR -o IdentitiesOnly=yes -i {key}"}
    tree = tmp_path / "site"
    await make_repository(tree, {"index.php": "<?php echo 'pushed ', 1;"})

    refused = await git("push", url, "main", cwd=tree, env=env, check=False)
    assert refused.returncode != 0  # nobody knows this key
    assert b"Permission denied" in refused.stderr

    added = await conpaas(here, "key", "add", f"{key}.pub", "--name", "laptop", home=tmp_path)
    assert added.returncode == 0, added.stderr
    pushed = await git("push", url, "main", cwd=tree, env=env)
    versions = await here.client.code(blog.id)
    assert versions[0].id.encode() in pushed.stderr
    assert [version.active for version in versions] == [False, True]
    assert b"pushed" not in await page(here, blog.id)

    await commit(tree, {"index.php": "<?php echo 'pushed ', 2;"}, "Second thoughts")
    site = urlsplit(blog.urls["application"])
    async with Load(site.hostname or "", site.port or 0, clients=2) as load:
        pushed = await git("push", "-o", "activate", url, "main", cwd=tree, env=env)
        view = await here.running(blog.id, 1)
    assert load.failures == []
    newest = (await here.client.code(blog.id))[0]
    assert b"is being activated" in pushed.stderr
    assert newest.active
    assert view.wanted.code == newest.id
    assert "Second thoughts" in newest.description
    assert await page(here, blog.id) == b"pushed 2"
    operations = (await here.client.operations(service=blog.id)).items
    assert [one.kind for one in operations if one.kind == "activate"] == ["activate"]
    actors = {event.actor for event in (await here.client.history(service=blog.id)).items}
    assert actors <= {"user:admin", "director", f"manager:{blog.id}"}, actors

    cloned = await git("clone", url, "clone", cwd=tmp_path, env=env)
    assert (tmp_path / "clone/index.php").read_text().endswith("2;"), cloned
    await here.client.delete_key((await here.client.keys())[0].id)
    assert (await git("fetch", url, cwd=tree, env=env, check=False)).returncode != 0


@asynccontextmanager
async def http_server(directory: Path) -> AsyncIterator[str]:
    """Serve the repositories of a folder as web servers do, by `git http-backend`; give the URL of the folder."""

    async def backend(request: web.Request) -> web.Response:
        env = {
            **GIT_ENVIRONMENT,
            "GIT_PROJECT_ROOT": str(directory),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": request.method,
            "PATH_INFO": request.path,
            "QUERY_STRING": request.query_string,
            "CONTENT_TYPE": request.headers.get("Content-Type", ""),
            "HTTP_CONTENT_ENCODING": request.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": request.headers.get("Git-Protocol", ""),
        }
        words = await request.read()
        async with run.pipe(["git", "http-backend"], env=env) as process:
            answer, _ = await process.communicate(words)
        head, _, body = answer.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        status = int(headers.pop("Status", "200").split()[0])
        return web.Response(status=status, headers=headers, body=body)

    app = web.Application(client_max_size=1 << 20, handler_args={"auto_decompress": False})
    app.router.add_route("*", "/{path:.*}", backend)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_a_repository_is_checked_out_over_http_and_activated(
    here: Stand, blog: ServiceView, tmp_path: Path
) -> None:
    served = tmp_path / "served"
    await make_repository(served / "site", {"index.php": "<?php echo 'fetched';", "a/b.css": "body{}"})
    await git("branch", "draft", cwd=served / "site")
    known = len(await here.client.code(blog.id))

    async with http_server(served) as url:
        done = await conpaas(here, "checkout", "blog", f"{url}/site", "--activate", home=tmp_path)
        assert done.returncode == 0, done.stderr
        assert await page(here, blog.id) == b"fetched"
        assert await page(here, blog.id, "/a/b.css") == b"body{}"
        done = await conpaas(here, "checkout", "blog", f"{url}/site", "--branch", "draft", home=tmp_path)
        assert done.returncode == 0, done.stderr
        for words in ([f"{url}/nothing"], [f"{url}/site", "--branch", "nothing"], ["file:///etc"], [f"{url}/"]):
            done = await conpaas(here, "checkout", "blog", *words, home=tmp_path)
            assert done.returncode == 1, words
            assert b"hint:" in done.stderr.lower(), done.stderr
    done = await conpaas(here, "checkout", "blog", f"{url}/site", home=tmp_path)  # nobody is there any more
    assert done.returncode == 1
    assert b"cannot fetch" in done.stderr

    versions = await here.client.code(blog.id)
    assert len(versions) == known + 2
    assert list((here.data / "blobs" / "incoming").iterdir()) == []
    done = await conpaas(here, "rollback", "blog", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (await page(here, blog.id)) != b"fetched"

"""PHP applications that nobody here wrote, as their authors ship them, on nodes of their own for each role.

What these tests show of state: a session is everywhere; a file that an application writes beside its code is on the
node that wrote it, and nowhere else. Such an application keeps its files to itself on one `php` node, or keeps them in
a service that is made for data.
"""

import hashlib
import re
import shutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

import aiohttp
import pytest
import pytest_asyncio
from yarl import URL

from conpaas.core.messages.model import NodeView, ServiceView
from conpaas.core.run import find
from conpaas.services.php.messages import PHP_PORT, WEB_PORT
from tests.fakes.load import Load, Reply, fetch
from tests.fakes.stand import Stand, agents, stand

ADMINER, DOKUWIKI = Path("/usr/share/adminer"), Path("/usr/share/dokuwiki")
DATA_FOLDERS = ("attic", "cache", "index", "locks", "log", "media", "media_attic", "media_meta", "meta", "pages", "tmp")
PASSWORD = "a wiki's password"
Place: TypeAlias = tuple[str, int]

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(find("haproxy") is None, reason="the engines of php are not installed"),
]


@dataclass
class Visitor:
    """A browser of one site, as far as it matters; it may ask a backend as the site's proxy would."""

    site: Place
    cookies: dict[str, str] = field(default_factory=dict)

    async def get(self, place: Place, path: str) -> Reply:
        return await self._ask("GET", place, path, None)

    async def post(self, place: Place, path: str, form: Mapping[str, str]) -> Reply:
        return await self._ask("POST", place, path, form)

    async def _ask(self, method: str, place: Place, path: str, form: Mapping[str, str] | None) -> Reply:
        url = URL(f"http://{place[0]}:{place[1]}{path}", encoded=True)
        cookies = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        headers = {"Host": f"{self.site[0]}:{self.site[1]}", "Cookie": cookies}
        async with (
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session,
            session.request(method, url, data=form, headers=headers, allow_redirects=False) as answer,
        ):
            for line in answer.headers.getall("Set-Cookie", []):
                name, _, value = line.partition(";")[0].partition("=")
                self.cookies[name] = value
            found = {name.lower(): value for name, value in answer.headers.items()}
            return Reply(answer.status, found, await answer.read(), 0.0)


@dataclass
class Site:
    """A service that runs on a proxy, a web node and two PHP nodes."""

    here: Stand
    view: ServiceView

    @property
    def place(self) -> Place:
        url = urlsplit(self.view.urls["application"])
        return url.hostname or "", url.port or 0

    @property
    def backends(self) -> list[Place]:
        """The PHP nodes themselves: what the proxy chooses between."""
        return [(node.address, PHP_PORT) for node in self.nodes("php")]

    def nodes(self, role: str) -> list[NodeView]:
        return [node for node in agents(self.view) if node.roles == (role,)]

    async def deploy(self, tree: Path) -> None:
        client = self.here.client
        version = await client.upload(self.view.id, tree, description=f"{tree.name}, unmodified")
        await client.activate(self.view.id, version.id, wait=True)

    async def asked_of_web(self) -> int:
        """Return how many requests the web node has had so far, as it counts them itself."""
        counters = await fetch(self.nodes("web")[0].address, WEB_PORT, "/__conpaas/nginx")
        return int(counters.body.split()[9])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site() -> AsyncIterator[Site]:
    async with stand() as here:
        service = await here.client.create(type="php", name="site")
        await here.client.start(service.id, wait=True)
        await here.client.scale(service.id, {"web": 1, "php": 2}, wait=True)
        view = await here.running(service.id, 4)
        assert sorted(node.roles for node in agents(view)) == [("php",), ("php",), ("proxy",), ("web",)]
        yield Site(here, view)


def unpacked(source: Path, target: Path) -> Path:
    """Copy what a distribution has spread over the machine back into one folder, with files in the place of links."""
    shutil.copytree(source, target, ignore=_left_out, ignore_dangling_symlinks=True)
    return target


def _left_out(folder: str, names: list[str]) -> list[str]:
    """Leave out what we may not read, and all languages but English: DokuWiki's download page offers that, too."""
    paths = [(name, Path(folder, name)) for name in names]
    unreadable = {name for name, path in paths if not path.exists() or not path.stat().st_mode & 0o004}
    foreign = {name for name, path in paths if path.parent.name == "lang" and path.is_dir() and name != "en"}
    return [*unreadable | foreign]


@pytest.mark.skipif(not ADMINER.is_dir(), reason="adminer is not installed")
async def test_adminer_keeps_its_user_logged_in_over_all_backends(site: Site, tmp_path: Path) -> None:
    await site.deploy(unpacked(ADMINER, tmp_path / "adminer"))
    place, page = site.place, "/adminer/sqlite.php"
    visitor = Visitor(site.place)

    login = await visitor.get(place, page)
    assert b"Login - Adminer" in login.body
    for path, kind in (
        ("/adminer/static/default.css", "text/css"),
        ("/adminer/static/functions.js", "application/javascript"),
        ("/externals/jush/jush.css", "text/css"),
    ):
        reply = await fetch(*place, path)
        assert (reply.status, reply.headers["content-type"].partition(";")[0]) == (200, kind)
        assert reply.body == (ADMINER / path.lstrip("/")).read_bytes()

    before = await site.asked_of_web()
    for _ in range(100):
        await fetch(*place, "/adminer/static/default.css")
    assert await site.asked_of_web() >= before + 100

    form = {"driver": "sqlite", "server": "", "username": "", "password": "YOUR_PASSWORD_HERE", "db": ""}
    words = {f"auth[{name}]": value for name, value in form.items()}
    entered = await visitor.post(place, page, words)
    assert entered.status == 302, entered.body
    inside = f"{page}?sqlite=&username="
    for backend in (*site.backends, place, place):
        assert b'id="logout"' in (await visitor.get(backend, inside)).body
    assert b'id="logout"' not in (await Visitor(site.place).get(place, inside)).body

    first, second = site.backends
    create = f"{inside}&database="
    asked = await visitor.get(first, create)
    token = re.findall(rb"name=.token. value=.(\d+:\d+).", asked.body)[-1].decode()
    made = await visitor.post(second, create, {"name": "new.sqlite", "collation": "", "token": token})
    assert made.status == 302, made.body  # the token of one backend counts at the other
    there = f"/adminer/{made.headers['location']}"
    told = (await visitor.get(first, there)).body
    assert b"Database has been created" in told
    assert b"Invalid database" in told
    assert b"Invalid database" not in (await visitor.get(second, there)).body  # a file is where it was written


@pytest.mark.skipif(not DOKUWIKI.is_dir(), reason="dokuwiki is not installed")
async def test_dokuwiki_is_logged_in_to_and_written_to(site: Site, tmp_path: Path) -> None:
    await site.deploy(dokuwiki(tmp_path))
    place, visitor = site.place, Visitor(site.place)
    start = await visitor.get(place, "/doku.php")
    assert start.status == 200, start.body
    assert b"This topic does not exist yet" in start.body
    assert (await visitor.get(place, "/lib/exe/css.php")).headers["content-type"].startswith("text/css")
    assert (await visitor.get(place, "/lib/exe/js.php")).headers["content-type"].startswith("application/javascript")
    picture = "/lib/images/license/button/cc-by-sa.png"
    assert (await visitor.get(place, picture)).body == (DOKUWIKI / picture.lstrip("/")).read_bytes()
    for secret in ("/conf/users.auth.php", "/data/pages/start.txt", "/data/meta/_htcookiesalt", "/inc/init.php.bak"):
        assert (await visitor.get(place, secret)).status in {403, 404}, secret

    fields = hidden((await visitor.get(place, "/doku.php?id=start&do=login")).body)
    entered = await visitor.post(place, "/doku.php?id=start", {**fields, "do": "login", "u": "ada", "p": PASSWORD})
    assert entered.status == 302, entered.body
    for backend in (*site.backends, place, place):
        assert b"Logged in as" in (await visitor.get(backend, "/doku.php?id=start")).body
    assert b"Logged in as" not in (await Visitor(site.place).get(place, "/doku.php?id=start")).body

    first, second = site.backends
    form = hidden((await visitor.get(first, "/doku.php?id=start&do=edit")).body)
    form |= {"wikitext": "Hello from **the test**", "do[save]": "Save", "summary": "first"}
    saved = await visitor.post(first, "/doku.php", form)
    assert saved.status == 302, saved.body
    assert b"Hello from <strong>the test</strong>" in (await visitor.get(first, "/doku.php?id=start")).body
    assert b"This topic does not exist yet" in (await visitor.get(second, "/doku.php?id=start")).body

    # On one php node everybody finds what was written there: the node that stays is the one made first.
    async with Load(*place, paths=("/doku.php?id=wiki:none", picture), clients=2) as load:
        await site.here.client.scale(site.view.id, {"php": -1}, wait=True)
    assert load.failures == []
    for _ in range(4):
        assert b"Hello from <strong>the test</strong>" in (await visitor.get(place, "/doku.php?id=start")).body
    await site.here.client.scale(site.view.id, {"php": 1}, wait=True)
    site.view = await site.here.running(site.view.id, 4)


def hidden(page: bytes) -> dict[str, str]:
    """Return the hidden fields of a page's last form with a security token."""
    fields = re.findall(rb'<input type="hidden" name="(\w+)" value="([^"]*)"', page)
    assert fields, page
    return {name.decode(): value.decode() for name, value in fields}


def dokuwiki(folder: Path) -> Path:
    """Return what an administrator uploads who has unpacked DokuWiki and run its installer."""
    tree = unpacked(DOKUWIKI, folder / "dokuwiki")
    (tree / "inc/preload.php").unlink()  # Debian's way out of the folder
    conf = unpacked(Path("/etc/dokuwiki"), tree / "conf")
    (conf / "apache.conf").unlink()
    (conf / "lighttpd.conf").unlink()
    local = {"useacl": 1, "superuser": "ada", "updatecheck": 0, "savedir": "./data", "useheading": 0}
    lines = [f"$conf[{name!r}] = {value!r};" for name, value in local.items()]
    (conf / "local.php").write_text("\n".join(["<?php", *lines]))
    (conf / "acl.auth.php").write_text("# <?php exit()?>\n*               @ALL        8\n")
    secret = hashlib.sha1(PASSWORD.encode()).hexdigest()  # one of the forms that it knows
    (conf / "users.auth.php").write_text(f"# <?php exit()?>\nada:{secret}:Ada:ada@example.org:admin,user\n")
    for name in DATA_FOLDERS:
        (tree / "data" / name).mkdir(parents=True)
        (tree / "data" / name / "_dummy").touch()  # as upstream: an archive need not hold empty folders
    (tree / "data/.htaccess").write_text("Require all denied\n")
    (tree / "data/meta/_htcookiesalt").write_text("0" * 64)  # what the first visit would make, alike on all nodes
    return tree

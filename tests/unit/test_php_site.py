"""The user's code on one node, without engines."""

from pathlib import Path

import pytest

from conpaas.core.errors import BadInputError
from conpaas.services.php import haproxy, node, site
from conpaas.services.php.proxy import percentiles


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    for name in (
        "index.php",
        "style.css",
        "a b.css",
        ".env",
        ".well-known/security.txt",
        "lib/x.INC",
        "lib/app.js",
        "data/page.txt",
        "data/sub/page.txt",
        "docs/index.html",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "data/.htaccess").write_text("<IfModule x>\n  Order allow,deny\n  DENY  from all\n</IfModule>")
    (folder / "docs/.htaccess").write_text('<Files "x">\nRequire all denied\n</Files>')
    return folder


def test_only_files_for_visitors_are_static(code: Path) -> None:
    assert site.static_files(code) == ["/.well-known/security.txt", "/docs/index.html", "/lib/app.js", "/style.css"]


def test_a_folder_is_closed_by_its_htaccess_and_not_by_one_for_some_of_its_files(code: Path) -> None:
    assert site.closed_folders(code) == ["data"]


def test_a_document_root_must_be_inside_the_code(code: Path) -> None:
    assert site.visible(code, "") == code
    assert site.visible(code, "docs") == code / "docs"
    (code / "out").symlink_to("/etc")
    for bad in ("nope", "../code2", "out", "style.css"):
        with pytest.raises(BadInputError, match="no folder"):
            site.visible(code, bad)


def test_a_copy_can_be_written_to_and_is_made_once(code: Path, tmp_path: Path) -> None:
    for path in code.rglob("*.*"):
        path.chmod(0o444)
    copy = tmp_path / "copies" / "one"
    site.writable_copy(code, copy)
    (copy / "style.css").write_text("changed")
    site.writable_copy(code, copy)

    assert (copy / "style.css").read_text() == "changed"
    assert (code / "style.css").read_text() == "style.css"


def test_publishing_replaces_one_link_and_keeps_the_version_before(code: Path, tmp_path: Path) -> None:
    site.publish(tmp_path, code, front=True, closed=["data"])
    first = (tmp_path / "current").resolve()
    assert (tmp_path / "current" / "root" / "style.css").exists()
    assert (tmp_path / "current" / "front").exists()
    assert (tmp_path / "current" / "closed" / "data" / site.MARK).exists()

    for front in (False, True, False):
        site.publish(tmp_path, code, front=front, closed=[])
        assert (tmp_path / "current" / "front").exists() is front
    assert not first.exists()
    assert len(list((tmp_path / "sites").iterdir())) == 2


def test_a_file_is_written_only_if_it_changes(tmp_path: Path) -> None:
    assert node.write_if_changed(tmp_path / "x", "one")
    assert not node.write_if_changed(tmp_path / "x", "one")
    assert node.write_if_changed(tmp_path / "x", "two")


@pytest.mark.parametrize(("name", "values"), [("fastcgi.conf", {"address": "127.0.0.1"})])
def test_a_template_without_all_its_values_is_an_error(name: str, values: dict[str, str]) -> None:
    assert "@@" not in node.render(name, **values)
    with pytest.raises(KeyError):
        node.render(name)


def test_percentiles_are_of_what_there_is() -> None:
    assert percentiles([]) == {}
    assert percentiles([5]) == {"response_p50": 5.0, "response_p95": 5.0, "response_p99": 5.0}
    assert percentiles(list(range(100))) == {"response_p50": 50.0, "response_p95": 95.0, "response_p99": 99.0}


def test_a_map_is_sent_in_pieces_that_fit() -> None:
    lines = [f"/{'x' * 90}{number} web\n" for number in range(300)]
    pieces = list(haproxy._pieces(lines))
    assert "".join(pieces) == "".join(lines)
    assert max(map(len, pieces)) < 8300

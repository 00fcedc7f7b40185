import bz2
import contextlib
import errno
import gzip
import io
import lzma
import os
import random
import stat
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conpaas.core import archive
from conpaas.core.archive_formats import Kind
from conpaas.core.errors import BadArchiveError, ConpaasError, DiskFullError, TooLargeError

MIB = 1024 * 1024
Member: TypeAlias = tuple[tarfile.TarInfo, bytes]
Packer: TypeAlias = Callable[[bytes], bytes]
PACKERS: dict[str, Packer] = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}
KINDS = [*PACKERS, "zip"]
SITE = {"index.php": b"<?php echo 1;", "lib/a.php": b"a" * 5000, "lib/deep/b.php": b""}


def member(
    name: str, kind: bytes = tarfile.REGTYPE, *, content: bytes = b"", mode: int = 0o644, link: str = ""
) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size, info.linkname = kind, mode, len(content), link
    return info, content


def tar_of(*members: Member, packer: Packer = bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return packer(buffer.getvalue())


def zip_of(
    contents: Mapping[str, bytes], *, method: int = zipfile.ZIP_DEFLATED, modes: Mapping[str, int] | None = None
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as packed:
        for name, content in contents.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            info.external_attr = (modes or {}).get(name, 0o644) << 16
            packed.writestr(info, content)
    return buffer.getvalue()


def packed(kind: str, contents: Mapping[str, bytes]) -> bytes:
    if kind == "zip":
        return zip_of(contents)
    members = [member(name, content=content) for name, content in contents.items()]
    return tar_of(*members, packer=PACKERS[kind])


class Place:
    """Where the archive lies, and where it is unpacked, which must be clean after a refusal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out, self.upload = folder / "out", folder / "upload"
        self.target = self.out / "target"
        self.out.mkdir()

    def put(self, data: bytes) -> Path:
        self.upload.write_bytes(data)
        return self.upload

    def refuses(
        self,
        data: bytes,
        limits: archive.Limits = archive.DEFAULT_LIMITS,
        *,
        error: type[ConpaasError] = BadArchiveError,
        match: str | None = None,
    ) -> ConpaasError:
        """Check that both ways refuse, and leave nothing; return the error."""
        self.put(data)
        with pytest.raises(error, match=match):
            archive.check(self.upload, limits)
        with pytest.raises(error, match=match) as caught:
            archive.unpack(self.upload, self.target, limits)
        assert list(self.out.iterdir()) == []
        assert sorted(path.name for path in self.folder.iterdir()) == ["out", "upload"]
        return caught.value


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def contents_of(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_known_by_its_content_and_unpacked_whole(place: Place, kind: Kind) -> None:
    place.put(packed(kind, SITE))
    expected = archive.Summary(kind, 3, sum(len(content) for content in SITE.values()))

    assert archive.check(place.upload) == expected
    assert list(place.out.iterdir()) == []
    assert archive.unpack(place.upload, place.target) == expected

    assert contents_of(place.target) == SITE
    assert list(place.out.iterdir()) == [place.target]


def test_archives_of_the_usual_tools_are_unpacked(place: Place, tmp_path: Path) -> None:
    source = tmp_path / "source"
    long = source / ("d" * 90) / ("e" * 50)
    long.mkdir(parents=True)
    (long / "grün.php").write_text("1")
    for style in ("gnu", "pax", "ustar"):
        subprocess.run(["tar", f"--format={style}", "-czf", place.upload, "-C", source, "."], check=True)
        target = place.out / style

        archive.unpack(place.upload, target)

        assert list(contents_of(target).values()) == [b"1"]


def test_modes_are_normalised_and_owners_ignored(place: Place) -> None:
    directory, _ = member("bin", tarfile.DIRTYPE, mode=0o2770)
    run, content = member("bin/run", content=b"x", mode=0o4711)
    run.uid = run.gid = 12345
    secret, _ = member("secret", mode=0o066)
    before = os.umask(0o077)
    try:
        archive.unpack(place.put(tar_of((directory, b""), (run, content), (secret, b""))), place.target)
    finally:
        os.umask(before)

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [place.target, *place.target.rglob("*")]}
    assert modes == {"target": 0o755, "bin": 0o755, "run": 0o755, "secret": 0o644}
    assert (place.target / "bin" / "run").stat().st_uid == os.getuid()


def test_a_program_in_a_zip_stays_a_program(place: Place) -> None:
    archive.unpack(place.put(zip_of({"a": b"", "b": b""}, modes={"a": 0o100700, "b": 0})), place.target)

    assert stat.S_IMODE((place.target / "a").stat().st_mode) == 0o755
    assert stat.S_IMODE((place.target / "b").stat().st_mode) == 0o644


def test_a_target_that_exists_is_done_and_left_alone(place: Place) -> None:
    place.target.mkdir()
    (place.target / "old").write_bytes(b"12")

    assert archive.unpack(place.put(packed("zip", SITE)), place.target) == archive.Summary("zip", 1, 2)

    assert contents_of(place.target) == {"old": b"12"}


def test_a_target_that_somebody_made_meanwhile_is_left_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = archive._walk

    def slow_walk(*arguments: Any, **options: Any) -> Any:
        summary = walk(*arguments, **options)
        place.target.mkdir()
        (place.target / "theirs").touch()
        return summary

    monkeypatch.setattr(archive, "_walk", slow_walk)

    archive.unpack(place.put(packed("tar", SITE)), place.target)

    assert contents_of(place.target) == {"theirs": b""}
    assert list(place.out.iterdir()) == [place.target]


def test_a_file_that_took_the_place_of_the_target_meanwhile_is_an_error(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = archive._walk

    def slow_walk(*arguments: Any, **options: Any) -> Any:
        place.target.touch()
        return walk(*arguments, **options)

    monkeypatch.setattr(archive, "_walk", slow_walk)

    with pytest.raises(NotADirectoryError):
        archive.unpack(place.put(packed("tar", SITE)), place.target)
    assert list(place.out.iterdir()) == [place.target]


def test_directories_of_a_zip_are_made(place: Place) -> None:
    archive.unpack(place.put(zip_of({"a/": b"", "b": b"", "c/d/": b""})), place.target)

    assert sorted(path.name for path in place.target.rglob("*")) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(("strip", "expected"), [(True, {"a", "b/c"}), (False, {"root/a", "root/b/c"})])
def test_a_single_root_is_stripped_if_asked(place: Place, strip: bool, expected: set[str]) -> None:
    place.put(packed("tar.gz", {"root/a": b"", "root/b/c": b""}))

    archive.unpack(place.upload, place.target, strip_single_root=strip)

    assert set(contents_of(place.target)) == expected
    assert list(place.out.iterdir()) == [place.target]


@pytest.mark.parametrize("contents", [{"root/a": b"", "b": b""}, {"a": b""}])
def test_what_is_not_a_single_root_is_not_stripped(place: Place, contents: Mapping[str, bytes]) -> None:
    archive.unpack(place.put(packed("zip", contents)), place.target, strip_single_root=True)

    assert contents_of(place.target) == contents


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"<?php echo 1;", "not an archive"),
        (b"\0" * 10_000, "not an archive"),
        (gzip.compress(b"<?php echo 1;"), "damaged or cut off"),
        (gzip.compress(b""), "damaged or cut off"),
        (b"\x1f\x8b", "damaged or cut off"),
        (b"PK\x03\x04", "damaged or cut off"),
        (tar_of(packer=gzip.compress), "holds no files"),
        (tar_of(member("empty", tarfile.DIRTYPE)), "holds no files"),
        (zip_of({}), "holds no files"),
    ],
    ids=range(10),
)
def test_what_is_no_archive_or_an_empty_one_is_refused(place: Place, data: bytes, reason: str) -> None:
    assert place.refuses(data, match=reason).hint


NAMES = {
    "../evil": "leads out",
    "a/../../evil": "leads out",
    "a/..": "leads out",
    "/etc/passwd": "absolute",
    "//etc/passwd": "absolute",
    "C:/evil": "absolute",
    "c:evil": "absolute",
    "..\\evil": "backslash",
    "a\\b": "backslash",
    ".": "without a name",
    "./.": "without a name",
    "x" * 256: "too long",
    "ü" * 128: "too long",
    "a/" * 1100 + "b": "too long",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_could_lead_elsewhere_is_refused_and_told(place: Place, kind: str, name: str) -> None:
    error = place.refuses(packed(kind, {"fine": b"1", name: b"evil"}), match=NAMES[name])

    assert error.value == name
    assert error.hint


def test_a_name_with_a_zero_byte_is_refused_in_every_kind(place: Place) -> None:
    data = zip_of({"evilXphp": b""}).replace(b"evilXphp", b"evil\0php")
    assert place.refuses(data, match="zero byte").value == "evil\0php"

    info, _ = member("x")
    info.pax_headers = {"path": "evil\0php"}
    assert place.refuses(tar_of((info, b"")), match="zero byte").value == "evil\0php"


@pytest.mark.parametrize(
    "part",
    [
        member("a", tarfile.SYMTYPE, link="b"),
        member("a", tarfile.SYMTYPE, link="/etc"),
        member("a", tarfile.LNKTYPE, link="b"),
    ],
    ids=["symbolic", "absolute", "hard"],
)
def test_any_link_in_a_tar_is_refused_with_a_way_out(place: Place, part: Member) -> None:
    error = place.refuses(tar_of(member("b"), part), match="link")

    assert error.value == "a"
    assert "--dereference" in error.hint


def test_a_link_in_a_zip_is_refused(place: Place) -> None:
    place.refuses(zip_of({"a": b"/etc/passwd"}, modes={"a": stat.S_IFLNK | 0o777}), match="link")


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"V"])
def test_devices_and_pipes_are_refused(place: Place, kind: bytes) -> None:
    assert place.refuses(tar_of(member("dev", kind), member("a")), match="a device").value == "dev"


def test_a_device_in_a_zip_is_refused(place: Place) -> None:
    place.refuses(zip_of({"dev": b""}, modes={"dev": stat.S_IFCHR | 0o666}), match="a device")


def test_a_sparse_file_is_refused(place: Place, tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(10 * MIB)
    for style in ("gnu", "pax"):
        made = subprocess.run(
            ["tar", f"--format={style}", "-cS", "-C", tmp_path, "sparse"], check=True, capture_output=True
        ).stdout
        place.put(made)

        with pytest.raises(BadArchiveError, match="sparse"):
            archive.check(place.upload)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "names",
    [("a", "a/b"), ("a/b", "a"), ("./a", "a/b/c"), ("a", "./a"), ("a", "a//b")],
    ids="+".join,
)
def test_two_members_that_want_one_place_are_refused(place: Place, kind: str, names: Sequence[str]) -> None:
    data = packed(kind, dict.fromkeys(names, b"1"))

    assert place.refuses(data, match="below a file|twice").value == names[1]


def test_a_directory_may_be_named_twice(place: Place) -> None:
    root, directory = member(".", tarfile.DIRTYPE), member("a", tarfile.DIRTYPE)

    archive.unpack(place.put(tar_of(root, directory, member("a/b"), directory)), place.target)

    assert contents_of(place.target) == {"a/b": b""}


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_files_or_bytes_are_refused_at_the_limit_and_not_before(place: Place, kind: str) -> None:
    data = packed(kind, {"a": b"x" * 60, "d/b": b"x" * 40})

    assert archive.check(place.put(data), archive.Limits(bytes=100, files=3)).bytes == 100
    assert place.refuses(data, archive.Limits(bytes=99), error=TooLargeError, match="99B").value == "d/b"
    assert place.refuses(data, archive.Limits(files=2), error=TooLargeError, match="more than 2 files").value == "d/b"


@pytest.mark.parametrize("kind", ["tar.gz", "tar.bz2", "tar.xz", "zip"])
def test_a_bomb_is_refused_though_it_is_within_the_size(place: Place, kind: str) -> None:
    data = packed(kind, {"zeros": b"\0" * (32 * MIB)})

    assert place.refuses(data, error=TooLargeError, match="200 times").value == "zeros"


def test_a_bomb_behind_the_end_of_a_tar_is_refused(place: Place) -> None:
    data = gzip.compress(tar_of(member("a")) + b"\0" * (32 * MIB))

    place.refuses(data, error=TooLargeError, match="200 times")


def test_a_small_file_may_shrink_well(place: Place) -> None:
    assert archive.check(place.put(packed("tar.gz", {"log": b"\0" * (15 * MIB)}))).bytes == 15 * MIB


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_would_fill_the_memory_is_refused(place: Place, kind: bytes) -> None:
    noise = random.Random(1).randbytes(2 * MIB)

    place.refuses(tar_of(member("name", kind, content=noise), member("a")), error=TooLargeError, match="header")


def test_a_table_of_contents_that_would_fill_the_memory_is_refused(place: Place) -> None:
    data = bytearray(zip_of(dict.fromkeys(map(str, range(30_000)), b"")))

    assert (
        place.refuses(bytes(data), archive.Limits(files=10), error=TooLargeError, match="table of contents").value
        == "upload"
    )


@pytest.mark.parametrize("claimed", [1, 99, 5001, 2**31])
def test_a_zip_that_lies_about_sizes_is_refused(place: Place, claimed: int) -> None:
    data = bytearray(zip_of({"a": b"x" * 5000}))
    central = data.index(b"PK\x01\x02")
    data[central + 24 : central + 28] = struct.pack("<I", claimed)

    error = TooLargeError if claimed > archive.DEFAULT_LIMITS.bytes else BadArchiveError
    assert place.refuses(bytes(data), error=error).value == "a"


def test_a_zip_whose_members_share_their_bytes_is_held_to_the_limit(place: Place) -> None:
    data = zip_of({"a": random.Random(1).randbytes(1000)})
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry = data[start:end]
    tail = bytearray(data[end:])
    struct.pack_into("<HHI", tail, 8, 50, 50, len(entry) * 50)

    place.refuses(data[:start] + entry * 50 + bytes(tail), match="twice|damaged")


def test_an_encrypted_zip_is_refused(place: Place) -> None:
    data = bytearray(zip_of({"a": b"secret"}))
    data[data.index(b"PK\x01\x02") + 8] |= 1

    assert "password" in place.refuses(bytes(data), match="encrypted").hint


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_compressed_in_a_rare_way_is_refused(place: Place, method: int) -> None:
    place.refuses(zip_of({"a": b"x"}, method=method), match="rare way")


NOISE = {"a": random.Random(2).randbytes(3000), "b": random.Random(3).randbytes(3000)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.51, 0.9, 0.99])
def test_an_archive_that_is_cut_off_anywhere_is_refused(place: Place, kind: str, share: float) -> None:
    data = packed(kind, NOISE)
    if kind == "tar":
        data = data[: 2 * (512 + 3072) + 512]  # up to the end mark: what comes after it is padding
    place.refuses(data[: int(len(data) * share)])


def test_a_tar_that_is_cut_between_two_members_is_refused(place: Place) -> None:
    place.refuses(packed("tar", NOISE)[:3584])


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_in_compressed_content_is_found(place: Place, kind: str) -> None:
    data = bytearray(packed(kind, NOISE))
    data[len(data) // 2] ^= 0x55
    if kind == "tar":  # has a checksum for headers alone
        data = bytearray(packed(kind, NOISE))
        data[3584 + 10] ^= 0x55

    place.refuses(bytes(data))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(st.sampled_from(KINDS), st.data())
def test_no_damage_gives_another_error_than_a_refusal(place: Place, kind: str, data: st.DataObject) -> None:
    content = bytearray(packed(kind, SITE))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    place.put(bytes(content))

    with contextlib.suppress(BadArchiveError, TooLargeError):
        archive.check(place.upload)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(KINDS), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
@example("tar", "..")
@example("zip", "a/./b")
def test_no_name_writes_outside_the_target(place: Place, kind: str, name: str) -> None:
    with contextlib.suppress(BadArchiveError):
        archive.unpack(place.put(packed(kind, {name: b"x"})), place.target)
    try:
        assert {path.name for path in place.out.iterdir()} <= {"target"}
    finally:
        if place.target.exists():
            for path in sorted(place.target.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            place.target.rmdir()


def test_a_full_disk_is_told_and_leaves_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int, _mode: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fchmod", refuse)

    with pytest.raises(DiskFullError):
        archive.unpack(place.put(packed("zip", SITE)), place.target)
    assert list(place.out.iterdir()) == []


def test_another_error_of_the_disk_is_not_taken_for_a_bad_archive(place: Place) -> None:
    with pytest.raises(FileNotFoundError):
        archive.check(place.upload)
    with pytest.raises(FileNotFoundError):
        archive.unpack(place.put(packed("zip", SITE)), place.out / "missing" / "target")


def test_a_name_that_is_not_utf_8_is_kept_and_shown_in_errors_without_harm(place: Place) -> None:
    info, _ = member(os.fsdecode(b"caf\xe9"))
    archive.unpack(place.put(tar_of((info, b""))), place.target)
    assert [os.fsencode(path.name) for path in place.target.iterdir()] == [b"caf\xe9"]

    link, _ = member(os.fsdecode(b"caf\xe9"), tarfile.SYMTYPE, link="x")
    with pytest.raises(BadArchiveError) as caught:
        archive.check(place.put(tar_of((link, b""))))
    assert caught.value.value == "caf?"


def make_tree(root: Path, contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def test_what_is_packed_is_unpacked_to_the_same_without_git(place: Place, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree", {**SITE, ".git/config": b"", "sub/.git": b"gitdir: x", ".env": b""})
    (tmp_path / "tree" / "empty").mkdir()
    (tmp_path / "tree" / "index.php").chmod(0o700)

    archive.pack(tmp_path / "tree", place.upload)
    archive.unpack(place.upload, place.target)

    assert contents_of(place.target) == {**SITE, ".env": b""}
    assert (place.target / "empty").is_dir()
    assert stat.S_IMODE((place.target / "index.php").stat().st_mode) == 0o755


def test_equal_trees_are_packed_to_equal_bytes(tmp_path: Path) -> None:
    for name, order in (("one", list(SITE)), ("two", list(reversed(SITE)))):
        make_tree(tmp_path / name, {path: SITE[path] for path in order})
        archive.pack(tmp_path / name, tmp_path / f"{name}.tar.gz")
        os.utime(tmp_path / name / "index.php", (1, 1))

    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "two.tar.gz").read_bytes()
    archive.pack(tmp_path / "one", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "one.tar.gz").read_bytes()


def test_an_archive_inside_the_tree_does_not_hold_itself(tmp_path: Path) -> None:
    make_tree(tmp_path, SITE)

    for _ in range(2):
        archive.pack(tmp_path, tmp_path / "site.tar.gz")

    assert archive.check(tmp_path / "site.tar.gz").files == len(SITE)


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("index.php"), os.mkfifo])
def test_a_tree_with_a_link_or_a_pipe_is_not_packed_and_nothing_is_left(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make_tree(tmp_path / "tree", SITE)
    make(tmp_path / "tree" / "odd")

    with pytest.raises(BadArchiveError) as caught:
        archive.pack(tmp_path / "tree", tmp_path / "out.tar.gz")

    assert caught.value.value == "odd"
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]

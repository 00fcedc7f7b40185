"""Following the director to a newer version: when, and what becomes of the process."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conpaas import __version__
from conpaas.core.clock import SYSTEM_CLOCK
from conpaas.core.errors import PeerError
from conpaas.core.messages.internal import READ_RELEASE, Release
from conpaas.core.release import Follower, begin, newer

SHA = "ab" * 32


class Director:
    """The one call that a follower makes before it decides."""

    def __init__(self, release: Release | None) -> None:
        self.release = release
        self.fetched: list[str] = []

    async def call(self, endpoint: object, *_: object, **__: object) -> Release:
        assert endpoint is READ_RELEASE
        if self.release is None:
            raise PeerError("away")
        return self.release

    def stream(self, *_: object, sha256: str) -> Any:
        self.fetched.append(sha256)
        raise PeerError("the line broke")


class Member:
    clock = SYSTEM_CLOCK

    def __init__(self, release: Release | None) -> None:
        self.director = Director(release)


def follower(directory: Path, release: Release | None, *, busy: Any = lambda: False) -> tuple[Follower, asyncio.Event]:
    stop = asyncio.Event()
    member: Any = Member(release)
    return Follower(member, directory, stop, busy), stop


@given(st.tuples(*[st.integers(0, 99)] * 3), st.tuples(*[st.integers(0, 99)] * 3))
def test_versions_are_ordered_as_numbers(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    first, second = (".".join(map(str, version)) for version in (one, other))

    assert newer(first, second) == (one > other)


@pytest.mark.parametrize("odd", ["", "3.x.1", "latest", "3.1.0+local"])
def test_a_version_of_another_form_is_never_newer(odd: str) -> None:
    assert not newer(odd, "3.1.0")
    assert not newer("4.0.0", odd)


@pytest.mark.parametrize("version", [__version__, "0.0.1", ""])
async def test_who_is_not_behind_stays(tmp_path: Path, version: str) -> None:
    following, stop = follower(tmp_path, Release(version=version, bundle=SHA))
    await following.follow()

    assert not stop.is_set()
    assert following.successor is None


async def test_an_instance_of_the_directors_own_installation_only_stops(tmp_path: Path) -> None:
    following, stop = follower(tmp_path, Release(version="99.0.0"))
    await following.follow()

    assert stop.is_set()
    assert following.successor is None


async def test_it_stops_at_a_calm_moment_only(tmp_path: Path) -> None:
    asked = iter([True, True, False])
    following, stop = follower(tmp_path, Release(version="99.0.0"), busy=lambda: next(asked))
    await following.follow()

    assert stop.is_set()
    assert next(asked, None) is None


async def test_a_bundle_that_cannot_be_fetched_leaves_all_as_it_is(tmp_path: Path) -> None:
    following, stop = follower(tmp_path, Release(version="99.0.0", bundle=SHA))
    with pytest.raises(PeerError):
        await following.follow()

    assert not stop.is_set()
    assert following.successor is None


async def test_a_version_that_failed_is_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions" / "failed.json").write_text(json.dumps({SHA: "it did not serve"}))
    following, stop = follower(tmp_path, Release(version="99.0.0", bundle=SHA))
    await following.follow()

    assert not stop.is_set()


async def test_a_director_that_is_away_is_asked_another_time(tmp_path: Path) -> None:
    following, stop = follower(tmp_path, None)
    with pytest.raises(PeerError):
        await following.follow()

    assert not stop.is_set()


def test_a_daemon_without_versions_just_begins(tmp_path: Path) -> None:
    begin(tmp_path)
    following, _ = follower(tmp_path, None)
    following.settle()

    assert list(tmp_path.iterdir()) == []

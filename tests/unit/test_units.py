import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conpaas.core import units
from conpaas.core.errors import BadInputError

sizes = st.integers(min_value=0, max_value=10**17)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("128M", 128 * 1024**2),
        ("1.5G", 3 * 1024**3 // 2),
        ("64 KiB", 65536),
        ("1000", 1000),
        ("2gb", 2 * 1024**3),
        ("7B", 7),
    ],
)
def test_a_size_is_read_in_powers_of_1024(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1M", "1X", "1,5G", "1e3", "0x10", "1 2", "٣M", "9" * 30])
def test_what_is_not_a_size_is_refused_with_the_text_and_a_hint(text: str) -> None:
    with pytest.raises(BadInputError) as caught:
        units.parse_size(text)

    assert caught.value.value == text
    assert "128M" in caught.value.hint


def test_a_negative_size_is_not_shown() -> None:
    with pytest.raises(BadInputError):
        units.show_size(-1)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (128 * 1024**2, "128M"),
        (1536, "1.5K"),
        (1024**2 - 1, "1M"),
        (2**80, "1073741824P"),
    ],
)
def test_a_size_is_shown_in_the_largest_unit_that_fits(size: int, text: str) -> None:
    assert units.show_size(size) == text


@settings(deadline=None)
@given(sizes)
def test_a_shown_size_is_read_back_within_a_twentieth(size: int) -> None:
    assert abs(units.parse_size(units.show_size(size)) - size) <= size / 20


@settings(deadline=None)
@given(st.integers(min_value=1, max_value=1023), st.integers(min_value=0, max_value=5))
def test_whole_units_are_shown_and_read_back_exactly(number: str, power: int) -> None:
    assert units.parse_size(units.show_size(number * 1024**power)) == number * 1024**power


@settings(deadline=None)
@given(sizes)
def test_plain_bytes_are_read_exactly(size: int) -> None:
    assert units.parse_size(str(size)) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("5m", 300), ("2h", 7200), ("1h30m", 5400), ("90", 90), ("250ms", 0.25), ("1.5D", 129600)],
)
def test_a_duration_is_read_as_seconds(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == pytest.approx(seconds)


@settings(deadline=None)
@given(st.integers(min_value=0, max_value=10**6), st.sampled_from(["s", "m", "h", "d"]))
def test_a_written_duration_is_that_many_units(number: int, unit: str) -> None:
    factor = {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit]

    assert units.parse_duration(f"{number}{unit}") == number * factor


@pytest.mark.parametrize("text", ["", "s", "-5s", "5 apples", "1h 30", "5mm", "nan", "inf", "1e9s"])
def test_what_is_not_a_duration_is_refused_with_the_text_and_a_hint(text: str) -> None:
    with pytest.raises(BadInputError) as caught:
        units.parse_duration(text)

    assert caught.value.value == text
    assert "5m" in caught.value.hint


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-3, "a few moments ago"),
        (0, "a few moments ago"),
        (59.9, "a few moments ago"),
        (60, "1 minute ago"),
        (11 * 60 + 59, "11 minutes ago"),
        (3600, "1 hour ago"),
        (86399, "23 hours ago"),
        (3 * 86400, "3 days ago"),
    ],
)
def test_the_past_is_told_in_the_largest_whole_unit(seconds: float, words: str) -> None:
    assert units.ago(seconds) == words


def test_room_is_shown_in_its_unit() -> None:
    assert units.show_room("instances", 3, 64) == "instances: 3 of 64"
    assert units.show_room("cores", 2.5, 8) == "cores: 2.5 of 8"
    assert units.show_room("memory", 1.5 * 1024**3, 16 * 1024**3) == "memory: 1.5G of 16G"
    assert units.show_room("instances", 1_500_000, 2_000_000) == "instances: 1500000 of 2000000"

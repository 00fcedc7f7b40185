"""Sizes and times as people write and read them, and as numbers in one unit.

Text becomes a number here, once, at the edge; everywhere else a number carries its unit in its name.
"""

import re

from conpaas.core.errors import BadInputError

_SIZE_LETTERS = "BKMGTP"  # each 1024 times the one before
_SIZE = re.compile(r"(?P<number>[0-9]{1,18}(?:\.[0-9]{1,9})?)\s*(?P<letter>[BKMGTP]?)(?:I?B)?", re.IGNORECASE)
_SIZE_HINT = "write a number and a unit, like 512K, 128M or 1.5G"

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION_PART = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")
_DURATION = re.compile(rf"(?:{_DURATION_PART.pattern})+")
_PLAIN_NUMBER = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,9})?")
_DURATION_HINT = "write a number and a unit, like 30s, 5m, 2h or 1h30m"

_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400


def parse_size(text: str) -> int:
    """Read a size such as `128M`, `1.5G`, `64 KiB` or `1000` as bytes; units are powers of 1024.

    Raises BadInputError for anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BadInputError(f"{text!r} is not a size", value=text, hint=_SIZE_HINT)
    number, letter = match["number"], match["letter"].upper() or "B"
    factor: int = 1024 ** _SIZE_LETTERS.index(letter)
    return int(float(number) * factor) if "." in number else int(number) * factor


def show_size(size: int) -> str:
    """Show `size`, in bytes, in the largest unit that fits: `128M`, `1.5G`, `17B`.

    Whole units are exact, others rounded to one decimal; `parse_size` reads the text back.
    Raises BadInputError for a negative size.
    """
    if size < 0:
        raise BadInputError(f"{size} is not a size", value=size, hint="a size is 0 bytes or more")
    power = min(max(size.bit_length() - 1, 0) // 10, len(_SIZE_LETTERS) - 1)
    number = round(size / 1024**power, 1)
    if number >= 1024 and power < len(_SIZE_LETTERS) - 1:  # 1023.96K is 1M
        number, power = number / 1024, power + 1
    whole = number == int(number)
    return f"{int(number) if whole else number}{_SIZE_LETTERS[power]}"


def show_room(name: str, used: float, limit: float) -> str:
    """Say how much of an allowance is used: `instances: 3 of 64`, `disk: 34.8G of 252G`."""
    in_bytes = name in _IN_BYTES
    return f"{name}: {_amount(used, in_bytes=in_bytes)} of {_amount(limit, in_bytes=in_bytes)}"


def _amount(amount: float, *, in_bytes: bool) -> str:
    return show_size(int(amount)) if in_bytes else f"{amount:.10g}"


_IN_BYTES = {"memory", "disk", "volume space"}


def parse_duration(text: str) -> float:
    """Read a duration such as `30s`, `5m`, `2h`, `1h30m`, `250ms` or `90` (seconds) as seconds.

    Raises BadInputError for anything else.
    """
    compact = text.strip().lower()
    if _PLAIN_NUMBER.fullmatch(compact):
        return float(compact)
    if not _DURATION.fullmatch(compact):
        raise BadInputError(f"{text!r} is not a duration", value=text, hint=_DURATION_HINT)
    return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(compact))


def ago(seconds: float) -> str:
    """Say how long ago something was: `a few moments ago`, `1 minute ago`, `11 minutes ago`, `3 days ago`.

    A time in the future, as clocks that differ give it, counts as now.
    """
    if seconds < _MINUTE_S:
        return "a few moments ago"
    for size_s, word in ((_DAY_S, "day"), (_HOUR_S, "hour"), (_MINUTE_S, "minute")):
        count = int(seconds // size_s)
        if count:
            return f"{count} {word}{'' if count == 1 else 's'} ago"
    raise AssertionError(seconds)

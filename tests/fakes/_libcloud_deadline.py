"""Deadlines of libcloud's requests: only one that nothing else ends has a short one, however busy this computer is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import requests
from requests.adapters import HTTPAdapter

PATIENT_S, SHORT_S = 30.0, 0.8


@contextmanager
def hurried(url: str, is_slow: Callable[[str, str], bool]) -> Iterator[None]:
    """Let the deadline of a request to `url` be short if `is_slow` says so of its method and its URL.

    One without any deadline is left as it is: the driver has forgotten it.
    """
    send = HTTPAdapter.send

    def send_in_time(adapter: HTTPAdapter, request: requests.PreparedRequest, **words: Any) -> requests.Response:
        method, target = request.method or "", request.url or ""
        if words.get("timeout") is not None and target.startswith(url) and is_slow(method, target):
            words["timeout"] = min(words["timeout"], SHORT_S)
        return send(adapter, request, **words)

    with patch.object(HTTPAdapter, "send", send_in_time):
        yield

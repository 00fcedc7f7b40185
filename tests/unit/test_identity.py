import contextlib
import ssl
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conpaas.core.errors import BadInputError
from conpaas.core.identity import Identity, peer_identity

ids = st.text("abcxyz0189-", min_size=1, max_size=60)
instances = ids.filter(lambda name: name not in {"manager", "u"})
identities = st.one_of(
    st.builds(Identity.director, ids),
    st.builds(Identity.manager, ids, ids, st.integers(min_value=0, max_value=10**18 - 1), instances),
    st.builds(Identity.agent, ids, ids, instances),
    st.builds(Identity.for_user, ids, ids),
)


class Peer:
    """The end of a TLS connection whose certificate has these names."""

    def __init__(self, *names: tuple[str, str]) -> None:
        self.names = names

    def getpeercert(self) -> dict[str, Any] | None:
        return {"subjectAltName": self.names} if self.names else None


@settings(deadline=None)
@given(identities)
def test_an_identity_is_read_back_from_its_uri(identity: Identity) -> None:
    assert Identity.parse(identity.uri) == identity


@settings(deadline=None)
@given(identities, identities)
def test_two_identities_share_a_host_name_only_if_they_manage_one_service(one: Identity, other: Identity) -> None:
    if one.host == other.host and one != other:
        assert one.kind == other.kind == "manager"
        assert one.service == other.service


@pytest.mark.parametrize(
    ("identity", "uri", "host"),
    [
        (Identity.director("d1"), "spiffe://d1/director", "director.d1.conpaas.internal"),
        (
            Identity.manager("d1", "s-1", 3, "i-1"),
            "spiffe://d1/service/s-1/manager/3/i-1",
            "manager.s-1.d1.conpaas.internal",
        ),
        (
            Identity.agent("d1", "s-1", "i-2"),
            "spiffe://d1/service/s-1/agent/i-2",
            "i-2.s-1.d1.conpaas.internal",
        ),
        (Identity.for_user("d1", "ada"), "spiffe://d1/user/ada", "u.ada.d1.conpaas.internal"),
    ],
)
def test_each_kind_has_its_uri_and_host_name(identity: Identity, uri: str, host: str) -> None:
    assert (identity.uri, identity.host) == (uri, host)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://d1",
        "spiffe://d1/",
        "spiffe://d1/director/",
        "spiffe://d1/director\n",
        "spiffe://D1/director",
        "SPIFFE://d1/director",
        "https://d1/director",
        "spiffe://d1/user/",
        "spiffe://d1/user/ada/x",
        "spiffe://d1/user/a.b",
        "spiffe://d1/user/" + "a" * 61,
        "spiffe://d1/service/s/manager/i",
        "spiffe://d1/service/s/manager/01/i",
        "spiffe://d1/service/s/manager/-1/i",
        "spiffe://d1/service/s/manager/٣/i",
        "spiffe://d1/service/s/agent/manager",
        "spiffe://d1/service/s/agent/u",
        "spiffe://d1/service/s/agent/i?x",
    ],
)
def test_a_malformed_uri_is_refused(uri: str) -> None:
    with pytest.raises(BadInputError):
        Identity.parse(uri)


@settings(deadline=None)
@given(st.text())
def test_any_text_is_an_identity_in_one_form_or_refused(text: str) -> None:
    with contextlib.suppress(BadInputError):
        assert Identity.parse(text).uri == text


@pytest.mark.parametrize("bad", ["", "A", "a.b", "a/b", "a" * 61, "a\n", "ü"])
def test_an_id_of_another_form_is_refused(bad: str) -> None:
    with pytest.raises(BadInputError):
        Identity.for_user("d1", bad)


def test_fields_that_a_kind_does_not_have_are_refused() -> None:
    with pytest.raises(BadInputError, match="no further fields"):
        Identity("d1", "director", user="ada")
    with pytest.raises(BadInputError):
        Identity.manager("d1", "s", -1, "i")


def test_a_peer_is_who_its_one_uri_says() -> None:
    peer = Peer(("DNS", "u.ada.d1.conpaas.internal"), ("URI", "spiffe://d1/user/ada"))

    assert peer_identity(cast("ssl.SSLObject | None", peer), "d1") == Identity.for_user("d1", "ada")


@pytest.mark.parametrize(
    "peer",
    [
        None,
        Peer(),
        Peer(("DNS", "director.d1.conpaas.internal")),
        Peer(("URI", "spiffe://d1/user/ada"), ("URI", "spiffe://d1/director")),
        Peer(("URI", "spiffe://d2/user/ada")),
        Peer(("URI", "https://example.org")),
    ],
)
def test_a_peer_without_one_uri_of_our_deployment_is_nobody(peer: Peer | None) -> None:
    assert peer_identity(cast("ssl.SSLObject | None", peer), "d1") is None

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from conpaas.core import keymaker, tls
from conpaas.core.errors import BadInputError
from conpaas.core.identity import Identity, client_context, peer_identity, server_context

MANAGER = Identity.manager("d1", "s1", 2, "i1")
USER = Identity.for_user("d1", "ada")
REFUSED = (ssl.SSLError, ConnectionResetError)  # asyncio tells a client one or the other
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Party:
    cert: Path
    key: Path
    ca: Path


Enrol: TypeAlias = Callable[..., Party]


@pytest.fixture(scope="module")
def authority() -> tls.Authority:
    return tls.Authority.create("d1")


@pytest.fixture
def party(tmp_path: Path) -> Enrol:
    """Enrol an identity: its certificate, its key, and the CA it trusts, as files."""

    def enrol(
        identity: Identity,
        signer: tls.Authority,
        *,
        trusted: tls.Authority | None = None,
        now: datetime | None = None,
        lifetime_s: float = 3600,
    ) -> Party:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        directory.mkdir()
        key_pem, csr_pem = tls.make_key_and_csr()
        made = Party(directory / "cert", directory / "key", directory / "ca")
        made.cert.write_bytes(signer.sign(csr_pem, identity, lifetime_s=lifetime_s, now=now))
        made.key.write_bytes(key_pem)
        made.ca.write_bytes((trusted or signer).certificate_pem)
        return made

    return enrol


async def shake_hands(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, host: str
) -> tuple[Identity | None, Identity | None]:
    """Connect over loopback; return whom the server and the client have met."""
    met = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        met.set_result(peer_identity(writer.get_extra_info("ssl_object"), "d1"))
        writer.write(b"hello")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_tls)
    async with server, asyncio.timeout(45):
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_tls, server_hostname=host)
        try:
            if await reader.read() != b"hello":  # in TLS 1.3 a refusal of the client comes this late
                assert not met.done()
                raise ConnectionResetError
            assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
            return await met, peer_identity(writer.get_extra_info("ssl_object"), "d1")
        finally:
            writer.close()


def server_of(party: Party, *, require_client: bool = True) -> ssl.SSLContext:
    return server_context(party.cert, party.key, party.ca, require_client=require_client)


def client_of(party: Party) -> ssl.SSLContext:
    return client_context(party.cert, party.key, party.ca)


async def test_both_ends_of_a_connection_know_each_other(authority: tls.Authority, party: Enrol) -> None:
    server, client = server_of(party(MANAGER, authority)), client_of(party(USER, authority))

    assert await shake_hands(server, client, MANAGER.host) == (USER, MANAGER)


async def test_a_client_of_another_ca_is_refused(authority: tls.Authority, party: Enrol) -> None:
    stranger = party(USER, tls.Authority.create("d1"), trusted=authority)

    with pytest.raises(REFUSED):
        await shake_hands(server_of(party(MANAGER, authority)), client_of(stranger), MANAGER.host)


async def test_a_server_of_another_ca_is_refused(authority: tls.Authority, party: Enrol) -> None:
    stranger = party(MANAGER, tls.Authority.create("d1"), trusted=authority)

    with pytest.raises(ssl.SSLCertVerificationError):
        await shake_hands(server_of(stranger), client_of(party(USER, authority)), MANAGER.host)


async def test_an_expired_client_is_refused(authority: tls.Authority, party: Enrol) -> None:
    expired = party(USER, authority, now=datetime.now(UTC) - timedelta(hours=1), lifetime_s=60)

    with pytest.raises(REFUSED):
        await shake_hands(server_of(party(MANAGER, authority)), client_of(expired), MANAGER.host)


async def test_an_expired_server_is_refused(authority: tls.Authority, party: Enrol) -> None:
    expired = party(MANAGER, authority, now=datetime.now(UTC) - timedelta(hours=1), lifetime_s=60)

    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        await shake_hands(server_of(expired), client_of(party(USER, authority)), MANAGER.host)


@pytest.mark.parametrize("other", [Identity.director("d1"), Identity.manager("d1", "s2", 2, "i1"), USER])
async def test_a_server_that_is_somebody_else_is_refused(
    authority: tls.Authority, party: Enrol, other: tls.Authority
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)hostname mismatch"):
        await shake_hands(server_of(party(other, authority)), client_of(party(USER, authority)), MANAGER.host)


async def test_a_client_without_a_certificate_is_refused_where_one_is_required(
    authority: tls.Authority, party: Enrol
) -> None:
    server = party(MANAGER, authority)

    with pytest.raises(REFUSED):
        await shake_hands(server_of(server), client_context(None, None, server.ca), MANAGER.host)


async def test_a_client_without_a_certificate_is_nobody_where_none_is_required(
    authority: tls.Authority, party: Enrol
) -> None:
    server = party(MANAGER, authority)
    anonymous = client_context(None, None, server.ca)

    assert await shake_hands(server_of(server, require_client=False), anonymous, MANAGER.host) == (
        None,
        MANAGER,
    )


async def test_a_bad_certificate_is_refused_also_where_none_is_required(authority: tls.Authority, party: Enrol) -> None:
    stranger = party(USER, tls.Authority.create("d1"), trusted=authority)
    server = server_of(party(MANAGER, authority), require_client=False)

    with pytest.raises(REFUSED):
        await shake_hands(server, client_of(stranger), MANAGER.host)


async def test_older_tls_is_refused(authority: tls.Authority, party: Enrol) -> None:
    client = client_of(party(USER, authority))
    client.minimum_version = ssl.TLSVersion.TLSv1_2
    client.maximum_version = ssl.TLSVersion.TLSv1_2

    with pytest.raises(REFUSED):
        await shake_hands(server_of(party(MANAGER, authority)), client, MANAGER.host)


def test_a_certificate_says_what_the_identity_says_and_nothing_the_request_asked_for(authority: tls.Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    greedy = (
        x509.CertificateSigningRequestBuilder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "director")]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("director.d1.conpaas.internal")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )

    pem = authority.sign(greedy.public_bytes(serialization.Encoding.PEM), USER, lifetime_s=3600, now=NOW)

    made = x509.load_pem_x509_certificate(pem)
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [USER.uri]
    assert names.get_values_for_type(x509.DNSName) == [USER.host]
    assert len(list(names)) == 2
    assert made.subject.rfc4514_string() == "CN=user"
    constraints = made.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    usage = made.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    assert made.public_key() == key.public_key()
    assert tls.certificate_lifetime(pem) == (NOW - timedelta(minutes=5), NOW + timedelta(hours=1))


def test_serial_numbers_are_random_and_of_128_bits(authority: tls.Authority) -> None:
    _, csr_pem = tls.make_key_and_csr()
    serials = {
        x509.load_pem_x509_certificate(authority.sign(csr_pem, USER, lifetime_s=60)).serial_number for _ in range(16)
    }

    assert len(serials) == 16
    assert 2**100 < max(serials) < 2**128


def test_the_authority_lives_ten_years_and_no_certificate_outlives_it() -> None:
    authority = tls.Authority.create("d1", now=NOW)
    _, csr_pem = tls.make_key_and_csr()

    end = tls.certificate_lifetime(authority.certificate_pem)[1]

    assert end == NOW + timedelta(days=3650)
    assert tls.certificate_lifetime(authority.sign(csr_pem, USER, lifetime_s=10**9, now=NOW))[1] == end


def csr_with(key: Any) -> bytes:
    request = x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def forged() -> bytes:
    """Make a request whose signature is not by its key."""
    der = bytearray(x509.load_pem_x509_csr(tls.make_key_and_csr()[1]).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    ("make_csr", "reason"),
    [
        (forged, "not signed by its own key"),
        (lambda: csr_with(rsa.generate_private_key(65537, 2048)), "not P-256"),
        (lambda: csr_with(ec.generate_private_key(ec.SECP384R1())), "not P-256"),
        (lambda: b"rubbish", "cannot be read"),
        (lambda: b"", "cannot be read"),
        (lambda: tls.make_key_and_csr()[1] + b" " * 20_000, "too large"),
    ],
)
def test_a_request_that_is_not_honest_is_refused(
    authority: tls.Authority, make_csr: Callable[[], bytes], reason: str
) -> None:
    with pytest.raises(BadInputError, match=reason):
        authority.sign(make_csr(), USER, lifetime_s=60)


def test_an_identity_of_another_deployment_or_without_a_life_is_not_signed(authority: tls.Authority) -> None:
    _, csr_pem = tls.make_key_and_csr()

    with pytest.raises(BadInputError, match="CA of d1, not of d2"):
        authority.sign(csr_pem, Identity.director("d2"), lifetime_s=60)
    with pytest.raises(BadInputError, match="cannot live 0 s"):
        authority.sign(csr_pem, USER, lifetime_s=0)


def test_an_authority_is_saved_and_loaded_and_its_key_is_secret(authority: tls.Authority, tmp_path: Path) -> None:
    authority.save(tmp_path / "ca")

    loaded = tls.Authority.load(tmp_path / "ca")

    assert loaded.certificate_pem == authority.certificate_pem
    assert loaded.deployment == "d1"
    assert sorted(path.name for path in (tmp_path / "ca").iterdir()) == ["ca.crt", "ca.key"]
    assert (tmp_path / "ca" / "ca.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "ca").stat().st_mode & 0o777 == 0o700


def test_an_authority_that_is_missing_damaged_or_mixed_up_is_not_loaded(
    authority: tls.Authority, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        tls.Authority.load(tmp_path)
    authority.save(tmp_path)
    (tmp_path / "ca.crt").write_bytes(tls.Authority.create("d1").certificate_pem)
    with pytest.raises(BadInputError, match="not of one pair"):
        tls.Authority.load(tmp_path)
    (tmp_path / "ca.key").write_text("rubbish")
    with pytest.raises(BadInputError):
        tls.Authority.load(tmp_path)


def test_a_fingerprint_is_the_hash_of_the_certificate(authority: tls.Authority) -> None:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(ssl.PEM_cert_to_DER_cert(authority.certificate_pem.decode()))

    assert tls.fingerprint(authority.certificate_pem) == digest.finalize().hex()


@pytest.mark.parametrize("read", [tls.fingerprint, tls.certificate_lifetime])
def test_what_is_no_certificate_is_refused(read: Callable[[bytes], object]) -> None:
    with pytest.raises(BadInputError):
        read(b"rubbish")


def test_the_key_maker_writes_a_secret_key_and_an_honest_request(authority: tls.Authority, tmp_path: Path) -> None:
    assert keymaker.main([str(tmp_path / "key"), str(tmp_path / "csr")]) == 0

    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    certificate = authority.sign((tmp_path / "csr").read_bytes(), MANAGER, lifetime_s=60)
    (tmp_path / "cert").write_bytes(certificate)
    (tmp_path / "ca").write_bytes(authority.certificate_pem)
    server_context(tmp_path / "cert", tmp_path / "key", tmp_path / "ca", require_client=True)  # or they do not fit


def test_the_key_maker_fails_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keymaker.main([]) == 2
    assert "usage" in capsys.readouterr().err
    assert keymaker.main([str(tmp_path / "missing" / "key"), str(tmp_path / "csr")]) == 1
    assert "cannot write the key" in capsys.readouterr().err


def test_a_certificate_does_not_fit_another_key(authority: tls.Authority, party: Enrol) -> None:
    one, other = party(USER, authority), party(USER, authority)

    with pytest.raises(ssl.SSLError):
        client_context(one.cert, other.key, one.ca)

"""The certificate authority of a deployment, keys and signing requests.

Loads `cryptography`, which is large: only the director and the short-lived key maker import this module.
"""

import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from conpaas.core import files
from conpaas.core.errors import BadInputError
from conpaas.core.identity import Identity

CERTIFICATE_FILE = "ca.crt"
KEY_FILE = "ca.key"

AUTHORITY_LIFETIME = timedelta(days=3650)
CLOCK_MARGIN = timedelta(minutes=5)  # how far the clock of a fresh VM may be behind ours
MAX_CSR_BYTES = 16 * 1024  # an honest P-256 request has 500 bytes


class Authority:
    """The CA of one deployment: the only trust root of its director, managers, agents and users."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate
        self.deployment = str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)

    @classmethod
    def create(cls, deployment: str, *, now: datetime | None = None) -> "Authority":
        """Make a new CA with a new P-256 key, valid for ten years; raise BadInputError for a bad id."""
        Identity.director(deployment)  # the same rule for ids
        start = now or datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "ConPaaS"),
                x509.NameAttribute(NameOID.COMMON_NAME, deployment),
            ]
        )
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), _serial())
            .not_valid_before(start - CLOCK_MARGIN)
            .not_valid_after(start + AUTHORITY_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate)

    @classmethod
    def load(cls, directory: Path) -> "Authority":
        """Read the CA that `save` wrote to `directory`.

        Raises FileNotFoundError when there is none, and BadInputError for files that are damaged or not a
        pair.
        """
        certificate_pem = (directory / CERTIFICATE_FILE).read_bytes()
        key_pem = (directory / KEY_FILE).read_bytes()
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            key = serialization.load_pem_private_key(key_pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
            raise _bad_authority(directory) from exc
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise _bad_authority(directory)
        return cls(key, certificate)

    def save(self, directory: Path) -> None:
        """Write certificate and key (mode 0600) to `directory`, made if need be; each file whole or absent.

        The key comes first: a directory that has the certificate has both.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write_atomically(directory / KEY_FILE, _private_pem(self._key), mode=0o600)
        files.write_atomically(directory / CERTIFICATE_FILE, self.certificate_pem)

    @property
    def certificate_pem(self) -> bytes:
        """The certificate that all parties trust, as PEM."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def sign(self, csr_pem: bytes, identity: Identity, *, lifetime_s: float, now: datetime | None = None) -> bytes:
        """Return a certificate (PEM) that binds the key of `csr_pem` to `identity` for `lifetime_s` seconds.

        Only the key is taken from the request; names and extensions it asks for are ignored. The certificate
        never outlives the CA. Raises BadInputError for a request that is damaged, not signed by its own key,
        or of another kind of key than P-256, and for an identity of another deployment.
        """
        public_key = _requested_key(csr_pem)
        if identity.deployment != self.deployment:
            raise BadInputError(
                f"this is the CA of {self.deployment}, not of {identity.deployment}",
                value=identity.deployment,
            )
        if lifetime_s <= 0:
            raise BadInputError(f"a certificate cannot live {lifetime_s:g} s", value=lifetime_s)
        start = now or datetime.now(UTC)
        end = min(start + timedelta(seconds=lifetime_s), self._certificate.not_valid_after_utc)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.kind)])
        certificate = (
            x509.CertificateBuilder(self._certificate.subject, subject, public_key, _serial())
            .not_valid_before(start - CLOCK_MARGIN)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(certificates=False), critical=True)
            .add_extension(_CLIENT_AND_SERVER, critical=False)
            .add_extension(_alternative_names(identity), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)


def make_key_and_csr() -> tuple[bytes, bytes]:
    """Make a new P-256 key; return it as unencrypted PKCS #8 PEM, and a signing request for it as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256())
    return _private_pem(key), csr.public_bytes(serialization.Encoding.PEM)


def certificate_lifetime(pem: bytes) -> tuple[datetime, datetime]:
    """Return from when and until when the certificate is valid, in UTC; raise BadInputError if it is none."""
    certificate = _certificate(pem)
    return certificate.not_valid_before_utc, certificate.not_valid_after_utc


def fingerprint(pem: bytes) -> str:
    """Return the SHA-256 of the certificate in hex; raise BadInputError if it is none."""
    return _certificate(pem).fingerprint(hashes.SHA256()).hex()


_CLIENT_AND_SERVER = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])


def _alternative_names(identity: Identity) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri), x509.DNSName(identity.host)])


def _key_usage(*, certificates: bool) -> x509.KeyUsage:
    """Allow signing of certificates and revocation lists, or of handshakes; nothing else."""
    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _serial() -> int:
    return secrets.randbelow(2**128 - 1) + 1


def _requested_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key of a request, if its sender holds it; raise BadInputError for any other request."""
    if len(csr_pem) > MAX_CSR_BYTES:
        raise _bad_request("is too large")
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        public_key = csr.public_key()
        if not isinstance(public_key, ec.EllipticCurvePublicKey) or public_key.curve.name != "secp256r1":
            raise _bad_request("has a key that is not P-256")
        if not csr.is_signature_valid:
            raise _bad_request("is not signed by its own key")
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise _bad_request("cannot be read") from exc
    return public_key


def _bad_request(what: str) -> BadInputError:
    return BadInputError(
        f"the certificate signing request {what}",
        hint="make key and request with 'python -m conpaas.core.keymaker KEY_FILE CSR_FILE'",
    )


def _bad_authority(directory: Path) -> BadInputError:
    return BadInputError(
        "the certificate and the key of the CA are damaged, or not of one pair",
        value=str(directory),
        hint=f"restore {CERTIFICATE_FILE} and {KEY_FILE} together, from one backup",
    )


def _certificate(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as exc:
        raise BadInputError("this is not a certificate", hint="give one certificate as PEM") from exc


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )

"""Certificates made for one run, as an operator would have them of an authority."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PEM = serialization.Encoding.PEM


class Certified(NamedTuple):
    """PEM: the signer's certificate, its private key, the root that whoever reads trusts."""

    chain: bytes
    key: bytes
    root: bytes

    def write(self, folder: Path) -> tuple[Path, Path]:
        folder.mkdir(parents=True, exist_ok=True)
        cert, key = folder / "cert.pem", folder / "key.pem"
        cert.write_bytes(self.chain)
        key.write_bytes(self.key)
        return cert, key


def certified(
    key: Any = None, days: tuple[int, int] = (-1, 30), *, passphrase: bytes | None = None
) -> Certified:
    """A certificate for `key` (EC P-256 by default), valid between these days from now, and its root."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    root = ec.generate_private_key(ec.SECP256R1())
    no = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    top = (
        _certificate_builder("Root", "Root", root.public_key(), (-99, 99))
        .add_extension(x509.BasicConstraints(True, None), True)
        .add_extension(x509.KeyUsage(**no | {"key_cert_sign": True, "crl_sign": True}), True)
        .sign(root, hashes.SHA256())
    )
    leaf = (
        _certificate_builder("Minikin's tests", "Root", key.public_key(), days)
        .add_extension(x509.BasicConstraints(False, None), True)
        .add_extension(x509.KeyUsage(**no | {"digital_signature": True}), True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), False)
        .sign(root, hashes.SHA256())
    )
    locked = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, locked)
    return Certified(leaf.public_bytes(PEM), private, top.public_bytes(PEM))


def _certificate_builder(name: str, issuer: str, public: Any, days: tuple[int, int]) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    response = [
        x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, n), x509.NameAttribute(NameOID.ORGANIZATION_NAME, n)]
        )
        for n in (name, issuer)
    ]
    return (
        x509.CertificateBuilder().subject_name(response[0]).issuer_name(response[1]).public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days[0])).not_valid_after(now + timedelta(days[1]))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
    )  # fmt: skip

"""Content Credentials (C2PA 2): a signed manifest in an image that names the program and the origin.

Needs the extra `minikin[c2pa]` and a certificate. The manifest has one action, `c2pa.created`,
with IPTC's source type. Readers show a certificate that is not on their trust list as valid but unknown.
Nothing is fetched and no time stamp is requested; the private key is read once and stays in memory.
"""

from __future__ import annotations

import io
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from minikin import __version__, strict_json
from minikin.errors import BadCredentials, extra
from minikin.images.photos import read_bytes
from minikin.images.pixels import PHONE, kind_of
from minikin.images.xmp import CODES, TRAINED

MAX_PEM = 1 << 20  # bytes
# no thumbnail: it took 449 KB for an image of 49 KB, and 200 ms in place of 4
_SETTINGS = {
    "version": 1,
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
}  # fmt: skip
_HOW = "docs/provenance.md describes a suitable certificate."


class Signer:
    """Signs images with one certificate; thread-safe.

    chain  certificates in PEM, the signer's own first, then the issuers' up to, but without, the root
    key    its private key in PEM: EC on P-256, P-384 or P-521, RSA of 2048 bits or more, or Ed25519
    Raises BadCredentials if they cannot sign: a small image is signed as a test.
    """

    def __init__(self, chain: bytes, key: bytes) -> None:
        import c2pa

        self.expires, algorithm, plain = _check_pair(chain, key)
        self._lock = threading.Lock()
        self._context = c2pa.Context(c2pa.Settings.from_dict(_SETTINGS))
        self._signer = _try(lambda: c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm, chain, plain, None)))
        self.signed(_test_image(), "PNG", TRAINED)

    @classmethod
    def open(cls, certificate: Path | None, key: Path | None) -> Signer | None:
        """A signer from two files; None without files. Raises BadCredentials."""
        if certificate is None and key is None:
            return None
        if certificate is None or key is None:
            raise BadCredentials("Content Credentials need both --c2pa-cert and --c2pa-key.")
        try:
            import c2pa  # noqa: F401
        except ImportError:
            raise BadCredentials(
                f"Content Credentials are not installed. Install them with {extra('c2pa')}."
            ) from None
        return cls(_read(certificate, "certificate"), _read(key, "private key"))

    def signed(self, data: bytes, format: str, source_type: str) -> bytes:
        """The image file with a signed manifest; `format` is Pillow's name. Raises BadCredentials."""
        import c2pa

        if datetime.now(UTC) > self.expires:
            raise BadCredentials(
                f"The certificate for Content Credentials ran out on {self.expires:%Y-%m-%d}; nothing is "
                "signed with it. Renew it and start again, or leave out --c2pa-cert."
            )
        out = io.BytesIO()
        with self._lock:
            builder = c2pa.Builder(_manifest(source_type), context=self._context)
            _try(lambda: builder.sign(self._signer, f"image/{format.lower()}", io.BytesIO(data), out))
        return out.getvalue()


def signature(path: Path) -> dict[str, str] | None:
    """Content Credentials of an image: `state` (Trusted, Valid, Invalid, Unreadable), `by`, `program`.

    None if it has none, or if the extra is not installed. Nothing is fetched. The library trusts no
    authority by default.
    """
    try:
        import c2pa
    except ImportError:
        return None
    data = read_bytes(path)
    kind = kind_of(data)
    if kind not in PHONE:
        return None
    try:
        context = c2pa.Context(c2pa.Settings.from_dict(_SETTINGS))
        reader = c2pa.Reader.try_create(f"image/{kind.lower()}", io.BytesIO(data), context=context)
        if reader is None:
            return None
        report = strict_json.loads(reader.json(), kind=dict)
        active = report["manifests"][report["active_manifest"]]
        agent = (active.get("claim_generator_info") or [{}])[0]
        by = active.get("signature_info", {}).get("common_name") or ""
        state, program = report["validation_state"], f"{agent.get('name', '')} {agent.get('version', '')}"
    except (c2pa.C2paError, ValueError, LookupError, AttributeError, TypeError):
        state = by = program = ""  # malformed
    return {"state": str(state) or "Unreadable", "by": str(by), "program": program.strip()}


def _manifest(source_type: str) -> dict[str, Any]:
    agent = {"name": "Minikin", "version": __version__}
    action = {"action": "c2pa.created", "digitalSourceType": CODES + source_type, "softwareAgent": agent}
    return {
        "claim_generator_info": [agent],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }


def _check_pair(chain: bytes, key: bytes) -> tuple[datetime, str, bytes]:
    """Expiry of the certificate, C2PA's name of the algorithm, and the key in PKCS 8. Raises BadCredentials."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        certificate = x509.load_pem_x509_certificates(chain)[0]
    except ValueError:
        raise BadCredentials(f"The certificate for Content Credentials is not in PEM. {_HOW}") from None
    try:
        private = serialization.load_pem_private_key(key, None)
    except TypeError:
        raise BadCredentials(
            "The private key for Content Credentials is locked with a passphrase. Write it out without one, "
            "readable for you alone: openssl pkey -in KEY -out PLAIN."
        ) from None
    except Exception:  # no cause: the message of the library may quote the file
        raise BadCredentials(f"The private key for Content Credentials cannot be read. {_HOW}") from None
    algorithm = _algorithm(private)
    if private.public_key() != certificate.public_key():
        raise BadCredentials(
            "The private key for Content Credentials is not that of the certificate. The signer's own "
            "certificate comes first in its file, before its issuers'."
        )
    now = datetime.now(UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        when = "ran out on" if now > certificate.not_valid_after_utc else "is not valid before"
        date = (
            certificate.not_valid_after_utc
            if now > certificate.not_valid_after_utc
            else certificate.not_valid_before_utc
        )
        raise BadCredentials(f"The certificate for Content Credentials {when} {date:%Y-%m-%d}. Renew it.")
    plain = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.not_valid_after_utc, algorithm, plain


def _algorithm(private: Any) -> str:
    """C2PA's name of the signature algorithm of a key. Raises BadCredentials for unsupported keys."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in curves:
        return curves[private.curve.name]
    if isinstance(private, rsa.RSAPrivateKey) and private.key_size >= 2048:
        return "ps256"
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    raise BadCredentials(
        f"A private key of this kind ({type(private).__name__.removesuffix('PrivateKey')}) does not sign "
        "Content Credentials. Expected EC on P-256, P-384 or P-521, RSA of 2048 bits or more, or Ed25519."
    )


def _try(work: Any) -> Any:
    """Run a call of the library; raises BadCredentials with its message."""
    import c2pa

    try:
        return work()
    except c2pa.C2paError as e:
        raise BadCredentials(
            f"Content Credentials cannot be signed with this certificate and key ({str(e)[:200]}). {_HOW}"
        ) from None


def _read(path: Path, what: str) -> bytes:
    from minikin.files import read_small

    try:
        data = read_small(path, MAX_PEM)
    except OSError as e:
        raise BadCredentials(f"The {what} {path} cannot be read: {e.strerror or e}.") from None
    if data is None:
        raise BadCredentials(f"{path} is no file of at most {MAX_PEM >> 20} MB, so it is no {what}.")
    return data


def _test_image() -> bytes:
    """A small PNG to test a signature with."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()

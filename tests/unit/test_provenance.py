"""The mark of AI-generated images and Content Credentials: in every image, read back by other programs."""

from __future__ import annotations

import ast
import base64
import io
import json
import re
import shutil
import struct
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import minikin
from minikin import Studio, __version__, save
from minikin.errors import BadCredentials, BadRecipe
from minikin.files import atomic_write
from minikin.generation.source import SourceImage
from minikin.images import metadata, xmp
from minikin.images.credentials import Signer, signature
from minikin.images.encode import MARKED, Marking
from minikin.models.base import Base
from tests.conftest import command
from tests.helpers.credentials import Certified, certified
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import served

IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
XMP = "{http://ns.adobe.com/xap/1.0/}CreatorTool"
PHOTO = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)


def packet(data: bytes) -> str:
    """The XMP packet of a file, found by the formats' own specifications; "" for none."""
    if data.startswith(b"\x89PNG"):
        at = 8
        while at < len(data):
            (n,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
            body = data[at + 8 : at + 8 + n]
            if kind == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0\0\0\0\0"):
                return body[22:].decode()
            at += 12 + n
    elif data.startswith(b"RIFF"):
        at = 12
        while at < len(data):
            kind, (n,) = data[at : at + 4], struct.unpack("<I", data[at + 4 : at + 8])
            if kind == b"XMP ":
                return data[at + 8 : at + 8 + n].decode()
            at += 8 + n + n % 2
    else:
        at = 2
        while data[at] == 0xFF and data[at + 1] != 0xDA:
            (n,) = struct.unpack(">H", data[at + 2 : at + 4])
            head = b"http://ns.adobe.com/xap/1.0/\0"
            if data[at + 1] == 0xE1 and data[at + 4 :].startswith(head):
                return data[at + 4 + len(head) : at + 2 + n].decode()
            at += 2 + n
    return ""


def mark(data: bytes) -> str | None:
    """IPTC's source type in a file, by an XML parser; None for no mark."""
    text = packet(data)
    if not text:
        return None
    (description,) = ET.fromstring(text).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    assert description.attrib[XMP] == f"Minikin {__version__}"
    where, code = description.attrib[IPTC].rsplit("/", 1)
    assert where == "http://cv.iptc.org/newscodes/digitalsourcetype"
    return code


def credentials(data: bytes, format: str, of: Certified) -> dict[str, Any]:
    """The report of C2PA's own reader, which trusts this root."""
    trust = {"trust": {"trust_anchors": of.root.decode()}, "verify": {"verify_trust": True}, "version": 1}
    context = c2pa.Context(c2pa.Settings.from_dict(trust))
    reader = c2pa.Reader(f"image/{format.lower()}", io.BytesIO(data), context=context)
    report: dict[str, Any] = json.loads(reader.json())
    return report


def action(report: dict[str, Any]) -> dict[str, Any]:
    """The first action of the active manifest."""
    assertions = report["manifests"][report["active_manifest"]]["assertions"]
    (actions,) = (a["data"]["actions"] for a in assertions if a["label"].startswith("c2pa.actions"))
    first: dict[str, Any] = actions[0]
    return first


@pytest.fixture(scope="module")
def certificate() -> Certified:
    return certified()


@pytest.fixture(scope="module")
def studio(tiny: Base) -> Studio:
    return Studio(tiny)


# ---- the mark ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("kind", [xmp.TRAINED, xmp.COMPOSITE])
def test_every_format_carries_the_mark(format: str, kind: str) -> None:
    image = Image.fromarray(PHOTO)
    data = MARKED.encode(image, format, source_type=kind)
    assert mark(data) == kind
    assert xmp.source_type_of(Image.open(io.BytesIO(data))) == kind  # our reader, of Pillow's
    assert MARKED.encode(image, format, source_type=kind) == data  # no date, no random number
    assert mark(MARKED.encode(image, format)) == xmp.TRAINED  # whoever forgets marks too much
    for bare in (Marking(on=False).encode(image, format), MARKED.encode(image, format, source_type=xmp.NONE)):
        assert packet(bare) == "" and xmp.source_type_of(Image.open(io.BytesIO(bare))) is None  # control


def test_other_programs_marks_are_read() -> None:
    """As an element, as exiftool writes it; nothing that merely looks like it, nothing without bound."""
    element = f"<Iptc4xmpExt:DigitalSourceType>{xmp.CODES}algorithmicMedia</Iptc4xmpExt:DigitalSourceType>"
    for text, want in (
        (element, "algorithmicMedia"), (f"DigitalSourceType='{xmp.CODES}minorHumanEdits'", "minorHumanEdits"),
        ('DigitalSourceType="http://elsewhere/trainedAlgorithmicMedia"', None), ("", None),
        (" " * xmp.MAX_PACKET + element, None), ("DigitalSourceType=" * 5000, None),
    ):  # fmt: skip
        image = Image.new("RGB", (8, 8))
        image.info["xmp"] = text.encode()
        assert xmp.source_type_of(image) == want
    info = PngInfo()
    info.add_text("source_type", xmp.TRAINED)  # a key of ours in a stranger's file is no mark
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG", pnginfo=info)
    assert xmp.source_type_of(Image.open(out)) is None


def test_save_by_the_name(tmp_path: Path, studio: Studio) -> None:
    image = studio.paint("a cat", steps=1)[0]
    for name in ("a.png", "b.jpg", "c.webp"):
        assert mark(save(image, tmp_path / name).read_bytes()) == xmp.TRAINED
    with pytest.raises(BadRecipe, match=r"saved as .png, .jpg, .jpeg, .webp"):
        save(image, tmp_path / "a.gif")


def test_what_is_made_from_a_photo_is_a_composite(studio: Studio, tmp_path: Path) -> None:
    """An image made from a generated one counts as generated, by its file, its record, or in memory."""
    draft = studio.paint("a cat", steps=2, seed=1)[0]
    photo = Image.fromarray(PHOTO).resize(draft.size)
    half = Image.new("L", draft.size)
    half.paste(255, (0, 0, draft.width // 2, draft.height))
    how = {"prompt": "a dog", "steps": 2}
    assert xmp.source_type_of(studio.refine(draft, **how)[0]) == xmp.TRAINED
    again = studio.refine(photo, **how)[0]
    assert xmp.source_type_of(again) == xmp.COMPOSITE
    assert xmp.source_type_of(studio.refine(again, **how)[0]) == xmp.COMPOSITE  # and it stays one
    assert xmp.source_type_of(studio.inpaint(photo, half, **how)[0]) == xmp.COMPOSITE
    assert SourceImage.of(save(draft, tmp_path / "draft.webp")).source_type == xmp.TRAINED
    assert (
        SourceImage(photo, record={"recipe": {}, "work": "paint"}).source_type == xmp.TRAINED
    )  # by its record
    assert SourceImage(photo, record={"recipe": {}, "parent": {}}).source_type == xmp.COMPOSITE


MAY = {
    "images/encode.py": "the one way",
    "images/credentials.py": "eight pixels to try a signature on",
    "generation/canvas.py": "a mask inside a record",
    "studio/studio.py": "the preview inside a concept's file",
    "tools/tiny_training/in_domain_concepts.py": "drawings of the toy world, taught for its students",
    "tools/tiny_training/examples.py": "drawings of the toy world, for this repository",
}


def writers(text: str) -> Iterator[int]:
    """Lines of a program that let Pillow write an image: `save` with a format, or to an image's name."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "save":
            call = ast.unparse(node)
            if re.search(
                r"format|quality|optimize|compress_level|pnginfo|PNG|JPEG|WEBP|\.(png|jpe?g|webp)", call
            ):
                yield node.lineno


def test_every_image_goes_through_the_encoder() -> None:
    """Whoever writes images otherwise is listed above with the reason; the list is exact."""
    package, checkout = Path(minikin.__file__).parent, Path(__file__).parents[2]
    programs = [(p, package) for p in package.rglob("*.py")]
    programs += [(p, checkout) for p in (checkout / "tools" / "tiny_training").rglob("*.py")]
    writing = {p.relative_to(root).as_posix() for p, root in programs if [*writers(p.read_text())]}
    assert writing == set(MAY)
    for line in ("i.save(b, 'PNG')", "i.save(p, format='JPEG')", "result.image.save(out / 'a.webp')",
                 "image.save(buffer, format, quality=90)"):  # fmt: skip
        assert [*writers(line)], line  # the positive control
    assert not [*writers("concept.save(path, int8=True)")]


# ---- the command line --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of each kind on tiny: the usual, --no-metadata, --no-mark."""
    out = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        for name, flags in {"usual": (), "bare": ("--no-metadata",), "unmarked": ("--no-mark",)}.items():
            patch.setattr("sys.argv", ["minikin", "paint", "a cat", "--steps", "1", "-n", "2",
                                       "--out", str(out / name), *flags])  # fmt: skip
            from minikin.cli.app import main

            try:
                main()
            except SystemExit as e:
                assert not e.code
    return {p.name: p for p in out.iterdir()}


def test_the_command_line_marks_images_and_sheets(folders: dict[str, Path]) -> None:
    for name, want in (("usual", xmp.TRAINED), ("bare", xmp.TRAINED), ("unmarked", None)):
        files = sorted(folders[name].glob("*.png"))
        assert len(files) == 3 and [mark(f.read_bytes()) for f in files] == [want] * 3, name
    bare = Image.open(next(folders["bare"].glob("*-0.png")))
    assert set(bare.info) == {"xmp", "XML:com.adobe.xmp"}  # no recipe: nothing but the mark
    assert "cat" not in str(bare.info)
    assert metadata.read(next(folders["usual"].glob("*-0.png"))).recipe["source_type"] == xmp.TRAINED


def test_show_prints_the_mark(folders: dict[str, Path], monkeypatch: Any, capsys: Any) -> None:
    for name, want in (("usual", "Mark: trainedAlgorithmicMedia"), ("unmarked", "Mark: none")):
        code, out, _ = command(monkeypatch, capsys, "show", next(folders[name].glob("*-0.png")))
        assert code == 0 and want in out and "a cat" in out
    file = next(folders["bare"].glob("*-0.png"))
    code, out, _ = command(monkeypatch, capsys, "show", file)
    assert code == 0 and "No recipe" in out and "Mark: trainedAlgorithmicMedia" in out
    assert signature(file) is None and "Content Credentials" not in out
    _, out, _ = command(monkeypatch, capsys, "show", file, "--json")
    assert json.loads(out)["source_type"] == xmp.TRAINED


# ---- the server --------------------------------------------------------------------------------------


def test_the_server_marks_every_answer(tmp_path: Path, certificate: Certified) -> None:
    """Native, OpenAI's three formats and A1111, marked and signed; uploaded images are not marked."""
    signer = Signer(certificate.chain, certificate.key)
    engine = FakeEngine()
    with served(engine, tmp_path, marking=Marking(signer=signer)) as server, server.client() as client:
        job = client.post("/api/paint?wait=true", json={"prompt": "a"}).json()
        files = [("PNG", client.get(job["results"][0]["url"]).content)]
        for format in ("png", "jpeg", "webp"):
            body = {"prompt": "a", "output_format": format}
            data = client.post("/v1/images/generations", json=body).json()["data"]
            files.append((format, base64.b64decode(data[0]["b64_json"])))
        body = {"prompt": "a", "width": 64, "height": 64}
        files.append(("png", base64.b64decode(client.post("/sdapi/v1/txt2img", json=body).json()["images"][0])))
        for format, data in files:
            assert mark(data) == xmp.TRAINED, format
            report = credentials(data, format, certificate)
            assert report["validation_state"] == "Trusted" and action(report)["action"] == "c2pa.created"
        answer = client.post("/api/recipe", files={"file": ("a.png", files[0][1])}).json()
        assert answer["source_type"] == xmp.TRAINED


def test_the_server_without_marks(tmp_path: Path) -> None:
    """The positive control of the test above, and of the option."""
    with served(FakeEngine(), tmp_path, marking=Marking(on=False)) as server, server.client() as client:
        job = client.post("/api/paint?wait=true", json={"prompt": "a"}).json()
        assert mark(client.get(job["results"][0]["url"]).content) is None
        body = {"prompt": "a", "output_format": "webp"}
        data = client.post("/v1/images/generations", json=body).json()["data"]
        assert mark(base64.b64decode(data[0]["b64_json"])) is None


# ---- Content Credentials -----------------------------------------------------------------------------

KEYS = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}


@pytest.mark.parametrize("kind", KEYS)
def test_every_kind_of_key_signs(kind: str) -> None:
    of = certified(KEYS[kind]())
    data = Marking(signer=Signer(of.chain, of.key)).encode(Image.fromarray(PHOTO))
    assert credentials(data, "PNG", of)["validation_state"] == "Trusted"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_signed_images_have_a_valid_manifest(format: str, certificate: Certified) -> None:
    marking = Marking(signer=Signer(certificate.chain, certificate.key))
    image = Image.fromarray(PHOTO)
    data = marking.encode(image, format, source_type=xmp.COMPOSITE)
    report = credentials(data, format, certificate)
    created = action(report)
    assert report["validation_state"] == "Trusted" and "validation_status" not in report
    assert created["digitalSourceType"] == xmp.CODES + xmp.COMPOSITE and created["action"] == "c2pa.created"
    assert created["softwareAgent"] == {"name": "Minikin", "version": __version__}
    assert mark(data) == xmp.COMPOSITE
    plain = Marking().encode(image, format, source_type=xmp.COMPOSITE)
    assert 0 < len(data) - len(plain) < 6000  # no thumbnail
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(Image.open(io.BytesIO(plain))))
    unmarked = marking.encode(image, format, source_type=xmp.NONE)
    with pytest.raises(c2pa.C2paError, match="no JUMBF"):
        credentials(unmarked, format, certificate)


def test_one_changed_byte_is_found(certificate: Certified) -> None:
    data = bytearray(Marking(signer=Signer(certificate.chain, certificate.key)).encode(Image.fromarray(PHOTO)))
    places = np.random.default_rng(0).integers(data.index(b"IDAT") + 8, len(data) - 20, 20)
    for at in places:
        data[at] ^= 1
        assert credentials(bytes(data), "PNG", certificate)["validation_state"] == "Invalid"
        data[at] ^= 1
    assert credentials(bytes(data), "PNG", certificate)["validation_state"] == "Trusted"  # control


def test_a_certificate_nobody_knows_is_valid_but_not_trusted(certificate: Certified) -> None:
    data = Marking(signer=Signer(certificate.chain, certificate.key)).encode(Image.fromarray(PHOTO))
    report = credentials(data, "PNG", certified())
    assert report["validation_state"] == "Valid"
    assert [s["code"] for s in report["validation_status"]] == ["signingCredential.untrusted"]


def _secret(of: Certified) -> str:
    return of.key.decode().splitlines()[1][:20]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: certified(days=(-20, -10)), "ran out on"),
        (lambda: certified(days=(10, 20)), "is not valid before"),
        (lambda: certified(dsa.generate_private_key(2048)), r"kind \(.*DSA.*\) does not sign"),
        (lambda: certified(rsa.generate_private_key(65537, 1024)), "RSA of 2048 bits or more"),
        (lambda: certified(passphrase=b"secret"), "locked with a passphrase"),
        (lambda: certified()._replace(chain=b"no certificate"), "not in PEM"),
        (lambda: certified()._replace(chain=certified().chain), "not that of the certificate"),
        (lambda: certified()._replace(key=b"-----BEGIN PRIVATE KEY-----\nAAAA"), "cannot be read"),
        (lambda: _own_root(), "cannot be signed with this certificate"),
    ],
)  # fmt: skip
def test_unusable_certificates_are_refused_at_once(make: Any, why: str, tmp_path: Path) -> None:
    of = make()
    cert, private = of.write(tmp_path)
    with pytest.raises(BadCredentials, match=why) as e:
        Signer.open(cert, private)
    assert len(of.key) < 60 or _secret(of) not in str(e.value)
    assert e.value.__cause__ is None  # nor by a traceback


def _own_root() -> Certified:
    """A certificate that signs itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    key = ec.generate_private_key(ec.SECP256R1())
    of = certified(key)
    old = x509.load_pem_x509_certificates(of.chain)[0]
    builder = x509.CertificateBuilder(
        old.subject, old.subject, key.public_key(), 7, old.not_valid_before_utc, old.not_valid_after_utc,
        [e for e in old.extensions if e.oid != x509.AuthorityKeyIdentifier.oid],
    )  # fmt: skip
    return of._replace(chain=builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


def test_a_certificate_that_runs_out_meanwhile(certificate: Certified, monkeypatch: Any) -> None:
    """A server runs for months: later images fail with a message instead of being unsigned."""
    signer = Signer(certificate.chain, certificate.key)
    monkeypatch.setattr(signer, "expires", signer.expires.replace(year=2020))
    with pytest.raises(BadCredentials, match="ran out on 2020"):
        Marking(signer=signer).encode(Image.fromarray(PHOTO))


def test_options_that_do_not_fit(certificate: Certified, tmp_path: Path, monkeypatch: Any) -> None:
    cert, key = certificate.write(tmp_path)
    with pytest.raises(BadCredentials, match="need both"):
        Marking.of(True, cert, None)
    with pytest.raises(BadCredentials, match="cannot be read: No such file"):
        Marking.of(True, cert, tmp_path / "none.pem")
    with pytest.raises(BadRecipe, match="contradicts"):
        Marking.of(False, cert, key)
    assert Marking.of() == Marking()
    monkeypatch.setitem(__import__("sys").modules, "c2pa", None)
    with pytest.raises(BadCredentials, match=r"pip install .*\[c2pa\]"):
        Marking.of(True, cert, key)


def test_the_command_line_signs(
    certificate: Certified, tmp_path: Path, monkeypatch: Any, capsys: Any, caplog: Any
) -> None:
    """By flags and by the environment; the key is in no output."""
    cert, key = certificate.write(tmp_path / "keys")
    base = ("paint", "a cat", "--steps", "1")
    out = tmp_path / "a.png"
    code, *output = command(
        monkeypatch, capsys, *base, "--out", out, "--c2pa-cert", cert, "--c2pa-key", key
    )  # fmt: skip
    assert code == 0 and action(credentials(out.read_bytes(), "PNG", certificate))
    assert metadata.read(out).prompt == "a cat"
    _, text, _ = command(monkeypatch, capsys, "show", out)
    assert f"Content Credentials: Valid, signed by Minikin's tests, Minikin {__version__}" in text
    data = bytearray(out.read_bytes())
    data[data.index(b"IDAT") + 20] ^= 1
    assert signature(atomic_write(tmp_path / "x.png", bytes(data))) == {
        "state": "Invalid",
        "by": "Minikin's tests",
        "program": f"Minikin {__version__}",
    }
    monkeypatch.setenv("MINIKIN_C2PA_CERT", str(cert))
    monkeypatch.setenv("MINIKIN_C2PA_KEY", str(key))
    code, *more = command(monkeypatch, capsys, *base, "--out", tmp_path / "b.png")
    assert code == 0 and action(credentials((tmp_path / "b.png").read_bytes(), "PNG", certificate))
    assert _secret(certificate) not in " ".join([*output, *more, caplog.text])
    key.write_bytes(certified().key)
    code, _, err = command(monkeypatch, capsys, *base, "--out", tmp_path / "c.png")
    assert code == 3 and "not that of the certificate" in err and not (tmp_path / "c.png").exists()


# ---- the page of the documentation -------------------------------------------------------------------

DOCS = (Path(__file__).parents[2] / "docs" / "provenance.md").read_text()


def test_the_documented_lines_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    exec(compile(block, "provenance.md", "exec"), {})
    assert mark((tmp_path / "car.webp").read_bytes()) == xmp.TRAINED


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here")
def test_the_documented_certificate_signs(tmp_path: Path) -> None:
    lines = next(b for b in re.findall(r"```sh\n(.*?)```", DOCS, re.S) if "openssl" in b)
    subprocess.run(["sh", "-e", "-c", lines], cwd=tmp_path, check=True, capture_output=True)
    signer = Signer.open(tmp_path / "chain.pem", tmp_path / "key.pem")
    of = Certified(b"", b"", (tmp_path / "root.pem").read_bytes())
    data = Marking(signer=signer).encode(Image.fromarray(PHOTO))
    assert credentials(data, "PNG", of)["validation_state"] == "Trusted"

"""Art pack: its fingerprint, and its creation from openly licensed npm packages.

    python -m tools.tiny_training.art --out sprites.npz [--packages FOLDER]

The packages (vocabulary.ART_SETS) are fetched with the npm client, or read from FOLDER as npm packs them
(.tgz), and must have the SHA-512 below. Drawings are cropped tightly and centred in 96 px squares.
Versions of a rasteriser differ in a few pixels, so a new pack may differ from the shipped one.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import tempfile
import zipfile
from base64 import b64encode
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from minikin.errors import AssetError, BadRecipe, NoNetwork, extra
from minikin.tiny import vocabulary as words

SIDE = 96  # px
SHIPPED = "7461484e0c2ea533c2bfe62c8664bf3dc86ae8f1bac92fb1d90f69cd999a5289"
INTEGRITY = {  # art set: version, SHA-512 of the packed package as npm states it
    "f3d": (
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
    "flat": (
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "noto": (
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "twe": (
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
}


def shipped() -> Path:
    return Path(str(resources.files("minikin.tiny") / "art" / "sprites.npz"))


@lru_cache(maxsize=4)
def fingerprint(pack: Path | None = None) -> str:
    """SHA-256 of all drawings of a pack, independent of their order. Raises AssetError."""
    from minikin.tiny.sprites import ArtPack

    art = ArtPack.load(pack)
    every = {
        (style, code): a for (_, style), d in art.drawings.items() for code, a in d.items()
    } | art.identities
    total = hashlib.sha256()
    for (style, code), pixels in sorted(every.items()):
        total.update(f"{style}|{code}".encode() + pixels.tobytes())
    return total.hexdigest()


def check(pack: Path | None) -> None:
    """Raises AssetError when the installed pack (None) is not the one the recipes were made for."""
    if pack is None and (match := fingerprint()) != SHIPPED:
        raise AssetError(
            f"The art pack {shipped()} is not the one these recipes were made for: its fingerprint is "
            f"{match[:16]}, expected {SHIPPED[:16]}. Reinstall minikin, or train on this pack on purpose with "
            f"--art {shipped()}."
        )


# ---- making the pack -----------------------------------------------------------------------------


def make(out: Path, packages: Path | None = None, rasterise: Callable[[str], Image.Image] | None = None) -> int:
    """Write the pack; how many drawings it has. Raises NoNetwork, AssetError, StorageError.

    packages   folder with the packed packages; by default they are fetched
    rasterise  SVG text -> RGBA image
    """
    from minikin.files import atomic_write

    rasterise = rasterise or _resvg
    with tempfile.TemporaryDirectory() as scratch:
        readers = {s: _Package(s, _packed(s, packages, Path(scratch)), rasterise) for s in words.ART_SETS}
        sources = [(c.name, s, code) for c in words.CATEGORIES.values() for code in c.codes for s in readers]
        drawings = [readers[s].drawing(code) for _, s, code in sources]
        held = {
            (i.art, i.code): i.name
            for i in reversed(words.IDENTITIES.values())
            if (i.category, i.art, i.code) not in set(sources)
        }
        identity_drawings = [readers[s].drawing(code) for s, code in held]
    atomic_write(
        out,
        packed(
            {
                "names": np.array(["|".join(w) for w in sources]),
                "rgba": np.stack(drawings),
                "held_names": np.array(list(held.values()), dtype=np.str_),
                "held": np.stack(identity_drawings)
                if identity_drawings
                else np.zeros((0, SIDE, SIDE, 4), np.uint8),
            }
        ),
    )
    return len(sources) + len(identity_drawings)


def packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An .npz with members compressed by LZMA, a quarter smaller than numpy's, which numpy reads, too."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as pack:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array, allow_pickle=False)
            pack.writestr(
                zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), member.getvalue(), zipfile.ZIP_LZMA
            )
    return buffer.getvalue()


def fit(image: Image.Image) -> np.ndarray:
    """Cropped tightly, centred in a square: (96, 96, 4) uint8."""
    rgba = image.convert("RGBA")
    ys, xs = np.nonzero(np.asarray(rgba)[..., 3] > 12)
    rgba = rgba.crop((int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1))
    scale = SIDE / max(rgba.size)
    w, h = (max(1, round(v * scale)) for v in rgba.size)
    small = rgba.convert("RGBa").resize((w, h), Image.Resampling.LANCZOS).convert("RGBA")
    square = Image.new("RGBA", (SIDE, SIDE))
    square.paste(small, ((SIDE - w) // 2, (SIDE - h) // 2))
    return np.asarray(square)


def _packed(style: str, folder: Path | None, scratch: Path) -> Path:
    """The packed package of an art set, verified."""
    version, expected = INTEGRITY[style]
    package = words.ART_SETS[style].package
    name = f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    path = (folder or scratch) / name
    if folder is None:
        _fetch(f"{package}@{version}", scratch)
    if not path.exists():
        raise AssetError(f"{path} is missing. Put the packed {package} {version} there (`npm pack`).")
    sha512 = b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if sha512 != expected:
        raise AssetError(
            f"{path} is not the {package} {version} that was looked through for this pack: its SHA-512 is "
            f"{sha512[:16]}..., expected {expected[:16]}.... Delete it and fetch it again."
        )
    return path


def _fetch(package: str, scratch: Path) -> None:
    how = "Fetch it where there is a network (`npm pack`) and pass the folder with --packages."
    try:
        done = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=scratch, capture_output=True, text=True, timeout=600
        )
    except FileNotFoundError:
        raise NoNetwork(f"{package} cannot be fetched: npm is not installed. {how}") from None
    except subprocess.TimeoutExpired:
        raise NoNetwork(f"{package} cannot be fetched: npm did not finish in 10 minutes. {how}") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["npm says nothing"])[-1]
        raise NoNetwork(f"{package} cannot be fetched ({reason}). {how}")


class _Package:
    """Drawings of one art set inside its packed package."""

    def __init__(self, style: str, path: Path, rasterise: Callable[[str], Image.Image]) -> None:
        import json
        import tarfile

        self.style, self.path, self.rasterise = style, path, rasterise
        with tarfile.open(path) as tar:
            self.files = {
                m.name.split("/", 1)[1]: f.read()
                for m in tar.getmembers()
                if m.isfile() and _is_needed(m.name) and (f := tar.extractfile(m))
            }
        self.icons: dict[str, Any] = json.loads(self.files.get("icons.json", b"{}"))
        self.names: dict[str, str] = json.loads(self.files.get("chars.json", b"{}"))

    def drawing(self, code: str) -> np.ndarray:
        """Raises AssetError when the package does not draw this code point."""
        for c in (code, f"{code}-fe0f"):
            if image := self.files.get(f"assets/{c}.webp"):
                return fit(Image.open(io.BytesIO(image)))
            if svg := self._svg(c):
                return fit(self.rasterise(svg))
        raise AssetError(f"{self.path.name} has no drawing of {code} (art set {self.style}).")

    def _svg(self, code: str) -> str | None:
        name = self.names.get(code)
        if name is None:
            return None
        if name not in self.icons["icons"]:
            name = self.icons["aliases"][name]["parent"]
        icon = self.icons["icons"][name]
        w, h = icon.get("width", self.icons["width"]), icon.get("height", self.icons["height"])
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {w} {h}" width="256" height="256">{icon["body"]}</svg>'
        )


def _is_needed(member: str) -> bool:
    name = member.split("/", 1)[-1]
    if name in ("icons.json", "chars.json"):
        return True
    code = name.removeprefix("assets/").removesuffix(".webp").removesuffix("-fe0f")
    identity_codes = {i.code for i in words.IDENTITIES.values()}
    return name.endswith(".webp") and (
        code in identity_codes or any(code in c.codes for c in words.CATEGORIES.values())
    )


def _resvg(svg: str) -> Image.Image:
    try:
        import resvg_py  # type: ignore[import-not-found]
    except ImportError:
        raise BadRecipe(f"Drawing SVG needs the package resvg-py: {extra('build')}.") from None
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg))))


def main(
    out: Annotated[Path, typer.Option(help="the pack to write")] = Path("sprites.npz"),
    packages: Annotated[Path | None, typer.Option(help="folder with the packed packages (.tgz)")] = None,
) -> None:
    """Make the art pack anew from its npm packages."""
    n = make(out, packages)
    fingerprint.cache_clear()
    same = fingerprint(out) == SHIPPED
    print(f"{out}: {n} drawings, {'equal to' if same else 'not pixel for pixel'} the shipped pack.")


if __name__ == "__main__":
    from tools.tiny_training.errors import exit_on_error

    with exit_on_error():
        typer.run(main)

"""The art pack of the small world: made from packages that are the known ones, or refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tools.tiny_training import art

from minikin.errors import AssetError


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: Any) -> Path:
    """Packed stand-ins of the four packages with one drawing each, and a vocabulary of that drawing."""
    import hashlib
    import io
    import tarfile
    from base64 import b64encode

    from PIL import Image

    from minikin.tiny import vocabulary as words

    cat = words.Category("cat", ("1f431",), "animal", "cats")
    monkeypatch.setattr(words, "CATEGORIES", {"cat": cat})
    identity = words.Identity("my_dog", "dog", "f3d", "1f9ae", "dots", ((0, 0, 0), (9, 9, 9)))
    monkeypatch.setattr(words, "IDENTITIES", {"my_dog": identity})
    webp = io.BytesIO()
    Image.new("RGBA", (40, 20), (200, 30, 60, 255)).save(webp, "WEBP", lossless=True)
    icons = {"width": 32, "height": 32, "icons": {"cat-face": {"body": "<path/>"}}}
    icons["aliases"] = {"c": {"parent": "cat-face"}}
    folder = tmp_path / "packages"
    folder.mkdir()
    for style, (version, _) in list(art.INTEGRITY.items()):
        name = words.ART_SETS[style].package.removeprefix("@").replace("/", "-")
        path = folder / f"{name}-{version}.tgz"
        if style == "f3d":
            files = {"assets/1f431.webp": webp.getvalue(), "assets/1f9ae-fe0f.webp": webp.getvalue()}
        else:
            files = {"icons.json": json.dumps(icons).encode(), "chars.json": b'{"1f431": "c"}'}
        with tarfile.open(path, "w:gz") as tar:
            for member, data in files.items():
                info = tarfile.TarInfo(f"package/{member}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        digest = b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
        monkeypatch.setitem(art.INTEGRITY, style, (version, digest))
    return folder


def test_the_art_pack_from_its_packages(tmp_path: Path, packages: Path) -> None:
    from PIL import Image

    rasterised = []

    def rasterise(svg: str) -> Image.Image:
        rasterised.append(svg)
        return Image.new("RGBA", (256, 256), (1, 2, 3, 255))

    assert art.make(tmp_path / "sprites.npz", packages, rasterise) == 5
    with np.load(tmp_path / "sprites.npz") as z:
        assert [str(n) for n in z["names"]] == [f"cat|{s}|1f431" for s in ("f3d", "flat", "noto", "twe")]
        assert z["rgba"].shape == (4, 96, 96, 4)
        assert [str(n) for n in z["held_names"]] == ["my_dog"]
        alpha = z["rgba"][0, ..., 3]
        assert (alpha > 128).any(0).sum() == 96 and (alpha > 128).any(1).sum() == 48  # 2:1, centred
    assert len(rasterised) == 3 and 'viewBox="0 0 32 32"' in rasterised[0]
    from minikin.tiny.sprites import ArtPack

    assert ArtPack.load(tmp_path / "sprites.npz").has("cat", "flat")


def test_packages_must_be_the_known_ones(tmp_path: Path, packages: Path) -> None:
    path = next(packages.glob("*noto*"))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(AssetError, match=r"noto.* its SHA-512 is .*, expected .* Delete it and fetch it again"):
        art.make(tmp_path / "sprites.npz", packages, lambda svg: None)  # type: ignore[arg-type,return-value]
    path.unlink()
    with pytest.raises(AssetError, match="is missing. Put the packed @iconify-json/noto 1.2.9 there"):
        art.make(tmp_path / "sprites.npz", packages, lambda svg: None)  # type: ignore[arg-type,return-value]
    assert not (tmp_path / "sprites.npz").exists()


def test_making_the_pack_offline(tmp_path: Path, monkeypatch: Any) -> None:
    from minikin.errors import NoNetwork

    def offline(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 1, "", "npm error network request failed")

    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(NoNetwork, match=r"cannot be fetched \(npm error network request failed\).*--packages"):
        art.make(tmp_path / "sprites.npz")

"""minikin demo: teach two example concepts on the embedded model and paint them, offline.

All numbers are measured in the run: subject fidelity by tiny's image encoder, the share of images whose scene
is recognised, the change of images of the plain category, file sizes and times.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minikin import files
from minikin.cli import display
from minikin.errors import AssetError
from minikin.evaluation.diffusion_classifier import accuracy
from minikin.evaluation.encoder_registry import open_encoder
from minikin.images import xmp
from minikin.images.encode import save_image
from minikin.images.photos import Photo, load_photos
from minikin.images.sheet import contact_sheet
from minikin.perfusion.concept import Concept
from minikin.recipes import Teach
from minikin.studio import Studio

CONCEPTS = (("my_teapot", "teapot"), ("my_guitar", "guitar"))
SCENES = (
    "in the snow",
    "in the forest",
    "in the desert",
    "at night",
    "on a blue background",
    "on a pink background",
)
STRENGTHS = (0.0, 0.4, 0.7, 1.0, 1.3, 1.6, 2.0)
COLUMNS = 7
SEED = 7


@dataclass(frozen=True)
class Tile:
    """One image of the contact sheet with its caption; without an image it is a gap."""

    image: Image.Image | None
    caption: str


def _row(tiles: list[Tile]) -> list[Tile]:
    """The tiles, filled up with gaps to whole rows of the sheet."""
    return tiles + [Tile(None, "")] * (-len(tiles) % COLUMNS)


def examples_folder() -> Path:
    """The folder of the example photos: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).resolve()
    for folder in (here.parents[3] / "examples", here.parents[1] / "examples"):
        if folder.is_dir():
            return folder
    raise AssetError("The example photos are missing. Run the demo from a checkout of the project.")


def run(out: Path, *, as_json: bool) -> dict[str, Any]:
    """Teach two concepts, paint and measure them; write concepts, OUT/sheet.png and OUT/demo.json."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    display.note(
        "The demo teaches two concepts from the example photos on the embedded model and paints them in new "
        "scenes, together, and at several strengths. It takes about 3 minutes on two cores, without network.",
        as_json=as_json,
    )
    studio = Studio.open("tiny")
    before = {c: _image(studio, f"a photo of a {c}") for _, c in CONCEPTS}
    facts: dict[str, Any] = {"concepts": {}}
    tiles: list[Tile] = []
    for k, (name, category) in enumerate(CONCEPTS):
        part = f"{k + 1} of {len(CONCEPTS)}"
        concept, photos, seconds, size = _teach(studio, name, category, out, as_json, part)
        display.note(f"Painting <{name}> in {len(SCENES)} scenes, and measuring the images.", as_json=as_json)
        rows, measured = _scenes(studio, concept, photos)
        tiles += rows
        facts["concepts"][name] = {"bytes": size, "seconds": round(seconds, 1), **measured}
    display.note("Painting both concepts together, and one at several strengths.", as_json=as_json)
    tiles += _row(_together(studio))
    tiles += _row(_strengths(studio))
    after = {c: _image(studio, f"a photo of a {c}") for _, c in CONCEPTS}
    drift = max(int(np.abs(_array(before[c]) - _array(after[c])).max()) for c in before)
    tiles += [Tile(after[c], f"a photo of a {c}, after teaching") for c in after]
    facts |= {"drift_of_the_category": drift, "seconds": round(time.monotonic() - started, 1)}
    sheet = contact_sheet(
        [s.image for s in tiles], [s.caption for s in tiles], columns=COLUMNS,
        title="Minikin on the embedded toy model: photo and new scenes (subject fidelity); two; strengths",
    )  # fmt: skip
    save_image(sheet, out / "sheet.png", source_type=xmp.COMPOSITE)  # photos are on it, too
    files.atomic_write(out / "demo.json", json.dumps(facts, indent=1).encode())
    _report(facts, out, as_json)
    return facts


def _teach(
    studio: Studio, name: str, category: str, out: Path, as_json: bool, part: str
) -> tuple[Concept, list[Photo], float, int]:
    photos = load_photos(examples_folder() / name)
    display.note(f"Teaching <{name}>, concept {part}, from {len(photos)} photos.", as_json=as_json)
    recipe = Teach(name=name, category=category, sample_every=0)
    started = time.monotonic()
    done = display.run(studio.teaching(photos, recipe), as_json=as_json, label=f"<{name}>: ")
    path = done.result.save(out / f"{name}.safetensors")
    return done.result, photos, time.monotonic() - started, path.stat().st_size


def _scenes(
    studio: Studio, concept: Concept, photos: Sequence[Photo]
) -> tuple[list[Tile], dict[str, Any]]:  # fmt: skip
    """One photo and six scenes that no photo shows, with subject fidelity and scene recognition."""
    encoder, photo = open_encoder("tiny"), Image.fromarray(photos[0].pixels)
    photo_embeddings = encoder.encode_subjects([Image.fromarray(p.pixels) for p in photos])
    images, plain = (
        [_image(studio, f"a photo of {word} {scene}") for scene in SCENES]
        for word in (f"<{concept.name}>", f"a {concept.category}")
    )

    def fidelity(generated: list[Image.Image]) -> list[float]:
        """Mean cosine similarity of each image to the photos."""
        return [float(v) for v in (encoder.encode_subjects(generated) @ photo_embeddings.T).mean(1)]

    of_concept, of_category = fidelity(images), fidelity(plain)
    prompts = [f"a photo of a {concept.category} {scene}" for scene in SCENES]
    measured = {
        "subject_fidelity": round(float(np.mean(of_concept)), 3),
        "subject_fidelity_of_the_plain_category": round(float(np.mean(of_category)), 3),
        "scene_recognised": round(accuracy(studio.base, images, prompts), 2),
    }
    rows = [Tile(photo.resize(images[0].size), f"a photo of {concept.name}")]
    rows += [
        Tile(i, f"<{concept.name}> {s} ({m:.2f})") for i, s, m in zip(images, SCENES, of_concept, strict=True)
    ]
    return rows, measured


def _together(studio: Studio) -> list[Tile]:
    """Both concepts in one image, without and with region words."""
    (a, _), (b, _) = CONCEPTS
    places = ("in a meadow", "on a white background", "in the snow")
    words = (f"<{a}> to the left of <{b}>", f"<{a}@left> to the left of <{b}@right>")
    return [Tile(_image(studio, f"{both} {place}"), f"{both} {place}") for both in words for place in places]


def _strengths(studio: Studio) -> list[Tile]:
    name = CONCEPTS[0][0]
    prompts = [f"a photo of <{name}:{w:g}> in a meadow" for w in STRENGTHS]
    return [Tile(_image(studio, p), f"<{name}:{w:g}>") for p, w in zip(prompts, STRENGTHS, strict=True)]


def _image(studio: Studio, prompt: str, seed: int = SEED) -> Image.Image:
    return studio.paint(prompt, seed=seed)[0]


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.int16)


def _report(facts: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        display.emit({"event": "done", "sheet": str(out / "sheet.png"), **facts})
        return
    display.out.print(f"{out / 'sheet.png'}  look at it: everything in {facts['seconds']:.0f} s")
    for name, f in facts["concepts"].items():
        display.out.print(
            f"{name:12} {f['bytes']:,} bytes, taught in {f['seconds']:.0f} s; subject fidelity "
            f"{f['subject_fidelity']:.2f} (plain category {f['subject_fidelity_of_the_plain_category']:.2f}); "
            f"scene recognised in {f['scene_recognised']:.0%} of {len(SCENES)} images",
            soft_wrap=True,
        )
    drift = facts["drift_of_the_category"]
    display.out.print(
        f"plain category after teaching: {'identical, bit for bit' if not drift else f'changed by {drift}'}"
    )

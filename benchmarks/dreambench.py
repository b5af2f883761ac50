"""The DreamBooth protocol on real photos: 25 prompts a subject, 4 images a prompt, DINO, CLIP-I, CLIP-T.

    python -m benchmarks.dreambench dataset/ --base sd15 --out dreambench     with weights, on a GPU
    python -m benchmarks.dreambench dataset/ --only dog --smoke               random weights of SD 1.5's size

`dataset` is a copy of google/dreambooth's dataset (CC BY 4.0): a folder of photos for each subject and
prompts_and_classes.txt, whose classes and prompts are used as they stand, the rare word and class together
being our concept. Subject fidelity is the mean cosine with all photos (DINO ViT-S/16; CLIP-I, CLIP ViT-B/32),
prompt fidelity (CLIP-T) that with the prompt without the rare word (Ruiz et al. 2023, arXiv:2208.12242, section
4.2). Concepts and images are kept: the same command resumes. The published rows are printed beside ours; they
have other samplers, seeds and, the first, another base.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.memory import full_size
from minikin import Concept, Studio
from minikin.errors import BadRecipe
from minikin.evaluation import metrics
from minikin.evaluation.encoder_registry import open_encoder
from minikin.evaluation.encoders import Encoder
from minikin.evaluation.intervals import Estimate
from minikin.files import atomic_write
from minikin.images.encode import save_image
from minikin.images.photos import load_photos

LIVE = {"cat", "dog"}  # classes with the prompts for living subjects
PUBLISHED = {  # DINO, CLIP-I, CLIP-T; Ruiz et al. 2023, table 1
    "real photos": (0.774, 0.885, None), "DreamBooth (Imagen)": (0.696, 0.812, 0.306),
    "DreamBooth (SD)": (0.668, 0.803, 0.305), "textual inversion (SD)": (0.569, 0.780, 0.255),
}  # fmt: skip
NAME = "mine"


@dataclass(frozen=True)
class Subject:
    """A subject of the dataset; `prompts` have {} in place of it."""

    name: str
    category: str
    prompts: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--base", default="sd15")
    parser.add_argument("--out", type=Path, default=Path("dreambench"))
    parser.add_argument("--only", nargs="*", help="subjects; by default all that have photos")
    parser.add_argument("--copies", type=int, default=4, help="images per prompt")
    parser.add_argument("--preset", help="quality by default")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--smoke", action="store_true", help="test run: random weights, 1 prompt, 1 step")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.smoke:
            args.out = Path(folder)
        _run(args)


def _run(args: argparse.Namespace) -> None:
    chosen = subjects(args.dataset, args.only)
    recipe: dict[str, Any] = {"steps": args.steps, "preset": args.preset}
    encoders: dict[str, Encoder] = {}
    if args.smoke:
        studio, copies = Studio(full_size("sd15")), 1
        recipe = {"steps": 1, "guidance": 1, "width": 256, "height": 256}
        teaching: dict[str, Any] = {"mode": "value", "steps": 1, "batch": 1, "size": 256, "preview": False}
        chosen = [Subject(s.name, s.category, s.prompts[:1]) for s in chosen]
    else:
        encoders = {n: open_encoder(n) for n in ("dino-s16", "clip-b32")}  # before an hour of sampling
        studio, copies, teaching = Studio.open(args.base), args.copies, {}
    same_settings(args.out, {"base": studio.base.fingerprint, "copies": copies, **recipe})
    rows = []
    for subject in chosen:
        images, prompts = generate(studio, subject, args.dataset, args.out, copies, teaching, recipe)
        row = {"subject": subject.name, "images": len(images)}
        if encoders:
            row |= scores(encoders, images, prompts, args.dataset / subject.name)
        rows.append(row)
        print(json.dumps(row, default=asdict), flush=True)
    if encoders:
        print(table(rows))
        (args.out / "dreambench.json").write_text(json.dumps(rows, indent=1, default=asdict))


def same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raise BadRecipe when the images in this folder have other settings: they would count as these."""
    path = out / "settings.json"
    if path.is_file() and (stored := json.loads(path.read_text())) != settings:
        differ = sorted(k for k in settings if stored.get(k) != settings[k])
        raise BadRecipe(
            f"{out} holds images of another run ({', '.join(differ)} differ). Choose another --out, or "
            "delete that folder."
        )
    atomic_write(path, json.dumps(settings).encode())


def subjects(dataset: Path, only: Sequence[str] | None = None) -> list[Subject]:
    """Subjects with photos, with their class and prompts. Raises BadRecipe."""
    try:
        text = (dataset / "prompts_and_classes.txt").read_text()
    except OSError as e:
        raise BadRecipe(
            f"{dataset} is not a copy of google/dreambooth's dataset: prompts_and_classes.txt cannot be read "
            f"({e.strerror}). Give the folder that holds it and the subjects' photos."
        ) from e
    classes = dict(re.findall(r"^([a-z0-9_]+),([a-z ]+)$", text, re.M))
    lists = [re.findall(r"^'(.+?)'\.format", part, re.M) for part in text.split("prompt_list = [")[1:]]
    if len(lists) != 2 or not all(lists):
        raise BadRecipe(f"{dataset}/prompts_and_classes.txt does not hold two lists of prompts.")
    names = [n for n in classes if (dataset / n).is_dir() and (not only or n in only)]
    if not names:
        raise BadRecipe(f"{dataset} holds photos of none of {', '.join(only or classes)}.")
    return [
        Subject(n, classes[n], tuple(p.replace("{0} {1}", "{}") for p in lists[classes[n] in LIVE]))
        for n in names
    ]


def generate(
    studio: Studio, subject: Subject, dataset: Path, out: Path, copies: int, teaching: dict[str, Any],
    recipe: dict[str, Any],
) -> tuple[list[Image.Image], list[str]]:  # fmt: skip
    """Every image of a subject and its plain prompt; stored images are read."""
    file = out / f"{subject.name}.safetensors"
    if file.exists():
        studio.add(str(file))
    else:
        studio.add(studio.teach(dataset / subject.name, name=NAME, category=subject.category, **teaching))
        _concept(studio).save(file)
    images, plain = [], []
    for k, prompt in enumerate(subject.prompts):
        paths = [out / subject.name / f"{k:02d}-{i}.png" for i in range(copies)]
        if not all(p.exists() for p in paths):
            text = prompt.replace("a {}", "{}").replace("{}", f"<{NAME}>")
            for path, image in zip(paths, studio.paint(text, n=copies, seed=k * copies, **recipe), strict=True):
                save_image(image, path)
        images += [Image.open(p).convert("RGB") for p in paths]
        plain += [prompt.replace("{}", subject.category)] * copies
    return images, plain


def _concept(studio: Studio) -> Concept:
    return studio.concepts.loaded[NAME].concept


def scores(
    encoders: dict[str, Encoder], images: list[Image.Image], prompts: list[str], photos: Path
) -> dict[str, Estimate]:
    """DINO, CLIP-I and CLIP-T of one subject."""
    references = [Image.fromarray(p.pixels) for p in load_photos(photos)]
    dino, clip = encoders["dino-s16"], encoders["clip-b32"]
    vectors = clip.encode_images(images)
    return {
        "DINO": metrics.subject_fidelity(dino.encode_images(images), dino.encode_images(references), prompts),
        "CLIP-I": metrics.subject_fidelity(vectors, clip.encode_images(references), prompts),
        "CLIP-T": metrics.text_alignment(vectors, clip.encode_texts(prompts), prompts),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Our row, the mean over subjects, and the published ones."""
    names = ("DINO", "CLIP-I", "CLIP-T")
    ours = tuple(sum(r[n].value for r in rows) / len(rows) for n in names)
    lines = ["| | DINO | CLIP-I | CLIP-T |", "|---|---|---|---|"]
    for what, values in {f"Minikin, {len(rows)} subjects": ours, **PUBLISHED}.items():
        cells = ["" if v is None else f"{v:.3f}" for v in values]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

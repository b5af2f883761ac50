"""Identity accuracy of the images of benchmarks/methods.py, by the world's classifier.

    python -m benchmarks.method_identities --out methods      after benchmarks.methods --out methods

Subject fidelity is measured by tiny's encoder; this classifier (benchmarks/identities.py) is independent of it.
It sees all images as tiny's autoencoder leaves them. Single subjects: share of images whose identity is
recognised, CCD against photos that training did not see, and background preservation against the plain image of
equal words and seed. Two subjects: share with each recognised in its own half. Three, which tiny's world never
shows together: each in its own third.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.identities import Identities, Side
from benchmarks.methods import EXAMPLES, PAIRS, category
from minikin import Studio
from minikin.evaluation import metrics
from minikin.evaluation.intervals import wilson_share
from minikin.files import atomic_write
from minikin.perfusion import concept_file
from minikin.perfusion.masks import image_mask
from minikin.tiny.encoders.classifier import Classifier
from minikin.tiny.world import RESOLUTION, World

TRIPLE = ("my_dog", "my_car", "my_teapot")
PLACES = ("on the beach", "in the forest", "in the snow", "on a blue background", "in the desert", "at night")
WITH_BACKGROUND = ("perfusion-value", "perfusion-gated", "dreambooth-lora")


def open_images(paths: Sequence[Path]) -> np.ndarray:
    """Images (n, 128, 128, 3) uint8."""
    return np.stack([np.asarray(Image.open(p).convert("RGB").resize((RESOLUTION,) * 2)) for p in paths])


class Recogniser:
    """Identities of all examples by the classifier, and a studio for plain images."""

    def __init__(self) -> None:
        self.studio = Studio.open("tiny", device="cpu")
        names = sorted(p.name for p in EXAMPLES.glob("my_*"))
        self.identities = Identities.learn(World("small"), Classifier.open(), names, self.round_trip)
        print(
            f"recognised drawings: {self.identities.true_positive_rate}, others taken for one: "
            f"{self.identities.false_positive_rate}",
            flush=True,
        )

    @torch.no_grad()
    def round_trip(self, images: np.ndarray) -> np.ndarray:
        """Drawings (n, 128, 128, 3) as tiny's autoencoder leaves them."""
        base, parts = self.studio.base, []
        for part in np.array_split(images, max(1, len(images) // 32)):
            x = torch.from_numpy(part.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
            z = base.to_latents(x)
            decoded = base.vae.decode(z / base.vae.config.scaling_factor, return_dict=False)[0]
            parts.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
        return np.concatenate(parts)

    def recognise(self, images: np.ndarray, name: str, side: Side = "all") -> np.ndarray:
        return self.identities.recognise(images, [name] * len(images), [side] * len(images))

    def confidence(self, images: np.ndarray, name: str) -> np.ndarray:
        return self.identities.confidence(images, [name] * len(images), ["all"] * len(images))

    def background(self, report: dict[str, Any], name: str, steps: int, images: np.ndarray) -> float:
        """Background preservation, against the plain image of each prompt and seed."""
        noun, base, seeds = category(name), self.studio.base, report["seeds"]
        recipe = {"steps": steps, "n": len(seeds), "seed": seeds[0]}
        recipe |= {"preset": "tdm"} if steps <= 8 else {}
        plain = [i for p in report["prompts"] for i in self.studio.paint(_plain(p, noun), **recipe)]
        masks = [
            np.maximum(image_mask(base, a, noun), image_mask(base, Image.fromarray(b), noun))
            for a, b in zip(plain, images, strict=True)
        ]
        prompts = [p for p in report["prompts"] for _ in seeds]
        without = np.stack([np.asarray(i) for i in plain])
        return metrics.background_preservation(without, images, masks, prompts).value

    def thirds(self, images: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """(n, 3): whether the nearest identity of each third is the right one, and near enough."""
        hits, identities = [], self.identities
        for k, name in enumerate(names):
            mask = np.zeros((RESOLUTION, RESOLUTION), bool)
            mask[:, k * RESOLUTION // 3 : (k + 1) * RESOLUTION // 3] = True
            vectors = identities.classifier.encode_subjects(images, [mask] * len(images))
            cosines = vectors @ identities.references.T
            place = identities.names.index(name)
            hits.append(((cosines[:, place] >= identities.threshold) & (cosines.argmax(-1) == place)).numpy())
        return np.stack(hits, 1)


def _plain(prompt: str, noun: str) -> str:
    return prompt.replace("<mine>", f"a {noun}" if prompt.startswith("<") else noun)


def _share(hits: Any) -> str:
    """Share of true values (n,), with its interval."""
    return wilson_share(int(np.sum(hits)), len(hits)).percent()


def singles(recogniser: Recogniser, out: Path) -> None:
    tables: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for path in sorted(out.glob("*/single.json")):
        name, report = path.parent.name, json.loads(path.read_text())
        held_out = open_images(sorted((EXAMPLES / name / "unseen").glob("*.jpg")))
        real = recogniser.confidence(recogniser.round_trip(held_out), name)
        for m in report["methods"]:
            for r in m["samplers"]:
                images = open_images([path.parent / "images" / p for p in r["strengths"][0]["images"]])
                row = tables.setdefault(r["sampler"], {}).setdefault(
                    m["method"], {"right": [], "ccd": [], "background": []}
                )
                row["right"] += recogniser.recognise(images, name).tolist()
                row["ccd"].append(metrics.ccd(real, recogniser.confidence(images, name)).value)
                if m["method"] in WITH_BACKGROUND:
                    steps = int(r["sampler"].split()[0])
                    row["background"].append(recogniser.background(report, name, steps, images))
    for sampler, methods in tables.items():
        print(f"\n### {sampler}\n\n| method | identity | CCD | background preservation |\n|---|---|---|---|")
        for method, row in methods.items():
            background = f"{np.mean(row['background']):.3f}" if row["background"] else ""
            print(
                f"| {method} | {_share(row['right'])} | {np.mean(row['ccd']):.3f} | {background} |", flush=True
            )


def pairs(recogniser: Recogniser, out: Path) -> None:
    tables: dict[str, dict[str, dict[str, list[bool]]]] = {}
    for path in sorted(out.glob("*/pair*.json")):
        names = (path.parent.name, PAIRS[path.parent.name])
        categories = "same category" if category(names[0]) == category(names[1]) else "different"
        for m in json.loads(path.read_text())["methods"]:
            for r in m["samplers"]:
                images = open_images([path.parent / "images" / p for p in r["two_subject_images"]])
                left = recogniser.recognise(images, names[0], "left")
                right = recogniser.recognise(images, names[1], "right")
                row = tables.setdefault(f"{r['sampler']}, {categories}", {}).setdefault(m["method"], {})
                row.setdefault("both", []).extend((left & right).tolist())
                row.setdefault("either", []).extend((left | right).tolist())
    for title, methods in tables.items():
        print(f"\n### Two, {title}\n\n| method | both | at least one |\n|---|---|---|")
        for method, row in methods.items():
            print(f"| {method} | {_share(row['both'])} | {_share(row['either'])} |", flush=True)


def triple(recogniser: Recogniser, out: Path) -> None:
    """Three concepts, taught here and stored below `out`, in one image, with and without region words."""
    for name in TRIPLE:
        path = out / "three" / f"{name}.safetensors"
        if not path.is_file():
            concept = recogniser.studio.teach(
                EXAMPLES / name, name=name, category=category(name), sample_every=0
            )
            atomic_write(path, concept_file.to_bytes(concept))
        recogniser.studio.add(concept_file.load(path))
    print("\n### Three\n\n| | all three | each, in its third |\n|---|---|---|")
    for label, regions in (("words", ("", "", "")), ("region words", ("@left", "@center", "@right"))):
        text = ", ".join(f"<{n}{r}>" for n, r in zip(TRIPLE, regions, strict=True))
        images = [i for p in PLACES for i in recogniser.studio.paint(f"a photo of {text} {p}", n=2, seed=0)]
        hits = recogniser.thirds(np.stack([np.asarray(i) for i in images]), TRIPLE)
        each = " ".join(f"{v:.0%}" for v in hits.mean(0))
        print(f"| {label} | {_share(hits.all(1))} | {each} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("methods"))
    args = parser.parse_args()
    recogniser = Recogniser()
    singles(recogniser, args.out)
    pairs(recogniser, args.out)
    triple(recogniser, args.out)


if __name__ == "__main__":
    main()

"""What the world's classifier says of the images of benchmarks/bars.py: is it this very thing?

    python -m benchmarks.truths --out bars      after benchmarks.bars --out bars

Likeness is the judge's; this is the oracle that the judge is checked by (benchmarks/identities.py), shown the
round trip of tiny's autoencoder. Of single things: the share in which the identity is recognised, how
much less sure the oracle is than of photos that teaching did not see (CCD), and the share of pixels outside
the subject that are as in the plain image of equal words and seed. Of two things: the share with each
recognised in its own half. Of three, which tiny's world never shows together: each in its own third.
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

from benchmarks.bars import EXAMPLES, PAIRS, category
from benchmarks.identities import Identities, Side
from minikin import Studio
from minikin.evaluation import metrics
from minikin.evaluation.intervals import Measured, share
from minikin.files import atomic_write
from minikin.perfusion.masks import picture_mask
from minikin.tiny.encoders.classifier import Classifier
from minikin.tiny.world import RESOLUTION, World

TRIPLE = ("my_dog", "my_car", "my_teapot")
PLACES = ("on the beach", "in the forest", "in the snow", "on a blue background", "in the desert", "at night")
KEPT_OF = ("perfusion-row", "perfusion-gated", "dreambooth-lora")


def opened(paths: Sequence[Path]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p).convert("RGB").resize((RESOLUTION,) * 2)) for p in paths])


class Oracle:
    """The identities of all examples, and the studio that images come from."""

    def __init__(self) -> None:
        self.studio = Studio.open("tiny", device="cpu")
        names = sorted(p.name for p in EXAMPLES.glob("my_*"))
        self.known = Identities.learn(World("small"), Classifier.open(), names, self.round_trip)
        print(
            f"recognised drawings: {self.known.found}, others taken for one: {self.known.mistaken}", flush=True
        )

    @torch.no_grad()
    def round_trip(self, pictures: np.ndarray) -> np.ndarray:
        """Drawings as tiny's autoencoder leaves them, (n, 128, 128, 3)."""
        base, out = self.studio.base, []
        for part in np.array_split(pictures, max(1, len(pictures) // 32)):
            x = torch.from_numpy(part.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
            z = base.to_latents(x)
            made = base.vae.decode(z / base.vae.config.scaling_factor, return_dict=False)[0]
            out.append(((made.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
        return np.concatenate(out)

    def recognised(self, pictures: np.ndarray, name: str, side: Side = "all") -> np.ndarray:
        return self.known.recognise(pictures, [name] * len(pictures), [side] * len(pictures))

    def sure(self, pictures: np.ndarray, name: str) -> np.ndarray:
        return self.known.confidence(pictures, [name] * len(pictures), ["all"] * len(pictures))

    def kept(self, report: dict[str, Any], name: str, steps: int, pictures: np.ndarray) -> Measured:
        """Of pixels around the subject, against the plain image of each prompt and seed."""
        kind, base, seeds = category(name), self.studio.base, report["seeds"]
        how = {"steps": steps, "n": len(seeds), "seed": seeds[0]} | ({"preset": "tdm"} if steps <= 8 else {})
        plain = [i for p in report["prompts"] for i in self.studio.paint(_plain(p, kind), **how)]
        masks = [
            np.maximum(picture_mask(base, a, kind), picture_mask(base, Image.fromarray(b), kind))
            for a, b in zip(plain, pictures, strict=True)
        ]
        each = [p for p in report["prompts"] for _ in seeds]
        return metrics.kept(np.stack([np.asarray(i) for i in plain]), pictures, masks, each)

    def thirds(self, pictures: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """(n, 3): whether each third shows its own identity best of all known, beyond the threshold."""
        hits = []
        for k, name in enumerate(names):
            mask = np.zeros((RESOLUTION, RESOLUTION), bool)
            mask[:, k * RESOLUTION // 3 : (k + 1) * RESOLUTION // 3] = True
            seen = self.known.classifier.likeness(pictures, [mask] * len(pictures)) @ self.known.references.T
            place = self.known.names.index(name)
            hits.append(((seen[:, place] >= self.known.threshold) & (seen.argmax(-1) == place)).numpy())
        return np.stack(hits, 1)


def _plain(prompt: str, kind: str) -> str:
    return prompt.replace("<mine>", f"a {kind}" if prompt.startswith("<") else kind)


def singles(oracle: Oracle, out: Path) -> None:
    found: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for path in sorted(out.glob("*/single.json")):
        name, report = path.parent.name, json.loads(path.read_text())
        unseen = opened(sorted((EXAMPLES / name / "unseen").glob("*.jpg")))
        real = oracle.sure(oracle.round_trip(unseen), name)
        for m in report["methods"]:
            for c in m["courses"]:
                pictures = opened([path.parent / "pictures" / p for p in c["points"][0]["pictures"]])
                row = found.setdefault(c["course"], {}).setdefault(
                    m["method"], {"right": [], "ccd": [], "kept": []}
                )
                row["right"] += oracle.recognised(pictures, name).tolist()
                row["ccd"].append(metrics.deviation(real, oracle.sure(pictures, name)).value)
                if m["method"] in KEPT_OF:
                    row["kept"].append(oracle.kept(report, name, int(c["course"].split()[0]), pictures).value)
    for course, methods in found.items():
        print(f"\n### {course}\n\n| method | this very thing | CCD | kept around it |\n|---|---|---|---|")
        for method, row in methods.items():
            kept = f"{np.mean(row['kept']):.3f}" if row["kept"] else ""
            print(f"| {method} | {share(sum(row['right']), len(row['right'])).percent()} | "
                  f"{np.mean(row['ccd']):.3f} | {kept} |", flush=True)  # fmt: skip


def pairs(oracle: Oracle, out: Path) -> None:
    found: dict[str, dict[str, dict[str, list[bool]]]] = {}
    for path in sorted(out.glob("*/pair*.json")):
        names = (path.parent.name, PAIRS[path.parent.name])
        kind = "same category" if category(names[0]) == category(names[1]) else "different"
        for m in json.loads(path.read_text())["methods"]:
            for c in m["courses"]:
                pictures = opened([path.parent / "pictures" / p for p in c["duets"]])
                both = [
                    oracle.recognised(pictures, n, s) for n, s in zip(names, ("left", "right"), strict=True)
                ]
                row = found.setdefault(f"{c['course']}, {kind}", {}).setdefault(m["method"], {})
                row.setdefault("both", []).extend((both[0] & both[1]).tolist())
                row.setdefault("either", []).extend((both[0] | both[1]).tolist())
    for course, methods in found.items():
        print(f"\n### Two, {course}\n\n| method | both | at least one |\n|---|---|---|")
        for method, row in methods.items():
            cells = [share(sum(row[k]), len(row[k])).percent() for k in ("both", "either")]
            print(f"| {method} | {' | '.join(cells)} |", flush=True)


def triple(oracle: Oracle, out: Path) -> None:
    """Three concepts, taught here and kept below `out`, in one image, with and without region words."""
    from minikin.perfusion import concept_file

    for name in TRIPLE:
        path = out / "three" / f"{name}.safetensors"
        if not path.is_file():
            taught = oracle.studio.teach(EXAMPLES / name, name=name, category=category(name), sample_every=0)
            atomic_write(path, concept_file.to_bytes(taught))
        oracle.studio.add(concept_file.load(path))
    print("\n### Three\n\n| | all three | each, in its third |\n|---|---|---|")
    for how, regions in (("words", ("", "", "")), ("region words", ("@left", "@center", "@right"))):
        text = ", ".join(f"<{n}{r}>" for n, r in zip(TRIPLE, regions, strict=True))
        made = [i for p in PLACES for i in oracle.studio.paint(f"a photo of {text} {p}", n=2, seed=0)]
        hits = oracle.thirds(np.stack([np.asarray(i) for i in made]), TRIPLE)
        print(f"| {how} | {share(int(hits.all(1).sum()), len(hits)).percent()} | "
              f"{' '.join(f'{v:.0%}' for v in hits.mean(0))} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bars"))
    args = parser.parse_args()
    oracle = Oracle()
    singles(oracle, args.out)
    pairs(oracle, args.out)
    triple(oracle, args.out)


if __name__ == "__main__":
    main()

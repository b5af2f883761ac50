"""Metrics of the embedded encoders: `python -m tools.tiny_training.evaluate_encoders [--scenes 1000]`.

They are measured on held-out scenes of the small world, its personal identities, and hard negatives of
reserved drawings, once as rendered and once after the embedded model's autoencoder, whose images the
encoders are for. 95 % intervals by Wilson.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tools.tiny_training import encoder_metrics
from tools.tiny_training.evaluation.model import Model
from tools.tiny_training.hard_negatives import HardNegatives

from minikin.errors import MinikinError
from minikin.evaluation.intervals import wilson_share
from minikin.files import atomic_write
from minikin.tiny import vocabulary as words
from minikin.tiny.encoders.classifier import Classifier
from minikin.tiny.encoders.dual_encoder import DualEncoder
from minikin.tiny.world import World

VIEWS = 20  # images of every personal identity
BLOCKS, SEED = 60, 303  # of hard negatives

Change = Callable[[np.ndarray], np.ndarray]


def identities(world: World) -> dict[str, np.ndarray]:
    """Images (VIEWS, 128, 128, 3) uint8 of every personal identity in random scenes, by name."""
    out = {}
    for k, name in enumerate(words.IDENTITIES):
        rngs = [np.random.default_rng((SEED, k, i)) for i in range(VIEWS)]
        images = [world.draw(world.decide(r, layout="single", identity=name))[0] for r in rngs]
        out[name] = np.stack([np.asarray(d) for d in images])
    return out


def report(
    encoder: DualEncoder,
    classifier: Classifier,
    held: encoder_metrics.HeldOut,
    identity_images: dict[str, np.ndarray],
    negatives: HardNegatives,
    change: Change,
) -> dict[str, Any]:
    """All metrics by name, on images after `change`."""
    images = change(held.images)
    counts = encoder_metrics.accuracies(classifier.predict(images), held.truth)
    out: dict[str, Any] = {f: wilson_share(right, n).percent() for f, (right, n) in counts.items() if n}
    n = len(held.captions) // encoder_metrics.CANDIDATES * encoder_metrics.CANDIDATES
    right = round(encoder_metrics.caption_accuracy(encoder.fit(images, held.captions), held.captions) * n)
    out["caption among 50"] = wilson_share(right, n).percent()
    category = {name: i.category for name, i in words.IDENTITIES.items()}
    for name, encode in (("dual encoder", encoder.encode_subjects), ("classifier", classifier.encode_subjects)):
        vectors = {k: encode(change(v)) for k, v in identity_images.items()}
        all_pairs, same_category = encoder_metrics.examples_auc(vectors, category)
        out[f"{name}: identity AUC, personal"] = round(all_pairs, 4)
        out[f"{name}: identity AUC, my_cat and my_cat2"] = round(same_category, 4)
        out[f"{name}: identity AUC, hard negatives"] = round(
            encoder_metrics.identity_auc(encode, negatives, change=change), 4
        )
        if change is unchanged:
            masked = encoder_metrics.identity_auc(encode, negatives, masked=True)
            out[f"{name}: identity AUC, hard negatives with masks"] = round(masked, 4)
    return out


def unchanged(images: np.ndarray) -> np.ndarray:
    return images


def main() -> int:
    """The command; returns the exit code."""
    p = argparse.ArgumentParser(
        "python -m tools.tiny_training.evaluate_encoders", description="Metrics of dual encoder and classifier."
    )
    p.add_argument("--scenes", type=int, default=1000)
    p.add_argument("--json", type=Path, metavar="OUT", help="write all metrics there")
    p.add_argument("--dual-encoder", type=Path, help="weight file; the embedded one by default")
    p.add_argument("--classifier", type=Path, help="weight file; the embedded one by default")
    a = p.parse_args()
    try:
        encoder, classifier = DualEncoder.open(a.dual_encoder), Classifier.open(a.classifier)
        world, model = World("small"), Model("tiny", "cpu")
        held = encoder_metrics.HeldOut.draw(world, max(encoder_metrics.CANDIDATES, a.scenes))
        identity_images = identities(world)
        reports = {}
        with tempfile.TemporaryDirectory() as folder:
            negatives = HardNegatives.draw(Path(folder), world, BLOCKS, SEED, "test")
            for name, change in (("as drawn", unchanged), ("through the autoencoder", model.round_trip)):
                reports[name] = report(encoder, classifier, held, identity_images, negatives, change)
                print(f"\n{name}", *(f"  {k:<40}{v}" for k, v in reports[name].items()), sep="\n", flush=True)
        if a.json:
            atomic_write(a.json, (json.dumps(reports, indent=1) + "\n").encode())
    except MinikinError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measure the judges: `python -m minikin.tiny.encoders [--scenes 1000] [--json OUT]`.

Held-out scenes of the small world, its personal identities, and lookalikes of reserved drawings;
once as drawn and once through the autoencoder of the embedded model, whose images the judges are
for. 95 % intervals by Wilson.
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
from tools.tiny_training.hard_negatives import Lookalikes

from minikin.errors import MinikinError
from minikin.evaluation.intervals import share
from minikin.files import atomic_write
from minikin.tiny import vocabulary as words
from minikin.tiny.encoders.classifier import Classifier
from minikin.tiny.encoders.dual_encoder import Judge
from minikin.tiny.world import World

VIEWS = 20  # images of every personal identity
BLOCKS, SEED = 60, 303  # of lookalikes

Change = Callable[[np.ndarray], np.ndarray]


def identities(world: World) -> dict[str, np.ndarray]:
    """Every personal identity alone in random scenes: name to (VIEWS, 128, 128, 3) uint8."""
    out = {}
    for k, name in enumerate(words.IDENTITIES):
        rngs = [np.random.default_rng((SEED, k, i)) for i in range(VIEWS)]
        drawn = [world.draw(world.decide(r, layout="single", identity=name))[0] for r in rngs]
        out[name] = np.stack([np.asarray(d) for d in drawn])
    return out


def report(
    judge: Judge, classifier: Classifier, held: encoder_metrics.Held,
    own: dict[str, np.ndarray], like: Lookalikes,
    change: Change,
) -> dict[str, Any]:  # fmt: skip
    """All numbers on images that went through `change`."""
    pictures = change(held.pictures)
    found = encoder_metrics.accuracies(classifier.look(pictures), held.truth)
    out: dict[str, Any] = {f: share(right, n).percent() for f, (right, n) in found.items() if n}
    n = len(held.captions) // encoder_metrics.AMONG * encoder_metrics.AMONG
    right = round(encoder_metrics.caption_of(judge, pictures, held.captions) * n)
    out["caption among 50"] = share(right, n).percent()
    category = {name: i.category for name, i in words.IDENTITIES.items()}
    for name, likeness in (("judge", judge.likeness), ("classifier", classifier.likeness)):
        vectors = {k: likeness(change(v)) for k, v in own.items()}
        everyone, near = encoder_metrics.examples_auc(vectors, category)
        out[f"{name}: identity AUC, personal"] = round(everyone, 4)
        out[f"{name}: identity AUC, my_cat and my_cat2"] = round(near, 4)
        out[f"{name}: identity AUC, lookalikes"] = round(
            encoder_metrics.identity_auc(likeness, like, change=change), 4
        )
        if change is unchanged:
            masked = encoder_metrics.identity_auc(likeness, like, masked=True)
            out[f"{name}: identity AUC, lookalikes with masks"] = round(masked, 4)
    return out


def unchanged(pictures: np.ndarray) -> np.ndarray:
    return pictures


def main() -> int:
    """The command; returns the exit code."""
    p = argparse.ArgumentParser("python -m minikin.tiny.encoders", description="Measure the judges.")
    p.add_argument("--scenes", type=int, default=1000)
    p.add_argument("--json", type=Path, metavar="OUT", help="write all numbers there")
    p.add_argument("--judge", type=Path, help="another file than the embedded one")
    p.add_argument("--classifier", type=Path, help="the same")
    a = p.parse_args()
    try:
        judge, classifier = Judge.open(a.judge), Classifier.open(a.classifier)
        world, model = World("small"), Model("tiny", "cpu")
        held, own = encoder_metrics.Held.draw(world, max(encoder_metrics.AMONG, a.scenes)), identities(world)
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            like = Lookalikes.draw(Path(folder), world, BLOCKS, SEED, "test")
            for name, change in (("as drawn", unchanged), ("through the autoencoder", model.round_trip)):
                found[name] = report(judge, classifier, held, own, like, change)
                print(f"\n{name}", *(f"  {k:<40}{v}" for k, v in found[name].items()), sep="\n", flush=True)
        if a.json:
            atomic_write(a.json, (json.dumps(found, indent=1) + "\n").encode())
    except MinikinError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

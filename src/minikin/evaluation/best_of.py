"""Choosing: the best of many drafts, by what a judge finds.

    alignment   how well the image fits its prompt, the category in place of <tom>
    likeness    how much it is like the concept's photos, where there are some

Both are cosines on scales of their own, so drafts are ranked by the sum of their standard scores among the
drafts: each says how far an image stands out in its own batch. Equal ones keep the order of their seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.evaluation.encoders import Judge
from minikin.evaluation.scores import plain
from minikin.evaluation.sweep.task import references, suited
from minikin.generation.sampler import Painted
from minikin.models.base import Base
from minikin.models.prompt import concept_tags
from minikin.recipes import Best, Paint


def ranked(*scores: Sequence[float]) -> list[int]:
    """Indices, the best first, by the sum of standard scores; a score that is the same for all says nothing."""
    total = np.zeros(len(scores[0]))
    for values in (np.asarray(s, np.float64) for s in scores):
        spread = values.std()
        if spread > 1e-9:
            total += (values - values.mean()) / spread
    return [int(i) for i in np.argsort(-total.round(9), kind="stable")]


@dataclass(frozen=True)
class Chooser:
    """A judge, what it looks for, and what it cannot judge.

    prompt  the plain one
    photos  (m, d) of the concept; None where there are none
    """

    judge: Judge
    prompt: str
    photos: Tensor | None
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, best: Best, base: Base, recipe: Paint, categories: Mapping[str, str], judge: Judge | None = None
    ) -> Chooser:
        """Open what is needed, before anything is painted.

        Raises BadRecipe for a judge of another world or that does not read, BadPhoto, and what
        `open_judge` raises: NoNetwork when a judge's weights are not on this machine.
        """
        best.drafts(recipe)
        name = best.judge or ("tiny" if base.architecture == "tiny" else "clip-b32")
        known = None
        if best.photos:
            judge, _, seen = references(name, base, best.photos, judge, recipe.device)
            known = seen.photos
        judge = judge or suited(name, base, recipe.device)
        if not judge.reads:
            raise BadRecipe(
                f"The judge {judge.name} does not read, so it cannot tell what fits the prompt. Use clip-b32."
            )
        said: tuple[str, ...] = ()
        if known is None and concept_tags(recipe.prompt):
            said = ("Without its photos, likeness to the concept is not judged: --photos FOLDER.",)
        return cls(judge, plain(recipe.prompt, categories), known, said)

    def best(self, drafts: Sequence[Painted], n: int) -> tuple[list[Painted], dict[int, dict[str, Any]]]:
        """The n best, the best first, and what was found of each by its seed."""
        pictures = [one.image for one in drafts]
        found = {"alignment": (self.judge.images(pictures) @ self.judge.texts([self.prompt]).T)[:, 0].tolist()}
        if self.photos is not None:
            found["likeness"] = (self.judge.likeness(pictures) @ self.photos.T).mean(1).tolist()
        order = ranked(*found.values())
        scores = {
            drafts[i].seed: {
                "rank": rank, "of": len(drafts), "judge": self.judge.name,
                **{name: round(values[i], 4) for name, values in found.items()},
            }
            for rank, i in enumerate(order, 1)
        }  # fmt: skip
        return [drafts[i] for i in order[:n]], scores

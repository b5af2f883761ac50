"""Custom Diffusion: keys, values and a word (Kumari et al. 2023, arXiv:2212.04488).

Trained: to_k and to_v of every cross-attention, and the vector of a modifier word that starts as that of
a rare one; no gradient through the first token, as published.
Prompts: "a photo of a <new1> cat". The regularisation images are painted by the base, as DreamBooth's
are; the paper prefers real ones of the category.
Files: pytorch_custom_diffusion_weights.safetensors, 77 MB for SD 1.5, for `pipe.unet.load_attn_procs(...,
_pipeline=pipe)`, and <name>.safetensors, the word, for `pipe.load_textual_inversion`.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch

from minikin.baselines import embedding
from minikin.baselines.method import TO_KV, Kept, Method
from minikin.baselines.result import Learned
from minikin.baselines.sizes import Shapes
from minikin.baselines.student import Student, twin
from minikin.errors import BadConceptFile
from minikin.files import atomic_write
from minikin.models.base import Base
from minikin.recipes import Baseline

FILE = "pytorch_custom_diffusion_weights.safetensors"


class CustomDiffusion(Method):
    rare = ("ucd", "embic")  # of the published ktn, pll and ucd: rare, and one token by itself

    def student(self, base: Base, recipe: Baseline, word: str) -> Student:
        unet = twin(base.unet, lambda name: bool(TO_KV.fullmatch(name)))
        return Student(base, unet, embedding.start(base, word), hold_first=True)

    def kept(self, student: Student) -> Kept:
        weights = {n: p for n, p in student.unet.named_parameters() if TO_KV.fullmatch(n)}
        return Kept(
            words=tuple(w.detach().cpu().clone() for w in student.words),
            weights={n: p.detach().cpu().clone() for n, p in weights.items()},
        )

    def write(self, base: Base, learned: Learned, folder: Path) -> list[Path]:
        from safetensors.torch import save

        tensors = {_theirs(n): t for n, t in learned.weights.items()}
        for name in base.unet.attn_processors:
            if ".attn1." in name:  # diffusers wants every attention named: nothing stands for no change
                tensors[name] = torch.zeros(0)
        path = atomic_write(folder / FILE, save(tensors, {"format": "pt"}))
        word = f"<{learned.name}>"
        return [path, embedding.write(base, learned.words, word, folder / f"{learned.name}.safetensors")]

    def read(self, base: Base, folder: Path, name: str) -> Kept:
        found = embedding.tensors(folder / FILE)
        wanted = {n: p.shape for n, p in base.unet.named_parameters() if TO_KV.fullmatch(n)}
        if any(_theirs(n) not in found or found[_theirs(n)].shape != s for n, s in wanted.items()):
            raise BadConceptFile(
                f"{folder / FILE} does not have the keys and values of {base.name}. Open the base it was made "
                "for."
            )
        weights = {n: found[_theirs(n)] for n in wanted}
        return Kept(embedding.read(base, folder / f"{name}.safetensors"), weights)

    def count(self, shapes: Shapes, rank: int) -> int:
        return sum(prod(s) for n, s in shapes.unet.items() if TO_KV.fullmatch(n)) + sum(shapes.texts)


def _theirs(parameter: str) -> str:
    """diffusers' name: the weight belongs to the attention's processor."""
    site, layer = parameter.removesuffix(".weight").rsplit(".", 1)
    return f"{site}.processor.{layer}_custom_diffusion.weight"

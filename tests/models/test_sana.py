"""SANA and SANA-Sprint: what PixArt has not; all else is in test_transformers.py and test_architectures.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from minikin import Concept, Studio
from minikin.errors import BadRecipe
from minikin.models.base import Base
from minikin.models.prompt import parse
from minikin.perfusion import concept_file
from minikin.perfusion.conditioning import unpacked_delta
from minikin.recipes import Paint
from tests.helpers import sana

SIZE: dict[str, Any] = {"width": 64, "height": 64, "seed": 3}


@pytest.fixture(scope="module")
def sprint(bases: dict[str, Base]) -> Studio:
    return Studio(bases["sana-sprint"])


def stock_image(pipe: Any, **how: Any) -> np.ndarray:
    """Of the stock pipeline, as `SIZE` says."""
    how = {"intermediate_timesteps": None} | how if "Sprint" in type(pipe).__name__ else how
    g = torch.Generator().manual_seed(SIZE["seed"])
    out = pipe("A cat", width=64, height=64, generator=[g], use_resolution_binning=False, **how)
    return np.asarray(out.images[0])


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_sprint_equals_the_stock_pipeline(steps: int, sprint: Studio) -> None:
    """At every number of steps, to the bit; two are the default, with their angle between them."""
    middle = {"intermediate_timesteps": 1.3} if steps == 2 else {}
    expected = stock_image(sana.miniature("sana-sprint"), num_inference_steps=steps, **middle)
    how = {} if steps == 2 else {"steps": steps}
    assert np.array_equal(np.asarray(sprint.paint("A cat", **SIZE, **how)[0]), expected)


@pytest.mark.parametrize("negative", ["", "blurry"])
def test_sana_with_euler_equals_the_stock_pipeline(negative: str, bases: dict[str, Base]) -> None:
    pipe = sana.miniature("sana")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = stock_image(pipe, num_inference_steps=3, negative_prompt=negative)
    studio = Studio(bases["sana"])
    image = studio.paint("A cat", steps=3, scheduler="Euler", negative=negative, **SIZE)[0]
    assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("negative", [False, True])
def test_the_instruction_is_read_before_prompts(negative: bool, bases: dict[str, Base]) -> None:
    """Encodings and mask are those of the stock pipeline, whose instruction stands before prompts alone."""
    pipe, base = sana.miniature("sana"), bases["sana"]
    prompt = replace(parse("A photo of <tom>, good", {"tom": "teddy bear"}), negative=negative)
    with torch.no_grad():
        embeddings = pipe.encode_prompt(
            "A photo of a teddy bear, good", negative_prompt="A photo of a teddy bear, good",
            complex_human_instruction=base.text.instruction.split("\n"),
        )  # fmt: skip
        ours = base.text.encode([prompt], None, device=base.device)
    e, mask = embeddings[2:] if negative else embeddings[:2]
    assert torch.equal(ours.e, e) and torch.equal(ours.mask, mask)
    assert ours.positions == (((5, 6),),)  # after the token of the beginning and "a photo of a"


def test_sprint_paints_concepts_of_sana(sprint: Studio, bases: dict[str, Base]) -> None:
    base = bases["sana"]
    delta = unpacked_delta(base, 3 * torch.randn(base.layout.n_values))
    tom = Concept("tom", "cat", "value", base.origin, (), torch.zeros(1), torch.zeros(1), delta)
    sprint.add(concept_file.from_bytes(concept_file.to_bytes(tom)))
    plain, with_tom = (np.asarray(sprint.paint(p, **SIZE)[0], int) for p in ("a cat", "<tom>"))
    assert np.abs(plain - with_tom).max() > 0


def test_options_of_other_bases(sprint: Studio, bases: dict[str, Base], photos: Any) -> None:
    """What a base cannot do is refused or changed, in one sentence."""
    studio = Studio(bases["sana"])
    with pytest.raises(BadRecipe, match="trained by flow matching, and scheduler DDIM .* Euler, DPM"):
        studio.paint("a cat", scheduler="DDIM", **SIZE)
    warnings = studio.resolve(Paint(prompt="a cat", scheduler="DPM++ 2M Karras")).warnings
    assert any("flow matching and has the noise levels of its own shift" in w for w in warnings)
    with pytest.raises(BadRecipe, match="paints with the SCM scheduler only, not 'Euler'"):
        sprint.paint("a cat", scheduler="Euler", **SIZE)
    with pytest.raises(BadRecipe, match="paints with preset sprint only, not 'quality'"):
        sprint.paint("a cat", preset="quality", **SIZE)
    request = sprint.resolve(Paint(prompt="a cat", negative="blurry", steps=25, guidance=9))
    assert (request.recipe.steps, request.recipe.guidance, request.preset.name) == (4, 5.0, "sprint")
    assert any("negative prompt has no effect" in w for w in request.warnings)
    assert [p["name"] for p in sprint.presets()] == ["sprint"]
    with pytest.raises(BadRecipe, match=r"already distilled \(sprint\).* --base sana"):
        sprint.teach(photos, name="tom", category="cat")

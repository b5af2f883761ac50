"""Regions: parsed from prompts; the attention bias acts on their tokens outside their box only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

from minikin import Studio
from minikin.errors import BadRecipe
from minikin.generation import defaults
from minikin.models.base import Base
from minikin.models.prompt import concept_tags, parse, with_strengths
from minikin.models.regions import (
    BIAS,
    FOUND_UNTIL,
    NAMED_BOXES,
    AttentionRegions,
    Box,
    Region,
    RegionBias,
    coverage,
    parse_box,
    region_bias_applied,
    region_bias_of,
)
from minikin.recipes import Paint
from tests.conftest import build_pipeline

CATEGORIES = {"tom": "cat", "rex": "dog"}


@pytest.mark.parametrize(
    ("tag", "where"),
    [("<tom@left>", NAMED_BOXES["left"]), ("<tom@top-right:0.8>", NAMED_BOXES["top-right"]),
     ("<concept:tom@0,20,50,100>", Box(0, 0.2, 0.5, 1)),
     ("<tom@12.5,0,100,99:faithful>", Box(0.125, 0, 1, 0.99)),
     ("<tom>", None)],
)  # fmt: skip
def test_tags_have_boxes(tag: str, where: Box | None) -> None:
    prompt = parse(f"a photo of {tag} and <rex>", CATEGORIES)
    assert prompt.uses[0].box == where and prompt.uses[1].box is None
    assert prompt.text == "a photo of a cat and a dog"
    assert concept_tags(f"{tag} <rex@right>") == ["tom", "rex"]
    assert parse(with_strengths(tag, {"tom": 0.5}), CATEGORIES).uses[0].box == where


@pytest.mark.parametrize("where", ["nowhere", "", "1,2,3", "50,0,20,100", "0,0,101,50", "0,0,nan,50"])
def test_invalid_regions_are_refused(where: str) -> None:
    with pytest.raises(BadRecipe, match="is no region. Use @left, @right"):
        parse(f"<tom@{where}>", CATEGORIES)


def test_coverage_is_the_share_of_each_positions_area() -> None:
    assert torch.equal(coverage(NAMED_BOXES["left"], (2, 4)), torch.tensor([[1.0, 1, 0, 0]] * 2))
    assert torch.allclose(coverage(Box(0, 0, 0.25, 1), (1, 2)), torch.tensor([[0.5, 0]]))
    assert coverage(parse_box("center"), (8, 8)).mean() == pytest.approx(0.25)


def test_bias_acts_on_its_tokens_outside_its_box_to_the_last_step() -> None:
    tokens = torch.tensor([0.0, 1, 0.5])
    region_bias = RegionBias([Region(NAMED_BOXES["left"], tokens)], copies=2, latents=(6, 4))
    like = torch.zeros(1)
    bias = region_bias.bias(4, 24, like)
    assert (
        bias is not None and bias.shape == (4, 1, 24, 3) and not bias[:2].any()
    )  # the unconditional prompt has none
    grid = bias[2, 0].view(6, 4, 3)
    assert not grid[:, :2].any() and torch.equal(grid[:, 2:], -BIAS * tokens.expand(6, 2, 3))
    small = region_bias.bias(2, 6, like)  # the next level: 3 by 2 positions
    assert small is not None and torch.equal(small[0, 0].view(3, 2, 3)[:, 1], -BIAS * tokens.expand(3, 3))
    region_bias.after_step(0.9)
    again = region_bias.bias(4, 24, like)
    assert again is not None and torch.equal(again, bias)


def test_found_regions_are_where_the_attention_was() -> None:
    """Each image by its own attention; none in the first step, and no change after their share of the steps."""
    tokens = torch.eye(4)[1:3]  # of two concepts
    region_bias = region_bias_of([Region(None, t) for t in tokens], copies=2, latents=(4, 4))
    assert isinstance(region_bias, AttentionRegions) and region_bias.bias(4, 16, torch.zeros(1)) is None
    left = torch.zeros(4, 4)
    left[:, :2] = 1
    query = torch.zeros(4, 1, 16, 2)  # of both prompts; in the second image the sides are changed
    for image, first in ((2, left), (3, 1 - left)):
        query[image, 0] = 4 * torch.stack([first.flatten(), 1 - first.flatten()], -1)
    key = torch.zeros(4, 1, 4, 2)
    key[:, 0, 1, 0] = key[:, 0, 2, 1] = 1
    region_bias.observe(query, key)
    region_bias.after_step(FOUND_UNTIL / 2)
    bias = region_bias.bias(4, 16, torch.zeros(1))
    assert bias is not None and bias.shape == (4, 1, 16, 4) and not bias[:2].any()
    assert not bias[..., (0, 3)].any()  # the tokens of no concept
    first, second = bias[2:, 0].view(2, 4, 4, 4)
    assert first[:, 0, 1].min() > -0.1 and first[:, 3, 1].max() < -0.9 * BIAS
    assert torch.allclose(second[..., 1], first[..., 2], atol=1e-5)
    region_bias.observe(torch.zeros_like(query), key)
    region_bias.after_step(FOUND_UNTIL)
    last = region_bias.bias(4, 16, torch.zeros(1))
    assert last is not None and not torch.equal(last, bias)
    region_bias.observe(query, key)
    region_bias.after_step(1)
    again = region_bias.bias(4, 16, torch.zeros(1))
    assert again is not None and torch.equal(again, last)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(build_pipeline("sd15", tmp_path_factory.mktemp("base")), "base")


def test_attention_to_a_region_stays_inside_its_box(base: Base) -> None:
    """The only token with a value reaches the positions inside its box."""
    layer = base.layout.layers[0]
    attn = base.denoiser.get_submodule(layer.path)
    packed = attn.forward
    kv = torch.zeros(1, 77, base.layout.width)
    kv[:, 5, layer.value] = 1
    tokens = torch.zeros(77)
    tokens[5] = 1
    x = torch.randn(1, 64, attn.to_q.in_features)
    packed.record = []
    region_bias = RegionBias([Region(NAMED_BOXES["top"], tokens)], 1, (8, 8))
    with torch.no_grad(), region_bias_applied(base.denoiser, region_bias):
        inside, outside = attn(x, kv).view(8, 8, -1).split(4)
        nothing = attn(x, torch.zeros_like(kv)).view(8, 8, -1)
    packed.record = None
    assert (inside - nothing[:4]).abs().max() > 20 * (outside - nothing[4:]).abs().max()
    assert packed.region_bias is None  # the context has removed it


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)])
def test_regions_reach_the_older_processors(base: Base, processor: Any) -> None:
    """They compute the same without PyTorch's fused attention, whose mask a region changes."""
    attn = base.denoiser.get_submodule(base.layout.layers[0].path)
    x, kv = torch.randn(1, 64, attn.to_q.in_features), torch.randn(1, 77, base.layout.width)
    tokens = torch.zeros(77)
    tokens[5] = 1
    stock, outputs = attn.processor, []
    try:
        for used in (stock, processor):
            attn.set_processor(used)
            region_bias = RegionBias([Region(NAMED_BOXES["top"], tokens)], 1, (8, 8))
            with torch.no_grad(), region_bias_applied(base.denoiser, region_bias):
                outputs.append(attn(x, kv))
    finally:
        attn.set_processor(stock)
    assert torch.equal(*outputs)


def test_a_region_changes_images_that_name_it_only() -> None:
    studio = Studio.open("tiny")
    studio.teach("examples/my_teapot", name="pot", category="teapot", steps=2, preview=False, sample_every=0)

    def generate(prompt: str, **recipe: object) -> np.ndarray:
        return np.asarray(studio.paint(prompt, steps=4, seed=3, **recipe)[0], np.int16)

    free = generate("a photo of <pot> in the snow")
    placed = generate("a photo of <pot@top-left> in the snow")
    assert np.abs(placed - free).mean() > 1
    assert np.array_equal(generate("a photo of <pot> in the snow"), free)
    assert not np.array_equal(generate("a photo of <pot@left> in the snow"), placed)
    assert np.abs(generate("a photo of <pot@left> in the snow", guidance=1.0) - free).mean() > 1
    late = generate("a photo of <pot@left> in the snow", concept_start=0.5)
    assert not np.array_equal(late, generate("a photo of <pot> in the snow", concept_start=0.5))


@pytest.mark.parametrize(
    ("mode", "prompt", "recipe", "stronger"),
    [
        ("value", "<tom> and <rex>", {}, True),
        ("gated", "<tom> and <rex>", {}, False),  # of which a server's placeholder has no direction, too
        ("value", "<tom> and <rex>", {"regions": "prompt"}, False),
        ("value", "<tom@left> and <rex@right>", {"regions": "prompt"}, True),
        ("value", "<tom> and <rex> [at night:in snow:0.5]", {}, False),
        ("value", "<tom> and a dog", {}, False),
    ],
)
def test_concepts_of_mode_value_are_stronger_where_they_are_kept_apart(
    mode: str, prompt: str, recipe: dict[str, str], stronger: bool
) -> None:
    concept: Any = SimpleNamespace(concept=SimpleNamespace(mode=mode), direction=None)
    parsed = parse(prompt, CATEGORIES)
    shared = defaults._shared(Paint.make(prompt=prompt, **recipe), parsed, {"tom": concept, "rex": concept}, 4)
    assert shared == (["tom", "rex"] if stronger else [])


def test_several_concepts_are_kept_apart_without_region_words() -> None:
    """By found regions, and stronger than alone; `regions="prompt"` and one step find none."""
    studio = Studio.open("tiny")
    for name, category in (("pot", "teapot"), ("tom", "cat")):
        folder = {"pot": "my_teapot", "tom": "my_cat"}[name]
        studio.teach(f"examples/{folder}", name=name, category=category, steps=2, preview=False, sample_every=0)

    def generate(prompt: str, **recipe: object) -> np.ndarray:
        return np.asarray(studio.paint(prompt, seed=3, **{"steps": 4, **recipe})[0], np.int16)

    both = "a photo of <pot> and <tom> in the snow"
    apart = generate(both)
    assert np.array_equal(generate(both), apart)
    assert np.abs(generate(both, regions="prompt") - apart).mean() > 0.3
    assert np.array_equal(generate("<pot:1.4> and <tom:1.4>"), generate("<pot> and <tom>"))
    assert np.array_equal(
        generate("<pot:1> and <tom:1>", regions="prompt"), generate("<pot> and <tom>", regions="prompt")
    )
    assert not np.array_equal(generate("<pot:1> and <tom:1>"), generate("<pot> and <tom>"))
    assert np.array_equal(generate(both, steps=1, regions="prompt"), generate(both, steps=1))
    alone = generate("a photo of <pot> and a cat")
    assert np.array_equal(generate("a photo of <pot> and a cat", regions="prompt"), alone)
    assert np.array_equal(generate("a photo of <pot:1> and a cat"), alone)

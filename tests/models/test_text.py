"""Prompts to encodings: chunks of tokens, BREAK, positions of concepts, emphasis and clip skip as in A1111."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minikin import attach
from minikin.errors import BadRecipe
from minikin.models.base import Base
from minikin.models.prompt import Prompt, parse
from minikin.models.text import MAX_CHUNKS, chunk_tokens, tokenize
from minikin.perfusion.conditioning import condition

FAMILIES = ("sd15", "sd21", "sdxl")
CATEGORIES = {"tom": "cat", "rex": "teddy bear"}
WINDOW = 75


def encode(base: Base, source: str, chunks: int | None = None, **kwargs: Any) -> Tensor:
    prompt = parse(source, CATEGORIES)
    with torch.no_grad():
        return base.encode([prompt], chunks=chunks or base.count_chunks(prompt), **kwargs).e[0]


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


# ---- chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["", "a cat", "a photo of <rex>, (at night:1.2), 日本", "cat " * 75])
def test_up_to_75_tokens_nothing_changes(bases: dict[str, Base], family: str, source: str) -> None:
    """One call of the tokenizer and of each encoder, as in stock diffusers; rows made by hand are the same."""
    base, prompt = bases[family], parse(source, CATEGORIES)
    assert base.count_chunks(prompt) == 1
    for tokenizer in base.tokenizers:
        stock = tokenizer(
            prompt.text, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        assert torch.equal(tokenize(tokenizer, [prompt]).ids, stock)
        assert torch.equal(tokenize(tokenizer, [prompt], 2).ids[:1], stock)
    if not prompt.weights:
        ids = base.tokenizers[0](prompt.text, padding="max_length", max_length=77, return_tensors="pt")
        with torch.no_grad():
            out = base.text_encoders[0](ids.input_ids, output_hidden_states=base.is_xl)
        stock = out.hidden_states[-2] if base.is_xl else out[0]
        assert torch.equal(encode(base, source)[:, : stock.shape[-1]], stock[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_longer_prompts_are_chunks_with_bos_and_eos_each(bases: dict[str, Base], family: str) -> None:
    base = bases[family]
    e = encode(base, "cat " * 75 + "dog " * 75 + "bird")
    assert e.shape[0] == 3 * 77
    assert close(e[:77], encode(base, "cat " * 75))
    assert close(e[77:154], encode(base, "dog " * 75))
    assert close(e[154:], encode(base, "bird"))
    if base.is_xl:  # SDXL's pooled embedding is that of the first chunk
        long, first = (base.encode([parse(p, {})], chunks=2).pooled for p in ("cat " * 75 + "dog", "cat " * 75))
        assert long is not None and first is not None and close(long, first)


@pytest.mark.parametrize("family", FAMILIES)
def test_break_ends_a_chunk(bases: dict[str, Base], family: str) -> None:
    base = bases[family]
    parts = [encode(base, p) for p in ("a cat at night,", "a dog", "a bird")]
    assert close(encode(base, "a cat at night, BREAK a dog BREAK a bird"), torch.cat(parts))
    assert close(encode(base, "BREAK a dog"), torch.cat([encode(base, ""), parts[1]]))
    assert close(encode(base, "a dog BREAK "), parts[1])  # nothing after it: no chunk, as in A1111
    long = encode(base, "cat " * 80 + "BREAK dog")
    assert close(long[77:154], encode(base, "cat " * 5)) and close(long[154:], encode(base, "dog"))


def test_positions_hold_in_every_chunk(bases: dict[str, Base]) -> None:
    base = bases["sd15"]
    prompt = parse("cat " * 80 + "and <rex> BREAK with <tom>", CATEGORIES)
    ids = tokenize(base.tokenizers[0], [prompt], 3).ids.flatten()
    (positions,) = base.encode([prompt], chunks=3).positions
    words = [base.tokenizers[0].decode(ids[list(at)]).strip() for at in positions]
    assert words == ["teddy bear", "cat"] and positions[0][0] == 77 + 1 + 7 and positions[1][0] == 154 + 3


def test_a_concept_is_never_cut_in_two(bases: dict[str, Base]) -> None:
    """Its word is encoded in one chunk: the chunk before ends early."""
    base = bases["sd15"]
    prompt = parse("cat " * 73 + "a <rex> at night", CATEGORIES)
    first, second = chunk_tokens(base.tokenizers[0], prompt)
    assert len(first) == 74 and prompt.text[second[0][1] : second[1][2]] == "teddy bear"
    words = [torch.ones(2, m.config.hidden_size) for m in base.text_encoders]
    moved = base.encode([prompt], {"rex": words}, chunks=2).e[0] - base.encode([prompt], chunks=2).e[0]
    assert not moved[:77].any() and moved[78:].abs().amax(-1).min() > 0


def test_concepts_beyond_the_last_chunk_are_refused(bases: dict[str, Base]) -> None:
    base = bases["sd15"]
    prompt = parse("cat " * (MAX_CHUNKS * WINDOW) + "<tom>", CATEGORIES)
    assert base.count_chunks(prompt) == MAX_CHUNKS
    with pytest.raises(BadRecipe, match="longer than the 750 tokens.*<tom> lies beyond"):
        base.encode([prompt], chunks=MAX_CHUNKS)


@pytest.mark.parametrize("family", FAMILIES)
def test_negative_prompts_are_padded_with_empty_chunks(bases: dict[str, Base], family: str) -> None:
    base = bases[family]
    long, short = parse("cat " * 80, {}), parse("blurry", {})
    negative, positive = condition(base, [short, long], {})
    assert negative.kv.shape == positive.kv.shape == (1, 2 * 77, base.layout.width)
    blurry, empty = (condition(base, [parse(p, {})], {})[0].kv for p in ("blurry", ""))
    assert torch.allclose(negative.kv, torch.cat([blurry, empty], 1), atol=1e-4)
    zeros, _ = condition(base, [None, long], {}) if base.is_xl else (negative, None)
    assert zeros.kv.shape == positive.kv.shape


def test_long_prompts_on_a_stock_pipeline(pipelines: dict[str, Any]) -> None:
    """The image is that of stock diffusers with the concatenated encodings, negative padded."""
    pipe = pipelines["sd15"]
    source, steps = "a cat on the beach, " * 20, {"num_inference_steps": 2, "output_type": "np"}
    concepts = attach(pipe)
    ours = pipe(**concepts(source, "blurry"), generator=torch.manual_seed(0), **steps).images
    base = concepts.base
    tokens = [i for piece in chunk_tokens(base.tokenizers[0], Prompt(source, source)) for i, _, _ in piece]
    assert len(tokens) > WINDOW

    def stock(ids: list[int]) -> Tensor:
        chunks = [ids[k : k + WINDOW] for k in range(0, WINDOW * 2, WINDOW)]
        rows = [[49406, *c, *[49407] * (76 - len(c))] for c in chunks]
        return torch.cat([pipe.text_encoder(torch.tensor([row]))[0] for row in rows], 1)

    with torch.no_grad():
        positive, negative = (
            stock(tokens),
            stock(base.tokenizers[0]("blurry", add_special_tokens=False).input_ids),
        )
    reference = pipe(
        prompt_embeds=positive, negative_prompt_embeds=negative, generator=torch.manual_seed(0), **steps
    ).images
    assert abs(ours - reference).max() < 1e-3


# ---- emphasis -------------------------------------------------------------------------------------


def emphasized(e: Tensor, factors: Tensor) -> Tensor:
    """A1111's sd_hijack_clip and sd_emphasis, for one chunk of one text encoder."""
    out = e * factors[:, None]
    return out * (e.mean() / out.mean())


def test_each_encoder_of_sdxl_has_its_own_mean(bases: dict[str, Base]) -> None:
    base = bases["sdxl"]
    plain, weighted = encode(base, "a cat at night"), encode(base, "a (cat:1.4) at night")
    width = base.text_encoders[0].config.hidden_size
    factors = torch.ones(77)
    factors[2] = 1.4
    parts = [emphasized(part, factors) for part in plain.split([width, plain.shape[1] - width], 1)]
    assert close(weighted, torch.cat(parts, 1))
    assert not close(weighted, emphasized(plain, factors))  # the means of both differ


def test_each_chunk_has_its_own_mean(bases: dict[str, Base]) -> None:
    base = bases["sdxl"]
    e = encode(base, "a cat BREAK a (dog:1.4)")
    assert close(e[:77], encode(base, "a cat")) and close(e[77:], encode(base, "a (dog:1.4)"))


# ---- clip skip ------------------------------------------------------------------------------------


def test_clip_skip_is_that_of_diffusers_and_a1111(bases: dict[str, Base], pipelines: dict[str, Any]) -> None:
    """Its formula for clip_skip=1, which counts the layers that are skipped: diffusers 0.42 fails at it with
    transformers 5, whose CLIPTextModel has no `text_model`."""
    base, text = bases["sd15"], pipelines["sd15"].text_encoder
    ids = base.tokenizers[0]("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = text(ids, output_hidden_states=True).hidden_states
        stock = getattr(text, "text_model", text).final_layer_norm(hidden[-2])[0]
    assert torch.equal(encode(base, "a cat", clip_skip=1), encode(base, "a cat"))
    assert torch.equal(encode(base, "a cat", clip_skip=2), stock)
    assert not close(encode(base, "a cat", clip_skip=2), encode(base, "a cat"))


def test_clip_skip_of_sdxl_counts_from_the_last_layer(
    bases: dict[str, Base], pipelines: dict[str, Any]
) -> None:
    """SDXL was trained with the layer before the last: 1 and 2 are that one; A1111 ignores the option there."""
    base = bases["sdxl"]
    assert torch.equal(encode(base, "a cat", clip_skip=2), encode(base, "a cat"))
    layers = min(m.config.num_hidden_layers for m in base.text_encoders)
    if layers > 2:
        with torch.no_grad():
            stock = pipelines["sdxl"].encode_prompt(
                "a cat", device="cpu", do_classifier_free_guidance=False, clip_skip=1
            )[0]
            assert torch.equal(encode(base, "a cat", clip_skip=3), stock[0])


def test_clip_skip_beyond_the_first_layer_is_refused(bases: dict[str, Base]) -> None:
    base = bases["sd15"]
    layers = base.text_encoders[0].config.num_hidden_layers
    base.check_clip_skip(layers)
    with pytest.raises(BadRecipe, match=f"it is at most {layers}"):
        base.check_clip_skip(layers + 1)

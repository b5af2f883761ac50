"""Concepts in other tools' formats: exact with the gate fixed open; embeddings of all layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minikin import Concept, attach
from minikin.errors import BadConceptFile, BadRecipe, UnknownName
from minikin.models.base import Base
from minikin.models.prompt import parse
from minikin.perfusion import edit
from minikin.perfusion import export as exchange
from minikin.perfusion.concept import check_category
from minikin.perfusion.covariance import covariance
from minikin.perfusion.gate import OPEN
from minikin.perfusion.key_lock import category_encoding
from tests.conftest import build_pipeline


def concept(base: Base, category: str = "cat") -> Concept:
    """A random concept near its category, as teaching leaves it."""
    from minikin.perfusion.conditioning import unpacked_delta

    g = torch.Generator().manual_seed(0)
    e = category_encoding(base, category).cpu()
    moved = tuple(0.02 * torch.randn(w.shape, generator=g) for w in base.word_vectors(category))
    return Concept(
        name="tom", category=category, mode="gated", origin=base.origin, word_deltas=moved,
        i_star=(i := e + 0.1 * torch.randn(e.shape, generator=g)),
        dual=edit.dual(i, covariance(base).inverse),
        delta=unpacked_delta(base, 0.2 * torch.randn(base.layout.n_values, generator=g)),
        c_hash=covariance(base).hash,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_stock_pipeline_paints_the_same(family: str, to: str, tmp_path: Path) -> None:
    """Exported LoRA + embedding in stock diffusers = Minikin with the gate fixed open (1e-4, float32).

    kohya names for SDXL carry the original block numbers; diffusers maps them back. Miniatures have
    one layer a block, which that mapping does not know, so SDXL/kohya is checked by name below.
    """
    if (family, to) == ("sdxl", "kohya"):
        pytest.skip("diffusers maps SDXL block numbers for two layers a block; names are tested below")
    ours, stock = (build_pipeline(family, tmp_path / str(k)) for k in range(2))
    minikin = attach(ours)
    tom = concept(minikin.base, "teddy bear")
    minikin.add(tom)
    lost = exchange.export(minikin.base, tom, to, tmp_path / "lora.safetensors")
    assert "gate" in lost
    exchange.export(minikin.base, tom, "textual-inversion", tmp_path / "ti.safetensors")
    stock.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    tensors = load_file(tmp_path / "ti.safetensors")
    if family == "sdxl":
        for key, tail in (("clip_l", ""), ("clip_g", "_2")):
            stock.load_textual_inversion(
                tensors[key], token="<tom>", text_encoder=getattr(stock, f"text_encoder{tail}"),
                tokenizer=getattr(stock, f"tokenizer{tail}"),
            )  # fmt: skip
    else:
        stock.load_textual_inversion(str(tmp_path / "ti.safetensors"), token="<tom>")
    for m in (stock.unet, stock.text_encoder):
        m.eval()
    how = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent", "height": 64, "width": 64}
    # both branches are edited by a LoRA, so the comparison is made where the prompt is edited alone
    how["guidance_scale"] = 1.0
    g = torch.Generator().manual_seed(1)
    theirs = stock("a photo of a <tom> at night", generator=g, **how).images
    g = torch.Generator().manual_seed(1)
    packed = minikin("a photo of a <tom> at night", gate=OPEN)
    mine = ours(generator=g, **packed, **how).images
    assert (mine - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("keys", ["locked", "trained"])
def test_mode_value_as_lora(keys: str, bases: dict[str, Base], tmp_path: Path) -> None:
    """Values change by delta at the category's encoding, and not at encodings M-orthogonal to it."""
    base = bases["sd15"]
    tom = concept(base)
    learned = {path: d.flip(0) for path, d in tom.delta.items()} if keys == "trained" else {}
    nothing = {"word_deltas": (), "i_star": torch.zeros(1), "dual": torch.zeros(1)}
    value_concept = replace(tom, mode="value", keys=learned, **nothing)
    loss = exchange.export(base, value_concept, "peft", tmp_path / "lora.safetensors")
    assert "on the word 'cat'" in loss
    tensors = load_file(tmp_path / "lora.safetensors")
    assert {k.split(".attn2.")[1].split(".")[0] for k in tensors} == ({"to_v", "to_k"} if learned else {"to_v"})
    e = category_encoding(base, "cat").cpu()
    dual = edit.dual(e, covariance(base).inverse).float()
    other = torch.randn(e.shape, generator=torch.Generator().manual_seed(1))
    other -= (other @ dual) / (e @ dual) * e
    for path, delta in value_concept.delta.items():
        a, b = (tensors[f"unet.{path}.to_v.lora_{x}.weight"] for x in "AB")
        assert torch.allclose((b @ a) @ e, delta, atol=1e-4)
        assert float(((b @ a) @ other).abs().max()) < 1e-3


@pytest.mark.parametrize(
    ("path", "name"),
    [("down_blocks.1.attentions.0.transformer_blocks.1.attn2", "input_blocks_4_1_transformer_blocks_1_attn2"),
     ("down_blocks.2.attentions.1.transformer_blocks.9.attn2", "input_blocks_8_1_transformer_blocks_9_attn2"),
     ("mid_block.attentions.0.transformer_blocks.3.attn2", "middle_block_1_transformer_blocks_3_attn2"),
     ("up_blocks.0.attentions.2.transformer_blocks.0.attn2", "output_blocks_2_1_transformer_blocks_0_attn2"),
     ("up_blocks.1.attentions.0.transformer_blocks.1.attn2", "output_blocks_3_1_transformer_blocks_1_attn2")],
)  # fmt: skip
def test_kohya_names_of_sdxl(path: str, name: str) -> None:
    assert exchange._kohya_name(path, xl=True) == name


def test_kohya_file_has_what_tools_look_for(bases: dict[str, Base], tmp_path: Path) -> None:
    from safetensors import safe_open

    tom = concept(bases["sd15"])
    exchange.export(bases["sd15"], tom, "kohya", tmp_path / "k.safetensors")
    with safe_open(tmp_path / "k.safetensors", "pt") as f:
        keys, meta = list(f.keys()), f.metadata()
    assert all(k.startswith("lora_unet_") for k in keys)
    downs = [k for k in keys if k.endswith("lora_down.weight")]
    assert len(keys) == 3 * len(downs) and meta["ss_network_dim"] == "1"
    assert {"ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_alpha"} <= set(meta)


LAYOUTS = {
    "diffusers": {"<tom>": torch.randn(1, 32)},
    "diffusers, flat": {"<tom>": torch.randn(32)},
    "kohya": {"emb_params": torch.randn(1, 32)},
    "OneTrainer": {"emp_params": torch.randn(1, 32), "emp_params_out": torch.randn(1, 32)},
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_embeddings_of_every_layout(kind: str, bases: dict[str, Base], tmp_path: Path) -> None:
    save_file(LAYOUTS[kind], tmp_path / "e.safetensors")
    c = exchange.import_embedding(bases["sd15"], tmp_path / "e.safetensors", "tom", "cat")
    assert torch.allclose(
        c.word_deltas[0] + bases["sd15"].word_vectors("cat")[0],
        next(iter(LAYOUTS[kind].values())).reshape(1, 32),
    )
    assert Concept.load(c.save(tmp_path / "tom.safetensors")).name == "tom"


def test_sdxl_embedding_and_more_vectors_than_tokens(bases: dict[str, Base], tmp_path: Path) -> None:
    save_file({"clip_l": torch.randn(3, 32), "clip_g": torch.randn(3, 64)}, tmp_path / "e.safetensors")
    c = exchange.import_embedding(bases["sdxl"], tmp_path / "e.safetensors", "tom", "cat")
    assert c.category == "cat cat cat" and [tuple(w.shape) for w in c.word_deltas] == [(3, 32), (3, 64)]


@pytest.mark.parametrize("n", [8, 16, 32, 74, 75])
def test_embeddings_of_many_vectors(n: int, bases: dict[str, Base], tmp_path: Path) -> None:
    """Up to the tokens that the base reads at a time; where it must, the word has a chunk of its own."""
    base, vectors = bases["sd15"], torch.randn(n, 32)
    save_file({"emb_params": vectors}, tmp_path / "e.safetensors")
    c = exchange.import_embedding(base, tmp_path / "e.safetensors", "tom", "cat")
    assert torch.allclose(c.word_deltas[0] + base.word_vectors(c.category)[0], vectors, atol=1e-6)
    c = Concept.load(c.save(tmp_path / "tom.safetensors"))
    assert c.category == " ".join(["cat"] * n)
    words = {"tom": [base.word_vectors(c.category)[0] + c.word_deltas[0]]}
    prompt = parse("a photo of <tom> on the beach, (at night:1.2)", {"tom": c.category})
    out = base.encode([prompt], words, chunks=base.count_chunks(prompt))
    assert len(out.positions[0][0]) == n and len({at // 77 for at in out.positions[0][0]}) == 1


def test_more_vectors_than_the_base_reads_are_refused(bases: dict[str, Base], tmp_path: Path) -> None:
    """By their number, not for a category that nobody wrote."""
    save_file({"emb_params": torch.randn(76, 32)}, tmp_path / "e.safetensors")
    with pytest.raises(BadConceptFile, match="76 vectors, and this base reads at most 75 tokens"):
        exchange.import_embedding(bases["sd15"], tmp_path / "e.safetensors", "tom", "cat")
    save_file({"emb_params": torch.randn(75, 32)}, tmp_path / "e.safetensors")
    with pytest.raises(BadConceptFile, match="category 'teddy bear' takes 2 tokens"):
        exchange.import_embedding(bases["sd15"], tmp_path / "e.safetensors", "tom", "teddy bear")
    with pytest.raises(BadRecipe, match="at most 60"):
        check_category("cat dog " * 8 + "bird")


def test_imported_word_paints_what_the_embedding_paints_nearly(bases: dict[str, Base], tmp_path: Path) -> None:
    """With the category's own vectors as the embedding, the concept is the category."""
    base = bases["sd15"]
    save_file({"emb_params": base.word_vectors("cat")[0]}, tmp_path / "e.safetensors")
    c = exchange.import_embedding(base, tmp_path / "e.safetensors", "tom", "cat")
    assert max(float(d.abs().max()) for d in c.delta.values()) < 1e-5


def test_refusals(bases: dict[str, Base], tmp_path: Path) -> None:
    base = bases["sd15"]
    pickle = tmp_path / "a.pt"
    torch.save({"string_to_param": {"*": torch.zeros(1, 32)}}, pickle)
    save_file({"a": torch.zeros(1, 32), "b": torch.zeros(2)}, tmp_path / "two.safetensors")
    save_file({"a": torch.zeros(1, 999)}, tmp_path / "wide.safetensors")
    for path, words in [(pickle, "never opened"), (tmp_path / "two.safetensors", "is not a textual-inversion"),
                        (tmp_path / "wide.safetensors", "999 numbers"),
                        (tmp_path / "no", "cannot be read")]:  # fmt: skip
        with pytest.raises(BadConceptFile, match=words):
            exchange.import_embedding(base, path, "tom", "cat")
    save_file({"a": torch.zeros(1, 32)}, tmp_path / "one.safetensors")
    with pytest.raises(BadConceptFile, match="1 text encoder"):
        exchange.import_embedding(bases["sdxl"], tmp_path / "one.safetensors", "tom", "cat")
    tom = concept(base)
    with pytest.raises(UnknownName, match="Unknown format 'pickle'"):
        exchange.export(base, tom, "pickle", tmp_path / "x")
    without_word = replace(tom, mode="value", word_deltas=(), i_star=torch.zeros(1), c_hash="")
    with pytest.raises(BadRecipe, match=r"no word of its own.*--to kohya"):
        exchange.export(base, without_word, "textual-inversion", tmp_path / "x")


def test_lora_of_an_open_gate_is_exact_on_random_encodings(bases: dict[str, Base]) -> None:
    """Delta W e + W e = W e_perp + s o*, for keys and values of every layer."""
    base = bases["sd21"]
    tom = concept(base)
    minikin = attach(base.pipe)
    minikin.add(tom)
    e = torch.randn(5, base.layout.text_width, generator=torch.Generator().manual_seed(2))
    d = minikin.loaded["tom"].direction
    assert d is not None
    done = edit.edit_encodings(e[None], [d], [OPEN])
    for (path, name), (a, b) in exchange.lora_factors(base, tom).items():
        weight = getattr(base.denoiser.get_submodule(path), name).weight.detach()
        lora = e @ weight.T + (e @ a.T) @ b.T
        ours = done.encodings[0] @ weight.T
        if name == "to_v":
            ours = ours + done.gates[0][0][:, None] * tom.delta[path]
        assert np.allclose(lora.numpy(), ours.numpy(), atol=2e-4)

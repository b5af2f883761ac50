"""PixArt: from a folder to images with concepts, on miniatures; the published models' sizes without weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minikin import Concept, Studio, attach
from minikin.errors import BadModelFile, BadRecipe, BaseMismatch
from minikin.models import attention
from minikin.models.attention import layout, pack, text_projection
from minikin.models.base import Base
from minikin.models.identity import Origin
from minikin.models.loading.registry import add, open_base
from minikin.models.lora import lora_file
from minikin.models.prompt import parse
from minikin.perfusion import concept_file
from minikin.perfusion.conditioning import unpacked_delta
from minikin.perfusion.export import export, import_embedding
from minikin.recipes import Baseline, Distill, Paint
from tests.conftest import TRANSFORMERS
from tests.helpers import pixart

SIZE: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "seed": 3}
CATEGORIES = {"tom": "cat", "rex": "teddy bear"}


def concept(base: Base, name: str = "tom", scale: float = 3.0) -> Concept:
    """A concept of mode value that changes images much."""
    g = torch.Generator().manual_seed(len(name) + ord(name[0]))
    delta = unpacked_delta(base, scale * torch.randn(base.layout.n_values, generator=g))
    return Concept(
        name, CATEGORIES[name], "value", base.origin, (), torch.zeros(1), torch.zeros(1), delta
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pixart") / "sigma"
    pixart.miniature("pixart-sigma").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def studio(folder: Path) -> Studio:
    return Studio(open_base(str(folder), device="cpu", dtype="float32"))


def far(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, int) - np.asarray(b, int)).mean())


# ---- opening --------------------------------------------------------------------------------------


def test_a_folder_is_opened_and_added(folder: Path, studio: Studio, bases: dict[str, Base]) -> None:
    """Weights that T5 uses twice are in the file once; the identity is that of the pipeline that was saved."""
    base = studio.base
    assert base.architecture == "pixart-sigma" and add(folder, "mine").architecture == "pixart-sigma"
    assert (base.fingerprint, base.text_hash) == (
        bases["pixart-sigma"].fingerprint, bases["pixart-sigma"].text_hash,
    )  # fmt: skip
    assert base.n_tokens == 300 and bases["pixart-alpha"].n_tokens == 120


def test_folders_that_name_the_class_of_before(folder: Path, studio: Studio, tmp_path: Path) -> None:
    """PixArt-XL-2-1024-MS says Transformer2DModel, which diffusers maps to its class of today."""
    shutil.copytree(folder, tmp_path / "old")
    index, config = tmp_path / "old" / "model_index.json", tmp_path / "old" / "transformer" / "config.json"
    for path, changes in (
        (index, {"transformer": ["diffusers", "Transformer2DModel"]}),
        (
            config,
            {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "use_linear_projection": False},
        ),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    base = open_base(str(tmp_path / "old"), device="cpu", dtype="float32")
    assert base.fingerprint == studio.base.fingerprint and base.text_hash == studio.base.text_hash


def test_a_tokenizer_of_sentencepiece_alone(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """As PixArt is published; without the packages that read it, the message names them."""
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "old" / "tokenizer" / "tokenizer.json").rename(tmp_path / "old" / "tokenizer" / "spiece.model")
    monkeypatch.setattr("minikin.models.loading.diffusers_folder._is_installed", lambda _: False)
    with pytest.raises(BadModelFile, match="spiece.model.* pip install sentencepiece protobuf"):
        open_base(str(tmp_path / "old"), device="cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_encoder": [None, None]}, "has no text_encoder"),
        ({"transformer": [None, None]}, "has no transformer .* full pipeline: transformer/"),
        ({"_class_name": "StableDiffusion3Pipeline"}, "is a StableDiffusion3Pipeline: its text .* every step"),
        ({"_class_name": "FluxPipeline"}, "is a FluxPipeline: its text passes through the transformer"),
        ({"_class_name": "KandinskyPipeline"}, "is not a folder of diffusers with a model of the families"),
    ],
)
def test_folders_that_cannot_be_opened(
    folder: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """One sentence with the reason, exit code 3; nothing is registered."""
    for part in folder.iterdir():
        if part.is_dir():
            (tmp_path / part.name).symlink_to(part)
    index = json.loads((folder / "model_index.json").read_text()) | changes
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for call in (lambda: open_base(str(tmp_path), device="cpu"), lambda: add(tmp_path, "mine")):
        with pytest.raises(BadModelFile, match=words) as error:
            call()
        assert error.value.exit_code == 3


def test_pipelines_that_cannot_be_attached() -> None:
    from types import SimpleNamespace

    joint = type("FluxPipeline", (SimpleNamespace,), {})()
    with pytest.raises(BadModelFile, match="This pipeline is a FluxPipeline: its text"):
        attach(joint)
    other = type("SanaPipeline", (SimpleNamespace,), {})(transformer=None)
    with pytest.raises(BadModelFile, match="This pipeline is a SanaPipeline. Open a model of"):
        attach(other)
    pipe = pixart.miniature("pixart-sigma")
    pipe.text_encoder = None
    with pytest.raises(BadModelFile, match="no text encoder or tokenizer"):
        attach(pipe)
    assert "forward" not in vars(pipe.transformer)  # it is as it was


# ---- text -----------------------------------------------------------------------------------------


def test_positions_are_those_of_the_lower_case_text(studio: Studio) -> None:
    """Blanks before the text and letters that grow in lower case move what stands after them."""
    base = studio.base
    for source in ("a photo of <tom>, <rex>", "  İİ A PHOTO of <tom> and (a <rex>:1.3)"):
        prompt = parse(source, CATEGORIES)
        (positions,) = base.encode([prompt]).positions
        ids = base.tokenizers[0](base.text.spelled(prompt.text)).input_ids
        assert [base.tokenizers[0].decode([ids[i] for i in at]) for at in positions] == ["cat", "teddy bear"]


def test_word_vectors_reach_the_encoder_and_emphasis_its_tokens(studio: Studio) -> None:
    base, prompt = studio.base, parse("a photo of <rex>", CATEGORIES)
    vectors = base.word_vectors("Teddy Bear")
    assert torch.equal(base.encode([prompt], {"rex": vectors}).e, base.encode([prompt]).e)
    moved = base.encode([prompt], {"rex": [v + 1 for v in vectors]}).e - base.encode([prompt]).e
    assert moved.abs().max() > 1e-3
    weighted, plain = (base.encode([parse(f"a {word} of a cat", {})]).e for word in ("(photo:1.5)", "photo"))
    assert (weighted - plain)[0, 1].abs().max() > 1e-4


def test_prompts_that_are_too_long(studio: Studio) -> None:
    """One window is read, without chunks; a concept beyond it is refused."""
    long = "cat " * 300
    warnings = studio.resolve(Paint(prompt=long)).warnings
    assert any("2 chunks of 299 tokens; the first is read and the rest is left out" in w for w in warnings)
    with pytest.raises(BadRecipe, match="longer than the 299 tokens that are read, and <tom> lies beyond"):
        studio.base.encode([parse(long + "<tom>", CATEGORIES)])
    with pytest.raises(BadRecipe, match="is T5"):
        studio.paint("a cat", clip_skip=2, **SIZE)


def test_the_mask_hides_padding(studio: Studio) -> None:
    """What stands at padded tokens of the packed tensor changes nothing."""
    base = studio.base
    encoded = base.encode([parse("a cat", {})])
    assert encoded.mask is not None and encoded.mask.sum() == 3
    kv = base.pack(encoded.e)
    other = kv.clone()
    other[:, 3:] += 5
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(500)
    with torch.no_grad():
        a, b = (base.predict(x, t, text, mask=encoded.mask) for text in (kv, other))
        unmasked = base.predict(x, t, other, mask=torch.ones_like(encoded.mask))
    assert torch.equal(a, b) and not torch.equal(a, unmasked)
    assert a.shape == x.shape  # the learned variance is cut off


# ---- concepts and images --------------------------------------------------------------------------


def test_concepts_paint(studio: Studio, tmp_path: Path) -> None:
    """From a file, with strength, several at once, in regions, with samplers; 0 is the plain category."""
    base = studio.base
    for name in CATEGORIES:
        studio.add(Concept.load(concept(base, name).save(tmp_path / f"{name}.safetensors")))
    plain = studio.paint("a photo of a cat", **SIZE)[0]
    images = {
        prompt: studio.paint(prompt, **SIZE)[0]
        for prompt in (
            "a photo of <tom:0>", "a photo of <tom:0.5>", "a photo of <tom>", "<tom> and <rex>",
            "<tom@left> and <rex@right>",
        )
    }  # fmt: skip
    assert far(plain, images["a photo of <tom:0>"]) == 0
    assert 0 < far(plain, images["a photo of <tom:0.5>"]) < far(plain, images["a photo of <tom>"])
    assert far(images["<tom> and <rex>"], images["<tom@left> and <rex@right>"]) > 0
    for how in ({"scheduler": "DDIM"}, {"scheduler": "DPM++ 2M"}, {"guidance": 1.0}):
        assert far(studio.paint("a photo of <tom>", **SIZE, **how)[0], plain) > 0


def test_taught_concepts_keep_their_family(studio: Studio, photos: Any, bases: dict[str, Base]) -> None:
    """Masks from attention and the base's own size; the file names its layers, and other families refuse it."""
    tom = studio.teach(
        [replace(p, mask=None) for p in photos], name="tom", category="cat", mode="value", steps=2, batch=1,
        mask="attention",
    )  # fmt: skip
    data = concept_file.to_bytes(tom)
    again = concept_file.from_bytes(data)
    assert again.origin.architecture == "pixart-sigma" and list(again.delta) == [
        f"transformer_blocks.{k}.attn2" for k in range(2)
    ]
    for other in ("pixart-alpha", "sd15"):
        with pytest.raises(BaseMismatch, match="taught on pixart-sigma .* cross-attention layers do not match"):
            Studio(bases[other]).add(again)
    with pytest.raises(BaseMismatch, match="taught on tiny"):
        studio.add(
            Concept(
                "tom", "cat", "value", bases["sd15"].origin, (), torch.zeros(1), torch.zeros(1),
                unpacked_delta(bases["sd15"], torch.zeros(bases["sd15"].layout.n_values)),
            )
        )  # fmt: skip


def test_sizes_reach_alpha(bases: dict[str, Base]) -> None:
    """Alpha at 1024 px reads resolution and aspect ratio: another size at the same latents is another image."""
    base = bases["pixart-alpha"]
    kv, x, t = base.pack(base.encode([parse("a cat", {})]).e), torch.randn(1, 4, 8, 8), torch.tensor(500)
    with torch.no_grad():
        a, b = (base.predict(x, t, kv, size=size) for size in ((16, 16), (16, 24)))
    assert not torch.equal(a, b)
    assert bases["pixart-sigma"].added_conditions(2) == {}


def test_what_needs_a_unet_is_refused(studio: Studio, tmp_path: Path, photos: Any) -> None:
    """Exports, imports, baselines, distillation and other backends say so before any work."""
    from minikin.baselines import train as baselines
    from minikin.distillation import distill

    base, tom = studio.base, concept(studio.base)
    calls = (
        lambda: export(base, tom, "kohya", tmp_path / "x"),
        lambda: import_embedding(base, tmp_path / "x", "tom", "cat"),
        lambda: baselines.check(base, photos, Baseline(method="dreambooth", name="tom", category="cat")),
        lambda: distill.check(base, Distill(method="lcm", data="scenes")),
        lambda: lora_file.load(base, tmp_path / "x", "style"),
        lambda: studio.paint("a cat", backend="compile", **SIZE),
    )
    for call in calls:
        with pytest.raises(BadRecipe, match=r"works with U-Nets .* 'sigma' \(pixart-sigma\)"):
            call()
    assert not list(tmp_path.iterdir())


# ---- true sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pixart.PUBLISHED)
def test_published_models(name: str) -> None:
    """28 layers of 1152; a concept of mode value takes 64.5 KB in float16, 32.4 KB in 8 bits, and a header."""
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        model = PixArtTransformer2DModel(**pixart.PUBLISHED[name].transformer)
        shape = layout(model)
        kv = pack(model, torch.empty(1, 120, shape.text_width), shape=shape)
    assert [layer.width for layer in shape.layers] == [1152] * 28 and shape.text_width == 1152
    assert kv.shape == (1, 120, 2 * 28 * 1152) and len(text_projection(model)) == 1
    delta = {layer.path: torch.randn(layer.width) for layer in shape.layers}
    origin = Origin("pixart-sigma", "0" * 64, "0" * 64, "", "x " + "0" * 128)
    tom = Concept("tom", "cat", "value", origin, (), torch.zeros(1), torch.zeros(1), delta)
    half, eighth = (concept_file.to_bytes(tom, int8=int8) for int8 in (False, True))
    assert 64_512 < len(half) < 66_500 and 32_256 + 112 < len(eighth) < 34_500
    assert concept_file.from_bytes(half).n_values == 28 * 1152


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_attached_pipelines_take_concepts(family: str) -> None:
    """A stock pipeline takes packed prompts with a concept, and is as it was after `detach`."""
    pipe = pixart.miniature(family)
    minikin = attach(pipe)
    minikin.add(concept(minikin.base))
    how: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "height": 64, "width": 64}
    how |= {"use_resolution_binning": False, "generator": torch.Generator().manual_seed(0)}
    tom = pipe(**minikin("a <tom>", "blurry"), **how).images
    how["generator"] = torch.Generator().manual_seed(0)
    plain = pipe(**minikin("a cat", "blurry"), **how).images
    assert np.abs(tom - plain).max() > 1e-3
    minikin.detach()
    assert "forward" not in vars(pipe.transformer)
    with pytest.raises(BadRecipe, match="were detached"):
        minikin("a <tom>")


@pytest.mark.parametrize("first", ["hook", "attach"])
def test_hooks_of_offloading_go_on(first: str) -> None:
    """accelerate moves weights before a forward pass; its hook stays around ours, and is there after detach."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    denoiser, hook = pixart.miniature("pixart-alpha").transformer.eval(), Counting()
    steps = [lambda: add_hook_to_module(denoiser, hook), lambda: attention.attach(denoiser)]
    for step in steps if first == "hook" else reversed(steps):
        step()
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    e = torch.randn(1, 5, denoiser.config.caption_channels)
    with torch.no_grad():
        packed = pack(denoiser, attention.project(denoiser, e))
    size = {"resolution": torch.tensor([[64.0, 64.0]]), "aspect_ratio": torch.tensor([[1.0]])}

    def run(text: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = denoiser(x, text, timestep=t, added_cond_kwargs=size, return_dict=False)[0]
        return out

    with torch.no_grad():
        plain, ours = run(e), run(packed)
    assert torch.equal(plain, ours) and hook.calls == 2
    attention.detach(denoiser)
    with torch.no_grad():
        assert torch.equal(run(e), plain) and hook.calls == 3
    remove_hook_from_module(denoiser)
    with torch.no_grad():
        assert torch.equal(run(e), plain) and hook.calls == 3

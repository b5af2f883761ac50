"""PixArt and SANA: from a folder to images with concepts, on miniatures; the published models' sizes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

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
from tests.conftest import TRANSFORMERS, build_pipeline
from tests.helpers import pixart, sana

SIZE: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "seed": 3}
CATEGORIES = {"tom": "cat", "rex": "teddy bear"}


def concept(base: Base, name: str = "tom", scale: float = 3.0) -> Concept:
    """A concept of mode value that changes images much."""
    g = torch.Generator().manual_seed(len(name) + ord(name[0]))
    delta = unpacked_delta(base, scale * torch.randn(base.layout.n_values, generator=g))
    return Concept(
        name, CATEGORIES[name], "value", base.origin, (), torch.zeros(1), torch.zeros(1), delta
    )  # fmt: skip


@pytest.fixture(scope="module", params=["pixart-sigma", "sana"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved miniature; its name is the family's."""
    path = tmp_path_factory.mktemp("folder") / str(request.param)
    build_pipeline(path.name, path).save_pretrained(path)
    return path


of_pixart = pytest.mark.parametrize("folder", ["pixart-sigma"], indirect=True)


@pytest.fixture(scope="module")
def studio(folder: Path) -> Studio:
    return Studio(open_base(str(folder), device="cpu", dtype="float32"))


def far(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, int) - np.asarray(b, int)).mean())


# ---- opening --------------------------------------------------------------------------------------


def test_a_folder_is_opened_and_added(folder: Path, studio: Studio, bases: dict[str, Base]) -> None:
    """Weights that T5 uses twice are in the file once; the identity is that of the pipeline that was saved."""
    base, saved = studio.base, bases[folder.name]
    assert base.architecture == folder.name and add(folder, "mine").architecture == folder.name
    assert (base.fingerprint, base.text_hash) == (saved.fingerprint, saved.text_hash)
    assert base.n_tokens == 300 and bases["pixart-alpha"].n_tokens == 120


@pytest.mark.parametrize("folder", ["sana"], indirect=True)
def test_a_folder_of_bfloat16_shards(folder: Path, tmp_path: Path) -> None:
    """As SANA is published: the text encoder in shards of bfloat16 with their index."""
    build_pipeline("sana", tmp_path).save_pretrained(tmp_path / "bf16", variant="bf16", max_shard_size="20KB")
    names = {file.name for file in (tmp_path / "bf16" / "text_encoder").iterdir()}
    assert "model.safetensors.index.bf16.json" in names
    bases = [open_base(str(path), device="cpu", dtype="float32") for path in (folder, tmp_path / "bf16")]
    assert bases[0].fingerprint == bases[1].fingerprint and bases[0].text_hash == bases[1].text_hash


@of_pixart
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


@of_pixart
def test_a_tokenizer_of_sentencepiece_alone(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """As PixArt is published; without the packages that read it, the message names them."""
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "old" / "tokenizer" / "tokenizer.json").rename(tmp_path / "old" / "tokenizer" / "spiece.model")
    monkeypatch.setattr("minikin.models.loading.diffusers_folder._is_installed", lambda _: False)
    with pytest.raises(BadModelFile, match="spiece.model.* pip install sentencepiece protobuf"):
        open_base(str(tmp_path / "old"), device="cpu")


@of_pixart
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_encoder": [None, None]}, "has no text_encoder"),
        ({"transformer": [None, None]}, "has no transformer .* full pipeline: transformer/"),
        ({"_class_name": "StableDiffusion3Pipeline"}, "is a StableDiffusion3Pipeline: its text .* every step"),
        ({"_class_name": "FluxPipeline"}, "is a FluxPipeline: its text passes through the transformer"),
        ({"_class_name": "KolorsPipeline"}, "is a KolorsPipeline: it reads text by ChatGLM3"),
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

    for name, why in (("Flux", "its text"), ("Kolors", "it reads text by ChatGLM3")):
        refused = type(f"{name}Pipeline", (SimpleNamespace,), {})(unet=None)
        with pytest.raises(BadModelFile, match=f"This pipeline is a {name}Pipeline: {why}"):
            attach(refused)
    other = type("LatteTransformerPipeline", (SimpleNamespace,), {})(transformer=None)
    with pytest.raises(BadModelFile, match="This pipeline is a LatteTransformerPipeline. Open a model of"):
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
        tokenizer = base.tokenizers[0]
        ids = tokenizer(base.text.word(prompt.text)).input_ids
        words = [tokenizer.decode([ids[i] for i in at]).strip() for at in positions]
        assert words == ["cat", "teddy bear"]


def test_word_vectors_reach_the_encoder_and_emphasis_its_tokens(studio: Studio) -> None:
    base, prompt = studio.base, parse("a photo of <rex>", CATEGORIES)
    vectors = base.word_vectors("Teddy Bear")
    assert torch.equal(base.encode([prompt], {"rex": vectors}).e, base.encode([prompt]).e)
    moved = base.encode([prompt], {"rex": [v + 1 for v in vectors]}).e - base.encode([prompt]).e
    assert moved.abs().max() > 1e-3
    weighted, plain = (base.encode([parse(f"a {word} of a cat", {})]).e for word in ("(photo:1.5)", "photo"))
    photo = 1 + (base.family.text == "gemma")  # which has a token for the beginning
    assert (weighted - plain)[0, photo].abs().max() > 1e-4


def test_prompts_that_are_too_long(studio: Studio) -> None:
    """One window is read, without chunks; a concept beyond it is refused."""
    long = "cat " * 300
    warnings = studio.resolve(Paint(prompt=long)).warnings
    assert any("2 chunks of 299 tokens; the first is read and the rest is left out" in w for w in warnings)
    with pytest.raises(BadRecipe, match="longer than the 299 tokens that are read, and <tom> lies beyond"):
        studio.base.encode([parse(long + "<tom>", CATEGORIES)])
    with pytest.raises(BadRecipe, match="is (T5|Gemma)"):
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
    first = "Euler" if base.schedule.is_flow else "DDIM"
    for how in ({"scheduler": first}, {"scheduler": "DPM++ 2M"}, {"guidance": 1.0}):
        assert far(studio.paint("a photo of <tom>", **SIZE, **how)[0], plain) > 0


def test_taught_concepts_keep_their_family(studio: Studio, photos: Any, bases: dict[str, Base]) -> None:
    """Masks from attention and the base's own size; the file names its layers, and other families refuse it."""
    tom = studio.teach(
        [replace(p, mask=None) for p in photos], name="tom", category="cat", mode="value", steps=2, batch=1,
        mask="attention",
    )  # fmt: skip
    data = concept_file.to_bytes(tom)
    again = concept_file.from_bytes(data)
    family = studio.base.architecture
    assert again.origin.architecture == family and list(again.delta) == [
        f"transformer_blocks.{k}.attn2" for k in range(2)
    ]
    for other in ("pixart-alpha", "sd15"):
        with pytest.raises(BaseMismatch, match=f"taught on {family} .* cross-attention layers do not match"):
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
        with pytest.raises(BadRecipe, match=rf"works with U-Nets .* '{base.name}' \({base.name}\)"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_refine_and_inpaint(family: str, bases: dict[str, Base]) -> None:
    """At strength 1 refining is painting, to the bit; pixels outside the mask stay; concepts act in both."""
    studio = Studio(bases[family])
    studio.add(concept(studio.base))
    how = {"steps": 2, "seed": 3}
    image = studio.paint("a cat", width=64, height=64, steps=2, seed=5)[0]
    plain, tom = (studio.refine(image, prompt=p, strength=0.5, **how)[0] for p in ("a cat", "<tom>"))
    assert far(image, plain) > 0 and far(plain, tom) > 0
    whole = studio.refine(image, prompt="<tom>", strength=1.0, **how)[0]
    assert far(whole, studio.paint("<tom>", width=64, height=64, **how)[0]) == 0
    mask = Image.fromarray(np.where(np.arange(64) < 32, 255, 0).astype(np.uint8)[None].repeat(64, 0))
    new = np.asarray(studio.inpaint(image, mask, "<tom>", strength=0.7, feather=0, **how)[0])
    old = np.asarray(image)
    assert np.array_equal(new[:, 32:], old[:, 32:]) and not np.array_equal(new[:, :32], old[:, :32])


# ---- true sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*pixart.PUBLISHED, *sana.PUBLISHED])
def test_published_models(name: str) -> None:
    """PixArt and SANA 0.6B: 28 layers of 1152, 64.5 KB of value differences in float16, 32.4 KB in 8 bits; SANA
    1.6B: 20 of 2240, 89.6 and 44.9 KB, stored in 8 bits. A gated concept of two words stays below 100 KB."""
    import diffusers

    in_sana = name in sana.PUBLISHED
    kind = diffusers.SanaTransformer2DModel if in_sana else diffusers.PixArtTransformer2DModel
    n, width = (sana.PUBLISHED[name].n_layers, sana.PUBLISHED[name].width) if in_sana else (28, 1152)
    with torch.device("meta"):
        model = kind(**(sana if in_sana else pixart).PUBLISHED[name].transformer)
        shape = layout(model)
        kv = pack(model, torch.empty(1, 120, shape.text_width), shape=shape)
    assert [layer.width for layer in shape.layers] == [width] * n and shape.text_width == width
    assert kv.shape == (1, 120, 2 * n * width) and len(text_projection(model)) == 1 + in_sana
    delta = {layer.path: torch.randn(layer.width) for layer in shape.layers}
    origin = Origin("sana" if in_sana else "pixart-sigma", "0" * 64, "0" * 64, "", "x " + "0" * 128)
    tom = Concept("tom", "cat", "value", origin, (), torch.zeros(1), torch.zeros(1), delta)
    half, eighth = (len(concept_file.to_bytes(tom, int8=int8)) for int8 in (False, True))
    assert 2 * n * width < half < 2 * n * width + 2000 and n * (width + 4) < eighth < n * width + 2300
    assert len(data := concept_file.to_bytes(tom)) == (eighth if width == 2240 else half)
    assert concept_file.from_bytes(data).n_values == n * width
    text = 2304 if in_sana else 4096
    gated = replace(
        tom, mode="gated", word_deltas=(torch.randn(2, text),), i_star=torch.randn(width),
        dual=torch.randn(width),
    )  # fmt: skip
    assert len(concept_file.to_bytes(gated)) < concept_file.MAX_BYTES


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_attached_pipelines_take_concepts(family: str, tmp_path: Path) -> None:
    """A stock pipeline takes packed prompts with a concept, and is as it was after `detach`."""
    pipe = build_pipeline(family, tmp_path)
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

"""Published judges, as miniatures with random weights: what they see, what they refuse, what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minikin.errors import AssetError, BadModelFile, BadPhoto, BadRecipe, NoNetwork, UnknownName
from minikin.evaluation import encoders, image_encoders, tiny_encoders
from minikin.evaluation.image_encoders import TOWERS, Known, open_tower
from minikin.models.loading.architectures import ARCHITECTURES, shrunk, write_configs
from minikin.models.loading.registry import models_folder
from minikin.tiny.encoders import weights

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def known(name: str) -> Known:
    """The published tower's entry, but as wide as the miniature."""
    return replace(TOWERS[name], width=32, patch=28)


def write_miniature(name: str, folder: Path, seed: int = 0) -> None:
    """A model of the real class with two narrow layers and patches of 28 px, as a download would leave it."""
    import transformers as t

    torch.manual_seed(seed)
    kind = TOWERS[name].model_type
    model: Any
    if kind == "clip":
        vision = {**SMALL, "intermediate_size": 64, "patch_size": 28, "image_size": 224}
        text = {**SMALL, "intermediate_size": 64, "vocab_size": 49408, "max_position_embeddings": 77}
        config = t.CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)
        model = t.CLIPModel(config)
        configs = write_configs(shrunk(ARCHITECTURES["sd15"]), folder / "pipeline")
        for file in (configs / "tokenizer").iterdir():
            file.rename(folder / file.name)
    elif kind == "vit":
        model = t.ViTModel(t.ViTConfig(**SMALL, intermediate_size=64, patch_size=28), add_pooling_layer=False)
    else:
        model = t.Dinov2Model(t.Dinov2Config(**SMALL, mlp_ratio=2, patch_size=28, image_size=252))
    for p in model.parameters():  # away from symmetric starts
        p.data.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in TOWERS:
        made[name] = tmp_path_factory.mktemp(name)
        write_miniature(name, made[name])
    return made


@pytest.fixture
def here(miniatures: dict[str, Path]) -> None:
    """All miniatures in the user's models folder."""
    models_folder().mkdir(parents=True)
    for name, folder in miniatures.items():
        (models_folder() / name).symlink_to(folder)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(3, 96, 96, 3), dtype=np.uint8)


# ---- what they give ------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", TOWERS)
def test_vectors_are_unit_and_do_not_depend_on_company(name: str, pictures: np.ndarray) -> None:
    judge = open_tower(name, known=known(name))
    together = judge.images(pictures)
    assert together.shape == (3, 24 if judge.reads else 32) and together.dtype is torch.float32
    assert together.norm(dim=-1).numpy() == pytest.approx(1, abs=1e-5)
    alone = torch.cat([judge.images([Image.fromarray(p)]) for p in pictures])
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together @ together.T)[0, 1] < 0.9999  # other images, other vectors
    assert judge.images(pictures[:0]).shape == (0, together.shape[1])


@pytest.mark.usefixtures("here")
def test_clip_gives_what_transformers_gives(miniatures: dict[str, Path], pictures: np.ndarray) -> None:
    """Logits of the whole model with the library's own processor and tokenizer, against our products."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    captions = ["a cat", "a photo of a dog on the beach"]
    model = CLIPModel.from_pretrained(miniatures["clip-b32"]).eval()
    ids = CLIPTokenizer.from_pretrained(miniatures["clip-b32"])(captions, padding=True, return_tensors="pt")
    shown = CLIPImageProcessorPil()([Image.fromarray(p) for p in pictures], return_tensors="pt")
    with torch.no_grad():
        want = model(**ids, **shown).logits_per_image / model.logit_scale.exp()
    judge = open_tower("clip-b32", known=known("clip-b32"))
    assert torch.allclose(judge.images(pictures) @ judge.texts(captions).T, want, atol=1e-5)
    assert judge.texts(["word " * 200]).shape == (1, 24)  # cut, not refused


@pytest.mark.usefixtures("here")
def test_pixels_are_prepared_as_published() -> None:
    """A flat image arrives as (value - mean) / deviation; a wide one loses its sides, not its shape."""
    judge = open_tower("dino-s16", known=known("dino-s16"))
    flat = judge._processor([Image.new("RGB", (64, 64), (255, 0, 51))], return_tensors="pt")["pixel_values"]
    assert flat.shape == (1, 3, 224, 224)
    want = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert flat[0, :, 100, 100].tolist() == pytest.approx(want, abs=1e-5)
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 255  # the middle third of a 3:1 image is all that is left
    seen = judge._processor([Image.fromarray(wide)], return_tensors="pt")["pixel_values"]
    white = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert seen.mean((0, 2, 3)).tolist() == pytest.approx(white, abs=0.05)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["clip-b32", "dino-s16", "dinov2-s14"])
def test_masks_hide_what_is_outside(name: str, pictures: np.ndarray) -> None:
    judge = open_tower(name, known=known(name))
    mask = np.zeros((96, 96), np.float32)
    mask[24:72, 24:72] = 1
    other = pictures.copy()
    other[:, mask == 0] = 17  # another background
    masks = [mask] * 3
    assert torch.equal(judge.likeness(pictures, masks), judge.likeness(other, masks))
    assert not torch.allclose(judge.likeness(pictures), judge.likeness(other), atol=1e-4)  # control
    inside = pictures.copy()
    inside[:, 40:50, 40:50] = 0
    assert not torch.allclose(judge.likeness(pictures, masks), judge.likeness(inside, masks), atol=1e-6)
    assert torch.equal(judge.likeness(pictures, [None] * 3), judge.likeness(pictures))
    with pytest.raises(BadPhoto, match="3 images but 1 masks"):
        judge.likeness(pictures, [mask])
    with pytest.raises(BadPhoto, match="uint8"):
        judge.images(pictures.astype(np.float32))


@pytest.mark.usefixtures("here")
def test_cards_tell_weights_apart(miniatures: dict[str, Path], tmp_path: Path) -> None:
    judge = open_tower("dino-s16", known=known("dino-s16"))
    assert judge.card == encoders.Card("dino-s16", "facebook/dino-vits16", "Apache-2.0", judge.card.digest)
    assert judge.card.digest == open_tower("dino-s16", known=known("dino-s16")).card.digest
    (models_folder() / "dino-s16").unlink()
    write_miniature("dino-s16", models_folder() / "dino-s16", seed=1)
    assert open_tower("dino-s16", known=known("dino-s16")).card.digest != judge.card.digest


# ---- what they refuse ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
def test_missing_weights_say_where_to_get_them(name: str) -> None:
    with pytest.raises(NoNetwork, match="never downloads") as e:
        encoders.open_judge(name, "cpu")
    assert f"`minikin models pull {name}`" in str(e.value)


def test_unknown_judges() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'clip-b32'"):
        encoders.open_judge("clip-b23", "cpu")
    assert encoders.names() == ["tiny", *TOWERS]


@pytest.mark.usefixtures("here")
def test_another_model_is_refused(miniatures: dict[str, Path]) -> None:
    """The miniature itself is not ViT-B/32; nor is a DINO in CLIP's folder."""
    with pytest.raises(BadModelFile, match=r"\('clip', 28, 32\), expected \('clip', 32, 768\)"):
        encoders.open_judge("clip-b32", "cpu")
    (models_folder() / "clip-b32").unlink()
    (models_folder() / "clip-b32").symlink_to(miniatures["dino-s16"])
    with pytest.raises(BadModelFile, match="'vit'"):
        open_tower("clip-b32", known=known("clip-b32"))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    """Without a tensor, transformers would go on with random numbers; a torn file cannot be read."""
    from safetensors.torch import load_file, save_file

    folder = models_folder() / "dinov2-s14"
    write_miniature("dinov2-s14", folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    dropped = next(k for k in tensors if "attention" in k and k.endswith("weight"))
    save_file({k: v for k, v in tensors.items() if k != dropped}, file, {"format": "pt"})
    with pytest.raises(BadModelFile, match="1 tensors are missing"):
        open_tower("dinov2-s14", known=known("dinov2-s14"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BadModelFile, match="cannot be read"):
        open_tower("dinov2-s14", known=known("dinov2-s14"))
    (folder / "config.json").write_text("{")
    with pytest.raises(BadModelFile, match=r"config.json cannot be read"):
        open_tower("dinov2-s14", known=known("dinov2-s14"))


@pytest.mark.usefixtures("here")
def test_those_that_do_not_read_say_which_do() -> None:
    with pytest.raises(BadRecipe, match="tiny, clip-b32, clip-l14"):
        open_tower("dino-s16", known=known("dino-s16")).texts(["a cat"])


# ---- the embedded one ------------------------------------------------------------------------------


@pytest.mark.skipif(weights.embedded("judge").exists(), reason="the judge is here")
def test_the_embedded_judge_says_when_it_is_missing() -> None:
    with pytest.raises(AssetError, match=r"weights of the judge are missing.*tools.tiny_training"):
        encoders.open_judge("tiny", "cpu")


def test_the_embedded_judge_behind_the_interface(tmp_path: Path, pictures: np.ndarray) -> None:
    """A miniature of tiny's own: same vectors through the interface as without it, and a card."""
    from minikin.tiny.encoders.dual_encoder import Judge, Tokens, facts_of
    from minikin.tiny.encoders.network import EyeShape, JudgeNet, ReaderShape

    tokens = Tokens()
    eye, reader = EyeShape((16, 16), (1, 1), 2, 16), ReaderShape(tokens.size, tokens.context, 16, 1, 2)
    torch.manual_seed(0)
    net = JudgeNet(eye, reader, tokens.end, 8)
    path = tmp_path / "judge.safetensors"
    weights.write(path, "judge", net, facts_of(eye, reader, 8, tokens, "small"))
    judge: encoders.Judge = tiny_encoders.open_embedded(path)
    bare = Judge.open(path)
    mask = np.zeros((96, 96), bool)
    mask[:48] = True
    assert torch.equal(judge.images(pictures), bare.image(pictures))
    assert torch.equal(judge.texts(["a cat"]), bare.text(["a cat"]))
    assert torch.equal(judge.likeness(pictures, [mask] * 3), bare.likeness(pictures, [mask] * 3))
    assert judge.reads and judge.card.name == "tiny" and len(judge.card.digest) == 16
    assert json.dumps(judge.card.__dict__)


def test_a_pickle_says_how_to_convert_it() -> None:
    """And then opens: what a repository publishes only as pytorch_model.bin."""
    from minikin.models.loading.convert import convert

    folder = models_folder() / "dino-s16"
    write_miniature("dino-s16", folder)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadModelFile, match="minikin models convert .*/dino-s16/pytorch_model.bin"):
        open_tower("dino-s16", known=known("dino-s16"))
    convert(folder / "pytorch_model.bin")
    assert open_tower("dino-s16", known=known("dino-s16")).card.digest


def test_every_tower_has_its_entry() -> None:
    """Contract of the table: licence, size, a patch that divides the image, and a pull of that name."""
    from minikin.models.loading.hub import HELPERS

    for name, k in TOWERS.items():
        assert (HELPERS[name].repo, HELPERS[name].licence) == (k.repo, k.licence)
        assert k.licence and k.size and k.repo.count("/") == 1, name
        assert image_encoders.SIDE % k.patch == 0 and k.pixels.resize >= image_encoders.SIDE

"""Published encoders as miniatures with random weights: vectors, preprocessing, masks, refused files."""

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
from minikin.evaluation import encoder_registry, tiny_encoders
from minikin.evaluation.encoders import Encoder, EncoderCard
from minikin.evaluation.published_encoders import PUBLISHED, EncoderSpec, open_published
from minikin.models.image_processor import SIDE
from minikin.models.loading.architectures import ARCHITECTURES, shrunk, write_configs
from minikin.models.loading.registry import models_folder
from minikin.tiny.encoders import weights
from minikin.tiny.encoders.dual_encoder import KIND, DualEncoder, Tokens, facts_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def narrow_spec(name: str) -> EncoderSpec:
    """The published encoder's entry, but as wide as the miniature."""
    return replace(PUBLISHED[name], width=32, patch=28)


def write_miniature(name: str, folder: Path, seed: int = 0) -> None:
    """A model of the real class with two narrow layers and patches of 28 px, as a download would leave it."""
    import transformers as t

    torch.manual_seed(seed)
    kind = PUBLISHED[name].model_type
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
    folders = {}
    for name in PUBLISHED:
        folders[name] = tmp_path_factory.mktemp(name)
        write_miniature(name, folders[name])
    return folders


@pytest.fixture
def here(miniatures: dict[str, Path]) -> None:
    """All miniatures in the user's models folder."""
    models_folder().mkdir(parents=True)
    for name, folder in miniatures.items():
        (models_folder() / name).symlink_to(folder)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(3, 96, 96, 3), dtype=np.uint8)


# ---- vectors ------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", PUBLISHED)
def test_vectors_are_unit_and_independent_of_the_batch(name: str, images: np.ndarray) -> None:
    encoder = open_published(name, spec=narrow_spec(name))
    together = encoder.encode_images(images)
    assert together.shape == (3, 24 if encoder.has_text_encoder else 32) and together.dtype is torch.float32
    assert together.norm(dim=-1).numpy() == pytest.approx(1, abs=1e-5)
    alone = torch.cat([encoder.encode_images([Image.fromarray(p)]) for p in images])
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together @ together.T)[0, 1] < 0.9999  # other images, other vectors
    assert encoder.encode_images(images[:0]).shape == (0, together.shape[1])


@pytest.mark.usefixtures("here")
def test_clip_vectors_equal_those_of_transformers(miniatures: dict[str, Path], images: np.ndarray) -> None:
    """Logits of the whole model with the library's own processor and tokenizer, against our products."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    captions = ["a cat", "a photo of a dog on the beach"]
    model = CLIPModel.from_pretrained(miniatures["clip-b32"]).eval()
    ids = CLIPTokenizer.from_pretrained(miniatures["clip-b32"])(captions, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil()([Image.fromarray(p) for p in images], return_tensors="pt")
    with torch.no_grad():
        expected = model(**ids, **pixels).logits_per_image / model.logit_scale.exp()
    encoder = open_published("clip-b32", spec=narrow_spec("clip-b32"))
    assert torch.allclose(encoder.encode_images(images) @ encoder.encode_texts(captions).T, expected, atol=1e-5)
    assert encoder.encode_texts(["word " * 200]).shape == (1, 24)  # cut, not refused


@pytest.mark.usefixtures("here")
def test_pixels_are_prepared_as_published() -> None:
    """A flat image arrives as (value - mean) / deviation; a wide one loses its sides, not its shape."""
    encoder = open_published("dino-s16", spec=narrow_spec("dino-s16"))
    flat = encoder._processor([Image.new("RGB", (64, 64), (255, 0, 51))], return_tensors="pt")["pixel_values"]
    assert flat.shape == (1, 3, 224, 224)
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert flat[0, :, 100, 100].tolist() == pytest.approx(expected, abs=1e-5)
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 255  # the middle third of a 3:1 image is all that is left
    cropped = encoder._processor([Image.fromarray(wide)], return_tensors="pt")["pixel_values"]
    white = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert cropped.mean((0, 2, 3)).tolist() == pytest.approx(white, abs=0.05)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["clip-b32", "dino-s16", "dinov2-s14"])
def test_masks_hide_what_is_outside(name: str, images: np.ndarray) -> None:
    encoder = open_published(name, spec=narrow_spec(name))
    mask = np.zeros((96, 96), np.float32)
    mask[24:72, 24:72] = 1
    other = images.copy()
    other[:, mask == 0] = 17  # another background
    masks = [mask] * 3
    assert torch.equal(encoder.encode_subjects(images, masks), encoder.encode_subjects(other, masks))
    assert not torch.allclose(
        encoder.encode_subjects(images), encoder.encode_subjects(other), atol=1e-4
    )  # control
    inside = images.copy()
    inside[:, 40:50, 40:50] = 0
    assert not torch.allclose(
        encoder.encode_subjects(images, masks), encoder.encode_subjects(inside, masks), atol=1e-6
    )
    assert torch.equal(encoder.encode_subjects(images, [None] * 3), encoder.encode_subjects(images))
    with pytest.raises(BadPhoto, match="3 images but 1 masks"):
        encoder.encode_subjects(images, [mask])
    with pytest.raises(BadPhoto, match="uint8"):
        encoder.encode_images(images.astype(np.float32))


@pytest.mark.usefixtures("here")
def test_card_has_the_digest_of_the_weights(miniatures: dict[str, Path], tmp_path: Path) -> None:
    encoder = open_published("dino-s16", spec=narrow_spec("dino-s16"))
    assert encoder.card == EncoderCard("dino-s16", "facebook/dino-vits16", "Apache-2.0", encoder.card.digest)
    assert encoder.card.digest == open_published("dino-s16", spec=narrow_spec("dino-s16")).card.digest
    (models_folder() / "dino-s16").unlink()
    write_miniature("dino-s16", models_folder() / "dino-s16", seed=1)
    assert open_published("dino-s16", spec=narrow_spec("dino-s16")).card.digest != encoder.card.digest


# ---- errors ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_weights_say_where_to_get_them(name: str) -> None:
    with pytest.raises(NoNetwork, match="never downloads") as e:
        encoder_registry.open_encoder(name, "cpu")
    assert f"`minikin models pull {name}`" in str(e.value)


def test_unknown_names() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'clip-b32'"):
        encoder_registry.open_encoder("clip-b23", "cpu")
    assert encoder_registry.names() == ["tiny", *PUBLISHED]


@pytest.mark.usefixtures("here")
def test_another_model_is_refused(miniatures: dict[str, Path]) -> None:
    """The miniature itself is not ViT-B/32; nor is a DINO in CLIP's folder."""
    with pytest.raises(BadModelFile, match=r"\('clip', 28, 32\), expected \('clip', 32, 768\)"):
        encoder_registry.open_encoder("clip-b32", "cpu")
    (models_folder() / "clip-b32").unlink()
    (models_folder() / "clip-b32").symlink_to(miniatures["dino-s16"])
    with pytest.raises(BadModelFile, match="'vit'"):
        open_published("clip-b32", spec=narrow_spec("clip-b32"))


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
        open_published("dinov2-s14", spec=narrow_spec("dinov2-s14"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BadModelFile, match="cannot be read"):
        open_published("dinov2-s14", spec=narrow_spec("dinov2-s14"))
    (folder / "config.json").write_text("{")
    with pytest.raises(BadModelFile, match=r"config.json cannot be read"):
        open_published("dinov2-s14", spec=narrow_spec("dinov2-s14"))


@pytest.mark.usefixtures("here")
def test_text_encoder_is_required_for_captions() -> None:
    with pytest.raises(BadRecipe, match="tiny, clip-b32, clip-l14"):
        open_published("dino-s16", spec=narrow_spec("dino-s16")).encode_texts(["a cat"])


# ---- the embedded one ------------------------------------------------------------------------------


@pytest.mark.skipif(weights.embedded(KIND).exists(), reason="the weights are here")
def test_missing_embedded_weights_are_named() -> None:
    with pytest.raises(AssetError, match=r"encoder weights are missing.*tools.tiny_training"):
        encoder_registry.open_encoder("tiny", "cpu")


def test_embedded_encoder_behind_the_protocol(tmp_path: Path, images: np.ndarray) -> None:
    """A miniature of tiny's own: the same vectors through the protocol, and a card."""
    from minikin.tiny.encoders.network import DualEncoderNet, ImageEncoderShape, TextEncoderShape

    tokens = Tokens()
    image = ImageEncoderShape((16, 16), (1, 1), 2, 16)
    text = TextEncoderShape(tokens.size, tokens.context, 16, 1, 2)
    torch.manual_seed(0)
    net = DualEncoderNet(image, text, tokens.end, 8)
    path = tmp_path / "encoder.safetensors"
    weights.write(path, KIND, net, facts_of(image, text, 8, tokens, "small"))
    encoder: Encoder = tiny_encoders.open_embedded(path)
    bare = DualEncoder.open(path)
    mask = np.zeros((96, 96), bool)
    mask[:48] = True
    assert torch.equal(encoder.encode_images(images), bare.encode_images(images))
    assert torch.equal(encoder.encode_texts(["a cat"]), bare.encode_texts(["a cat"]))
    assert torch.equal(encoder.encode_subjects(images, [mask] * 3), bare.encode_subjects(images, [mask] * 3))
    assert encoder.has_text_encoder and encoder.card.name == "tiny" and len(encoder.card.digest) == 16
    assert json.dumps(encoder.card.__dict__)


def test_pickled_weights_open_after_conversion() -> None:
    """For repositories that publish nothing but pytorch_model.bin."""
    from minikin.models.loading.convert import convert

    folder = models_folder() / "dino-s16"
    write_miniature("dino-s16", folder)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadModelFile, match="minikin models convert .*/dino-s16/pytorch_model.bin"):
        open_published("dino-s16", spec=narrow_spec("dino-s16"))
    convert(folder / "pytorch_model.bin")
    assert open_published("dino-s16", spec=narrow_spec("dino-s16")).card.digest


def test_every_encoder_can_be_pulled() -> None:
    """Contract of the table: licence, size, a patch that divides the image, and a pull of that name."""
    from minikin.models.loading.hub import AUXILIARY_MODELS

    for name, spec in PUBLISHED.items():
        assert (AUXILIARY_MODELS[name].repo, AUXILIARY_MODELS[name].licence) == (spec.repo, spec.licence)
        assert spec.licence and spec.size and spec.repo.count("/") == 1, name
        assert SIDE % spec.patch == 0 and spec.preprocessing.resize >= SIDE

"""Published image and text encoders through transformers: CLIP, DINO, DINOv2.

    clip-b32, clip-l14   Radford et al. 2021, arXiv:2103.00020: projected image and text vectors
    dino-s16             Caron et al. 2021, arXiv:2104.14294: class token after the last norm
    dinov2-s14           Oquab et al. 2023, arXiv:2304.07193: the same

Weights are read from `<data folder>/models/NAME` or from the hub's local cache, and never downloaded.
Preprocessing is fixed by name instead of read from a file beside the weights, so that a number means the same
on every machine: resize the shorter side to `resize` px (bicubic), crop the middle 224 px, normalise by the
mean and standard deviation of the training pixels. The numbers for CLIP are from openai/CLIP (clip.py), for
DINO from facebookresearch/dino (eval_knn.py), for DINOv2 from facebookresearch/dinov2 (data/transforms.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minikin.errors import BadModelFile, BadPhoto, BadRecipe, NoNetwork
from minikin.evaluation.encoders import EncoderCard, Images, Masks, digest
from minikin.models.image_processor import CLIP_PREPROCESSING, IMAGENET_PREPROCESSING, Preprocessing, processor
from minikin.models.loading import published
from minikin.models.loading.registry import models_folder

PICKLED = "They are a pickle, which is never opened. If you trust its author: `minikin models convert"
CHUNK = 32  # images or captions per batch


@dataclass(frozen=True)
class EncoderSpec:
    """Where a published encoder comes from; `model_type`, `patch` and `width` identify its architecture."""

    repo: str
    licence: str
    size: str  # of the download
    model_type: str
    patch: int  # px
    width: int  # of the image transformer
    preprocessing: Preprocessing

    @property
    def has_text_encoder(self) -> bool:
        return self.model_type == "clip"


_CLIP, _DINO = CLIP_PREPROCESSING, IMAGENET_PREPROCESSING
PUBLISHED = {
    "clip-b32": EncoderSpec("openai/clip-vit-base-patch32", "MIT", "605 MB", "clip", 32, 768, _CLIP),
    "clip-l14": EncoderSpec("openai/clip-vit-large-patch14", "MIT", "1.7 GB", "clip", 14, 1024, _CLIP),
    "dino-s16": EncoderSpec("facebook/dino-vits16", "Apache-2.0", "87 MB", "vit", 16, 384, _DINO),
    "dinov2-s14": EncoderSpec("facebook/dinov2-small", "Apache-2.0", "88 MB", "dinov2", 14, 384, _DINO),
}


class PublishedEncoder:
    """One published encoder. Images and subjects share a space; masks make the background flat."""

    def __init__(self, name: str, spec: EncoderSpec, model: Any, tokenizer: Any | None) -> None:
        self.name, self.spec, self.model, self.tokenizer = name, spec, model, tokenizer
        self.has_text_encoder = spec.has_text_encoder
        self._processor = processor(spec.preprocessing)

    @cached_property
    def card(self) -> EncoderCard:
        return EncoderCard(self.name, self.spec.repo, self.spec.licence, digest(self.model))

    def encode_images(self, images: Images) -> Tensor:
        return self.encode_subjects(images)

    @torch.no_grad()
    def encode_subjects(self, images: Images, masks: Masks | None = None) -> Tensor:
        inputs = [_as_image(image) for image in images]
        if masks is not None:
            if len(masks) != len(inputs):
                raise BadPhoto(
                    f"{len(inputs)} images but {len(masks)} masks: give one for each, or None in its place."
                )
            fill = tuple(round(255 * m) for m in self.spec.preprocessing.mean)  # 0 to the network
            inputs = [_masked(image, mask, fill) for image, mask in zip(inputs, masks, strict=True)]
        return _in_chunks(inputs, self._image_vectors, self._dimensions)

    @torch.no_grad()
    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        if self.tokenizer is None:
            raise BadRecipe(
                f"The encoder {self.name} has no text encoder; text alignment needs one: "
                f"tiny, {', '.join(n for n, spec in PUBLISHED.items() if spec.has_text_encoder)}."
            )
        return _in_chunks(list(captions), self._text_vectors, self._dimensions)

    @property
    def _dimensions(self) -> int:
        config = self.model.config
        return int(config.projection_dim if self.has_text_encoder else config.hidden_size)

    def _image_vectors(self, images: list[Image.Image]) -> Tensor:
        pixels = self._processor(images, return_tensors="pt")["pixel_values"].to(self.model.device)
        if self.has_text_encoder:
            return torch.as_tensor(self.model.get_image_features(pixel_values=pixels).pooler_output)
        return torch.as_tensor(self.model(pixel_values=pixels).last_hidden_state[:, 0])

    def _text_vectors(self, captions: list[str]) -> Tensor:
        assert self.tokenizer is not None
        ids = self.tokenizer(captions, padding=True, truncation=True, max_length=77, return_tensors="pt")
        return torch.as_tensor(self.model.get_text_features(**ids.to(self.model.device)).pooler_output)


def open_published(
    name: str, device: torch.device | str = "cpu", spec: EncoderSpec | None = None
) -> PublishedEncoder:
    """Open a published encoder from this machine.

    spec  expected architecture; the table's entry by default
    Raises NoNetwork when its weights are not here, BadModelFile when they belong to another model.
    """
    spec = spec or PUBLISHED[name]
    folder = models_folder() / name
    source = str(folder) if (folder / "config.json").is_file() else spec.repo
    _check(name, spec, source, _config(name, spec, source))
    model_class, options = _model_class(spec)
    what = f"The weights of the encoder {name} in {source}"
    pickled = folder.is_dir() and not list(folder.glob("*.safetensors"))
    hint = f" {PICKLED} {folder}/pytorch_model.bin`." if pickled else ""
    again = f" Download them again: {_command(name, spec)}"
    try:
        model = published.network(model_class, source, what, hint=hint, again=again, **options)
        with published.readable(what, hint):
            tokenizer = _tokenizer(source) if spec.has_text_encoder else None
    except BadModelFile as e:
        if source == spec.repo and isinstance(e.__cause__, OSError):
            raise NoNetwork(_missing(name, spec)) from e
        raise
    return PublishedEncoder(name, spec, model.to(device), tokenizer)


def _config(name: str, spec: EncoderSpec, source: str) -> dict[str, Any]:
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(source, local_files_only=True)
    except (OSError, ValueError) as e:
        if source == spec.repo:
            raise NoNetwork(_missing(name, spec)) from e
        raise BadModelFile(f"{source}/config.json cannot be read ({e}).") from e
    if not config:
        raise NoNetwork(_missing(name, spec))
    return dict(config)


def _check(name: str, spec: EncoderSpec, source: str, config: dict[str, Any]) -> None:
    vision = config.get("vision_config", config)
    actual = (config.get("model_type"), vision.get("patch_size"), vision.get("hidden_size"))
    expected = (spec.model_type, spec.patch, spec.width)
    if actual != expected:
        raise BadModelFile(
            f"{source} holds another model than {name}: type, patch and width are {actual}, expected "
            f"{expected}. Download the right one: {_command(name, spec)}"
        )


def _model_class(spec: EncoderSpec) -> tuple[Any, dict[str, Any]]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if spec.model_type == "vit":
        return transformers.ViTModel, {"add_pooling_layer": False}  # the pooler was never trained
    return {"clip": transformers.CLIPModel, "dinov2": transformers.Dinov2Model}[spec.model_type], {}


def _tokenizer(source: str) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(source, local_files_only=True)


def _missing(name: str, spec: EncoderSpec) -> str:
    return (
        f"The encoder {name} ({spec.repo}, {spec.size}, {spec.licence}) is not on this machine, and evaluation "
        f"never downloads. Download it once: {_command(name, spec)}"
    )


def _command(name: str, spec: EncoderSpec) -> str:
    return f"`minikin models pull {name}` ({spec.repo})."


def _as_image(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise BadPhoto(f"Expected an image (h, w, 3) of uint8, got {image.shape} of {image.dtype}.")
        image = Image.fromarray(image)
    return image.convert("RGB")


def _masked(image: Image.Image, mask: np.ndarray | None, fill: tuple[int, ...]) -> Image.Image:
    if mask is None:
        return image
    inside = Image.fromarray(np.asarray(mask) > 0.5).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, Image.new("RGB", image.size, fill), inside)


def _in_chunks(items: list[Any], encode: Callable[[list[Any]], Tensor], dimensions: int) -> Tensor:
    """Unit vectors (n, d) float32 on the CPU, CHUNK items at a time."""
    parts = [encode(items[i : i + CHUNK]).float().cpu() for i in range(0, len(items), CHUNK)]
    return F.normalize(torch.cat(parts), dim=-1) if parts else torch.zeros(0, dimensions)

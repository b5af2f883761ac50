"""Published judges through transformers: CLIP, DINO, DINOv2.

    clip-b32, clip-l14   Radford et al. 2021, arXiv:2103.00020: projected image and text vectors
    dino-s16             Caron et al. 2021, arXiv:2104.14294: the class token after the last norm
    dinov2-s14           Oquab et al. 2023, arXiv:2304.07193: the same

Their weights are looked for in `<data folder>/models/NAME` and in the hub's local cache, and never
downloaded. Preprocessing is fixed by name, not read from a file beside the weights, so that a number
means the same on every machine: the shorter side to `resize` px, bicubic, then the middle 224 px,
then the mean and deviation of the training pixels. CLIP's numbers are openai/CLIP's (clip.py), DINO's
are facebookresearch/dino's (eval_knn.py), DINOv2's are facebookresearch/dinov2's (data/transforms.py).
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
from minikin.evaluation.encoders import Card, Masks, Pictures, digest
from minikin.models.image_processor import CLIP_PIXELS, IMAGENET_PIXELS, Pixels, processor
from minikin.models.loading import published
from minikin.models.loading.registry import models_folder

PICKLED = "They are a pickle, which is never opened. If you trust who made it: `minikin models convert"
CHUNK = 32  # images or captions at once


@dataclass(frozen=True)
class Known:
    """A published tower; `model_type`, `patch` and `width` tell it from others of its family."""

    repo: str
    licence: str
    size: str  # of the download
    model_type: str
    patch: int  # px
    width: int  # of the image transformer
    pixels: Pixels

    @property
    def reads(self) -> bool:
        return self.model_type == "clip"


TOWERS = {
    "clip-b32": Known("openai/clip-vit-base-patch32", "MIT", "605 MB", "clip", 32, 768, CLIP_PIXELS),
    "clip-l14": Known("openai/clip-vit-large-patch14", "MIT", "1.7 GB", "clip", 14, 1024, CLIP_PIXELS),
    "dino-s16": Known("facebook/dino-vits16", "Apache-2.0", "87 MB", "vit", 16, 384, IMAGENET_PIXELS),
    "dinov2-s14": Known("facebook/dinov2-small", "Apache-2.0", "88 MB", "dinov2", 14, 384, IMAGENET_PIXELS),
}


class Tower:
    """One published judge. Whole images and things share a space; masks grey out what is around."""

    def __init__(self, name: str, known: Known, model: Any, tokenizer: Any | None) -> None:
        self.name, self.known, self.model, self.tokenizer = name, known, model, tokenizer
        self.reads = known.reads
        self._processor = processor(known.pixels)

    @cached_property
    def card(self) -> Card:
        return Card(self.name, self.known.repo, self.known.licence, digest(self.model))

    def images(self, pictures: Pictures) -> Tensor:
        return self.likeness(pictures)

    @torch.no_grad()
    def likeness(self, pictures: Pictures, masks: Masks | None = None) -> Tensor:
        shown = [_as_image(p) for p in pictures]
        if masks is not None:
            if len(masks) != len(shown):
                raise BadPhoto(
                    f"{len(shown)} images but {len(masks)} masks: give one for each, or None in its place."
                )
            fill = tuple(round(255 * m) for m in self.known.pixels.mean)  # 0 to the network
            shown = [_cut_out(p, m, fill) for p, m in zip(shown, masks, strict=True)]
        return _in_chunks(shown, self._see, int(self._width))

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        if self.tokenizer is None:
            raise BadRecipe(
                f"The judge {self.name} sees but does not read; text alignment needs one that reads: "
                f"tiny, {', '.join(n for n, k in TOWERS.items() if k.reads)}."
            )
        return _in_chunks(list(captions), self._read, int(self._width))

    @property
    def _width(self) -> int:
        config = self.model.config
        return int(config.projection_dim if self.reads else config.hidden_size)

    def _see(self, pictures: list[Image.Image]) -> Tensor:
        pixels = self._processor(pictures, return_tensors="pt")["pixel_values"].to(self.model.device)
        if self.reads:
            return torch.as_tensor(self.model.get_image_features(pixel_values=pixels).pooler_output)
        return torch.as_tensor(self.model(pixel_values=pixels).last_hidden_state[:, 0])

    def _read(self, captions: list[str]) -> Tensor:
        assert self.tokenizer is not None
        ids = self.tokenizer(captions, padding=True, truncation=True, max_length=77, return_tensors="pt")
        return torch.as_tensor(self.model.get_text_features(**ids.to(self.model.device)).pooler_output)


def open_tower(name: str, device: torch.device | str = "cpu", known: Known | None = None) -> Tower:
    """Open a published judge from this machine.

    known  what it should be; the table's entry by default
    Raises NoNetwork when its weights are not here, BadModelFile when they are not this tower's.
    """
    known = known or TOWERS[name]
    own = models_folder() / name
    where = str(own) if (own / "config.json").is_file() else known.repo
    config = _config(name, known, where)
    _check(name, known, where, config)
    kind, options = _loader(known)
    what = f"The weights of the judge {name} in {where}"
    pickled = own.is_dir() and not list(own.glob("*.safetensors"))
    hint = f" {PICKLED} {own}/pytorch_model.bin`." if pickled else ""
    again = f" Fetch them again: {_command(name, known)}"
    try:
        model = published.network(kind, where, what, hint=hint, again=again, **options)
        with published.readable(what, hint):
            tokenizer = _tokenizer(where) if known.reads else None
    except BadModelFile as e:
        if where == known.repo and isinstance(e.__cause__, OSError):
            raise NoNetwork(_missing(name, known)) from e
        raise
    return Tower(name, known, model.to(device), tokenizer)


def _config(name: str, known: Known, where: str) -> dict[str, Any]:
    from transformers import PretrainedConfig

    try:
        found, _ = PretrainedConfig.get_config_dict(where, local_files_only=True)
    except (OSError, ValueError) as e:
        if where == known.repo:
            raise NoNetwork(_missing(name, known)) from e
        raise BadModelFile(f"{where}/config.json cannot be read ({e}).") from e
    if not found:
        raise NoNetwork(_missing(name, known))
    return dict(found)


def _check(name: str, known: Known, where: str, config: dict[str, Any]) -> None:
    seeing = config.get("vision_config", config)
    found = (config.get("model_type"), seeing.get("patch_size"), seeing.get("hidden_size"))
    want = (known.model_type, known.patch, known.width)
    if found != want:
        raise BadModelFile(
            f"{where} holds another model than {name}: type, patch and width are {found}, expected {want}. "
            f"Fetch the right one: {_command(name, known)}"
        )


def _loader(known: Known) -> tuple[Any, dict[str, Any]]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if known.model_type == "vit":
        return transformers.ViTModel, {"add_pooling_layer": False}  # the pooler was never trained
    return {"clip": transformers.CLIPModel, "dinov2": transformers.Dinov2Model}[known.model_type], {}


def _tokenizer(where: str) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(where, local_files_only=True)


def _missing(name: str, known: Known) -> str:
    return (
        f"The judge {name} ({known.repo}, {known.size}, {known.licence}) is not on this machine, and judging "
        f"never downloads. Fetch it once: {_command(name, known)}"
    )


def _command(name: str, known: Known) -> str:
    return f"`minikin models pull {name}` ({known.repo})."


def _as_image(picture: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
            raise BadPhoto(f"Expected an image (h, w, 3) of uint8, got {picture.shape} of {picture.dtype}.")
        picture = Image.fromarray(picture)
    return picture.convert("RGB")


def _cut_out(picture: Image.Image, mask: np.ndarray | None, fill: tuple[int, ...]) -> Image.Image:
    if mask is None:
        return picture
    kept = Image.fromarray(np.asarray(mask) > 0.5).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(picture, Image.new("RGB", picture.size, fill), kept)


def _in_chunks(items: list[Any], make: Callable[[list[Any]], Tensor], width: int) -> Tensor:
    """Unit vectors (n, d), a few at a time; on the CPU, float32."""
    parts = [make(items[i : i + CHUNK]).float().cpu() for i in range(0, len(items), CHUNK)]
    return F.normalize(torch.cat(parts), dim=-1) if parts else torch.zeros(0, width)

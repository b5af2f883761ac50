"""The model families that Minikin works with, and what their folders do not say.

A family is supported if its text has keys and values that stay the same in all steps: `models.attention` packs
them. `REFUSED` are families that are not, by the class of their pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minikin.errors import BadModelFile


@dataclass(frozen=True)
class Family:
    """A model family.

    name      architecture in concept files: tiny, sd1, sd2, sdxl, pixart-alpha, pixart-sigma, sana
    denoiser  the pipeline's component that denoises: unet or transformer
    text      its text encoder: clip, t5 or gemma
    tokens    of a prompt that a text encoder other than CLIP reads at once; 0 where its tokenizer says it
    guidance  default scale of classifier-free guidance
    """

    name: str
    denoiser: str = "unet"
    text: str = "clip"
    tokens: int = 0
    guidance: float = 6.0


TINY = Family("tiny", guidance=3.0)
BY_TEXT_WIDTH = {768: Family("sd1"), 1024: Family("sd2"), 2048: Family("sdxl")}  # any other is tiny's
# window and guidance are the defaults of diffusers' pipelines of this name
_BY_PIPELINE = {
    "PixArtAlphaPipeline": Family("pixart-alpha", "transformer", "t5", 120, 4.5),
    "PixArtSigmaPipeline": Family("pixart-sigma", "transformer", "t5", 300, 4.5),
    "SanaPipeline": Family("sana", "transformer", "gemma", 300, 4.5),
    "SanaSprintPipeline": Family("sana", "transformer", "gemma", 300, 4.5),
}
_JOINT = (
    "its text passes through the transformer together with the image, so the text's keys and values change "
    "with every step and there is nothing to compute once per prompt"
)
REFUSED = {
    "StableDiffusion3": _JOINT, "Flux": _JOINT, "QwenImage": _JOINT, "AuraFlow": _JOINT, "ZImage": _JOINT,
    "Chroma": _JOINT, "HiDream": _JOINT, "CogView4": _JOINT,
    "Kolors": (
        "it reads text by ChatGLM3, whose tokenizer does not tell which characters a token stands for, so the "
        "tokens of a concept's category are not known"
    ),
}  # fmt: skip
NAMES = "Stable Diffusion 1, 2 and XL, PixArt-alpha and PixArt-Sigma, SANA and SANA-Sprint"


def denoiser_of(pipe: Any) -> Any:
    """The U-Net or transformer of a pipeline. Raises BadModelFile for pipelines of other families."""
    if hasattr(pipe, "unet"):
        return pipe.unet
    kind = type(pipe).__name__
    if not is_transformer(kind):
        raise BadModelFile(f"This pipeline is a {kind}. Open a model of the families {NAMES}.")
    return pipe.transformer


def is_transformer(pipeline: str) -> bool:
    """True for pipelines of a family that denoises with a transformer."""
    return pipeline in _BY_PIPELINE


def family(pipeline: str, text_width: int) -> Family:
    """The family of a pipeline class whose cross-attention reads text of this width."""
    return _BY_PIPELINE.get(pipeline) or BY_TEXT_WIDTH.get(text_width, TINY)


def refuse(pipeline: str, where: Any) -> None:
    """Raise BadModelFile for pipelines of a family that cannot be supported, with the reason.

    where  of the message: a folder or a pipeline
    """
    for start, why in REFUSED.items():
        if pipeline.startswith(start):
            raise BadModelFile(f"{where} is a {pipeline}: {why}. Open a model of the families {NAMES}.")

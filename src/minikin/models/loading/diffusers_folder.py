"""What a diffusers folder must hold to be opened: every component with all its weights, of a supported kind."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any

from minikin.errors import BadModelFile
from minikin.models import families
from minikin.models.loading.foreign_code import read_config
from minikin.models.loading.tensors import empty_part, incomplete, missing

_NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2")
_CONFIGS = {"scheduler": "scheduler_config.json", "tokenizer": "", "tokenizer_2": ""}  # of tokenizers, any
_SENTENCEPIECE = ("sentencepiece", "protobuf")
_FILES = ("diffusion_pytorch_model", "model")
HALF_PRECISIONS = ("fp16", "bf16")


def check(path: Path) -> None:
    """Raise BadModelFile if a component is missing or incomplete, or the model is of a kind not supported.

    Reads configurations and the headers of the weights.
    """
    index = read_config(path / "model_index.json")
    parts = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v != [None, None]}
    denoiser = "transformer" if families.is_transformer(str(index.get("_class_name"))) else "unet"
    for part in (denoiser, "vae", "scheduler", "text_encoder", "tokenizer"):
        if part not in parts:
            raise BadModelFile(
                f"{path} has no {part} (model_index.json names none). Minikin needs the full pipeline: "
                f"{denoiser}/, vae/, text_encoder/, tokenizer/ and scheduler/."
            )
    for part, name in _CONFIGS.items():
        folder = path / part
        if part in parts and not ((folder / name).is_file() if name else any(folder.glob("*.json"))):
            raise BadModelFile(f"{path} lacks {part}/{name}, which its model_index.json names. Get it again.")
    _check_tokenizer(path / "tokenizer")
    _refuse_other_kinds(path, parts, denoiser)
    wrong = {part: _missing(path, part, str(parts[part][1])) for part in _NETWORKS if part in parts}
    if any(wrong.values()):
        raise BadModelFile(incomplete(str(path), wrong))


def _check_tokenizer(folder: Path) -> None:
    """Raise BadModelFile for a tokenizer of SentencePiece alone, as PixArt's, that nothing here reads."""
    if (folder / "tokenizer.json").is_file() or not (folder / "spiece.model").is_file():
        return
    if absent := [name for name in _SENTENCEPIECE if not _is_installed(name)]:
        raise BadModelFile(
            f"{folder} holds its words in spiece.model, and this installation lacks the packages that read it. "
            f"Install them: pip install {' '.join(absent)}"
        )


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def variant(path: Path) -> dict[str, str]:
    """Options of `from_pretrained` for a folder that has half-precision weights alone (*.fp16.safetensors)."""
    weights = [_weights(path / part) for part in _NETWORKS if (path / part).is_dir()]
    there = {precision(f.name) for files in weights for f in files}
    return next(({"variant": half} for half in HALF_PRECISIONS if half in there), {})


def precision(name: str) -> str:
    """fp16, bf16 or another variant in the name of a file of weights or of their index; "" for none."""
    match = re.search(r"\.(\w+)(?:-\d+-of-\d+)?\.(?:safetensors|json)$", name.replace(".safetensors.index", ""))
    return match[1] if match else ""


def _weights(folder: Path) -> list[Path]:
    """The safetensors files of a component: one, its shards, or those of half precision."""
    for ending in ("", *(f".{half}" for half in HALF_PRECISIONS)):
        for name in _FILES:
            if (single := folder / f"{name}{ending}.safetensors").is_file():
                return [single]
            shards = folder / f"{name}.safetensors.index{ending}.json"
            if shards.is_file():
                names = read_config(shards).get("weight_map")
                if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
                    raise BadModelFile(f"{shards} does not say which file has which tensor. Get it again.")
                return [folder / Path(n).name for n in sorted(set(names.values()))]
    return []


def _missing(path: Path, part: str, kind: str) -> list[str]:
    """Names of tensors that a component lacks. Raises BadModelFile where its files cannot be read."""
    from minikin.models.loading.single_file import read_header

    files = _weights(path / part)
    if not files:
        pickles = sorted((path / part).glob("*.bin"))
        how = f" Convert it first: minikin models convert {pickles[0]}" if pickles else " Get it again."
        raise BadModelFile(f"{path} has no .safetensors weights in {part}/.{how}")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes |= read_header(file)[0]
    config = read_config(path / part / "config.json")
    try:
        model = empty_part(part, config, kind)
    except Exception as e:  # of the libraries, for any value in a configuration
        raise BadModelFile(f"{path}/{part}/config.json cannot be used: {e}") from e
    return missing(model, shapes)


def _refuse_other_kinds(path: Path, parts: dict[str, Any], denoiser: str) -> None:
    """Raise BadModelFile for models that are sampled otherwise or need other inputs; see `single_file`."""
    from minikin.models.loading.single_file import INPAINTING, OTHER_INPUTS

    channels = read_config(path / denoiser / "config.json").get("in_channels", 4)
    vae, scheduler = read_config(path / "vae" / "config.json"), str(parts["scheduler"][1])
    why = ""
    latent = vae.get("latent_channels", 4)
    if channels not in (latent, INPAINTING):
        other = OTHER_INPUTS.get(channels, "") if isinstance(channels, int) else ""
        why = (
            f"its {'U-Net' if denoiser == 'unet' else denoiser} has {channels} input channels. {other}".strip()
        )
    elif denoiser == "unet" and (scheduler.startswith("EDM") or "FlowMatch" in scheduler):
        why = f"it samples with {scheduler}, in other noise levels than Stable Diffusion."
    elif vae.get("latents_mean"):
        why = "its latents have a scale of their own (latents_mean), as Playground 2.5."
    if why:
        raise BadModelFile(
            f"{path} is of another kind: {why} Minikin paints with ordinary and inpainting models of 4 or 9 "
            "input channels and the noise schedule of Stable Diffusion."
        )

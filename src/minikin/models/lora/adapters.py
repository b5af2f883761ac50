"""LoRA adapters: lookup by name, a cache of loaded files, and a weighted sum applied to a base.

    with adapters.using([(style, 0.8), (lcm, 1.0)]): ...

In this context, each layer that a LoRA changes computes W x + sum_j w_j up_j down_j x. Afterwards the base is
unchanged: same modules, same `state_dict`, bit-identical images. If a second copy of the adapted weights fits
into MERGED_BYTES, the merged weights W + sum_j w_j up_j down_j of the last sum are cached, and a LoRA costs no
time per step. Otherwise the pairs of all LoRAs of a layer are concatenated along the rank, so that ten LoRAs
cost one pair of matrix products. Changes of other kinds (LoHa, LoKr, DoRA, ...) are always merged. Loaded LoRAs
that are not applied cost nothing. (diffusers' set_adapters
visits every loaded LoRA of every layer at each switch; benchmarks/adapters.py measures both.) `attention.pack`
calls the modules to_k and to_v, so packed keys and values include the sum. `Base.active_adapters` names it for
inference backends that cache exports.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from minikin.errors import BadAdapterFile, BadModelFile, BadRecipe, StorageError, UnknownName
from minikin.models.base import Base
from minikin.models.loading.registry import models_folder
from minikin.models.loading.single_file import read_header
from minikin.models.lora import guidance, lora_file
from minikin.models.lora.layers import AdaptedLayer, LayerSum, merge_all
from minikin.models.lora.lora_file import Adapter
from minikin.models.lora.lora_keys import Layer, components, is_adapter

MERGED_BYTES = 2 << 30  # of adapted weights: enough for tiny, and for SD 1 and 2 in half precision
KEEP_BYTES = 4 << 30  # of loaded LoRAs; the least recently used are dropped first
MAX_WEIGHT = 8.0
_FORBIDDEN = re.compile(r"[<>:/\\\x00-\x1f]")  # cannot be typed in a tag, or belong to paths
MAX_DEPTH = 5  # of folders below ./loras and the models folder

WeightedAdapters = Sequence[tuple[Adapter, float]]


def folder() -> Path:
    """Folder of LoRAs that were pulled or added."""
    return models_folder() / "loras"


def available() -> dict[str, Path]:
    """Path of every LoRA by name, in ./, ./loras and the user's models folder; the nearest of equal names.

    A name is the file's without its ending. In the two folders of LoRAs, folders below are read too.
    """
    paths: dict[str, Path] = {}
    for path in _files(".safetensors"):
        paths.setdefault(path.stem, path)
    return paths


def find(name: str) -> Path:
    """Path of a LoRA by name, in ./, ./loras and the user's models folder, and in the latter two's folders.

    A path below these folders is a name too: `styles/ink`.
    Raises UnknownName with the nearest names, BadRecipe for other paths, BadAdapterFile for a pickle.
    """
    name = re.sub(r"\.safetensors$", "", name.replace("\\", "/"), flags=re.IGNORECASE)
    for suffix in (".safetensors", *lora_file.PICKLES):
        path = next((p for p in _files(suffix) if _same(name, p)), None)
        if path and suffix in lora_file.PICKLES:
            raise BadAdapterFile(
                f"{path} is a pickle, which can run code, and is never opened. Turn it into .safetensors "
                f"without running it: minikin models convert {path}"
            )
        if path:
            return path
    if _FORBIDDEN.search(name) or name in ("", ".", ".."):
        raise BadRecipe(
            f"'{name}' is not the name of a LoRA. Write the file's name without folder and ending, as in "
            "<lora:style:0.8>."
        )
    raise UnknownName(
        "LoRA", name, set(available()),
        f"LoRAs are looked for in ./, ./loras and {folder()}; `minikin models add FILE` puts one there.",
    )  # fmt: skip


def _files(suffix: str) -> Iterator[Path]:
    """Files with this ending, in upper case too; in each folder before the folders below it."""
    for root, depth in ((Path(), 0), (Path("loras"), MAX_DEPTH), (folder(), MAX_DEPTH)):
        level = [root]
        for _ in range(depth + 1):
            entries = [sorted(_entries(directory)) for directory in level]
            yield from (p for ps in entries for p in ps if p.suffix.lower() == suffix and p.is_file())
            level = [p for ps in entries for p in ps if not p.name.startswith(".") and p.is_dir()]


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:  # none, or not ours to read
        return []


def _same(name: str, path: Path) -> bool:
    """True if a prompt's name means this file; accents may be stored as letters of their own (macOS)."""
    normalized = unicodedata.normalize("NFC", name)
    stem = unicodedata.normalize("NFC", path.with_suffix("").as_posix())
    return stem == normalized or stem.endswith(f"/{normalized}")


def add(path: Path, name: str | None = None) -> Path:
    """Link a LoRA file into the models folder under a name; copies it where links are not supported.

    Raises BadRecipe if there is another LoRA file (not a link) of that name, StorageError.
    """
    path = path.expanduser().resolve()
    name = name or path.stem
    if _FORBIDDEN.search(name) or name in ("", ".", ".."):
        raise BadRecipe(f"'{name}' cannot be typed in a prompt; give the LoRA another name with --name.")
    target = folder() / f"{name}.safetensors"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and target.samefile(path):
            return target
        if target.is_file() and not target.is_symlink():
            raise BadRecipe(
                f"{target} is another LoRA. Give yours another name with --name, or remove that file first."
            )
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            link = Path(temporary) / target.name
            try:
                os.symlink(path, link)
            except (OSError, NotImplementedError):  # links are not supported
                shutil.copyfile(path, link)
            os.replace(link, target)
    except OSError as e:
        raise StorageError(f"{target} was not written: {e.strerror or e}.") from e
    return target


def is_lora(path: Path) -> bool:
    """True if a file has the tensor names of a LoRA; False for folders and damaged files."""
    try:
        shapes, _ = read_header(path.expanduser())
    except BadModelFile:
        return False
    return any(is_adapter(k) for k in shapes)


class Adapters:
    """The LoRAs loaded for one base, and the context that applies a weighted sum of them."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.loaded: dict[tuple[Path, int, int], Adapter] = {}  # the least recently used first
        self._sum: tuple[tuple[tuple[str, float], ...], list[AdaptedLayer]] = (
            (),
            [],
        )  # key and changes of the last sum
        self._sum_version: object = None  # `Base.weights_version` that the last sum was merged into
        self._guidance_layer: nn.Linear | None = None  # for LoRAs that change a layer that the base lacks

    def get(self, path: Path, name: str | None = None) -> Adapter:
        """The LoRA of a file, cached until the file changes. Raises BadAdapterFile, BaseMismatch."""
        try:
            stat = path.stat()
        except OSError as e:
            raise BadAdapterFile(f"The LoRA {path} cannot be read: {e.strerror or e}.") from e
        key = (path.resolve(), stat.st_mtime_ns, stat.st_size)
        adapter = self.loaded.pop(key, None) or lora_file.load(self.base, path, name or path.stem)
        self.loaded = {k: a for k, a in self.loaded.items() if k[0] != key[0]} | {key: adapter}
        while len(self.loaded) > 1 and sum(a.size for a in self.loaded.values()) > KEEP_BYTES:
            self.loaded.pop(next(iter(self.loaded)))
        return adapter

    @contextmanager
    def using(self, adapters: WeightedAdapters) -> Iterator[None]:
        """Context in which this weighted sum of LoRAs is applied. Weights of the same LoRA add up."""
        assert not self.base.active_adapters, "LoRAs are already applied to this base"
        if not adapters:
            yield
            return
        with guidance.embedded(self.base.denoiser, self._missing_layer(adapters)):
            key, changes = self._sum_of(adapters)
            try:
                for change in changes:
                    change.apply()
                self.base.active_adapters = " ".join(f"{h[:16]} {w:g}" for h, w in key)
                yield
            finally:
                self.base.active_adapters = ""
                for change in changes:
                    change.remove()

    def _missing_layer(self, adapters: WeightedAdapters) -> nn.Linear | None:
        """The guidance embedding's projection, if a LoRA of a full LCM changes it and the base lacks it."""
        widths = {n for adapter, _ in adapters for n in guidance.widths(adapter.layers.items())}
        if not widths or self.base.has_guidance_embedding:
            return None
        if len(widths) > 1:
            raise BadRecipe("Two of these LoRAs are full consistency models of different kinds: use one.")
        if self._guidance_layer is None or self._guidance_layer.in_features not in widths:
            self._guidance_layer = guidance.zero_projection(self.base.denoiser, widths.pop())
            self._sum = ((), [])
        return self._guidance_layer

    def _sum_of(self, adapters: WeightedAdapters) -> tuple[tuple[tuple[str, float], ...], list[AdaptedLayer]]:
        """The weighted sum as a change of each layer; the last one is cached for the next batch."""
        weights: dict[str, float] = {}
        by_hash = {a.sha256: a for a, _ in adapters}
        for adapter, weight in adapters:
            if not -MAX_WEIGHT <= weight <= MAX_WEIGHT:
                raise BadRecipe(
                    f"The weight {weight:g} of LoRA '{adapter.name}' is outside -{MAX_WEIGHT:g} to "
                    f"{MAX_WEIGHT:g}; 0.8 is usual."
                )
            weights[adapter.sha256] = weights.get(adapter.sha256, 0.0) + weight
        key = tuple(sorted((h, w) for h, w in weights.items() if w))
        if self._sum[0] != key or self._sum_version is not self.base.weights_version:
            # release the memory of the old sum before the new one is computed
            self._sum, self._sum_version = ((), []), self.base.weights_version
            self._sum = (key, self._changes([(by_hash[h], w) for h, w in key]))
        return self._sum

    def _changes(self, adapters: WeightedAdapters) -> list[AdaptedLayer]:
        parts = components(self.base)
        sums = [(parts[part].get_submodule(path), s) for (part, path), s in weighted_sum(adapters).items()]
        return merge_all([(getattr(m, "base_layer", m), total) for m, total in sums], MERGED_BYTES)


def weighted_sum(adapters: WeightedAdapters) -> dict[Layer, LayerSum]:
    """The weighted sum of the adapters' changes, by layer."""
    sums: dict[Layer, LayerSum] = {}
    for adapter, weight in adapters:
        for key, change in adapter.layers.items():
            sums.setdefault(key, LayerSum()).add(change, weight)
        for key, difference in adapter.biases.items():
            sums.setdefault(key, LayerSum()).add_bias(difference, weight)
    return sums

"""LoRA adapters: lookup by name, a cache of loaded files, and a weighted sum applied to a base.

    with adapters.using([(style, 0.8), (lcm, 1.0)]): ...

In this context, each layer that a LoRA changes computes W x + sum_j w_j up_j down_j x. Afterwards the base is
unchanged: same modules, same `state_dict`, bit-identical images. If a second copy of the adapted weights fits
into MERGED_BYTES, the merged weights W + sum_j w_j up_j down_j of the last sum are cached, and a LoRA costs no
time per step. Otherwise the pairs of all LoRAs of a layer are concatenated along the rank, so that ten LoRAs
cost one pair of matrix products. Loaded LoRAs that are not applied cost nothing. (diffusers' set_adapters
visits every loaded LoRA of every layer at each switch; benchmarks/adapters.py measures both.) `attention.pack`
calls the modules to_k and to_v, so packed keys and values include the sum. `Base.active_adapters` names it for
inference backends that cache exports.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minikin.errors import BadAdapterFile, BadModelFile, BadRecipe, StorageError, UnknownName
from minikin.models.base import Base
from minikin.models.loading.registry import models_folder
from minikin.models.loading.single_file import read_header
from minikin.models.lora import guidance, lora_file
from minikin.models.lora.lora_file import Adapter, LowRank

MERGED_BYTES = 2 << 30  # of adapted weights: enough for tiny, and for SD 1 and 2 in half precision
KEEP_BYTES = 4 << 30  # of loaded LoRAs; the least recently used are dropped first
MAX_WEIGHT = 8.0
_NAME = re.compile(r"\w[\w .()+\-]*")  # a file name, never a path

WeightedAdapters = Sequence[tuple[Adapter, float]]
_Key = tuple[str, str]


def folder() -> Path:
    """Folder of LoRAs that were pulled or added."""
    return models_folder() / "loras"


def find(name: str) -> Path:
    """Path of a LoRA by name, in ./, ./loras or the user's models folder.

    Raises UnknownName with the nearest names, BadRecipe for a path, BadAdapterFile for a pickle.
    """
    name = name.removesuffix(".safetensors")
    if not _NAME.fullmatch(name):
        raise BadRecipe(
            f"'{name}' is not the name of a LoRA. Write the file's name without folder and ending, as in "
            "<lora:style:0.8>."
        )
    folders = (Path(), Path("loras"), folder())
    for directory in folders:
        if (path := directory / f"{name}.safetensors").is_file():
            return path
    for directory in folders:
        for suffix in lora_file.PICKLES:
            if (path := directory / f"{name}{suffix}").is_file():
                raise BadAdapterFile(
                    f"{path} is a pickle, which can run code, and is never opened. Turn it into .safetensors "
                    f"without running it: minikin models convert {path}"
                )
    raise UnknownName(
        "LoRA",
        name,
        {p.stem for directory in folders for p in directory.glob("*.safetensors")},
        f"LoRAs are looked for in ./, ./loras and {folder()}; `minikin models add FILE` puts one there.",
    )


def add(path: Path, name: str | None = None) -> Path:
    """Link a LoRA file into the models folder under a name; copies it where links are not supported.

    Raises BadRecipe if there is another LoRA file (not a link) of that name, StorageError.
    """
    path = path.expanduser().resolve()
    name = name or path.stem
    if not _NAME.fullmatch(name):
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
    return any("lora" in k.lower() for k in shapes)


class Adapters:
    """The LoRAs loaded for one base, and the context that applies a weighted sum of them."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.loaded: dict[tuple[Path, int, int], Adapter] = {}  # the least recently used first
        self._sum: tuple[tuple[tuple[str, float], ...], list[_Change]] = (
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
        with guidance.embedded(self.base.unet, self._missing_layer(adapters)):
            key, changes = self._sum_of(adapters)
            try:
                for change in changes:
                    change.layer.__class__ = change.adapted
                    change.layer.__dict__.update(change.tensors)
                self.base.active_adapters = " ".join(f"{h[:16]} {w:g}" for h, w in key)
                yield
            finally:
                self.base.active_adapters = ""
                for change in changes:
                    change.layer.__class__ = change.plain
                    for name in change.tensors:
                        change.layer.__dict__.pop(name, None)

    def _missing_layer(self, adapters: WeightedAdapters) -> nn.Linear | None:
        """The guidance embedding's projection, if a LoRA of a full LCM changes it and the base lacks it."""
        widths = {n for adapter, _ in adapters for n in guidance.widths(adapter.layers.items())}
        if not widths or self.base.has_guidance_embedding:
            return None
        if len(widths) > 1:
            raise BadRecipe("Two of these LoRAs are full consistency models of different kinds: use one.")
        if self._guidance_layer is None or self._guidance_layer.in_features not in widths:
            self._guidance_layer = guidance.zero_projection(self.base.unet, widths.pop())
            self._sum = ((), [])
        return self._guidance_layer

    def _sum_of(self, adapters: WeightedAdapters) -> tuple[tuple[tuple[str, float], ...], list[_Change]]:
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
            self._sum = (key, self._changes(weighted_sum([(by_hash[h], w) for h, w in key])))
        return self._sum

    def _changes(self, pairs: dict[_Key, LowRank]) -> list[_Change]:
        parts = lora_file.components(self.base)
        modules = [(parts[component].get_submodule(layer), pair) for (component, layer), pair in pairs.items()]
        layers: list[tuple[Any, LowRank]] = [(getattr(m, "base_layer", m), pair) for m, pair in modules]
        merge = sum(int(layer.weight.nbytes) for layer, _ in layers) <= MERGED_BYTES
        return [_Change.of(layer, pair, merge) for layer, pair in layers]


def weighted_sum(adapters: WeightedAdapters) -> dict[_Key, LowRank]:
    """One pair per layer whose product is the weighted sum of the LoRAs' products.

    down = [down_1; down_2; ...], up = [w_1 up_1, w_2 up_2, ...]; exact, of rank r_1 + r_2 + ...
    """
    pairs_by_layer: dict[_Key, list[LowRank]] = {}
    for adapter, weight in adapters:
        for key, (down, up) in adapter.layers.items():
            pairs_by_layer.setdefault(key, []).append(LowRank(down, up if weight == 1 else up * weight))
    return {
        key: pairs[0]
        if len(pairs) == 1
        else LowRank(torch.cat([p.down for p in pairs], 0), torch.cat([p.up for p in pairs], 1))
        for key, pairs in pairs_by_layer.items()
    }


# Layers change their class in place, so parameters, their names and the `state_dict` stay. A forward hook would
# not do: torch.compile ignores hooks that are registered after compilation. It detects a new class, and treats
# the tensors as inputs, so that the next LoRA needs no new compilation.


class _LinearBeside(nn.Linear):
    lora_down: Tensor
    lora_up: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.lora_down), self.lora_up)


class _LinearMerged(nn.Linear):
    lora_weight: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.lora_weight, self.bias)


class _ConvolutionBeside(nn.Conv2d):
    lora_down: Tensor
    lora_up: Tensor

    def forward(self, input: Tensor) -> Tensor:
        narrow = F.conv2d(input, self.lora_down, None, self.stride, self.padding, self.dilation, self.groups)
        return super().forward(input) + F.conv2d(narrow, self.lora_up)


class _ConvolutionMerged(nn.Conv2d):
    lora_weight: Tensor

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(input, self.lora_weight, self.bias)  # with the layer's padding mode
        return out


@dataclass(frozen=True)
class _Change:
    """A layer, its classes without and with LoRAs, and the tensors of the latter."""

    layer: Any
    plain: Any
    adapted: Any
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, layer: Any, pair: LowRank, merge: bool) -> _Change:
        plain: Any = type(layer)
        linear = issubclass(plain, nn.Linear)
        if not merge:
            beside = _LinearBeside if linear else _ConvolutionBeside
            return cls(layer, plain, _adapted(plain, beside), {"lora_down": pair.down, "lora_up": pair.up})
        down, up = pair.down.flatten(1).float(), pair.up.flatten(1).float()
        with torch.no_grad():
            weight = torch.addmm(layer.weight.flatten(1).float(), up, down).view_as(layer.weight)
        merged = weight.to(layer.weight.dtype).to(memory_format=_format(layer.weight))
        kind = _LinearMerged if linear else _ConvolutionMerged
        return cls(layer, plain, _adapted(plain, kind), {"lora_weight": merged})


def _format(weight: Tensor) -> torch.memory_format:
    last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not weight.is_contiguous() else torch.contiguous_format


@cache
def _adapted(plain: Any, kind: Any) -> Any:
    """The class of a layer of class `plain` with LoRAs; cached, because torch.compile compares classes."""
    return kind if plain in kind.__bases__ else type(f"{plain.__name__}{kind.__name__}", (kind, plain), {})

"""LoRAs in use: finding them by name, keeping them loaded, and putting a weighted sum on a base.

    with adapters.using([(style, 0.8), (lcm, 1.0)]): ...

Inside, every layer a LoRA names gives W x + sum_j w_j up_j down_j x; outside, the base is untouched:
same modules, same `state_dict`, images bit-identical. Where a second copy of the adapted weights
fits into MERGED_BYTES, that copy W + sum_j w_j up_j down_j is kept for the sum last used, and a LoRA
costs nothing at painting time; otherwise the pairs of all LoRAs of a layer are concatenated along
the rank, so that ten LoRAs cost one pair of products. What is loaded but not in use costs nothing.
(diffusers' set_adapters walks every loaded LoRA of every layer on each switch; benchmarks/adapters.py
measures both.) `keysvalues.pack` calls to_k and to_v themselves, so keys and values have the sum too.
`Base.worn` names what is on, for engines that keep exports.
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

MERGED_BYTES = 2 << 30  # of adapted weights: tiny, and Stable Diffusion 1 and 2 in half precision
KEEP_BYTES = 4 << 30  # what stays loaded besides what is in use; the longest unused goes first
MAX_WEIGHT = 8.0
_NAME = re.compile(r"\w[\w .()+\-]*")  # a file's name: never a path

Wanted = Sequence[tuple[Adapter, float]]
_Key = tuple[str, str]


def folder() -> Path:
    """Where LoRAs that were pulled or added lie."""
    return models_folder() / "loras"


def find(name: str) -> Path:
    """The file of a LoRA: in ./, ./loras or the user's models folder.

    Raises UnknownName with the nearest names, BadRecipe for a path, BadAdapterFile for a pickle.
    """
    name = name.removesuffix(".safetensors")
    if not _NAME.fullmatch(name):
        raise BadRecipe(
            f"'{name}' is not the name of a LoRA. Write the file's name without folder and ending, as in "
            "<lora:style:0.8>."
        )
    places = (Path(), Path("loras"), folder())
    for place in places:
        if (path := place / f"{name}.safetensors").is_file():
            return path
    for place in places:
        for pickle in lora_file.PICKLES:
            if (path := place / f"{name}{pickle}").is_file():
                raise BadAdapterFile(
                    f"{path} is a pickle, which can run code, and is never opened. Turn it into .safetensors "
                    f"without running it: minikin models convert {path}"
                )
    raise UnknownName(
        "LoRA", name, {p.stem for place in places for p in place.glob("*.safetensors")},
        f"LoRAs are looked for in ./, ./loras and {folder()}; `minikin models add FILE` puts one there.",
    )  # fmt: skip


def remember(path: Path, name: str | None = None) -> Path:
    """Use a LoRA the user has, under a name: a link to it in the models folder (a copy if need be).

    Raises BadRecipe when another LoRA itself, not a link to one, lies there under that name.
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
        with tempfile.TemporaryDirectory(dir=target.parent) as beside:
            fresh = Path(beside) / target.name
            try:
                os.symlink(path, fresh)
            except (OSError, NotImplementedError):  # no links here
                shutil.copyfile(path, fresh)
            os.replace(fresh, target)
    except OSError as e:
        raise StorageError(f"{target} was not written: {e.strerror or e}.") from e
    return target


def is_lora(path: Path) -> bool:
    """Whether a file is a LoRA, by the names of its tensors; False for folders and damaged files."""
    try:
        shapes, _ = read_header(path.expanduser())
    except BadModelFile:
        return False
    return any("lora" in k.lower() for k in shapes)


class Adapters:
    """The LoRAs loaded for one base, each once, and the switch that puts some of them on."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.loaded: dict[tuple[Path, int, int], Adapter] = {}  # the longest unused first
        self._sum: tuple[tuple[tuple[str, float], ...], list[_Change]] = ((), [])
        self._over: object = None  # the weights that sum was merged over: `Base.dressed`
        self._blank: nn.Linear | None = None  # a guidance input, for LoRAs that give the base one

    def get(self, path: Path, name: str | None = None) -> Adapter:
        """The LoRA in this file, loaded once; read again when the file has changed."""
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
    def using(self, wanted: Wanted) -> Iterator[None]:
        """The base with this weighted sum of LoRAs on it, while inside. Weights of one LoRA add up."""
        assert not self.base.active_adapters, "LoRAs are already on this base"
        if not wanted:
            yield
            return
        with guidance.embedded(self.base.unet, self._input(wanted)):
            key, changes = self._summed(wanted)
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

    def _input(self, wanted: Wanted) -> nn.Linear | None:
        """The guidance input that a full LCM's LoRA wants and the base lacks; kept, as sums refer to it."""
        widths = {n for adapter, _ in wanted for n in guidance.widths(adapter.layers.items())}
        if not widths or self.base.has_guidance_embedding:
            return None
        if len(widths) > 1:
            raise BadRecipe("Two of these LoRAs are full consistency models of different kinds: use one.")
        if self._blank is None or self._blank.in_features not in widths:
            self._blank = guidance.blank(self.base.unet, widths.pop())
            self._sum = ((), [])
        return self._blank

    def _summed(self, wanted: Wanted) -> tuple[tuple[tuple[str, float], ...], list[_Change]]:
        """The weighted sum as a change of each layer; the last one is kept for the next batch."""
        weights: dict[str, float] = {}
        by_hash = {a.sha256: a for a, _ in wanted}
        for adapter, weight in wanted:
            if not -MAX_WEIGHT <= weight <= MAX_WEIGHT:
                raise BadRecipe(
                    f"The weight {weight:g} of LoRA '{adapter.name}' is outside -{MAX_WEIGHT:g} to "
                    f"{MAX_WEIGHT:g}; 0.8 is usual."
                )
            weights[adapter.sha256] = weights.get(adapter.sha256, 0.0) + weight
        key = tuple(sorted((h, w) for h, w in weights.items() if w))
        if self._sum[0] != key or self._over is not self.base.weights_version:
            # release the memory of the old sum before the new one is computed
            self._sum, self._over = ((), []), self.base.weights_version
            self._sum = (key, self._changes(weighted_sum([(by_hash[h], w) for h, w in key])))
        return self._sum

    def _changes(self, pairs: dict[_Key, LowRank]) -> list[_Change]:
        parts = lora_file.components(self.base)
        found = [(parts[component].get_submodule(layer), pair) for (component, layer), pair in pairs.items()]
        layers: list[tuple[Any, LowRank]] = [(getattr(m, "base_layer", m), pair) for m, pair in found]
        merge = sum(int(layer.weight.nbytes) for layer, _ in layers) <= MERGED_BYTES
        return [_Change.of(layer, pair, merge) for layer, pair in layers]


def weighted_sum(wanted: Wanted) -> dict[_Key, LowRank]:
    """One pair per layer whose product is the weighted sum of the LoRAs' products.

    down = [down_1; down_2; ...], up = [w_1 up_1, w_2 up_2, ...]: exact, and of rank r_1 + r_2 + ...
    """
    gathered: dict[_Key, list[LowRank]] = {}
    for adapter, weight in wanted:
        for key, (down, up) in adapter.layers.items():
            gathered.setdefault(key, []).append(LowRank(down, up if weight == 1 else up * weight))
    return {
        key: pairs[0] if len(pairs) == 1 else LowRank(
            torch.cat([p.down for p in pairs], 0), torch.cat([p.up for p in pairs], 1)
        )
        for key, pairs in gathered.items()
    }  # fmt: skip


# Layers change their class, not their place: parameters, their names and the `state_dict` stay. Not a
# forward hook: torch.compile does not notice hooks that come later, but it notices a class, and takes
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
        narrow = F.conv2d(
            input, self.lora_down, None, self.stride, self.padding, self.dilation, self.groups
        )  # fmt: skip
        return super().forward(input) + F.conv2d(narrow, self.lora_up)


class _ConvolutionMerged(nn.Conv2d):
    lora_weight: Tensor

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(input, self.lora_weight, self.bias)  # with the layer's padding mode
        return out


@dataclass(frozen=True)
class _Change:
    """A layer, its classes without and with LoRAs, and the tensors the latter works with."""

    layer: Any
    plain: Any
    adapted: Any
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, layer: Any, pair: LowRank, merge: bool) -> _Change:
        plain: Any = type(layer)
        linear = issubclass(plain, nn.Linear)
        if not merge:
            kind = _LinearBeside if linear else _ConvolutionBeside
            return cls(layer, plain, _adapted(plain, kind), {"lora_down": pair.down, "lora_up": pair.up})
        down, up = pair.down.flatten(1).float(), pair.up.flatten(1).float()
        with torch.no_grad():
            weight = torch.addmm(layer.weight.flatten(1).float(), up, down).view_as(layer.weight)
        kept = weight.to(layer.weight.dtype).to(memory_format=_format(layer.weight))
        return cls(layer, plain, _adapted(plain, _LinearMerged if linear else _ConvolutionMerged),
                   {"lora_weight": kept})  # fmt: skip


def _format(weight: Tensor) -> torch.memory_format:
    last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not weight.is_contiguous() else torch.contiguous_format


@cache
def _adapted(plain: Any, kind: Any) -> Any:
    """The class of a layer of class `plain` with LoRAs on it; one for each, as compilers ask for."""
    return kind if plain in kind.__bases__ else type(f"{plain.__name__}{kind.__name__}", (kind, plain), {})

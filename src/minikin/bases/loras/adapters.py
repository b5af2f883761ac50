"""LoRAs in use: finding them by name, keeping them loaded, and putting a weighted sum on a base.

    with adapters.using([(style, 0.8), (lcm, 1.0)]): ...

Inside, every layer a LoRA names gives W x + sum_j w_j up_j down_j x; outside, the base is untouched:
same modules, same `state_dict`, pictures bit-identical. The pairs of all LoRAs of a layer are
concatenated along the rank, so that ten LoRAs cost one pair of products, and what is loaded but
not in use costs nothing. (diffusers' set_adapters walks every loaded LoRA of every layer on each
switch; benchmarks/adapters.py measures both.) `keysvalues.pack` calls to_k and to_v themselves, so
keys and values have the sum too. `Base.worn` names what is on, for engines that keep exports.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minikin.bases.base import Base
from minikin.bases.loras import lorafile
from minikin.bases.loras.lorafile import Adapter, LowRank
from minikin.bases.opening.registry import models_folder
from minikin.bases.opening.singlefile import read_header
from minikin.errors import BadAdapterFile, BadModelFile, BadRecipe, StorageError, UnknownName

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
        for pickle in lorafile.PICKLES:
            if (path := place / f"{name}{pickle}").is_file():
                raise BadAdapterFile(
                    f"{path} is a pickle, which can run code, and is never opened. Convert it to .safetensors "
                    "in the tool it came from."
                )
    raise UnknownName(
        "LoRA", name, {p.stem for place in places for p in place.glob("*.safetensors")},
        f"LoRAs are looked for in ./, ./loras and {folder()}; `minikin models add FILE` puts one there.",
    )  # fmt: skip


def remember(path: Path, name: str | None = None) -> Path:
    """Use a LoRA the user has, under a name: a link to it in the models folder (a copy if need be)."""
    path = path.expanduser().resolve()
    name = name or path.stem
    if not _NAME.fullmatch(name):
        raise BadRecipe(f"'{name}' cannot be typed in a prompt; give the LoRA another name with --name.")
    target = folder() / f"{name}.safetensors"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.symlink(path, target)
        except (OSError, NotImplementedError):  # no links here
            shutil.copyfile(path, target)
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
        self._sums: tuple[tuple[tuple[str, float], ...], dict[_Key, LowRank]] = ((), {})

    def get(self, path: Path, name: str | None = None) -> Adapter:
        """The LoRA in this file, loaded once; read again when the file has changed."""
        try:
            stat = path.stat()
        except OSError as e:
            raise BadAdapterFile(f"The LoRA {path} cannot be read: {e.strerror or e}.") from e
        key = (path.resolve(), stat.st_mtime_ns, stat.st_size)
        adapter = self.loaded.pop(key, None) or lorafile.load(self.base, path, name or path.stem)
        self.loaded = {k: a for k, a in self.loaded.items() if k[0] != key[0]} | {key: adapter}
        while len(self.loaded) > 1 and sum(a.size for a in self.loaded.values()) > KEEP_BYTES:
            self.loaded.pop(next(iter(self.loaded)))
        return adapter

    @contextmanager
    def using(self, wanted: Wanted) -> Iterator[None]:
        """The base with this weighted sum of LoRAs on it, while inside. Weights of one LoRA add up."""
        assert not self.base.worn, "LoRAs are already on this base"
        if not wanted:
            yield
            return
        parts = lorafile.components(self.base)
        pairs = self._summed(wanted)
        with ExitStack() as stack:
            for (component, layer), pair in pairs.items():
                module = parts[component].get_submodule(layer)
                stack.enter_context(_worn(getattr(module, "base_layer", module), pair))
            self.base.worn = " ".join(f"{h[:16]} {w:g}" for h, w in self._sums[0])
            try:
                yield
            finally:
                self.base.worn = ""

    def _summed(self, wanted: Wanted) -> dict[_Key, LowRank]:
        """The weighted sum as one pair per layer; the last one is kept for the next batch."""
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
        if self._sums[0] != key:
            self._sums = (key, {})  # the old sum goes before the new one is made
            self._sums = (key, weighted_sum([(by_hash[h], w) for h, w in key]))
        return self._sums[1]


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


class _Linear(nn.Linear):
    lora_down: Tensor
    lora_up: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.lora_down), self.lora_up)


class _Convolution(nn.Conv2d):
    lora_down: Tensor
    lora_up: Tensor

    def forward(self, input: Tensor) -> Tensor:
        narrow = F.conv2d(
            input, self.lora_down, None, self.stride, self.padding, self.dilation, self.groups
        )  # fmt: skip
        return super().forward(input) + F.conv2d(narrow, self.lora_up)


_CLASSES: dict[type, type] = {nn.Linear: _Linear, nn.Conv2d: _Convolution}


def _adapted(plain: type) -> type:
    """The class of a layer of class `plain` with LoRAs on it; one for each, as compilers ask for."""
    if plain not in _CLASSES:
        kind = _Linear if issubclass(plain, nn.Linear) else _Convolution
        _CLASSES[plain] = type(f"Adapted{plain.__name__}", (kind, plain), {})
    return _CLASSES[plain]


@contextmanager
def _worn(layer: Any, pair: LowRank) -> Iterator[None]:
    """This layer with up @ down added to its weight, while inside.

    It changes its class, not its place: parameters, their names and the `state_dict` stay. Not a
    forward hook: torch.compile does not notice hooks that come later, but it notices a class, and
    takes the pair as an input, so that the next LoRA of the same rank needs no new compilation.
    """
    plain = type(layer)
    layer.__class__ = _adapted(plain)
    layer.lora_down, layer.lora_up = pair
    try:
        yield
    finally:
        layer.__class__ = plain
        del layer.lora_down, layer.lora_up

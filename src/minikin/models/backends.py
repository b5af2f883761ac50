"""Engines: who computes the U-Net and the decoder while painting.

    eager      PyTorch as it is; images without a concept equal the stock pipelines' to the bit
    compile    torch.compile; in float32 within 1e-4 of the outputs' deviation
    openvino   OpenVINO on the CPU (extra `minikin[openvino]`); in float32 differences of rounding, in
               bfloat16 (the default where the processor has it) of a few grey levels

Concepts never force a new export: keys and values are an input of the U-Net. `engine.on(base)` puts
the engine behind the `forward` of the U-Net and the decoder for the time being; pipelines, weights and
`state_dict` stay as they are. An engine that fails is left with a warning, and PyTorch goes on.

What is compiled goes with its base. OpenVINO's exports hold the weights with the LoRAs that are on, so
that every strength of a LoRA is an export of its own; on disk and in memory they stay within limits.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from minikin.errors import BadRecipe, UnknownName, extra
from minikin.files import atomic_folder, cache_folder, folder_bytes
from minikin.models.base import Base

Tell = Callable[[str], None]
_MADE: dict[tuple[str, str | None], Engine] = {}  # one of each in a process: they keep what they exported
KEEP_BYTES = 16 << 30  # of exported models in the cache; the longest unused go first
READY_BYTES = 8 << 30  # of those in memory, besides the last two (a U-Net and its decoder)
log = logging.getLogger(__name__)


class Engine(Protocol):
    """Computes U-Net and decoder inside `on`."""

    name: str

    def on(self, base: Base, tell: Tell = log.warning) -> Any:
        """A context manager; `tell` hears why the engine could not be used."""


def engine(name: str, precision: str | None = None) -> Engine:
    """An engine by name; precision "float32" or "bfloat16" is OpenVINO's, its best by default.

    Raises UnknownName, or BadRecipe when what it needs is not installed.
    """
    if name not in ENGINES:
        raise UnknownName("engine", name, ENGINES)
    key = (name, precision)
    if key not in _MADE:
        _MADE[key] = OpenVino(precision) if name == "openvino" else ENGINES[name]()
    return _MADE[key]


class Eager:
    name = "eager"

    @contextmanager
    def on(self, base: Base, tell: Tell = log.warning) -> Iterator[None]:
        yield


class Compiled:
    """torch.compile, once for each module; needs a C++ compiler on a CPU, Triton on a GPU."""

    name = "compile"

    def __init__(self) -> None:
        self._broken = False

    @contextmanager
    def on(self, base: Base, tell: Tell = log.warning) -> Iterator[None]:
        if self._broken:
            yield
            return
        unet, decoder = (self._guarded(base, m, tell) for m in (base.unet, base.vae.decoder))
        with behind(base.unet, unet), behind(base.vae.decoder, decoder):
            yield

    def _guarded(self, base: Base, module: Any, tell: Tell) -> Callable[..., Any]:
        # kept on the base, so that it ends with it; LoRAs change the layers' classes, which it notices itself
        made: dict[int, Callable[..., Any]] = base.__dict__.setdefault("_compiled", {})
        plain = module.forward
        if id(module) not in made:
            made[id(module)] = torch.compile(plain, dynamic=False)
        fast = made[id(module)]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._broken:
                return plain(*args, **kwargs)
            try:
                return fast(*args, **kwargs)
            except Exception as e:
                if isinstance(e, torch.OutOfMemoryError):
                    raise
                self._broken = True
                tell(f"torch.compile failed ({_short(e)}); painting goes on without it.")
                return plain(*args, **kwargs)

        return forward


class OpenVino:
    """One exported model for each module and shape, kept in the cache folder."""

    name = "openvino"

    def __init__(self, precision: str | None = None) -> None:
        try:
            import openvino
        except ImportError as e:
            raise BadRecipe(
                f"Engine openvino is not installed. Install it with {extra('openvino')}, or leave --engine out."
            ) from e
        if precision not in (None, "float32", "bfloat16"):
            raise BadRecipe(f"Engine openvino computes in float32 or bfloat16, not in {precision}.")
        self._ov = openvino
        self._core = openvino.Core()
        can = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.precision = precision or ("bfloat16" if "BF16" in can else "float32")
        self._ready: dict[str, tuple[Any, int]] = {}  # model and bytes, the longest unused first
        self._broken = False

    @contextmanager
    def on(self, base: Base, tell: Tell = log.warning) -> Iterator[None]:
        if self._broken:
            yield
            return
        with behind(base.unet, self._unet(base, tell)), behind(
            base.vae.decoder, self._decoder(base, tell)
        ):  # fmt: skip
            yield

    def _unet(self, base: Base, tell: Tell) -> Callable[..., Any]:
        plain = base.unet.forward

        def forward(
            sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None,
            cross_attention_kwargs: Any = None, added_cond_kwargs: Mapping[str, Tensor] | None = None,
            return_dict: bool = True, **other: Any,
        ) -> Any:  # fmt: skip
            t = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)[:1]
            inputs = {"sample": sample, "timestep": t, "encoder_hidden_states": encoder_hidden_states}
            if timestep_cond is not None:
                inputs["timestep_cond"] = timestep_cond
            inputs |= dict(added_cond_kwargs or {})
            usual = not cross_attention_kwargs and all(v is None for v in other.values())
            out = self._run(base, base.unet, _Unet, inputs, tell) if usual else None
            if out is None:
                return plain(
                    sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond,
                    cross_attention_kwargs=cross_attention_kwargs, added_cond_kwargs=added_cond_kwargs,
                    return_dict=return_dict, **other,
                )  # fmt: skip
            if not return_dict:
                return (out,)
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

            return UNet2DConditionOutput(sample=out)

        return forward

    def _decoder(self, base: Base, tell: Tell) -> Callable[..., Any]:
        plain = base.vae.decoder.forward

        def forward(sample: Tensor, latent_embeds: Tensor | None = None) -> Any:
            usual = latent_embeds is None
            out = self._run(base, base.vae.decoder, _Plain, {"sample": sample}, tell) if usual else None
            return plain(sample, latent_embeds) if out is None else out

        return forward

    def _run(
        self, base: Base, module: nn.Module, wrapper: type[nn.Module], inputs: Mapping[str, Tensor], tell: Tell
    ) -> Tensor | None:  # fmt: skip
        """The module's output, or None when OpenVINO failed."""
        if self._broken or torch.is_grad_enabled():
            return None
        given = {k: v.float() for k, v in inputs.items()}
        key = _key(base, module, given)
        try:
            ready = self._ready.pop(key, None) or self._compiled(key, wrapper(module, tuple(given)), given)
            self._ready[key] = ready
            while len(self._ready) > 2 and sum(size for _, size in self._ready.values()) > READY_BYTES:
                self._ready.pop(next(iter(self._ready)))
            made = ready[0]([v.contiguous().numpy() for v in given.values()])[0]
            return torch.from_numpy(np.array(made)).to(inputs["sample"].dtype)
        except Exception as e:
            self._broken = True
            tell(f"OpenVINO failed ({_short(e)}); painting goes on with PyTorch.")
            return None

    def _compiled(self, key: str, module: nn.Module, given: Mapping[str, Tensor]) -> tuple[Any, int]:
        """The model, from the cache if it was exported before, and its bytes."""
        folder = cache_folder() / "openvino" / key
        if (folder / "model.xml").is_file():
            with suppress(OSError):
                os.utime(folder)  # the cache forgets the longest unused
        else:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # of tracing, about shapes that are constant here
                example = tuple(given.values())
                shapes = [list(v.shape) for v in example]
                model = self._ov.convert_model(module, example_input=example, input=shapes)
            with atomic_folder(folder, keep=KEEP_BYTES) as fresh:
                self._ov.save_model(model, str(fresh / "model.xml"), compress_to_fp16=False)
        made = self._core.compile_model(str(folder / "model.xml"), "CPU", {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[self.precision],
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        })  # fmt: skip
        return made, folder_bytes(folder)


class _Unet(nn.Module):
    """The U-Net with positional tensors for inputs, as tracing wants it."""

    def __init__(self, unet: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.unet, self.names = unet, names

    def forward(self, *inputs: Tensor) -> Tensor:
        named = dict(zip(self.names, inputs, strict=True))
        more = {k: named.pop(k) for k in ("text_embeds", "time_ids") if k in named}
        # the class's own forward: the instance's is the engine
        made = type(self.unet).forward(self.unet, **named, added_cond_kwargs=more or None, return_dict=False)
        out: Tensor = made[0]
        return out


class _Plain(nn.Module):
    def __init__(self, module: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module

    def forward(self, sample: Tensor) -> Tensor:
        out: Tensor = type(self.module).forward(self.module, sample)
        return out


@contextmanager
def behind(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """While inside, calling the module calls `forward`."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _key(base: Base, module: nn.Module, given: Mapping[str, Tensor]) -> str:
    """Names an export: the module's weights, what is added to them, and the shapes."""
    shapes = "-".join("x".join(map(str, v.shape)) for v in given.values())
    digest = hashlib.sha256(f"{weights_hash(base, module)} {base.active_adapters} {shapes}".encode())
    return f"{type(module).__name__.lower()}-{digest.hexdigest()[:24]}"


def weights_hash(base: Base, module: nn.Module) -> str:
    """SHA-256 of all weights of a module, computed once for each opened base."""
    known: dict[int, str] = base.__dict__.setdefault("_weights", {})
    if id(module) not in known:
        digest = hashlib.sha256()
        for name, weight in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        known[id(module)] = digest.hexdigest()
    return known[id(module)]


def _short(e: BaseException) -> str:
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0][:160]}" if lines else type(e).__name__


ENGINES: dict[str, Callable[[], Engine]] = {"eager": Eager, "compile": Compiled, "openvino": OpenVino}

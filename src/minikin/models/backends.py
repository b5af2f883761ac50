"""Inference backends for the U-Net and the VAE decoder.

    eager      PyTorch; images without a concept are bit-identical to those of the stock pipelines
    compile    torch.compile; in float32 within 1e-4 of the outputs' standard deviation
    openvino   OpenVINO on the CPU (extra `minikin[openvino]`); differs by rounding in float32, and by a few
               grey levels in bfloat16 (the default if the processor supports it)

Concepts need no new export, because keys and values are inputs of the U-Net. `backend.applied(base)` replaces
`forward` of the U-Net and the decoder within a context; pipelines, weights and `state_dict` do not change. If
a backend fails, it warns, and PyTorch computes instead.

Compiled functions are cached on their base. OpenVINO's exports contain the weights with the active LoRAs, so
every LoRA strength is a separate export; limits bound their size on disk and in memory.
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

Warn = Callable[[str], None]
_BACKENDS: dict[tuple[str, str | None], Backend] = {}  # one of each per process, because they cache exports
DISK_BYTES = 16 << 30  # of exported models in the cache; the least recently used are deleted first
MEMORY_BYTES = 8 << 30  # of exported models in memory, besides the last two (a U-Net and its decoder)
log = logging.getLogger(__name__)


class Backend(Protocol):
    """Computes the U-Net and the decoder of a base."""

    name: str

    def applied(self, base: Base, warn: Warn = log.warning) -> Any:
        """Context in which the backend computes; `warn` is called with the reason if it fails."""


def get_backend(name: str, precision: str | None = None) -> Backend:
    """The backend of this name.

    precision  "float32" or "bfloat16", for OpenVINO only; the fastest by default
    Raises UnknownName, or BadRecipe if a package is not installed.
    """
    if name not in BACKENDS:
        raise UnknownName("backend", name, BACKENDS)
    key = (name, precision)
    if key not in _BACKENDS:
        _BACKENDS[key] = OpenVino(precision) if name == "openvino" else BACKENDS[name]()
    return _BACKENDS[key]


class Eager:
    """PyTorch without changes."""

    name = "eager"

    @contextmanager
    def applied(self, base: Base, warn: Warn = log.warning) -> Iterator[None]:
        yield


class Compiled:
    """torch.compile, once per module; needs a C++ compiler on a CPU, Triton on a GPU."""

    name = "compile"

    def __init__(self) -> None:
        self._broken = False

    @contextmanager
    def applied(self, base: Base, warn: Warn = log.warning) -> Iterator[None]:
        if self._broken:
            yield
            return
        unet, decoder = (self._with_fallback(base, m, warn) for m in (base.denoiser, base.vae.decoder))
        with forward_replaced(base.denoiser, unet), forward_replaced(base.vae.decoder, decoder):
            yield

    def _with_fallback(self, base: Base, module: Any, warn: Warn) -> Callable[..., Any]:
        # cached on the base, to be freed with it; LoRAs change classes of layers, which torch.compile detects
        cache: dict[int, Callable[..., Any]] = base.__dict__.setdefault("_compiled", {})
        plain = module.forward
        if id(module) not in cache:
            cache[id(module)] = torch.compile(plain, dynamic=False)
        compiled = cache[id(module)]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._broken:
                return plain(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except Exception as e:
                if isinstance(e, torch.OutOfMemoryError):
                    raise
                self._broken = True
                warn(f"torch.compile failed ({_short(e)}); painting goes on without it.")
                return plain(*args, **kwargs)

        return forward


class OpenVino:
    """OpenVINO on the CPU, with one exported model per module, LoRA weights and input shapes."""

    name = "openvino"

    def __init__(self, precision: str | None = None) -> None:
        try:
            import openvino
        except ImportError as e:
            raise BadRecipe(
                "Backend openvino is not installed. "
                f"Install it with {extra('openvino')}, or leave --backend out."
            ) from e
        if precision not in (None, "float32", "bfloat16"):
            raise BadRecipe(f"Backend openvino computes in float32 or bfloat16, not in {precision}.")
        self._ov = openvino
        self._core = openvino.Core()
        capabilities = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.precision = precision or ("bfloat16" if "BF16" in capabilities else "float32")
        self._loaded: dict[str, tuple[Any, int]] = {}  # model and bytes, the least recently used first
        self._broken = False

    @contextmanager
    def applied(self, base: Base, warn: Warn = log.warning) -> Iterator[None]:
        if self._broken:
            yield
            return
        unet, decoder = self._unet(base, warn), self._decoder(base, warn)
        with forward_replaced(base.denoiser, unet), forward_replaced(base.vae.decoder, decoder):
            yield

    def _unet(self, base: Base, warn: Warn) -> Callable[..., Any]:
        plain = base.denoiser.forward

        def forward(
            sample: Tensor,
            timestep: Any,
            encoder_hidden_states: Tensor,
            timestep_cond: Tensor | None = None,
            cross_attention_kwargs: Any = None,
            added_cond_kwargs: Mapping[str, Tensor] | None = None,
            return_dict: bool = True,
            **other: Any,
        ) -> Any:
            t = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)[:1]
            inputs = {"sample": sample, "timestep": t, "encoder_hidden_states": encoder_hidden_states}
            if timestep_cond is not None:
                inputs["timestep_cond"] = timestep_cond
            inputs |= dict(added_cond_kwargs or {})
            exportable = not cross_attention_kwargs and all(v is None for v in other.values())
            out = self._run(base, base.denoiser, _Unet, inputs, warn) if exportable else None
            if out is None:
                return plain(
                    sample,
                    timestep,
                    encoder_hidden_states,
                    timestep_cond=timestep_cond,
                    cross_attention_kwargs=cross_attention_kwargs,
                    added_cond_kwargs=added_cond_kwargs,
                    return_dict=return_dict,
                    **other,
                )
            if not return_dict:
                return (out,)
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

            return UNet2DConditionOutput(sample=out)

        return forward

    def _decoder(self, base: Base, warn: Warn) -> Callable[..., Any]:
        plain = base.vae.decoder.forward

        def forward(sample: Tensor, latent_embeds: Tensor | None = None) -> Any:
            if latent_embeds is not None:
                return plain(sample, latent_embeds)
            out = self._run(base, base.vae.decoder, _Decoder, {"sample": sample}, warn)
            return plain(sample, latent_embeds) if out is None else out

        return forward

    def _run(
        self, base: Base, module: nn.Module, wrapper: type[nn.Module], inputs: Mapping[str, Tensor], warn: Warn
    ) -> Tensor | None:
        """The module's output, or None if OpenVINO failed."""
        if self._broken or torch.is_grad_enabled():
            return None
        inputs32 = {k: v.float() for k, v in inputs.items()}
        key = _key(base, module, inputs32)
        try:
            model = self._loaded.pop(key, None) or self._load(key, wrapper(module, tuple(inputs32)), inputs32)
            self._loaded[key] = model
            while len(self._loaded) > 2 and sum(size for _, size in self._loaded.values()) > MEMORY_BYTES:
                self._loaded.pop(next(iter(self._loaded)))
            output = model[0]([v.contiguous().numpy() for v in inputs32.values()])[0]
            return torch.from_numpy(np.array(output)).to(inputs["sample"].dtype)
        except Exception as e:
            self._broken = True
            warn(f"OpenVINO failed ({_short(e)}); painting goes on with PyTorch.")
            return None

    def _load(self, key: str, module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, int]:
        """The compiled model and its bytes; exports it unless it is in the cache folder."""
        folder = cache_folder() / "openvino" / key
        if (folder / "model.xml").is_file():
            with suppress(OSError):
                os.utime(folder)  # marks it as recently used
        else:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # tracing warns of shapes that are constant here
                example = tuple(inputs.values())
                shapes = [list(v.shape) for v in example]
                model = self._ov.convert_model(module, example_input=example, input=shapes)
            with atomic_folder(folder, keep=DISK_BYTES) as temporary:
                self._ov.save_model(model, str(temporary / "model.xml"), compress_to_fp16=False)
        options = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[self.precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        return self._core.compile_model(str(folder / "model.xml"), "CPU", options), folder_bytes(folder)


class _Unet(nn.Module):
    """The U-Net with positional tensors as inputs, for tracing."""

    def __init__(self, unet: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.unet, self.names = unet, names

    def forward(self, *inputs: Tensor) -> Tensor:
        kwargs = dict(zip(self.names, inputs, strict=True))
        added = {k: kwargs.pop(k) for k in ("text_embeds", "time_ids") if k in kwargs}
        # the forward of the class, because that of the instance is the backend
        forward = type(self.unet).forward
        out: Tensor = forward(self.unet, **kwargs, added_cond_kwargs=added or None, return_dict=False)[0]
        return out


class _Decoder(nn.Module):
    """The VAE decoder without keyword arguments, for tracing."""

    def __init__(self, module: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module

    def forward(self, sample: Tensor) -> Tensor:
        out: Tensor = type(self.module).forward(self.module, sample)
        return out


@contextmanager
def forward_replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Context in which a call of the module calls `forward`."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _key(base: Base, module: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """Name of an export: a hash of the module's weights, the active LoRAs and the input shapes."""
    shapes = "-".join("x".join(map(str, v.shape)) for v in inputs.values())
    digest = hashlib.sha256(f"{module_hash(base, module)} {base.active_adapters} {shapes}".encode())
    return f"{type(module).__name__.lower()}-{digest.hexdigest()[:24]}"


def module_hash(base: Base, module: nn.Module) -> str:
    """SHA-256 of all weights of a module, cached on the base."""
    cache: dict[int, str] = base.__dict__.setdefault("_weights", {})
    if id(module) not in cache:
        digest = hashlib.sha256()
        for name, weight in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        cache[id(module)] = digest.hexdigest()
    return cache[id(module)]


def _short(e: BaseException) -> str:
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0][:160]}" if lines else type(e).__name__


BACKENDS: dict[str, Callable[[], Backend]] = {"eager": Eager, "compile": Compiled, "openvino": OpenVino}

"""Inference backends agree with PyTorch within a stated tolerance, export once, and fall back to PyTorch."""

from __future__ import annotations

import gc
import os
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minikin.errors import BadRecipe, UnknownName
from minikin.files import atomic_folder, cache_folder
from minikin.models import backends
from minikin.models.base import Base
from minikin.models.prompt import parse
from minikin.perfusion.conditioning import condition
from tests.conftest import FAMILIES, build_pipeline


def call(base: Base, n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """One call of the U-Net and one of the decoder on fixed noise."""
    g = torch.Generator().manual_seed(0)
    side = base.denoiser.config.sample_size
    x = torch.randn((n, base.denoiser.config.in_channels, side, side), generator=g)
    (conditioning,) = condition(base, [parse("a cat on the beach", {})], {}, copies=n)
    more: dict[str, Any] = base.added_conditions(n, conditioning.pooled)
    if base.has_guidance_embedding:
        more["timestep_cond"] = torch.randn((n, base.denoiser.config.time_cond_proj_dim), generator=g)
    with torch.no_grad():
        out = base.denoiser(x, torch.tensor(801), conditioning.kv, **more).sample
        z = torch.randn((n, base.vae.config.latent_channels, side, side), generator=g)
        return out, base.vae.decode(z).sample


@pytest.fixture(scope="module")
def bases(flat_bases: dict[str, Base]) -> dict[str, Base]:
    """Two levels: what is tried here does not depend on how many there are."""
    return flat_bases


@pytest.fixture(scope="module")
def openvino() -> backends.OpenVino:
    pytest.importorskip("openvino", reason="the extra minikin[openvino] is not installed")
    return backends.OpenVino("float32")


@pytest.mark.parametrize(
    "family", ["sdxl", *(pytest.param(name, marks=pytest.mark.soak) for name in ("sd15", "lcm-sd15"))]
)
def test_openvino_agrees_in_float32(family: str, bases: dict[str, Base], openvino: backends.OpenVino) -> None:
    """Within 1e-4 of the output's standard deviation; afterwards the U-Net computes as before.

    SDXL's U-Net has every input but a guidance scale, which is exported in models/test_guidance_input.py."""
    assert family in FAMILIES
    base = bases[family]
    eager = call(base)
    warnings: list[str] = []
    with openvino.applied(base, warnings.append):
        theirs = call(base)
    assert not warnings
    for a, b in zip(eager, theirs, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * float(a.std())
    assert all(torch.equal(a, b) for a, b in zip(eager, call(base), strict=True))


def test_openvino_exports_each_model_once(
    bases: dict[str, Base], openvino: backends.OpenVino, monkeypatch: Any
) -> None:
    """A second process reads the exported models from the cache; other weights have other keys."""
    base = bases["sdxl"]
    with openvino.applied(base):
        call(base)
    before = sorted(p.name for p in (cache_folder() / "openvino").iterdir())
    again = backends.OpenVino("float32")
    monkeypatch.setattr(again._ov, "convert_model", lambda *_a, **_k: pytest.fail("exported twice"))
    with again.applied(base):
        call(base)
    assert sorted(p.name for p in (cache_folder() / "openvino").iterdir()) == before
    x = {"sample": torch.zeros(1, 4, 8, 8)}
    keys = {backends._key(b, b.denoiser, x) for b in (base, bases["sd15"])}
    monkeypatch.setattr(base, "active_adapters", "style 0.8")
    assert len(keys | {backends._key(base, base.denoiser, x)}) == 3


@pytest.mark.parametrize(
    "backend",
    [pytest.param("aot_eager", marks=pytest.mark.slow), pytest.param("inductor", marks=pytest.mark.soak)],
)
def test_compile_agrees(backend: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Within 1e-4 of the output's standard deviation. Inductor's C++ takes minutes to build."""
    base = Base(build_pipeline("sd15", tmp_path, flat=True), "sd15")
    eager = call(base)
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, backend=backend, **how))
    warnings: list[str] = []
    with backends.Compiled().applied(base, warnings.append):
        theirs = call(base)
    assert not warnings
    assert base.__dict__["_compiled"], "nothing was compiled"
    for a, b in zip(eager, theirs, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * float(a.std())
    assert all(torch.equal(a, b) for a, b in zip(eager, call(base), strict=True))


@pytest.mark.parametrize("name", ["openvino", "compile"])
def test_a_failing_backend_warns_once_and_falls_back(
    name: str, bases: dict[str, Base], monkeypatch: Any
) -> None:
    base = Base(bases["sd15"].pipe)  # a new one, because compiled functions are cached on the base
    eager = call(base)

    def broken(*_a: Any, **_k: Any) -> Any:
        raise RuntimeError("no such operation\nand a long trace")

    if name == "openvino":
        pytest.importorskip("openvino")
        backend: Any = backends.OpenVino("float32")
        monkeypatch.setattr(backend, "_load", broken)
    else:
        monkeypatch.setattr(torch, "compile", lambda *_a, **_k: broken)
        backend = backends.Compiled()
    warnings: list[str] = []
    for _ in range(2):
        with backend.applied(base, warnings.append):
            theirs = call(base)
        assert all(torch.equal(a, b) for a, b in zip(eager, theirs, strict=True))
    assert len(warnings) == 1 and "no such operation" in warnings[0] and "long trace" not in warnings[0]


def test_a_failed_export_leaves_no_files(bases: dict[str, Base], tmp_path: Path, monkeypatch: Any) -> None:
    """A full disk while exporting: a warning, the image, and nothing left in the cache."""
    pytest.importorskip("openvino")
    monkeypatch.setenv("MINIKIN_CACHE", str(tmp_path))
    backend = backends.OpenVino("float32")

    def full(*_a: Any, **_k: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backend._ov, "convert_model", lambda *_a, **_k: None)
    monkeypatch.setattr(backend._ov, "save_model", full)
    warnings: list[str] = []
    with backend.applied(bases["sd15"], warnings.append):
        call(bases["sd15"])
    assert "StorageError" in warnings[0] and not list((tmp_path / "openvino").iterdir())


def test_compiled_functions_are_freed_with_their_base(tmp_path: Path, monkeypatch: Any) -> None:
    """The process-wide backend keeps no base alive, and compiles a module once for all LoRAs."""
    calls: list[Any] = []

    def compiled(forward: Any, **_: Any) -> Any:
        calls.append(None)
        return lambda *args, **kwargs: forward(*args, **kwargs)  # holds a reference, as torch.compile does

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(backends, "_BACKENDS", {})
    base = Base(build_pipeline("sd15", tmp_path, flat=True))
    for base.active_adapters in ("", "style 0.8", "style 0.7"):
        with backends.get_backend("compile").applied(base):
            call(base)
    unet = weakref.ref(base.denoiser)
    del base
    gc.collect()
    assert unet() is None and len(calls) == 2  # the U-Net and the decoder


def test_openvino_keeps_the_last_models_in_memory(
    bases: dict[str, Base], openvino: backends.OpenVino, monkeypatch: Any
) -> None:  # fmt: skip
    """Every LoRA strength is an export; above the limit the least recently used goes, but not the last two."""
    base, used = bases["sd15"], []

    def compiled(key: str, *_: Any) -> tuple[Any, int]:
        used.append(key)
        return lambda inputs: [inputs[0]], 10

    monkeypatch.setattr(openvino, "_load", compiled)
    monkeypatch.setattr(openvino, "_loaded", {})

    def run(adapters: str) -> int:
        monkeypatch.setattr(base, "active_adapters", adapters)
        before = len(used)
        with torch.no_grad():
            openvino._run(base, base.denoiser, backends._Unet, {"sample": torch.zeros(1, 4, 8, 8)}, pytest.fail)
        return len(used) - before

    monkeypatch.setattr(backends, "MEMORY_BYTES", 30)
    assert [run(w) for w in ("a", "b", "c", "a", "d")] == [1, 1, 1, 0, 1]
    assert [run(w) for w in ("a", "c", "d", "b")] == [0, 0, 0, 1]
    monkeypatch.setattr(backends, "MEMORY_BYTES", 1)
    run("e")
    assert list(openvino._loaded) == used[-2:]


def test_a_cache_stays_within_its_bytes(tmp_path: Path) -> None:
    """The least recently used folders are deleted; the newest stays, however large it is."""

    def write(name: str, size: int) -> set[str]:
        with atomic_folder(tmp_path / name, keep=100) as temporary:
            (temporary / "model.bin").write_bytes(b"x" * size)
        return {p.name for p in tmp_path.iterdir()}

    assert [write(k, 40) for k in "ab"][-1] == {"a", "b"}
    for age, name in ((200, "b"), (100, "a")):
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert write("c", 40) == {"a", "c"}
    assert write("d", 1000) == {"d"}


def test_unknown_backends_and_precisions_are_refused() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'openvino'"):
        backends.get_backend("openvin")
    pytest.importorskip("openvino")
    with pytest.raises(BadRecipe, match="float32 or bfloat16"):
        backends.get_backend("openvino", "float16")


def test_openvino_generates_the_same_image(openvino: backends.OpenVino) -> None:
    """On tiny, in bytes: float32 within 1 level; bfloat16 within 12 levels for 99 % of the pixels."""
    from minikin import Studio

    studio = Studio.open("tiny", device="cpu")
    (eager,) = studio.paint("a cat on the beach", steps=2, seed=3)
    for backend, tolerance in ((openvino, 1.0), (backends.OpenVino("bfloat16"), 12.0)):
        with backend.applied(studio.base):
            (theirs,) = studio.paint("a cat on the beach", steps=2, seed=3)
        difference = np.abs(np.asarray(eager, int) - np.asarray(theirs, int))
        assert np.percentile(difference, 99) <= tolerance

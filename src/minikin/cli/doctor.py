"""The command doctor: versions, device, memory and models of this machine, and one fix for each problem."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from minikin import extras
from minikin.cli import display
from minikin.files import cache_folder, data_folder

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors", "pydantic", "pillow")
MIN_MEMORY_GB = 2.0


@dataclass(frozen=True)
class Check:
    """One line of the report; `repair` is the command or step that solves the problem."""

    what: str  # word: keys of `doctor --json`
    found: str  # word: keys of `doctor --json`
    ok: bool = True
    repair: str = ""  # word: keys of `doctor --json`


def report(*, as_json: bool) -> int:
    """Print every check; returns the exit code, 1 when there is a problem."""
    checks = [*_python(), *_libraries(), *_device(), *_memory_and_disk(), *_models()]
    if as_json:
        rows = [c.__dict__ for c in checks]
        print(json.dumps({"ok": all(c.ok for c in checks), "checks": rows}, indent=1))
    else:
        for c in checks:
            display.out.print("ok  " if c.ok else "bad ", style="green" if c.ok else "red", end="")
            display.out.print(f" {c.what:16} {c.found}", soft_wrap=True)
            if not c.ok:
                display.out.print(f"     fix: {c.repair}", soft_wrap=True)
    return 0 if all(c.ok for c in checks) else 1


def _python() -> list[Check]:
    version = platform.python_version()
    ok = sys.version_info >= (3, 11)
    return [Check("python", f"{version} on {platform.platform()}", ok, "install Python 3.11 or newer")]


def _libraries() -> list[Check]:
    out = []
    for name in ("minikin", *LIBRARIES):
        try:
            out.append(Check(name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            root = extras.checkout()
            fix = f"{extras.pip()} install -e {shlex.quote(str(root or '.'))}" if name == "minikin" else (
                extras.install_packages(extras.requirement_of(name)))  # fmt: skip
            out.append(Check(name, "missing", False, fix))
    return out


def _device() -> list[Check]:
    try:
        import torch

        from minikin.models.device import devices, resolve
    except ImportError as e:
        return [Check("torch", f"does not import: {e}", False, _reinstall_torch())]
    available = devices()
    _, dtype = resolve()
    out = [
        Check("device", f"{available[0]} ({str(dtype).removeprefix('torch.')}); all: {', '.join(available)}")
    ]
    if available[0] == "cuda":
        free, total = torch.cuda.mem_get_info()
        out.append(Check("gpu memory", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"))
    elif available[0] == "cpu" and shutil.which("nvidia-smi"):
        out.append(Check("gpu", "an NVIDIA card, but this torch cannot use it", False, _reinstall_torch()))
    out.append(Check("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"))
    return out


def _reinstall_torch() -> str:
    """Uninstalling comes first: for pip the CPU build is as new as the one for GPUs, and it would keep it."""
    install = extras.install_packages(extras.requirement_of("torch"))
    return f"{extras.pip()} uninstall -y torch && {install}"


def _memory_and_disk() -> list[Check]:
    out = []
    free = _memory_gb()
    if free is not None:
        out.append(
            Check(
                "memory", f"{free:.1f} GB free", free >= MIN_MEMORY_GB, "close other programs; tiny needs 2 GB"
            )
        )
    for what, folder in (("data folder", data_folder()), ("cache folder", cache_folder())):
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        disk = shutil.disk_usage(existing).free / 1e9
        ok = os.access(existing, os.W_OK) and disk > 0.5
        home = "MINIKIN_HOME" if what.startswith("data") else "MINIKIN_CACHE"
        out.append(Check(what, f"{folder}, {disk:.0f} GB free", ok, f"set {home} to a folder you can write to"))
    return out


def _memory_gb() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kb = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return kb.get("MemAvailable", 0) / 1e6


def _models() -> list[Check]:
    from minikin.models.loading.registry import entries, models_folder, tiny_folder

    weights = tiny_folder() / "unet" / "diffusion_pytorch_model.safetensors"
    out = [Check("tiny", "embedded", weights.is_file(), extras.reinstall())]
    registered = entries()
    for path in sorted(models_folder().glob("*.json")):
        if path.stem not in registered:
            out.append(Check("model", f"{path} is damaged", False, f"rm {shlex.quote(str(path))}"))
    for e in registered.values():
        out.append(
            Check("model", f"{e.name} ({e.architecture}) at {e.path}", e.path.exists(),
                  f"minikin models add FILE --name {e.name}")
        )  # fmt: skip
    return out

"""Where the resident process listens: a socket for each installation and environment, in a private folder."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from pathlib import Path

from minikin.cli.resident.command import LIMITS

if sys.platform != "win32":
    import resource

PACKAGE = Path(__file__).resolve().parents[2]
# Variables that libraries read while they are imported. Others are given to each command.
READ_AT_IMPORT = (
    "ATEN", "CUDA", "DIFFUSERS", "DNNL", "FORCE_", "GITHUB_ACTIONS", "GLIBC", "GOMP", "HF_", "HOME",
    "HUGGINGFACE", "KMP", "LANG", "LC_", "LD_", "MALLOC", "MINIKIN", "MKL", "NUMBA", "NVIDIA", "OMP", "ONEDNN",
    "OPENBLAS", "OPENVINO", "PY_COLORS", "PYTHON", "PYTORCH", "SAFETENSORS", "TERMINAL_WIDTH", "TORCH",
    "TRANSFORMERS", "XDG", "_TYPER",
)  # fmt: skip
WITHOUT = ("MINIKIN_DEBUG",)  # of them, read by commands alone


def folder() -> Path | None:
    """The folder of this user's sockets, made if need be; None where it is not private."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    parent = Path(runtime) if runtime and os.path.isabs(runtime) else Path("/tmp")
    path = parent / f"minikin-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        facts = path.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o077
    return path if private else None


def key() -> str:
    """Names an installation and an environment: processes of equal key would import the same.

    It changes with the interpreter, what its search path holds (without the first place, which is the
    script's), the files of this package, and the variables that are read at import; and with what a fork could
    not change: niceness, processors, hard limits, the namespaces of a container or sandbox.
    """
    facts = [sys.executable, *(f"{p}:{os.stat(p).st_mtime_ns}" for p in sys.path[1:] if os.path.exists(p))]
    facts += [str(os.nice(0)), str(os.sched_getaffinity(0)), str([resource.getrlimit(r)[1] for r in LIMITS])]
    facts += [os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net", "pid", "user")]
    facts += [f"{p}:{t}" for p, t in sorted(_times(PACKAGE))]
    facts += [
        f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(READ_AT_IMPORT) and k not in WITHOUT
    ]
    return hashlib.sha256("\n".join(facts).encode(errors="surrogateescape")).hexdigest()[:24]


def _times(path: Path) -> list[tuple[str, int]]:
    """Path and time of change of each file below a folder, without Python's caches."""
    files: list[tuple[str, int]] = []
    for entry in os.scandir(path):
        if entry.is_dir():
            files += _times(Path(entry)) if entry.name != "__pycache__" else []
        else:
            files.append((entry.path, entry.stat(follow_symlinks=False).st_mtime_ns))
    return files


def socket_path() -> Path | None:
    """The socket of the resident process that this process could use; None where there can be none."""
    parent = folder()
    try:
        return parent and parent / f"{key()}.sock"
    except OSError:  # a file of the package is replaced just now, or /proc is missing
        return None

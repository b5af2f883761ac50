"""Conversion of PyTorch files to safetensors in a restricted child process: `minikin models convert`.

Minikin opens safetensors only. A file that is published as a pickle is converted once by `legacy_checkpoint`,
which executes none of it. As a second line of defence the conversion runs in a child process without network
(user and network namespaces, where the kernel allows them), environment and further processes, with memory and
disk in proportion to the file, for at most ten minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from minikin.errors import BadModelFile, BadRecipe, StorageError
from minikin.files import move_into_place

SECONDS = 600
EXTRA_BYTES = 1 << 30  # of memory, in addition to three times the file's size
_CHILD = """
import os, resource, runpy, sys
memory, seconds, written = map(int, sys.argv[1:4])
for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_NOFILE, 64),
                   (resource.RLIMIT_FSIZE, written), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(kind, (most, most))
import ctypes
ctypes.CDLL(None, use_errno=True).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET
sys.path[:0] = [sys.argv[4]]
sys.argv[1:] = sys.argv[5:]
from minikin.models.loading.legacy_checkpoint import main
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
sys.exit(main(*sys.argv[1:]))
"""


def convert(source: Path, out: Path | None = None) -> tuple[Path, int]:
    """Write the tensors of a PyTorch file as safetensors; returns the new file and its number of tensors.

    out  by default in the same folder, under the name that transformers and diffusers expect
    Raises BadRecipe, BadModelFile, StorageError.
    """
    out = out or source.with_name(f"{_stem(source)}.safetensors")
    if out.suffix != ".safetensors":
        raise BadRecipe(f"The new file's name must end in .safetensors, but it is {out.name}.")
    if out.exists():
        raise BadRecipe(f"{out} exists already. Use it, or give another name with --out.")
    if not source.is_file():
        raise BadModelFile(f"{source} is no file.")
    size = source.stat().st_size
    partial = out.with_name(f".{out.name}.part")
    root = str(Path(__file__).resolve().parents[3])
    limits = [str(n) for n in (3 * size + EXTRA_BYTES, SECONDS, 2 * size + (64 << 20))]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        child = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD, *limits, root, str(source.resolve()), str(partial.resolve())],
            capture_output=True,
            timeout=SECONDS + 5,
            check=False,
            stdin=subprocess.DEVNULL,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        if child.returncode != 0:
            lines = child.stderr.decode("utf-8", "replace").strip().splitlines()
            why = lines[-1] if child.returncode == 3 and lines else "its reader ran out of memory or time"
            raise BadModelFile(f"{source.name} was not converted: {why[:300]}. Nothing of it was executed.")
        move_into_place(partial, out)
    except subprocess.TimeoutExpired:
        raise BadModelFile(f"{source.name} was not converted within {SECONDS} s.") from None
    except OSError as e:
        raise StorageError(f"{out} was not written: {e.strerror or e}.") from e
    finally:
        with suppress(OSError):
            partial.unlink()
    return out, int(child.stdout)


def _stem(source: Path) -> str:
    """`model` for transformers' `pytorch_model.bin`, else the file's stem."""
    return "model" if source.stem == "pytorch_model" else source.stem

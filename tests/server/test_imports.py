"""The gateway starts without PyTorch and diffusers: the engine is opened by the worker or by a replica."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "safetensors")
SCRIPT = """
import importlib, sys
for name in sys.argv[1].split():
    importlib.import_module(name)
print(*(name for name in {heavy} if name in sys.modules))
"""


def imported_by(modules: str) -> list[str]:
    """Which of the heavy packages a new process has loaded after it imported these modules."""
    script = SCRIPT.format(heavy=HEAVY)
    run = subprocess.run([sys.executable, "-c", script, modules], capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_gateway_imports_neither_torch_nor_diffusers() -> None:
    assert imported_by("minikin.server.app minikin.server.service minikin.server.protocol") == []


def test_cluster_gateway_imports_neither_torch_nor_diffusers() -> None:
    assert imported_by("minikin.cluster.engine minikin.cluster.prompts minikin.cluster.pool") == []


@pytest.mark.parametrize("module", ["minikin.server.studio_engine"])
def test_positive_control_sees_a_module_that_needs_torch(module: str) -> None:
    assert "torch" in imported_by(module)

"""The wheel: what is in it, and how large it is."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MAX_BYTES = 95_000_000
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_BYTES
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"minikin"}
    assert "minikin/py.typed" in names
    assert not [name for name in names if name.endswith(".pyc") or "__pycache__" in name]


def test_nothing_of_the_tree_is_missing(wheel: Path) -> None:
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "src/minikin"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no checkout")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.removeprefix("src/") for name in listed.stdout.split("\0") if name} - names == set()


def test_every_licence_travels_with_the_wheel(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    facts = Parser().parsestr(archive.read(metadata).decode())
    assert facts["License-Expression"] == "Apache-2.0 AND MIT AND CC-BY-4.0"
    files = facts.get_all("License-File", [])
    assert {Path(file).name for file in files} == {
        "LICENSE", "LICENSES.md", "LICENSE-htm", "LICENSE-preact", "LICENSE-signals",
    }  # fmt: skip
    for file in files:
        assert archive.read(metadata.replace("METADATA", f"licenses/{file}"))

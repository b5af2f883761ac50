"""What messages and doctor say to install or repair works: in a checkout, from a wheel, and from neither."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from minikin import extras
from minikin.cli import doctor
from minikin.errors import BadRecipe, extra
from minikin.files import data_folder
from minikin.server.errors import sentence_of
from tests.conftest import build_pipeline

ROOT = Path(__file__).parents[2]
METADATA = """Metadata-Version: 2.4
Name: minikin
Version: 0.2.0
Requires-Dist: torch>=2.13
Requires-Dist: fastapi>=0.163; extra == 'serve'
Requires-Dist: pillow-heif>=1.8; extra == 'studio'
Requires-Dist: minikin[serve]; extra == 'studio'
Provides-Extra: serve
Provides-Extra: studio
"""


def installed(folder: Path, monkeypatch: Any, **direct_url: Any) -> None:
    """Minikin as if it were installed from somewhere else, with the metadata above."""
    info = folder / "minikin-0.2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(METADATA)
    if direct_url:
        (info / "direct_url.json").write_text(json.dumps(direct_url))
    monkeypatch.syspath_prepend(str(folder))
    assert metadata.distribution("minikin").requires == Requires


WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
Requires = [line.removeprefix("Requires-Dist: ") for line in METADATA.splitlines() if "Requires-Dist" in line]


def dry_run(command: str) -> str:
    """Run a command that installs, without installing and without a network."""
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"}
    done = subprocess.run(f"{command} --dry-run --no-deps", shell=True, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_a_checkout() -> None:
    """Every extra that a message names is one of pyproject.toml, and its requirements are met by `dev`."""
    sources = [path.read_text() for path in (ROOT / "src").rglob("*.py")]
    used = {name for text in sources for name in re.findall(r"extra\(['\"](\w+)['\"]\)", text)}
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    assert used and used <= set(re.findall(r"^(\w+) = \[", text, re.M))
    command = shlex.split(extra("serve").strip("`"))
    assert command[-1] == f"{ROOT}[serve]" and str(ROOT / "constraints.txt") in command and "-e" in command


def test_from_a_wheel(tmp_path: Path, monkeypatch: Any) -> None:
    wheel = tmp_path / "my wheels" / "minikin-0.2.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr("minikin/__init__.py", "")
        z.writestr("minikin-0.2.0.dist-info/METADATA", METADATA)
        z.writestr(
            "minikin-0.2.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        z.writestr("minikin-0.2.0.dist-info/RECORD", "")
    installed(tmp_path / "packages", monkeypatch, url=wheel.as_uri(), archive_info={})
    command = extras.install_extra("serve")
    assert f"'{wheel}[serve]'" in command and " -e " not in command
    dry_run(command)


def test_from_a_wheel_that_is_gone(tmp_path: Path, monkeypatch: Any) -> None:
    """Its packages by name: the project is not on PyPI, where the name could be somebody else's."""
    installed(tmp_path / "packages", monkeypatch, url=(tmp_path / "gone.whl").as_uri(), archive_info={})
    monkeypatch.setattr(extras, "checkout", lambda: None)
    command = shlex.split(extras.install_extra("studio"))
    assert command[-2:] == ["pillow-heif>=1.8", "fastapi>=0.163"] and "minikin" not in " ".join(command[-3:])
    dry_run(extras.install_extra("studio"))


def test_it_is_pip_of_this_environment(monkeypatch: Any) -> None:
    """A command that is started as .venv/bin/minikin must not be repaired in another environment."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert extras.pip() == f"{sys.executable} -m pip"
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin")
    assert extras.pip() == "pip"


def test_a_server_names_the_extra_and_no_path() -> None:
    message = f"Restart needs torchsde, which is missing. Install it with {extra('samplers')}. Bye."
    where = "It is installed where this server runs, as the extra samplers."
    assert sentence_of(BadRecipe(message)) == f"Restart needs torchsde, which is missing. {where} Bye."


# ---- doctor


def fixes(what: str) -> list[str]:
    checks = [*doctor._libraries(), *doctor._models()]
    return [c.repair for c in checks if c.what == what and not c.ok]


def test_doctor_on_missing_libraries(monkeypatch: Any) -> None:
    version = metadata.version

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    for name in doctor.LIBRARIES:
        (line,) = fixes(name)
        requirement = Requirement(shlex.split(line)[-1])
        assert requirement.name.lower() == name
        assert requirement.specifier.contains(version(name), prereleases=True)
    (line,) = fixes("minikin")
    assert shlex.split(line)[-2:] == ["-e", str(ROOT)]
    monkeypatch.undo()
    dry_run(extras.install_packages(extras.requirement_of("diffusers")))


def test_doctor_on_a_build_of_torch_that_cannot_use_the_card() -> None:
    """pip takes 2.15+cpu for newer than 2.15, so an upgrade alone changes nothing."""
    uninstall, install = doctor._reinstall_torch().split(" && ")
    assert shlex.split(uninstall)[-3:] == ["uninstall", "-y", "torch"]
    assert Requirement(shlex.split(install)[-1]).name == "torch"


def test_doctor_on_a_model_that_moved(cli: Any, tmp_path: Path) -> None:
    """The line that adds it again works with the new place; the one for a damaged entry, as it stands."""
    build_pipeline("sd15", tmp_path / "configs").save_pretrained(tmp_path / "before")
    assert cli("models", "add", tmp_path / "before", "--name", "mine")[0] == 0
    (tmp_path / "before").rename(tmp_path / "after")
    (line,) = fixes("model")
    assert cli(*shlex.split(line.replace("FILE", str(tmp_path / "after")))[1:])[0] == 0
    assert fixes("model") == []
    (data_folder() / "models" / "mine.json").write_text("{")
    (line,) = fixes("model")
    subprocess.run(line, shell=True, check=True)
    assert fixes("model") == []


def test_doctor_on_damaged_weights(tmp_path: Path, monkeypatch: Any) -> None:
    """In a checkout git has them; else the wheel is installed again."""
    command = shlex.split(extras.reinstall())
    listed = subprocess.run([*command[:3], "ls-files", command[-1]], capture_output=True, text=True, check=True)
    assert "src/minikin/tiny/weights/unet/diffusion_pytorch_model.safetensors" in listed.stdout
    monkeypatch.setattr(extras, "checkout", lambda: None)
    installed(tmp_path / "packages", monkeypatch, url=(tmp_path / "a b.whl").as_uri(), archive_info={})
    assert shlex.split(extras.reinstall())[-3:] == ["--force-reinstall", "--no-deps", str(tmp_path / "a b.whl")]

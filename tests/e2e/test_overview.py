"""The overview, the help of commands, and what a shell completes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("arguments", [(), ("help",), ("--help",)])
def test_the_overview(cli: Any, arguments: tuple[str, ...]) -> None:
    code, out, _ = cli(*arguments)
    assert code == 0
    for command in ("teach", "paint", "studio", "completion"):
        assert command in out


def test_help_of_a_command(cli: Any) -> None:
    assert cli("help", "concepts", "export")[1] == cli("concepts", "export", "--help")[1] != ""
    code, _, err = cli("help", "concpts")
    assert code == 2 and "No such command 'concpts'" in err


def test_groups_alone(cli: Any) -> None:
    code, _, err = cli("concepts")
    assert code == 0 and "No concept in this folder or in your library" in " ".join(err.split())
    code, out, _ = cli("models")
    assert code == 0 and out.startswith("tiny ")
    code, out, _ = cli("fleet")
    assert code == 0 and "paint" in out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_the_shell(cli: Any, shell: str) -> None:
    code, out, _ = cli("completion", shell)
    assert code == 0 and f"complete_{shell}" in out and "_MINIKIN_COMPLETE" in out
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=out, text=True, check=True)
    assert cli("completion", "cmd")[0] == 2


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "right"),
    [("minikin conc", "concepts"), ("minikin paint --see", "--seed"), ("minikin completion f", "fish")],
)  # fmt: skip
def test_bash_completes(tmp_path: Path, words: str, right: str) -> None:
    program = tmp_path / "minikin"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m minikin "$@"\n')
    program.chmod(0o755)
    script = (
        f'eval "$(minikin completion bash)"; COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}; '
        '_minikin_completion minikin; echo "${COMPREPLY[@]}"'
    )
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [right], done.stderr

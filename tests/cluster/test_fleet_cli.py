"""`minikin fleet` by the command line: exit codes, help, and what is said without Ray."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minikin import files
from minikin.cluster import pool as clusters
from minikin.cluster import teach_worker
from minikin.cluster.teach_worker import Task
from minikin.errors import AssetError, StorageError
from tests.conftest import command, filling
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.fleets import image_files, write_manifest, write_prompts


def test_without_ray(monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(clusters, "find_spec", lambda name: None)
    prompts = write_prompts(tmp_path / "p.jsonl", [{"prompt": "a cat"}])
    code, _, message = command(
        monkeypatch, capsys, "fleet", "paint", prompts, "--out", tmp_path / "o", "--workers", 2
    )
    assert code == 2 and "pip install" in message and "[ray]'" in message and "--workers 0" in message


class Interrupted(FakeEngine):
    """Ctrl-C comes while it paints."""

    def paint(self, rows: Any, on_step: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return super().paint(rows, on_step)


def damaged() -> FakeEngine:
    raise AssetError("The base's weights are damaged.")


def test_exit_codes_of_painting(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    """The table of docs/fleet.md, in its order."""
    out = tmp_path / "out"

    def run(
        *prompts: str, engine: Callable[[], Any] = FakeEngine, more: tuple[str, ...] = ()
    ) -> tuple[int, str]:
        monkeypatch.setattr("minikin.cluster.paint_worker.studio_engine", lambda *how: engine())
        path = write_prompts(tmp_path / "p.jsonl", [{"prompt": p} for p in prompts])
        arguments = ("fleet", "paint", path, "--out", out, "--workers", 0, *more)
        code, _, message = command(monkeypatch, capsys, *arguments)
        return code, message

    assert run("a cat")[0] == 0
    code, message = run("a cat", "a cat <nobody>")
    assert code == 1 and "line 2: Unknown concept 'nobody'" in message and len(image_files(out)) == 1
    assert run("a cat", more=("--batch", "2"))[0] == 2
    code, message = run("a dog", engine=damaged)
    assert code == 3 and "damaged" in message
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", filling(0))
        assert run("a dog")[0] == 7
    with files.lock(out / ".lock", str(out)):
        assert run("a dog")[0] == 8
    code, message = run("a dog", "a red dog", engine=Interrupted, more=("--chunk", "16"))
    assert code == 130 and "The same command resumes" in message
    assert run("a dog", "a red dog")[0] == 0 and len(image_files(out)) == 3


def test_exit_codes_of_teaching(photo_folder: Path, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    matches: dict[str, Any] = {}

    def taught_so(task: Task) -> dict[str, Any]:
        if "raise" in matches:
            raise matches["raise"]
        return matches

    monkeypatch.setattr(teach_worker, "teach", taught_so)
    manifest = write_manifest(tmp_path / "m.csv", ["photos,tom,cat,1,0"])

    def run() -> tuple[int, str]:
        arguments = ("fleet", "teach", manifest, "--out", tmp_path / "out", "--workers", 0)
        code, _, message = command(monkeypatch, capsys, *arguments)
        return code, message

    matches |= {"error": {"code": "bad_photo", "message": "It is no photo."}}
    code, message = run()
    assert code == 1 and "tom: It is no photo." in message
    matches["raise"] = StorageError("The disk is full.")
    assert run()[0] == 7
    write_manifest(manifest, ["nowhere,tom,cat,1,0"])
    code, message = run()
    assert code == 2 and "nothing was started" in message


def test_help_of_the_fleet(monkeypatch: Any, capsys: Any) -> None:
    for verb in ("teach", "paint"):
        code, out, _ = command(monkeypatch, capsys, "fleet", verb, "--help")
        assert code == 0 and "--address" in out and "--workers" in out

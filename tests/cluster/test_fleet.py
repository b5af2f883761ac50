"""Many workers: whatever dies, everything is there, to the byte what one process makes, and nothing twice."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from minikin.cluster import pool as clusters
from minikin.cluster import teach_worker
from minikin.cluster.concept_table import rows
from minikin.cluster.paint import paint
from minikin.cluster.paint_worker import PaintWorker, studio_engine
from minikin.cluster.pool import Cluster
from minikin.cluster.prompts import Prompts
from minikin.cluster.run_log import RunLog
from minikin.cluster.run_log import read as records_of
from minikin.cluster.teach import teach
from minikin.cluster.teach_worker import Task
from minikin.cluster.teach_worker import teach as teach_changed
from minikin.errors import BadRecipe, StorageError, UnknownName
from minikin.models.base import Base
from minikin.perfusion.concept_file import load
from minikin.perfusion.train import teach as teach_one
from minikin.recipes import Distill
from minikin.training.trainer import Trainer
from tests.conftest import command, filling
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.fleets import (
    TWO,
    deadly,
    ended,
    image_files,
    killing,
    records,
    write_manifest,
    write_prompts,
)

pytestmark = pytest.mark.usefixtures("short_teaching")

LOGGED = "pictures"  # word: a key of the run log, which other versions read

# ---- painting: R1, R2, R8 ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ray
def test_two_hundred_prompts_and_a_worker_killed(ray: Any, tmp_path: Path) -> None:
    """R1, R8: 200 lines, one of them wrong and one broken; a worker is killed in the middle. All are there,
    once, byte for byte those of one process."""
    lines: list[Any] = [{"id": f"p{i}", "prompt": f"a cat {i % 7}", "seed": i} for i in range(198)]
    lines[40:40] = ["{not json", {"prompt": "a broken cat", "seed": 1}]
    prompts = Prompts(write_prompts(tmp_path / "p.jsonl", lines), {"steps": 4})
    notes = {name: tmp_path / f"notes-{name}" for name in ("here", "fleet")}
    for folder in notes.values():
        folder.mkdir()
    killed: list[int] = []
    here = ended(paint(prompts, tmp_path / "here", None, partial(deadly, notes["here"])))
    fleet = ended(
        paint(prompts, tmp_path / "fleet", TWO, partial(deadly, notes["fleet"], 0.02)),
        killing(notes["fleet"], 48, killed),
    )
    assert killed
    assert here.facts["failed"] == fleet.facts["failed"] == 2
    alone, together = image_files(tmp_path / "here"), image_files(tmp_path / "fleet")
    assert len(alone) == 198 and together == alone
    assert sorted(r["line"] for r in records(tmp_path / "fleet")) == list(range(1, 201))
    assert {r["id"] for r in records(tmp_path / "fleet") if LOGGED in r} == {f"p{i}" for i in range(198)}
    (wrong, broken) = sorted((r for r in records(tmp_path / "fleet") if "error" in r), key=lambda r: r["line"])
    assert "Expected a JSON object with a prompt" in wrong["error"]["message"]
    assert broken["error"]["code"] == "unknown_name"
    assert len(list(notes["fleet"].glob("*.txt"))) >= 2


@pytest.mark.slow
@pytest.mark.ray
def test_a_line_that_kills_its_workers(ray: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """R8: its chunk is tried line by line; the others of the chunk are painted, it is one error."""
    monkeypatch.setattr(clusters, "LOSSES", 2)  # of 3: two workers fewer have to die
    lines = [{"prompt": f"a cat {i}"} for i in range(5)] + [{"prompt": "a deadly cat"}]
    prompts = Prompts(write_prompts(tmp_path / "p.jsonl", lines), {})
    done = ended(paint(prompts, tmp_path / "out", TWO, partial(deadly, tmp_path), chunk=6))
    assert done.facts["failed"] == 1 and len(image_files(tmp_path / "out")) == 5
    (error,) = (r["error"] for r in records(tmp_path / "out") if "error" in r)
    assert error["code"] == "worker_lost" and "died" in error["message"]


@pytest.mark.slow
@pytest.mark.ray
def test_the_same_bytes_as_minikin_paint(
    ray: Any, tiny: Base, tmp_path: Path, monkeypatch: Any, capsys: Any, one_thread: None
) -> None:
    """The real engine, a concept of a folder, two workers; one line alone is `minikin paint`'s file."""
    from tests.helpers.concepts import random_concept as concept_of

    monkeypatch.chdir(tmp_path)
    concept_of(tiny, "tom", 1).save(tmp_path / "tom.safetensors")
    tom, ball = "a photo of <tom> on the beach", "a red ball"
    write_prompts(tmp_path / "p.jsonl", [{"prompt": tom, "seed": 3}, {"prompt": ball, "seed": 4, "n": 2}])
    opening = partial(studio_engine, "tiny", "cpu", None)
    prompts = Prompts(tmp_path / "p.jsonl", {"steps": 2}, tmp_path)
    ended(paint(prompts, tmp_path / "fleet", TWO, opening, batch=1, chunk=1))
    created = {r["line"]: r[LOGGED] for r in records(tmp_path / "fleet")}
    for line, prompt, seed in ((1, tom, 3), (2, ball, 5)):
        arguments = ("paint", prompt, "--seed", seed, "--steps", 2, "--out", "x.png")
        assert command(monkeypatch, capsys, *arguments)[0] == 0
        (entry,) = (p for p in created[line] if p["seed"] == seed)
        assert (tmp_path / "fleet" / entry["file"]).read_bytes() == Path("x.png").read_bytes()


def test_what_is_done_is_kept(tmp_path: Path) -> None:
    """R2: after every line of a manifest that a kill may leave, the same command ends with the same folder."""
    lines = [{"prompt": f"a cat {i}", "n": 1 + i % 2} for i in range(12)]
    prompts = Prompts(write_prompts(tmp_path / "p.jsonl", lines), {})
    whole = ended(paint(prompts, tmp_path / "whole", None, FakeEngine, chunk=4))
    assert whole.facts["painted"] == 18
    again = ended(paint(prompts, tmp_path / "whole", None, partial(pytest.fail, "opened for nothing"), chunk=4))
    assert again.facts | {"seconds": 0} == {"lines": 12, "kept": 12, "painted": 0, "failed": 0, "seconds": 0}
    text = (tmp_path / "whole" / "manifest.jsonl").read_text()
    for cut in (0, 10, len(text) // 2, len(text) - 3):
        (tmp_path / "whole" / "manifest.jsonl").write_text(text[:cut])
        done = ended(paint(prompts, tmp_path / "whole", None, FakeEngine, chunk=4))
        assert done.facts["painted"] == 0  # the images were there
        assert sorted(r["line"] for r in records(tmp_path / "whole")) == list(range(1, 13))
    lost = records(tmp_path / "whole")[3][LOGGED][0]["file"]
    before = (tmp_path / "whole" / lost).read_bytes()
    (tmp_path / "whole" / lost).unlink()
    assert ended(paint(prompts, tmp_path / "whole", None, FakeEngine, chunk=4)).facts["painted"] == 1
    assert (tmp_path / "whole" / lost).read_bytes() == before


def test_a_run_that_nobody_painted_in_tells_its_errors(tmp_path: Path) -> None:
    """Each line killed its workers: what is known of it is in the manifest, and the next run begins anew."""
    run, error = {"base": "tiny"}, {"code": "poison", "message": "It ended its workers."}
    first = RunLog(tmp_path, run)
    first.add([{"line": 1, "asked": "c1d4" * 4, "error": error}], "")
    first.close()
    head, response = records_of(first.path)
    assert head["fingerprint"] == "" and response["error"] == error
    second = RunLog(tmp_path, run)
    second.add([{"line": 2, "asked": "07fe" * 4, "error": error}], "9f3c")
    second.close()
    assert [r.get("line", r.get("fingerprint")) for r in records_of(first.path)] == ["9f3c", 2]
    with pytest.raises(BadRecipe, match="holds another run"):
        RunLog(tmp_path, {"base": "sd15"})


def test_another_run_is_not_mixed_in(tmp_path: Path) -> None:
    prompts = Prompts(write_prompts(tmp_path / "p.jsonl", [{"prompt": "a cat"}]), {})
    ended(paint(prompts, tmp_path / "out", None, FakeEngine))
    with pytest.raises(BadRecipe, match="holds another run: batch is 4 there, 2 here"):
        ended(paint(prompts, tmp_path / "out", None, FakeEngine, batch=2))
    manifest = RunLog(tmp_path / "out", {"base": "tiny", "batch": 4, "chunk": 16})
    with pytest.raises(BadRecipe, match="holds images of tiny 00000000; this worker's is ffffffff"):
        manifest.add([], "f" * 64)
    manifest.close()
    changed = Prompts(write_prompts(tmp_path / "p.jsonl", [{"prompt": "a dog"}]), {})
    assert ended(paint(changed, tmp_path / "out", None, FakeEngine)).facts["painted"] == 1


def test_the_same_image_is_painted_once(tmp_path: Path) -> None:
    lines = [{"id": str(i), "prompt": "a cat", "seed": 1} for i in range(9)]
    prompts = Prompts(write_prompts(tmp_path / "p.jsonl", lines), {})
    assert ended(paint(prompts, tmp_path / "out", None, FakeEngine, chunk=4)).facts["painted"] == 1
    assert (
        len({r[LOGGED][0]["file"] for r in records(tmp_path / "out")}) == 1
        and len(records(tmp_path / "out")) == 9
    )


def test_the_batches_of_a_chunk_do_not_depend_on_what_is_done(tmp_path: Path) -> None:
    """The control of byte-equality: an engine whose images depend on their batch gives the same again."""

    class Sensitive(FakeEngine):
        def paint(self, rows: Any, on_step: Any) -> Any:
            images = super().paint(rows, on_step)
            shade = sum(row.seed for row in rows) % 256
            return [Image.blend(i, Image.new("RGB", i.size, (shade,) * 3), 0.5) for i in images]

    lines = [{"prompt": "a cat", "seed": i} for i in range(8)]
    prompts = Prompts(write_prompts(tmp_path / "p.jsonl", lines), {})
    ended(paint(prompts, tmp_path / "out", None, Sensitive, chunk=8))
    before = image_files(tmp_path / "out")
    for name in sorted(before)[::3]:
        (tmp_path / "out" / name[:2] / name).unlink()
    ended(paint(prompts, tmp_path / "out", None, Sensitive, chunk=8))
    assert image_files(tmp_path / "out") == before
    alone = PaintWorker(Sensitive, tmp_path / "alone", 1)
    alone.work(next(prompts.chunks(8)))
    assert image_files(tmp_path / "alone") != before


def test_lines_that_are_wrong(tmp_path: Path) -> None:
    response = [
        '{"prompt": 7}', '"a cat"', "[]", '{"prompt": "a cat", "steps": 0}', '{"prompt": "x", "device": "mps"}',
        '{"prompt": "x", "stepps": 3}', '{"prompt": "<tomm>"}', '{"prompt": "' + "x" * 200_000 + '"}', "",
        '{"prompt": "a cat", "base": "tiny"}',
    ]  # fmt: skip
    (tmp_path / "tom.safetensors").write_bytes(b"")
    lines = [
        line
        for chunk in Prompts(write_prompts(tmp_path / "p", response), {}, tmp_path).chunks(3)
        for line in chunk
    ]
    message = {line.number: line.error["message"] if line.error else "" for line in lines}
    assert list(message) == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    for number, words in {
        1: "Expected a JSON object with a prompt", 2: "Expected a JSON object", 3: "Expected a JSON object",
        4: "steps: must be at least 1", 5: "device is set once for the whole run", 6: "stepps",
        7: "Did you mean 'tom'", 8: "longer than 100,000 bytes", 10: "",
    }.items():  # fmt: skip
        assert words in message[number], message[number]
    with pytest.raises(BadRecipe, match="cannot be read: No such file"):
        list(Prompts(tmp_path / "none", {}).chunks(1))


def test_a_full_disk_ends_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    """It is nobody's line in particular; what was painted counts when there is room again."""
    prompts = Prompts(write_prompts(tmp_path / "p.jsonl", [{"prompt": f"a cat {i}"} for i in range(8)]), {})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", filling(9))
        with pytest.raises(StorageError, match="disk is full|No space"):
            ended(paint(prompts, tmp_path / "out", None, FakeEngine, chunk=2))
    done = ended(paint(prompts, tmp_path / "out", None, FakeEngine, chunk=2))
    assert 0 < done.facts["painted"] < 8 and len(image_files(tmp_path / "out")) == 8


# ---- teaching: R4, R5 --------------------------------------------------------------------------------


QUICK = {"batch": 2, "sample_every": 0, "mask": "none", "size": 64, "mode": "value", "preview": False}


@pytest.mark.slow
@pytest.mark.ray
def test_three_concepts_and_a_worker_killed(
    ray: Any, photo_folder: Path, tmp_path: Path, one_thread: None, monkeypatch: Any
) -> None:
    """R4: the killed one goes on from its checkpoint; all files are those of one process, then kept."""
    expected = [f"photos,pet{i},cat,5,{i}" for i in range(3)]
    arguments = rows(write_manifest(tmp_path / "m.csv", expected), QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(teach_worker, "teach", dying_once)
        done = ended(teach(arguments, tmp_path / "fleet", TWO))
    assert done.facts["taught"] == 3 and done.facts["failed"] == 0
    states = [json.loads(p.read_text()) for p in (tmp_path / "fleet" / ".fleet").glob("*.json")]
    assert [state_facts["resumed"] for state_facts in states].count(True) == 1
    ended(teach(arguments, tmp_path / "here", None))
    for i in range(3):
        name = f"pet{i}.safetensors"
        assert (tmp_path / "fleet" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
        assert load(tmp_path / "fleet" / name).name == f"pet{i}"
    again = ended(teach(arguments, tmp_path / "fleet", Cluster(2)))
    assert again.facts["kept"] == 3 and again.facts["taught"] == 0
    with open(tmp_path / "fleet" / "results.csv") as f:
        assert [r["status"] for r in csv.DictReader(f)] == ["kept"] * 3


ZOMBIE = """
import os, signal, sys
from pathlib import Path
from minikin.cluster.concept_table import rows
from minikin.cluster.teach_worker import Task
from tests.cluster.test_fleet import QUICK, teach_until_saved
(row,) = rows(Path(sys.argv[1]), QUICK)
stop = lambda: os.kill(os.getpid(), signal.SIGSTOP)
print(teach_until_saved(Task(row, Path(sys.argv[2])), stop)["sha256"])
"""


def teach_until_saved(task: Task, then: Callable[[], None]) -> dict[str, Any]:
    """`teacher.teach` with a checkpoint after every third step, and something that comes upon the first."""
    torch.set_num_threads(1)  # conftest, which this module imports, takes two
    assert teach_one.__kwdefaults__
    save, calls = Trainer.save, itertools.count()

    def saved(self: Trainer) -> None:
        save(self)
        if next(calls) == 1:  # the first one is written before training
            then()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(teach_one.__kwdefaults__, "save_every", 3)
        patch.setattr("minikin.perfusion.train.EVALUATION", 2)  # as `short_teaching` does in this process
        patch.setattr(Trainer, "save", saved)
        return teach_changed(task)


def dying_once(task: Task) -> dict[str, Any]:
    """... a SIGKILL for the worker that has one first of all."""

    def die() -> None:
        with suppress(FileExistsError), open(task.out.parent / "killed", "x"):
            os.kill(os.getpid(), signal.SIGKILL)

    return teach_until_saved(task, die)


@pytest.mark.slow
def test_a_worker_that_was_believed_dead_comes_back(
    photo_folder: Path, tmp_path: Path, one_thread: None
) -> None:
    """R5: stopped after its first checkpoint, succeeded, woken: it writes once more what is there already."""
    (row,) = rows(write_manifest(tmp_path / "m.csv", ["photos,pet,cat,4,0"]), QUICK)
    task = Task(row, tmp_path / "out")
    here = str(Path(__file__).parents[2])
    zombie = subprocess.Popen(
        [sys.executable, "-c", ZOMBIE, str(tmp_path / "m.csv"), str(task.out)],
        stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([here, *sys.path])},
    )  # fmt: skip
    try:
        state = os.waitid(os.P_PID, zombie.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert state and state.si_code == os.CLD_STOPPED
        assert list(task.out.glob(".fleet/*/*.safetensors")) and not task.file.exists()
        state_facts = teach_worker.teach(task)
        written, before = task.file.stat().st_ino, task.file.read_bytes()
        assert state_facts["resumed"] and task.done() == state_facts
        zombie.send_signal(signal.SIGCONT)
        response, _ = zombie.communicate(timeout=120)
    finally:
        zombie.kill()
    assert zombie.returncode == 0 and response.split() == [state_facts["sha256"]]
    assert task.file.stat().st_ino != written  # it has written, late
    assert task.file.read_bytes() == before
    assert {**(task.done() or {}), "resumed": True, "seconds": 0} == {**state_facts, "seconds": 0}
    assert not list(task.out.glob(".fleet/*/*.safetensors")) and not list(task.out.rglob(".minikin-*"))


def test_a_manifest_is_checked_whole(photo_folder: Path, tmp_path: Path) -> None:
    """Everything that is wrong is told before anything begins."""
    lines = ["photos,tom,cat,2,0", "nowhere,kim,cat,2,0", "photos,Tom,cat,2,0", "photos,tom,dog,2,0",
             "photos,lea,cat,none,0", ",lou,cat,2,0", "photos,lou,cat"]  # fmt: skip
    with pytest.raises(BadRecipe) as e:
        rows(write_manifest(tmp_path / "m.csv", lines), {})
    message = str(e.value)
    assert "6 of 7 rows" in message and "nothing was started" in message
    for words in (
        "line 3: There is no folder or file", "line 4: 'Tom' cannot be a concept's name", "taken by line 2",
        "line 6: steps", "line 7: The photos are missing", "line 8: There are more, or fewer, cells",
    ):  # fmt: skip
        assert words in message, message
    (tmp_path / "m.csv").write_text("photos,nme,category\nphotos,tom,cat\n")
    with pytest.raises(UnknownName, match="Unknown column 'nme'. Did you mean 'name'"):
        rows(tmp_path / "m.csv", {})
    (tmp_path / "m.csv").write_text("photos,name\nphotos,tom\n")
    with pytest.raises(BadRecipe, match="has no column category"):
        rows(tmp_path / "m.csv", {})


@pytest.mark.slow
def test_what_is_taught_otherwise_is_taught_again(photo_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Another seed, another photo, a file that is gone: each is taught again, and nothing else is."""
    lines = ["photos,tom,cat,1,0", "photos,kim,cat,1,0"]

    def teach_changed(**changed: Any) -> int:
        matches = ended(teach(rows(tmp_path / "m.csv", QUICK | changed), tmp_path / "out", None)).facts
        assert matches["taught"] + matches["kept"] == 2
        return int(matches["taught"])

    write_manifest(tmp_path / "m.csv", lines)
    assert [teach_changed(), teach_changed()] == [2, 0]
    write_manifest(tmp_path / "m.csv", [lines[0], "photos,kim,cat,1,9"])
    assert [teach_changed(), teach_changed()] == [1, 0]
    (tmp_path / "out" / "tom.safetensors").unlink()
    assert [teach_changed(), teach_changed()] == [1, 0]
    (photo_folder / "0.txt").write_text("a photo of {} at home")
    assert [teach_changed(), teach_changed()] == [2, 0]


def test_a_failure_keeps_nobody_else(photo_folder: Path, tmp_path: Path) -> None:
    """What only the base can know (a word of too many tokens) is a sentence in results.csv."""
    long = "supercalifragilisticexpialidocious floccinaucinihilipilification"
    arguments = rows(write_manifest(tmp_path / "m.csv", [f"photos,tom,{long[:60].strip()},1,0"]), QUICK)
    done = ended(teach(arguments, tmp_path / "out", None))
    assert done.facts["failed"] == 1
    with open(tmp_path / "out" / "results.csv") as f:
        (row,) = csv.DictReader(f)
    assert row["status"] == "failed" and "tokens" in row["error"]


# ---- distilling ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ray
def test_distilling_by_workers_of_a_cluster(ray: Any, tmp_path: Path) -> None:
    """Two ranks share every batch, and one result comes of it."""
    from minikin.cluster.distill import distill

    (tmp_path / "captions.txt").write_text("a cat on the beach\na red ball\n")
    response = {"method": "lcm-lora", "batch": 2, "steps": 2, "rank": 4, "teacher_steps": 2}
    recipe = Distill.make(data=str(tmp_path / "captions.txt"), **response)
    done = ended(distill(recipe, tmp_path / "out", TWO))
    assert done.facts["steps"] == 2 and done.facts["seen"] == 4
    assert Path(done.result).is_file()
    with pytest.raises(BadRecipe, match="holds an earlier run. Go on with it by --resume"):
        ended(distill(recipe, tmp_path / "out", TWO))


def test_the_ranks_meet_at_a_port_that_stays_theirs(monkeypatch: Any) -> None:
    """From when it is told until the group is there, and in it: nobody else can listen there."""
    pytest.importorskip("ray")
    from minikin.cluster.distill import Rank

    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    first = Rank(0, 1)
    host, port = first.rendezvous()
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": host, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("", port))
    torch.distributed.init_process_group("gloo")
    try:
        assert torch.distributed.get_world_size() == 1
        assert first.store.num_keys() > 1, "the group has another store"
    finally:
        torch.distributed.destroy_process_group()


def test_the_launcher_of_one_machine(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    """`--workers 2` is the same command in two processes of PyTorch's launcher; its exit code is ours."""
    started: list[Any] = []

    class Process:
        def __init__(self, command: Any, start_new_session: bool) -> None:
            started.append((command, start_new_session))

        def wait(self) -> int:
            return 4

    monkeypatch.setattr("subprocess.Popen", Process)
    arguments = ("distill", "tdm", "--data", "c.txt", "--workers", "2", "--out", tmp_path)
    assert command(monkeypatch, capsys, *arguments)[0] == 4
    ((words, own_session),) = started
    assert own_session and words[1:3] == ["-m", "torch.distributed.run"]
    assert words[words.index("--nproc-per-node") + 1 :][:3] == ["2", "-m", "minikin"]
    assert words[-6:] == ["distill", "tdm", "--data", "c.txt", "--out", str(tmp_path)]

"""Files are whole or not there: the order of system calls, kills between them, what is swept, who writes."""

from __future__ import annotations

import ast
import errno
import fcntl
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import minikin
from minikin import files
from minikin.errors import StorageError
from minikin.images.encode import save_image
from minikin.perfusion import concept_file
from tests.helpers.mutations import seeds

ROOT = Path(minikin.__file__).parent
TOOLS = Path(__file__).parents[2] / "tools" / "tiny_training"
OLD, NEW = b"old" * 1000, b"new" * 200_000  # more than one write

# ---- the order of system calls, as the kernel saw them -----------------------------------------------

CHILD = """
import sys
from minikin.files import atomic_write
atomic_write(sys.argv[1], sys.stdin.buffer.read())
"""


def traced(path: Path, *options: str) -> tuple[int, list[str]]:
    """Exit code of a process that writes NEW to `path`, and its system calls on files in that folder."""
    log = path.parent.parent / "calls"
    process = subprocess.run(
        ["strace", "-f", "-y", "-o", str(log), "-e", "trace=openat,write,fsync,rename,renameat,renameat2",
         *options, sys.executable, "-c", CHILD, str(path)],
        input=NEW, capture_output=True, check=False,
    )  # fmt: skip
    return process.returncode, [line for line in log.read_text().splitlines() if str(path.parent) in line]


@pytest.fixture(scope="module")
def strace(tmp_path_factory: Any) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    folder = tmp_path_factory.mktemp("strace") / "f"
    folder.mkdir()
    if traced(folder / "x")[0] != 0:
        pytest.skip("strace may not trace here")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "f" / "concept.safetensors"
    path.parent.mkdir()
    path.write_bytes(OLD)
    return path


@pytest.mark.usefixtures("strace")
def test_written_synced_renamed_synced(target: Path) -> None:
    """A new file in the same folder, all of it written, fsync, rename, fsync of the folder."""
    code, calls = traced(target)
    names = [m[1] for line in calls if (m := re.search(r"(?:^\d+ +)?(\w+)\(", line))]
    order = [n for i, n in enumerate(names) if i == 0 or names[i - 1] != n]
    assert code == 0 and target.read_bytes() == NEW
    assert [n for n in order if n != "openat"] == ["write", "fsync", "rename", "fsync"]
    creating = next(line for line in calls if "O_CREAT" in line)
    assert "O_EXCL" in creating and f"{target.parent}/.minikin-" in creating
    assert "/.minikin-" in next(line for line in calls if "fsync" in line)
    assert re.search(rf"fsync\(\d+<{re.escape(str(target.parent))}>\)", calls[-1])


@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize(
    ("call", "when", "content"),
    [("write", 1, OLD), ("fsync", 1, OLD), ("rename", 1, NEW), ("fsync", 2, NEW)],
)
def test_killed_at_every_call(target: Path, call: str, when: int, content: bytes) -> None:
    """Old or new, never torn; what is left over is swept by the next who comes."""
    code, _ = traced(target, "-e", f"inject={call}:signal=KILL:when={when}")
    assert code in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert target.read_bytes() in ((content,) if call != "rename" else (OLD, NEW))
    for orphan in target.parent.glob(".minikin-*"):
        os.utime(orphan, (time.time() - 600,) * 2)
    files.sweep_orphans(target.parent)
    assert [p.name for p in target.parent.iterdir()] == [target.name]


@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_an_error_of_every_call(target: Path, call: str) -> None:
    """EIO of any of them: an error, the old file whole, nothing left over."""
    code, _ = traced(target, "-e", f"inject={call}:error=EIO:when=1")
    assert code == 1 and target.read_bytes() == OLD
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_the_first_writer_wins(target: Path, monkeypatch: Any) -> None:
    """A name that is taken keeps what it has, with hard links and without them; nothing is left over."""
    new = target.with_name("b.png")
    assert files.atomic_new(new, NEW) and not files.atomic_new(new, OLD)
    assert not files.atomic_new(target, NEW)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    third = target.with_name("c.png")
    assert files.atomic_new(third, NEW) and not files.atomic_new(third, OLD)
    assert [new.read_bytes(), third.read_bytes(), target.read_bytes()] == [NEW, NEW, OLD]
    assert sorted(p.name for p in target.parent.iterdir()) == ["b.png", "c.png", target.name]
    with pytest.raises(StorageError, match="was not written"):
        files.atomic_new(new / "d.png", NEW)


# ---- the same for every save path, as Python saw them ------------------------------------------------


class Recorder:
    """What was opened for writing, synced and renamed; and whether it was in order."""

    def __init__(self, monkeypatch: Any) -> None:
        self.synced: dict[str, int] = {}  # path -> bytes it had
        self.wrong: list[str] = []
        self.renamed: list[Path] = []
        self.folders: set[str] = set()
        fsync, replace = os.fsync, os.replace

        def recorded_fsync(handle: int) -> None:
            path = os.readlink(f"/proc/self/fd/{handle}")
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                self.folders.add(path)
            self.synced[path] = os.fstat(handle).st_size
            fsync(handle)

        def recorded_replace(a: Any, b: Any) -> None:
            a, b = Path(a), Path(b)
            inside = [p for p in a.rglob("*") if p.is_file()] if a.is_dir() else [a]
            for p in inside:
                if (
                    not f"{a}{b}".endswith("-old")
                    and "-old" not in a.name
                    and self.synced.get(str(p)) != p.stat().st_size
                ):
                    self.wrong.append(f"{p.name} was renamed before it was synced")
            if a.parent != b.parent:
                self.wrong.append(f"{b.name} comes from another folder")
            self.renamed.append(b)
            self.folders.discard(str(b.parent))
            replace(a, b)

        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(os, "replace", recorded_replace)

    def problems(self, written: list[Path]) -> list[str]:
        late = [f"{p.name}'s folder was not synced" for p in self.renamed if str(p.parent) not in self.folders]
        missing = [f"{p.name} was not renamed into place" for p in written if p not in self.renamed]
        return [*self.wrong, *late, *missing]


def _concept(folder: Path) -> Path:
    return concept_file.save(concept_file.from_bytes(seeds()[2]), folder / "tom.safetensors")


def _checkpoint(folder: Path) -> Path:
    from minikin.training import checkpoint

    net = torch.nn.Linear(2, 2)
    path = folder / "checkpoint.safetensors"
    checkpoint.write(path, checkpoint.gather(net, [], torch.optim.AdamW(net.parameters()), {}), {})
    return path


def _image(folder: Path) -> Path:
    return save_image(Image.new("RGB", (8, 8)), folder / "a.png")


def _folder(folder: Path) -> Path:
    with files.atomic_folder(folder / "model") as fresh:
        (fresh / "part").mkdir()
        (fresh / "part" / "weights").write_bytes(NEW)
    return folder / "model"


def _download(folder: Path) -> Path:
    (folder / "x.part").write_bytes(NEW)
    return files.move_into_place(folder / "x.part", folder / "x")


def _build_part(folder: Path) -> Path:
    from tools.tiny_training.job import save_part

    class Part:
        def save_pretrained(self, where: Path) -> None:
            (where / "weights.safetensors").write_bytes(NEW)

    save_part(Part(), folder / "vae")
    return folder / "vae"


def _hard_negatives(folder: Path) -> Path:
    """Drawn once and kept, so that each time goes into a folder of its own."""
    from tools.tiny_training.hard_negatives import HardNegatives

    from minikin.tiny.world import World

    seed = len(list(folder.iterdir()))
    HardNegatives.draw(folder, World("small"), 1, seed)
    return folder / f"lookalikes-small-train-{seed}-1"  # word: folder of builds since 0.1


SAVES = (_concept, _checkpoint, _image, _folder, _download, _build_part, _hard_negatives)


@pytest.mark.parametrize("save", SAVES)
def test_every_save_path_is_in_order(save: Callable[[Path], Path], tmp_path: Path, monkeypatch: Any) -> None:
    """Twice: what replaces an older file or folder goes the same way."""
    recorder = Recorder(monkeypatch)
    for _ in range(2):
        assert recorder.problems([save(tmp_path)]) == []
    assert not list(tmp_path.glob(".*"))


def _unsynced(folder: Path) -> Path:
    (folder / "a").write_bytes(b"x")
    os.replace(folder / "a", folder / "b")
    return folder / "b"


def _in_place(folder: Path) -> Path:
    (folder / "c").write_bytes(b"x")
    return folder / "c"


@pytest.mark.parametrize("save", [_unsynced, _in_place])
def test_the_recorder_finds_what_is_out_of_order(save: Any, tmp_path: Path, monkeypatch: Any) -> None:
    assert Recorder(monkeypatch).problems([save(tmp_path)]) != []


def test_images_of_a_killed_build_are_drawn_again(tmp_path: Path) -> None:
    """kill -9 in the middle of the last file: nothing is there that looks whole, and the rest is swept."""
    from tools.tiny_training.hard_negatives import BLOCK, HardNegatives

    from minikin.tiny.world import World

    code = (
        "import os, signal, sys; from pathlib import Path; import numpy as np\n"
        "from tools.tiny_training.hard_negatives import HardNegatives; from minikin.tiny.world import World\n"
        "def torn(path, **arrays):\n"
        "    path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "np.savez = torn; HardNegatives.draw(Path(sys.argv[1]), World('small'), 1, 0)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (left,) = tmp_path.iterdir()
    assert len(HardNegatives.draw(tmp_path, World("small"), 1, 0).identity) == BLOCK
    assert files.sweep_orphans(old(left).parent) == 1 and len(list(tmp_path.iterdir())) == 1


# ---- disks that refuse -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "not written"), (errno.EROFS, "no right to write"),
     (errno.EACCES, "no right to write"), (errno.EIO, "not written"), (errno.ESTALE, "not written")],
)  # fmt: skip
@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
def test_disks_that_refuse(target: Path, monkeypatch: Any, number: int, words: str, where: str) -> None:
    """K6 and K7: a StorageError with the reason (exit 7), the old file whole, nothing left over."""
    with monkeypatch.context() as patch:

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise OSError(number, os.strerror(number))

        patch.setattr(os, where, refuse)
        with pytest.raises(StorageError, match=words) as e:
            files.atomic_write(target, NEW)
    assert e.value.exit_code == 7 and target.read_bytes() == OLD
    assert e.value.code == ("storage_full" if number in (errno.ENOSPC, errno.EDQUOT) else "storage")
    assert [p.name for p in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_folder_that_the_disk_refuses(tmp_path: Path, monkeypatch: Any, number: int) -> None:
    """The older folder stays as it was."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_bytes(OLD)

    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(StorageError):
            _folder(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["model", "model/old"]


def test_a_file_size_limit(target: Path) -> None:
    """A real refusal of the kernel's (RLIMIT_FSIZE): the old file whole, exit code 7 by the message."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from minikin.errors import StorageError; from minikin.files import atomic_write\n"
        "try: atomic_write(sys.argv[1], b'x' * 100_000)\n"
        "except StorageError as e: print(e, e.code); sys.exit(e.exit_code)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(target)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 7
    assert "was not written" in process.stdout and "storage_full" in process.stdout
    assert [p.name for p in target.parent.iterdir()] == [target.name] and target.read_bytes() == OLD


def test_rights_are_those_of_any_new_file(tmp_path: Path) -> None:
    """umask 077 makes files for the owner alone, 022 readable ones; no moment in which it is changed."""
    for mask, mode in ((0o077, 0o600), (0o022, 0o644)):
        before = os.umask(mask)
        try:
            path = files.atomic_write(tmp_path / f"{mode:o}", b"x")
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == mode


# ---- sweeping ----------------------------------------------------------------------------------------

HALF = ".minikin-0123456789abcdef"


def old(path: Path, seconds: float = 600.0) -> Path:
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / HALF).write_bytes(b"half")
    (tmp_path / f"{HALF[:-1]}0").mkdir()
    (tmp_path / f"{HALF[:-1]}0" / "x").write_bytes(b"half")
    for path in list(tmp_path.iterdir()):
        old(path)
    assert files.sweep_orphans(tmp_path) == 2 and not list(tmp_path.iterdir())


def test_a_writer_at_work_is_left_alone(tmp_path: Path) -> None:
    """In another process, for as long as it likes, whatever the clock says; once it is dead, it is swept."""
    code = (
        "import sys, time; from pathlib import Path; from minikin import files;"
        "files._new_file(Path(sys.argv[1])); print('ready', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline()
        (held,) = tmp_path.iterdir()
        old(held, 1e6)  # a clock that jumped by days
        assert files.sweep_orphans(tmp_path) == 0 and held.exists()
    finally:
        child.kill()
        child.wait()
    assert files.sweep_orphans(tmp_path) == 1


def test_a_folder_being_written_is_left_alone(tmp_path: Path) -> None:
    with files.atomic_folder(tmp_path / "model") as fresh:
        (fresh / "x").write_bytes(b"x")
        old(fresh, 1e6)
        assert files.sweep_orphans(tmp_path) == 0
    assert (tmp_path / "model" / "x").read_bytes() == b"x"


def test_strangers_files_are_never_swept(tmp_path: Path) -> None:
    """Other names, links, and what is younger than a minute."""
    others = [".minikin-notes", ".minikin-0123456789ABCDEF", f"{HALF}.txt", "minikin-0123456789abcdef", ".lock"]
    for name in others:
        old(files.atomic_write(tmp_path / name, b"x"))
    outside = tmp_path.parent / "outside"
    outside.mkdir(exist_ok=True)
    old(files.atomic_write(outside / "precious", b"x"))
    (tmp_path / HALF).symlink_to(outside)
    os.utime(tmp_path / HALF, (0, 0), follow_symlinks=False)
    (tmp_path / f"{HALF[:-1]}0").write_bytes(b"young")
    before = sorted(p.name for p in tmp_path.iterdir())
    assert files.sweep_orphans(tmp_path) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == before and (outside / "precious").exists()


def test_the_lock_is_what_protects_a_writer(tmp_path: Path, monkeypatch: Any) -> None:
    """The positive control: without it, an old temporary file of a living writer is swept."""
    monkeypatch.setattr(fcntl, "flock", lambda *a: None)
    handle, path = files._new_file(tmp_path)
    old(path)
    assert files.sweep_orphans(tmp_path) == 1
    os.close(handle)


# ---- who writes --------------------------------------------------------------------------------------

WRITES = {"write_text", "write_bytes", "save_pretrained", "save_config", "save_file", "savez",
          "savez_compressed", "open_memmap", "mapped", "copyfile", "copytree", "move", "rename",
          "replace_file"}  # fmt: skip
INSIDE = "inside an atomic_folder, which is renamed when all of it is there"
SCRATCH = "into a temporary folder that is gone afterwards"
BUFFER = "into a buffer in memory; atomic_write then writes it"
LOG = "a log that is only added to: a torn last line is left out by its reader"
MAY: dict[tuple[str, str], str] = {
    ("models/lora/adapters.py", "copyfile"): "into a temporary folder beside; then os.replace",
    ("models/loading/architectures.py", "write_text"): SCRATCH,
    ("models/loading/legacy_checkpoint.py", "open"): "a child's half file; its parent checks and renames it",
    ("models/loading/hub.py", "open"): "a download, kept to be resumed, checked, then move_into_place",
    ("distillation/export.py", "save_config"): INSIDE,
    ("distillation/export.py", "save_pretrained"): INSIDE,
    ("distillation/export.py", "write_bytes"): INSIDE,
    ("distillation/export.py", "write_text"): INSIDE,
    ("files.py", "open"): "the lock's own file",
    ("cli/output.py", "open"): "/dev/null in place of a closed stream",
    ("models/precision.py", "write_text"): INSIDE,
    ("cluster/run_log.py", "open"): LOG,
    ("models/memory.py", "write_text"): "a switch of the kernel's, no file",
    ("evaluation/cache.py", "open"): LOG,
    ("baselines/dreambooth.py", "save_config"): INSIDE,
    ("tools/tiny_training/job.py", "copytree"): INSIDE,
    ("tools/tiny_training/job.py", "save_pretrained"): INSIDE,
    ("tools/tiny_training/job.py", "write_text"): INSIDE,
    ("tools/tiny_training/hard_negatives.py", "mapped"): INSIDE,
    ("tools/tiny_training/hard_negatives.py", "savez"): INSIDE,
    ("tools/tiny_training/stages.py", "rename"): "a finished folder of 0.1 gets the name of 0.2",
    ("tools/tiny_training/tokenizer.py", "write_text"): SCRATCH,
    ("cli/resident/command.py", "open"): "a standard stream",
    ("tiny/encoders/network.py", "rename"): "no file: keys of a state dict",
    ("tools/tiny_training/examples.py", "write_text"): "a script that draws the examples of this repository",
    ("training/metrics_log.py", "open"): LOG,
}


def writers(text: str) -> Iterator[str]:
    """Names of the calls in a program that write files, other than this module's functions."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        if name in WRITES and not (name == "move" and owner != "shutil"):
            yield name
        elif name == "open" and owner in ("", "io"):
            mode = (
                node.args[1]
                if len(node.args) > 1
                else next((k.value for k in node.keywords if k.arg == "mode"), None)
            )
            if mode is not None and not (isinstance(mode, ast.Constant) and set(str(mode.value)) <= set("rbt")):
                yield name


def programs() -> Iterator[tuple[str, str]]:
    """Name and text of every module of the package and of the tools that make tiny."""
    for parent, folder in ((ROOT, ROOT), (TOOLS.parents[1], TOOLS)):
        for path in folder.rglob("*.py"):
            yield path.relative_to(parent).as_posix(), path.read_text()


def test_every_writer_of_files_is_known() -> None:
    """What is written goes through `minikin.files`, or is listed above with its reason; the list is exact."""
    assert {(name, call) for name, text in programs() for call in writers(text)} == set(MAY)


@pytest.mark.parametrize(
    "line", ['open(p, "w")', 'open(p, mode="ab")', "open(p, m)", "p.write_text(t)", "p.write_bytes(b)",
             "part.save_pretrained(p)", "np.savez(p, a=a)", "shutil.move(a, b)", "save_file(t, p)"],
)  # fmt: skip
def test_the_walk_finds_each_of_them(line: str) -> None:
    assert list(writers(line))
    assert not list(writers('open(p); open(p, "rb"); atomic_write(p, b); Image.open(p)'))


def test_nothing_is_mapped_that_a_stranger_gives() -> None:
    """C11: maps are of the build's own arrays alone (safe_open reads bases, checkpoints)."""
    maps = {name for name, text in programs() if re.search(r"mmap_mode|\bmmap\.", text)}
    assert maps == {"tools/tiny_training/hard_negatives.py", "tools/tiny_training/shards.py"}
    for name in ("concept_file", "index", "library", "strict_safetensors"):
        assert "safe_open" not in (ROOT / "perfusion" / f"{name}.py").read_text()

"""The command line as people use it and misuse it: one message, the right exit code, nothing lost."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from minikin import Concept, Studio
from minikin.cli import display
from minikin.cli.app import app
from minikin.errors import BadRecipe
from minikin.images import metadata
from minikin.models.base import Base
from tests.conftest import square_photos

pytestmark = pytest.mark.usefixtures("short_teaching")
QUICK = ["--mode", "value", "--steps", "2", "--batch", "2", "--sample-every", "0"]


@pytest.fixture(scope="module")
def trained(tiny: Base, short_teaching: None) -> Concept:
    """A concept of tiny, one for this file."""
    recipe: dict[str, Any] = {"mode": "value", "steps": 2, "batch": 2, "sample_every": 0}
    return Studio(tiny).teach(square_photos(), name="tom", category="cat", **recipe)


@pytest.fixture
def tom(cli: Any, trained: Concept) -> Path:
    """Its file in the folder where `cli` runs."""
    return trained.save(Path("tom.safetensors"))


def test_teach_paint_show_redo(cli: Any, photo_folder: Path) -> None:
    """The whole path of a newcomer."""
    code, _, err = cli("teach", photo_folder, "--name", "tom", "--category", "cat", *QUICK)
    assert code == 0, err
    tom = Path("tom.safetensors")
    assert tom.stat().st_size < 100_000
    assert (Path("tom-teaching") / "masks.png").exists()
    code, *_ = cli("paint", "a photo of <tom> on the beach", "-n", 2, "--seed", 7, "--steps", 2)
    assert code == 0
    files = sorted(Path("out").glob("*.png"))
    assert [f.name for f in files] == [
        "a-photo-of-tom-on-the-beach-7.png", "a-photo-of-tom-on-the-beach-8.png",
        "a-photo-of-tom-on-the-beach-sheet.png",
    ]  # fmt: skip
    code, out, _ = cli("show", files[0])
    assert "<tom>" in out
    assert "Seed: 7" in out
    facts = json.loads(cli("show", tom, "--json")[1])
    assert facts == json.loads(cli("concepts", "show", tom, "--json")[1])
    assert facts["sha256"] == hashlib.sha256(tom.read_bytes()).hexdigest()
    assert f"Concept: tom, content {facts['content']}" in out
    _, out, _ = cli("show", "tom")
    assert facts["sha256"] in out and facts["content"] in out
    assert json.loads(cli("show", files[0], "--json")[1])["concepts"] == {"tom": facts["content"]}
    assert metadata.read(files[1]).recipe["batch"] == {"seed": 7, "n": 2}
    code, out, err = cli("redo", files[1])  # its whole batch is painted again: alone it may round differently
    assert (
        "identical" in out
        and "in a batch of 2: all of them are painted again" in err
        and len(list(Path("out").glob("*.png"))) == 4
    )
    code, out, _ = cli("concepts", "list", "--json")
    assert json.loads(out)["category"] == "cat"
    library_path = json.loads(out)["library"]  # the page, and other folders, find it there
    assert Path(library_path).read_bytes() == tom.read_bytes()
    assert cli("concepts", "add", tom)[1].strip() == library_path
    assert json.loads(cli("concepts", "list", "--json")[1])["library"] == library_path
    assert f"and in your library: {library_path}" in cli("concepts", "list")[1]
    code, out, _ = cli("concepts", "check", "tom", "--base", "tiny")
    assert "sound; fits tiny (same base)" in out


def test_json_is_one_object_a_line(cli: Any, tom: Path) -> None:
    _, out, _ = cli("paint", "<tom>", "--steps", 1, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[-1] == {"event": "done", "pictures": 1, "sheet": None}  # word: JSON output of 0.1
    assert any(line["event"] == "progress" for line in lines)


def test_samples_go_beside_the_concept(cli: Any, photo_folder: Path) -> None:
    code, *_ = cli("teach", photo_folder, "--name", "kim", "--category", "dog",
                   "--out", "deep/er/kim.safetensors",
                   "--mode", "value", "--steps", 4, "--batch", 2, "--sample-every", 2)  # fmt: skip
    assert code == 0
    names = sorted(p.name for p in Path("deep/er/kim-teaching").iterdir())
    assert names == ["masks.png", "result.png", "step-0002.png", "step-0004.png"]
    assert Image.open("deep/er/kim-teaching/step-0004.png").width > 384


def bad(cli: Any, *args: object, code: int, words: str) -> None:
    got, out, err = cli(*args)
    assert got == code, (got, out, err)
    assert words in " ".join(err.split()), err
    assert "Traceback" not in err + out


TEACH = ("--name", "kim", "--category", "cat")


def test_teaching_from_nothing(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    bad(cli, "teach", "empty", *TEACH, code=3, words="holds no photos")
    bad(cli, "teach", "nowhere", *TEACH, code=3, words="There is no folder")


def test_teaching_from_an_unreadable_photo(cli: Any, photo_folder: Path) -> None:
    (photo_folder / "zz.jpg").write_bytes(b"no image")
    bad(cli, "teach", photo_folder, *TEACH, code=3, words="zz.jpg cannot be read")


def test_animated_photo(cli: Any, photo_folder: Path) -> None:
    frames = [Image.new("RGB", (32, 32), c) for c in ("red", "blue")]
    frames[0].save(photo_folder / "zz.png", save_all=True, append_images=frames[1:])
    bad(cli, "teach", photo_folder, *TEACH, code=3, words="zz.png is animated")


@pytest.mark.parametrize(
    ("name", "category", "words"),
    [("Tom!", "cat", "cannot be a concept's name"), ("tom", "", "The category is empty"),
     ("tom", "x" * 99, "99 characters long"), ("cat", "cat", "is its category's own word"),
     ("tom", "supercalifragilisticexpialidocious antidisestablishmentarianism", "characters long"),
     ("tom", "qzxj vwkq zxqj", "tokens; use a shorter everyday word")],
)  # fmt: skip
def test_names_and_categories(cli: Any, photo_folder: Path, name: str, category: str, words: str) -> None:
    bad(cli, "teach", photo_folder, "--name", name, "--category", category, *QUICK, code=2, words=words)


def test_output_must_be_safetensors(cli: Any, photo_folder: Path) -> None:
    bad(cli, "teach", photo_folder, *TEACH, "--out", "x.pt", code=2, words="must end in .safetensors")


def test_two_teachings_into_the_same_output(cli: Any, photo_folder: Path) -> None:
    from minikin import files

    with files.lock(Path(".kim.safetensors.lock"), "kim"):
        bad(cli, "teach", photo_folder, *TEACH, *QUICK, code=8, words="Another process is already working on")


def test_a_lock_whose_file_was_removed_is_taken_again(tmp_path: Path, monkeypatch: Any) -> None:
    """The last holder removes the file between our opening and locking it: a third one is busy all the same."""
    import fcntl

    from minikin import files
    from minikin.errors import Busy

    path, flock, calls = tmp_path / ".lock", fcntl.flock, []

    def late(handle: Any, how: int) -> None:
        if not calls:
            path.unlink()
        calls.append(how)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with files.lock(path, "it"):
        assert path.exists()
        with pytest.raises(Busy), files.lock(path, "it"):
            pass
    assert not path.exists()
    with files.lock(path, "it"):
        pass


def test_disk_full_while_saving(cli: Any, photo_folder: Path, monkeypatch: Any) -> None:
    """The old concept survives, and the message says so."""
    import errno

    code, *_ = cli("teach", photo_folder, *TEACH, *QUICK)
    assert code == 0
    before = Path("kim.safetensors").read_bytes()
    import minikin.files as f

    real = f.os.replace

    def full(source: str, target: Any) -> None:
        if str(target).endswith("kim.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(f.os, "replace", full)
    bad(
        cli, "teach", photo_folder, *TEACH, *QUICK, "--seed", 5, "--overwrite", code=7, words="the disk is full"
    )
    assert Path("kim.safetensors").read_bytes() == before


def test_corrupt_and_foreign_concepts(cli: Any, tom: Path) -> None:
    data = tom.read_bytes()
    tom.write_bytes(data[:-40])
    bad(cli, "paint", "<tom>", code=3, words="is not a sound concept file")
    bad(cli, "concepts", "show", "tom", code=3, words="is not a sound concept file")
    tom.write_bytes(data)
    bad(cli, "concepts", "show", "gone.safetensors", code=3, words="There is no concept file")


def test_concept_of_another_base(cli: Any, tom: Path, pipelines: Any, tmp_path: Path) -> None:
    pipelines["sd15"].save_pretrained(tmp_path / "mini")
    bad(
        cli,
        "paint",
        "<tom>",
        "--base",
        tmp_path / "mini",
        code=4,
        words="Open a base of the family it was made for",
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [(["<toom>"], "Did you mean 'tom'"), (["<tom:9>"], "must lie between 0 and 2"),
     (["a", "--scheduler", "eulr"], "Did you mean 'Euler'"),
     (["a", "--width", "100"], "must be divisible by 8"),
     (["a", "--base", "sd-15"], "Did you mean 'sd15'"), (["a", "--steps", "0"], "must be at least 1"),
     (["a <lora:x:1>"], "Unknown LoRA 'x'"), (["a", "--device", "tpu"], "There is no device")],
)  # fmt: skip
def test_paint_misuse(cli: Any, tom: Path, args: list[str], words: str) -> None:
    bad(cli, "paint", *args, code=2, words=words)


def test_base_that_is_not_here(cli: Any) -> None:
    bad(cli, "paint", "a", "--base", "sdxl", code=3, words="minikin models pull sdxl")


def test_show_without_a_recipe(cli: Any) -> None:
    Image.new("RGB", (8, 8)).save("plain.png")
    bad(cli, "show", "plain.png", code=3, words="carries no recipe")
    bad(cli, "show", "gone.png", code=3, words="gone.png")
    bad(cli, "show", "gone", code=2, words="Unknown concept 'gone'")
    bad(cli, "redo", "plain.png", code=3, words="carries no recipe")


def test_models_and_doctor(cli: Any) -> None:
    code, out, _ = cli("models", "list")
    assert "tiny" in out
    assert "sdxl-turbo" in out
    code, out, _ = cli("models", "show", "tiny", "--json")
    assert json.loads(out)["architecture"] == "tiny"
    code, out, _ = cli("doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert {"python", "torch", "device", "tiny"} <= {c["what"] for c in report["checks"]}


def test_export_and_import(cli: Any, photo_folder: Path) -> None:
    args = ("--name", "kim", "--category", "cat", "--steps", 2, "--batch", 2, "--sample-every", 0)
    assert cli("teach", photo_folder, *args, "--mode", "gated")[0] == 0
    code, out, _ = cli("concepts", "export", "kim")
    assert code == 0
    assert "kim-kohya.safetensors" in out and "Lost without the gate" in out
    tensors = load_file("kim-kohya.safetensors")
    for alias in ("kohya", "ComfyUI", "a1111"):
        assert cli("concepts", "export", "kim", "--to", alias, "--out", f"{alias}.safetensors")[0] == 0
        others = load_file(f"{alias}.safetensors")
        assert tensors.keys() == others.keys() and all(torch.equal(tensors[k], others[k]) for k in tensors)
    bad(cli, "concepts", "export", "kim", "--to", "onnx", code=2, words="Unknown format 'onnx'")
    assert cli("concepts", "export", "kim", "--to", "textual-inversion")[0] == 0
    code, *_ = cli(
        "concepts", "import", "kim-textual-inversion.safetensors", "--name", "lea", "--category", "cat"
    )
    assert code == 0
    assert Concept.load("lea.safetensors").name == "lea"


def test_help_of_every_command(cli: Any) -> None:
    for name in ("train", "generate", "teach", "paint", "show", "redo", "doctor", "demo", "concepts", "models"):
        code, out, _ = cli(name, "--help")
        assert code == 0
        assert "Usage: minikin" in out
    assert "--value-lr" in cli("teach", "--help")[1]


def commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command below, with its whole name."""
    yield name, group
    for child, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{name} {child}")


def test_help_shows_every_default(monkeypatch: Any) -> None:
    """Defaults in brackets, like `[tiny]`, are printed: Rich does not take them for markup."""
    monkeypatch.setenv("COLUMNS", "400")
    n = 0
    for name, command in commands(typer.main.get_command(app), "minikin"):
        output = CliRunner().invoke(app, [*name.split()[1:], "--help"], terminal_width=400).output
        words = " ".join(output.replace("│", " ").split())
        for p in command.params:
            text = (getattr(p, "help", None) or "").replace("\\[", "[")
            if "[" in text and not getattr(p, "hidden", False):
                assert " ".join(text.split()) in words, f"{name}: {text}"
                n += 1
    assert n > 60


def test_options_without_effect_are_named(cli: Any, photo_folder: Path) -> None:
    """Mode value has no gate; and the base is named when no option did."""
    code, _, err = cli(
        "teach", photo_folder, "--name", "tom", "--category", "cat", *QUICK, "--beta", "0.5", "--word-lr", 1
    )
    assert code == 0 and "No effect of --beta, --word-lr: mode value has no gate." in err
    assert "The base is tiny, the embedded toy model" in err
    code, _, err = cli("paint", "<tom>", "--steps", 2, "--lock", "global", "--tau", "0.5", "--out", "a.png")
    assert code == 0 and "No effect of --tau, --lock global: no concept of the prompt has a gate" in err
    assert "replaced" not in err
    code, _, err = cli("paint", "<tom>", "--steps", 2, "--out", "a.png")
    assert code == 0 and "No effect" not in err and "a.png existed and was replaced." in err
    code, _, err = cli("models", "add", "tom.safetensors")
    path = photo_folder.parent / "tom.safetensors"
    assert code == 3 and f"It is a concept: `minikin concepts add {path}`" in err
    code, _, err = cli("concepts", "export", "tom", "--to", "comfy")
    assert code == 2 and err.startswith("minikin: Unknown format 'comfy'")
    code, _, err = cli(
        "teach", photo_folder, "--name", "tim", "--category", "cat", *QUICK, "--base", "tiny",
        "--mode", "gated", "--beta", "0.5",
    )  # fmt: skip
    assert code == 0 and "No effect" not in err and "toy" not in err
    code, _, err = cli("paint", "<tom> and <tim>", "--steps", 2, "--tau", "0.5")
    assert code == 0 and "No effect" not in err


def test_progress_on_a_terminal(cli: Any, photo_folder: Path, monkeypatch: Any) -> None:
    """What a person sees: one line with a bar, the stage and the loss; the notes above it."""
    screen = io.StringIO()
    monkeypatch.setattr(display, "err", Console(file=screen, force_terminal=True, width=100, highlight=False))
    code, *_ = cli("teach", photo_folder, "--name", "tom", "--category", "cat", *QUICK)
    assert code == 0
    assert "Photos: 3, 3 with a mask of their own." in screen.getvalue()
    assert "teaching" in screen.getvalue() and "loss 0." in screen.getvalue()
    code, *_ = cli("paint", "<tom>", "--steps", "2")
    assert code == 0 and "painting" in screen.getvalue()


def test_progress_without_a_terminal(cli: Any, monkeypatch: Any) -> None:
    """In a log, a line now and then instead of a bar."""
    monkeypatch.setattr(display, "PROGRESS_S", 0.0)
    _, _, err = cli("paint", "a cat", "--steps", "2")
    assert "painting 1/2" in err and "\r" not in err


def test_a_finished_concept_is_not_replaced_by_accident(cli: Any, tom: Path, photo_folder: Path) -> None:
    before = tom.read_bytes()
    again = ["teach", photo_folder, "--name", "tom", "--category", "cat", *QUICK, "--seed", "1"]
    bad(cli, *again, code=2, words="tom.safetensors already exists")
    bad(cli, *again, "--resume", code=2, words="--overwrite")
    assert tom.read_bytes() == before
    code, *_ = cli(*again, "--overwrite")
    assert code == 0 and tom.read_bytes() != before


def test_debug_works_before_and_after_the_command(cli: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("MINIKIN_DEBUG", "")
    for args in (["--debug", "paint", "a", "--steps", "0"], ["paint", "a", "--steps", "0", "--debug"]):
        with pytest.raises(BadRecipe, match="steps: must be at least 1"):
            cli(*args)


def test_unusual_prompts_and_sizes_are_warned_of(cli: Any) -> None:
    """A prompt longer than the base reads, and a size at which subjects repeat."""
    _, _, err = cli("paint", "a cat and " * 120, "--steps", "1", "--size", "256")
    assert "the first 10 are read" in err and "tends to repeat the subject" in err
    bad(cli, "paint", "a cat", "--out", "cat.jpg", code=2, words="Images are written as PNG")


def test_the_library(cli: Any, tom: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A concept put into the library is found from everywhere, until it is removed."""
    assert cli("concepts", "add", tom)[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "tom" in cli("concepts", "list")[1]
    assert cli("concepts", "remove", "tom")[0] == 0
    assert "tom" not in cli("concepts", "list")[1]
    bad(cli, "concepts", "remove", "tom", code=2, words="Unknown concept of your library 'tom'")
    bad(cli, "concepts", "import", tmp_path / "tom.safetensors", "--name", "t", "--category", "cat", code=3,
        words="is a concept already")  # fmt: skip

"""Drafts, the best of them, refined, inpainted, and replayed, from the command line."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from minikin import Studio
from minikin.cli.app import app
from minikin.errors import BadPhoto, BadRecipe, NoNetwork
from minikin.generation import lineage, output, source
from minikin.generation.source import SourceImage, inherited
from minikin.images import metadata
from minikin.models.base import Base
from minikin.recipes import Best, Inpaint, Paint, Refine
from minikin.server.decode import decode
from minikin.server.limits import Limits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)


def record_in(path: str | Path) -> dict[str, Any]:
    return metadata.read(path).recipe


def square_mask() -> Path:
    pixels = np.zeros((128, 128), np.uint8)
    pixels[40:100, 50:110] = 255
    Image.fromarray(pixels).save("mask.png")
    return Path("mask.png")


def test_draft_refine_inpaint_redo(cli: Any) -> None:
    """The whole way: each image knows the one before, and the last brings all of them back, identical."""
    assert cli("paint", "a red car", "-n", 3, "--preset", "turbo", "--seed", 4, "--out", "d")[0] == 0
    code, out, err = cli("refine", "d/a-red-car-5.png", "--preset", "quality", "--steps", 5, "--size", "1.25x",
                         "--out", "r.png")  # fmt: skip
    assert code == 0, err
    record = record_in("r.png")
    assert record["work"] == "refine" and record["recipe"]["prompt"] == "a red car" and record["seed"] == 5
    assert record["recipe"]["preset"] == "quality" and record["recipe"]["guidance"] is not None
    assert record["parent"]["made"]["preset"] == "turbo" and record["parent"]["file"] == "a-red-car-5.png"
    assert metadata.read("r.png").settings["Denoising strength"] == "0.4"
    assert Image.open("r.png").size == (160, 160)
    Image.open(square_mask()).resize((160, 160)).save("mask.png")
    code, _, err = cli("inpaint", "r.png", "a duck", "--mask", "mask.png", "--steps", 3, "--extend", "right=20",
                       "--out", "i.png")  # fmt: skip
    assert code == 0, err
    assert record_in("i.png")["parent"]["made"]["parent"]["made"]["seed"] == 5
    _, out, _ = cli("show", "i.png")
    assert "Made from: r.png, refine 'a red car', seed 5" in out
    assert "Made from: a-red-car-5.png, paint 'a red car', seed 5" in out
    nearest, draft = json.loads(cli("show", "i.png", "--json")[1])["parents"]
    assert nearest["pixels"] == record_in("i.png")["parent"]["pixels"] and nearest["work"] == "refine"
    assert draft["sha256"] == hashlib.sha256(Path("d/a-red-car-5.png").read_bytes()).hexdigest()
    for lost in ("r.png", "mask.png", "d/a-red-car-5.png"):
        Path(lost).unlink()
    code, out, err = cli("redo", "i.png", "--out", "again.png", "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1]) == {"event": "redo", "largest_difference": 0}
    now, then = record_in("again.png"), record_in("i.png")
    assert now["recipe"].pop("points") == {} and then["recipe"].pop("points") is None  # pinned: none of then
    assert now == then


def test_redo_needs_an_image_that_minikin_did_not_generate(cli: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((128, 128)).save("photo.png")
    assert cli("refine", "photo.png", "--prompt", "a car", "--steps", 2, "--out", "o/r.png")[0] == 0
    code, _, err = cli("redo", "o/r.png")
    assert code == 3 and "made from photo.png" in err and "give it with --source" in err
    assert "identical" in cli("redo", "o/r.png", "--source", "photo.png")[1]
    assert "identical" in cli("redo", "o/r.png", "--source", ".")[1]
    Image.new("RGB", (128, 128)).save("photo.png")  # another image of that name
    assert cli("redo", "o/r.png", "--source", ".")[0] == 3
    Image.fromarray(pixels).resize((128, 128)).save("o/photo.png")  # beside it, in another file
    assert "identical" in cli("redo", "o/r.png")[1]


@pytest.mark.parametrize(
    "record",
    [{"recipe": []}, {"recipe": {"prompt": "a"}}, {"recipe": {"prompt": "a"}, "seed": 1, "batch": 3},
     {"recipe": {"prompt": "a"}, "seed": 1, "work": []}, {"recipe": {"prompt": "a"}, "seed": 1, "mask": [1]},
     {"recipe": {"prompt": "a"}, "seed": 5, "batch": {"seed": 0, "n": 1}},
     {"recipe": {"prompt": "a"}, "seed": 1, "concepts": ["tom"]},
     {"recipe": {"prompt": "a"}, "seed": 1, "adapters": {"style": "x"}},
     {"recipe": {"prompt": "a"}, "seed": 1, "parent": {}},
     {"recipe": {"prompt": "a"}, "seed": 1, "work": "refine", "parent": {"pixels": "", "made": {"seed": 1}}}],
)  # fmt: skip
def test_a_damaged_record_is_one_sentence(cli: Any, record: dict[str, Any]) -> None:
    info = PngInfo()
    info.add_text("minikin", json.dumps(record))
    info.add_text("parameters", "a cat\nSteps: 2, Seed: 1")
    Image.new("RGB", (64, 64)).save("odd.png", pnginfo=info)
    assert cli("show", "odd.png")[0] == 0
    code, _, err = cli("redo", "odd.png")
    assert code in (2, 3) and err.count("\n") == 1 and "unexpected" not in err, err


@pytest.mark.parametrize("command", [("show",), ("redo",), ("refine", "--prompt", "a")])
def test_an_image_of_too_many_pixels_is_one_sentence(
    cli: Any, command: tuple[str, ...], monkeypatch: Any
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (64, 64)).save("bomb.png")
    code, _, err = cli(command[0], "bomb.png", *command[1:])
    assert code == 3 and "bomb.png cannot be read as an image" in err, err


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped(letter: str) -> bytes:
    """A profile whose red is sRGB's green, named this letter and RGB."""
    other = SRGB.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)
    name = letter.encode()
    return other.replace(b"s\0R\0G\0B", name + b"\0R\0G\0B").replace(b"sRGB", name + b"RGB")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_the_server_sees_the_same_colours(mode: str, form: str) -> None:
    image, data = Image.new(mode, (16, 16), (200, 30, 60, 90)[: len(mode)]), io.BytesIO()
    image.save(data, form, icc_profile=swapped("z"), lossless=True)
    decoded = decode(data.getvalue(), "image", Limits())
    with Image.open(data) as opened:
        assert SourceImage.of(decoded).pixels == SourceImage.of(opened).pixels
    assert (
        decoded.mode == mode
        and decoded.getpixel((3, 3))[1] > 150
        and decoded.getpixel((3, 3))[3:] == (90,)[: len(mode) - 3]
    )


def test_redo_takes_the_file_that_was_recorded(cli: Any, monkeypatch: Any) -> None:
    """By its hash, or by its pixels without regard to its profile, as they were recorded once."""
    pixels = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((128, 128)).save("photo.png", icc_profile=swapped("z"))
    with monkeypatch.context() as m:
        m.setattr(source, "plain", lambda image: image.convert("RGB"))
        assert cli("refine", "photo.png", "--prompt", "a car", "--steps", 2, "--out", "r.png")[0] == 0
    assert cli("redo", "r.png")[0] == 0
    Image.open("photo.png").save("copy.png", icc_profile=swapped("z"), compress_level=1)
    Path("photo.png").unlink()
    assert "identical" in cli("redo", "r.png", "--source", "copy.png")[1]


def test_redo_does_not_overwrite_its_source(cli: Any) -> None:
    assert cli("paint", "a car", "--steps", 1, "--out", "c.png")[0] == 0
    before = Path("c.png").read_bytes()
    code, _, err = cli("redo", "c.png", "--out", "c.png")
    assert code == 2 and "the image itself" in err and Path("c.png").read_bytes() == before
    assert "replaced" not in cli("redo", "c.png", "--out", "d.png")[2]
    assert "d.png exists and will be replaced" in cli("redo", "c.png", "--out", "d.png")[2]


def test_colours_are_those_of_the_profile() -> None:
    """A profile whose red is sRGB's green; and nothing of an image but its pixels goes on."""
    other = swapped("z")
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for profile, colour in (
        (None, (255, 0, 0)),
        (SRGB, (255, 0, 0)),
        (other, (0, 255, 0)),
        (swapped("s") + b"linear", (0, 255, 0)),
        (b"none", (255, 0, 0)),
    ):
        red.info = {"transparency": (1, 2, 3)} | ({} if profile is None else {"icc_profile": profile})
        image = SourceImage.of(red).image
        assert not image.info and np.abs(np.subtract(image.getpixel((3, 3)), colour)).max() <= 6, profile


def test_ancestors_of_a_damaged_record() -> None:
    """Whatever it holds, it is shown as far as it goes."""
    odd = {"parent": {"file": 3, "made": {"parent": "x", "recipe": 3, "concepts": {"tom": [1], "rex": {}}}}}
    assert lineage.ancestors(odd) == [{"file": 3, "work": "paint", "concepts": {"rex": ""}}]
    for nothing in ({}, {"parent": []}, {"concepts": [1]}):
        assert lineage.ancestors(nothing) == [] and lineage.concepts_of(nothing) == {}


def test_a_large_mask_is_a_file_beside_its_image(cli: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(output, "LARGEST_MASK", 10)
    cli("paint", "a red car", "--steps", 2, "--out", "d.png")
    code, _, err = cli("inpaint", "d.png", "a duck", "--mask", square_mask(), "--out", "i.png")
    assert code == 0, err
    assert record_in("i.png")["mask"]["file"] == "i.mask.png"
    assert "identical" in cli("redo", "i.png")[1]
    Path("i.mask.png").unlink()
    code, _, err = cli("redo", "i.png")
    assert code == 3 and "is too large to be inside the image" in err


def test_a_record_that_grows_too_long_forgets_its_farthest_parents() -> None:
    record: dict[str, Any] = {"work": "paint", "recipe": {"prompt": "x" * 1000}, "seed": 0}
    for k in range(30):
        parent = {"pixels": "0" * 64, "file": f"{k}.png", "made": record}
        record = {"work": "refine", "recipe": {"prompt": "x" * 1000}, "seed": 0, "parent": parent}
    assert metadata.bounded(record, 100_000) == record
    short = metadata.bounded(record, 10_000)
    assert len(json.dumps(short)) <= 10_000
    n = 0
    while "made" in short["parent"]:
        n, short = n + 1, short["parent"]["made"]
    assert n > 5 and short["parent"]["left_out"] and short["parent"]["file"]
    with pytest.raises(BadPhoto, match="its record was too long to be kept"):
        list(lineage.replay({**short, "recipe": {"prompt": "x"}}, lambda *_: iter(())))
    with pytest.raises(BadRecipe, match="'dance', which this version"):
        lineage.recipe_of({"work": "dance", "recipe": {}, "seed": 0})


def test_the_same_record_whatever_the_file(tiny: Base, tmp_path: Path) -> None:
    """Pixels are hashed, so metadata may be lost; a file's own hash is kept beside."""
    image = Image.new("RGB", (32, 32), "red")
    image.save("a.png")
    image.save("b.png", compress_level=0)
    a, b = SourceImage.of("a.png"), SourceImage.of(Path("b.png"))
    assert a.pixels == b.pixels == SourceImage.of(image).pixels and a.sha256 != b.sha256
    assert a.parent()["size"] == [32, 32] and "made" not in a.parent()


# ---- inherited options --------------------------------------------------------------------------------


def draft(**options: Any) -> SourceImage:
    recipe = Paint.make(**{"prompt": "a car", "negative": "blur", "preset": "turbo", "steps": 4, **options})
    record = {"recipe": recipe.model_dump(exclude={"n", "batch"}), "seed": 9}
    return SourceImage(Image.new("RGB", (64, 64)), "a.png", "", record)


def test_an_image_is_refined_by_its_own_recipe() -> None:
    recipe = inherited(Refine, draft(width=64, height=64, lock="global"), {"strength": 0.3, "steps": None})
    assert (recipe.prompt, recipe.negative, recipe.preset, recipe.steps) == ("a car", "blur", "turbo", 4)
    assert (recipe.seed, recipe.lock, recipe.strength, recipe.width) == (9, "global", 0.3, None)
    assert recipe.n == 1
    assert (
        inherited(Refine, draft(guidance=0, switch=0), {}).model_dump()["concept_start"] == 0.0
    )  # 0 is an answer


@pytest.mark.parametrize("change", [{"preset": "quality"}, {"base": "sd15"}])
def test_another_preset_or_base_brings_its_own_settings(change: dict[str, Any]) -> None:
    recipe = inherited(Inpaint, draft(guidance=1.0, scheduler="LCM"), change)
    assert recipe.steps is None and recipe.guidance is None and recipe.scheduler is None
    assert recipe.preset == change.get("preset") and recipe.prompt == "a car"
    assert (
        inherited(Refine, draft(), {"base": "tiny", "preset": "turbo"}).steps == 4
    )  # the same: nothing changes


def test_another_prompt_brings_its_own_points() -> None:
    """Strengths depend on which concepts share the image."""
    shared = draft(prompt="<tom> and <rex>", points={"tom": {"strength": 1.4}, "rex": {"strength": 1.4}})
    assert set(inherited(Refine, shared, {}).points or {}) == {"tom", "rex"}
    assert inherited(Refine, shared, {"prompt": "a photo of <tom>"}).points is None


def test_no_regions_are_found_for_images_of_version_0_1() -> None:
    record = draft(prompt="<tom> and <rex>").record
    assert lineage.recipe_of(record).regions == "auto"
    del record["recipe"]["regions"]
    repeated = lineage.recipe_of(record)
    assert repeated.regions == "prompt" and repeated.points == {}


def test_images_of_other_programs_bring_prompt_and_seed(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(
        "parameters", "a fox\nNegative prompt: blurry\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 42"
    )
    Image.new("RGB", (64, 64)).save("fox.png", pnginfo=info)
    recipe = inherited(Refine, SourceImage.of("fox.png"), {})
    assert (recipe.prompt, recipe.negative, recipe.seed, recipe.steps) == ("a fox", "blurry", 42, None)


# ---- the best of many ---------------------------------------------------------------------------------


def test_best_of_from_the_command_line(cli: Any) -> None:
    code, out, err = cli("paint", "a photo of a red car", "--preset", "turbo", "--best-of", 4, "-n", 2,
                         "--seed", 3, "--out", "o", "--json")  # fmt: skip
    assert code == 0, err
    lines = [line for line in map(json.loads, out.splitlines()) if line["event"] == "picture"]  # word: API
    assert [line["rank"] for line in lines] == [1, 2] and lines[0]["alignment"] >= lines[1]["alignment"]
    record = record_in(lines[0]["path"])
    keys = ("rank", "of", "judge", "alignment")  # word: keys of records
    assert record["chosen"] == {k: lines[0][k] for k in keys}
    assert len(list(Path("o").glob("*.png"))) == 3  # two and their sheet
    assert "identical" in cli("redo", lines[0]["path"])[1]
    assert record_in(next(Path("out").glob("*again.png")))["chosen"] == record["chosen"]


def test_best_of_with_a_missing_encoder(tiny: Base, bases: dict[str, Base], monkeypatch: Any) -> None:
    """Said before anything is painted."""
    studio = Studio(bases["sd15"])
    monkeypatch.setattr(Base, "architecture", property(lambda self: "sd1"))
    with pytest.raises(NoNetwork, match="clip-b32"):
        list(studio.choosing(Paint(prompt="a cat"), Best(of=2)))
    with pytest.raises(BadRecipe, match="knows tiny's sticker world alone"):
        list(studio.choosing(Paint(prompt="a cat"), Best(of=2, encoder="tiny")))
    with pytest.raises(BadRecipe, match="Of 2 images no 3 can be kept"):
        list(studio.choosing(Paint(prompt="a cat", n=3), Best(of=2)))


# ---- misuse -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("args", "code", "words"), [
    (["refine", "gone.png"], 3, "cannot be read as an image"),
    (["refine", "plain.png"], 2, "carries no prompt"),
    (["refine", "plain.png", "plain.png", "--prompt", "a", "--out", "x.png"], 2, "give --out a folder"),
    (["refine", "plain.png", "--prompt", "a", "--strength", "0"], 2, "strength: must be"),
    (["inpaint", "plain.png", "a cat"], 2, "Say what to paint"),
    (["inpaint", "plain.png", "a cat", "--mask", "gone.png"], 3, "The mask gone.png cannot be read"),
    (["inpaint", "plain.png", "a cat", "--extend", "sideways=3"], 2, "left=64,right=64"),
    (["paint", "a cat", "--encoder", "tiny"], 2, "say how many drafts with --best-of"),
])  # fmt: skip
def test_misuse(cli: Any, args: list[str], code: int, words: str) -> None:
    Image.new("RGB", (64, 64)).save("plain.png")
    exit_code, _, err = cli(*args)
    assert exit_code == code and words in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["refine", "inpaint"])
def test_help_names_what_people_look_for(command: str) -> None:
    text = CliRunner().invoke(app, [command, "--help"], terminal_width=200).output
    assert "--strength" in text and "--preset" in text
    assert (
        ("--size" in text and "2x" in text) if command == "refine" else "--mask" in text and "--extend" in text
    )


def test_a_missing_image_is_one_sentence(cli: Any) -> None:
    code, _, err = cli("refine", "nothing.png")
    assert code == 3 and "nothing.png cannot be read as an image: No such file or directory." in " ".join(
        err.split()
    )
    assert "Errno" not in err

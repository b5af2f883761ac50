"""The content filter: images it objects to are flagged, blurred or blocked, and every answer says so."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from minikin import events
from minikin.errors import BadModelFile, Blocked, MinikinError, NoNetwork
from minikin.generation import content_filter
from minikin.generation import safety_checker as safety
from minikin.generation.content_filter import Filtering, Verdict
from minikin.generation.image import GeneratedImage
from minikin.images import metadata, xmp
from minikin.models.base import Base
from minikin.models.loading.registry import models_folder
from minikin.recipes import Best, FilterMode, Paint
from minikin.studio import Studio
from tests.conftest import command
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import Watched, served

MODES: tuple[FilterMode, ...] = ("flag", "blur", "block")


class Double:
    """Objects to the images for which `wrong` is true."""

    name = "double"

    def __init__(self, wrong: Callable[[Image.Image], bool] = lambda _: True) -> None:
        self.wrong = wrong
        self.count = 0

    def __call__(self, images: Sequence[Image.Image]) -> list[Verdict]:
        self.count += len(images)
        return [Verdict(True, ("test",)) if self.wrong(i) else Verdict(False) for i in images]


def nth(*which: int) -> Double:
    """Objects to the images of these numbers, in the order it sees them."""
    double = Double()
    double.wrong = lambda _: next(count) in which
    count = iter(range(1000))
    return double


IMAGE = Image.fromarray(np.random.default_rng(0).integers(256, size=(96, 64, 3), dtype=np.uint8))


def detail(image: Image.Image) -> float:
    """How much neighbouring pixels differ."""
    return float(np.abs(np.diff(np.asarray(image.convert("L"), float), axis=1)).mean())


# ---- modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: FilterMode) -> None:
    """Only images the filter objects to are changed, and carry its verdict."""
    objected, other = Filtering(nth(0), mode)([GeneratedImage(IMAGE, 1), GeneratedImage(IMAGE, 2)])
    assert other == GeneratedImage(IMAGE, 2)
    assert objected.seed == 1 and objected.image.size == IMAGE.size
    assert objected.verdict == {"by": "double", "action": content_filter.ACTIONS[mode], "labels": ["test"]}
    assert (objected.image == IMAGE) is (mode == "flag")
    assert content_filter.is_blocked(objected.verdict) is (mode == "block")
    if mode == "blur":
        assert detail(objected.image) < 0.1 * detail(IMAGE)
    if mode == "block":  # a card of words: light, and no image that a model made
        grey = np.asarray(objected.image.convert("L"))
        assert grey.mean() > 180 and grey.min() < 100 and xmp.source_type_of(objected.image) == xmp.NONE


def test_a_filter_that_fails_lets_nothing_through() -> None:
    class Lazy(Double):
        def __call__(self, images: Sequence[Image.Image]) -> list[Verdict]:
            return []

    with pytest.raises(MinikinError, match="gave 0 verdicts on 1 images, so none is given out"):
        Filtering(Lazy(), "flag")([GeneratedImage(IMAGE, 1)])


def test_blocked_images_are_not_given_out() -> None:
    images = Filtering(nth(0), "block")([GeneratedImage(IMAGE, 1), GeneratedImage(IMAGE, 2)])
    assert [image.seed for image in content_filter.without_blocked(images)] == [2]
    with pytest.raises(Blocked, match="1 of 2 images were blocked"):
        content_filter.without_blocked(images, strict=True)
    with pytest.raises(Blocked, match="The image was blocked by the content filter. Try other words"):
        content_filter.without_blocked(images[:1])
    assert content_filter.without_blocked([]) == []


# ---- the Studio and the command line -------------------------------------------------------------------


def studio(tiny: Base, mode: FilterMode, double: Double) -> Studio:
    return Studio(tiny, Filtering(double, mode))


def test_the_studio_filters_every_image(tiny: Base) -> None:
    blocking = studio(tiny, "block", nth(1))
    recipe = Paint(prompt="a cat", steps=1, n=3, batch=2)
    ready = [e for e in blocking.painting(recipe) if isinstance(e, events.ImageReady)]
    assert [content_filter.is_blocked(e.verdict) for e in ready] == [False, True, False]
    with pytest.raises(Blocked, match="1 of 2"):
        studio(tiny, "block", nth(1)).paint("a cat", steps=1, n=2)
    with pytest.raises(Blocked, match="The image"):
        studio(tiny, "block", Double()).refine(IMAGE, prompt="a cat", steps=1)
    assert len(studio(tiny, "flag", Double()).paint("a cat", steps=1)) == 1
    with pytest.raises(Blocked):
        list(studio(tiny, "block", Double()).choosing(recipe, Best(of=3)))


@pytest.fixture
def filtered(monkeypatch: Any) -> Callable[[Double], None]:
    """Puts a test double in the safety checker's place."""

    def put(double: Double) -> None:
        monkeypatch.setattr(safety.SafetyChecker, "of", lambda base: double)

    return put


@pytest.mark.parametrize("mode", MODES)
def test_the_command_line(
    mode: FilterMode, filtered: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Two images, of which the filter objects to the second: files, records, lines."""
    filtered(nth(1))
    args = ("paint", "a cat", "--steps", "1", "-n", "2", "--seed", "5", "--out", tmp_path, "--filter", mode)
    code, out, err = command(monkeypatch, capsys, *args)
    first, second = tmp_path / "a-cat-5.png", tmp_path / "a-cat-6.png"
    assert code == 0 and "filter" not in metadata.read(first).recipe
    if mode == "block":
        assert not second.exists() and "seed 6: blocked by the content filter" in err
        return
    texts = metadata.read(second)
    action = content_filter.ACTIONS[mode]
    assert f"seed 6  {action} by the content filter" in out
    assert texts.recipe["filter"] == {"by": "double", "action": action, "labels": ["test"]}
    assert texts.settings["Content filter"] == action and texts.source_type == xmp.TRAINED
    code, out, _ = command(monkeypatch, capsys, "show", second)
    assert f"Content filter: {action}" in out


def test_all_blocked_is_an_error(filtered: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    filtered(Double())
    args = ("paint", "a cat", "--steps", "1", "--out", tmp_path, "--filter", "block", "--json")
    code, out, err = command(monkeypatch, capsys, *args)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 9 and "blocked by the content filter" in err and not list(tmp_path.glob("*.png"))
    images = [line for line in lines if line["event"] == "picture"]  # word: name of the event
    assert [line["filter"]["action"] for line in images] == ["blocked"]


def test_off_by_default(filtered: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """And by the environment, for a machine whose owner wants it."""
    double = Double()
    filtered(double)
    args = ("paint", "a cat", "--steps", "1", "--out", tmp_path)
    assert command(monkeypatch, capsys, *args)[0] == 0 and double.count == 0
    monkeypatch.setenv("MINIKIN_FILTER", "block")
    assert command(monkeypatch, capsys, *args)[0] == 9 and double.count == 1


@pytest.mark.parametrize("mode", MODES)
def test_redo(mode: FilterMode, filtered: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """The filter looks at the image itself, not at the draft that it was made from."""
    args = ("paint", "a cat", "--steps", "1", "--seed", "5", "--out", tmp_path)
    assert command(monkeypatch, capsys, *args)[0] == 0
    draft, fine, again = (tmp_path / f"{n}.png" for n in ("a-cat-5", "fine", "again"))
    assert command(monkeypatch, capsys, "refine", draft, "--steps", "1", "--out", fine)[0] == 0
    filtered(double := Double())
    monkeypatch.setenv("MINIKIN_FILTER", mode)
    code, out, err = command(monkeypatch, capsys, "redo", fine, "--out", again)
    assert double.count == 1
    if mode == "block":
        assert code == 9 and not again.exists() and "blocked by the content filter" in err
        return
    action = content_filter.ACTIONS[mode]
    assert code == 0 and f"{action} by the content filter" in out and ("identical" in out) == (mode == "flag")
    assert metadata.read(again).recipe["filter"]["action"] == action


def test_a_fleet_does_not_paint_past_a_filter(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n')
    monkeypatch.setenv("MINIKIN_FILTER", "block")
    args = ("fleet", "paint", tmp_path / "p.jsonl", "--workers", "0", "--out", tmp_path / "out")
    code, _, err = command(monkeypatch, capsys, *args)
    assert code == 2 and "`fleet paint` has no content filter" in err and not (tmp_path / "out").exists()


# ---- the server --------------------------------------------------------------------------------------


def answers(url: str, client: Any, n: int = 2) -> tuple[list[Any], Any, Any]:
    """Answers of the three APIs for n images: native results, OpenAI's data, A1111's answer."""
    native = client.post("/api/paint?wait=true", json={"prompt": "a", "n": n}).json()
    theirs = client.post("/v1/images/generations", json={"prompt": "a", "n": n, "output_format": "jpeg"})
    a1111 = client.post("/sdapi/v1/txt2img", json={"prompt": "a", "batch_size": n, "width": 64, "height": 64})
    return native["results"], theirs, a1111.json()


@pytest.mark.parametrize("mode", MODES)
def test_every_api_reports_the_verdict(mode: FilterMode, tmp_path: Path) -> None:
    """The filter objects to the second of two images; the first stays as it is."""
    action = content_filter.ACTIONS[mode]
    how = Filtering(nth(1, 3, 5), mode)
    with served(FakeEngine(), tmp_path, filtering=how) as server, server.client() as client:
        native, theirs, a1111 = answers(server.url, client)
        assert [r["filter"] and r["filter"]["action"] for r in native] == [None, action]
        file = client.get(native[1]["url"]).content
        texts = metadata.recorded(metadata.texts_of(Image.open(io.BytesIO(file))))
        assert texts.recipe["filter"]["action"] == texts.settings["Content filter"] == action
        marks = [xmp.source_type_of(Image.open(io.BytesIO(client.get(r["url"]).content))) for r in native]
        assert marks == [xmp.TRAINED, None if mode == "block" else xmp.TRAINED]
        data = theirs.json()["data"]
        assert f"was {action} by the content filter" in theirs.json()["warnings"][0]  # the page shows these
        assert theirs.status_code == 200 and [d.get("flagged", False) for d in data] == [False, True]
        assert data[1]["filter"]["action"] == action and f"Content filter: {action}" in data[1]["infotext"]
        converted = [Image.open(io.BytesIO(base64.b64decode(d["b64_json"]))) for d in data]
        assert [xmp.source_type_of(i) for i in converted] == marks
        info = json.loads(a1111["info"])
        assert info["nsfw"] == [False, True] and info["content_filter"] == [None, action]
        decoded = [Image.open(io.BytesIO(base64.b64decode(i))) for i in a1111["images"]]
        assert len(decoded) == 2 and np.asarray(decoded[1]).mean() > 40  # nothing is blackened
        assert f"Content filter: {action}" in info["infotexts"][1]
        native_facts, openai_facts = (client.get(path).json() for path in ("/api/capabilities", "/v1/models"))
        assert native_facts["content_filter"] == openai_facts["data"][0]["content_filter"] == mode


def test_all_blocked_in_every_api(tmp_path: Path) -> None:
    with (
        served(FakeEngine(), tmp_path, filtering=Filtering(Double(), "block")) as server,
        server.client() as client,
    ):
        native, theirs, a1111 = answers(server.url, client, 1)
        assert native[0]["filter"]["action"] == "blocked"
        error = theirs.json()["error"]
        assert theirs.status_code == 400 and error["code"] == "content_policy_violation"
        assert error["type"] == "invalid_request_error" and "Try other words" in error["message"]
        assert json.loads(a1111["info"])["nsfw"] == [True] and len(a1111["images"]) == 1
        library = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="blocked by the content filter") as e:
            library.images.generate(prompt="a")
        assert e.value.code == "content_policy_violation"
        stream = {"prompt": "a", "stream": True, "partial_images": 2}
        text = client.post("/v1/images/generations", json=stream).text
        assert "content_policy_violation" in text and "b64_json" not in text


def test_the_verdict_survives_a_restart(tmp_path: Path) -> None:
    with (
        served(FakeEngine(), tmp_path, filtering=Filtering(Double(), "blur")) as server,
        server.client() as client,
    ):
        id_ = client.post("/api/paint?wait=true", json={"prompt": "a"}).json()["id"]
    with served(FakeEngine(), tmp_path) as server, server.client() as client:
        (result,) = client.get(f"/api/jobs/{id_}").json()["results"]
        assert result["filter"]["action"] == "blurred"


@pytest.mark.parametrize(("mode", "may"), [("flag", True), ("blur", False), ("block", False)])
def test_previews_wait_for_the_filter(mode: FilterMode, may: bool, tmp_path: Path) -> None:
    """Where images are hidden, no preview is given out before the filter has run; control: flag."""
    engine = Watched()
    with served(engine, tmp_path, filtering=Filtering(Double(), mode)) as server, server.client() as client:
        engine.patience = 20.0 if may else 0.1  # of four steps
        text = client.post("/v1/images/generations", json={"prompt": "a", "stream": True, "partial_images": 3})
        assert ("partial_image" in text.text) is may
        id_ = client.post("/api/paint", json={"prompt": "b"}).json()["id"]
        previews = []
        with client.stream("GET", f"/api/jobs/{id_}/events") as lines:
            for line in lines.iter_lines():
                if line.startswith("data:"):
                    previews.append(json.loads(line[5:]).get("preview"))
        assert any(previews) is may


def test_a_filter_that_breaks_fails_the_job(tmp_path: Path) -> None:
    def broken(image: Image.Image) -> bool:
        raise RuntimeError("no")

    with served(FakeEngine(), tmp_path, filtering=Filtering(Double(broken), "flag")) as server:
        with server.client() as client:
            answer = client.post("/api/paint?wait=true", json={"prompt": "a"})
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"


def test_live_images_are_filtered(tmp_path: Path) -> None:
    from minikin.server.live import painter

    for mode, blocked in (("blur", False), ("block", True)):
        with served(FakeEngine(), tmp_path / mode, filtering=Filtering(Double(), mode)) as server:
            run = painter(server.service, "me", {})(Paint(prompt="a", base="fake"))
            if blocked:
                with pytest.raises(Blocked):
                    list(run)
                continue
            (ready,) = (e for e in run if isinstance(e, events.ImageReady))
            assert ready.verdict and ready.verdict["action"] == "blurred"


# ---- the published safety checker --------------------------------------------------------------------


def write_checker(folder: Path, threshold: float) -> None:
    """A miniature of the published one with random weights; it objects to images nearer than the threshold."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision = {**small, "patch_size": 28, "image_size": 224}
    model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=small, projection_dim=16))
    model.concept_embeds.data = torch.randn(17, 16)
    model.special_care_embeds.data = torch.randn(3, 16)
    model.concept_embeds_weights.data.fill_(threshold)
    model.special_care_embeds_weights.data.fill_(threshold)
    model.save_pretrained(folder)


@pytest.mark.parametrize(("threshold", "finds"), [(-1.5, True), (1.5, False)])
@pytest.mark.parametrize("place", ["models", "base"])
def test_the_safety_checker(
    threshold: float, finds: bool, place: str, tiny: Base, tmp_path: Path, caplog: Any
) -> None:
    """Opened from the models folder or the base's own; a yes, a no, and no pixel changed."""
    from dataclasses import replace

    base = replace(tiny, folder=tmp_path)
    write_checker(
        models_folder() / "safety-checker" if place == "models" else tmp_path / "safety_checker", threshold
    )
    checker = safety.SafetyChecker.of(base)
    before = np.asarray(IMAGE).copy()
    assert [v.objects for v in checker([IMAGE, IMAGE.convert("L")])] == [finds, finds]
    assert np.array_equal(np.asarray(IMAGE), before) and "black" not in caplog.text
    (filtered_image,) = Filtering(checker, "blur")([GeneratedImage(IMAGE, 1)])
    assert bool(filtered_image.verdict) is finds


def test_the_checker_decides_as_diffusers_does(tiny: Base) -> None:
    """Between the two: its answers are those of the library with its own processor's pixels."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessorPil

    folder = models_folder() / "safety-checker"
    write_checker(folder, 0.35)
    rng = np.random.default_rng(1)
    images = [
        Image.fromarray(
            np.kron(rng.integers(256, size=(4, 4, 3), dtype=np.uint8), np.ones((24, 24, 1), np.uint8))
        )
        for _ in range(12)
    ]
    model = StableDiffusionSafetyChecker.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil()(images, return_tensors="pt")["pixel_values"]
    _, want = model(clip_input=pixels, images=[np.zeros(1)] * 12)
    answers_ = [v.objects for v in safety.SafetyChecker.of(tiny)(images)]
    assert answers_ == [bool(w) for w in want]


def test_a_checker_that_is_missing_or_not_whole(
    tiny: Base, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    """The start fails; neither an image without the filter nor one with random weights."""
    from safetensors.torch import load_file, save_file

    with pytest.raises(NoNetwork, match="minikin models pull safety-checker"):
        Studio.open("tiny", filter="flag")
    code, _, err = command(monkeypatch, capsys, "paint", "a", "--filter", "blur", "--out", tmp_path)
    assert code == 3 and "models pull safety-checker" in err and not list(tmp_path.iterdir())
    assert command(monkeypatch, capsys, "serve", "--filter", "block", "--folder", tmp_path)[0] == 3
    folder = models_folder() / "safety-checker"
    write_checker(folder, 0)
    file = folder / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if k != "concept_embeds"}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BadModelFile, match="1 tensors are missing or of another shape, first concept_embeds"):
        safety.SafetyChecker.of(tiny)
    torch.save(tensors, folder / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(NoNetwork):  # a pickle is none
        safety.SafetyChecker.of(tiny)

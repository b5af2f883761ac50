"""Images of several requests in one batch equal those generated alone, over HTTP too."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minikin import Studio
from minikin.generation.batching import BatchRow, batch_key, generate_together
from minikin.generation.request import resolve
from minikin.generation.sampler import generate
from minikin.models.base import Base
from minikin.models.prompt import parse
from minikin.perfusion.concept import Concept
from minikin.perfusion.concept_file import to_bytes
from minikin.perfusion.conditioning import prepare_concept
from minikin.recipes import Paint
from minikin.server import studio_engine
from minikin.server.engine import Row
from minikin.server.studio_engine import NanOrInf, StudioEngine
from tests.helpers.concepts import random_concept
from tests.helpers.servers import served


def rows_for(base: Base, specs: list[tuple[dict[str, Any], dict[str, Concept]]]) -> list[BatchRow]:
    rows = []
    for values, concepts in specs:
        recipe = Paint.make(base=base.name, steps=3, **values)
        loaded = {n: prepare_concept(base, c) for n, c in concepts.items()}
        rows.append(BatchRow(resolve(base, recipe, loaded), recipe.seed))
    return rows


@pytest.mark.parametrize("name", ["sd15", "sdxl", "tiny"])
def test_each_image_equals_the_one_generated_alone(name: str, bases: dict[str, Base], tiny: Base) -> None:
    """Other prompts, negatives, seeds, switches and concepts of the same name, in one batch (bar: 1e-4 in
    latents; grey levels may then round to the next)."""
    base = tiny if name == "tiny" else bases[name]
    tom, tim = random_concept(base, "tom", 1), random_concept(base, "tom", 2)
    specs: list[tuple[dict[str, Any], dict[str, Concept]]] = [
        ({"prompt": "a photo of <tom>", "seed": 1, "guidance": 3.0}, {"tom": tom}),
        ({"prompt": "a photo of <tom>", "seed": 1, "guidance": 3.0}, {"tom": tim}),
        ({"prompt": "(a dog:1.2)", "negative": "a cat", "seed": 2, "guidance": 3.0}, {}),
        ({"prompt": "<tom:0.5> at night", "concept_start": 0.5, "seed": 9, "guidance": 3.0}, {"tom": tom}),
    ]  # fmt: skip
    rows = rows_for(base, specs)
    assert len({batch_key(row.request, ()) for row in rows}) == 1
    latents: list[torch.Tensor] = []
    many = generate_together(base, rows, on_step=lambda done, x: latents.append(x.clone()))
    last, images = latents[-1], []
    for k, row in enumerate(rows):
        (alone,) = generate_together(base, [row], on_step=lambda done, x: latents.append(x.clone()))
        (batch,) = generate(base, row.request, [row.seed])
        assert torch.allclose(last[k], latents[-1][0], atol=1e-4), k
        a, b, c = (np.asarray(p.image, np.int16) for p in (many[k], alone, batch))
        assert abs(a - b).max() <= 1 and abs(b - c).max() <= 1
        images.append(b)
    assert abs(images[0] - images[1]).max() > 3, "two contents of one name paint two images"


@pytest.mark.parametrize("name", ["sd15", "sdxl", "tiny"])
def test_emphasis_of_encodings_without_a_mean(name: str, bases: dict[str, Base], tiny: Base) -> None:
    """A miniature's encodings have the mean 0 but for rounding; dividing by it gave anything, or NaN."""
    base = tiny if name == "tiny" else bases[name]
    plain, stressed = (base.encode([parse(t, {})]).e for t in ("a dog at night", "(a dog:1.2) at night"))
    assert torch.isfinite(stressed).all()
    changed = (stressed - plain).norm() / plain.norm()
    assert 0.01 < changed < 0.5, float(changed)


def test_the_test_can_fail(tiny: Base) -> None:
    """Rows with each other's concepts are told apart."""
    tom, tim = random_concept(tiny, "tom", 1), random_concept(tiny, "tom", 2)
    specs = [({"prompt": "a <tom>", "seed": 1}, {"tom": c}) for c in (tom, tim)]
    right = generate_together(tiny, rows_for(tiny, specs))
    swapped = generate_together(tiny, rows_for(tiny, specs[::-1]))
    assert abs(np.asarray(right[0].image, np.int16) - np.asarray(swapped[0].image, np.int16)).max() > 3


def test_requests_that_cannot_share_a_batch(tiny: Base) -> None:
    tom = random_concept(tiny, "tom", 1)
    usual: dict[str, Any] = {"prompt": "a <tom>"}
    different = [
        {**usual, "guidance": 2.0}, {**usual, "width": 64}, {**usual, "scheduler": "Euler a"},
        {**usual, "interval": (0.2, 0.8)}, {"prompt": "a <tom@left>", "concept_start": 1.0},
        {"prompt": "a <tom@left>"},
    ]  # fmt: skip
    rows = rows_for(tiny, [(v, {"tom": tom}) for v in (usual, *different)])
    groups = [batch_key(row.request, ("sha",)) for row in rows]
    assert len(set(groups)) == len(groups)
    other = batch_key(rows[-1].request, ("another",))
    assert other != groups[-1], "regions steer the whole batch: the same content alone may share it"


def test_admission_does_not_disturb_the_worker(engine: StudioEngine, tiny: Base) -> None:
    """Tokenizers keep padding as a state: unguarded, a count at the door gave the worker prompts of other
    lengths (in 9 of 9 runs of this loop)."""
    over = threading.Event()

    def admit() -> None:
        while not over.is_set():
            engine.prepare("paint", Paint(prompt="a photo of a cat on the beach", steps=2), {})

    thread = threading.Thread(target=admit)
    thread.start()
    try:
        prompts = [parse("a photo of a dog", {}), parse("", {})]
        sizes = {tuple(tiny.encode(prompts[:1] if k % 2 else prompts[1:]).e.shape[1:]) for k in range(150)}
    finally:
        over.set()
        thread.join()
    assert sizes == {(tiny.n_tokens, tiny.layout.text_width)}


@pytest.fixture(scope="module")
def engine(tiny: Base) -> StudioEngine:
    return StudioEngine(Studio(tiny))


def test_the_real_engine_over_http(engine: StudioEngine, tiny: Base, tmp_path: Path) -> None:
    """Two clients' concepts of one name, painted at once: each equals what a Studio of its own paints."""
    concepts = {"k1": random_concept(tiny, "tom", 1), "k2": random_concept(tiny, "tom", 2)}
    specs = {"prompt": "a photo of <tom> in the snow", "seed": 4, "steps": 4, "n": 2}
    with served(engine, tmp_path / "s", keys=list(concepts)) as s:
        clients = {k: s.client(headers={"X-API-Key": k}) for k in concepts}
        ids = {}
        with engine.studio.turn():  # nothing is painted before both wait
            for k, c in clients.items():
                assert c.post("/api/concepts", files={"file": ("x", to_bytes(concepts[k]))}).status_code == 201
                ids[k] = c.post("/api/paint", json=specs).json()["id"]
            time.sleep(0.1)
        s.drained()
        for k, c in clients.items():
            job = c.get(f"/api/jobs/{ids[k]}").json()
            assert job["status"] == "completed", job
            alone = Studio(tiny)
            alone.add(Concept.load(_written(tmp_path / f"{k}.safetensors", to_bytes(concepts[k]))))
            for r, mine in zip(job["results"], alone.paint(**specs), strict=True):
                got = Image.open(io.BytesIO(c.get(r["url"]).content))
                assert abs(np.asarray(got, np.int16) - np.asarray(mine, np.int16)).max() <= 1
            c.close()
        assert not engine.studio.concepts.loaded, "nothing of a client's is left in the Studio"


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_previews_converge_to_the_image(engine: StudioEngine) -> None:
    engine.warm_up()
    prepared = engine.prepare("paint", Paint(prompt="a photo of a dog", steps=6), {})
    previews: list[Image.Image | None] = []
    (image,) = engine.paint([Row(prepared, 3)], lambda done, preview: previews.append(preview(0)))
    assert len(previews) == 6 and all(p is not None and p.size == image.size for p in previews)
    small = [np.asarray(p.resize((8, 8)), np.float32) for p in (*previews, image) if p is not None]
    apart = [float(abs(preview - small[-1]).mean()) for preview in small[:-1]]
    assert apart[-1] < 20 and apart[-1] < 0.6 * apart[0], apart


def test_nan_is_an_error(engine: StudioEngine, monkeypatch: Any) -> None:
    def diverged(base: Base, rows: Any, on_step: Any) -> Any:
        on_step(2, torch.full((1, 4, 16, 16), torch.nan))
        return []

    monkeypatch.setattr(studio_engine, "generate_together", diverged)
    prepared = engine.prepare("paint", Paint(prompt="a cat", steps=2), {})
    with pytest.raises(NanOrInf, match="NaN or Inf"):
        engine.paint([Row(prepared, 0)], lambda done, preview: None)


def test_teaching_over_http(engine: StudioEngine, tmp_path: Path) -> None:
    """Photos go in, a concept comes out and is used by its name; the photos are gone."""
    folder = Path(__file__).parents[2] / "examples" / "my_teapot"
    photos = sorted(p for p in folder.iterdir() if p.suffix in (".png", ".jpg"))[:2]
    with served(engine, tmp_path / "s") as s, s.client() as c:
        files = [("photos", (p.name, p.read_bytes())) for p in photos]
        recipe = json.dumps({"name": "pot", "category": "teapot", "steps": 2, "mode": "value", "mask": "none"})
        answer = c.post("/api/concepts/teach?wait=true", files=files, data={"recipe": recipe})
        assert answer.status_code == 200, answer.text
        concept = answer.json()["result"]["concept"]
        assert (
            concept["name"] == "pot" and len(c.get("/api/concepts/pot").content) == concept["bytes"] < 100_000
        )
        image = c.post("/api/paint?wait=true", json={"prompt": "a <pot>", "steps": 2})
        assert image.json()["status"] == "completed"
        assert not list((s.folder / "inputs").iterdir())

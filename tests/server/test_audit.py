"""Controls of the audit: it reports each planted fault, and nothing else. The first ones are in test_server."""

from __future__ import annotations

import base64
import io
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minikin.server import audit, metrics
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import concept, served

pytestmark = pytest.mark.usefixtures("quick_disk")


def test_what_belongs_to_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with served(FakeEngine(), folder) as s, s.client() as c:
        c.post("/api/concepts", files={"file": ("x", concept("tom", 1))})
    assert audit.problems(folder) == []

    def planted(path: str) -> list[str]:
        (folder / path).write_bytes(b"")
        matches, while_running = audit.problems(folder), audit.problems(folder, drained=False)
        (folder / path).unlink()
        assert while_running == [] or "results" in path
        return matches

    name = ".minikin-0123456789abcdef"
    for place in ("", "results/", "concepts/"):
        assert planted(place + name) == [f"{name} is a temporary file"]
    assert planted(f"concepts/{'c' * 64}.safetensors") == ["concept cccccccc belongs to nobody"]
    assert planted("concepts/tom.pt") == ["concept tom.pt belongs to nobody"]
    assert planted("results/x.jpg") == ["x.jpg belongs to no job"]
    assert audit.problems(folder) == []


def test_every_kind_has_its_images(tmp_path: Path) -> None:
    """Refining and inpainting as many as were asked for; masks without a gap."""
    folder, buffer = tmp_path / "s", io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    with served(FakeEngine(steps=1), folder) as s, s.client() as c:
        ids = [
            c.post(f"/api/{kind}?wait=true", json={"prompt": "a", "image": image, "n": 2}).json()["id"]
            for kind in ("refine", "inpaint")
        ]
    db = sqlite3.connect(folder / "jobs.sqlite", isolation_level=None)
    for id_ in ids:
        db.execute("UPDATE pictures SET number=2 WHERE job=? AND number=0", (id_,))
        assert f"job {id_} is completed with the" in "; ".join(audit.problems(folder))
        db.execute("DELETE FROM pictures WHERE job=? AND number=2", (id_,))
        assert f"job {id_} is completed with 1 of 2" in "; ".join(audit.problems(folder))
    db.execute("DELETE FROM pictures WHERE job=?", (ids[0],))
    db.execute("UPDATE jobs SET kind='masks' WHERE id=?", (ids[0],))
    assert f"job {ids[0]} is completed with the masks of numbers []" in audit.problems(folder)
    db.execute("UPDATE jobs SET status='failed' WHERE id=?", (ids[1],))
    assert f"job {ids[1]} has 1 images, and was not completed" in audit.problems(folder)
    db.execute("UPDATE jobs SET ended=NULL, concepts=? WHERE id=?", (f'{{"tom": "{"d" * 64}"}}', ids[1]))
    assert f"a concept of job {ids[1]} (dddddddd) has no file" in audit.problems(folder)
    db.close()


def test_counters_that_do_not_agree(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """`served` itself finds an engine room that counts what did not happen; the command does, too."""
    folder = tmp_path / "s"

    def run() -> None:
        with served(FakeEngine(), folder) as s, s.client() as c:
            c.post("/api/paint?wait=true", json={"prompt": "a", "n": 2})
            metrics.JOBS.labels("paint", "completed").inc()

    with pytest.raises(AssertionError, match="counts 2 of 'paint completed', the store's events 1"):
        run()
    response = (
        'minikin_jobs_total{kind="paint",outcome="completed"} 1\n'
        "minikin_pictures_total 3\n"  # word: a metric's name
        "process_start_time_seconds 1\n"
    )
    (tmp_path / "metrics.txt").write_text(response)
    monkeypatch.setattr(sys, "argv", ["audit", str(folder), str(tmp_path / "metrics.txt")])
    with pytest.raises(SystemExit, match="True"):
        audit.main()
    assert capsys.readouterr().out == "/metrics counts 3 of 'images', the store's events 2\n"
    assert audit.disagreements(folder, response.replace("3", "2")) == []
    assert len(audit.disagreements(folder, response.replace("seconds 1", "seconds 1e12"))) == 2

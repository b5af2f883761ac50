"""Replicas behind the gateway: whatever dies, every caller has the image that was asked for."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minikin import events
from minikin.cluster.engine import remote_engines
from minikin.cluster.paint_worker import studio_engine
from minikin.errors import UnknownName
from minikin.models.base import Base
from minikin.recipes import Paint, Refine
from minikin.server.engine import EngineLost, JobInputs, PinnedConcept, Row
from minikin.server.limits import Limits
from minikin.server.studio_engine import StudioEngine
from minikin.studio import Studio
from tests.conftest import equal
from tests.helpers.fake_engine import digest, read
from tests.helpers.fleets import deadly, ended, fake_engine
from tests.helpers.servers import Served, served

ROOM = Limits(waiting=24, waiting_per_client=24, batch=4)


@pytest.fixture(scope="module")
def replicas(ray: Any, tmp_path_factory: Any) -> Iterator[Served]:
    """Two replicas of a fake engine that takes 0.2 s a batch, behind the gateway."""
    engines = remote_engines(ray, partial(fake_engine, 0.05), 2, {"num_cpus": 0.5})
    with served(engines[0], tmp_path_factory.mktemp("serve") / "s", limits=ROOM, engines=engines) as item:
        yield item


@pytest.fixture(scope="module")
def lone(ray: Any, tmp_path_factory: Any) -> Any:
    """One replica of a fake engine, 0.1 s a step, that dies at a word, with nothing in front of it."""
    opening = partial(deadly, tmp_path_factory.mktemp("lone"), 0.1)
    return remote_engines(ray, opening, 1, {"num_cpus": 0.5})[0]


def ask(s: Served, seed: int, steps: int = 4) -> tuple[int, bool, Any]:
    """One image: status, whether it is the right one, headers."""
    with s.client(headers={"X-Minikin-Client": f"c{seed % 8}"}) as c:
        response = c.post("/api/paint", json={"prompt": f"a cat {seed}", "seed": seed, "steps": steps})
        if response.status_code != 202:
            return response.status_code, False, response
        job = response.json()
        while job["status"] not in ("completed", "failed", "cancelled"):
            time.sleep(0.05)
            job = c.get(f"/api/jobs/{job['id']}").json()
        if job["status"] != "completed":
            return 500, False, response
        data = c.get(job["results"][0]["url"]).content
        right = read(Image.open(io.BytesIO(data))) == digest(f"a cat {seed}", "", {}, seed)
        return 200, right, response


def all_up(s: Served, seconds: float = 300.0) -> None:
    """Wait until every worker has a replica again."""
    until = time.monotonic() + seconds
    while any(worker.problem for worker in s.service.workers):
        assert time.monotonic() < until, "no replica came up"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.ray
def test_replicas_that_are_killed_lose_nothing(replicas: Served) -> None:
    """R3: 8 clients, one replica killed after the other; every answer is right, replayed with its own seed."""
    kills, matches = 0, []
    with ThreadPoolExecutor(8) as pool:
        for item in pool.map(partial(ask, replicas), range(48)):
            matches.append(item)
            if len(matches) in (8, 24):
                all_up(replicas)  # with both gone at once the door says 503
                engine: Any = replicas.service.workers[kills].engine
                os.kill(engine.pid, signal.SIGKILL)
                kills += 1
    assert kills == 2
    assert [(status, right) for status, right, _ in matches] == [(200, True)] * 48


@pytest.mark.slow
@pytest.mark.ray
def test_without_the_gateway_a_killed_replica_loses_its_work(lone: Any) -> None:
    """The control of R3: Ray alone loses what a dead replica had in hand."""
    engine = lone
    prepared = engine.prepare("paint", Paint(prompt="a cat", steps=20), {})
    threading.Timer(0.5, lambda: os.kill(engine.pid, signal.SIGKILL)).start()
    with pytest.raises(EngineLost, match="A replica was lost"):
        engine.paint([Row(prepared, 1)], lambda done, preview: None)
    engine.warm_up()
    assert read(engine.paint([Row(prepared, 1)], lambda done, preview: None)[0]) == digest("a cat", "", {}, 1)


@pytest.mark.slow
@pytest.mark.ray
def test_a_replica_paints_what_the_gateway_would(ray: Any, tiny: Base, one_thread: None) -> None:
    """The real engine: a concept by hash, an image painted over, facts for the record; as in one process."""
    from tests.helpers.concepts import random_concept as concept_of

    (far,) = remote_engines(ray, partial(studio_engine, "tiny", "cpu", None), 1, {"num_cpus": 0.5})
    near = StudioEngine(Studio(tiny))
    pinned = {"tom": PinnedConcept("0" * 64, concept_of(tiny, "tom", 1))}
    recipe = Paint(prompt="a photo of <tom>", steps=2)
    both = [engine.prepare("paint", recipe, pinned) for engine in (near, far)]
    assert both[0].group == both[1].group and near.facts(both[0]) == far.facts(both[1])
    images = [
        engine.paint([Row(item, 3)], lambda done, preview: None)[0]
        for engine, item in zip((near, far), both, strict=True)
    ]
    assert equal(*images)
    again = Refine(prompt="a photo of <tom>", steps=2, strength=0.5)
    inputs = JobInputs({"image": images[0]}, stop=threading.Event())
    done = [
        ended(engine.run("refine", engine.prepare("refine", again, pinned, inputs), inputs))
        for engine in (near, far)
    ]
    assert equal(*(item.result[0].image for item in done))
    with pytest.raises(UnknownName, match="Did you mean 'turbo'"):
        far.prepare("paint", Paint(prompt="a cat", preset="turbbo"), {})


@pytest.mark.slow
@pytest.mark.ray
def test_too_many_at_once(replicas: Served) -> None:
    """R6: 60 at once: what is refused says when to come again, what is accepted is painted."""
    with ThreadPoolExecutor(60) as pool:
        matches = list(pool.map(partial(ask, replicas, steps=50), range(100, 160)))  # 2.5 s a batch
    accepted = [item for item in matches if item[0] == 200]
    refused = [item for item in matches if item[0] != 200]
    assert len(accepted) >= 24 and all(right for _, right, _ in accepted)
    assert refused and {status for status, *_ in refused} == {429}
    for _, _, response in refused:
        assert response.json()["error"]["code"] in ("queue_full", "client_queue_full")
        assert 1 <= int(response.headers["Retry-After"]) <= 120


@pytest.mark.slow
@pytest.mark.ray
def test_what_kills_every_replica_is_not_tried_forever(lone: Any, tmp_path: Path) -> None:
    """A request that ends its replicas fails, here the second time, and the next is well again."""
    with served(lone, tmp_path / "s", limits=Limits(attempts=2)) as s, s.client() as c:
        job = c.post("/api/paint", json={"prompt": "a deadly cat"}).json()
        until = time.monotonic() + 300
        while job["status"] in ("queued", "running") and time.monotonic() < until:
            time.sleep(0.1)
            job = c.get(f"/api/jobs/{job['id']}").json()
        assert job["status"] == "failed" and job["error"]["code"] == "poison"
        all_up(s)
        assert ask(s, 5)[:2] == (200, True)


@pytest.mark.slow
@pytest.mark.ray
def test_a_caller_who_goes_stops_the_replica(lone: Any) -> None:
    """R7: cancelled work ends at its next step, so the next image does not wait for it."""
    engine = lone
    long = engine.prepare("paint", Paint(prompt="a cat", steps=600), {})

    def step(done: int, preview: Any) -> None:
        if (
            done >= 2 and (displayed := preview(0)) is not None
        ):  # a busy replica may answer too late, and later in time
            assert displayed.size == (64, 64)
            raise events.Cancelled

    with pytest.raises(events.Cancelled):
        engine.paint([Row(long, 1)], step)
    short = engine.prepare("paint", Paint(prompt="a cat", steps=1), {})
    start_time = time.monotonic()
    engine.paint([Row(short, 1)], lambda done, preview: None)
    assert time.monotonic() - start_time < 55  # 600 steps take 60 s


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_of_ones_own_is_closed_to_others(ray: Any) -> None:
    """R9: it listens on 127.0.0.1 alone and has a token."""
    import psutil

    assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
    names = ("raylet", "gcs_server", "ray::", "dashboard")
    open_to = set()
    for item in psutil.Process().children(recursive=True):
        try:
            response = " ".join(item.cmdline()[:3])
            if any(n in response for n in names):
                open_to |= {c.laddr.ip for c in item.net_connections("inet") if c.status == "LISTEN"}
        except psutil.Error:
            continue
    assert open_to and {ip.removeprefix("::ffff:") for ip in open_to} == {"127.0.0.1"}

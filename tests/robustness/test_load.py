"""Rows L1, L3, L5, L6, L7 and L9 of docs/robustness.md: many callers, who look at every image.

The long ones, L3, L5 and L1's, are measured with
`pytest tests/robustness/test_load.py -m soak -s`: docs/server.md.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from minikin import events
from minikin.server import concept_store
from minikin.server.engine import PinnedConcept
from minikin.server.limits import Limits
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.loads import ContentEngine, Running, Tally, ask, quantile, running, sha256, together
from tests.helpers.overload import Watch, beside, equals, overload, told_to_end
from tests.helpers.raw import Wire
from tests.helpers.servers import Served, concept, served

BATCH = {"steps": 4, "step_s": 0.1}  # 0.4 s for at most 8 images: 20 images a second


def upload(wire: Wire, who: str, data: bytes) -> None:
    """Upload a concept for a client."""
    head = b'--xx\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    kind = "Content-Type: multipart/form-data; boundary=xx"
    body = head + data + b"\r\n--xx--\r\n"
    response = wire.ask("POST", "/api/concepts", [f"X-Minikin-Client: {who}", kind], body)
    assert response.status == 201 and json.loads(response.body)["sha256"] == sha256(data), response


# ---- L1 ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Running]:
    """One for L1 and L9, which ends it."""
    with running(tmp_path_factory.mktemp("load") / "s", step_s=0.01, waiting=200) as r:
        yield r


def loop(k: int, url: str, until: float, tally: Tally, least: int = 0) -> None:
    """One caller, until this time and so many requests: all dialects, 1 to 4 images, two concepts of his own
    whose names others have, too."""
    rng, who = random.Random(k), f"c{k}"
    with Wire(url, timeout=30) as wire:
        mine = {f"pet{i}": concept(f"pet{i}", 100 * k + i) for i in rng.sample(range(10), 2)}
        for data in mine.values():
            upload(wire, who, data)
        for number in itertools.count():
            if number >= least and time.monotonic() >= until:
                break
            name, n = rng.choice(list(mine)), rng.choice((1, 1, 2, 4))
            dialect = rng.choice(("native", "openai", "a1111"))
            prompt = f"{k} paints <{name}> {rng.random()}"
            response = ask(wire, dialect, who, prompt, rng.randrange(2**32), n)
            if not response.wrong and response.concepts != {name: sha256(mine[name])}:
                response = response._replace(
                    wrong=f"{who}'s {name} was not what he had uploaded: {response.concepts}"
                )
            tally.outcomes.append(response)


@pytest.mark.slow
def test_l1_thirty_two_callers_in_a_loop(server: Running) -> None:
    """All dialects, 1 to 4 images, ten names: nothing lost, nothing mixed up, no 5xx. How late answers come,
    and whether memory stays, is measured in `make soak`, on a machine of its own."""
    thirty_two(server, 4.0)


@pytest.mark.soak
def test_l1_on_a_machine_of_its_own(tmp_path: Path) -> None:
    """The same for a minute, and the bars for a machine that nobody else uses."""
    with running(tmp_path / "s", step_s=0.01, waiting=200) as r:
        half, full, lag = thirty_two(r, 60.0)
    assert full < 3 * half and lag < 0.3, "of two cores that the callers share"


def thirty_two(r: Running, seconds: float) -> tuple[float, float, float]:
    """32 callers for so long, two requests each at least: half of the answers, and 99 % of them, came within
    so many seconds; so did 99 % of the answers to the simplest question."""
    until = time.monotonic() + seconds
    memory = [r.memory()]

    def look(tally: Tally) -> None:
        while time.monotonic() < until:
            time.sleep(0.5)
            memory.append(r.memory())

    watch = Watch(r.url)
    tally = together([lambda t, k=k: loop(k, r.url, until, t, 2) for k in range(32)] + [look], seconds)  # type: ignore[misc]
    lag = quantile([s for _, s, _ in watch.stop()], 0.99)
    half, full = tally.seconds(0.5), tally.seconds(0.99)
    print(f"\nL1: {len(tally.outcomes)} requests, {tally.images} images in {seconds:g} s; p50 {half:.2f} s, "
          f"p99 {full:.2f} s; /livez p99 {1000 * lag:.0f} ms; {memory[len(memory) // 2] >> 20} then "
          f"{memory[-1] >> 20} MiB")  # fmt: skip
    assert not tally.wrong, tally.wrong[:5]
    assert {t.status for t in tally.outcomes} == {200} and tally.images >= 64
    if seconds >= 60:  # before that a server that has just started still warms up
        assert memory[-1] < 1.1 * memory[len(memory) // 2]
    return half, full, lag


# ---- L6 ----------------------------------------------------------------------------------------


def churn(url: str, names: int, requests: int, callers: int) -> Tally:
    """A client whose concepts are replaced all the time, one every 100 ms, and asked for meanwhile.

    An answer may show any content that was not replaced before its request was begun.
    """
    limit = max(60, requests / 8)  # s
    contents = defaultdict[str, list[list[Any]]](list)  # hash, and when its upload was answered
    left, over, ready = iter(range(requests)), threading.Event(), threading.Event()

    def put(wire: Wire, k: int, seed: int) -> None:
        data = concept(f"pet{k}", seed)
        contents[f"pet{k}"].append([sha256(data), float("inf")])
        upload(wire, "shared", data)
        contents[f"pet{k}"][-1][1] = time.monotonic()

    def change(tally: Tally) -> None:
        rng = random.Random(0)
        with Wire(url, timeout=30) as wire:
            for k in range(names):
                put(wire, k, k)
            ready.set()
            while not over.wait(0.1):
                k = rng.randrange(names)
                if rng.random() < 0.2:
                    response = wire.ask("DELETE", f"/api/concepts/pet{k}", ["X-Minikin-Client: shared"])
                    assert response.status == 200
                put(wire, k, rng.randrange(2**31))

    def call(k: int, tally: Tally) -> None:
        rng = random.Random(k)
        assert ready.wait(30)
        with Wire(url, timeout=30) as wire:
            while next(left, None) is not None:
                name = f"pet{rng.randrange(names)}"
                response = ask(wire, rng.choice(("native", "openai", "a1111")), "shared", f"a <{name}>", k, 4)
                if (
                    response.status in (400, 404, 422) and "concept" in response.wrong
                ):  # deleted, not yet replaced
                    response = response._replace(wrong="")
                elif not response.wrong:
                    known_hashes, matches = [sha for sha, _ in contents[name]], response.concepts.get(name)
                    if matches not in known_hashes:
                        response = response._replace(wrong=f"nobody uploaded this {name}: {response.concepts}")
                    elif any(at < response.at for _, at in contents[name][known_hashes.index(matches) + 1 :]):
                        response = response._replace(wrong=f"{name} was replaced before it was asked for")
                tally.outcomes.append(response)

    def all_callers(tally: Tally) -> None:
        try:
            tally.outcomes += together([lambda t, k=k: call(k, t) for k in range(callers)], limit).outcomes  # type: ignore[misc]
        finally:
            over.set()

    tally = together([change, all_callers], limit + 30)
    assert sum(map(len, contents.values())) > names, "nothing was replaced"
    return tally


@pytest.mark.slow
@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize("requests", [256, pytest.param(4096, marks=pytest.mark.soak)])
def test_l6_concepts_that_change_all_the_time(tmp_path: Path, monkeypatch: Any, requests: int) -> None:
    """64 callers, 50 names, room for 4, one replaced every 100 ms: 4 images each of what was uploaded last."""
    monkeypatch.setattr(concept_store, "MAX_PARSED", 4)
    limits = Limits(waiting=200, waiting_per_client=200, concepts_per_client=4000)
    with served(ContentEngine(), tmp_path / "s", limits=limits) as r:
        tally = churn(r.url, 50, requests, 64)
    assert not tally.wrong, tally.wrong[:3]
    assert tally.images > 3.75 * requests, tally.images


class ByName(ContentEngine):
    """An engine that knows concepts by their names: who came first is painted for all."""

    def prepare(self, kind: str, recipe: Any, concepts: Any, inputs: Any = None) -> Any:
        first = self.__dict__.setdefault("first", {})
        return super().prepare(kind, recipe, {n: first.setdefault(n, p) for n, p in concepts.items()}, inputs)


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize("who", ["engine", "store"])
def test_going_by_names_alone_is_found(tmp_path: Path, monkeypatch: Any, who: str) -> None:
    """The control of L1 and L6: an engine and a concept cache that do not look at the content."""
    if who == "store":
        real, first = concept_store.ConceptStore.pinned, dict[str, Any]()

        def pinned(self: Any, name: str, entry: Any) -> Any:
            return PinnedConcept(entry.sha256, first.setdefault(name, real(self, name, entry)).concept)

        monkeypatch.setattr(concept_store.ConceptStore, "pinned", pinned)
    engine = ByName if who == "engine" else ContentEngine
    with served(engine(), tmp_path / "s", limits=Limits(waiting=200)) as r:
        response = together([lambda t, k=k: loop(k, r.url, 0, t, 3) for k in range(12)], 10)  # type: ignore[misc]
        assert any("was not what he had uploaded" in wrong for wrong in response.wrong)
    if who == "store":
        first.clear()
    with served(engine(), tmp_path / "t", limits=Limits(waiting=200)) as r:
        assert any("was replaced before" in wrong for wrong in churn(r.url, 2, 50, 2).wrong)


# ---- L7 ----------------------------------------------------------------------------------------


class Counting(FakeEngine):
    """Counts the rows it steps, and those of steps before which all their jobs had been cancelled: a row that
    shares its batch with others who stay costs nothing."""

    service: Any = None
    rows = wasted = 0

    def paint(self, rows: Any, on_step: Any) -> Any:
        known_hashes = (
            {id(job.prepared): job for job in list(self.service._jobs.values())} if self.service else {}
        )
        jobs = [known_hashes[id(row.prepared)] for row in rows if id(row.prepared) in known_hashes]
        gone = [job.cancelled.is_set() for job in jobs]

        def step(done: int, preview: Any) -> None:
            nonlocal gone
            self.rows, self.wasted = self.rows + len(rows), self.wasted + len(rows) * (bool(gone) and all(gone))
            gone = [job.cancelled.is_set() for job in jobs]
            self.tell(on_step, done, preview)

        return super().paint(rows, step)

    def tell(self, on_step: Any, done: int, preview: Any) -> None:
        on_step(done, preview)


class Deaf(Counting):
    """The control: goes on whatever it is told."""

    def tell(self, on_step: Any, done: int, preview: Any) -> None:
        with suppress(events.Cancelled):
            on_step(done, preview)


def leaving(s: Served, engine: Counting, callers: int, times: int) -> tuple[Tally, int]:
    """Callers, 30 % of whose requests they do not wait for; and how many those were."""
    engine.service = s.service
    body = json.dumps({"prompt": "left", "n": 2, "steps": 40}).encode()  # a batch of its own, and long
    left = [0]

    def call(k: int, tally: Tally) -> None:
        rng = random.Random(k)
        for i in range(times):
            with Wire(s.url, timeout=20) as wire:
                if rng.random() < 0.3:
                    left[0] += 1
                    head = ["Content-Type: application/json", f"Content-Length: {len(body)}"]
                    wire.socket.sendall(wire.head("POST", "/api/paint?wait=true", head) + body)
                    time.sleep(rng.random() * 0.1)
                else:
                    tally.outcomes.append(ask(wire, "native", f"c{k}", f"{k} stays {i}", i, 2))

    return together([lambda t, k=k: call(k, t) for k in range(callers)], 30), left[0]  # type: ignore[misc]


def test_l7_a_third_of_the_callers_leave(tmp_path: Path) -> None:
    """At random moments: who stays gets every image right, hardly a step is spent on those who left."""
    engine = Counting(step_s=0.004, steps=4)
    with served(engine, tmp_path / "s", limits=Limits(waiting=200)) as s:
        tally, left = leaving(s, engine, 12, 8)
        assert not tally.wrong and {t.status for t in tally.outcomes} == {200} and left > 20
        s.left()
        s.drained()
        rows = [row["status"] for row in s.service.store._rows("SELECT status FROM jobs")]
        assert rows.count("completed") >= len(tally.outcomes) and set(rows) <= {"completed", "cancelled"}
        print(f"\nL7: {engine.wasted} of {engine.rows} rows wasted, {rows.count('cancelled')} cancelled")
        assert engine.wasted <= 0.05 * engine.rows


def test_an_engine_that_does_not_stop_is_found(tmp_path: Path) -> None:
    """The control of L7's last bound."""
    engine = Deaf(step_s=0.004, steps=4)
    with served(engine, tmp_path / "s", limits=Limits(waiting=200)) as s:
        leaving(s, engine, 4, 8)
        s.drained()
    assert engine.wasted > 0.2 * engine.rows


# ---- L9 ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_l9_a_signal_under_load(server: Running) -> None:
    """SIGTERM with 32 in flight: not ready within a second, alive to the end, new ones told when to come back,
    everyone who was in hand has his images, and the process ends with 0."""
    measured = told_to_end(server.url, server.process.terminate)
    assert server.process.wait(120) == 0
    assert not measured.wrong(), measured.wrong()


# ---- L3 and L5: long, measured for the docs ----------------------------------------------------


@pytest.mark.soak
def test_l3_twice_as_much_as_it_can(tmp_path: Path) -> None:
    """Arrivals at 200 % of capacity, then 50 %: goodput, quick refusals, nothing accepted is lost, recovery."""
    with running(tmp_path / "s", **BATCH) as r:
        measured = overload(r.url)
    print(f"\nL3: {measured}")
    assert not measured.wrong(), measured.wrong()


@pytest.mark.soak
def test_l5_one_who_asks_for_much(tmp_path: Path) -> None:
    """A has 500 jobs to do; B-H send one every 2 s and wait hardly longer than alone. Equals share alike."""
    with running(tmp_path / "s", **BATCH) as r:
        measured, fair = beside(r.url, BATCH["steps"] * BATCH["step_s"]), equals(r.url)
    print(f"\nL5: {measured}; Jain's index of eight equals {fair.jain:.4f}")
    assert not (wrong := measured.wrong() + fair.wrong()), wrong

"""Rows L3, L5 and L9 of docs/robustness.md: what is done to a server, what is measured, what is wrong with it.

    measured = overload(url)
    assert not measured.wrong()

Each takes an address, so that the same is done to a server of the soak for minutes (test_load) and to one with
a planted bug for seconds (test_load_controls).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from tests.helpers.loads import Tally, arriving, ask, quantile, together
from tests.helpers.raw import Wire


def _unlike(tallies: dict[str, Tally], statuses: set[int]) -> list[str]:
    """Images that were not what was asked for, and answers of other statuses."""
    problems = [f"{name}: {text}" for name, tally in tallies.items() for text in tally.wrong[:3]]
    for name, tally in tallies.items():
        if others := {t.status for t in tally.outcomes} - statuses:
            problems.append(f"{name}: answers of status {sorted(others)}")
    return problems


class Watch:
    """Asks the simplest question all the time: how late the answers come, and what they are."""

    def __init__(self, url: str, path: str = "/livez", every: float = 0.02) -> None:
        self.outcomes: list[tuple[float, float, int]] = []
        self._done, self._url, self._path, self._every = threading.Event(), url, path, every
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        with Wire(self._url) as wire:
            while not self._done.wait(self._every):
                start_time = time.monotonic()
                try:
                    status = wire.ask("GET", self._path).status
                except OSError:
                    status = 0
                self.outcomes.append((start_time, time.monotonic() - start_time, status))

    def stop(self) -> list[tuple[float, float, int]]:
        """When it was asked, for how long, and the status of each answer; 0 for none."""
        self._done.set()
        self._thread.join(10)
        return self.outcomes


# ---- L3: twice as much as it can ---------------------------------------------------------------


@dataclass
class Overload:
    """Arrivals at half the capacity, at twice that, and at half again.

    capacity  images a second, of callers in a loop
    seconds   of arrivals at twice the capacity, from `start` on
    recovery_s  seconds after which everything is as before
    """

    capacity: float
    calm: Tally
    overloaded: Tally
    after: Tally
    start: float
    seconds: float
    recovery_s: float

    @property
    def goodput(self) -> float:
        """Images within the time, as a share of the capacity."""
        end = self.start + self.seconds + 0.2
        within = sum(t.status == 200 and t.at + t.seconds <= end for t in self.overloaded.outcomes)
        return within / self.seconds / self.capacity

    @property
    def refused(self) -> float:
        """Which share was told to come back; of twice the capacity, about half must be."""
        sent = len(self.overloaded.outcomes)  # nobody: too slow a machine to say
        return sum(t.status == 429 for t in self.overloaded.outcomes) / sent if sent else 1.0

    @property
    def late(self) -> float:
        """p99 of what was asked when everything should be as before."""
        if not self.after.outcomes:
            return 0.0
        first = min(t.at for t in self.after.outcomes)
        return quantile([t.seconds for t in self.after.outcomes if t.at > first + self.recovery_s], 0.99)

    def __str__(self) -> str:
        return (
            f"capacity {self.capacity:.1f} images/s; at 200 %: goodput {100 * self.goodput:.0f} %, "
            f"{100 * self.refused:.0f} % of {len(self.overloaded.outcomes)} told to come back, "
            f"p99 {1000 * self.overloaded.seconds(0.99, 429):.0f} ms; "
            f"accepted p50 {self.overloaded.seconds(0.5):.2f}, p99 {self.overloaded.seconds(0.99):.2f} s; "
            f"at 50 %, before p99 {self.calm.seconds(0.99):.2f} s, "
            f"{self.recovery_s:g} s after the overload p99 {self.late:.2f} s"
        )

    def wrong(self) -> list[str]:
        problems = _unlike({"calm": self.calm}, {200})
        problems += _unlike({"overload": self.overloaded, "afterwards": self.after}, {200, 429})
        if self.goodput < 0.9:
            problems.append(f"goodput {100 * self.goodput:.0f} %")
        if self.refused < 0.25:
            problems.append(f"{100 * self.refused:.0f} % told to come back: too many were let in")
        if self.overloaded.seconds(0.99, 429) > 0.25:
            problems.append(f"told to come back after {self.overloaded.seconds(0.99, 429):.2f} s")
        if self.late > 2 * self.calm.seconds(0.99):
            problems.append(f"afterwards {self.late:.2f} s, before {self.calm.seconds(0.99):.2f} s")
        return problems


def overload(
    url: str, *, seconds: float = 60, callers: int = 24, full_s: float = 10, calm_s: float = 10,
    after_s: float = 20, recovery_s: float = 10,
) -> Overload:  # fmt: skip
    """Measure the capacity by so many callers in a loop, then be calm, too much, and calm again."""
    until = time.monotonic() + full_s

    def loop(k: int, tally: Tally) -> None:
        with Wire(url, timeout=60) as wire:
            while time.monotonic() < until:
                tally.outcomes.append(ask(wire, "native", f"c{k}", f"{k}", k, 1))

    full = together([lambda t, k=k: loop(k, t) for k in range(callers)], 2 * full_s)  # type: ignore[misc]
    capacity = full.images / (max(t.at + t.seconds for t in full.outcomes) - min(t.at for t in full.outcomes))
    calm = arriving(url, capacity / 2, calm_s, callers=40)
    start_time = time.monotonic()
    overloaded = arriving(url, 2 * capacity, seconds, first=10_000)
    after = arriving(url, capacity / 2, after_s, callers=60, first=50_000)
    return Overload(capacity, calm, overloaded, after, start_time, seconds, recovery_s)


# ---- L5: one who asks for much, and equals -----------------------------------------------------


@dataclass
class Beside:
    """What those who ask now and then were told, alone and beside one who asks all the time.

    batch  seconds that one takes
    hog    images that the other one had meanwhile
    """

    alone: Tally
    beside: Tally
    batch: float
    hog: int

    def __str__(self) -> str:
        return (
            f"alone p99 {self.alone.seconds(0.99):.2f} s, beside A p50 {self.beside.seconds(0.5):.2f}, p99 "
            f"{self.beside.seconds(0.99):.2f} s ({len(self.beside.outcomes)} requests); "
            f"A had {self.hog} meanwhile"
        )

    def wrong(self) -> list[str]:
        matches = _unlike({"alone": self.alone, "beside A": self.beside}, {200})
        if self.beside.seconds(0.99) > 2 * self.alone.seconds(0.99) + self.batch:
            matches.append(f"others waited: {self}")
        return matches


def beside(
    url: str, batch: float, *, light: str = "BCDEFGH", pause: float = 4, first: int = 6, times: int = 30,
    hogs: int = 24, jobs: int = 500,
) -> Beside:  # fmt: skip
    """The light ones alone, `first` requests each; then `times` each beside A, who has so many jobs to do.

    pause  seconds between two requests of a light one, at most; half of it on average
    """

    def now_and_then(who: str, times: int, tally: Tally) -> None:
        rng = random.Random(who)
        with Wire(url, timeout=60) as wire:
            for k in range(times):
                time.sleep(rng.random() * pause)
                tally.outcomes.append(ask(wire, "native", who, f"{who}{k}", k, 1))

    alone = together([lambda t, w=w: now_and_then(w, first, t) for w in light], 60)  # type: ignore[misc]
    done, over = [0], threading.Event()

    def hog(tally: Tally) -> None:
        left = iter(range(jobs))

        def item(inner: Tally) -> None:
            with Wire(url, timeout=60) as wire:
                while not over.is_set() and (k := next(left, None)) is not None:
                    while (response := ask(wire, "native", "A", f"A{k}", k, 1)).status == 429:
                        time.sleep(0.2)
                    done[0] += response.status == 200

        together([item] * hogs, 600)

    def others(tally: Tally) -> None:
        try:
            callers = [lambda t, w=w: now_and_then(w, times, t) for w in light]
            tally.outcomes += together(callers, 600).outcomes  # type: ignore[arg-type]
        finally:
            over.set()

    return Beside(alone, together([hog, others], 600), batch, done[0])


@dataclass
class Equals:
    """Images of callers who all ask for as much as they get."""

    shares: dict[str, int]
    tally: Tally

    @property
    def jain(self) -> float:
        """Jain's index of fairness: 1 when all have the same, 1 / n when one has all."""
        n = list(self.shares.values())
        return float(sum(n) ** 2 / (len(n) * sum(k * k for k in n)))

    def wrong(self) -> list[str]:
        matches = _unlike({"equals": self.tally}, {200})
        if self.jain < 0.95:
            matches.append(f"unequal: Jain's index {self.jain:.3f} of {self.shares}")
        return matches


def equals(url: str, seconds: float = 20, who: str = "ABCDEFGH", each: int = 3) -> Equals:
    """So many clients with as many callers each, all in a loop."""
    until = time.monotonic() + seconds
    shares = dict.fromkeys(who, 0)

    def equal(item: str, tally: Tally) -> None:
        with Wire(url, timeout=60) as wire:
            while time.monotonic() < until:
                response = ask(wire, "native", item, f"{item} {time.monotonic()}", 1, 1)
                shares[item] += response.status == 200
                tally.outcomes.append(response)

    callers = [lambda t, w=w: equal(w, t) for w in who for _ in range(each)]
    return Equals(shares, together(callers, seconds + 40))  # type: ignore[arg-type]


# ---- L9: a signal under load -------------------------------------------------------------------


@dataclass
class Leaving:
    """What was told to those in hand, to new ones, and to those who ask how it is, from the signal on."""

    callers: int
    signalled: float = 0.0
    in_hand: Tally = field(default_factory=Tally)
    new: list[tuple[int, str]] = field(default_factory=list)  # status, Retry-After
    alive: list[tuple[float, float, int]] = field(default_factory=list)
    ready: list[tuple[float, float, int]] = field(default_factory=list)

    def wrong(self) -> list[str]:
        """New ones and those who look: until half a second before the last one in hand was answered."""
        last = max(t.at + t.seconds for t in self.in_hand.outcomes)
        # a thread may note an answer late: the server was there until it was last seen
        last = min(last, max((at for at, _, s in self.alive if s == 200), default=last))
        matches = [f"in hand: {item}" for item in self.in_hand.wrong[:3]]
        statuses = [t.status for t in self.in_hand.outcomes]
        if statuses != [200] * self.callers:
            matches.append(f"in hand: not all had their images: {statuses}")
        if last - self.signalled < 0.5:
            matches.append("everything was over at once: nothing was seen of what follows")
        if len(self.new) != 3 or not all(status == 503 and when.isdigit() for status, when in self.new):
            matches.append(f"new ones were not told when to come back: {self.new}")
        if (observed := {s for at, _, s in self.alive if at < last - 0.5}) != {200}:
            matches.append(f"/livez: {observed}")
        ready = [s for at, _, s in self.ready if self.signalled < at < last - 0.5]
        # from some moment on never ready, however late a busy machine comes to it
        if ready and (503 not in ready or set(ready[ready.index(503) :]) != {503}):
            matches.append(f"/readyz: {set(ready)}")
        return matches


def told_to_end(url: str, signal: Callable[[], object], callers: int = 32, steps: int = 40) -> Leaving:
    """Signal when so many are in hand, two images each, and look until all of them are answered."""
    matches = Leaving(callers)

    def accepted() -> float:
        lines = looking.get("/metrics").text.splitlines()
        counts = ("minikin_jobs_total", "minikin_queue_depth ", "minikin_in_flight ")
        return sum(float(line.split()[-1]) for line in lines if line.startswith(counts))

    looking = httpx.Client(base_url=url, trust_env=False, verify=False, timeout=60)
    before = accepted()

    def call(k: int, tally: Tally) -> None:
        with Wire(url, timeout=30) as wire:
            tally.outcomes.append(ask(wire, "openai", f"c{k}", f"number {k}", k, 2, steps=steps))

    def end(tally: Tally) -> None:
        observed = (
            0  # however long a busy machine takes to send them; one on its way may be counted twice in a look
        )
        while observed < 2:
            observed = observed + 1 if accepted() >= before + callers else 0
            time.sleep(0.02)
        signal()
        matches.signalled = time.monotonic()
        time.sleep(0.3)
        with Wire(url) as wire:
            for path in ("/v1/images/generations", "/sdapi/v1/txt2img", "/api/paint"):
                try:
                    response = wire.ask("POST", path, ["Content-Type: application/json"], b'{"prompt": "a"}')
                except OSError:
                    matches.new.append((0, ""))
                else:
                    matches.new.append((response.status, response.headers.get("retry-after", "")))

    alive, ready = Watch(url), Watch(url, "/readyz")
    matches.in_hand = together([lambda t, k=k: call(k, t) for k in range(callers)] + [end], 30)  # type: ignore[misc]
    matches.alive, matches.ready = alive.stop(), ready.stop()
    return matches

"""Load on a server that runs in a process of its own: callers over bare sockets, who look at every image."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from PIL import Image

from minikin.recipes import Recipe
from minikin.server import audit
from minikin.server.engine import Concepts, JobInputs, PinnedConcept, PreparedRequest
from tests.helpers.fake_engine import FakeEngine, digest, read
from tests.helpers.raw import Wire

_SCRIPT = """
import json, pathlib, signal, sys
from minikin.server.app import create, serve, with_middleware
from minikin.server.limits import Limits
from minikin.server.service import Service
folder, port, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
sys.path.insert(0, sys.argv[4])
from tests.helpers.loads import ContentEngine
engine = ContentEngine(step_s=settings.pop("step_s", 0.0), steps=settings.pop("steps", 4))
signal.signal(signal.SIGUSR1, lambda *_: engine.go.clear() if engine.go.is_set() else engine.go.set())
service = Service([engine], pathlib.Path(folder), Limits(**settings))
serve(with_middleware(create(service)), service, "127.0.0.1", port)
"""


class ContentEngine(FakeEngine):
    """A fake engine that hashes the weights it receives, whatever SHA-256 the request states: images encode the
    SHA-256 of the file that these weights make."""

    def prepare(
        self, kind: str, recipe: Recipe, concepts: Concepts, inputs: JobInputs | None = None
    ) -> PreparedRequest:
        from minikin.perfusion.concept_file import to_bytes  # PyTorch: most of these processes see no concept

        real = {n: PinnedConcept(sha256(to_bytes(p.concept)), p.concept) for n, p in concepts.items()}
        return super().prepare(kind, recipe, real, inputs)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


_ports: list[socket.socket] = []


def free_port() -> int:
    """A port that nobody is given until this process ends; a server that reuses addresses may listen there."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    _ports.append(sock)
    return int(sock.getsockname()[1])


def start(folder: Path, port: int, **settings: Any) -> tuple[subprocess.Popen[bytes], httpx.Client]:
    """A process that serves, and a client of it; settings: step_s, steps, and limits by name.

    SIGUSR1 holds its engine, and lets it go on."""
    here = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(folder), str(port), json.dumps(settings), here]
    )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, verify=False, timeout=20)
    end = time.monotonic() + 180  # of which a machine that others use may need much for the imports alone
    while time.monotonic() < end and process.poll() is None:
        try:
            if client.get("/readyz").status_code == 200:
                return process, client
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the server did not start")


@dataclass
class Running:
    """A server in a process of its own."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    url: str

    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * 4096


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Running]:
    """Run a server inside; afterwards it has ended with 0, and its audit finds nothing."""
    port = free_port()
    process, client = start(folder, port, **settings)
    try:
        yield Running(process, client, f"http://127.0.0.1:{port}")
        process.terminate()
        assert process.wait(40) == 0
    finally:
        process.kill()
        process.wait()
        client.close()
    wrong = audit.problems(folder)
    assert not wrong, wrong


class Outcome(NamedTuple):
    """One answer: seconds from when it should have been asked; what was wrong with its images, or ""; the
    contents it says they show, by name."""

    at: float
    seconds: float
    status: int
    images: int
    wrong: str
    concepts: dict[str, str] = {}


def ask(
    wire: Wire, dialect: str, who: str, prompt: str, seed: int, n: int, *, steps: int | None = None
) -> Outcome:
    """One request that holds the line; every image is compared with what it must show."""
    start = time.monotonic()
    path, body = {
        "native": ("/api/paint?wait=true", {"n": n, "steps": steps}),
        "openai": ("/v1/images/generations", {"n": n, "size": "64x64", "num_inference_steps": steps}),
        "a1111": ("/sdapi/v1/txt2img", {"batch_size": n, "width": 64, "height": 64, "steps": steps}),
    }[dialect]
    body_ = {"prompt": prompt, "seed": seed, **{k: v for k, v in body.items() if v is not None}}
    head = ["Content-Type: application/json", f"X-Minikin-Client: {who}"]
    answer = wire.ask("POST", path, head, json.dumps(body_).encode())
    seconds = time.monotonic() - start
    if answer.status != 200:
        return Outcome(
            start, seconds, answer.status, 0, "" if answer.status == 429 else answer.body.decode()[:300]
        )
    answer_json = json.loads(answer.body)
    if dialect == "native":
        files = [wire.ask("GET", r["url"], head[1:]).body for r in answer_json["results"]]
        concepts = answer_json["concepts"]
    elif dialect == "openai":
        files, concepts = (
            [base64.b64decode(d["b64_json"]) for d in answer_json["data"]],
            answer_json["concepts"],
        )
    else:
        files = [base64.b64decode(i) for i in answer_json["images"]]
        concepts = json.loads(answer_json["info"])["concepts"]
    expected = [digest(prompt, "", concepts, seed + k) for k in range(n)]
    decoded = [read(Image.open(io.BytesIO(f))) for f in files]
    wrong = "" if decoded == expected else f"{who}: {prompt} {seed} of {concepts}"
    return Outcome(start, seconds, 200, len(files), wrong, concepts)


@dataclass
class Tally:
    """The outcomes of all clients' requests."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        return [t.wrong for t in self.outcomes if t.wrong]

    @property
    def images(self) -> int:
        return sum(t.images for t in self.outcomes)

    def seconds(self, share: float, status: int = 200) -> float:
        """This share of the answers came within so many seconds."""
        return quantile([t.seconds for t in self.outcomes if t.status == status], share)


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def together(callers: Sequence[Callable[[Tally], None]], seconds: float) -> Tally:
    """All callers at once, each in a thread; everyone must come to an end."""
    tally, failed = Tally(), list[BaseException]()

    def run(caller: Callable[[Tally], None]) -> None:
        try:
            caller(tally)
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=run, args=(c,), daemon=True) for c in callers]
    for t in threads:
        t.start()
    for t in threads:
        t.join(seconds + 60)
    assert not failed, failed[0]
    assert not any(t.is_alive() for t in threads), "a caller never got its answer"
    return tally


def arriving(url: str, rate: float, seconds: float, callers: int = 160, first: int = 0) -> Tally:
    """An open loop: requests at their times, whatever became of those before; images are timed from then."""
    due: queue.Queue[tuple[float, int] | None] = queue.Queue()
    start = time.monotonic() + 0.2
    for k in range(max(1, int(rate * seconds))):
        due.put((start + k / rate, first + k))
    for _ in range(callers):
        due.put(None)

    def call(tally: Tally) -> None:
        with Wire(url, timeout=60) as wire:
            while (item := due.get()) is not None:
                at, k = item
                time.sleep(max(0.0, at - time.monotonic()))
                outcome = ask(wire, "native", f"c{k % 16}", f"number {k}", k, 1)
                late = max(0.0, outcome.at - at)
                # a refusal is the server's quickness alone; this machine is the callers', too
                seconds = outcome.seconds + (late if outcome.status == 200 else 0.0)
                tally.outcomes.append(outcome._replace(at=at, seconds=seconds))

    return together([call] * callers, seconds)

"""Every operation of the OpenAPI schema, asked with generated requests: nothing is a fault of the server's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from minikin.server import errors as server_faults
from minikin.server.engine import PreparedRequest
from minikin.server.limits import Limits
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import Served, served

schemathesis = pytest.importorskip("schemathesis", reason="needs the extra minikin[dev]")
response_schema_conformance = pytest.importorskip(
    "schemathesis.specs.openapi.checks"
).response_schema_conformance
SMALL = Limits(most_side=128, images=2, waiting=500, waiting_per_client=500)
NO_INPUT = {  # without a parameter or a body: asked once each
    "GET /livez", "GET /readyz", "GET /metrics", "GET /api/capabilities", "GET /v1/models",
    *(f"GET /sdapi/v1/{name}" for name in (
        "cmd-flags embeddings face-restorers hypernetworks latent-upscale-modes loras memory options "
        "prompt-styles realesrgan-models samplers schedulers script-info scripts sd-models sd-modules sd-vae "
        "upscalers"
    ).split()),
    *(f"POST /sdapi/v1/{name}" for name in (
        "extra-batch-images extra-single-image interrogate refresh-checkpoints refresh-embeddings "
        "refresh-loras refresh-vae reload-checkpoint unload-checkpoint"
    ).split()),
}  # fmt: skip
NOT_HERE = ("extra-single-image", "extra-batch-images", "interrogate", "unload-checkpoint", "reload-checkpoint")


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Served]:
    with served(FakeEngine(steps=1), tmp_path_factory.mktemp("schema") / "s", limits=SMALL) as s:
        yield s
        s.drained()


def operations(s: Served) -> list[Any]:
    schema = schemathesis.openapi.from_url(f"{s.url}/openapi.json")
    return [matches.ok() for matches in schema.get_all_operations()]


def send_examples(operation: Any, examples: int, look: Callable[[Any, Any], None]) -> int:
    """Send generated requests, the same ones every time; how many."""
    n = 0

    def ask(case: Any) -> None:
        nonlocal n
        look(case, case.call(timeout=60))
        n += 1

    def half(mode: schemathesis.GenerationMode, number: int) -> None:
        item = given(case=operation.as_strategy(generation_mode=mode))(ask)
        settings(max_examples=examples // 2, deadline=None, database=None, phases=[Phase.generate],
                 suppress_health_check=list(HealthCheck))(seed(number)(item))()  # fmt: skip

    half(schemathesis.GenerationMode.POSITIVE, 0)
    try:
        half(schemathesis.GenerationMode.NEGATIVE, 0)
    except Exception as e:
        if "Cannot generate negative" not in str(e) and type(e).__name__ not in ("Unsatisfiable", "SkipTest"):
            raise
        if n > 1:  # its only input is a piece of its path, where any text is as the schema says
            half(schemathesis.GenerationMode.POSITIVE, 1)
    return n


def faults(s: Served, examples: int, only: str = "") -> tuple[Counter[int], dict[str, int], list[str]]:
    """Statuses that were answered, how often each operation was asked, and what was wrong, a line each."""
    observed, times, wrong = Counter[int](), dict[str, int](), list[str]()

    def look(case: Any, response: Any) -> None:
        observed[response.status_code] += 1
        where = f"{case.method} {case.path}"
        if response.status_code >= 500 and not (response.status_code == 501 and case.path.endswith(NOT_HERE)):
            wrong.append(f"{where}: {response.status_code} {response.text[:200]}")
        if response.status_code == 409 or "x-request-id" not in response.headers:
            wrong.append(f"{where}: {response.status_code} breaks the contract of all answers")
        if (
            response.status_code >= 400
            and response.text
            and case.method != "HEAD"
            and "error" not in response.json()
        ):
            wrong.append(f"{where}: an error without an envelope: {response.text[:200]}")
        try:
            case.validate_response(response, checks=[response_schema_conformance])
        except (AssertionError, BaseExceptionGroup) as e:
            wrong.append(f"{where}: {response.status_code} is not as the schema says: {str(e)[:200]}")

    matches = operations(s)
    assert len(matches) > 50
    for operation in (item for item in matches if only in item.label):
        times[operation.label] = send_examples(operation, examples, look)
    return observed, times, wrong


@pytest.mark.slow
@pytest.mark.parametrize("examples", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_no_request_of_the_schema_is_a_fault(server: Served, examples: int) -> None:
    """So many examples of each operation, half as the schema says and half not: no 5xx, no 409, envelopes;
    every answer is as the schema says."""
    observed, times, wrong = faults(server, examples)
    print(dict(observed))
    assert times == {**dict.fromkeys(times, examples), **dict.fromkeys(NO_INPUT, 1)}
    assert not wrong, "\n".join(dict.fromkeys(wrong))
    assert observed[200] > 2 * examples and observed[422] > 6 * examples, observed


def test_the_generated_requests_find_planted_faults(tmp_path: Path) -> None:
    """The control: an engine that falls over a large seed is found among few requests."""

    class Falling(FakeEngine):
        def prepare(self, *args: Any, **kwargs: Any) -> PreparedRequest:
            if args[1].seed > 1000:
                raise ZeroDivisionError
            return super().prepare(*args, **kwargs)

    statuses: list[int] = []
    with served(Falling(steps=1), tmp_path / "s", limits=SMALL) as s:
        (paint,) = (o for o in operations(s) if o.label == "POST /v1/images/generations")
        send_examples(paint, 20, lambda case, response: statuses.append(response.status_code))
    assert 500 in statuses


def test_answers_that_are_not_as_the_schema_says_are_found(server: Served, monkeypatch: Any) -> None:
    """The control of the schema check: an envelope with one field more."""
    real = server_faults.error_body
    monkeypatch.setattr(server_faults, "error_body", lambda *a, **k: {**real(*a, **k), "more": 1})
    _, times, wrong = faults(server, 4, "GET /api/results")
    assert times == {"GET /api/results/{id}": 4} and len(wrong) == 4 and "not as the schema says" in wrong[0]

"""Rows H9-H11 of docs/robustness.md: numbers, prompts and JSON that an open port is sent.

Who gets at what (H1-H8): test_open_port.py; how much, how fast and how long: test_open_port_limits.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from minikin.errors import MinikinError
from minikin.models.prompt import concept_tags, parse
from tests.helpers.clocks import cpu
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import Served, served


@pytest.fixture(scope="module")
def port(tmp_path_factory: Any) -> Iterator[Served]:
    with served(FakeEngine(), tmp_path_factory.mktemp("values") / "s", keys=["a-key"]) as s:
        yield s


@pytest.fixture(scope="module")
def client(port: Served) -> Iterator[httpx.Client]:
    with port.client(headers={"X-API-Key": "a-key"}) as c:
        yield c


# ---- H9 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/api/paint", {"n": 11}, "at most 10 images"), ("/api/paint", {"n": 10**6}, "at most 1000"),
        ("/api/paint", {"steps": 51}, "at most 50 steps"), ("/api/paint", {"steps": 10**4}, "at most 1000"),
        ("/api/paint", {"width": 16_384, "height": 16_384}, "at most 4096"),
        ("/api/paint", {"size": "2048x4096"}, "64 to 2048"), ("/api/paint", {"width": 32}, "64 to 2048"),
        ("/api/paint", {"n": 10, "size": "2048", "steps": 50}, "2097 megapixel-steps"),
        ("/api/paint", {"seed": 2**63}, "seed"), ("/api/paint", {"guidance": 1e9}, "guidance"),
        ("/v1/images/generations", {"n": 11}, "at most 10"),
        ("/v1/images/generations", {"size": "16384x16384"}, "at most 4096"),
        ("/v1/images/generations", {"num_inference_steps": 10**4}, "at most 1000"),
        ("/sdapi/v1/txt2img", {"batch_size": 10, "n_iter": 10}, "at most 10 images"),
        ("/sdapi/v1/txt2img", {"n_iter": 10**9}, "n_iter"),
        ("/sdapi/v1/txt2img", {"width": 10**9}, "at most 4096"), ("/sdapi/v1/txt2img", {"steps": -1}, "steps"),
    ],
)  # fmt: skip
def test_h09_too_much_is_refused_before_it_waits(
    port: Served, client: httpx.Client, path: str, body: dict[str, Any], words: str
) -> None:
    before = len(port.service.store._rows("SELECT id FROM jobs"))
    response = client.post(path, json={"prompt": "a", **body})
    assert response.status_code == (400 if path.startswith("/v1") else 422), response.text
    assert words in response.text
    assert len(port.service.store._rows("SELECT id FROM jobs")) == before


# ---- H10 ---------------------------------------------------------------------------------------

NASTY = {
    "tags": "<concept:tom>" * 100_000, "open tags": "<" * 32_000, "at": "<tom" + "@left" * 6_000 + ">",
    "hashes": "<tom@sha256:" * 2_600, "weights": "(" * 16_000 + "a" + ")" * 16_000, "brackets": "[" * 32_000,
    "numbers": "(a:1." + "1" * 31_000 + ")", "escapes": "\\" * 32_000, "commas": "<tom@" + "1," * 15_000 + ">",
    "loras": "<lora:a:1>" * 3_200, "spaces": "a" + " " * 31_000 + "b", "zalgo": "a" + "\u0301" * 31_000,
}  # fmt: skip


@pytest.mark.parametrize("name", NASTY)
def test_h10_prompts_are_read_in_linear_time(client: httpx.Client, name: str) -> None:
    """Answered, never a 5xx; half as long takes about half as long."""
    text = NASTY[name]
    for body in ({"prompt": text[:32_000]}, {"prompt": "a", "negative": text[:32_000]}):
        start_time = cpu()  # of the server's threads, too
        response = client.post("/api/paint?wait=true", json=body)
        assert response.status_code in (200, 422), response.text[:200]
        assert cpu() - start_time < 2
    too_long = client.post("/api/paint", json={"prompt": (text + " " * 32_001)[:32_001]})
    assert too_long.status_code == 422 and "32000" in too_long.text
    for reader in (concept_tags, lambda p: parse(p, {"tom": "cat"})):
        quarter, whole = (min(seconds(reader, text[:n]) for _ in range(3)) for n in (8_000, 32_000))
        assert whole < max(0.3, 8 * quarter), (quarter, whole)  # 4.4 s where each tag looked at all before it


def seconds(reader: Any, text: str) -> float:
    """Of this thread, until it is read, or refused by one of our own errors."""
    start_time = time.thread_time()
    with suppress(MinikinError):
        reader(text)
    return time.thread_time() - start_time


def test_h10_a_prompt_of_ten_megabytes(client: httpx.Client) -> None:
    """No such call carries an image: more than 1 MiB is not read at all."""
    start_time = cpu()
    for path, status in (("/api/paint", 422), ("/v1/images/generations", 400), ("/sdapi/v1/txt2img", 422)):
        for n, expected in ((5_000_000, 413), (500_000, status)):
            response = client.post(path, json={"prompt": "a " * n})
            assert response.status_code == expected and len(response.content) < 1000, response.text[:300]
    assert cpu() - start_time < 3


# ---- H11 ---------------------------------------------------------------------------------------

NO_JSON = [
    b'{"prompt": NaN}', b'{"prompt": "a", "guidance": 1e999}', b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": "a", "guidance": -Infinity}', b"[" * 100_000, b'{"a":' * 100_000,
    b'{"prompt": "a", "points": ' + b"[" * 50 + b"]" * 50 + b"}", b"{", b"\xff", b"", b"\xef\xbb\xbf{}",
    b'{"prompt": "\\ud800"}', b'{"seed": ' + b"9" * 5000 + b', "prompt": "a"}', b'{"prompt": "a"} {}',
    b"{'prompt': 'a'}", b'{"prompt": "a",}', b'{"prompt": "\x00"}', "{\"prompt\": \"a\"}".encode("utf-16"),
]  # fmt: skip


@pytest.mark.parametrize("path", ["/api/paint", "/v1/images/generations", "/sdapi/v1/txt2img"])
def test_h11_json_that_is_none(client: httpx.Client, path: str) -> None:
    for raw in NO_JSON:
        response = client.post(path, content=raw, headers={"content-type": "application/json"})
        assert response.status_code in ((400,) if raw else (400, 422)), (raw[:40], response.text)
        error = response.json()["error"]
        assert not raw or (error if isinstance(error, str) else error["code"]) == "invalid_json", (
            raw[:40],
            error,
        )


@pytest.mark.parametrize(
    "body", [{"prompt": 5}, {"prompt": None}, {"prompt": ["a"]}, {"prompt": {"a": 1}}, [], "a", 5, None, True,
             {"prompt": "a", "seed": "x"}, {"prompt": "a", "seed": 1.5}, {"prompt": "a", "n": True},
             {"prompt": "a", "concepts": []}, {"prompt": "a", "concepts": {"tom": 5}}]
)  # fmt: skip
def test_h11_values_of_another_type(client: httpx.Client, body: Any) -> None:
    for path in ("/api/paint", "/v1/images/generations", "/sdapi/v1/txt2img"):
        response = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert response.status_code in (400, 422) or (response.is_success and isinstance(body, dict)), (
            path,
            response.text,
        )
        if isinstance(body, dict) and body.get("n") is True and path != "/sdapi/v1/txt2img":
            assert not response.is_success

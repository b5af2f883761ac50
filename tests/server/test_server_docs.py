"""The lines of docs/server.md run as they stand, against a server started by the command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from minikin.server import audit, job_types
from minikin.server.limits import Limits
from tests.helpers.loads import free_port

DOCS = Path(__file__).parents[2] / "docs" / "server.md"


@pytest.mark.slow
def test_copy_and_paste(tmp_path: Path, monkeypatch: Any) -> None:
    port = free_port()
    starter = "from minikin.cli.app import main; main()"
    arguments = ["serve", "--port", str(port), "--folder", str(tmp_path / "s")]
    server = subprocess.Popen([sys.executable, "-c", starter, *arguments])
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 240
        while time.monotonic() < end:
            try:
                if httpx.get(f"{url}/readyz", trust_env=False, verify=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        else:
            pytest.fail("the server was not ready in 240 s")
        text = DOCS.read_text()
        monkeypatch.chdir(tmp_path)
        shell = next(b for b in re.findall(r"```sh\n(.*?)```", text, re.S) if "curl" in b)
        if shutil.which("curl"):
            env = {**os.environ, "URL": url, "no_proxy": "127.0.0.1"}
            subprocess.run(["bash", "-ec", shell], check=True, env=env)
            assert Image.open("cat.png").size == (128, 128)
        blocks = re.findall(r"```python\n(.*?)```", text, re.S)
        assert len(blocks) == 2
        for block in blocks:
            exec(block, {"URL": url})
        assert Image.open("cat-a1111.png").size == (128, 128)
    finally:
        server.terminate()
    assert server.wait(30) == 0
    assert audit.problems(tmp_path / "s") == []


def test_the_page_names_every_kind_and_the_limits() -> None:
    text = DOCS.read_text()
    assert {"/api/paint", "/api/refine", "/api/inpaint"} <= set(re.findall(r"/api/\w+", text))
    assert set(job_types.JOB_TYPES) == {"paint", "refine", "inpaint", "teach", "masks"}
    limits = Limits()
    for message in (f"{limits.body >> 20} MiB", f"{limits.waiting}, {limits.waiting_per_client}; ",
                 f"{limits.images}; {limits.steps}; {limits.least_side} to {limits.most_side} px",
                 f"{limits.batch} images", f"{limits.queue_wait_s:.0f} s", "1,500"):  # fmt: skip
        assert message in text, message


def test_serving_others_without_a_key_is_refused() -> None:
    code = "from minikin.cli.app import main; main()"
    response = subprocess.run(
        [sys.executable, "-c", code, "serve", "--host", "0.0.0.0"], capture_output=True, text=True, check=False
    )
    assert response.returncode == 2 and "Refusing to listen on 0.0.0.0" in response.stderr

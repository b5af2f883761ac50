"""axe-core, which looks for what a screen reader or a keyboard cannot use; fetched from npm, in no wheel."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

VERSION = "4.10.3"
SHA256 = "880970c081707360e64f34cea25ff91892f5bc95675b0776925b9709dd8a68bb"
GRAVE = ("serious", "critical")


def source() -> str:
    """The script; skips the test, or fails it in CI, where npm is not here or reaches no registry."""
    why = f"axe-core {VERSION} did not come from npm: the page's accessibility was not checked with it"
    if script := _script():
        return script
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(why)
    pytest.skip(why)


@functools.cache
def _script() -> str:
    """The script, or "" where it did not come; npm is asked once."""
    npm = shutil.which("npm")
    with tempfile.TemporaryDirectory() as folder:
        if npm and _packed(npm, folder):
            (package,) = Path(folder).glob("*.tgz")
            with tarfile.open(package) as file:
                member = file.extractfile("package/axe.min.js")
                assert member is not None
                data = member.read()
            assert hashlib.sha256(data).hexdigest() == SHA256
            return data.decode()
    return ""


def _packed(npm: str, folder: str) -> bool:
    patience = ["--fetch-retries=1", "--fetch-timeout=20000"]  # ms
    command = [npm, "pack", "--silent", *patience, f"axe-core@{VERSION}"]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def grave(page: Any) -> list[str]:
    """What axe-core calls serious or critical: the rule, and the element."""
    if not page.evaluate("Boolean(window.axe)"):
        page.evaluate(source())
    violations = page.evaluate("axe.run().then(result => result.violations)")
    return [
        f"{rule['id']}: {node['html'][:120]}"
        for rule in violations if rule["impact"] in GRAVE for node in rule["nodes"]
    ]  # fmt: skip

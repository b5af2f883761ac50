"""How to install what is missing into this installation: a checkout, a wheel, or what a wheel was made of.

Minikin is not on PyPI, where somebody else could take its name: no command here fetches it from an index.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


def install_extra(name: str) -> str:
    """The command that installs an extra here."""
    where = _direct_url()
    path = (
        Path(unquote(urlsplit(where.get("url", "")).path)) if where.get("url", "").startswith("file:") else None
    )
    if path and path.exists():
        editable = "-e " if where.get("dir_info", {}).get("editable") else ""
        return f"{pip()} install {_constraints(path)}{editable}{shlex.quote(f'{path}[{name}]')}"
    return install_packages(*requirements(name))


def install_packages(*packages: str) -> str:
    """The command that installs packages here, in the tested versions where these are known."""
    return f"{pip()} install {_constraints(checkout())}{' '.join(map(shlex.quote, packages))}"


def requirements(extra: str = "") -> list[str]:
    """What an extra, or with "" Minikin itself, requires, for pip; extras in an extra are resolved."""
    rows = [r.partition(";") for r in metadata.requires("minikin") or ()]
    names: list[str] = []
    for requirement, _, marker in rows:
        match = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        if (match[1] if match else "") != extra:
            continue
        nested = re.fullmatch(r"minikin\[([\w,-]+)\]", requirement.strip().replace(" ", ""))
        names += [n for e in nested[1].split(",") for n in requirements(e)] if nested else [requirement.strip()]
    return list(dict.fromkeys(names))


def requirement_of(package: str) -> str:
    """A package with the versions that Minikin requires; the name alone when it is none of them."""
    name = re.compile(rf"{re.escape(package)}(?![\w.-])", re.IGNORECASE)
    try:
        return next((r for r in requirements() if name.match(r)), package)
    except metadata.PackageNotFoundError:
        return package


def reinstall() -> str:
    """What restores Minikin's own files: from the checkout, or from the wheel it was installed from."""
    root, where = checkout(), _direct_url()
    if root and (root / ".git").exists():
        return f"git -C {shlex.quote(str(root))} checkout -- src/minikin"
    source = shlex.quote(unquote(urlsplit(where["url"]).path)) if "url" in where else "WHEEL"
    return f"{pip()} install --force-reinstall --no-deps {source}"


def checkout() -> Path | None:
    """The folder of the checkout that this package is run from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() else None


def pip() -> str:
    """pip of the environment that runs now, which need not be the active one."""
    python = shlex.quote(sys.executable)
    if not find_spec("pip"):
        return (
            f"uv pip --python {python}" if shutil.which("uv") else f"{python} -m ensurepip && {python} -m pip"
        )
    first = shutil.which("pip")
    active = first and os.path.dirname(first) == os.path.dirname(sys.executable)
    return "pip" if active else f"{python} -m pip"


def _constraints(folder: Path | None) -> str:
    tested = folder / "constraints.txt" if folder else None
    return f"-c {shlex.quote(str(tested))} " if tested and tested.is_file() else ""


def _direct_url() -> dict[str, Any]:
    """Where Minikin was installed from, as PEP 610 records it; {} where nothing does."""
    try:
        recorded = json.loads(metadata.distribution("minikin").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return {}
    return recorded if isinstance(recorded, dict) else {}

"""python tools/audit.py [--online]: what is installed against what was tested and what is known to be bad.

Offline, by `make check`:
    pinned    constraints.txt gives one exact version for every direct dependency of pyproject.toml
    tested    what is installed of them is of that version (a warning: newer ones usually work)
    floors    nothing installed is below the versions in tools/floors.txt, where known holes were closed
Online, by --online: pip-audit besides, which asks the PyPI advisory database.

The offline part knows what tools/floors.txt knows and nothing newer: it is a floor, no audit. Exit code 1
when something is wrong.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FREE = {"minikin", "atheris", "resvg-py"}  # itself; for fuzzing and for drawing the art pack anew only


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, Version]:
    """Name -> version of the `name==version` lines; raises ValueError for any other line."""
    found = {}
    for line in (raw.partition("#")[0].strip() for raw in text.splitlines()):
        if line:
            name, equals, version = line.partition("==")
            if not equals or not version:
                raise ValueError(f"'{line}' is not NAME==VERSION")
            found[canonical(name)] = Version(version)
    return found


def floors(text: str) -> dict[str, tuple[Version, str]]:
    """Name -> (least version, why) of the `name>=version  # why` lines."""
    found = {}
    for raw in text.splitlines():
        line, _, why = raw.partition("#")
        if line.strip():
            name, _, version = line.strip().partition(">=")
            found[canonical(name)] = (Version(version.strip()), why.strip())
    return found


def wanted(pyproject: str) -> set[str]:
    """Names of the direct dependencies, those of the extras too."""
    project = tomllib.loads(pyproject)["project"]
    lines = [
        *project["dependencies"],
        *(x for extra in project["optional-dependencies"].values() for x in extra),
    ]
    return {canonical(Requirement(line).name) for line in lines} - FREE


def installed() -> dict[str, Version]:
    return {
        canonical(d.metadata["Name"]): Version(d.version)
        for d in metadata.distributions()
        if d.metadata["Name"]
    }


def problems(
    need: set[str], pinned: dict[str, Version], least: dict[str, tuple[Version, str]], there: dict[str, Version]
) -> tuple[list[str], list[str]]:
    """What is wrong, and what is only worth knowing."""
    wrong = [f"{name} is not pinned in constraints.txt" for name in sorted(need - pinned.keys())]
    for where, versions in (("constraints.txt pins", pinned), ("installed is", there)):
        wrong += [
            f"{where} {name} {versions[name]}, below {floor}: {why}"
            for name, (floor, why) in sorted(least.items())
            if name in versions and versions[name] < floor
        ]
    notes = [
        f"{name} {there[name]} is installed, tested was {version}"
        for name, version in sorted(pinned.items())
        if name in there and Version(there[name].base_version) != Version(version.base_version)
    ]
    return wrong, notes


def main() -> None:
    wrong, notes = problems(
        wanted((ROOT / "pyproject.toml").read_text()), pins((ROOT / "constraints.txt").read_text()),
        floors((ROOT / "tools" / "floors.txt").read_text()), installed(),
    )  # fmt: skip
    for note in notes:
        print(f"note: {note}")
    for problem in wrong:
        print(f"wrong: {problem}")
    print(f"dependencies: {len(wrong)} wrong, {len(notes)} other than tested")
    if "--online" in sys.argv:
        told = subprocess.run([sys.executable, "-m", "pip_audit", "--progress-spinner=off"], check=False)
        sys.exit(bool(wrong) or told.returncode)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

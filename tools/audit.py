"""Check of the installed packages: `python tools/audit.py [--online]`.

Offline, by `make check`:
    pinned    constraints.txt gives one exact version for every direct dependency of pyproject.toml
    tested    the installed version is that one (only a note, since newer versions usually work)
    floors    no installed version is below that in tools/floors.txt, which closed a known vulnerability
Online, by --online: also pip-audit, which asks the PyPI advisory database.

The offline part knows the vulnerabilities of tools/floors.txt only, so it does not replace an audit. The exit
code is 1 when a check fails.
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
    """Versions by name, of `name==version` lines. Raises ValueError for any other line."""
    versions = {}
    for line in (raw.partition("#")[0].strip() for raw in text.splitlines()):
        if line:
            name, equals, version = line.partition("==")
            if not equals or not version:
                raise ValueError(f"'{line}' is not NAME==VERSION")
            versions[canonical(name)] = Version(version)
    return versions


def floors(text: str) -> dict[str, tuple[Version, str]]:
    """Pairs (lowest version, reason) by name, of `name>=version  # reason` lines."""
    versions = {}
    for raw in text.splitlines():
        line, _, why = raw.partition("#")
        if line.strip():
            name, _, version = line.strip().partition(">=")
            versions[canonical(name)] = (Version(version.strip()), why.strip())
    return versions


def direct_dependencies(pyproject: str) -> set[str]:
    """Names of the direct dependencies, with those of the extras."""
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
    """Problems, and notes that are no problems."""
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
        direct_dependencies((ROOT / "pyproject.toml").read_text()),
        pins((ROOT / "constraints.txt").read_text()),
        floors((ROOT / "tools" / "floors.txt").read_text()),
        installed(),
    )
    for note in notes:
        print(f"note: {note}")
    for problem in wrong:
        print(f"wrong: {problem}")
    print(f"dependencies: {len(wrong)} wrong, {len(notes)} other than tested")
    if "--online" in sys.argv:
        result = subprocess.run([sys.executable, "-m", "pip_audit", "--progress-spinner=off"], check=False)
        sys.exit(bool(wrong) or result.returncode)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

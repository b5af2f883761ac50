"""python -m fuzz TARGET [libFuzzer's options]: coverage-guided fuzzing with Atheris (Linux, Python 3.11).

    pip install -e '.[fuzz]'
    python -m fuzz concept_file -max_total_time=60
    python -m fuzz prompt -max_total_time=60

New inputs that reach new code go into fuzz/found/TARGET; a crash is written to crash-HASH. Put the
smallest of either into fuzz/corpus/TARGET: the tests read everything there.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("Atheris is not installed: pip install -e '.[fuzz]' (Linux and Python 3.11).")
    with atheris.instrument_imports(include=["minikin", "json"]):
        from fuzz.targets import TARGETS
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"Which target? python -m fuzz {' | '.join(TARGETS)}")
    name = sys.argv.pop(1)
    folder = HERE / "found" / name
    folder.mkdir(parents=True, exist_ok=True)
    atheris.Setup([*sys.argv, str(folder), str(HERE / "corpus" / name)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""Old words and empty names: `python tools/words.py [PATH ...]`. Exit code 1 when one is used.

docs/glossary.md has the field's word for each. A line that needs an old word (a name in a file format or in an
API that keeps it for one version) ends in `# word: REASON`, in Markdown in `<!-- word: REASON -->`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "tools", "benchmarks", "fuzz", "docs", "README.md", "CONTRIBUTING.md", "SECURITY.md")
SUFFIXES = {".py", ".md", ".js", ".html"}
GONE = {
    r"pictures?": "image",
    r"likeness(es)?": "subject fidelity",
    r"judg(e|es|ed|ing|ement)": "evaluate, evaluation; image encoder or text encoder",
    r"towers?": "image encoder, text encoder",
    r"duets?": "two-subject test",
    r"(?<!-)sites?(?!-)": "cross-attention layer",
    r"worn|dressed|wearing": "active adapters, applied, weights_version",
    r"settled?": "resolve, resolved",
    r"overpainting|rework\w*": "img2img or inpaint request",
    r"lattice": "LCM timestep grid",
    r"telling": "training logger",
    r"gaze": "attention pooling",
    r"glimpses?": "augmentations",
    r"lookalikes?": "hard negatives",
    r"forebears": "ancestors",
    r"shel(f|ve|ves|ved)": "concept store",
    r"desk": "result writer",
    r"canar(y|ies|ied)": "fake engine",
    r"ledgers?": "audit",
    r"hastened": "with a live engine",
    r"scraps": "sub-word tokens",
    r"verbs": "commands",
    r"repair:": "fix:",
}
PARTICIPLES = frozenset(
    "found told made asked own one wanted given kept said known shown seen taught painted begun drawn named"
    "".split()
)
_WORDS = "|".join(f"(?P<w{i}>{word})" for i, word in enumerate(GONE))
_GONE = re.compile(rf"(?<![A-Za-z])(?:{_WORDS})(?![a-z])", re.IGNORECASE)
# an excuse, or a table of the job store in SQL
_EXCUSE = re.compile(r"(#|<!--|//) word: \S|\b(FROM|INTO|UPDATE) (pictures|shelf|ledger)\b")


def in_text(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, word and its replacement, for each word that went."""
    for number, line in enumerate(text.splitlines(), 1):
        if _EXCUSE.search(line):
            continue
        # camel case and snake case are words, too
        for m in _GONE.finditer(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", line).replace("_", " ")):
            yield number, m.group(), list(GONE.values())[int((m.lastgroup or "w0")[1:])]


def in_names(text: str) -> Iterator[tuple[int, str, str]]:
    """Line and name of variables, parameters and functions that are called by a participle."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        name = ""
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
        if name.strip("_").lower() in PARTICIPLES and not _EXCUSE.search(lines[node.lineno - 1]):
            yield node.lineno, name, "say what the value is"


def problems(paths: list[Path]) -> list[str]:
    """A line for each use of a word that went."""
    out = []
    for path in paths:
        text = path.read_text()
        hits = [*in_text(text), *(in_names(text) if path.suffix == ".py" else ())]
        out += [f"{path}:{line}: '{word}': {instead}" for line, word, instead in sorted(hits)]
    return out


def files(places: list[Path]) -> list[Path]:
    """Every file of these places that the check reads; this one and the glossary name the old words."""
    inside = [p for place in places for p in ([place] if place.is_file() else sorted(place.rglob("*")))]
    skipped = {"words.py", "glossary.md", "corpus", "corpus.py"}
    return [p for p in inside if p.suffix in SUFFIXES and not skipped & set(p.parts)]


def main() -> int:
    places = [Path(a) for a in sys.argv[1:]] or [ROOT / f for f in FOLDERS if (ROOT / f).exists()]
    lines = problems(files(places))
    print("\n".join(lines), end="\n" if lines else "")
    return bool(lines)


if __name__ == "__main__":
    raise SystemExit(main())

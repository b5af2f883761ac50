"""A base is configurations and tensors: folders that bring programs, or name code of their own, are not opened.

Old versions of diffusers imported any module that model_index.json names, and transformers imports what
`auto_map` names where it is told to trust it. The current ones are never told so here, but these checks do not
rely on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minikin import strict_json
from minikin.errors import BadModelFile, reason

PROGRAMS = (".py", ".pyc", ".pyd", ".pyw", ".so", ".dll", ".dylib")
LIBRARIES = ("diffusers", "transformers")
IGNORED = ("safety_checker", "feature_extractor")  # parts that are not opened
MAX_CONFIG, MAX_VALUES = 8 << 20, 200_000  # bytes and values of a configuration; tokenizers have long ones


def read_config(path: Path) -> dict[str, Any]:
    """A configuration of a base: an object of JSON. Raises BadModelFile.

    Infinity, which diffusers writes for DPM-Solver (lambda_min_clipped), is read as None.
    """
    try:
        return strict_json.read(path, kind=dict, max_bytes=MAX_CONFIG, max_values=MAX_VALUES, nan_as_null=True)
    except (OSError, strict_json.BadJson) as e:
        why = reason(e) if isinstance(e, OSError) else f"it is not sound JSON ({e})"
        raise BadModelFile(f"{path} cannot be read: {why}. Get it again.") from None


def refuse_code(path: Path, index: Any) -> None:
    """Raise BadModelFile if a folder brings programs, or asks for code from anywhere but the two libraries.

    index  what model_index.json says
    """
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise BadModelFile(
            f"{path} names a pipeline class of its own; a base that brings code is never opened."
        )
    for part, source in index.items():
        if part.startswith("_") or part in IGNORED or not isinstance(source, list) or source == [None, None]:
            continue
        if len(source) != 2 or source[0] not in LIBRARIES or not isinstance(source[1], str):
            raise BadModelFile(
                f"{path} wants its {part} from {str(source)[:80]}. Expected a class of diffusers or "
                "transformers: a base that brings code is never opened."
            )
    programs = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.suffix.lower() in PROGRAMS)
    if programs:
        raise BadModelFile(
            f"{path} brings programs ({', '.join(programs[:5])}). A base is configurations and tensors; remove "
            "them if you do not need them."
        )
    for config in sorted(path.rglob("*.json")):
        if "config" in config.name.lower() and "auto_map" in _keys(read_config(config)):
            raise BadModelFile(
                f"{config} names code of its own (auto_map); a base that brings code is never opened."
            )


def _keys(value: Any) -> Iterator[str]:
    """Every key inside a JSON value."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _keys(item)

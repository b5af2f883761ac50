"""Concept table: a CSV of concepts to teach, one row each, checked as a whole before anything starts.

    photos,name,category,steps
    photos/tom,tom,cat,
    photos/rex,rex,dog,200

Columns are `photos`, `name` and `category`, and any other field of `recipes.Teach`; an empty cell leaves the
field at its default. Paths of photos are relative to the CSV's folder.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minikin.errors import BadRecipe, MinikinError, StorageError, UnknownName
from minikin.images.photos import is_litter, load_photos
from minikin.perfusion.concept import check_category, check_name
from minikin.recipes import Teach

REQUIRED = ("photos", "name", "category")
MAX_REPORTED = 10  # invalid rows in the error message


class Row(NamedTuple):
    """One concept to teach; `source_digest` is a digest of its recipe and all its photos."""

    photos: Path
    recipe: Teach
    source_digest: str


def rows(path: Path, values: Mapping[str, Any]) -> list[Row]:
    """All rows; `values` fill fields that a row leaves empty. Raises BadRecipe with all problems."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f, strict=True)
            known_columns = ("photos", *Teach.option_names())
            for name in reader.fieldnames or ():
                if name not in known_columns:
                    raise UnknownName("column", str(name), known_columns)
            missing = [n for n in REQUIRED if n not in (reader.fieldnames or ())]
            if missing:
                raise BadRecipe(f"{path} has no column {missing[0]}. The first line names the columns: "
                                f"{','.join(REQUIRED)}, and options of `minikin teach`.")  # fmt: skip
            table = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise BadRecipe(f"{path} cannot be read as CSV: {e}.") from e
    if not table:
        raise BadRecipe(f"{path} names no concept: there is nothing below its first line.")
    checked, errors = [], []
    lines_of: dict[str, int] = {}
    for number, cells in table:
        try:
            row_ = _row(path.parent, cells, values)
            first = lines_of.setdefault(row_.recipe.name, number)
            if first != number:
                raise BadRecipe(f"The name '{row_.recipe.name}' is taken by line {first}.")
            checked.append(row_)
        except MinikinError as e:
            errors.append(f"line {number}: {e}")
    if errors:
        more = f"\n... and {len(errors) - MAX_REPORTED} more" if len(errors) > MAX_REPORTED else ""
        raise BadRecipe(f"{len(errors)} of {len(table)} rows of {path} cannot be taught; nothing was started.\n"
                        + "\n".join(errors[:MAX_REPORTED]) + more)  # fmt: skip
    return checked


def _row(beside: Path, cells: Mapping[str | Any, Any], values: Mapping[str, Any]) -> Row:
    if None in cells or None in cells.values():
        raise BadRecipe("There are more, or fewer, cells than columns.")
    values_ = {k: v.strip() for k, v in cells.items() if v.strip()}
    photos = beside / values_.pop("photos", "")
    if photos == beside:
        raise BadRecipe("The photos are missing.")
    recipe: Teach = Teach.make(**{**values, **values_})
    check_name(recipe.name)
    check_category(recipe.category)
    load_photos(photos)
    return Row(photos.resolve(), recipe, source_digest(photos, recipe))


def source_digest(photos: Path, recipe: Teach) -> str:
    """SHA-256 of the recipe and all files that a concept is taught from."""
    digest = hashlib.sha256()
    digest.update(json.dumps(recipe.model_dump(mode="json", exclude={"device"}), sort_keys=True).encode())
    files = (
        [photos]
        if photos.is_file()
        else sorted(p for p in photos.rglob("*") if p.is_file() and not is_litter(p.name))
    )
    files += [Path(recipe.captions)] if recipe.captions else []
    for file in files:
        try:
            data = file.read_bytes()
        except OSError as e:
            raise StorageError(f"{file} cannot be read: {e.strerror}.") from e
        digest.update(f"{file.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()

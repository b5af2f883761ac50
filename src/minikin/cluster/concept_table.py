"""A CSV of concepts to teach: one row each, checked whole before anything begins.

    photos,name,category,steps
    photos/tom,tom,cat,
    photos/rex,rex,dog,200

`photos`, `name` and `category`, and any other field of `recipes.Teach`; an empty cell is not given. Photos
are named from the CSV's own folder.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minikin.errors import BadRecipe, MinikinError, StorageError, UnknownName
from minikin.images.photos import load_photos
from minikin.perfusion.concept import check_category, check_name
from minikin.recipes import Teach

NEEDED = ("photos", "name", "category")
TOLD = 10  # wrong rows that are told one by one


class Row(NamedTuple):
    """One concept to teach; `asked` is a digest of its recipe and of all its photos' files."""

    photos: Path
    recipe: Teach
    asked: str


def rows(path: Path, values: Mapping[str, Any]) -> list[Row]:
    """All rows; `values` are for fields that a row leaves open. Raises BadRecipe with all that is wrong."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f, strict=True)
            known = ("photos", *Teach.model_fields)
            for name in reader.fieldnames or ():
                if name not in known:
                    raise UnknownName("column", str(name), known)
            missing = [n for n in NEEDED if n not in (reader.fieldnames or ())]
            if missing:
                raise BadRecipe(f"{path} has no column {missing[0]}. The first line names the columns: "
                                f"{','.join(NEEDED)}, and options of `minikin teach`.")  # fmt: skip
            told = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise BadRecipe(f"{path} cannot be read as CSV: {e}.") from e
    if not told:
        raise BadRecipe(f"{path} names no concept: there is nothing below its first line.")
    found, wrong = [], []
    lines_of: dict[str, int] = {}
    for number, cells in told:
        try:
            one = _row(path.parent, cells, values)
            first = lines_of.setdefault(one.recipe.name, number)
            if first != number:
                raise BadRecipe(f"The name '{one.recipe.name}' is taken by line {first}.")
            found.append(one)
        except MinikinError as e:
            wrong.append(f"line {number}: {e}")
    if wrong:
        more = f"\n... and {len(wrong) - TOLD} more" if len(wrong) > TOLD else ""
        raise BadRecipe(f"{len(wrong)} of {len(told)} rows of {path} cannot be taught; nothing was begun.\n"
                        + "\n".join(wrong[:TOLD]) + more)  # fmt: skip
    return found


def _row(beside: Path, cells: Mapping[str | Any, Any], values: Mapping[str, Any]) -> Row:
    if None in cells or None in cells.values():
        raise BadRecipe("There are more, or fewer, cells than columns.")
    given = {k: v.strip() for k, v in cells.items() if v.strip()}
    photos = beside / given.pop("photos", "")
    if photos == beside:
        raise BadRecipe("The photos are missing.")
    recipe: Teach = Teach.make(**{**values, **given})
    check_name(recipe.name)
    check_category(recipe.category)
    load_photos(photos)
    return Row(photos.resolve(), recipe, asked(photos, recipe))


def asked(photos: Path, recipe: Teach) -> str:
    """A digest of what a concept is taught from."""
    told = hashlib.sha256()
    told.update(json.dumps(recipe.model_dump(mode="json", exclude={"device"}), sort_keys=True).encode())
    files = [photos] if photos.is_file() else sorted(p for p in photos.rglob("*") if p.is_file())
    files += [Path(recipe.captions)] if recipe.captions else []
    for file in files:
        try:
            data = file.read_bytes()
        except OSError as e:
            raise StorageError(f"{file} cannot be read: {e.strerror}.") from e
        told.update(f"{file.name} {len(data)}\n".encode() + data)
    return told.hexdigest()

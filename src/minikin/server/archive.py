"""A ZIP of images that is sent while it is written: no more than one image is in memory."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import Any

from minikin.server.errors import RequestRejected


class _Pipe(io.RawIOBase):
    """A file that cannot seek; `take` hands over what was written."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def take(self) -> bytes:
        data, self._parts = b"".join(self._parts), []
        return data


def zipped(
    images: Sequence[tuple[str, dict[str, Any], str]], read: Callable[[str], bytes],
    missing: Sequence[str] = (),
) -> Iterator[bytes]:  # fmt: skip
    """The bytes of the ZIP, part by part. What is missing is listed in its `missing.txt`.

    images   file name, recipe and id of each
    read     the file of an id; an image that it refuses (RequestRejected), deleted meanwhile, is missing
    missing  ids of further images that are missing
    """
    pipe, recipes, left_out = _Pipe(), dict[str, Any](), list(missing)
    with zipfile.ZipFile(pipe, "w") as file:
        for name, recipe, id_ in images:
            try:
                data = read(id_)
            except RequestRejected:
                left_out.append(name)
                continue
            name = _free(name, recipes)
            recipes[name] = recipe
            file.writestr(name, data)
            yield pipe.take()
        file.writestr("recipes.json", json.dumps(recipes, indent=1))
        if left_out:
            file.writestr("missing.txt", "\n".join(["These images are not there any more:", *left_out, ""]))
    yield pipe.take()


def _free(name: str, taken: dict[str, Any]) -> str:
    """The name, with a number behind it where it is taken."""
    path, number, free = PurePath(name), 1, name
    while free in taken:
        number += 1
        free = f"{path.stem}-{number}{path.suffix}"
    return free

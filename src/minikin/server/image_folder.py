"""Images of a server that one person uses on their own machine: files of theirs, which only they delete.

They are written into a folder of the person's choice under the names the command line gives. The server's own
folder has a link to each, named by the image's id; so everything else reads an image as it reads any other.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from minikin import files
from minikin.errors import StorageError
from minikin.generation.output import Names, stem_of
from minikin.recipes import Paint
from minikin.server.errors import RequestRejected

SUFFIX = {"refine": "refined", "inpaint": "inpainted"}  # of the names of images made from others
KINDS = ("paint", *SUFFIX)


class ImageFolder:
    """The person's folder; raises StorageError when it cannot be written to."""

    def __init__(self, folder: Path) -> None:
        self.path = folder.expanduser().resolve()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise StorageError(f"{self.path} cannot be used for images: {e.strerror}. Choose --out.") from e
        if not os.access(self.path, os.W_OK):
            raise StorageError(f"{self.path} cannot be used for images: you have no right to write there.")

    def write(self, link: Path, data: bytes, recipe: Paint, seed: int, kind: str, source: str) -> Path:
        """Write an image under the first free name, and `link` to it; raises StorageError.

        source  file name of the image it was made from; "" where there is none
        """
        names = Names(recipe.model_copy(update={"n": 1}), self.path, stem_for(recipe.prompt, kind, source))
        while True:
            path = names.image(seed)
            try:
                link.symlink_to(path)  # first: a crash leaves a link to nothing, and no image without a link
            except OSError as e:
                raise StorageError(f"{link} cannot be written: {e.strerror}.") from e
            try:
                if files.atomic_new(path, data):
                    return path
            except StorageError:
                link.unlink(missing_ok=True)
                raise
            link.unlink(missing_ok=True)  # another program took this name meanwhile


def stem_for(prompt: str, kind: str, source: str = "") -> str:
    """How the names of a job's images begin, as those of the command line do."""
    suffix = SUFFIX.get(kind)
    return f"{Path(source).stem or stem_of(prompt)}-{suffix}" if suffix else stem_of(prompt)


def file_name(link: Path, kind: str, recipe: dict[str, Any], seed: int | None) -> str:
    """The name of an image's file for a person: where it is theirs its own, else what it would be."""
    with suppress(OSError):
        return os.path.basename(os.readlink(link))
    return f"{stem_for(str(recipe.get('prompt') or ''), kind)}-{0 if seed is None else seed}.png"


def is_kept(path: Path) -> bool:
    """Whether an image of the server's folder is a link to a person's file."""
    return path.is_symlink()


def is_gone(path: Path) -> bool:
    """Whether the person deleted or moved the file; False when its folder is away, as on a disk taken out."""
    return path.is_symlink() and not path.exists() and Path(os.readlink(path)).parent.is_dir()


def delete(path: Path, sha256: str) -> None:
    """Delete an image, with the file it links to.

    Raises OSError, and RequestRejected (507) when the folder of that file is not there.

    sha256  of the image: a file that has its name by now and another content stays
    """
    if path.is_symlink():
        file = Path(os.readlink(path))
        if not file.parent.is_dir():  # the file would come back with it, and no image would be listed for it
            raise RequestRejected(
                f"{file.name} was not deleted: its folder is not there. Bring it back (is its disk connected?) "
                "and try again.", status=507, code="storage",
            )  # fmt: skip
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256:
            file.unlink(missing_ok=True)
    path.unlink(missing_ok=True)

"""Every error a user can meet: what happened, what was expected, what to do.

The command line prints the message alone and leaves with `exit_code`; `--debug` shows the
traceback too. The HTTP faces map `code` to a status.

Exit codes: 2 usage, 3 bad input file, 4 another base, 5 out of memory, 6 diverged, 7 storage,
8 busy, 9 blocked by the content filter, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class MinikinError(Exception):
    """The root of all errors that are the user's to read."""

    exit_code = 2
    code = "error"

    def __reduce__(self) -> Any:
        """Travels between processes as it is, whatever its __init__ asks for."""
        return _same, (type(self), self.args, self.__dict__)


def reason(e: BaseException) -> str:
    """Why something failed, in the system's words: without its number, and the path named already."""
    return getattr(e, "strerror", None) or str(e)


def _same(kind: type[MinikinError], args: tuple[Any, ...], state: dict[str, Any]) -> MinikinError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class BadRecipe(MinikinError):
    """A request that cannot be carried out as asked."""

    code = "bad_recipe"


class UnknownName(BadRecipe):
    """A name of something that does not exist; says which names come nearest."""

    code = "unknown_name"

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = sorted(known)
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        message = f"Unknown {kind} '{name}'."
        if near:
            message += f" Did you mean {' or '.join(repr(n) for n in near)}?"
        message += f" Known: {', '.join(known)}." if known else f" No {kind} is known yet."
        super().__init__(f"{message} {hint}".strip())


class AssetError(MinikinError):
    """A file that belongs to Minikin itself is missing or damaged."""

    exit_code = 3
    code = "asset_damaged"


class BadPhoto(MinikinError):
    """A photo, mask or folder of photos that cannot be used."""

    exit_code = 3
    code = "bad_photo"


class BadConceptFile(MinikinError):
    """A concept file that is damaged, foreign or absurd; `code` tells programs which."""

    exit_code = 3
    code = "concept_corrupt"

    def __init__(self, message: str, code: str = "concept_corrupt") -> None:
        super().__init__(message)
        self.code = code


class BadAdapterFile(MinikinError):
    """A LoRA that is damaged, of a kind that cannot be read, or no LoRA at all."""

    exit_code = 3
    code = "adapter_corrupt"


class BadModelFile(MinikinError):
    """A base that cannot be recognised or read."""

    exit_code = 3
    code = "model_unreadable"


class BaseMismatch(MinikinError):
    """A concept meets a base it was not made for."""

    exit_code = 4
    code = "concept_base_mismatch"


class BadCredentials(MinikinError):
    """A certificate or key that Content Credentials cannot be signed with; never quotes the key."""

    exit_code = 3
    code = "bad_credentials"


class NoNetwork(MinikinError):
    """Something would have to be downloaded and cannot be."""

    exit_code = 3
    code = "no_network"


class OutOfMemory(MinikinError):
    """The device has too little memory for the request."""

    exit_code = 5
    code = "out_of_memory"


class Diverged(MinikinError):
    """Teaching produced numbers that are not finite and could not be saved by going back."""

    exit_code = 6
    code = "diverged"


class NotFinite(MinikinError):
    """An image came out as numbers that are not finite; it is never shown as a black one."""

    exit_code = 6
    code = "non_finite_output"


class StorageError(MinikinError):
    """A file cannot be written: full disk (`code` is then "storage_full"), missing rights."""

    exit_code = 7
    code = "storage"

    def __init__(self, message: str, code: str = "storage") -> None:
        super().__init__(message)
        self.code = code


def extra(name: str) -> str:
    """How to install an extra, in messages: from the checkout, as the name on an index may be a stranger's."""
    return f"`pip install -e '.[{name}]'` in the checkout of Minikin"


class Busy(MinikinError):
    """Another process works on the same output."""

    exit_code = 8
    code = "busy"


class Blocked(MinikinError):
    """The content filter lets none of the images that were asked for through."""

    exit_code = 9
    code = "content_policy_violation"

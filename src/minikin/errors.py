"""The errors of the package. A message says what happened, what was expected and what to do.

The command line prints the message and exits with `exit_code`; `--debug` adds the traceback. The HTTP APIs map
`code` to a status.

Exit codes: 2 usage, 3 bad input file, 4 another base, 5 out of memory, 6 NaN or Inf, 7 storage,
8 busy, 9 blocked by the content filter, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class MinikinError(Exception):
    """Base class of all errors with a message for the user."""

    exit_code = 2
    code = "error"

    def __reduce__(self) -> Any:
        """Pickle attributes in place of the arguments of __init__, so that errors travel between processes."""
        return _unpickle, (type(self), self.args, self.__dict__)


def reason(e: BaseException) -> str:
    """The cause of an error in the operating system's words, without error number and path."""
    return getattr(e, "strerror", None) or str(e)


def _unpickle(kind: type[MinikinError], args: tuple[Any, ...], state: dict[str, Any]) -> MinikinError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class BadRecipe(MinikinError):
    """Options that are invalid or contradict each other."""

    code = "bad_recipe"


class UnknownName(BadRecipe):
    """An unknown name; the message lists similar names."""

    code = "unknown_name"

    def __init__(self, kind: str, name: str, names: Iterable[str], hint: str = "") -> None:
        names = sorted(names)
        near = get_close_matches(name, names, n=3, cutoff=0.5)
        message = f"Unknown {kind} '{name}'."
        if near:
            message += f" Did you mean {' or '.join(repr(n) for n in near)}?"
        message += f" Known: {', '.join(names)}." if names else f" No {kind} is known yet."
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
    """A concept file that is damaged, of another format or implausible; `code` distinguishes them."""

    exit_code = 3
    code = "concept_corrupt"

    def __init__(self, message: str, code: str = "concept_corrupt") -> None:
        super().__init__(message)
        self.code = code


class BadAdapterFile(MinikinError):
    """A LoRA file that is damaged, of an unsupported kind, or not a LoRA."""

    exit_code = 3
    code = "adapter_corrupt"


class BadModelFile(MinikinError):
    """A base model whose files cannot be recognised or read."""

    exit_code = 3
    code = "model_unreadable"


class BaseMismatch(MinikinError):
    """A concept was used with a base that it was not taught for."""

    exit_code = 4
    code = "concept_base_mismatch"


class BadCredentials(MinikinError):
    """A certificate or key that cannot sign Content Credentials; the message never quotes the key."""

    exit_code = 3
    code = "bad_credentials"


class NoNetwork(MinikinError):
    """A download failed or is not possible offline."""

    exit_code = 3
    code = "no_network"


class OutOfMemory(MinikinError):
    """The device has too little memory for the request."""

    exit_code = 5
    code = "out_of_memory"


class Diverged(MinikinError):
    """Training produced NaN or Inf, also after going back to an earlier state."""

    exit_code = 6
    code = "diverged"


class NanOrInf(MinikinError):
    """Sampling or decoding produced NaN or Inf; no black image is returned in its place."""

    exit_code = 6
    code = "non_finite_output"


class StorageError(MinikinError):
    """A file cannot be written: the disk is full (`code` is "storage_full") or rights are missing."""

    exit_code = 7
    code = "storage"

    def __init__(self, message: str, code: str = "storage") -> None:
        super().__init__(message)
        self.code = code


def extra(name: str) -> str:
    """How to install an extra here, for messages; see `extras.install_extra`."""
    from minikin.extras import install_extra

    return f"`{install_extra(name)}`"


class Busy(MinikinError):
    """Another process holds the lock of the same output."""

    exit_code = 8
    code = "busy"


class Blocked(MinikinError):
    """The content filter blocked every requested image."""

    exit_code = 9
    code = "content_policy_violation"

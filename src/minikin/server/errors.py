"""Errors as answers: a status, a code and one sentence, in the words of the dialect that was spoken.

The retry contract (the openai client tries 408, 409, 429 and every 5xx twice more): only 429 and 503 are
worth another try and carry Retry-After; every other 5xx carries `x-should-retry: false`; 409 is never
used. Nothing here tells a path, a traceback or another caller's words.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from minikin import errors
from minikin.errors import MinikinError


class Refused(MinikinError):
    """What a server refuses: a status of HTTP, a code for programs, what to do for people."""

    def __init__(
        self, message: str, *, status: int, code: str, param: str | None = None, retry_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_s = status, code, param, retry_s


def not_found(what: str, name: str) -> Refused:
    """For what is not there and for what is somebody else's: the same words."""
    return Refused(f"There is no {what} '{name[:80]}'.", status=404, code="not_found")


def wrong(param: str, message: str, *, code: str = "invalid_request") -> Refused:
    """For a field that cannot be as it is: 422, or 400 where OpenAI's dialect is spoken (see `answer`)."""
    return Refused(message, status=422, code=code, param=param)


_STATUS: dict[type[MinikinError], int] = {
    errors.BadRecipe: 422, errors.BadPhoto: 422, errors.BadConceptFile: 422, errors.BadAdapterFile: 422,
    errors.BaseMismatch: 422, errors.Blocked: 422, errors.NoNetwork: 422, errors.Busy: 423,
    errors.OutOfMemory: 503, errors.StorageError: 507, errors.Diverged: 500, errors.BadModelFile: 500,
    errors.AssetError: 500,
}  # fmt: skip
PUBLIC_STORAGE = "Not enough space, or no right, to save this; nothing was overwritten."


def status_of(error: MinikinError) -> int:
    """The status of an error that a user can read; 500 for one that is nobody's in particular."""
    if isinstance(error, Refused):
        return error.status
    if error.code == "unsupported_concept_format":
        return 415
    return next((s for kind, s in _STATUS.items() if isinstance(error, kind)), 500)


def sentence_of(error: MinikinError) -> str:
    """The message, without the server's own paths."""
    return PUBLIC_STORAGE if isinstance(error, errors.StorageError) else str(error)


def internal(request_id: str) -> Refused:
    return Refused(f"Internal error. Reference {request_id}.", status=500, code="internal_error")


def dialect_of(path: str) -> str:
    if path.startswith("/v1/"):
        return "openai"
    return "a1111" if path.startswith("/sdapi/") else "native"


def body_of(dialect: str, status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The envelope that clients of this dialect read."""
    if dialect == "openai":
        return {"error": {"message": message, "type": _openai_type(status), "param": param, "code": code}}
    if dialect == "a1111":
        return {"error": code, "detail": message, "body": "", "errors": message}
    return {"error": {"code": code, "message": message, "param": param}}


def described(dialect: str) -> dict[int | str, dict[str, Any]]:
    """The same for OpenAPI, as FastAPI takes it: what every operation of this dialect may answer instead."""
    schema = _schema_of(body_of(dialect, 500, "code", "message"))
    told = {"description": "An error, in one sentence", "content": {"application/json": {"schema": schema}}}
    return {"4XX": told, "5XX": told}


def _schema_of(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {"type": "string" if value is not None else ["string", "null"]}
    parts = {name: _schema_of(part) for name, part in value.items()}
    return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}


def _openai_type(status: int) -> str:
    named = {401: "authentication", 403: "permission", 404: "not_found", 429: "rate_limit"}
    return f"{named.get(status, 'server' if status >= 500 else 'invalid_request')}_error"


def answer(error: MinikinError, path: str, request_id: str) -> Response:
    """The response for an error on this path."""
    status, dialect = status_of(error), dialect_of(path)
    if dialect == "openai" and status == 422:
        status = 400  # as theirs
    param = error.param if isinstance(error, Refused) else None
    body = body_of(dialect, status, error.code, sentence_of(error), param)
    response = Response(
        json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"), status, media_type="application/json"
    )
    response.headers["X-Request-Id"] = request_id
    for name, value in headers_of(error).items():
        response.headers[name] = value
    return response


def headers_of(error: MinikinError) -> dict[str, str]:
    status = status_of(error)
    retry = error.retry_s if isinstance(error, Refused) else None
    if retry is not None:
        return {"Retry-After": str(max(1, min(120, round(retry))))}
    if status == 408:
        return {"x-should-retry": "false", "Connection": "close"}
    if status >= 500:
        return {"x-should-retry": "false"}
    if status == 413 or error.code == "bad_request":  # nobody knows where the next request begins
        return {"Connection": "close"}
    return {"WWW-Authenticate": 'Basic realm="minikin"'} if status == 401 else {}

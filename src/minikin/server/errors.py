"""Errors as HTTP responses: a status, a code and one sentence, in the format of each API (dialect).

Retries (the openai client repeats 408, 409, 429 and every 5xx twice): only 429 and 503 are worth another try
and carry Retry-After; every other 5xx carries `x-should-retry: false`; 409 is never used. No response contains
a path, a traceback or another client's data.
"""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.responses import Response

from minikin import errors
from minikin.errors import MinikinError


class RequestRejected(MinikinError):
    """A request the server rejects: an HTTP status, a code for programs, a message for people."""

    def __init__(
        self, message: str, *, status: int, code: str, param: str | None = None, retry_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_s = status, code, param, retry_s


def not_found(what: str, name: str) -> RequestRejected:
    """404 for what does not exist and, in the same words, for what belongs to another client."""
    return RequestRejected(f"There is no {what} '{name[:80]}'.", status=404, code="not_found")


def invalid_field(param: str, message: str, *, code: str = "invalid_request") -> RequestRejected:
    """422 for an invalid field; 400 in OpenAI's dialect (see `error_response`)."""
    return RequestRejected(message, status=422, code=code, param=param)


_STATUS: dict[type[MinikinError], int] = {
    errors.BadRecipe: 422, errors.BadPhoto: 422, errors.BadConceptFile: 422, errors.BadAdapterFile: 422,
    errors.BaseMismatch: 422, errors.Blocked: 422, errors.NoNetwork: 422, errors.Busy: 423,
    errors.OutOfMemory: 503, errors.StorageError: 507, errors.Diverged: 500, errors.BadModelFile: 500,
    errors.AssetError: 500,
}  # fmt: skip
_INSTALL = re.compile(r"[^.`]*`[^`]*\bpip install [^`]*?(\[(?P<extra>[a-z]+)\]'?)?`[^.`]*\.?")
PUBLIC_STORAGE = "Not enough space, or no right, to save this; nothing was overwritten."


def status_of(error: MinikinError) -> int:
    """The HTTP status of an error; 500 for one without its own."""
    if isinstance(error, RequestRejected):
        return error.status
    if error.code == "unsupported_concept_format":
        return 415
    return next((s for kind, s in _STATUS.items() if isinstance(error, kind)), 500)


def sentence_of(error: MinikinError) -> str:
    """The message, without paths of the server: those in commands that install something are its operator's."""
    if isinstance(error, errors.StorageError):
        return PUBLIC_STORAGE
    text = str(error)
    if "pip install" not in text:
        return text
    return _INSTALL.sub(lambda m: f" It is installed where this server runs{_extra(m['extra'])}.", text)


def _extra(name: str | None) -> str:
    return f", as the extra {name}" if name else ""


def internal(request_id: str) -> RequestRejected:
    return RequestRejected(f"Internal error. Reference {request_id}.", status=500, code="internal_error")


def dialect_of(path: str) -> str:
    if path.startswith("/v1/"):
        return "openai"
    return "a1111" if path.startswith("/sdapi/") else "native"


def error_body(dialect: str, status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The JSON body of an error, as clients of this dialect expect it."""
    if dialect == "openai":
        return {"error": {"message": message, "type": _openai_type(status), "param": param, "code": code}}
    if dialect == "a1111":
        return {"error": code, "detail": message, "body": "", "errors": message}
    return {"error": {"code": code, "message": message, "param": param}}


def error_responses(dialect: str) -> dict[int | str, dict[str, Any]]:
    """The error responses of every operation of this dialect, for FastAPI's OpenAPI schema."""
    schema = _schema_of(error_body(dialect, 500, "code", "message"))
    response = {"description": "An error, in one sentence", "content": {"application/json": {"schema": schema}}}
    return {"4XX": response, "5XX": response}


def _schema_of(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {"type": "string" if value is not None else ["string", "null"]}
    parts = {name: _schema_of(part) for name, part in value.items()}
    return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}


def _openai_type(status: int) -> str:
    types = {401: "authentication", 403: "permission", 404: "not_found", 429: "rate_limit"}
    return f"{types.get(status, 'server' if status >= 500 else 'invalid_request')}_error"


def error_response(error: MinikinError, path: str, request_id: str) -> Response:
    """The HTTP response for an error on this path."""
    status, dialect = status_of(error), dialect_of(path)
    if dialect == "openai" and status == 422:
        status = 400  # as theirs
    param = error.param if isinstance(error, RequestRejected) else None
    body = error_body(dialect, status, error.code, sentence_of(error), param)
    response = Response(
        json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"), status, media_type="application/json"
    )
    response.headers["X-Request-Id"] = request_id
    for name, value in headers_of(error).items():
        response.headers[name] = value
    return response


def headers_of(error: MinikinError) -> dict[str, str]:
    status = status_of(error)
    retry = error.retry_s if isinstance(error, RequestRejected) else None
    if retry is not None:
        return {"Retry-After": str(max(1, min(120, round(retry))))}
    if status == 408:
        return {"x-should-retry": "false", "Connection": "close"}
    if status >= 500:
        return {"x-should-retry": "false"}
    if status == 413 or error.code == "bad_request":  # the start of the next request is unknown
        return {"Connection": "close"}
    return {"WWW-Authenticate": 'Basic realm="minikin"'} if status == 401 else {}

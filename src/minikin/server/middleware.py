"""Access middleware in front of all routes, mounted apps and websockets: authentication and request limits.

It checks, in this order: Host (DNS rebinding), Origin (other web pages), the API key, the content type, the
size of the body and the time it may take. Only /livez needs no key. It is pure ASGI middleware, so that
handlers notice when a client disconnects.

A key comes as `Authorization: Bearer KEY`, as the password of Basic (any user name, which separates sessions
of one key), or as `X-API-Key`. Without keys everybody on this machine is one client, unless the Basic user
name or `X-Minikin-Client` separates them.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minikin.errors import BadRecipe, MinikinError
from minikin.server import errors, metrics
from minikin.server.admission import LOCAL, key_of, most_of_key
from minikin.server.errors import RequestRejected
from minikin.server.limits import RECEIVE_RATE, Limits

PUBLIC_PATHS = ("/livez",)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_ONCE = (b"host", b"origin", b"authorization", b"x-api-key", b"content-type", b"content-length")
MIN_KEY = 16  # characters
KEY_VARIABLE = "MINIKIN_API_KEY"  # of the environment: one key, whatever is in it
_CLIENT = re.compile(r"[\w.@+-]{1,64}")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_HEADERS = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "SAMEORIGIN",
    "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip
log = logging.getLogger(__name__)


def keys_of(options: Sequence[str] | None) -> list[str]:
    """The API keys of `--api-key`, else the one in the environment; see `check_keys`."""
    variable = os.environ.get(KEY_VARIABLE)
    keys = list(options or ([] if variable is None else [variable]))
    check_keys(keys)
    return keys


def check_keys(keys: Sequence[str]) -> None:
    """Raise BadRecipe for API keys that anybody could guess, or that no header can carry."""
    for key in keys:
        if not (key.isascii() and key.isprintable() and key == key.strip()):
            problem = "has a character that no header carries: use letters, digits and punctuation of ASCII"
        elif len(key) < MIN_KEY:
            problem = f"has {len(key)} characters, so it can be guessed: {MIN_KEY} are the least"
        else:
            continue
        raise BadRecipe(
            f"An API key (--api-key or {KEY_VARIABLE}) {problem}. This makes one: "
            "python3 -c 'import secrets; print(secrets.token_urlsafe(24))'. Without a key, leave both out."
        )


def check_exposure(host: str, keys: Sequence[str], *, insecure: bool = False) -> None:
    """Raise BadRecipe for an address that other machines can reach without a key."""
    if host in LOOPBACK or keys or insecure:
        return
    try:
        if ipaddress.ip_address(host).is_loopback:
            return
    except ValueError:
        pass
    raise BadRecipe(
        f"Refusing to listen on {host} without a key: everybody who reaches it could use this machine. Give "
        "--api-key (or MINIKIN_API_KEY), or listen on 127.0.0.1."
    )


class BodyRejected(HTTPException):
    """A request rejected while its body is read; an HTTPException, which the framework lets through there."""

    def __init__(self, rejection: RequestRejected) -> None:
        super().__init__(rejection.status, str(rejection))
        self.rejection = rejection


class AccessMiddleware:
    """See the module's docstring.

    hosts    host names accepted besides those of this machine; "*" for any
    origins  other origins whose web pages may call the server
    """

    def __init__(
        self, app: ASGIApp, *, keys: Sequence[str] = (), hosts: Sequence[str] = (), origins: Sequence[str] = (),
        limits: Limits | None = None,
    ) -> None:  # fmt: skip
        self.app, self.limits = app, limits or Limits()
        if "" in keys:  # every request without a key would carry it
            raise BadRecipe("An API key is empty. Leave it out, or give one of 16 characters or more.")
        self.keys = [k.encode() for k in keys]
        self.hosts = {*LOOPBACK, *hosts}
        self.origins = set(origins)
        self._bodies: Counter[str] = Counter()  # bytes of requests at work, by key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        try:
            state["client"] = self._authenticate(scope, headers)
        except RequestRejected as e:
            metrics.REJECTED.labels(e.code).inc()
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 4000 + e.status % 1000, "reason": str(e)[:120]})
                return
            await self._reject(e, scope, receive, send, request_id)
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        await self._serve(scope, receive, send, request_id, headers)

    # ---- authentication -------------------------------------------------------------------------

    def _authenticate(self, scope: Scope, headers: dict[str, str]) -> str:
        """The client's name, or RequestRejected."""
        _check_once([name.lower() for name, _ in scope["headers"]])
        self._check_host(headers)
        self._check_origin(headers)
        if scope["path"] in PUBLIC_PATHS:
            return "anybody"
        client = self._client(headers)
        if scope["type"] == "http" and scope["method"] not in _SAFE_METHODS:
            self._check_type(headers)
            length = headers.get("content-length", "0")
            if not length.isdigit():
                raise RequestRejected("Content-Length is no number.", status=400, code="bad_request")
            if int(length) > self.limits.body:
                raise self._too_large()
        return client

    def _check_host(self, headers: dict[str, str]) -> None:
        host = _hostname(headers.get("host", ""))
        if "*" not in self.hosts and host not in self.hosts and not (self.keys and host):
            if not host:
                why = "The request's header Host is empty or missing: send the server's address in it."
                raise RequestRejected(why, status=421, code="unknown_host")
            raise RequestRejected(
                f"This server does not answer to '{host[:80]}'. Start it with --allow-host {host[:80]}.",
                status=421, code="unknown_host",
            )  # fmt: skip

    def _check_origin(self, headers: dict[str, str]) -> None:
        origin = headers.get("origin")
        other = headers.get("sec-fetch-site") == "cross-site"  # word: names of HTTP
        if origin is None and not other:
            return
        if origin in self.origins:
            return
        if origin is None or _host_of(origin) != headers.get("host", "").lower():
            raise RequestRejected(
                "Requests from other web pages are not answered.", status=403, code="foreign_origin"
            )

    def _client(self, headers: dict[str, str]) -> str:
        key, user = _credentials(headers)
        session = user or headers.get("x-minikin-client", "")
        if session and not _CLIENT.fullmatch(session):
            raise RequestRejected(
                "A client's name has up to 64 letters, digits and . @ + - _.", status=400, code="bad_client"
            )
        if not self.keys:
            return f"{LOCAL} {session}".strip()
        matching = [k for k in self.keys if hmac.compare_digest(k, key.encode("utf-8", "replace"))]
        if not matching:
            raise RequestRejected(
                "This server needs its API key: Authorization: Bearer KEY, or the password of Basic.",
                status=401, code="invalid_api_key",
            )  # fmt: skip
        return f"{hashlib.sha256(matching[0]).hexdigest()[:16]} {session}".strip()

    def _check_type(self, headers: dict[str, str]) -> None:
        content_type = headers.get("content-type", "").split(";")[0].strip().lower()
        empty = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        allowed = content_type in (
            "application/json",
            "multipart/form-data",
        )  # which routes take forms: `http.accepts_forms`
        if not (allowed or (empty and not content_type)):
            what = f"The body is '{content_type[:60]}'" if content_type else "The body has no Content-Type"
            raise RequestRejected(
                f"{what}; send application/json, or multipart/form-data where images are uploaded.",
                status=415, code="unsupported_media_type",
            )  # fmt: skip
        if (encoding := headers.get("content-encoding", "identity").strip().lower()) not in ("", "identity"):
            raise RequestRejected(
                f"The body is compressed ('{encoding[:20]}'): send it as it is, without Content-Encoding.",
                status=415, code="unsupported_encoding",
            )  # fmt: skip

    def _too_large(self) -> RequestRejected:
        return RequestRejected(
            f"The body is larger than the {self.limits.body >> 20} MiB this server reads.",
            status=413, code="body_too_large",
        )  # fmt: skip

    # ---- passing on ------------------------------------------------------------------------------

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, request_id: str, headers: dict[str, str]
    ) -> None:
        started = ended = False
        client = scope["state"]["client"]
        received, since, complete = 0, time.monotonic(), False

        async def receive_limited() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            left = self.limits.receive_s + received / RECEIVE_RATE - (time.monotonic() - since)
            try:
                message = await asyncio.wait_for(receive(), max(0.01, left))
            except TimeoutError:
                raise BodyRejected(
                    RequestRejected("The body did not arrive in time.", status=408, code="receive_timeout")
                ) from None
            received += (n := len(message.get("body", b"")))
            self._hold(client, n)
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            if received > self.limits.body:
                raise BodyRejected(self._too_large())
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal started, ended
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            if message["type"] == "http.response.start":
                started = True
                present = {k.lower() for k, _ in message["headers"]}
                extra = {"X-Request-Id": request_id, **_HEADERS}
                encoded = [(name.lower().encode(), value.encode()) for name, value in extra.items()]
                message["headers"] = [*message["headers"], *(h for h in encoded if h[0] not in present)]
                metrics.REQUESTS.labels(_route(scope), str(message["status"])).inc()
            await send(message)

        try:
            await self.app(scope, receive_limited, send_with_headers)
        except Exception as e:  # no traceback leaves the server: one sentence with a reference instead
            if isinstance(e, BodyRejected):
                e = e.rejection
            if not isinstance(e, MinikinError):
                log.exception("request %s failed", request_id)
                e = errors.internal(request_id)
            if ended:  # the framework has responded, by `http.on_unexpected`
                return
            if started:
                raise
            await self._reject(e, scope, receive, send_with_headers, request_id)
        finally:
            self._bodies[key_of(client)] -= received
            self._bodies += Counter()  # forgets keys that hold nothing

    def _hold(self, client: str, size: int) -> None:
        """Count a part of a body, which stays in memory until its request ends. Raises BodyRejected (503)."""
        key, most = key_of(client), self.limits.bodies
        self._bodies[key] += size
        if self._bodies.total() > most or self._bodies[key] > most_of_key(most, key):
            message = "The server holds too many large requests at the moment; try again."
            raise BodyRejected(RequestRejected(message, status=503, code="busy", retry_s=5))

    async def _reject(
        self, e: MinikinError, scope: Scope, receive: Receive, send: Send, request_id: str
    ) -> None:
        response: Response = errors.error_response(e, scope["path"], request_id)
        for name, value in _HEADERS.items():
            response.headers[name] = value
        await response(scope, receive, send)


def _check_once(names: list[bytes]) -> None:
    """Raise RequestRejected for a request that a proxy in front may parse differently than we do."""
    for name in _ONCE:
        if names.count(name) > 1:
            raise RequestRejected(f"The header {name.decode()} occurs twice.", status=400, code="bad_request")
    if b"content-length" in names and b"transfer-encoding" in names:
        raise RequestRejected(
            "Content-Length and Transfer-Encoding exclude each other.", status=400, code="bad_request"
        )


def _credentials(headers: dict[str, str]) -> tuple[str, str]:
    """(key, user name); "" where there is none."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip(), ""
    if scheme.lower() == "basic":
        try:
            user, _, password = base64.b64decode(value, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return "", ""
        return password, user
    return headers.get("x-api-key", ""), ""


def _host_of(origin: str) -> str:
    """The host and port of an origin; "" for one that is no URL, such as "http://["."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _hostname(host: str) -> str:
    """The host in lower case, without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        inside, _, port = host[1:].partition("]")
        return inside if port == "" or port.startswith(":") else host
    return host.rpartition(":")[0] if ":" in host else host


def _route(scope: Scope) -> str:
    """The route's pattern; unlike paths, these are a fixed set."""
    route: Any = scope.get("route")
    return str(getattr(route, "path", "none"))

"""The one gate in front of all routes, mounted apps and websockets: what it does not let in meets no code.

In this order: Host (DNS rebinding), Origin (other web pages), the API key, the content type, the size of
the body and the time it may take. Only /livez is open to everybody who gets past the first two. A pure
ASGI middleware, so that a client that goes away is noticed behind it.

A key comes as `Authorization: Bearer KEY`, as the password of Basic (any user name: it tells sessions of
one key apart), or as `X-API-Key`. Without keys everybody on this machine is one client, unless the Basic
user name or `X-Minikin-Client` tells them apart.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minikin.errors import BadRecipe, MinikinError
from minikin.server import errors as faults
from minikin.server import metrics
from minikin.server.errors import Refused
from minikin.server.limits import RECEIVE_RATE, Limits

OPEN = ("/livez",)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_ONCE = (b"host", b"origin", b"authorization", b"x-api-key", b"content-type", b"content-length")
_CLIENT = re.compile(r"[\w.@+-]{1,64}")
_SAFE = ("GET", "HEAD", "OPTIONS")
_HEADERS = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "SAMEORIGIN",
    "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip
log = logging.getLogger(__name__)


def check_exposure(host: str, keys: Sequence[str], *, insecure: bool = False) -> None:
    """Raise BadRecipe for an address that others can reach without a key."""
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


class Cut(HTTPException):
    """A body that is cut off: of the one kind that the framework lets through while it reads one."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.status, str(refused))
        self.refused = refused


class Guard:
    """See the module's text.

    hosts    names this server answers to, besides those of this machine; "*" for any
    origins  web pages of other origins that may call it
    """

    def __init__(
        self, app: ASGIApp, *, keys: Sequence[str] = (), hosts: Sequence[str] = (), origins: Sequence[str] = (),
        limits: Limits | None = None, draining: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.app, self.limits, self.draining = app, limits or Limits(), draining
        self.keys = [k.encode() for k in keys]
        self.hosts = {*LOOPBACK, *hosts}
        self.origins = set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        try:
            state["client"] = self._admit(scope, headers)
        except Refused as e:
            metrics.REJECTED.labels(e.code).inc()
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 4000 + e.status % 1000, "reason": str(e)[:120]})
                return
            await self._refuse(e, scope, receive, send, request_id)
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        await self._serve(scope, receive, send, request_id, headers)

    # ---- who may --------------------------------------------------------------------------------

    def _admit(self, scope: Scope, headers: dict[str, str]) -> str:
        """The client's name, or Refused."""
        _check_once([name.lower() for name, _ in scope["headers"]])
        self._check_host(headers)
        self._check_origin(headers)
        if scope["path"] in OPEN:
            return "anybody"
        client = self._client(headers)
        if scope["type"] == "http" and scope["method"] not in _SAFE:
            self._check_type(headers)
            length = headers.get("content-length", "0")
            if not length.isdigit():
                raise Refused("Content-Length is no number.", status=400, code="bad_request")
            if int(length) > self.limits.body:
                raise self._too_large()
        return client

    def _check_host(self, headers: dict[str, str]) -> None:
        host = _hostname(headers.get("host", ""))
        if "*" not in self.hosts and host not in self.hosts and not (self.keys and host):
            raise Refused(
                f"This server does not answer to '{host[:80]}'. Start it with --allow-host {host[:80]}.",
                status=421, code="unknown_host",
            )  # fmt: skip

    def _check_origin(self, headers: dict[str, str]) -> None:
        origin = headers.get("origin")
        other = headers.get("sec-fetch-site") == "cross-site"
        if origin is None and not other:
            return
        if origin in self.origins:
            return
        if origin is None or urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
            raise Refused("Requests from other web pages are not answered.", status=403, code="foreign_origin")

    def _client(self, headers: dict[str, str]) -> str:
        key, user = _credentials(headers)
        session = user or headers.get("x-minikin-client", "")
        if session and not _CLIENT.fullmatch(session):
            raise Refused(
                "A client's name has up to 64 letters, digits and . @ + - _.", status=400, code="bad_client"
            )
        if not self.keys:
            return f"local {session}".strip()
        found = [k for k in self.keys if hmac.compare_digest(k, key.encode("utf-8", "replace"))]
        if not found:
            raise Refused(
                "This server needs its API key: Authorization: Bearer KEY, or the password of Basic.",
                status=401, code="invalid_api_key",
            )  # fmt: skip
        return f"{hashlib.sha256(found[0]).hexdigest()[:16]} {session}".strip()

    def _check_type(self, headers: dict[str, str]) -> None:
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        empty = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        allowed = kind in ("application/json", "multipart/form-data")  # which routes take forms: `http.uploads`
        if not (allowed or (empty and not kind)):
            raise Refused(
                f"The body is '{kind[:60] or 'of no type'}'; send application/json, or multipart/form-data "
                "where images are uploaded.", status=415, code="unsupported_media_type",
            )  # fmt: skip

    def _too_large(self) -> Refused:
        return Refused(
            f"The body is larger than the {self.limits.body >> 20} MiB this server reads.",
            status=413, code="body_too_large",
        )  # fmt: skip

    # ---- letting through ------------------------------------------------------------------------

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, request_id: str, headers: dict[str, str]
    ) -> None:
        begun = ended = False
        read, since, complete = 0, time.monotonic(), False

        async def limited() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()
            left = self.limits.receive_s + read / RECEIVE_RATE - (time.monotonic() - since)
            try:
                message = await asyncio.wait_for(receive(), max(0.01, left))
            except TimeoutError:
                raise Cut(
                    Refused("The body did not arrive in time.", status=408, code="receive_timeout")
                ) from None
            read += len(message.get("body", b""))
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            if read > self.limits.body:
                raise Cut(self._too_large())
            return message

        async def told(message: Message) -> None:
            nonlocal begun, ended
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            if message["type"] == "http.response.start":
                begun = True
                own = {k.lower() for k, _ in message["headers"]}
                extra = {"X-Request-Id": request_id, **_HEADERS}
                message["headers"] = [*message["headers"], *(
                    (k.lower().encode(), v.encode()) for k, v in extra.items() if k.lower().encode() not in own
                )]  # fmt: skip
                metrics.REQUESTS.labels(_route(scope), str(message["status"])).inc()
            await send(message)

        try:
            await self.app(scope, limited, told)
        except Exception as e:  # nothing of ours passes the gate: one sentence with a reference instead
            if isinstance(e, Cut):
                e = e.refused
            if not isinstance(e, MinikinError):
                log.exception("request %s failed", request_id)
                e = faults.internal(request_id)
            if ended:  # the framework has answered, by `http.on_unexpected`
                return
            if begun:
                raise
            await self._refuse(e, scope, receive, told, request_id)

    async def _refuse(
        self, e: MinikinError, scope: Scope, receive: Receive, send: Send, request_id: str
    ) -> None:
        answer: Response = faults.answer(e, scope["path"], request_id)
        for name, value in _HEADERS.items():
            answer.headers[name] = value
        await answer(scope, receive, send)


def _check_once(names: list[bytes]) -> None:
    """Raise Refused for a request that a proxy in front may have read otherwise than we do."""
    for name in _ONCE:
        if names.count(name) > 1:
            raise Refused(f"The header {name.decode()} occurs twice.", status=400, code="bad_request")
    if b"content-length" in names and b"transfer-encoding" in names:
        raise Refused(
            "Content-Length and Transfer-Encoding exclude each other.", status=400, code="bad_request"
        )


def _credentials(headers: dict[str, str]) -> tuple[str, str]:
    """Key and user name; "" where there is none."""
    kind, _, told = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return told.strip(), ""
    if kind.lower() == "basic":
        try:
            user, _, password = base64.b64decode(told, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return "", ""
        return password, user
    return headers.get("x-api-key", ""), ""


def _hostname(host: str) -> str:
    """Without its port, in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        inside, _, port = host[1:].partition("]")
        return inside if port == "" or port.startswith(":") else host
    return host.rpartition(":")[0] if ":" in host else host


def _route(scope: Scope) -> str:
    """The route's pattern: a fixed set, unlike paths."""
    found: Any = scope.get("route")
    return str(getattr(found, "path", "none"))

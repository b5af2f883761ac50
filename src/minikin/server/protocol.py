"""uvicorn's HTTP protocol with timeouts.

uvicorn waits forever for the rest of a request's head, for a body that nobody reads any more, and for a
client that does not read the response (its issue #157). Each costs an attacker one byte now and then. Here
every connection is checked a few times per deadline and closed when

    the head of its first or next request is incomplete after `receive_s`     408, or no response
    the body of a request with a finished response still comes after that     no response
    the client has not read a byte of the response for `send_s`               no response

A body that is being read has its own deadline in the middleware, which responds in the client's dialect. When
there are more than `connections`, the one that has been sending its head for longest is closed, so that idle
sockets keep nobody out; lingering ones (see below) are closed before it, the oldest first, and after it those
kept alive between two requests, then those that are sending a body. There are never more than the process may
open files (`fitted`).

A client whose request is rejected before its body was read receives the response: a socket that is closed with
unread bytes is reset, and a reset discards the response on the client's side. So our side is closed, and
incoming bytes are discarded until the client closes too, for `LINGER_S` at most and never with more sockets
than `connections` (nginx's lingering_close).
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from minikin.errors import BadRecipe
from minikin.server import metrics
from minikin.server.errors import error_body
from minikin.server.limits import Limits

CHECKS_PER_DEADLINE = 6
SPARE_FILES = 24  # results, inputs, and the pipes of the children that decode images
MAX_ACCEPTED, LEAST_ROOM = 128, 8  # connections
LINGER_S = 2.0  # bytes in flight when we respond have arrived by then


def fitted(limits: Limits) -> tuple[Limits, int]:
    """The limits with as many connections as this process may open, and how many are accepted at once.

    Without room, asyncio writes a traceback for each connection that it could accept in one go, every second.
    The process's own limit is raised as far as the system lets it. Raises BadRecipe when too few are left.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _open_files() + SPARE_FILES + limits.connections + MAX_ACCEPTED
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = (needed if soft == resource.RLIM_INFINITY else soft) - _open_files() - SPARE_FILES
    accepted = max(1, min(MAX_ACCEPTED, room // 4))
    if room < LEAST_ROOM:
        raise BadRecipe(
            f"This process may open {soft} files (ulimit -n), which leaves no room for connections. Allow "
            "more: ulimit -n 1024."
        )
    return replace(limits, connections=min(limits.connections, room - accepted)), accepted


def _open_files() -> int:
    """Files, sockets and pipes that this process has open."""
    try:
        return len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"))
    except OSError:
        return 32


def protocol(limits: Limits) -> type[H11Protocol]:
    """The class that uvicorn's `http` setting takes."""
    return type("Protocol", (TimeoutProtocol,), {"limits": limits})


class LingeringTransport:
    """A transport whose `close` first calls `before_close`, which may keep it open for a while."""

    def __init__(self, transport: Any, before_close: Callable[[Any], bool]) -> None:
        self.real, self._before_close, self._closing = transport, before_close, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def is_closing(self) -> bool:
        return self._closing or bool(self.real.is_closing())

    def close(self) -> None:
        if not self.is_closing():
            self._closing = self._before_close(self.real)
            if not self._closing:
                self.real.close()


class TimeoutProtocol(H11Protocol):
    """One connection; see the module's docstring."""

    limits = Limits()

    def connection_made(self, transport: Any) -> None:
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            # asyncio sets it only for sockets it opened itself, uvloop always: without it, the body of a
            # response waits 40 ms until its head is acknowledged
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(LingeringTransport(transport, self._linger))  # type: ignore[arg-type]
        self._linger_timer: asyncio.TimerHandle | None = None
        self._checking: asyncio.TimerHandle | None = None
        self._wait: tuple[object, ...] = ()  # what it waits for, and since when
        self._since = self._last_progress = time.monotonic()
        self._unsent = 0
        self._close_surplus()
        self._check()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_checking()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._linger_timer is None:
            super().data_received(data)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._stop_checking()  # from here on websocket pings replace the checks
        self.transport = self.transport.real  # type: ignore[attr-defined]
        super().handle_websocket_upgrade(event)

    def _linger(self, transport: Any) -> bool:
        """Close only our side where more of the request may be in flight; returns whether it did."""
        more_to_come = self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or bool(self.conn.trailing_data[0])
        if not more_to_come or not transport.can_write_eof() or len(self.connections) > self.limits.connections:
            return False
        # set first: the client may see our end, and act on it, before this thread goes on
        self._linger_timer = self.loop.call_later(LINGER_S, transport.close)
        try:
            transport.write_eof()
        except OSError:  # the client is gone
            self._linger_timer.cancel()
            self._linger_timer = None
            return False
        if self.cycle is not None and not self.cycle.response_complete:  # stops the handler
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.flow.resume_reading()
        return True

    def _is_cut_off(self) -> bool:
        """Whether a lingering connection was aborted, and remains until the event loop removes it."""
        return bool(self.transport.real.is_closing())  # type: ignore[attr-defined]

    def shutdown(self) -> None:
        """The server ends: lingering connections are not waited for."""
        if self._linger_timer is not None:
            self.transport.real.close()  # type: ignore[attr-defined]
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Respond 400 in the native dialect to what is not HTTP; in the middle of a response, close."""
        metrics.REJECTED.labels("bad_http").inc()
        self._reject(400, "bad_http", "This is no HTTP/1.1 request.")

    # ---- timeouts ----------------------------------------------------------------------------

    def waits_for_head(self) -> bool:
        """Whether the head of a request is due and not complete."""
        due = self.cycle is None or bool(self.conn.trailing_data[0])
        return self.conn.their_state is h11.IDLE and due

    def _reads_on_after_response(self) -> bool:
        """Whether a body is still arriving after its response was sent."""
        has_response = self.cycle is not None and self.cycle.response_complete
        return self.conn.their_state is h11.SEND_BODY and has_response

    def _check(self) -> None:
        now = time.monotonic()
        self._check_receiving(now)
        self._check_sending(now)
        every = min(self.limits.receive_s, self.limits.send_s) / CHECKS_PER_DEADLINE
        self._checking = self.loop.call_later(every, self._check)

    def _check_receiving(self, now: float) -> None:
        head, rest = self.waits_for_head(), self._reads_on_after_response()
        wait = (head, rest, self.cycle)
        if wait != self._wait:
            self._wait, self._since = wait, now
        if not (head or rest) or self.transport.is_closing() or now - self._since < self.limits.receive_s:
            return
        metrics.REJECTED.labels("receive_timeout").inc()
        if head and self.conn.trailing_data[0]:
            self._reject(408, "receive_timeout", "The request did not arrive in time.")
        else:
            self.transport.abort()

    def _check_sending(self, now: float) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent < self._unsent or not unsent:
            self._last_progress = now
        self._unsent = unsent
        if now - self._last_progress >= self.limits.send_s:
            metrics.REJECTED.labels("send_timeout").inc()
            self.transport.abort()

    def _stop_checking(self) -> None:
        if self._checking is not None:
            self._checking.cancel()

    def _close_surplus(self) -> None:
        """Keep within `connections`: close the one that is missed least, or turn this new one away."""
        others, lingering = [c for c in self.connections if not isinstance(c, TimeoutProtocol)], []
        open_connections = []
        for c in self.connections:
            if isinstance(c, TimeoutProtocol) and not c.transport.is_closing():
                open_connections.append(c)
            elif isinstance(c, TimeoutProtocol) and c._linger_timer is not None and not c._is_cut_off():
                lingering.append((c._linger_timer.when(), id(c), c))
            # an aborted connection stays in `connections` until the event loop removes it
        most = self.limits.connections
        if len(open_connections) + len(lingering) + len(others) <= most:
            return
        if lingering:
            min(lingering)[2].transport.abort()
        if len(open_connections) + len(others) <= most:
            return
        metrics.REJECTED.labels("too_many_connections").inc()
        ranked = [(rank, c._since, id(c), c) for c in open_connections if (rank := c._rank()) and c is not self]
        if ranked:
            min(ranked)[3].transport.abort()
        else:
            self._reject(503, "too_many_connections", "All connections of this server are at work.", retry_s=5)

    def _rank(self) -> int:
        """How soon it is closed for another connection: 1 at first, 0 never, since its request is at work."""
        if self.waits_for_head():
            return 1
        if self.conn.their_state is h11.IDLE:  # kept alive, between two requests
            return 2
        return 3 if self.conn.their_state is h11.SEND_BODY else 0

    def _reject(self, status: int, code: str, message: str, retry_s: int | None = None) -> None:
        """Respond outside of any request, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            body = json.dumps(error_body("native", status, code, message)).encode()
            retry = ("retry-after", str(retry_s)) if retry_s else ("x-should-retry", "false")
            headers = [("content-type", "application/json"), ("content-length", str(len(body))),
                       ("connection", "close"), retry]  # fmt: skip
            for event in (
                h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()
            ):  # fmt: skip
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

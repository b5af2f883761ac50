"""HTTP on the wire: uvicorn's protocol, with an end to its patience.

uvicorn waits for ever for the rest of a request's head, for a body that nobody reads any more, and for a
caller who does not take the answer (its issue #157). Each costs an attacker one byte now and then. Here a
connection is looked at a few times in each deadline, and ended when

    its first or next request's head has not arrived after `receive_s`       408, or without a word
    the body of a request that is answered already still comes after that    without a word
    not a byte of an answer was taken for `send_s`                           without a word

A body that is being read has its own deadline in the gate, which answers in the caller's dialect. When there
are more than `connections`, the one that has been sending its head for longest makes room: sockets that say
nothing keep nobody out; but whoever lingers (below) goes first, the oldest before others.

A caller who is refused before its body was read hears why: a socket that is closed over bytes nobody took is
reset, and a reset throws away the answer the caller had not read yet. So our side is closed, and what still
comes is thrown away until the caller closes too, for `LINGER_S` at most and never with more sockets than
`connections` (nginx's lingering_close).
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from minikin.server import metrics
from minikin.server.errors import body_of
from minikin.server.limits import Limits

LOOKS = 6  # in each deadline
LINGER_S = 2.0  # what is on its way when we answer has come by then


def protocol(limits: Limits) -> type[H11Protocol]:
    """The class that uvicorn's `http` setting takes."""
    return type("Protocol", (Watched,), {"limits": limits})


class Lingering:
    """A transport that asks before it is closed: `close` is `last`, everything else the transport's own."""

    def __init__(self, transport: Any, last: Callable[[Any], bool]) -> None:
        self.real, self._last, self._closing = transport, last, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def is_closing(self) -> bool:
        return self._closing or bool(self.real.is_closing())

    def close(self) -> None:
        if not self.is_closing():
            self._closing = self._last(self.real)
            if not self._closing:
                self.real.close()


class Watched(H11Protocol):
    """One connection; see the module's text."""

    limits = Limits()

    def connection_made(self, transport: Any) -> None:
        own = transport.get_extra_info("socket")
        if own is not None and own.family in (socket.AF_INET, socket.AF_INET6):
            # asyncio sets it for sockets of its own making alone, uvloop always: without it, what follows an
            # answer's head waits 40 ms for that to be acknowledged
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(Lingering(transport, self._linger))  # type: ignore[arg-type]
        self._leaving: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None
        self._wait: tuple[object, ...] = ()  # what it waits for, and since when
        self._since = self._moved = time.monotonic()
        self._unsent = 0
        self._make_room()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_looking()
        if self._leaving is not None:
            self._leaving.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._leaving is None:
            super().data_received(data)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._stop_looking()  # from here on it is pinged
        self.transport = self.transport.real  # type: ignore[attr-defined]
        super().handle_websocket_upgrade(event)

    def _linger(self, transport: Any) -> bool:
        """Close our side alone where more of the request may be on its way; whether that was done."""
        comes = self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or bool(self.conn.trailing_data[0])
        if not comes or not transport.can_write_eof() or len(self.connections) > self.limits.connections:
            return False
        # armed first: the caller may see our end, and act on it, before this thread goes on
        self._leaving = self.loop.call_later(LINGER_S, transport.close)
        try:
            transport.write_eof()
        except OSError:  # the caller is gone
            self._leaving.cancel()
            self._leaving = None
            return False
        if self.cycle is not None and not self.cycle.response_complete:  # whoever still answers it need not
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.flow.resume_reading()
        return True

    def _is_cut_off(self) -> bool:
        """Of one that lingers: whether it was told to go, and is there until the loop comes to it."""
        return bool(self.transport.real.is_closing())  # type: ignore[attr-defined]

    def shutdown(self) -> None:
        """The server ends: nobody is waited for who was answered."""
        if self._leaving is not None:
            self.transport.real.close()  # type: ignore[attr-defined]
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is told so in the words of the others; in the middle of an answer, it is cut off."""
        metrics.REJECTED.labels("bad_http").inc()
        self._refuse(400, "bad_http", "This is no HTTP/1.1 request.")

    # ---- looking -----------------------------------------------------------------------------

    def waits_for_head(self) -> bool:
        """Whether a request has begun, or should have, and is not here."""
        begun = self.cycle is None or bool(self.conn.trailing_data[0])
        return self.conn.their_state is h11.IDLE and begun

    def _waits_for_nothing(self) -> bool:
        """Whether a body still comes that nobody reads."""
        answered = self.cycle is not None and self.cycle.response_complete
        return self.conn.their_state is h11.SEND_BODY and answered

    def _look(self) -> None:
        now = time.monotonic()
        self._check_arriving(now)
        self._check_leaving(now)
        every = min(self.limits.receive_s, self.limits.send_s) / LOOKS
        self._looking = self.loop.call_later(every, self._look)

    def _check_arriving(self, now: float) -> None:
        head, rest = self.waits_for_head(), self._waits_for_nothing()
        wait = (head, rest, self.cycle)
        if wait != self._wait:
            self._wait, self._since = wait, now
        if not (head or rest) or self.transport.is_closing() or now - self._since < self.limits.receive_s:
            return
        metrics.REJECTED.labels("receive_timeout").inc()
        if head and self.conn.trailing_data[0]:
            self._refuse(408, "receive_timeout", "The request did not arrive in time.")
        else:
            self.transport.abort()

    def _check_leaving(self, now: float) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent < self._unsent or not unsent:
            self._moved = now
        self._unsent = unsent
        if now - self._moved >= self.limits.send_s:
            metrics.REJECTED.labels("send_timeout").inc()
            self.transport.abort()

    def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.cancel()

    def _make_room(self) -> None:
        # one that was told to go is among `connections` until the loop comes to it
        here = [c for c in self.connections if isinstance(c, Watched) and not c.transport.is_closing()]
        others = [c for c in here if c is not self and c.waits_for_head()]
        leaving = [
            (c._leaving.when(), id(c), c)
            for c in self.connections
            if isinstance(c, Watched) and c._leaving is not None and not c._is_cut_off()
        ]
        if len(here) + len(leaving) > self.limits.connections and leaving:
            min(leaving)[2].transport.abort()
        elif len(here) > self.limits.connections and others:
            metrics.REJECTED.labels("too_many_connections").inc()
            min(others, key=lambda c: c._since).transport.abort()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer outside of any request, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            body = json.dumps(body_of("native", status, code, message)).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body))),
                       ("connection", "close"), ("x-should-retry", "false")]  # fmt: skip
            for event in (
                h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()
            ):  # fmt: skip
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

"""Requests as bytes over a socket of this machine: what clients' libraries would not send."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple


class Answer(NamedTuple):
    """One answer; `status` 0 when the connection was closed without one."""

    status: int
    headers: dict[str, str]
    body: bytes


class Wire:
    """One connection to a server's address, opened again when the server closed it."""

    def __init__(self, url: str, timeout: float = 30.0) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self.address, self.timeout = (host, int(port)), timeout
        self._socket: socket.socket | None = None

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    @property
    def socket(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.create_connection(self.address, timeout=self.timeout)
        return self._socket

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def head(self, method: str, path: str, headers: Iterable[str] = ()) -> bytes:
        """The head of a request for a path that is sent as it is."""
        where = f"Host: {self.address[0]}:{self.address[1]}"
        return "\r\n".join([f"{method} {path} HTTP/1.1", where, *headers, "", ""]).encode("latin-1")

    def ask(self, method: str, path: str, headers: Iterable[str] = (), body: bytes = b"") -> Answer:
        """A whole request, and its answer."""
        length = [f"Content-Length: {len(body)}"] if body or method in ("POST", "PUT") else []
        return self.send(self.head(method, path, [*headers, *length]) + body, method)

    def send(self, data: bytes, method: str = "GET", *, end: bool = False) -> Answer:
        """These bytes, perhaps the end of what is sent, and the first answer to them."""
        try:
            self.socket.sendall(data)
            if end:
                self.socket.shutdown(socket.SHUT_WR)
        except OSError:  # the server has answered, and closed, before all was sent
            pass
        return self.answer(method)

    def answer(self, method: str = "GET") -> Answer:
        matches = http.client.HTTPResponse(self.socket, method=method)
        try:
            matches.begin()
            response = Answer(matches.status, {k.lower(): v for k, v in matches.getheaders()}, matches.read())
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException):
            self.close()
            return Answer(0, {}, b"")
        if matches.will_close:
            self.close()
        return response

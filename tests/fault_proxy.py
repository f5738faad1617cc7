"""A proxy between an HTTP client and its server that misbehaves when told to.

    with FaultProxy("http://127.0.0.1:8333") as proxy:
        proxy.inject(answer(503), times=3)
        proxy.inject(cut_answer(after_bytes=1000), only="GET")
        ...  # Use proxy.endpoint in the server's place.
        assert len(proxy.requests) == 5

Faults are taken in the order in which they were injected, each by the next requests whose first
line starts with its `only`. A request that no fault is left for passes through, or meets one of
those that `proxy.trouble(...)` named, so often as that said.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedRWPair
from typing import Self
from urllib.parse import urlsplit

_BLOCK_BYTES = 2**16


@dataclass
class Exchange:
    """One request, whose head has been read, on its way through the proxy."""

    head: list[bytes]
    """The lines of the request's head, the first being `METHOD /path HTTP/1.1`."""
    client: BufferedRWPair
    server: BufferedRWPair
    closing: threading.Event
    """Set when the proxy stops."""

    def pass_request(self) -> list[bytes]:
        """Send the request on; the head of the answer to it."""
        _write(self.server, b"".join(self.head))
        if not _has(self.head, b"expect: 100-continue"):
            _copy_body(self.client, self.server, self.head)
        answer = _read_head(self.server)
        while answer and _status(answer) == 100:
            _write(self.client, b"".join(answer))
            _copy_body(self.client, self.server, self.head)
            answer = _read_head(self.server)
        return answer

    def pass_answer(self, answer: list[bytes], most_bytes: int | None = None) -> None:
        """Send the answer on, its body cut after `most_bytes`."""
        _write(self.client, b"".join(answer))
        self._copy_answers_body(self.client, answer, most_bytes)

    def drop_answer(self, answer: list[bytes]) -> None:
        self._copy_answers_body(None, answer, None)

    def _copy_answers_body(
        self, target: BufferedRWPair | None, answer: list[bytes], most_bytes: int | None
    ) -> None:
        if not self.head[0].startswith(b"HEAD") and _status(answer) not in (204, 304):
            _copy_body(self.server, target, answer, most_bytes)


class BrokenConnectionError(Exception):
    """Raised by a fault: the proxy resets the connection to the client."""


Fault = Callable[[Exchange], None]
"""Does with the exchange whatever the fault is. Returns if the connection can go on after it."""


def answer(status: int, code: str = "InjectedFault") -> Fault:
    """Answer with an error of S3's form, without asking the server."""

    def run(exchange: Exchange) -> None:
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        if not _has(exchange.head, b"expect: 100-continue"):
            _copy_body(exchange.client, None, exchange.head)
        head = f"HTTP/1.1 {status} Injected\r\nContent-Type: application/xml\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        is_head = exchange.head[0].startswith(b"HEAD")
        _write(exchange.client, head.encode() + (b"" if is_head else body))
        raise ConnectionError  # A client that was told to close has to open a new connection.

    return run


def reset(exchange: Exchange) -> None:
    """Reset the connection; the server never hears of the request."""
    raise BrokenConnectionError


def lose_answer(exchange: Exchange) -> None:
    """Let the server carry the request out, then reset the connection in place of its answer."""
    exchange.drop_answer(exchange.pass_request())
    raise BrokenConnectionError


def cut_answer(after_bytes: int, cleanly: bool = False) -> Fault:
    """Pass that much of the answer's body, then reset the connection, or close it in good order."""

    def run(exchange: Exchange) -> None:
        exchange.pass_answer(exchange.pass_request(), after_bytes)
        raise ConnectionError if cleanly else BrokenConnectionError

    return run


def delay(seconds: float) -> Fault:
    """Hold the request back for so long (or until the proxy stops), then pass it through."""

    def run(exchange: Exchange) -> None:
        exchange.closing.wait(seconds)
        exchange.pass_answer(exchange.pass_request())

    return run


def wrong_length(by: int) -> Fault:
    """Announce a body that is `by` bytes longer than it is; the connection closes in good order.

    With a negative number a range is announced shorter, though its `Content-Range` is right. Other
    answers pass as they are then: nobody could know.
    """

    def run(exchange: Exchange) -> None:
        answer = exchange.pass_request()
        length = _length(answer)
        is_head = exchange.head[0].startswith(b"HEAD")
        if is_head or length + by <= 0 or (by < 0 and not _has(exchange.head, b"range:")):
            exchange.pass_answer(answer)
            return
        lines = [line for line in answer if not line.lower().startswith(b"content-length:")]
        lines.insert(1, b"Content-Length: %d\r\n" % (length + by))
        _write(exchange.client, b"".join(lines))
        _copy_bytes(exchange.server, exchange.client, length)
        raise ConnectionError

    return run


class FaultProxy:
    """Listens on a free port of 127.0.0.1 from `__enter__` to `__exit__`."""

    def __init__(self, server: str) -> None:
        """`server`: the endpoint of the real server, such as `http://127.0.0.1:8333`."""
        parts = urlsplit(server)
        assert parts.hostname
        assert parts.port
        self._server = (parts.hostname, parts.port)
        self._lock = threading.Lock()
        self._faults: list[tuple[bytes, Fault]] = []
        self._trouble: tuple[float, Sequence[Fault]] = (0.0, ())
        self._dice = random.Random(0)
        self._sockets: set[socket.socket] = set()
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[str] = []
        """The first lines of the requests so far, those that met a fault included."""
        self.troubled = 0
        """How many of them met a fault that `trouble` named."""

    def inject(self, fault: Fault, *, times: int = 1, only: str = "") -> None:
        """Let the next `times` requests whose first line starts with `only` meet `fault`."""
        with self._lock:
            self._faults.extend([(only.encode(), fault)] * times)

    def trouble(self, share: float, *faults: Fault) -> None:
        """Let that share of the requests, drawn at random, meet one of `faults` from now on."""
        with self._lock:
            self._trouble = share, faults

    def heal(self) -> None:
        """Forget the faults that no request has met yet."""
        with self._lock:
            self._faults.clear()
            self._trouble = 0.0, ()

    @property
    def faults_left(self) -> int:
        with self._lock:
            return len(self._faults)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        with self._lock:
            open_sockets = {self._listener, *self._sockets}
        for open_socket in open_sockets:
            _shut(open_socket)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(self._server)
        with self._lock:
            self._sockets |= {client, server}
        try:
            with client.makefile("rwb") as to_client, server.makefile("rwb") as to_server:
                while head := _read_head(to_client):
                    self._exchange(Exchange(head, to_client, to_server, self._closing))
        except BrokenConnectionError:
            # Lingering for no time makes closing a reset.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except (OSError, ValueError):
            pass
        finally:
            with self._lock:
                self._sockets -= {client, server}
            client.close()
            server.close()

    def _exchange(self, exchange: Exchange) -> None:
        fault = self._next_fault(exchange.head[0])
        if fault is None:
            exchange.pass_answer(exchange.pass_request())
        else:
            fault(exchange)

    def _next_fault(self, request_line: bytes) -> Fault | None:
        with self._lock:
            self.requests.append(request_line.decode().strip())
            for position, (only, fault) in enumerate(self._faults):
                if request_line.startswith(only):
                    del self._faults[position]
                    return fault
            share, faults = self._trouble
            if self._dice.random() < share:
                self.troubled += 1
                return self._dice.choice(faults)
        return None


def _read_head(stream: BufferedRWPair) -> list[bytes]:
    """The lines up to and with the empty one; nothing if the stream ends before."""
    lines: list[bytes] = []
    while line := stream.readline():
        lines.append(line)
        if line in (b"\r\n", b"\n"):
            return lines
    return []


def _status(head: list[bytes]) -> int:
    return int(head[0].split()[1])


def _has(head: list[bytes], header: bytes) -> bool:
    return any(line.lower().startswith(header) for line in head)


def _copy_body(
    source: BufferedRWPair,
    target: BufferedRWPair | None,
    head: list[bytes],
    most_bytes: int | None = None,
) -> None:
    """Copy the body that `head` announces, or as much of it; to nowhere if `target` is None."""
    if _has(head, b"transfer-encoding: chunked"):
        _copy_chunks(source, target)
        return
    length = _length(head)
    _copy_bytes(source, target, length if most_bytes is None else min(length, most_bytes))


def _length(head: list[bytes]) -> int:
    lengths = [line for line in head if line.lower().startswith(b"content-length:")]
    return int(lengths[0].split(b":")[1]) if lengths else 0


def _copy_bytes(source: BufferedRWPair, target: BufferedRWPair | None, left: int) -> None:
    while left:
        block = source.read(min(left, _BLOCK_BYTES))
        if not block:
            raise ConnectionError
        left -= len(block)
        if target is not None:
            _write(target, block)


def _copy_chunks(source: BufferedRWPair, target: BufferedRWPair | None) -> None:
    while size_line := source.readline():
        size = int(size_line.split(b";")[0], 16)
        # The last chunk is empty; lines of trailers may follow it, and an empty line.
        chunk = source.read(size + 2) if size else b"".join(_read_head(source))
        if target is not None:
            _write(target, size_line + chunk)
        if not size:
            return


def _write(stream: BufferedRWPair, data: bytes) -> None:
    stream.write(data)
    stream.flush()


def _shut(open_socket: socket.socket) -> None:
    with suppress(OSError):
        open_socket.shutdown(socket.SHUT_RDWR)
    open_socket.close()

"""Web servers on this machine that answer as a test asks them to, mostly badly."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ENDLESS = 50_000_000  # bytes: so many that a client without a limit fails its test, so few that the test ends

Answer = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """Gives ``answers`` in turn, one per request, and the last of them from then on."""

    def __init__(self, answers: tuple[Answer, ...]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = list(answers)
        self.paths: list[str] = []  # what was asked for
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        answers = self.server.answers
        with contextlib.suppress(ConnectionError):  # the client may have had enough
            (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve(*answers: Answer) -> Iterator[Server]:
    """A server in a thread of its own; at the end every answer that still drips is broken off."""
    with Server(answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def files(folder: Path) -> Answer:
    """The file of the asked-for name, as a decent server sends it."""

    def answer(handler: Handler) -> None:
        path = folder / handler.path.rpartition("/")[2]
        (send(200, path.read_bytes()) if path.is_file() else send(404))(handler)

    return answer


def send(status: int, body: bytes = b"", **headers: object) -> Answer:
    """``body`` under its own Content-Length, or under the headers given (``_`` stands for ``-``)."""

    def answer(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in (headers or {"Content_Length": len(body)}).items():
            handler.send_header(name.replace("_", "-"), str(value))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def flood(status: int, **headers: object) -> Answer:
    """A body of ENDLESS bytes that are not announced."""
    return send(status, bytes(ENDLESS), Server="flood", **headers)


def drip(beginning: bytes, interval: float = 0.01) -> Answer:
    """``beginning``, then 500 bytes, one every ``interval`` seconds."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(beginning)
        for _ in range(500):
            if handler.server.closing.wait(interval):
                break
            handler.wfile.write(b"x")

    return answer


def stall(beginning: bytes = b"") -> Answer:
    """``beginning``, then nothing over an open connection."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(beginning)
        handler.server.closing.wait()

    return answer


def reset(handler: Handler) -> None:
    """Break the connection (RST) without an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()
    handler.connection.close()


def hang_up(handler: Handler) -> None:
    """Close the connection without an answer."""


def raw(content: bytes) -> Answer:
    """``content`` in place of an answer."""
    return lambda handler: handler.wfile.write(content) and None

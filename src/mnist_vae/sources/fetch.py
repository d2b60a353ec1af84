"""One file over HTTP, within bounds: of time, of size, of redirects, and of patience with what fails."""

import http.client
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import requests
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, MaxRetryError, ProtocolError, ReadTimeoutError

from mnist_vae.errors import UserError

TIMEOUT_S = 20.0  # to connect, until an answer begins, and between two parts of it
DEADLINE_S = 600.0  # for one file from one mirror, retries included
MIN_BYTES_PER_S = 10_000  # on average, once a file has been arriving for TIMEOUT_S
MAX_BYTES = 10_000_000  # of one file; the largest of MNIST has 9,912,422
RETRY_WAITS_S = (1.0, 4.0)  # before the second and the third attempt
MAX_REDIRECTS = 5

Content = TypeVar("Content")


class MirrorError(Exception):
    """What a mirror or a folder did instead of giving a file; the message goes on from the file's address."""

    def __init__(self, problem: str, *, silent: bool = False, passing: bool = False) -> None:
        super().__init__(problem)
        self.silent = silent  # it did not answer at all
        self.passing = passing  # another attempt may succeed


def fetch(url: str, unpack: Callable[[bytes], Content]) -> Content:
    """What ``unpack`` makes of the file at ``url``; it raises MirrorError for a file that is another one.

    Raises:
        MirrorError: the file is not there, or another one, or has not arrived after DEADLINE_S.

    In a thread, which is left behind at the deadline: a socket's own limit is per read, and a server can spread even
    the header of its answer over hours.
    """
    future: Future[Content] = Future()

    def work() -> None:
        try:
            future.set_result(_fetch_with_retries(url, unpack))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(DEADLINE_S)
    except TimeoutError as error:
        raise MirrorError(f"has not arrived after {DEADLINE_S:.0f} s") from error


def _fetch_with_retries(url: str, unpack: Callable[[bytes], Content]) -> Content:
    waits = list(RETRY_WAITS_S)
    while True:
        try:
            return unpack(_get(url))
        except MirrorError as error:
            error.silent = error.silent and len(waits) == len(RETRY_WAITS_S)  # else it answered an earlier attempt
            if not (error.passing and waits):
                raise
        time.sleep(waits.pop(0))


def _get(url: str) -> bytes:
    """The body of the answer from ``url`` as it was sent, without any decoding."""
    redirects = []

    def drop_body_of_redirect(response: requests.Response, **_: Any) -> None:
        if response.is_redirect:
            redirects.append(response)
            response.close()  # requests would read it to its end, however far that is

    with requests.Session() as session:
        session.max_redirects = MAX_REDIRECTS
        session.hooks["response"].append(drop_body_of_redirect)
        try:
            answer = session.get(url, stream=True, timeout=TIMEOUT_S, headers={"Accept-Encoding": "identity"})
            if answer.status_code != 200:
                phrase = http.client.responses.get(answer.status_code, "")
                busy = answer.status_code >= 500 or answer.status_code == 429  # 429: too many requests
                raise MirrorError(f"answers {answer.status_code} {phrase}".strip(), passing=busy)
            return _read_body(answer.raw)
        except (OSError, HTTPError, ValueError) as error:  # requests' own errors are OSErrors
            raise _understand(error, redirected=bool(redirects)) from error


def _read_body(body: BaseHTTPResponse) -> bytes:
    """The whole body; MirrorError as soon as it is too large or too slow."""
    content, begin = bytearray(), time.monotonic()
    while part := body.read1(1 << 16, decode_content=False):  # returns what there is, so that a slow sender is noticed
        content += part
        seconds = time.monotonic() - begin
        if len(content) > MAX_BYTES:
            raise MirrorError(f"is larger than {MAX_BYTES:,} bytes, and none of MNIST's files is")
        if seconds > TIMEOUT_S and len(content) < MIN_BYTES_PER_S * seconds:
            raise MirrorError(f"arrives too slowly ({len(content):,} bytes in {seconds:.0f} s)")
    return bytes(content)


def _understand(error: Exception, redirected: bool) -> Exception:
    """What an error of requests, or of urllib3 while a body is read, says about the mirror."""
    root: BaseException = error
    while root.__context__ is not None:
        root = root.__context__
    reason = getattr(root, "strerror", None) or str(root) or type(root).__name__
    reason = printable(reason)[:300]  # it may repeat what the server sent
    match error:
        case requests.exceptions.SSLError():
            return MirrorError(f"cannot be trusted ({reason})")
        case requests.Timeout() | requests.ConnectionError(args=[MaxRetryError(), *_]):
            problem = "redirects to what cannot be reached" if redirected else "cannot be reached"
            return MirrorError(f"{problem} ({reason})", silent=not redirected)
        case requests.ConnectionError() | ProtocolError() | ReadTimeoutError():
            return MirrorError(f"breaks off ({reason})", passing=True)
        case requests.exceptions.InvalidURL():
            return MirrorError("is, or redirects to, a malformed address")  # the reason may quote half a password
        case requests.RequestException() | HTTPError() | ValueError():
            return MirrorError(f"cannot be used ({reason})")
    return UserError(f"MNIST cannot be downloaded: {reason}; correct this machine's set-up, as in REQUESTS_CA_BUNDLE")


def printable(text: str) -> str:
    """``text`` without control characters, and with ``***`` for user and password in addresses, mistyped ones too."""
    hidden = re.sub(r"(?<=//).*@|[^/:]+:(?!//).*@", "***@", text, flags=re.DOTALL)
    return "".join(character if character.isprintable() else "?" for character in hidden)

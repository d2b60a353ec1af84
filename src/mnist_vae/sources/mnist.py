"""MNIST from a folder or from the network, with torchvision's file names, MD5 sums and mirrors.

LeCun, Cortes & Burges, "The MNIST database of handwritten digits". The four files are 12 MB together and stay in
memory: a download needs no disk space and leaves nothing behind.
"""

import gzip
import hashlib
import http.client
import io
import logging
import math
import re
import struct
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import requests
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, MaxRetryError, ProtocolError, ReadTimeoutError

from mnist_vae.compat import cure_torchvision
from mnist_vae.data.dataset import Dataset, Images
from mnist_vae.errors import UserError

TIMEOUT_S = 20.0  # to connect, until an answer begins, and between two parts of it
DEADLINE_S = 600.0  # for one file from one mirror, retries included
MIN_BYTES_PER_S = 10_000  # on average, once a file has been arriving for TIMEOUT_S
MAX_BYTES = 10_000_000  # of one file; the largest has 9,912,422
RETRY_WAITS_S = (1.0, 4.0)  # before the second and the third attempt
MAX_REDIRECTS = 5
SHAPES = ((60_000, 28, 28), (60_000,), (10_000, 28, 28), (10_000,))  # in the order of torchvision's list of files

log = logging.getLogger(__name__)


class NoMirrorAnswersError(UserError):
    """Every mirror is out of reach: the state of a network, not a mistake."""


class MirrorError(Exception):
    """What a mirror or a folder did instead of giving a file; the message goes on from the file's address."""

    def __init__(self, problem: str, *, silent: bool = False, passing: bool = False) -> None:
        super().__init__(problem)
        self.silent = silent  # it did not answer at all
        self.passing = passing  # another attempt may succeed


class File(NamedTuple):
    """One of the four files: images (N, 28, 28) or labels (N,) as unsigned bytes in the IDX format, gzipped."""

    name: str
    md5: str
    shape: tuple[int, ...]

    def unpack(self, packed: bytes) -> Images:
        """The array in ``packed``, of which no more is unpacked than the array needs.

        Raises:
            MirrorError: ``packed`` is not this file.
        """
        if hashlib.md5(packed, usedforsecurity=False).hexdigest() != self.md5:
            content = "a web page" if packed.lstrip()[:1] == b"<" else f"{len(packed):,} bytes"
            raise MirrorError(f"is not MNIST's file but {content} (its MD5 is not {self.md5})")
        header = struct.pack(f">{1 + len(self.shape)}I", 0x0800 + len(self.shape), *self.shape)
        size = len(header) + math.prod(self.shape)
        with gzip.open(io.BytesIO(packed)) as file:
            unpacked = file.read(size + 1)
        if len(unpacked) != size or not unpacked.startswith(header):
            raise MirrorError(f"does not hold an array of shape {self.shape} in the IDX format")
        return np.frombuffer(unpacked, np.uint8, offset=len(header)).reshape(self.shape).copy()


def download_mnist(mirror: str | None) -> Dataset:
    """The 60,000 training and 10,000 test images.

    ``mirror`` is a folder, or a URL that is tried before torchvision's mirrors.

    Raises:
        UserError: ``mirror`` is not a folder or URL with MNIST's files, or some mirror answered, but none has them.
        NoMirrorAnswersError: no mirror gave any answer.
    """
    files, mirrors = torchvision_mnist()
    if mirror is None or "://" in mirror:
        arrays = _from_network(files, mirrors, mirror)
    else:
        arrays = [_from_folder(Path(mirror), file) for file in files]
    x_train, y_train, x_test, y_test = arrays
    return Dataset("mnist", x_train, y_train, x_test, y_test)


def torchvision_mnist() -> tuple[list[File], list[str]]:
    """The files of MNIST, and the mirrors that torchvision knows."""
    cure_torchvision()
    from torchvision.datasets import MNIST

    return [File(name, md5, shape) for (name, md5), shape in zip(MNIST.resources, SHAPES, strict=True)], MNIST.mirrors


def _from_folder(folder: Path, file: File) -> Images:
    """``file`` from the folder that MNIST_MIRROR names; UserError where it is missing or something else."""
    path = folder / file.name
    try:
        if not path.is_file():
            raise MirrorError("does not exist, or is not a file")
        with path.open("rb") as opened:
            return file.unpack(opened.read(MAX_BYTES + 1))
    except (MirrorError, OSError) as error:
        problem = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else error
        raise UserError(
            f"MNIST_MIRROR: {_printable(str(path))} {problem}; point MNIST_MIRROR at a folder with MNIST's four "
            ".gz files"
        ) from error


def _from_network(files: list[File], mirrors: list[str], chosen: str | None) -> list[Images]:
    """``files`` from ``chosen``, where it is named, or from the first mirrors that have them."""
    if chosen is not None and not re.match("https?://[^/]", chosen, re.IGNORECASE):
        raise UserError(
            f"MNIST_MIRROR: {_printable(chosen)} is neither a folder nor a URL such as https://host/path/; "
            "correct it or unset it"
        )
    arrays: list[Images] = []
    problems, silent = [], True
    for mirror in mirrors if chosen is None else [chosen, *mirrors]:
        try:
            for file in files[len(arrays) :]:
                url = f"{mirror.removesuffix('/')}/{file.name}"
                arrays.append(_fetch(url, file))
            return arrays
        except MirrorError as error:
            problems.append(f"{_printable(url)} {error}")
            silent = silent and error.silent and not arrays
            if mirror == chosen and not error.silent:
                raise UserError(
                    f"MNIST_MIRROR: {problems[-1]}; point MNIST_MIRROR at the http(s) URL or at the folder that holds "
                    "MNIST's four .gz files, or unset it"
                ) from error
            log.warning("%s", problems[-1])
    raise (NoMirrorAnswersError if silent else UserError)(
        f"no mirror of MNIST {'answers' if silent else 'works'}: {'; '.join(problems)}; try again later, or set "
        "MNIST_MIRROR to another URL or to a folder with the four .gz files"
    )


def _printable(text: str) -> str:
    """``text`` without control characters, and with ``***`` for user and password in addresses, mistyped ones too."""
    hidden = re.sub(r"(?<=//).*@|[^/:]+:(?!//).*@", "***@", text, flags=re.DOTALL)
    return "".join(character if character.isprintable() else "?" for character in hidden)


def _fetch(url: str, file: File) -> Images:
    """``file`` from ``url``; MirrorError after DEADLINE_S at the latest.

    In a thread, which is left behind at the deadline: a socket's own limit is per read, and a server can spread even
    the header of its answer over hours.
    """
    future: Future[Images] = Future()

    def work() -> None:
        try:
            future.set_result(_fetch_with_retries(url, file))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(DEADLINE_S)
    except TimeoutError as error:
        raise MirrorError(f"has not arrived after {DEADLINE_S:.0f} s") from error


def _fetch_with_retries(url: str, file: File) -> Images:
    waits = list(RETRY_WAITS_S)
    while True:
        try:
            return file.unpack(_get(url))
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
    reason = _printable(reason)[:300]  # it may repeat what the server sent
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

"""MNIST from a folder or from the network, with torchvision's file names, MD5 sums and mirrors.

LeCun, Cortes & Burges, "The MNIST database of handwritten digits". The four files are 12 MB together and stay in
memory: a download needs no disk space and leaves nothing behind.
"""

import gzip
import hashlib
import io
import logging
import math
import re
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mnist_vae.compat import cure_torchvision
from mnist_vae.data.dataset import Dataset, Images
from mnist_vae.errors import UserError
from mnist_vae.sources.fetch import MAX_BYTES, MirrorError, fetch, printable

SHAPES = ((60_000, 28, 28), (60_000,), (10_000, 28, 28), (10_000,))  # in the order of torchvision's list of files

log = logging.getLogger(__name__)


class NoMirrorAnswersError(UserError):
    """Every mirror is out of reach: the state of a network, not a mistake."""


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
            f"MNIST_MIRROR: {printable(str(path))} {problem}; point MNIST_MIRROR at a folder with MNIST's four "
            ".gz files"
        ) from error


def _from_network(files: list[File], mirrors: list[str], chosen: str | None) -> list[Images]:
    """``files`` from ``chosen``, where it is named, or from the first mirrors that have them."""
    if chosen is not None and not re.match("https?://[^/]", chosen, re.IGNORECASE):
        raise UserError(
            f"MNIST_MIRROR: {printable(chosen)} is neither a folder nor a URL such as https://host/path/; "
            "correct it or unset it"
        )
    arrays: list[Images] = []
    problems, silent = [], True
    for mirror in mirrors if chosen is None else [chosen, *mirrors]:
        try:
            for file in files[len(arrays) :]:
                url = f"{mirror.removesuffix('/')}/{file.name}"
                arrays.append(fetch(url, file.unpack))
            return arrays
        except MirrorError as error:
            problems.append(f"{printable(url)} {error}")
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

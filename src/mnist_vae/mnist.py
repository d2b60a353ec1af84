"""MNIST from the network or from a folder, with torchvision's downloader and checksums.

LeCun, Cortes & Burges, "The MNIST database of handwritten digits".
"""

import contextlib
import logging
import shutil
import socket
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError

from mnist_vae import torchvision_ops  # noqa: F401
from mnist_vae.data import Dataset
from mnist_vae.errors import UserError

from torchvision.datasets import MNIST  # isort: skip  after torchvision_ops
from torchvision.datasets.utils import check_integrity, download_and_extract_archive  # isort: skip

TIMEOUT_S = 20  # without an answer, for a connection or a read

log = logging.getLogger(__name__)


class NoMirrorAnswersError(UserError):
    """Every mirror is out of reach: the state of a network, not a mistake."""


def download_mnist(mirror: str | None) -> Dataset:
    """The 60,000 training and 10,000 test images.

    ``mirror``, a URL or a folder, comes before torchvision's own. Files are fetched to a scratch folder, checked
    against torchvision's MD5 sums, and gone when this returns or raises.

    Raises:
        UserError: ``mirror`` is no such folder or URL, or somebody sent other bytes than MNIST's.
        NoMirrorAnswersError: nobody sent anything.
    """
    with TemporaryDirectory(prefix="mnist-") as root, _time_limit(TIMEOUT_S):
        if mirror is not None and "://" in mirror and not mirror.startswith(("http://", "https://")):
            raise UserError(
                f"MNIST_MIRROR: {mirror} is neither a folder nor a URL that begins with http:// or https://"
            )
        raw = Path(root, "MNIST", "raw")
        raw.mkdir(parents=True)
        if mirror is not None and "://" not in mirror:
            _copy(Path(mirror), raw)
        mirrors = [url if url.endswith("/") else f"{url}/" for url in ([mirror] if mirror else []) + MNIST.mirrors]
        for filename, md5 in MNIST.resources:
            _fetch(filename, md5, mirrors, raw, chosen=mirror)
        train, test = MNIST(root, train=True), MNIST(root, train=False)
    return Dataset(
        "mnist",
        *(tensor.numpy().astype("uint8") for tensor in (train.data, train.targets, test.data, test.targets)),
    )


def _copy(folder: Path, raw: Path) -> None:
    """Bring the four files from ``folder``; a folder that was named and does not hold them is a mistake."""
    for filename, md5 in MNIST.resources:
        source = folder / filename
        if not source.is_file():
            raise UserError(
                f"MNIST_MIRROR: {source} does not exist; point MNIST_MIRROR at a folder with MNIST's four .gz files"
            )
        if not check_integrity(source, md5):
            raise UserError(f"MNIST_MIRROR: {source} is not MNIST's (its MD5 is not {md5}); copy it anew")
        shutil.copyfile(source, raw / filename)


def _fetch(filename: str, md5: str, mirrors: list[str], raw: Path, chosen: str | None) -> None:
    """One file from the first mirror that has it; one that ``_copy`` has brought is only unpacked."""
    wrong_bytes, silent = [], []
    for mirror in mirrors:
        try:
            download_and_extract_archive(mirror + filename, raw, filename=filename, md5=md5)
            return
        except RuntimeError:  # torchvision's word for a checksum that does not match
            (raw / filename).unlink(missing_ok=True)
            wrong_bytes.append(mirror)
            log.warning("%s%s arrived damaged (its MD5 is not %s)", mirror, filename, md5)
        except ValueError as error:  # urllib's word for a URL it cannot read
            raise UserError(f"MNIST_MIRROR: {chosen} is neither a folder nor a URL ({error})") from error
        except (OSError, HTTPException) as error:
            if isinstance(error, HTTPError) and chosen and mirror.startswith(chosen):
                raise UserError(
                    f"MNIST_MIRROR: {mirror}{filename} answers {error.code} {error.reason}; "
                    "point MNIST_MIRROR at the address that holds MNIST's four .gz files"
                ) from error
            silent.append(f"{mirror} ({getattr(error, 'reason', None) or error})")
            log.warning("no answer from %s", silent[-1])
    if wrong_bytes:
        raise UserError(
            f"{filename} from {' and '.join(wrong_bytes)} is not MNIST's (damaged or cut short); "
            "try again later, or set MNIST_MIRROR to another URL or to a folder with the four .gz files"
        )
    raise NoMirrorAnswersError(
        f"no mirror of MNIST answers: {', '.join(silent)}; "
        "set MNIST_MIRROR to a URL or to a folder with the four .gz files"
    )


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Give every new socket a time limit: torchvision's downloader takes none of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

"""Somebody's own images: a folder with MNIST's four IDX files, gzipped or not, or with four .npy files.

The label files may be missing. Files are mapped; a gzipped one is unpacked to a scratch file first.
"""

import gzip
import math
import re
import shutil
import struct
import tempfile
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from mnist_vae.data.dataset import ARRAYS, COMPARED, Dataset, Images, blocks, check_labels
from mnist_vae.errors import UserError

IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
DAMAGES = (OSError, EOFError, TypeError, ValueError, OverflowError, TokenError, BadZipFile, zlib.error)
FEWEST = 6  # images of either kind: evaluation looks at the 5 nearest neighbours of each


def read_folder(folder: Path, scratch: Path) -> Dataset:
    """The images of a folder, and their labels where it has any; ``scratch`` is a folder for what must be unpacked.

    Raises:
        UserError: the folder or a file is missing, or a file holds something else than FEWEST or more 28 × 28 uint8
            images, or labels from 0 to 9, as many as images, of more than one digit.
    """
    where = f"data.dataset: {folder}"
    try:
        if not folder.is_dir():
            raise UserError(f"{where} is no folder; correct the path in params.yaml (a relative one counts from there)")
        files = {array: _file_of(folder, array) for array in ARRAYS}
    except OSError as error:  # a name that is too long, or a folder that is not ours to read
        raise UserError(f"{where} cannot be read: {error.strerror}; correct the path or its permissions") from error
    missing = [array for array, file in files.items() if file is None]
    if images := [array for array in missing if array.startswith("x")]:
        names = " or ".join(f"{array}.npy or {IDX_FILES[array]}(.gz)" for array in images[:1])
        raise UserError(f"{where} has no {names}; it must have training and test images (x_train.npy, x_test.npy)")
    if len(missing) == 1:
        raise UserError(f"{where} has labels for one of training and test images only: add {missing[0]}, or take both")
    arrays = {array: _read(file, array, scratch) for array, file in files.items() if file is not None}
    name = re.sub(r"[^\w .-]", "_", folder.resolve().name) or "images"
    dataset = Dataset(f"{name}/", arrays["x_train"], arrays.get("y_train"), arrays["x_test"], arrays.get("y_test"))
    try:
        check_labels(dataset)
    except ValueError as error:
        raise UserError(f"{where}: {error}; without files of labels the images are taken as they are") from error
    if "y_train" in arrays and len(np.unique(arrays["y_train"][:COMPARED])) == 1:
        is_all = len(arrays["y_train"]) <= COMPARED
        which, other = ("all", "") if is_all else (f"the first {COMPARED:,}", ", or mix the images")
        raise UserError(
            f"{where}: {which} training labels are {arrays['y_train'][0]}, which tells nothing apart; leave out both "
            f"label files{other}"
        )
    return dataset


def _file_of(folder: Path, array: str) -> Path | None:
    """The file that has an array; None where there is none."""
    names = (f"{array}.npy", IDX_FILES[array], f"{IDX_FILES[array]}.gz")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read(file: Path, array: str, scratch: Path) -> Images:
    """An array (N, 28, 28) or (N,) of uint8; UserError where the file holds anything else."""
    side = (28, 28) if array.startswith("x") else ()
    wanted = "uint8 images (N, 28, 28)" if side else "whole numbers (N,)"
    try:
        found = np.load(file, mmap_mode="r") if file.suffix == ".npy" else _read_idx(file, len(side) + 1, scratch)
        if not isinstance(found, np.ndarray):
            raise TypeError("it is an archive of arrays, as of np.savez, not one array")
        if found.ndim != len(side) + 1 or found.shape[1:] != side or found.dtype.kind not in ("u" if side else "ui"):
            raise ValueError(f"it holds {found.dtype} of shape {found.shape}")
        if side and len(found) < FEWEST:
            raise ValueError(f"it holds {len(found)} images, and evaluation needs at least {FEWEST}")
        if side and found.dtype != np.uint8:
            raise ValueError(f"it holds {found.dtype}; pixels are 0 to 255, as uint8")
        return found.view(np.ndarray) if side else _labels(found)
    except DAMAGES as error:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:200]
        raise UserError(f"data.dataset: {file} cannot be read as {wanted}: {reason}") from error


def _labels(found: NDArray[Any]) -> Images:
    """Labels of any type of whole numbers as uint8."""
    for block in blocks(found):
        if block.min() < 0 or block.max() > 9:
            raise ValueError(f"a label is {block.min() if block.min() < 0 else block.max()}, and a digit is 0 to 9")
    return found.astype(np.uint8)


def _read_idx(file: Path, ndim: int, scratch: Path) -> Images:
    """A map of an IDX file of unsigned bytes; ValueError where it is not one of ``ndim`` dimensions."""
    with tempfile.TemporaryFile(dir=scratch) as unpacked:
        if file.suffix == ".gz":
            with gzip.open(file) as packed:
                shutil.copyfileobj(packed, unpacked)
        with file.open("rb") if file.suffix != ".gz" else unpacked as opened:
            opened.seek(0)
            header = opened.read(4 * (1 + ndim))
            size = opened.seek(0, 2)
            if len(header) < 4 * (1 + ndim):
                raise ValueError("it is cut short")
            magic, *shape = struct.unpack(f">{1 + ndim}I", header)
            if magic != 0x0800 + ndim or size != len(header) + math.prod(shape):
                raise ValueError(f"it is no IDX file of unsigned bytes in {ndim} dimensions, or is cut short")
            if not size > len(header):
                raise ValueError("it holds nothing")
            return np.memmap(opened, np.uint8, mode="r", offset=len(header), shape=tuple(shape))

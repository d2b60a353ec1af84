"""Data sets as arrays: 28 × 28 gray images with their digits, split into training and test.

On disk each array is an uncompressed .npy file, which is mapped, not read: a data set may be larger than the memory.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from mnist_vae.errors import UserError
from mnist_vae.files import atomic_write, read_or_refuse, write_json

Images = NDArray[np.uint8]  # (N, 28, 28), or labels (N,)
Index = NDArray[np.int64]  # positions of images
Binarize = Literal["none", "dynamic", "static"]  # what each means stands in binarization.py

TITLES = {"mnist": "MNIST", "digits": "scikit-learn digits (not MNIST)"}
FOLDER_NAME = re.compile(r"[\w .-]+/")  # of a data set from somebody's own folder: the folder's name and a slash
BINARIZED: dict[Binarize, str] = {
    "none": "",
    "dynamic": ", dynamically binarised",
    "static": ", statically binarised",
}
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
UNLABELLED = ("x_train", "x_test")  # the arrays of a data set without labels
HEADER_SIZE = 128  # of an array's .npy file, in bytes, however many images it has
BLOCK = 10_000  # images in memory at a time
COMPARED = 100_000  # training images, the first ones, whose codes evaluation compares those of test images with
REMEDY = "`dvc repro --force --single-item download` makes it again"


class ImageSource(Protocol):
    """uint8 images (N, 28, 28) that are read, or made, where they are asked for: an array, a mapped file, …"""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, 28, 28)."""

    def __len__(self) -> int:
        """N."""

    @overload
    def __getitem__(self, key: Index, /) -> Images: ...
    @overload
    def __getitem__(self, key: slice, /) -> Images: ...
    def __getitem__(self, key: Any, /) -> Images:
        """The images of a slice without a step, or at some positions."""


@dataclass(frozen=True)
class Dataset:
    """Images (N, 28, 28) and labels (N,), all uint8; a pixel is 0 (paper) to 255 (ink), a label 0 to 9."""

    name: str  # a key of TITLES, or a FOLDER_NAME
    x_train: ImageSource
    y_train: Images | None  # None, like y_test, where nobody has labelled the images
    x_test: ImageSource
    y_test: Images | None
    binarize: Binarize = "none"  # how the images were binarised

    @property
    def title(self) -> str:
        """The name to put on a picture."""
        return TITLES.get(self.name, self.name.removesuffix("/")) + BINARIZED[self.binarize]

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of the arrays that it has."""
        return UNLABELLED if self.y_train is None else ARRAYS

    @cached_property
    def about(self) -> dict[str, Any]:
        """What is in it: name, sizes, the SHA-256 of each array's bytes, and ``digest``, that of the name and those."""
        sha256 = {}
        for array in self.arrays:
            digest = hashlib.sha256()
            for block in blocks(getattr(self, array)):
                digest.update(block.data)
            sha256[array] = digest.hexdigest()
        return {
            "name": self.name,
            "train_images": len(self.x_train),
            "test_images": len(self.x_test),
            "digest": hashlib.sha256("".join([self.name, *sha256.values()]).encode()).hexdigest(),
            "sha256": sha256,
        }


def blocks(images: ImageSource) -> Iterator[Images]:
    """All images, or labels, in contiguous blocks of BLOCK."""
    for first in range(0, len(images), BLOCK):
        yield np.ascontiguousarray(images[first : first + BLOCK])


def save_dataset(folder: Path, dataset: Dataset, asked_for: str | None = None) -> None:
    """Write each array as a .npy file, whose bytes depend on the images alone, and what they are as FOLDER.json.

    ``asked_for`` is the name of the data set that a person wanted, by default the one that it is.
    """
    for array in ARRAYS:
        if array not in dataset.arrays:
            (folder / f"{array}.npy").unlink(missing_ok=True)
            continue
        images: ImageSource = getattr(dataset, array)
        with atomic_write(folder / f"{array}.npy") as scratch, scratch.open("wb") as file:
            file.write(_header(images.shape, images[:0].dtype))
            for block in blocks(images):
                file.write(block.data)
    write_json(folder.with_suffix(".json"), {"asked_for": asked_for or dataset.name, **dataset.about})


def load_dataset(folder: Path | str) -> Dataset:
    """Map what ``save_dataset`` wrote. Shapes, types, labels and hashes are checked without taking memory for it all.

    Raises:
        UserError: a file is missing or damaged, or they do not belong together.
    """
    folder = Path(folder)
    about = read_or_refuse(folder.with_suffix(".json"), _read_about, REMEDY, (ValueError, RecursionError))
    sha256 = about.get("sha256")
    names = UNLABELLED if isinstance(sha256, dict) and sha256.keys() == set(UNLABELLED) else ARRAYS
    arrays = {
        name: read_or_refuse(folder / f"{name}.npy", _map_array, REMEDY, (ValueError, OverflowError)) for name in names
    }
    y_train, y_test = arrays.get("y_train"), arrays.get("y_test")
    dataset = Dataset(about["name"], arrays["x_train"], y_train, arrays["x_test"], y_test)
    read_or_refuse(folder, lambda _: check_labels(dataset), REMEDY, (ValueError,))
    if not dataset.about.items() <= about.items():
        raise UserError(f"{folder} does not hold the images that {folder.with_suffix('.json')} describes; {REMEDY}")
    return dataset


def check_labels(dataset: Dataset) -> None:
    """ValueError unless each image has a label from 0 to 9, or none has any."""
    for split in ("train", "test"):
        x, y = getattr(dataset, f"x_{split}"), getattr(dataset, f"y_{split}")
        if y is not None and len(x) != len(y):
            raise ValueError(f"{len(x)} {split} images with {len(y)} labels")
        if y is not None and (highest := max(int(block.max()) for block in blocks(y))) > 9:
            raise ValueError(f"a label is {highest}, and a digit is at most 9")


def _read_about(path: Path) -> dict[str, Any]:
    """The .json of a data set; ValueError where it does not name one."""
    about = json.loads(path.read_text(encoding="utf-8"))
    name = about.get("name") if isinstance(about, dict) else None
    if not isinstance(name, str) or not (name in TITLES or FOLDER_NAME.fullmatch(name)):
        raise ValueError(f"it names none of {', '.join(TITLES)}, nor a folder")
    assert isinstance(about, dict)
    return about


def _map_array(path: Path) -> Images:
    """An array's file as a read-only map; ValueError unless it begins as numpy's file of such an array, byte for byte.

    A header may claim any size and any type.
    """
    side = (28, 28) if path.name.startswith("x") else ()
    size = path.stat().st_size
    count = max(0, size - HEADER_SIZE) // math.prod(side)
    shape = (count, *side)
    with path.open("rb") as file:
        header = file.read(HEADER_SIZE)
    if header != _header(shape, np.dtype(np.uint8)) or size != HEADER_SIZE + math.prod(shape):
        raise ValueError(f"it does not hold uint8 of shape {('N', *side)}".replace("'", ""))
    if count == 0:
        raise ValueError("it holds nothing")
    return np.memmap(path, np.uint8, mode="r", offset=HEADER_SIZE, shape=shape).view(np.ndarray)


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """How numpy begins the .npy file of an array."""
    header = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


class Selection:
    """Some images of others, in an order of their own, read where they are asked for."""

    def __init__(self, images: ImageSource, positions: Index) -> None:
        self.images, self.positions = images, positions

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, 28, 28)."""
        return (len(self.positions), *self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, key: slice | Index) -> Images:
        """The images of a slice, or at some positions among the selected ones."""
        return self.images[self.positions[key]]


def hold_out(images: ImageSource, size: int, seed: int) -> tuple[ImageSource, ImageSource]:
    """Split images (N, …) at random into N − size for training and ``size`` for validation; none is copied.

    Raises:
        UserError: nothing would be left to train on.
    """
    if size >= len(images):
        raise UserError(
            f"params.yaml: train.validation_size is {size}; it must be less than the {len(images)} training images"
        )
    if size == 0:
        return images, images[:0]
    import torch  # whose generator it is; the stage download, which holds nothing out, does not wait for it

    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).numpy()
    return Selection(images, order[size:]), Selection(images, order[:size])

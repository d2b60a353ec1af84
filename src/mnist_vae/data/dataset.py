"""Data sets as arrays: 28 × 28 gray images with their digits, split into training and test."""

import hashlib
import io
import json
import math
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mnist_vae.errors import UserError
from mnist_vae.files import atomic_write, read_or_refuse, write_json

Images = NDArray[np.uint8]  # (N, 28, 28), or labels (N,)
Binarize = Literal["none", "dynamic", "static"]  # what each means stands in binarization.py

TITLES = {"mnist": "MNIST", "digits": "scikit-learn digits (not MNIST)"}
BINARIZED: dict[Binarize, str] = {
    "none": "",
    "dynamic": ", dynamically binarised",
    "static": ", statically binarised",
}
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
HEADER_SIZE = 128  # of an array in an .npz, in bytes, however many images it has
REMEDY = "`dvc repro --force --single-item download` makes it again"


@dataclass(frozen=True)
class Dataset:
    """Images (N, 28, 28) and labels (N,), all uint8; a pixel is 0 (paper) to 255 (ink), a label 0 to 9."""

    name: str  # a key of TITLES
    x_train: Images
    y_train: Images
    x_test: Images
    y_test: Images
    binarize: Binarize = "none"  # how the images were binarised

    @property
    def title(self) -> str:
        """The name to put on a picture."""
        return TITLES[self.name] + BINARIZED[self.binarize]

    @cached_property
    def about(self) -> dict[str, Any]:
        """What is in it: name, sizes, the SHA-256 of each array's bytes, and ``digest``, that of the name and those."""
        sha256 = {
            array: hashlib.sha256(np.ascontiguousarray(getattr(self, array)).data).hexdigest() for array in ARRAYS
        }
        return {
            "name": self.name,
            "train_images": len(self.x_train),
            "test_images": len(self.x_test),
            "digest": hashlib.sha256("".join([self.name, *sha256.values()]).encode()).hexdigest(),
            "sha256": sha256,
        }


def save_dataset(path: Path, dataset: Dataset, asked_for: str | None = None) -> None:
    """Write an uncompressed .npz, whose bytes depend on the images alone, and what is in it as .json beside it.

    ``asked_for`` is the name of the data set that a person wanted, by default the one that it is.
    """
    with atomic_write(path) as scratch:
        arrays = {array: np.ascontiguousarray(getattr(dataset, array)) for array in ARRAYS}
        np.savez(scratch, allow_pickle=False, **arrays)
    write_json(path.with_suffix(".json"), {"asked_for": asked_for or dataset.name, **dataset.about})


def load_dataset(path: Path | str) -> Dataset:
    """Read what ``save_dataset`` wrote. Shapes and types are checked before memory is taken, hashes after.

    Raises:
        UserError: one of the two files is missing or damaged, or they do not belong together.
    """
    path = Path(path)
    about = read_or_refuse(path.with_suffix(".json"), _read_about, REMEDY, (ValueError, RecursionError))
    damages = (ValueError, EOFError, RuntimeError, OverflowError, zipfile.BadZipFile)
    arrays = read_or_refuse(path, _read_arrays, REMEDY, damages)
    dataset = Dataset(about["name"], arrays["x_train"], arrays["y_train"], arrays["x_test"], arrays["y_test"])
    if not dataset.about.items() <= about.items():
        raise UserError(f"{path} does not hold the images that {path.with_suffix('.json')} describes; {REMEDY}")
    return dataset


def _read_about(path: Path) -> dict[str, Any]:
    """The .json of a data set; ValueError where it does not name one."""
    about = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(about, dict) or about.get("name") not in list(TITLES):
        raise ValueError(f"it names none of {', '.join(TITLES)}")
    return about


def _read_arrays(path: Path) -> dict[str, Images]:
    """The four arrays of a file; ValueError where they are not what a data set is made of."""
    with zipfile.ZipFile(path) as archive:
        if (members := archive.namelist()) != [f"{array}.npy" for array in ARRAYS]:
            raise ValueError(f"it holds {', '.join(members)}, not {', '.join(ARRAYS)}")
        for array in ARRAYS:
            _check_member(archive, array, size_of_file=path.stat().st_size)
    with np.load(path, allow_pickle=False) as archive_of_arrays:
        arrays = {array: archive_of_arrays[array] for array in ARRAYS}
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if len(x) != len(y) or not len(x):
            raise ValueError(f"{len(x)} {split} images with {len(y)} labels")
        if y.max() > 9:
            raise ValueError(f"a label is {y.max()}, and a digit is at most 9")
    return arrays


def _check_member(archive: zipfile.ZipFile, array: str, size_of_file: int) -> None:
    """ValueError unless a member is stored as it is, and begins as numpy's file of such an array does, byte for byte.

    An array's header may claim any size, and numpy takes that much memory before it reads.
    """
    info = archive.getinfo(f"{array}.npy")
    if info.compress_type != zipfile.ZIP_STORED or not info.compress_size == info.file_size <= size_of_file:
        raise ValueError(f"{array} is compressed, or larger than its file")
    side = (28, 28) if array.startswith("x") else ()
    count = (info.file_size - HEADER_SIZE) // math.prod(side)
    header = io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": (count, *side)}
    np.lib.format.write_array_header_1_0(header, about)
    with archive.open(info) as member:
        found = member.read(HEADER_SIZE)
    if found != header.getvalue() or info.file_size != HEADER_SIZE + count * math.prod(side):
        raise ValueError(f"{array} does not hold uint8 of shape {('N', *side)}".replace("'", ""))


def hold_out(images: Images, size: int, seed: int) -> tuple[Images, Images]:
    """Split images (N, …) at random into N − size for training and ``size`` for validation.

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
    return images[order[size:]], images[order[:size]]

"""Files that are written whole or not at all, so that a failure leaves what was there before."""

import csv
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch path of the same name; what was written there takes ``path``'s place at a clean exit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same name, in another folder: torch.save writes the file's name into the file.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        scratch = Path(folder, path.name)
        yield scratch
        scratch.replace(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented JSON."""
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of equal keys under a line with those keys."""
    with replacing(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

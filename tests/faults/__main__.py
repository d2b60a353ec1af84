"""python -m tests.faults: write docs/reliability.md, which says what every fault does."""

from pathlib import Path

from tests.faults.table import FAULTS
from tools.table import table

DOCUMENT = Path(__file__).parents[2] / "docs/reliability.md"

HEAD = f"""# Reliability

Made by `python -m tests.faults` from the table in `tests/faults/table.py`; do not edit.

Each of these {len(FAULTS)} faults is injected for real, into a small pipeline of its own, and after each one plain
`dvc repro` has to make everything whole: every output has the bytes of an undisturbed run, every object of DVC's cache
has its hash, the MLflow database passes its integrity check and has one finished run with each loss once, decoder and
encoder of the champion are of one run, and no scratch file and no process is left.

```bash
make test-faults             # all of them
make test-faults FAULTS=12   # a sample of 12
```

"""


def document() -> str:
    """The document, from the table."""
    rows = [[fault.name, fault.inject, fault.expect, fault.lost] for fault in FAULTS]
    return HEAD + table(["fault", "how it is injected", "what happens", "lost"], rows) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")

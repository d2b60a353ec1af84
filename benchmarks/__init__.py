"""How fast is it, next to what? The issue's six questions about speed, measured on this machine.

    python -m benchmarks                  all of it, rounds and medians, into benchmarks/results.md (about 40 minutes)
    python -m benchmarks --quick          one short round, printed only: does everything still run?
    python -m benchmarks --only threads   one question in full, printed only

Run it on an idle machine. MNIST comes from MNIST_MIRROR (a URL or a folder) or from torchvision's mirrors.

    questions.py    the six questions: what is compared, and the limits from the issue
    bare.py         the bare loop, training as fast as plain torch does it
    notebook.py     the notebook that the pipeline is compared with, re-written
    worker.py       one measurement in a process of its own
    measure.py      starting workers, alternating, medians with their spread
    clone.py        `dvc repro` in a fresh clone of the last commit
    accounts.py     where the seconds of a stage go: imports, tracking, compute
    table.py        from what was measured to text
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT / "src"))  # the library beside this file, not an installed copy of another version

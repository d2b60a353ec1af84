"""How fast is it, next to what? Questions about speed, most with limits that this project sets itself.

    python -m benchmarks                  all of it, rounds and medians, into benchmarks/results.md (more than an hour)
    python -m benchmarks --quick          one short round, printed only: does everything still run?
    python -m benchmarks --only threads   one question in full, printed only

Run it on an idle machine. MNIST comes from MNIST_MIRROR (a URL or a folder) or from torchvision's mirrors.

    questions.py    the questions: what is compared with what, and the limits
    bare.py         the bare loop, training as fast as plain torch does it
    notebook.py     the notebook that the pipeline is compared with, re-written
    worker.py       one measurement in a process of its own
    measure.py      starting workers, alternating, medians with their spread
    repro.py        `dvc repro` in a fresh clone of the last commit, and where the seconds of its stages go
    server.py       a tracking server that fails
    tracking.py     many short runs at once
    results.py      from what was measured to text
"""

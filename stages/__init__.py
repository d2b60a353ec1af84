"""The pipeline's five stages, one script each, and the paths that they pass artifacts through.

A stage runs as ``python -m stages NAME`` from the folder that holds dvc.yaml: the repository, or the copy of it
in which DVC runs a queued experiment. Code, parameters and artifacts are those of that folder (dvc.yaml puts its src
first on the PYTHONPATH). The MLflow store, the journal, the checkpoints and a relative MNIST_MIRROR are those of the
main workspace.
"""

import os
from pathlib import Path

STAGES = ("download", "train", "evaluate", "render_samples", "render_grid")

PARENT = os.getppid()  # asked for first thing: after a parent has ended, it is another
HERE = Path(__file__).resolve().parent.parent
WORKSPACE = Path(os.environ.get("DVC_ROOT", HERE))

"""The pipeline's five stages, one script each, and the paths that they pass artifacts through.

A stage runs as ``python -m stages NAME`` from the folder that holds dvc.yaml: the repository, or the copy of it
in which DVC runs a queued experiment. Code, parameters and artifacts are those of that folder. The MLflow store
and a relative MNIST_MIRROR are those of the main workspace.
"""

import gc
import importlib.util
import os
import sys
from pathlib import Path

STAGES = ("download", "train", "evaluate", "render_samples", "render_grid")

HERE = Path(__file__).resolve().parent.parent
WORKSPACE = Path(os.environ.get("DVC_ROOT", HERE))

gc.set_threshold(1_000_000)  # Half of a short stage is imports, and looking for garbage among them is a third of that.

sys.path.insert(0, str(HERE / "src"))  # the library beside this file, not an installed copy of another version

if importlib.util.find_spec("torch") is None:
    sys.exit(
        f"{sys.executable} has no torch: `make setup` installs what the stages need into .venv, "
        "where `dvc repro` finds it; or activate the environment that you installed requirements.lock into"
    )

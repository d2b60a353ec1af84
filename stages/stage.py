"""Running a stage: a user's mistake ends it in one line, and any failure leaves the outputs of the last success."""

import gc
import hashlib
import importlib
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

from mnist_vae.errors import UserError
from stages import tracker


def run_stage(name: str) -> None:
    """Call the ``main`` of stages/NAME.py and leave the process with status 0, 1 for a failure, 130 for Ctrl-C."""
    logging.basicConfig(format=f"{name}: %(levelname)s: %(message)s", level=logging.WARNING)
    try:
        importlib.import_module(f"stages.{name}").main()
        tracker.settle()
    except UserError as error:
        restore_outputs()
        sys.exit("\n".join(f"{name}: {line}" for line in str(error).splitlines()))
    except KeyboardInterrupt:
        restore_outputs()
        sys.exit(130)
    except BaseException:
        restore_outputs()
        raise
    finally:
        gc.freeze()  # the interpreter's last look for garbage would take half a second, a moment before all is gone


def restore_outputs() -> None:
    """Put back the outputs that DVC removed before this stage began, from its cache or from git's last commit."""
    stage = os.environ.get("DVC_STAGE")
    if stage is None or not Path("dvc.lock").is_file():
        return
    from dvc.repo import Repo
    from ruamel.yaml import YAML

    lock = YAML(typ="safe").load(Path("dvc.lock")).get("stages", {})
    with Repo() as repo:
        cache = repo.cache.local
        for output in lock.get(stage.rpartition(":")[2], {}).get("outs", []):
            path, cached = Path(output["path"]), Path(cache.oid_to_path(output["md5"]))
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if cached.is_file():
                shutil.copyfile(cached, path)
                continue
            committed = subprocess.run(["git", "show", f"HEAD:./{path}"], capture_output=True, check=False).stdout
            if hashlib.md5(committed, usedforsecurity=False).hexdigest() == output["md5"]:
                path.write_bytes(committed)

"""python -m stages NAME: run one stage."""

import gc
import importlib.util
import io
import sys
from contextlib import suppress

from stages import STAGES


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in STAGES:
        sys.exit(f"usage: python -m stages {{{'|'.join(STAGES)}}}")
    if missing := [name for name in ("torch", "mnist_vae") if importlib.util.find_spec(name) is None]:
        sys.exit(
            f"{sys.executable} has no {' and no '.join(missing)}: `make setup` installs what the stages need into "
            ".venv, where `dvc repro` finds it; or activate the environment that you installed requirements.lock into"
        )
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows ASCII only ends no stage
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Half of a short stage is imports, and looking for garbage among them takes a third of that, mostly at the end:
    # to import what train needs, and to end, took 4.9 s of CPU time, and takes 2.7 s with these two settings.
    gc.set_threshold(1_000_000)
    if has_one_thread(sys.argv[1]):
        from mnist_vae.portable import set_up_libraries

        set_up_libraries()
    from stages.stage import run_stage

    try:
        run_stage(sys.argv[1])
    finally:
        gc.freeze()


def has_one_thread(stage: str) -> bool:
    """Whether a stage computes in one thread. With several, its bytes depend on the processor, whatever is told."""
    from mnist_vae.errors import UserError
    from mnist_vae.params import load_params
    from stages.artifacts import PARAMS

    if stage not in ("train", "evaluate"):
        return True
    with suppress(UserError):  # which the stage itself will meet, and tell
        return load_params(PARAMS).train.threads == 1
    return True


if __name__ == "__main__":
    main()

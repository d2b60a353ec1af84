"""python -m stages NAME: run one stage."""

import sys

from stages import STAGES, WORKSPACE, tracker
from stages.stage import run_stage

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in STAGES:
        sys.exit(f"usage: python -m stages {{{'|'.join(STAGES)}}}")
    if sys.argv[1] != "download":  # which comes before there is a run
        tracker.start(WORKSPACE)
    run_stage(sys.argv[1])

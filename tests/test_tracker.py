"""MLflow beside the stage: what is asked for is done in order, what fails is heard of, and nothing stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

REPOSITORY = Path(__file__).resolve().parent.parent
SETUP = "import os, signal, sys; from pathlib import Path; from stages import tracker; w = Path(sys.argv[1])\n"


def run(program, workspace, **env):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return subprocess.run(
        [sys.executable, "-c", SETUP + program, str(workspace)],
        cwd=REPOSITORY,
        env=clean | env,
        capture_output=True,
        text=True,
    )


def store(workspace):
    return MlflowClient(tracking_uri=f"sqlite:///{workspace / 'mlflow.db'}")


def test_a_run_is_logged_without_mlflow_in_the_stages_own_process(tmp_path):
    done = run(
        """
tracker.start(w)
with tracker.start_run(w, "name", {"tag": "value"}) as a_run:
    for step in (1, 2, 3):
        a_run.log_metrics({"loss": 10.0 * step}, step=step)
    print(a_run.id)
print("mlflow" in sys.modules, "torch" in sys.modules)
""",
        tmp_path,
    )
    run_id, *imported = done.stdout.split()
    assert imported == ["False", "False"], done.stderr
    logged = store(tmp_path).get_run(run_id)
    assert (logged.info.status, logged.data.tags["tag"]) == ("FINISHED", "value")
    assert [metric.value for metric in store(tmp_path).get_metric_history(run_id, "loss")] == [10, 20, 30]


@pytest.mark.parametrize(("error", "status"), [("ValueError", "FAILED"), ("KeyboardInterrupt", "KILLED")])
def test_a_run_whose_stage_fails_says_so(tmp_path, error, status):
    done = run(
        f"""
with tracker.start_run(w, "name", {{}}) as a_run:
    print(a_run.id, flush=True)
    raise {error}("of the stage")
""",
        tmp_path,
    )
    assert done.stderr.strip().endswith(f"{error}: of the stage")
    assert store(tmp_path).get_run(done.stdout.strip()).info.status == status


def test_what_a_call_raises_reaches_the_stage_and_its_run_has_failed(tmp_path):
    done = run(
        """
with tracker.start_run(w, "name", {}) as a_run:
    print(a_run.id, flush=True)
    a_run.log_file(w / "missing.txt")
""",
        tmp_path,
    )
    assert "missing.txt" in done.stderr.strip().splitlines()[-1]
    assert store(tmp_path).get_run(done.stdout.strip()).info.status == "FAILED"


def test_a_store_that_does_not_open_is_a_users_error_of_the_first_call_that_needs_it(tmp_path):
    done = run(
        """
tracker.start(w)
tracker.settle()
print("so far, so good")
tracker.resume_run(w, "0" * 32)
tracker.settle()
""",
        tmp_path,
        MLFLOW_TRACKING_URI="sqlite:////dev/null/mlflow.db",
    )
    assert done.stdout == "so far, so good\n"
    assert "UserError: MLflow's store sqlite:////dev/null/mlflow.db does not open" in done.stderr


def test_the_process_does_not_outlive_a_stage_that_is_killed(tmp_path):
    done = run("print(tracker._beside(os.getpid).result(), flush=True); os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while Path("/proc", done.stdout.strip()).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_a_stage_that_is_not_there_is_answered_with_those_that_are():
    done = subprocess.run([sys.executable, "-m", "stages", "trian"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "usage: python -m stages {download|train|evaluate|render_samples|render_grid}\n"

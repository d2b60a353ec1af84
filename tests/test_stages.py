"""What a stage loads before it starts: five stages are five processes, and imports are most of a short one."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("stage", "unneeded"),
    [
        ("download", {"torch", "torchvision", "lightning", "mlflow", "matplotlib", "sklearn", "pandas"}),
        ("train", {"sklearn", "torchvision", "scipy.signal"}),
        ("evaluate", {"lightning", "torchvision"}),
        ("render_samples", {"lightning", "torchvision", "sklearn", "scipy.stats"}),
        ("render_grid", {"lightning", "torchvision", "sklearn", "scipy.stats"}),
    ],
)
def test_a_stage_imports_what_it_uses(stage, unneeded):
    program = f"import sys, stages.{stage}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert unneeded.isdisjoint(loaded.stdout.split())


def test_torchvision_is_there_after_lightning_was_imported_without_it():
    program = "import stages, mnist_vae.training.fit, mnist_vae.sources.mnist, torchvision, scipy.signal"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)

"""How torch is set up for the CPU, in a process of its own: the settings are global."""

import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"


def run(program):
    done = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(SRC)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("threads", [1, 2])
def test_set_up_cpu_gives_torch_and_numpy_their_threads_on_which_denormal_numbers_are_zero(threads):
    program = f"""
import torch
from threadpoolctl import threadpool_info
from mnist_vae.model.cpu import set_up_cpu
set_up_cpu({threads})
denormal = torch.full((1_000_000,), 1e-20)
print((denormal * 1e-20).count_nonzero().item(), torch.get_num_threads())
print(*[library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"])
"""
    nonzero, of_torch, *of_blas = run(program)
    assert nonzero == "0"
    assert of_torch == str(threads)
    assert set(of_blas) == {str(threads)}


def test_set_up_cpu_does_not_change_the_loss_of_a_certain_pixel():
    program = """
import torch
from mnist_vae.model.cpu import set_up_cpu
from mnist_vae.model.vae import negative_log_likelihood
logits, x = torch.linspace(-200, 200, 4_001)[None], torch.ones(1, 4_001)
before = [negative_log_likelihood(logits, x * pixel) for pixel in (0, 0.5, 1)]
set_up_cpu(1)
after = [negative_log_likelihood(logits, x * pixel) for pixel in (0, 0.5, 1)]
print(all(map(torch.equal, before, after)))
"""
    assert run(program) == ["True"]

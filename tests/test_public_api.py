"""from mnist_vae import …: every name is there, and nothing loads that is not asked for."""

import importlib.resources
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import mnist_vae
from mnist_vae.model.model_file import SavedModel, save_model
from mnist_vae.model.vae import VAE, VAEConfig

SRC = Path(__file__).parent.parent / "src"


def loaded_by(statement):
    """Which of the large libraries a statement loads, in a process of its own."""
    program = f"{statement}\nimport sys\nprint(*({{'torch', 'numpy', 'lightning', 'pydantic'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(SRC)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("name", mnist_vae.__all__)
def test_public_api_resolves_and_documents_each_name(name):
    found = getattr(mnist_vae, name)

    assert found.__name__ == name
    assert found.__module__.startswith("mnist_vae.")
    assert found.__doc__


def test_public_api_lists_exactly_the_names_that_it_can_resolve():
    names = [name for room in mnist_vae._ROOMS.values() for name in room]

    assert sorted(names) == sorted(mnist_vae.__all__)
    assert len(set(names)) == len(names)


def test_public_api_refuses_an_unknown_name_as_any_module_does():
    with pytest.raises(AttributeError, match="module 'mnist_vae' has no attribute 'train'"):
        mnist_vae.train  # noqa: B018
    with pytest.raises(ImportError, match="train"):
        from mnist_vae import train  # noqa: F401


@pytest.mark.parametrize(
    ("statement", "libraries"),
    [
        ("import mnist_vae", set()),
        ("from mnist_vae import UserError", set()),
        ("from mnist_vae import load_params", {"pydantic"}),
        ("from mnist_vae import load_dataset", {"numpy"}),
        ("from mnist_vae import load_model, decode, encode, manifold", {"numpy", "torch"}),
    ],
)
def test_public_api_loads_no_more_than_a_name_needs(statement, libraries):
    assert loaded_by(statement) <= libraries


def test_package_tells_type_checkers_that_it_is_typed():
    assert importlib.resources.files(mnist_vae).joinpath("py.typed").is_file()


def test_docstring_example_draws_the_manifold(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = SavedModel(VAE(VAEConfig(hidden_dims=(8,))), "digits", [1.5, 0.25], "0123456789abcdef")
    save_model(tmp_path / "models" / "vae.safetensors", model)
    monkeypatch.chdir(tmp_path)
    example = [line for line in mnist_vae.__doc__.splitlines() if line.startswith("    ")]
    names = {}

    exec(textwrap.dedent("\n".join(example)), names)

    assert names["digits"].shape == (225, 28, 28)
    assert names["digits"].min() >= 0
    assert names["digits"].max() <= 1

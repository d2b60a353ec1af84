"""The model card, and the README's figures, which are those of the committed run."""

import json
from pathlib import Path

import pytest

from mnist_vae.evaluation.model_card import CAVEATS, MEANINGS, model_card, numbers_table

REPOSITORY = Path(__file__).resolve().parent.parent
ABOUT = ("dataset", "binarize", "images", "test_sha256")


def committed_metrics():
    metrics = json.loads((REPOSITORY / "metrics/evaluate.json").read_text())
    return {name: value for name, value in metrics.items() if name not in ABOUT}


def test_readme_has_the_numbers_of_the_committed_run():
    readme = (REPOSITORY / "README.md").read_text()
    assert json.loads((REPOSITORY / "metrics/evaluate.json").read_text())["dataset"] == "mnist"
    assert "\n".join(numbers_table(committed_metrics())) in readme


def test_every_metric_has_a_meaning_and_nats_are_named():
    assert all(meaning.text for meaning in MEANINGS.values())
    assert {MEANINGS[name].unit for name in ("loss", "bce", "kld", "elbo", "nll", "kld_z*")} == {"nats/image"}


def test_a_number_stands_beside_its_standard_error():
    [row] = [line for line in numbers_table({"elbo": -155.6, "elbo_se": 0.01}) if "`elbo`" in line]
    assert "-155.60 ± 0.01" in row


def test_a_number_without_a_meaning_is_a_mistake():
    with pytest.raises(KeyError):
        numbers_table({"fid": 1.0})


@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
def test_the_card_says_which_pixels_it_speaks_of(kind):
    card = model_card("MNIST", kind, {"model": "2-1-2"}, {"nll": 1.5}, {"train.seed": 1})
    assert CAVEATS[kind] in card
    assert "| model | `2-1-2` |" in card
    assert "| train.seed | `1` |" in card


def test_a_bar_in_a_formula_does_not_end_a_cell():
    [row] = [line for line in numbers_table({"bce": 1.0}) if "`bce`" in line]
    assert "p(x\\|z)" in row

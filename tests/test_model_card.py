"""The model card, and the table of numbers in the documentation, which is that of the committed run."""

import json
from pathlib import Path

import pytest

from mnist_vae.evaluation.model_card import (
    CAVEATS,
    COLLAPSED,
    MEANINGS,
    PICTURES,
    group,
    is_detail,
    model_card,
    numbers_table,
)

REPOSITORY = Path(__file__).resolve().parent.parent
ABOUT = ("dataset", "binarize", "images", "test_sha256")


def row_of(name, metrics):
    [row] = [line for line in numbers_table(metrics) if f"`{name}`" in line]
    return row


def card(binarize="none", metrics=None):
    return model_card("MNIST", binarize, {"model": "2-1-2"}, metrics or {"nll": 1.5}, {"train.seed": 1})


# the documentation


def test_docs_numbers_has_the_numbers_of_the_committed_run():
    metrics = json.loads((REPOSITORY / "metrics/evaluate.json").read_text())
    numbers = {name: value for name, value in metrics.items() if name not in ABOUT}
    text = (REPOSITORY / "docs/numbers.md").read_text(encoding="utf-8")
    _, shown, _ = text.replace("<!-- /numbers -->", "<!-- numbers -->").split("<!-- numbers -->")

    assert metrics["dataset"] == "mnist"
    assert shown.strip().splitlines() == numbers_table(numbers)


# the table


def test_numbers_table_explains_every_metric():
    assert all(meaning.text for meaning in MEANINGS.values())
    assert {MEANINGS[name].unit for name in ("loss", "bce", "kld", "elbo", "nll", "val_nll", "kld_z*")} == {
        "nats/image"
    }


def test_every_standard_error_has_the_name_of_a_number_beside_which_the_table_shows_it():
    assert {name.removesuffix("_se") for name in MEANINGS if name.endswith("_se")} <= MEANINGS.keys()


def test_numbers_table_puts_a_number_beside_its_standard_error():
    metrics = {"elbo": -155.6, "elbo_se": 0.01}

    assert "-155.60 ± 0.01" in row_of("elbo", metrics)
    assert not [line for line in numbers_table(metrics) if "elbo_se" in line]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("kld", 5.609807, "5.61"),
        ("knn_accuracy", 0.67391, "0.6739"),
        ("active_units", 2, "2"),
        ("nll_method", "a", "a"),
    ],
)
def test_numbers_table_rounds_to_what_a_reader_can_use(name, value, shown):
    assert f"| {shown} |" in row_of(name, {name: value})


def test_numbers_table_explains_each_latent_dimension():
    assert "the part of kld in one latent dimension" in row_of("kld_z19", {"kld_z19": 0.5})


def test_numbers_table_refuses_a_number_without_a_meaning():
    with pytest.raises(KeyError):
        numbers_table({"fid": 1.0})


def test_numbers_table_does_not_end_a_cell_at_a_bar_in_a_formula():
    assert "p(x\\|z)" in row_of("bce", {"bce": 1.0})


# the card


@pytest.mark.parametrize("binarize", ["none", "dynamic", "static"])
def test_model_card_says_which_pixels_it_speaks_of(binarize):
    assert CAVEATS[binarize] in card(binarize)


@pytest.mark.parametrize(("binarize", "smooth"), [("none", True), ("dynamic", False), ("static", False)])
def test_model_card_says_that_pictures_are_smooth_where_their_pixels_are_not_drawn(binarize, smooth):
    assert ("Smooth pixel means" in card(binarize)) == smooth


def test_model_card_has_facts_numbers_pictures_and_parameters():
    page = card()

    assert page.startswith("# mnist-vae on MNIST\n")
    assert "| model | `2-1-2` |" in page
    assert row_of("nll", {"nll": 1.5}) in page
    assert all(f"](../plots/{picture})" in page for picture in PICTURES)
    assert "| train.seed | `1` |" in page


@pytest.mark.parametrize(("active_units", "warned"), [(0, True), (1, False), (2, False)])
def test_model_card_warns_of_a_collapsed_posterior(active_units, warned):
    assert (f"**Warning:** {COLLAPSED}." in card(metrics={"active_units": active_units})) == warned


# the names in MLflow


@pytest.mark.parametrize(
    ("name", "grouped"),
    [
        ("loss", "test/loss"),
        ("nll", "test/nll"),
        ("nll_dynamic", "test/nll_dynamic"),
        ("kld", "test/kld"),
        ("knn_accuracy", "test/knn_accuracy"),
        ("val_nll", "val/nll"),
        ("val_nll_static", "val/nll_static"),
        ("samples_coverage", "quality/samples_coverage"),
        ("reconstructions_recall", "quality/reconstructions_recall"),
        ("samples_density_static", "quality/samples_density_static"),
    ],
)
def test_group_puts_a_metric_where_mlflows_page_shows_its_like(name, grouped):
    assert group(name) == grouped


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("nll", False),
        ("kld", False),
        ("val_nll", False),
        ("samples_coverage", False),
        ("elbo_se", True),
        ("nll_method", True),
        ("kld_z0", True),
        ("reference_coverage", True),
    ],
)
def test_is_detail_keeps_from_mlflow_what_the_file_alone_has(name, detail):
    assert is_detail(name) == detail


def test_group_keeps_all_names_apart():
    assert len({group(name) for name in MEANINGS}) == len(MEANINGS)

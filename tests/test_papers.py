"""The published rows, and the page that is made from them."""

import json

import pytest
from ruamel.yaml import YAML

from mnist_vae.params import Params
from tools import papers
from tools.papers import DOCUMENT, ROOT, Result, Row, document, in_yaml, read_results, read_rows, where_made

ROW = {
    "source": "Somebody (2020)",
    "link": "https://example.org",
    "table": "Table 1",
    "quantity": "log-likelihood",
    "published": -100.0,
    "metric": "nll",
    "differs": "nothing",
    "params": {"train.epochs": 3},
}
FOUND = Result(value=98.5, error=0.25, epochs=3, seconds=61.4, processor="a processor", commit="abc1234")


@pytest.mark.parametrize("name", read_rows())
def test_the_parameters_of_each_row_are_parameters_of_the_pipeline(name):
    params = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    for key, value in read_rows()[name].settings.items():
        section, parameter = key.split(".")
        assert parameter in params[section]
        params[section][parameter] = value
    Params(**params)


def test_the_page_is_what_rows_and_results_say():
    assert DOCUMENT.read_text(encoding="utf-8") == document(read_rows(), read_results())


def test_document_gives_a_result_in_the_sign_of_its_source():
    text = document({"one": Row(**ROW)}, {"one": FOUND})

    assert "-98.50 ± 0.25" in text
    assert "+1.50" in text


def test_document_gives_a_loss_as_it_is():
    text = document({"one": Row(**ROW | {"quantity": "loss", "published": 98.0, "metric": "loss"})}, {"one": FOUND})

    assert " 98.50 ± 0.25" in text
    assert "-0.50" in text


def test_document_says_which_rows_have_not_been_run():
    assert "not run yet" in document({"one": Row(**ROW)}, {})


def test_document_gives_the_difference_between_two_rows_with_its_own_error():
    rows = {"one": Row(**ROW), "two": Row(**ROW | {"table": "Table 2", "compared_with": "one"})}
    text = document(rows, {"one": FOUND, "two": FOUND.model_copy(update={"value": 98.04, "gain_error": 0.021})})

    assert "- **Table 2**: better than Table 1 by 0.46 ± 0.02\n" in text
    assert "beside each other" not in document(rows, {"one": FOUND, "two": FOUND})


@pytest.fixture
def two_rows(monkeypatch):
    """The rows "one" and "two", and what git has of their experiments; the second is better by 1, 2 and 3 nats."""
    files = {"one": "digit,nll\n0,80\n1,90\n2,100\n", "two": "digit,nll\n0,79\n1,88\n2,97\n"}
    monkeypatch.setattr(papers, "reference", lambda name: f"ref/{name}" if name in files else "")
    monkeypatch.setattr(papers, "is_current", lambda ref, row: row.differs == "nothing")
    tables = {f"ref/{name}:plots/nll.csv": name for name in files}

    def git(*words):
        return files["ls-tree"] if words[0] == "ls-tree" else files[tables[words[-1]]]

    monkeypatch.setattr(papers, "git", git)
    files["ls-tree"] = "plots/nll.csv"
    return {name: Row(**ROW) for name in ("one", "two")}, files


def test_rows_are_compared_image_by_image(two_rows):
    rows, _ = two_rows

    assert papers.gain_error("two", "one", rows) == pytest.approx(1 / 3**0.5)


@pytest.mark.parametrize("lack", ["experiment", "parameters", "table"])
def test_a_row_is_not_compared_with_what_is_missing_or_old(two_rows, lack, capsys):
    rows, files = two_rows
    if lack == "experiment":
        del files["one"]
    elif lack == "parameters":
        rows["one"] = Row(**ROW | {"differs": "much"})
    else:
        files["ls-tree"] = ""

    assert papers.gain_error("two", "one", rows) is None
    assert 'make papers ROWS="two one"' in capsys.readouterr().out


def test_read_rows_refuses_to_compare_likelihoods_of_other_images(tmp_path):
    (tmp_path / "one.yaml").write_text(json.dumps(ROW))
    other = {"compared_with": "one", "params": {"data.binarize": "static"}}
    (tmp_path / "two.yaml").write_text(json.dumps(ROW | other))

    with pytest.raises(SystemExit, match=r"two\.yaml: compared_with: one has other images"):
        read_rows(tmp_path)


def test_read_rows_refuses_a_file_that_is_no_row(tmp_path):
    (tmp_path / "odd.yaml").write_text(json.dumps(ROW | {"quantity": "perplexity"}))

    with pytest.raises(SystemExit, match=r"odd\.yaml: quantity"):
        read_rows(tmp_path)


@pytest.mark.parametrize("other", ["two", "one"])
def test_read_rows_refuses_a_row_to_compare_with_that_is_not_there(tmp_path, other):
    (tmp_path / "one.yaml").write_text(json.dumps(ROW | {"compared_with": other}))

    with pytest.raises(SystemExit, match=rf"one\.yaml: compared_with: no other row is called {other}"):
        read_rows(tmp_path)


def test_main_refuses_a_row_that_is_not_there(monkeypatch):
    monkeypatch.setattr("sys.argv", ["papers", "svae-d3"])

    with pytest.raises(SystemExit, match=r"no row is called svae-d3; there are .*svae-d2"):
        papers.main()


@pytest.mark.parametrize(("value", "text"), [([256, 128], "[256,128]"), (None, "null"), (0.003, "0.003"), ("a", "a")])
def test_in_yaml_writes_a_value_as_dvc_reads_it(value, text):
    assert in_yaml(value) == text


def test_a_row_that_is_not_run_again_keeps_where_it_was_made():
    elsewhere = FOUND.model_copy(update={"processor": "another one", "seconds": 7.0, "gain_error": 0.1})

    assert where_made(FOUND, elsewhere) == FOUND.model_copy(update={"processor": "another one", "seconds": 7.0})
    assert where_made(FOUND, None) == FOUND
    assert where_made(FOUND, elsewhere.model_copy(update={"commit": "0123456"})) == FOUND


def test_document_gives_no_seconds_of_a_training_that_came_from_dvcs_cache():
    text = document({"one": Row(**ROW)}, {"one": FOUND.model_copy(update={"seconds": None})})

    [row] = [line for line in text.splitlines() if line.startswith("| [Somebody")]
    assert row.split("|")[-3].strip() == ""
    assert "| 61 " in document({"one": Row(**ROW)}, {"one": FOUND})

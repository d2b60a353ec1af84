"""params.yaml: right values come through with their types, each wrong one ends in a line that says what to do."""

import re
from pathlib import Path

import pytest

from mnist_vae.errors import UserError
from mnist_vae.params import load_params

COMMITTED = Path(__file__).parent.parent / "params.yaml"
TEXT = COMMITTED.read_text(encoding="utf-8")
EVERY_NAME = list(load_params(COMMITTED).flat("data", "model", "train", "evaluate", "samples", "grid"))
FLOATS = ["kl_weight", "learning_rate", "eps", "weight_decay", "min_delta"]


def edited(name, line):
    """The committed text with another line in place of parameter ``name``, "section.key"."""
    section, key = name.split(".")
    head, marker, body = TEXT.partition(f"\n{section}:\n")
    body, found = re.subn(rf"(?m)^  {key}:.*$", lambda _: line, body, count=1)
    assert marker
    assert found
    return head + marker + body


@pytest.fixture
def load(tmp_path):
    def load(text):
        path = tmp_path / "params.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_params(path)

    return load


@pytest.fixture
def load_with(load):
    return lambda name, value: load(edited(name, f"  {name.partition('.')[2]}: {value}"))


@pytest.fixture
def complaint(load):
    """What is said about a text that is wrong, line by line."""

    def complaint(text):
        with pytest.raises(UserError) as error:
            load(text)
        return str(error.value).splitlines()

    return complaint


@pytest.fixture
def complaint_about(complaint):
    """The one line that is said about the committed file with one wrong value."""

    def complaint_about(name, value):
        lines = complaint(edited(name, f"  {name.partition('.')[2]}: {value}"))
        assert len(lines) == 1
        return lines[0]

    return complaint_about


# what comes through


def test_the_committed_defaults_are_the_notebooks():
    notebook = {
        "data.dataset": "mnist",
        "data.fallback": "digits",
        "data.binarize": "none",
        "model.hidden_dim": 256,
        "model.latent_dim": 2,
        "train.seed": 1,
        "train.epochs": 10,
        "train.batch_size": 64,
        "train.kl_weight": 1.0,
        "train.learning_rate": 1e-3,
        "train.schedule": "constant",
        "train.betas": [0.9, 0.99],
        "train.eps": 1e-8,
        "train.weight_decay": 1e-5,
        "train.validation_size": 0,
        "train.patience": 5,
        "train.min_delta": 0.0,
        "train.accelerator": "auto",
        "train.threads": 1,
        "samples.seed": 1,
        "samples.rows": 4,
        "samples.cols": 18,
        "grid.size": 15,
        "grid.quantiles": [0.05, 0.95],
    }

    params = load_params(COMMITTED).flat("data", "model", "train", "samples", "grid")

    assert {name: params[name] for name in notebook} == notebook


def test_flat_names_the_asked_for_sections_in_the_files_order():
    params = load_params(COMMITTED)

    assert list(params.flat("grid", "model")) == ["model.hidden_dim", "model.latent_dim", "grid.size", "grid.quantiles"]


@pytest.mark.parametrize("literal", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_a_number_may_be_written_in_any_way_that_yaml_1_2_knows(load_with, literal):
    assert load_with("train.learning_rate", literal).train.learning_rate == 1e-3


def test_a_whole_number_will_do_where_a_number_is_asked_for(load_with):
    assert load_with("train.kl_weight", "2").train.kl_weight == 2


def test_there_may_be_no_fallback(load_with):
    assert load_with("data.fallback", "null").data.fallback is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data.dataset", "digits"),
        ("model.hidden_dim", 1),
        ("model.latent_dim", 1),
        ("train.seed", 0),
        ("train.seed", 2**32 - 1),
        ("train.kl_weight", 0),
        ("train.schedule", "one_cycle"),
        ("train.betas", [0.0, 0.999]),
        ("train.weight_decay", 0),
        ("train.validation_size", 10_000),
        ("train.patience", 0),
        ("train.accelerator", "gpu"),
        ("evaluate.draws", 2),
        ("grid.size", 2),
        ("grid.quantiles", [0.001, 0.002]),
    ],
)
def test_the_ends_of_a_range_are_inside(load_with, name, value):
    assert load_with(name, value).flat(name.split(".")[0])[name] == value


def test_nothing_changes_a_loaded_value():
    params = load_params(COMMITTED)

    with pytest.raises(ValueError, match="frozen"):
        params.train.epochs = 3


# what is wrong with a value


@pytest.mark.parametrize("value", ["abc", "true", "null", "[]", "{a: 1}", '"1"', "2020-01-01", ""])
@pytest.mark.parametrize("name", EVERY_NAME)
def test_no_parameter_takes_a_value_of_another_type(complaint_about, load_with, name, value):
    if name == "data.fallback" and value in ("null", ""):
        assert load_with(name, value).data.fallback is None
        return

    line = complaint_about(name, value)

    assert line.startswith(f"params.yaml: {name} ")
    assert "must" in line
    assert "pydantic" not in line


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("train.epochs", "abc", "train.epochs is 'abc'; it must be a whole number"),
        ("train.epochs", "true", "train.epochs is True; it must be a whole number"),
        ("train.epochs", "1.5", "train.epochs is 1.5; it must be a whole number"),
        ("train.epochs", "3.0", "train.epochs is 3.0; it must be a whole number"),
        ("train.epochs", '"3"', "train.epochs is '3'; it must be a whole number"),
        ("train.epochs", "0", "train.epochs is 0; it must be at least 1"),
        ("train.learning_rate", "abc", "train.learning_rate is 'abc'; it must be a number"),
        ("train.learning_rate", "0", "train.learning_rate is 0; it must be more than 0"),
        ("train.seed", "4294967296", "train.seed is 4294967296; it must be at most 4294967295"),
        ("train.schedule", "cosine", "train.schedule is 'cosine'; it must be constant or one_cycle"),
        ("data.fallback", "mnist", "data.fallback is 'mnist'; it must be digits or null"),
        ("train.betas", "0.9", "train.betas is 0.9; it must be a list such as [0.1, 0.9]"),
        ("train.betas", "[0.9]", "train.betas has 1 values; it must have 2"),
        ("train.betas", "[0.9, 0.99, 0.999]", "train.betas has 3 values; it must have 2"),
        ("train.betas", "[0.9, 1]", "train.betas.1 is 1; it must be less than 1"),
        ("grid.quantiles", "[0.95, 0.05]", "grid.quantiles is [0.95, 0.05]; the first value must be below the second"),
        ("grid.quantiles", "[0.5, 0.5]", "grid.quantiles is [0.5, 0.5]; the first value must be below the second"),
        ("grid.quantiles", "[0, 0.95]", "grid.quantiles.0 is 0; it must be more than 0"),
    ],
)
def test_the_message_says_what_the_value_is_and_what_it_must_be(complaint_about, name, value, says):
    assert complaint_about(name, value) == f"params.yaml: {says}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.hidden_dim", 0),
        ("model.latent_dim", 0),
        ("train.seed", -1),
        ("train.batch_size", 0),
        ("train.kl_weight", -0.1),
        ("train.learning_rate", -1e-3),
        ("train.betas", [-0.1, 0.99]),
        ("train.eps", 0),
        ("train.weight_decay", -1),
        ("train.validation_size", -1),
        ("train.patience", -1),
        ("train.min_delta", -1),
        ("train.threads", 0),
        ("evaluate.seed", -1),
        ("evaluate.draws", 1),
        ("samples.seed", -1),
        ("samples.rows", 0),
        ("samples.cols", 0),
        ("grid.size", 1),
        ("grid.quantiles", [0.5, 1]),
    ],
)
def test_a_value_out_of_range_is_refused(complaint_about, name, value):
    assert re.match(
        rf"params.yaml: {name}\S* is .*; it must be (at least|more than|less than) \d", complaint_about(name, value)
    )


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("name", FLOATS)
def test_a_number_must_be_finite(complaint_about, name, value):
    assert re.search(r"must be (a finite number|at least|more than)", complaint_about(f"train.{name}", value))


def test_the_numbers_in_a_list_must_be_finite(complaint_about):
    assert "must be" in complaint_about("train.betas", "[.nan, 0.99]")
    assert "must be" in complaint_about("grid.quantiles", "[0.05, .inf]")


# what is wrong with a name


@pytest.mark.parametrize("name", EVERY_NAME)
def test_a_missing_parameter_is_named(complaint, name):
    assert complaint(edited(name, "")) == [
        f"params.yaml: {name} is missing; add it (README.md, “Parameters”, lists them all)"
    ]


@pytest.mark.parametrize("section", ["data", "model", "train", "evaluate", "samples", "grid"])
def test_a_missing_section_is_named(complaint, section):
    without = re.sub(rf"(?m)^{section}:\n(  .*\n)+", "", TEXT)

    assert complaint(without) == [
        f"params.yaml: {section} is missing; add it (README.md, “Parameters”, lists them all)"
    ]


@pytest.mark.parametrize("content", ["", " 3", " [1, 2]", " text"])
def test_a_section_must_hold_parameters(complaint, content):
    broken = re.sub(r"(?m)^model:\n(  .*\n)+", f"model:{content}\n", TEXT)

    (line,) = complaint(broken)

    assert line.startswith("params.yaml: model is ")
    assert line.endswith("it must be a section of `name: value` lines")


def test_a_misspelt_parameter_is_recognised(complaint):
    lines = complaint(edited("train.batch_size", "  batchsize: 64"))

    assert "params.yaml: train.batchsize is not a parameter; did you mean batch_size?" in lines
    assert any(line.startswith("params.yaml: train.batch_size is missing") for line in lines)
    assert len(lines) == 2


def test_a_misspelt_section_is_recognised(complaint):
    lines = complaint(TEXT.replace("\ntrain:\n", "\ntrian:\n"))

    assert "params.yaml: trian is not a parameter; did you mean train?" in lines


def test_an_unheard_of_parameter_is_answered_with_the_known_ones(complaint):
    lines = complaint(edited("grid.size", "  size: 15\n  zzz: 1"))

    assert lines == ["params.yaml: grid.zzz is not a parameter; known here: size, quantiles"]


def test_all_that_is_wrong_is_named_at_once(complaint):
    text = TEXT.replace("epochs: 10", "epochs: ten").replace("rows: 4", "rows: 0").replace("size: 15", "")

    lines = complaint(text)

    assert [line.split()[1] for line in lines] == ["train.epochs", "samples.rows", "grid.size"]


# what is wrong with the file


def test_a_parameter_given_twice_is_refused(complaint):
    lines = complaint(edited("train.epochs", "  epochs: 10\n  epochs: 20"))

    assert 'found duplicate key "epochs"' in lines[0]


@pytest.mark.parametrize("text", ["train: [1, 2", "a: b: c", "\ttrain:\n", "train: {", "'"])
def test_what_is_not_yaml_is_answered_with_its_line(complaint, text):
    (line,) = complaint("# a comment\n" + text)

    assert re.match(r"params\.yaml is not valid YAML \(line [23]\): \w", line)


def test_what_is_not_text_is_refused(complaint):
    assert complaint(b"train: \xff\xfe\n") == ["params.yaml is not valid YAML: it is not UTF-8 text"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "3\n", "[1, 2]\n"])
def test_a_file_without_sections_is_refused(complaint, text):
    (line,) = complaint(text)

    assert line.startswith("params.yaml: the file is ")


def test_a_missing_file_is_answered_with_the_way_to_get_it_back(tmp_path):
    with pytest.raises(UserError, match=r"git checkout -- params\.yaml") as error:
        load_params(tmp_path / "params.yaml")

    assert str(tmp_path / "params.yaml") in str(error.value)

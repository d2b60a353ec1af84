"""params.yaml: right values come through with their types, each wrong one ends in a line that says what to do."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from mnist_vae.errors import UserError
from mnist_vae.params import Section, load_params, memory
from mnist_vae.params.memory import memory_of_machine

COMMITTED = Path(__file__).parent.parent / "params.yaml"
TEXT = COMMITTED.read_text(encoding="utf-8")
EVERY_NAME = list(load_params(COMMITTED).flat("data", "model", "train", "evaluate", "samples", "grid"))
FLOATS = ["kl_weight", "kl_warmup", "learning_rate", "eps", "weight_decay", "min_delta"]
NUMBERS = [name for name in EVERY_NAME if re.search(rf"(?m)^  {name.partition('.')[2]}: *[\d.e-]+( |$)", TEXT)]
ENV = os.environ | {"PYTHONPATH": str(COMMITTED.parent / "src")}


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
        "model.hidden_dims": [256],
        "model.latent_dim": 2,
        "model.activation": "relu",
        "train.seed": 1,
        "train.epochs": 10,
        "train.batch_size": 64,
        "train.kl_weight": 1.0,
        "train.kl_warmup": 0,
        "train.importance_samples": 1,
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
        "train.devices": 1,
        "train.nodes": 1,
        "train.precision": "32-true",
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

    names = ["model.hidden_dims", "model.latent_dim", "model.activation", "grid.size", "grid.quantiles"]
    assert list(params.flat("grid", "model")) == names


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
        ("data.dataset", "../faces"),
        ("train.shuffle_window", 1),
        ("model.hidden_dims", [1]),
        ("model.hidden_dims", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("model.activation", "tanh"),
        ("model.latent_dim", 1),
        ("train.seed", 0),
        ("train.seed", 2**32 - 1),
        ("train.kl_weight", 0),
        ("train.kl_warmup", 1),
        ("train.importance_samples", 1_000),
        ("train.schedule", "one_cycle"),
        ("train.betas", [0.0, 0.999]),
        ("train.weight_decay", 0),
        ("train.validation_size", 10_000),
        ("train.patience", 0),
        ("train.accelerator", "gpu"),
        ("evaluate.draws", 2),
        ("grid.size", 2),
        ("grid.quantiles", [0.001, 0.002]),
        ("model.latent_dim", 784),
        ("train.epochs", 1_000_000),
        ("train.kl_weight", 1_000_000),
        ("train.threads", 1024),
        ("evaluate.draws", 1_000_000),
        ("samples.rows", 650),
    ],
)
def test_the_ends_of_a_range_are_inside(load_with, name, value):
    assert load_with(name, value).flat(name.split(".")[0])[name] == value


def test_nothing_changes_a_loaded_value():
    params = load_params(COMMITTED)

    with pytest.raises(ValueError, match="frozen"):
        params.train.epochs = 3


def test_flat_reads_attributes_and_load_params_does_not(monkeypatch):
    """So whoever watches attributes sees which parameters a stage works with."""
    read = set()
    plain = Section.__getattribute__

    def watched(section, name):
        read.add(name)
        return plain(section, name)

    names = {name.partition(".")[2] for name in EVERY_NAME}
    monkeypatch.setattr(Section, "__getattribute__", watched)
    params = load_params(COMMITTED)
    assert not names & read

    params.flat("grid")

    assert names & read == {"size", "quantiles"}


# what is wrong with a value


@pytest.mark.parametrize("value", ["abc", "true", "null", "[]", "{a: 1}", '"1"', "2020-01-01", ""])
@pytest.mark.parametrize("name", EVERY_NAME)
def test_no_parameter_takes_a_value_of_another_type(complaint_about, load_with, name, value):
    section, _, entry = name.partition(".")
    if name in ("data.fallback", "evaluate.quadrature_step") and value in ("null", ""):
        assert getattr(getattr(load_with(name, value), section), entry) is None
        return

    line = complaint_about(name, value)

    assert line.startswith(f"params.yaml: {name} ")
    assert "must" in line
    assert "pydantic" not in line


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("train.epochs", "abc", "train.epochs is 'abc'; it must be a whole number"),
        ("train.epochs", "true", "train.epochs is true; it must be a whole number"),
        ("train.epochs", "", "train.epochs is null; it must be a whole number"),
        ("train.epochs", "[false, {a: null}]", "train.epochs is [false, {'a': null}]; it must be a whole number"),
        ("train.epochs", "1.5", "train.epochs is 1.5; it must be a whole number"),
        ("train.epochs", "3.0", "train.epochs is 3.0; it must be a whole number"),
        ("train.epochs", '"3"', "train.epochs is '3'; it must be a whole number"),
        ("train.epochs", "0", "train.epochs is 0; it must be at least 1"),
        ("train.learning_rate", "abc", "train.learning_rate is 'abc'; it must be a number"),
        ("train.learning_rate", "0", "train.learning_rate is 0; it must be more than 0"),
        ("train.seed", "4294967296", "train.seed is 4294967296; it must be at most 4294967295"),
        ("train.schedule", "cosine", "train.schedule is 'cosine'; it must be constant or one_cycle"),
        (
            "data.dataset",
            "mnsit",
            "data.dataset is 'mnsit'; it must be mnist, digits or the path of a folder, with a / in it",
        ),
        ("train.shuffle_window", "0", "train.shuffle_window is 0; it must be at least 1"),
        ("data.fallback", "mnist", "data.fallback is 'mnist'; it must be digits or null"),
        ("train.betas", "0.9", "train.betas is 0.9; it must be a list in square brackets"),
        ("train.betas", "[0.9]", "train.betas has 1 values; it must have at least 2"),
        ("train.betas", "[0.9, 0.99, 0.999]", "train.betas has 3 values; it must have at most 2"),
        ("train.kl_warmup", "1.01", "train.kl_warmup is 1.01; it must be at most 1"),
        ("train.importance_samples", "1000001", "train.importance_samples is 1000001; it must be at most 1000000"),
        ("model.activation", "gelu", "model.activation is 'gelu'; it must be relu or tanh"),
        ("model.hidden_dims", "256", "model.hidden_dims is 256; it must be a list in square brackets"),
        ("model.hidden_dims", "[]", "model.hidden_dims has 0 values; it must have at least 1"),
        ("model.hidden_dims", "[9,9,9,9,9,9,9,9,9]", "model.hidden_dims has 9 values; it must have at most 8"),
        ("model.hidden_dims", "[200, 1000001]", "model.hidden_dims.1 is 1000001; it must be at most 1000000"),
        ("model.hidden_dims", "[200.0]", "model.hidden_dims.0 is 200.0; it must be a whole number"),
        ("model.hidden_dims", "[[200]]", "model.hidden_dims.0 is [200]; it must be a whole number"),
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
        ("model.hidden_dims", [256, 0]),
        ("model.latent_dim", 0),
        ("train.seed", -1),
        ("train.batch_size", 0),
        ("train.kl_weight", -0.1),
        ("train.kl_warmup", -0.1),
        ("train.importance_samples", 0),
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


@pytest.mark.parametrize("value", ["1000001", "10000000000", f"1{400 * '0'}", f"0x{5000 * 'f'}"])
@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_an_upper_bound(complaint_about, name, value):
    if name.endswith("seed") and int(value, 0) < 2**32:
        return

    line = complaint_about(name, value)

    assert re.fullmatch(
        rf"params.yaml: {name} is .{{1,60}}; it must be (at most [\d.]+|less than 1|a finite number)", line
    )


@pytest.mark.parametrize("name", FLOATS)
def test_a_number_beyond_any_float_is_refused(complaint_about, name):
    assert complaint_about(f"train.{name}", "1e400") == f"params.yaml: train.{name} is inf; it must be a finite number"


@pytest.mark.parametrize(
    ("value", "is_shown"),
    [
        (f"0x{5000 * 'f'}", "a number of thousands of digits"),
        (500 * "x", r"'x+\.\.\.x+'"),
        (r'"two\nlines\e[31m"', r"'two\\nlines\\x1b\[31m'"),
        (f"[{300 * '[1, 2], '}]", r"\[\[1, 2\], .*\.\.\.\]"),
        (30 * "[" + 30 * "]", r"\[\[\[\.\.\.\]\]\]"),
    ],
)
def test_a_wrong_value_is_shown_in_at_most_60_characters(complaint_about, value, is_shown):
    line = complaint_about("train.epochs", value)

    shown = line.removeprefix("params.yaml: train.epochs is ").removesuffix("; it must be a whole number")
    assert re.fullmatch(is_shown, shown.removesuffix("; it must be at most 1000000"))
    assert len(line) < 130


@pytest.mark.parametrize("value", [5000 * "1", "2026-02-30", "!!int x", "!!bool maybe", "!!float x"])
def test_what_cannot_be_a_value_is_answered_with_its_line(complaint_about, value):
    number = TEXT[: TEXT.index("  size: ")].count("\n") + 1

    line = complaint_about("grid.size", value)

    assert re.fullmatch(rf"params.yaml is not valid YAML \(line {number}\): '.{{1,58}}' cannot be read as \w+", line)


# what does not fit into memory


@pytest.fixture
def eight_gigabytes(monkeypatch):
    monkeypatch.setattr(memory, "memory_of_machine", lambda: 8 * 10**9)


@pytest.mark.usefixtures("eight_gigabytes")
@pytest.mark.parametrize(
    ("name", "value", "what", "need"),
    [
        ("grid.size", 100_000, "the picture", "648 TB"),
        ("grid.size", 400, "the picture", "10.4 GB"),
        ("model.hidden_dims", [1_000_000], "training", "89.2 GB"),
        ("model.hidden_dims", [1_000_000], "the evaluation", "86.4 GB"),
        ("model.hidden_dims", [256, 1_000_000, 256], "training", "58.4 GB"),
        ("train.importance_samples", 1_000_000, "training", "533 GB"),
        ("evaluate.neighbours", 60_000, "the evaluation", "24.1 GB"),
    ],
)
def test_what_needs_more_memory_than_there_is_is_refused_with_the_figure(complaint, name, value, what, need):
    lines = complaint(edited(name, f"  {name.partition('.')[2]}: {value}"))

    assert f"params.yaml: {name} is {value}: {what} needs {need} and this machine has 8 GB; lower {name}" in lines


@pytest.mark.usefixtures("eight_gigabytes")
def test_parameters_that_are_too_large_together_are_both_named(complaint, load):
    assert load(TEXT.replace("rows: 4", "rows: 600"))
    assert load(TEXT.replace("cols: 18", "cols: 600"))

    assert complaint(TEXT.replace("rows: 4", "rows: 600").replace("cols: 18", "cols: 600")) == [
        "params.yaml: samples.rows is 600 and samples.cols is 600: the picture needs 124 GB and this machine has 8 GB; "
        "lower samples.rows or samples.cols"
    ]


@pytest.mark.usefixtures("eight_gigabytes")
def test_each_stage_that_needs_too_much_gets_a_line(complaint):
    lines = complaint(TEXT.replace("neighbours: 10", "neighbours: 50000").replace("size: 15", "size: 1000"))

    assert [line.split()[1] for line in lines] == ["evaluate.neighbours", "grid.size"]


@pytest.mark.usefixtures("eight_gigabytes")
def test_a_batch_needs_no_more_than_the_training_set(load_with):
    assert load_with("train.batch_size", 1_000_000)


def test_memory_of_machine_is_what_it_has_or_less():
    assert 10**8 < memory_of_machine() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(("limit", "size"), [("2000000\n", 2_000_000), ("max\n", 10**15), ("9" * 18, 10**15)])
def test_memory_of_machine_is_that_of_its_container_where_lower(monkeypatch, limit, size):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 10**12}.get)
    monkeypatch.setattr(Path, "read_text", lambda path: limit)

    assert memory_of_machine() == size


# stage: what it imports, what it does at a size, a size that takes much memory, the estimate for that size
WORK = {
    "training": (
        "from mnist_vae.params import Train\nfrom mnist_vae.training.fit import fit",
        "fit(torch.zeros(128, 28, 28, dtype=torch.uint8).numpy(), VAEConfig(({size},)), train)",
        10_000,
        lambda size: memory.training_bytes([size], 2, 64, 1),
    ),
    "training of several layers": (
        "from mnist_vae.params import Train\nfrom mnist_vae.training.fit import fit",
        "fit(torch.zeros(128, 28, 28, dtype=torch.uint8).numpy(), VAEConfig(({size}, {size})), train)",
        2_000,
        lambda size: memory.training_bytes([size, size], 2, 64, 1),
    ),
    "training on the IWAE bound": (
        "from mnist_vae.params import Train\nfrom mnist_vae.training.fit import fit",
        "train = train.model_copy(update=dict(importance_samples={size}))\n"
        "fit(torch.zeros(128, 28, 28, dtype=torch.uint8).numpy(), VAEConfig(), train)",
        500,
        lambda size: memory.training_bytes([256], 2, 64, size),
    ),
    "evaluation": (
        "from mnist_vae.evaluation.likelihood import quadrature_nll",
        "quadrature_nll(VAE(VAEConfig(({size},))), torch.zeros(10_000, 784), 0.5)",
        4_000,
        lambda size: memory.evaluation_bytes([size], 2, 1, 1),
    ),
    "samples": (
        "from mnist_vae.pictures.figures import samples_figure",
        "draw(samples_figure(decode(VAE(VAEConfig()), prior_draws({size} ** 2, 2, 1)), {size}, 'x'))",
        30,
        lambda size: memory.samples_bytes(size, size, [256]),
    ),
    "grid": (
        "from mnist_vae.pictures.figures import manifold_figure",
        "draw(manifold_figure(manifold(VAE(VAEConfig()), {size}, (0.05, 0.95), (1, 1)), 'x'))",
        70,
        lambda size: memory.grid_bytes(size, [256]),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", WORK)
def test_an_estimate_of_memory_is_near_what_the_stage_takes(stage):
    imports, work, size, estimate = WORK[stage]
    program = f"""
from io import BytesIO
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
import sys
import torch
{imports}
from mnist_vae.model.latent import decode, manifold, prior_draws
from mnist_vae.model.vae import VAE, VAEConfig
from mnist_vae.params import Train
train = Train(**{load_params(COMMITTED).train.model_dump() | {"epochs": 1, "accelerator": "cpu"}})
draw = lambda figure: figure.savefig(BytesIO(), dpi=100)

def peak():  # bytes; on Linux, getrusage begins with the peak of the process that started this one
    if sys.platform != "linux":
        return getrusage(RUSAGE_SELF).ru_maxrss
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

{work.format(size=2)}
before = peak()
{work.format(size=size)}
print(peak() - before)
"""
    printed = subprocess.check_output([sys.executable, "-c", program], cwd=COMMITTED.parent, env=ENV, text=True)

    assert int(printed) / 1.5 < estimate(size) < 2 * int(printed)


# what is wrong with a name


@pytest.mark.parametrize("name", EVERY_NAME)
def test_a_missing_parameter_is_named(complaint, name):
    assert complaint(edited(name, "")) == [
        f"params.yaml: {name} is missing; add it (`git show HEAD:params.yaml` explains them all)"
    ]


@pytest.mark.parametrize("section", ["data", "model", "train", "evaluate", "samples", "grid"])
def test_a_missing_section_is_named(complaint, section):
    without = re.sub(rf"(?m)^{section}:\n(  .*\n)+", "", TEXT)

    assert complaint(without) == [
        f"params.yaml: {section} is missing; add it (`git show HEAD:params.yaml` explains them all)"
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


@pytest.mark.parametrize("key", ["1", "null", "2.5", "[a, b]", "2026-01-01", "x" * 120, r'"two\nlines"', r'"\u2028"'])
def test_any_key_is_named_on_one_line(complaint, key):
    (line,) = complaint(edited("grid.size", f"  size: 15\n  {key}: 1"))

    assert re.match(r"params.yaml: (grid\.|null).{1,55} is not a parameter; ", line)
    assert len(line) < 130


def test_half_of_a_character_is_refused(complaint_about):
    line = complaint_about("data.dataset", r'"\ud800"')

    assert line == r"params.yaml: data.dataset is '\ud800'; it must be valid Unicode text"


def test_more_complaints_than_there_are_parameters_are_counted(complaint):
    lines = complaint(TEXT + "".join(f"  x{i}: 1\n" for i in range(1000)))

    assert len(lines) == 51
    assert lines[-1] == "params.yaml: and 950 more such lines"


def test_all_that_is_wrong_is_named_at_once(complaint):
    text = TEXT.replace("epochs: 10", "epochs: ten").replace("rows: 4", "rows: 0").replace("size: 15", "")

    lines = complaint(text)

    assert [line.split()[1] for line in lines] == ["train.epochs", "samples.rows", "grid.size"]


# what is wrong with the file


def test_a_parameter_given_twice_is_refused(complaint):
    lines = complaint(edited("train.epochs", "  epochs: 10\n  epochs: 20"))

    number = TEXT[: TEXT.index("  epochs: ")].count("\n") + 2
    says = 'found duplicate key "epochs" with value "20" (original value: "10")'
    assert lines == [f"params.yaml is not valid YAML (line {number}): {says}"]


@pytest.mark.parametrize("text", ["train: [1, 2", "a: b: c", "\ttrain:\n", "train: {", "'"])
def test_what_is_not_yaml_is_answered_with_its_line(complaint, text):
    (line,) = complaint("# a comment\n" + text)

    assert re.match(r"params\.yaml is not valid YAML \(line [23]\): \w", line)


def test_what_is_not_text_is_refused(complaint):
    assert complaint(b"#\ntrain: \xff\xfe\n") == ["params.yaml is not valid YAML (line 2): it is not UTF-8 text"]


@pytest.mark.parametrize(
    "text",
    [
        "a: \0",
        "a: \x1b[31m",
        "%YAML 9.9\n---\na: 1",
        "---\na\n---\nb",
        "*b",
        "!!python/object:os.system x",
        "{a: b}: c",
    ],
)
def test_what_yaml_does_not_know_is_refused_on_one_line(complaint, text):
    (line,) = complaint(text)

    assert re.match(r"params\.yaml is not valid YAML( \(line \d\))?: \w", line)
    assert line.isprintable()


@pytest.mark.parametrize("text", ["[" * 1000, "{a: " * 1000, "? " * 1000, "[" * 500 + "]" * 500])
def test_what_is_nested_too_deeply_is_refused(complaint, text):
    (line,) = complaint("train: " + text)

    assert line.startswith("params.yaml is not valid YAML")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("nine", ["[{}]", "{{x: [{}]}}", "{{<<: [{}]}}"])
def test_aliases_of_aliases_do_not_multiply(complaint, nine):
    laughs = [f"{b}: &{b} {nine.format(', '.join([f'*{a}'] * 9))}\n" for a, b in pairwise("abcdefghij")]

    lines = complaint("a: &a {x: lol}\n" + "".join(laughs) + "train: *j\n")

    assert max(map(len, lines)) < 300


def test_an_alias_may_stand_for_a_value(load):
    text = edited("train.seed", "  seed: &seed 7").replace("evaluate:\n  seed: 1", "evaluate:\n  seed: *seed")

    assert load(text).evaluate.seed == 7


@pytest.mark.parametrize("text", [TEXT.replace("\n", "\r\n"), "\ufeff" + TEXT])
def test_what_windows_adds_to_a_text_does_no_harm(load, text):
    assert load(text) == load(TEXT)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [65_537, 10**8])
def test_a_file_too_large_for_params_yaml_is_not_parsed(load, size):
    with pytest.raises(UserError, match=r"^params.yaml has more than 65,536 bytes.*`git checkout -- params.yaml`"):
        load(b"- [1]\n" * (size // 6 + 1))


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_a_file_without_content_is_called_empty(complaint, text):
    assert complaint(text) == ["params.yaml is empty; `git checkout -- params.yaml` brings it back"]


@pytest.mark.parametrize("text", ["3\n", "[1, 2]\n"])
def test_a_file_without_sections_is_refused(complaint, text):
    (line,) = complaint(text)

    assert line.startswith("params.yaml: the file is ")


def test_a_missing_file_is_answered_with_the_way_to_get_it_back(tmp_path):
    with pytest.raises(UserError, match=r"git checkout -- params\.yaml") as error:
        load_params(tmp_path / "params.yaml")

    assert str(tmp_path / "params.yaml") in str(error.value)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_not_a_file_is_refused(tmp_path, make):
    make(tmp_path / "params.yaml")

    with pytest.raises(UserError, match=r"params.yaml is not a file; .*`git checkout -- params.yaml` brings it back$"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("failure", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_that_cannot_be_read_is_answered_with_the_reason(monkeypatch, failure):
    def refuse(*_, **__):
        raise failure

    monkeypatch.setattr(Path, "open", refuse)

    with pytest.raises(UserError, match=rf"params.yaml cannot be read \({failure.strerror}\); change its permissions"):
        load_params(COMMITTED)

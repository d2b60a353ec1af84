"""Run published settings as DVC experiments, and write what came out beside what was published.

python -m tools.papers              every row of papers/
python -m tools.papers svae-d2 …    some of them             (`make papers ROWS="svae-d2 …"`)

Each row is the experiment papers-NAME. One that is there with the same parameters is not run again; one that was
interrupted resumes after its last epoch. What has come out so far stands in papers/results.json.
"""

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML

from mnist_vae.data.binarization import metric_name
from mnist_vae.files import write_json, write_text
from mnist_vae.tracking.journal import Begin, End, journals
from tools.clone import ROOT, GitError, git
from tools.machine import processor
from tools.table import table

ROWS = ROOT / "papers"
RESULTS = ROWS / "results.json"
DOCUMENT = ROOT / "docs" / "papers.md"
NLL = "plots/nll.csv"  # of an experiment
COLUMNS = ["row", "quantity", "published", "ours", "better by", "their epochs", "our epochs", "our seconds", "made by"]
INTRODUCTION = """# Published numbers, and ours

Made by `make papers`; do not edit. Each row is one file in [`papers/`](../papers), which has its parameters, and one
DVC experiment, `papers-` and the file's name; `make papers ROWS=svae-d2` runs one. Values are nats per image on all
10,000 test images, ± the standard error: of a likelihood over images, of a loss over draws of z. Theirs and ours are
measured on the same test digits (where pixels are drawn black or white, each drew its own), so chance moves their
difference by less than these errors say. The seconds are those of the stage train on one core; other work on the
machine makes them more. No seconds: DVC's cache had the model. No epochs: they are not published."""

COMPARISONS = [
    "## Rows beside each other",
    "",
    "Differences in nats per image, ± the standard error of the mean over images of each image's own difference.",
    "",
]


class Row(BaseModel):
    """A published number, and the parameters that are to reach it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    link: str
    table: str  # where in the source it stands
    quantity: Literal["log-likelihood", "NLL", "loss"]  # nats per image, in the source's own sign
    published: float
    published_epochs: int | None = None
    metric: Literal["nll", "loss"]  # of metrics/evaluate.json
    differs: str  # from the source
    compared_with: str | None = None  # another row, image by image
    params: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """All that is unlike params.yaml. Without MNIST there is no row."""
        return {"data.fallback": None, **self.params}

    @property
    def images(self) -> dict[str, Any]:
        """What is said of the data."""
        return {name: value for name, value in self.params.items() if name.startswith("data.")}


class Result(BaseModel):
    """What an experiment gave."""

    value: float
    error: float  # its standard error: of nll over images, of loss over draws
    epochs: int
    seconds: float | None = None  # of training; None where DVC's cache had the model already
    processor: str
    commit: str
    gain_error: float | None = None  # standard error of the mean, over images, of what the row compared with has more


def read_rows(folder: Path = ROWS) -> dict[str, Row]:
    """The rows by name, those of one source together.

    Raises:
        SystemExit: a file is not a row; the message names file and field.
    """
    rows = {}
    for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem):
        try:
            rows[path.stem] = Row(**YAML(typ="safe", pure=True).load(path))
        except ValidationError as error:
            first = error.errors()[0]
            sys.exit(f"papers: {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}")
    for name, row in rows.items():
        if row.compared_with not in {None, *rows} - {name}:
            sys.exit(f"papers: {folder / name}.yaml: compared_with: no other row is called {row.compared_with}")
        elif row.compared_with and row.images != rows[row.compared_with].images:
            sys.exit(f"papers: {folder / name}.yaml: compared_with: {row.compared_with} has other images")

    def order(item: tuple[str, Row]) -> tuple[str, int, bool]:
        row = item[1]
        return row.source, row.params.get("model.latent_dim", 0), row.compared_with is not None

    return dict(sorted(rows.items(), key=order))


def experiment(name: str) -> str:
    return f"papers-{name}"


def reference(name: str) -> str:
    """The git reference of a row's experiment, "" where there is none; the newest where there are several."""
    listed = git("for-each-ref", "--sort=-committerdate", "--format=%(refname)", "refs/exps").split()
    return next((ref for ref in listed if ref.endswith(f"/{experiment(name)}")), "")


def is_current(ref: str, row: Row) -> bool:
    """Whether an experiment has a row's parameters."""
    return flat(git("show", f"{ref}:params.yaml")) == flat(git("show", "HEAD:params.yaml")) | row.settings


def flat(text: str) -> dict[str, Any]:
    """{"train.epochs": 10, …} from a params.yaml."""
    params = YAML(typ="safe", pure=True).load(text)
    return {f"{section}.{name}": value for section, values in params.items() for name, value in values.items()}


def run(name: str, row: Row) -> None:
    """Run a row's experiment in a copy of the workspace.

    Raises:
        CalledProcessError: DVC has failed, and has said why.
    """
    settings = [part for key, value in row.settings.items() for part in ("-S", f"{key}={in_yaml(value)}")]
    force = ["--force"] if reference(name) else []  # an older one of this name makes way
    command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", *force, "--name", experiment(name), *settings]
    subprocess.run(command, cwd=ROOT, check=True)


def in_yaml(value: Any) -> str:
    """A value as `-S` takes it: ``[256,128]``, ``null``."""
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list) or value is None else str(value)


def result(name: str, row: Row) -> Result:
    """What a row's experiment gave.

    Raises:
        GitError: there is no such experiment.
    """
    ref = reference(name)
    evaluated = json.loads(git("show", f"{ref}:metrics/evaluate.json"))
    trained = json.loads(git("show", f"{ref}:metrics/train.json"))
    return Result(
        value=evaluated[metric_name(row.metric, evaluated["binarize"])],
        error=evaluated[metric_name(f"{row.metric}_se", evaluated["binarize"])],
        epochs=trained["epochs"],
        seconds=training_seconds(name),
        processor=processor(),
        commit=git("rev-parse", "--short", f"{ref}^").strip(),
    )


def where_made(found: Result, known: Result | None) -> Result:
    """A result that was not made now, with the processor and the seconds that are on record for its commit."""
    if known is None or known.commit != found.commit:
        return found
    return found.model_copy(update={"processor": known.processor, "seconds": known.seconds})


def gain_error(name: str, other: str, rows: dict[str, Row]) -> float | None:
    """The standard error of how much lower a row's nll is than another one's, which have the same images."""
    nll, others_nll = (likelihoods(one, rows[one]) for one in (name, other))
    if nll is None or others_nll is None:
        print(f'papers: {name} and {other} are compared once both are run: make papers ROWS="{name} {other}"')
        return None
    return float((others_nll - nll).sem())


def likelihoods(name: str, row: Row) -> pd.Series | None:
    """The nll of each test image by a row's experiment; None without one that is current and has this table."""
    ref = reference(name)
    if not ref or not is_current(ref, row) or not git("ls-tree", "--name-only", ref, NLL):
        return None
    return pd.read_csv(StringIO(git("show", f"{ref}:{NLL}")))["nll"]


def training_seconds(name: str) -> float | None:
    """How long the stage train was at work for the newest training of this name, if ever; interruptions left out."""
    latest, seconds = 0, 0.0
    for journal in journals(ROOT):
        begun: dict[str, int] = {}  # by process
        worked = last = 0
        for record, _ in journal.read():
            if isinstance(record, Begin) and record.tags.get("dvc_experiment") == experiment(name):
                begun[record.process] = last = record.at
            elif isinstance(record, End) and record.process in begun:
                worked += record.at - begun.pop(record.process)
        if last > latest:
            latest, seconds = last, worked / 1_000
    return seconds or None


def document(rows: dict[str, Row], results: dict[str, Result]) -> str:
    """docs/papers.md: each published value beside ours."""
    lines = []
    for name, row in rows.items():
        where, theirs = f"[{row.source}]({row.link}), {row.table}", str(row.published_epochs or "")
        cells = [where, row.quantity, f"{row.published:.2f}"]
        if found := results.get(name):
            sign = -1 if row.quantity == "log-likelihood" else 1
            better = sign * row.published - found.value
            cells += [f"{sign * found.value:.2f} ± {found.error:.2f}", f"{better:+.2f}", theirs, str(found.epochs)]
            cells += [f"{found.seconds:,.0f}" if found.seconds else "", f"{found.processor}, {found.commit}"]
        else:
            cells += ["not run yet", "", theirs, str(row.params.get("train.epochs", "")), "", ""]
        lines.append(cells)
    gains = [
        f"- **{row.table}**: better than {rows[other].table} by {results[other].value - found.value:.2f} ± {error:.2f}"
        for name, row in rows.items()
        if (other := row.compared_with) in results and (found := results.get(name)) and (error := found.gain_error)
    ]
    image_by_image = "\n".join([*COMPARISONS, *gains, "", ""]) if gains else ""
    differences = "\n".join(f"- **{row.source}, {row.table}**: {row.differs}." for row in rows.values())
    return f"{INTRODUCTION}\n\n{table(COLUMNS, lines)}\n\n{image_by_image}## What differs\n\n{differences}\n"


def read_results() -> dict[str, Result]:
    """What has come out so far, by row."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return {name: Result(**values) for name, values in found.items()}


def main() -> None:
    rows = read_rows()
    if unknown := sorted(set(sys.argv[1:]) - set(rows)):
        sys.exit(f"papers: no row is called {', '.join(unknown)}; there are {', '.join(rows)}")
    try:
        for name in sys.argv[1:] or rows:
            ref = reference(name)
            known = read_results().get(name)
            if not ref or not is_current(ref, rows[name]):
                run(name, rows[name])
                known = None
            results = {**read_results(), name: where_made(result(name, rows[name]), known)}
            for one, row in rows.items():  # a comparison is as new as both its rows
                if row.compared_with and one in results and name in (one, row.compared_with):
                    error = gain_error(one, row.compared_with, rows)
                    results[one] = results[one].model_copy(update={"gain_error": error})
            write_json(RESULTS, {name: found.model_dump(exclude_none=True) for name, found in sorted(results.items())})
            write_text(DOCUMENT, document(rows, results))
            print(f"papers: {name}: {results[name].value:.2f}")
    except subprocess.CalledProcessError:
        sys.exit("papers: the experiment did not succeed; the same command goes on after its last epoch")
    except GitError as error:
        sys.exit(f"papers: {error}")


if __name__ == "__main__":
    main()

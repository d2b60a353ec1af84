"""A typed, validated view of params.yaml: a wrong value ends here, in one line, before any work is done.

There are no defaults in code. params.yaml is the one place where a value stands, so a file that lacks one is
as wrong as a file with one too many.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML, YAMLError

from mnist_vae.errors import UserError

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _increasing(pair: list[float]) -> list[float]:
    if pair[0] >= pair[1]:
        raise PydanticCustomError("increasing", "the first value must be below the second")
    return pair


class Section(BaseModel):
    """One section of params.yaml. Types are strict: "3" is no number and 3.0 is no count."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """Which images."""

    dataset: Literal["mnist", "digits"]
    fallback: Literal["digits", None]
    binarize: Literal["none", "dynamic", "static"]
    binarize_seed: Seed


class Model(Section):
    """The sizes of the VAE; its input is always 28 × 28 = 784 pixels."""

    hidden_dim: Count
    latent_dim: Count


class Train(Section):
    """The optimisation: Adam on the sum of the loss over a mini-batch."""

    seed: Seed
    epochs: Count
    batch_size: Count
    kl_weight: NonNegative
    learning_rate: Positive
    schedule: Literal["constant", "one_cycle"]
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)]
    eps: Positive
    weight_decay: NonNegative
    validation_size: Annotated[int, Field(ge=0)]
    patience: Annotated[int, Field(ge=0)]
    min_delta: NonNegative
    accelerator: Literal["auto", "cpu", "gpu", "mps"]
    threads: Count
    compile: Literal["none", "default", "reduce-overhead"]


class Evaluate(Section):
    """The measurements on the test set."""

    seed: Seed
    draws: Annotated[int, Field(ge=2)]
    quadrature_step: Annotated[float, Field(ge=0.005, le=0.5)]
    importance_samples: Count
    neighbours: Count
    quality_images: Annotated[int, Field(ge=10)]


class Samples(Section):
    """The picture of draws from the prior."""

    seed: Seed
    rows: Count
    cols: Count


class Grid(Section):
    """The picture of the latent space, decoded at quantiles of the prior."""

    size: Annotated[int, Field(ge=2)]
    quantiles: Annotated[list[Fraction], Field(min_length=2, max_length=2), AfterValidator(_increasing)]


class Params(Section):
    """The whole of params.yaml."""

    data: Data
    model: Model
    train: Train
    evaluate: Evaluate
    samples: Samples
    grid: Grid

    def flat(self, *sections: str) -> dict[str, Any]:
        """{"train.epochs": 10, …} for the named sections, in the file's order."""
        return {
            f"{section}.{name}": value
            for section, values in self.model_dump(include=set(sections)).items()
            for name, value in values.items()
        }


def load_params(path: Path) -> Params:
    """Read and check params.yaml, by the YAML 1.2 rules that DVC reads it by (1e-3 is a number).

    Raises:
        UserError: the file is missing or is not YAML, or a parameter is missing, misspelt, of the wrong type or
            out of range. All that is wrong is named, one line each.
    """
    try:
        content = YAML(typ="safe", pure=True).load(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; `git checkout -- {path.name}` brings it back") from error
    except (YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        problem = getattr(error, "problem", None) or "it is not UTF-8 text"
        raise UserError(f"{path.name} is not valid YAML{line}: {problem}") from error
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise UserError("\n".join(f"{path.name}: {_explain(problem)}" for problem in problems)) from error


def _explain(problem: dict[str, Any]) -> str:
    """One of pydantic's findings as a sentence: which parameter, what it is, what it must be."""
    name = ".".join(str(part) for part in problem["loc"])
    given, context = problem["input"], problem.get("ctx", {})
    match problem["type"]:
        case "missing":
            return f"{name} is missing; add it (README.md, “Parameters”, lists them all)"
        case "extra_forbidden":
            return f"{name} is not a parameter{_did_you_mean(problem['loc'])}"
        case "model_type":
            return f"{name or 'the file'} is {given!r}; it must be a section of `name: value` lines"
        case "too_short" | "too_long":
            return (
                f"{name} has {len(given)} values; it must have {context.get('min_length', context.get('max_length'))}"
            )
        case "increasing":
            return f"{name} is {given!r}; {problem['msg']}"
    must = {
        "int_type": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "string_type": "a text",
        "list_type": "a list such as [0.1, 0.9]",
        "literal_error": str(context.get("expected", "")).replace("'", "").replace("None", "null"),
        "greater_than_equal": f"at least {context.get('ge', 0):.15g}",
        "greater_than": f"more than {context.get('gt', 0):.15g}",
        "less_than_equal": f"at most {context.get('le', 0):.15g}",
        "less_than": f"less than {context.get('lt', 0):.15g}",
    }.get(problem["type"], problem["msg"])
    return f"{name} is {given!r}; it must be {must}"


def _did_you_mean(location: tuple[int | str, ...]) -> str:
    *sections, name = map(str, location)
    known = Params.model_fields[sections[0]].annotation.model_fields if sections else Params.model_fields
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"

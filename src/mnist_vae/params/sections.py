"""The sections of params.yaml, typed and bounded.

There are no defaults in code. params.yaml is the one place where a value stands, so a file that lacks one is
as wrong as a file with one too many.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

MOST = 1_000_000  # of anything: more is a slip of the finger, and would overflow somewhere in the libraries
MOST_IMAGES_ALONG_A_SIDE = 650  # of the picture of samples, 100 pixels each: matplotlib refuses 2**16 pixels

NAMES = ("mnist", "digits")  # of data sets that this project finds by itself

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrZero = Annotated[int, Field(ge=0, le=MOST)]
Side = Annotated[int, Field(ge=1, le=MOST_IMAGES_ALONG_A_SIDE)]
NonNegative = Annotated[float, Field(ge=0, le=MOST)]
Positive = Annotated[float, Field(gt=0, le=MOST)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _increasing(pair: list[float]) -> list[float]:
    if pair[0] >= pair[1]:
        raise PydanticCustomError("increasing", "the first value must be below the second")
    return pair


def _name_or_folder(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("string_unicode", "valid Unicode text") from error
    if value not in NAMES and ("/" not in value or "\0" in value):
        raise PydanticCustomError("no_dataset", "mnist, digits or the path of a folder, with a / in it")
    return value


class Section(BaseModel):
    """One section of params.yaml. Types are strict: "3" is no number and 3.0 is no count."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """Which images."""

    dataset: Annotated[str, AfterValidator(_name_or_folder)]
    fallback: Literal["digits", None]
    binarize: Literal["none", "dynamic", "static"]
    binarize_seed: Seed


class Model(Section):
    """The layers of the VAE; its input is always 28 × 28 = 784 pixels."""

    hidden_dims: Annotated[list[Count], Field(min_length=1, max_length=8)]
    latent_dim: Annotated[int, Field(ge=1, le=784)]
    activation: Literal["relu", "tanh"]


class Train(Section):
    """The optimisation: Adam on the sum of the loss over a mini-batch."""

    seed: Seed
    epochs: Count
    batch_size: Count
    shuffle_window: Count
    kl_weight: NonNegative
    kl_warmup: Annotated[float, Field(ge=0, le=1)]
    importance_samples: Count
    learning_rate: Positive
    schedule: Literal["constant", "one_cycle"]
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)]
    eps: Positive
    weight_decay: NonNegative
    validation_size: CountOrZero
    patience: CountOrZero
    min_delta: NonNegative
    accelerator: Literal["auto", "cpu", "gpu", "mps"]
    threads: Annotated[int, Field(ge=1, le=1024)]
    compile: Literal["none", "default", "reduce-overhead"]
    devices: Annotated[int, Field(ge=1, le=1024)]
    nodes: Annotated[int, Field(ge=1, le=1024)]
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]


class Evaluate(Section):
    """The measurements on the test set."""

    seed: Seed
    draws: Annotated[int, Field(ge=2, le=MOST)]
    quadrature_step: Annotated[float, Field(ge=0.005, le=0.5)] | None
    importance_samples: Count
    neighbours: Count
    quality_images: Annotated[int, Field(ge=10, le=MOST)]


class Samples(Section):
    """The picture of draws from the prior."""

    seed: Seed
    rows: Side
    cols: Side


class Grid(Section):
    """The picture of the latent space, decoded at quantiles of the prior."""

    size: Annotated[int, Field(ge=2, le=MOST)]
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
            f"{section}.{name}": getattr(getattr(self, section), name)
            for section in Params.model_fields
            if section in sections
            for name in type(getattr(self, section)).model_fields
        }

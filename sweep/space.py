"""Which experiments: from ``-S name=values`` to points, each with the name that its experiment has."""

import difflib
import hashlib
import itertools
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType, QuotedString
from hydra.errors import HydraException
from ruamel.yaml import YAML

from mnist_vae.errors import UserError
from mnist_vae.params import NAMES, Params, load_params

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})")
PLAIN = re.compile(r"[\w./+-]*", re.ASCII)  # text that needs no quotes
DECADES = 10  # a range whose ends differ by this factor or more is drawn from on a log scale
DIGITS = 4  # significant ones of a number that is drawn from a range
LONGEST = 120  # characters of a name; a reference's file may have 255


class Range(NamedTuple):
    """All numbers between two, whole ones if both ends are."""

    low: float
    high: float

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def is_log(self) -> bool:
        return self.low > 0 and self.high / self.low >= DECADES


Space = Mapping[str, list[Any] | Range]  # a parameter's full name, and what it may be
Point = Mapping[str, Any]  # one value for each parameter


def read_space(arguments: Sequence[str], params: Path, *, ranges: bool) -> Space:
    """What ``-S`` was given, each parameter in the order of params.yaml, each value once, and folders absolute.

    Raises:
        UserError: an argument cannot be read, or names what is no parameter or no value that it may have.
    """
    base = load_params(params).flat(*Params.model_fields)
    known = list(base)
    space: dict[str, list[Any] | Range] = {}
    for argument in arguments:
        name, values = _read(argument)
        if name not in known:
            if name in Params.model_fields:
                first = next(one for one in known if one.startswith(f"{name}."))
                raise UserError(f"{name} is a section; name one of its parameters, as {first}")
            close = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"{name} is not a parameter" + (f"; did you mean {close[0]}?" if close else ""))
        if name in space:
            raise UserError(f"{name} is given twice; put its values behind one -S, with commas between them")
        if isinstance(values, Range) and not ranges:
            raise UserError(f"{argument}: a range needs --suggest N; a grid takes values with commas between them")
        if isinstance(base[name], float) or (isinstance(base[name], list) and isinstance(base[name][0], float)):
            values = Range(*map(_as_float, values)) if isinstance(values, Range) else list(map(_as_float, values))
        for value in values:
            _check(params, name, value)
        if name == "data.dataset":
            values = list(dict.fromkeys(map(_as_folder, values)))
        space[name] = values
    return dict(sorted(space.items(), key=lambda item: known.index(item[0])))


def grid(space: Space) -> Iterator[Point]:
    """All combinations; the last parameter changes fastest."""
    values = [choices for choices in space.values() if isinstance(choices, list)]
    return (dict(zip(space, combination, strict=True)) for combination in itertools.product(*values))


def short_name(name: str) -> str:
    """A parameter's name without its section where no other section has it: latent_dim, but train.seed."""
    entry = name.partition(".")[2]
    sections = [section.annotation for section in Params.model_fields.values()]
    return entry if sum(entry in getattr(section, "model_fields", ()) for section in sections) == 1 else name


def name_of(point: Point) -> str:
    """The name of a point's experiment, the same for the same values: ``latent_dim=2,train.seed=1``."""
    words = ",".join(f"{short_name(name)}={_in_name(value)}" for name, value in point.items())
    if len(words) <= LONGEST:
        return words
    return f"{words[: LONGEST - 9].rstrip('.,')}-{_digest(words)}"


def overrides(point: Point) -> list[str]:
    """What ``dvc exp run --set-param`` takes."""
    return [f"{name}={as_yaml(value)}" for name, value in point.items()]


def as_yaml(value: Any) -> str:
    """A value as Hydra's grammar has it: null, true, [400,200], 0.001, '/my images (all)'."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list():
            return f"[{','.join(map(as_yaml, value))}]"
        case str() if not PLAIN.fullmatch(value):
            return "'" + value.replace("'", r"\'") + "'"
    return str(value)


def rounded(value: float) -> float:
    """A drawn number as it is run and named: four significant digits say all that a sweep can tell apart."""
    return float(f"{value:.{DIGITS}g}")


def _read(argument: str) -> tuple[str, list[Any] | Range]:
    """An argument's parameter and values, by the grammar that ``dvc exp run --set-param`` has from Hydra."""
    name, _, text = argument.partition("=")
    if match := RANGE.fullmatch(text.strip()):
        low, high = (_number(end) for end in match.groups())
        if low >= high:
            raise UserError(f"{argument}: a range goes from its lower to its higher end")
        return name.strip(), Range(low, high)
    try:
        parsed = OverridesParser.create().parse_override(argument)
        if parsed.type is not OverrideType.CHANGE or parsed.package is not None or "/" in parsed.key_or_group:
            raise UserError(f"{argument}: give name=value, as in train.seed=1,2,3")
        found = list(parsed.sweep_iterator()) if parsed.is_discrete_sweep() else [parsed.value()]
    except (HydraException, NotImplementedError, TypeError) as error:
        raise UserError(f"{argument} cannot be read: {str(error).splitlines()[0]}") from error
    if parsed.is_sweep_override() and not parsed.is_discrete_sweep():
        raise UserError(f"{argument}: give values with commas between them, or a range as 1e-4..1e-2")
    values = [_plain(value) for value in found]
    return parsed.key_or_group, [value for place, value in enumerate(values) if value not in values[:place]]


def _number(text: str) -> int | float:
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)


def _as_float(value: Any) -> Any:
    """A whole number as the decimal that its parameter is, so that 1 and 1.0 are one experiment; each of a list."""
    if isinstance(value, list):
        return list(map(_as_float, value))
    return float(value) if type(value) is int else value


def _as_folder(value: Any) -> Any:
    """A folder by its absolute path: a relative one would count from the clone that an experiment runs in."""
    return value if value in NAMES else os.path.normpath(Path.cwd() / value)


def _plain(value: Any) -> Any:
    """A value without Hydra's own type for quoted text."""
    if isinstance(value, QuotedString):
        return value.text
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _check(params: Path, name: str, value: Any) -> None:
    """See that a parameter may have a value, by the pipeline's own rules."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}; it must be a finite number")
    section, _, entry = name.partition(".")
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load(params)
    content[section][entry] = value
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder, params.name)
        yaml.dump(content, changed)
        try:
            load_params(changed)
        except UserError as error:
            raise UserError(str(error).splitlines()[0].removeprefix(f"{params.name}: ")) from error


def _in_name(value: Any) -> str:
    """A value in a name that git, DVC and a shell take as it is: a list's numbers have an x between them.

    Where characters had to be replaced, a digest keeps names apart whose values differ.
    """
    if isinstance(value, list):
        return "x".join(map(_in_name, value))
    text = value if isinstance(value, str) else as_yaml(value)
    plain = re.sub(r"[^\w.+-]|(?<=\.)\.", "_", text, flags=re.ASCII)
    return plain if plain == text else f"{plain}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]

"""From params.yaml to checked parameters: a wrong value ends here, in one line, before any work is done."""

import difflib
import reprlib
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor

from mnist_vae.errors import UserError
from mnist_vae.params.memory import check_memory
from mnist_vae.params.sections import Params

MOST_BYTES = 65_536  # of the file; the committed one has some 3,000
MOST_LINES = 50  # of complaints: more than there are parameters
SHOWN = 60  # characters of a wrong value


def load_params(path: Path) -> Params:
    """Read and check params.yaml, by the YAML 1.2 rules that DVC reads it by (1e-3 is a number).

    Raises:
        UserError: the file is missing, empty, unreadable or not YAML, a parameter is missing, misspelt, of the wrong
            type or out of range, or a stage would need more memory than this machine has. All parameters that are
            wrong are named, one line each.
    """
    content = _parse(path.name, _read(path))
    if content is None:
        raise UserError(f"{path.name} is empty; `git checkout -- {path.name}` brings it back")
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = [f"{path.name}: {_explain(problem)}" for problem in problems[:MOST_LINES]]
        if len(problems) > MOST_LINES:
            lines.append(f"{path.name}: and {len(problems) - MOST_LINES} more such lines")
        raise UserError("\n".join(lines)) from error
    check_memory(params)
    return params


def _read(path: Path) -> str:
    bring_back = f"`git checkout -- {path.name}` brings it back"
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file; move it away, and {bring_back}")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {bring_back}") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); change its permissions, or move it away, and {bring_back}"
        ) from error
    if len(content) > MOST_BYTES:
        raise UserError(f"{path.name} has more than {MOST_BYTES:,} bytes, so it is another file; {bring_back}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path.name} is not valid YAML (line {line}): it is not UTF-8 text") from error


class _Constructor(SafeConstructor):
    """ruamel.yaml's, without merge keys, and with a line number for each value that cannot be read."""

    def flatten_mapping(self, node: Any) -> None:
        """Refuse `<<`: ten lines that merge aliases of aliases take hours to read."""
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise ConstructorError(None, None, "merge keys (<<) are not supported", key.start_mark)
        super().flatten_mapping(node)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node. What is no value, such as 2026-02-30 or a number of 5,000 digits, is named."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError) as error:
            type_name = node.tag.rpartition(":")[-1]
            raise ConstructorError(
                None, None, f"{_shown(node.value)} cannot be read as {type_name}", node.start_mark
            ) from error


def _parse(name: str, text: str) -> Any:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        return yaml.load(text)
    except Exception as error:  # for a wrong file ruamel.yaml raises nearly anything, RecursionError among them
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        problem = _on_one_line(str(getattr(error, "problem", None) or error), 3 * SHOWN)
        raise UserError(f"{name} is not valid YAML{line}: {problem}") from error


def _explain(problem: ErrorDetails) -> str:
    """One of pydantic's findings as a sentence: which parameter, what it is, what it must be."""
    name = _on_one_line(".".join(str(part) for part in problem["loc"])) or "the file"
    given, context = problem["input"], problem.get("ctx", {})
    match problem["type"]:
        case "missing":
            return f"{name} is missing; add it (`git show HEAD:params.yaml` explains them all)"
        case "extra_forbidden" | "invalid_key":
            return f"{name} is not a parameter{_did_you_mean(problem['loc'])}"
        case "model_type":
            return f"{name} is {_shown(given)}; it must be a section of `name: value` lines"
        case "too_short":
            return f"{name} has {len(given)} values; it must have at least {context.get('min_length')}"
        case "too_long":
            return f"{name} has {len(given)} values; it must have at most {context.get('max_length')}"
        case "increasing":
            return f"{name} is {_shown(given)}; {problem['msg']}"
    must = {
        "int_type": "a whole number",
        "float_type": "a finite number" if type(given) is int else "a number",  # no float is as large as 10**400
        "finite_number": "a finite number",
        "string_type": "a text",
        "string_unicode": "valid Unicode text",
        "list_type": "a list in square brackets",
        "literal_error": str(context.get("expected", "")).replace("'", "").replace("None", "null"),
        "greater_than_equal": f"at least {context.get('ge', 0):.15g}",
        "greater_than": f"more than {context.get('gt', 0):.15g}",
        "less_than_equal": f"at most {context.get('le', 0):.15g}",
        "less_than": f"less than {context.get('lt', 0):.15g}",
    }.get(problem["type"], problem["msg"])
    return f"{name} is {_shown(given)}; it must be {must}"


class _Shortened(reprlib.Repr):
    """Python's way to write a value, cut short, but for three words that YAML writes otherwise."""

    def repr_NoneType(self, value: None, level: int) -> str:  # noqa: N802  found by the name of the type
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"


def _shown(value: Any) -> str:
    """A wrong value, cut in the middle or at the end."""
    short = _Shortened()
    short.maxlevel, short.maxstring, short.maxlong, short.maxother = 2, SHOWN, SHOWN, SHOWN
    try:
        return _on_one_line(short.repr(value))
    except ValueError:  # Python writes out no number of more than 4,300 digits
        return "a number of thousands of digits"


def _on_one_line(text: str, most: int = SHOWN) -> str:
    """Without line breaks and control characters, and not too long."""
    text = "".join(character if character.isprintable() else " " for character in text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _did_you_mean(location: tuple[int | str, ...]) -> str:
    *sections, name = map(str, location)
    level: Any = Params.model_fields[sections[0]].annotation if sections else Params
    close = difflib.get_close_matches(name, level.model_fields, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(level.model_fields)}"

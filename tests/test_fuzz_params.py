"""params.yaml with accidents of any sort: checked parameters come out, or lines that say what is wrong.

FUZZ_EXAMPLES is how many damaged files are tried.
"""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_vae.errors import UserError
from mnist_vae.params import Params, load_params
from mnist_vae.params.reading import MOST_LINES
from mnist_vae.params.sections import MOST

TEXT = (Path(__file__).parent.parent / "params.yaml").read_bytes()
LINES = TEXT.splitlines(keepends=True)
VALUES = [number for number, line in enumerate(LINES) if line.startswith(b"  ")]  # lines that set a parameter

NASTY = [
    *(b"", b"null", b"true", b"yes", b"-0", b"-1", b"0.0", b"1e-400", b"1e400", b"-.inf", b".nan", b"0x" + b"f" * 5000),
    *(b"9" * 30, b"9" * 5000, b"1:2:3", b"0o17", b"1_000", b"2026-02-30", b"2026-11-25T10:00:00Z", b"x" * 3000),
    *(
        b"[]",
        b"{}",
        b"[1, 2, 3]",
        b"[64, 32]",
        b"[.nan, .inf]",
        b"[[1], [2]]",
        b"{a: {b: c}}",
        b"{<<: {a: 1}}",
        b"[" * 300,
    ),
    *(b"&a [*a]", b"&a {b: *a}", b"*a", b"<<: *a", b"!!int x", b"!!float x", b"!!bool x", b"!!timestamp x"),
    *(b"!!binary '*'", b"!!set {1, 2}", b"!!omap [a: 1]", b"!!pairs [a: 1]", b"!!python/object:os.system x", b"!x y"),
    *(b"|", b">-", b"@", b"`", b"%", b"\t1", b"'", b'"', b'"\\ud800"', b'"\\e[31m\\n\\u2028"', b"\0", b"\xff", b"\r"),
    *("ünï".encode(), "\u2028".encode(), "\x85".encode(), "\ufeff".encode(), "\U0001f600".encode()),
]
INSERTED = [
    *(
        b"? [a]\n: b\n",
        b"? {a: 1}\n: b\n",
        b"1: 2\n",
        b"null: 3\n",
        b"2026-01-01: 4\n",
        b"  seed: 2\n",
        b"train:\n",
        b"\t\n",
    ),
    *(
        b"---\n",
        b"...\n",
        b"%YAML 1.1\n---\n",
        b"%TAG ! x\n",
        b"a: &a {x: 1}\n",
        b"<<: {a: 1}\n",
        b"- 1\n",
        b"   x: 1\n",
    ),
    *(b"x" * 2000 + b": 1\n", b"- " * 300 + b"\n", b'"\\e[31m\\n": 1\n', b"    \n"),
]


def nearly(values, otherwise):
    return st.sampled_from(values) | otherwise


@st.composite
def damaged(draw):
    """The committed bytes after one to four accidents."""
    lines = list(LINES)
    for _ in range(draw(st.integers(1, 4))):
        where = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["value", "value", "insert", "delete", "swap", "flip", "cut"])):
            case "value":
                name, colon, _ = lines[where].partition(b":")
                lines[where] = name + colon + b" " + draw(nearly(NASTY, st.binary(max_size=20))) + b"\n"
            case "insert":
                lines.insert(where, draw(nearly(INSERTED, st.binary(max_size=20))))
            case "delete":
                del lines[where]
            case "swap":
                other = draw(st.integers(0, len(lines) - 1))
                lines[where], lines[other] = lines[other], lines[where]
            case "flip":
                line = bytearray(lines[where] or b"\n")
                line[draw(st.integers(0, len(line) - 1))] ^= 1 << draw(st.integers(0, 7))
                lines[where] = bytes(line)
            case "cut":
                lines[where] = lines[where][: draw(st.integers(0, len(lines[where])))]
    return b"".join(lines)


@st.composite
def other_values(draw):
    """The committed bytes with one parameter set to anything that YAML may hold."""
    lines = list(LINES)
    where = draw(st.sampled_from(VALUES))
    value = draw(
        nearly(NASTY, st.none())
        | st.integers(-(2**70), 2**70).map(lambda value: str(value).encode())
        | st.floats().map(lambda value: repr(value).replace("inf", ".inf").replace("nan", ".nan").encode())
    )
    lines[where] = lines[where].partition(b":")[0] + b": " + (value or b"~") + b"\n"
    return b"".join(lines)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "params.yaml"


@settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "300")),
    deadline=None,
    derandomize=True,
    database=None,
)
@given(content=damaged() | other_values() | st.binary(max_size=200))
def test_load_params_answers_any_damage_with_parameters_or_with_lines(file, content):
    file.write_bytes(content)
    try:
        params = load_params(file)
    except UserError as error:
        lines = str(error).splitlines()
        assert 1 <= len(lines) <= MOST_LINES + 1
        assert all(line.startswith("params.yaml") for line in lines)
        assert all(line.isprintable() and len(line) < 400 for line in lines)
    else:
        for value in params.flat(*Params.model_fields).values():
            numbers = value if isinstance(value, list) else [value]
            assert all(isinstance(number, str | None) or 0 <= number <= max(MOST, 2**32 - 1) for number in numbers)

"""What determines a stage's results beside the files that it reads: its code and its parameters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from mnist_vae.fingerprint import digest_of_code, fingerprint


def code_of(stage: str) -> list[Path]:
    """The source files and folders that dvc.yaml says a stage's results depend on."""
    pipeline: Any = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))
    return [Path(path) for path in pipeline["stages"][stage]["deps"] if path.startswith(("src/", "stages/"))]


def stage_key(stage: str, params: Mapping[str, Any]) -> str:
    """A short name for a stage's parameters and code: where in the journal its records belong."""
    return fingerprint(code=digest_of_code(code_of(stage)), params=dict(params))[:8]

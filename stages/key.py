"""What determines a stage's results beside the model that it works on: where its records belong in the journal."""

from collections.abc import Mapping
from typing import Any

from mnist_vae.fingerprint import digest_of_code, fingerprint
from stages.outputs import code_of


def stage_key(stage: str, params: Mapping[str, Any]) -> str:
    """A short name for a stage's parameters and code."""
    return fingerprint(code=digest_of_code(code_of(stage)), params=dict(params))[:8]

"""A stage's end of tracking: it writes to the journal, and has a process beside it send that to MLflow.

Tracking fails no stage, and delays it at its end only, by WAIT_S at most: what MLflow does not take now stays in the
journal.
"""

import io
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mnist_vae.tracking.journal import (
    AnyRecord,
    Begin,
    Description,
    End,
    File,
    Image,
    Journal,
    Metrics,
    Models,
    Tags,
    Trained,
    place_of,
)
from mnist_vae.tracking.process import process_name

Status = Literal["FINISHED", "FAILED", "KILLED"]

WAIT_S = 30  # for the sender, when a stage is over


class Session:
    """What one stage tells about one training. Metrics are in nats per image unless their name says otherwise."""

    def __init__(self, workspace: Path, stage: str) -> None:
        """Start the sender at once: it loads MLflow while the stage loads what it needs."""
        self.workspace, self.stage, self.process = workspace, stage, process_name()
        self.journal: Journal | None = None
        self.place = ""
        self.outcome: dict[str, Any] = {}
        self._sender = subprocess.Popen(
            [sys.executable, "-m", "mnist_vae.tracking.sender", str(workspace), stage, self.process],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            process_group=0,  # what ends the stage, as Ctrl-C does, leaves somebody to tell MLflow
        )

    def begin(
        self, fingerprint: str, key: str, name: str, params: Mapping[str, Any], tags: Mapping[str, Any] | None = None
    ) -> None:
        """Say which training this stage works on.

        ``key`` tells what determines the stage's results beside the training; it is empty for the training itself.
        """
        self.journal = Journal(self.workspace, fingerprint)
        self.place = place_of(self.stage, key)
        texts = {name: str(value) for name, value in (tags or {}).items()}
        values = {name: str(value) for name, value in params.items()}
        self._append(
            Begin(
                place=self.place,
                stage=self.stage,
                key=key,
                name=name,
                tags=texts,
                params=values,
                process=self.process,
            )
        )
        self._tell(fingerprint)

    def log_metrics(self, metrics: Mapping[str, Any], step: int = 0) -> None:
        """Record numbers; whatever is not a finite number is left out."""
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        self._append(Metrics(place=self.place, values=numbers, step=step))

    def log_image(self, image: NDArray[np.uint8], key: str, step: int) -> None:
        """Record one frame of a slider: a gray image (H, W)."""
        payload = self._journal.keep_bytes(f"{key}.png", to_png(image))
        self._append(Image(place=self.place, key=key, step=step, payload=payload))

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Record tags, to filter runs by."""
        self._append(Tags(place=self.place, tags=dict(tags)))

    def log_file(self, path: Path) -> None:
        """Record a copy of a file, under its own folder's name (plots/grid.png)."""
        self._append(File(place=self.place, folder=path.parent.name, payload=self._journal.keep(path)))

    def log_dataset(self, about: Mapping[str, Any]) -> None:
        """Record what was trained on (``Dataset.about``)."""
        self._append(Trained(place=self.place, about=dict(about)))

    def describe(self, text: str, picture: NDArray[np.uint8]) -> None:
        """The run's description: a gray image (H, W) over a line of Markdown."""
        payload = self._journal.keep_bytes("description.png", to_png(picture))
        self._append(Description(place=self.place, text=text, payload=payload))

    def register(self, path: Path, measured_on: Mapping[str, Any], nll: float) -> None:
        """Have a model file registered; it becomes the champion if its ``nll`` is lower, measured on the same."""
        about = {name: str(value) for name, value in measured_on.items()}
        self._append(Models(place=self.place, payload=self._journal.keep(path), measured_on=about, nll=nll))

    def end(self, status: Status, reason: str = "", wait: float = WAIT_S) -> None:
        """The stage is over: wait a bounded time for the sender, then warn of what it has not sent."""
        if self.journal is None:  # the stage did not come so far: there is nothing to send
            self._sender.kill()
            self._sender.communicate()
            return
        end = End(place=self.place, stage=self.stage, process=self.process, status=status, reason=reason)
        try:
            self.journal.append(end)
        except Exception as error:  # whatever it is, the stage is over, and the sender will see that it ended
            print(f"{self.stage}: the journal could not be ended: {error}", file=sys.stderr)
        try:
            answer, _ = self._sender.communicate(timeout=wait)
            self.outcome = json.loads(answer.splitlines()[-1]) if answer.strip() else {"reason": "its sender died"}
        except (subprocess.TimeoutExpired, ValueError, OSError):
            self.outcome = {"reason": f"the tracking store has not answered for {wait:.0f} s"}
            self._sender.kill()
            self._sender.communicate()
        for what in self.outcome.get("left_out", []):
            print(f"{self.stage}: WARNING: MLflow goes without {what}", file=sys.stderr)
        if self.outcome.get("reason"):
            print(
                f"{self.stage}: WARNING: MLflow has not received everything ({self.outcome['reason']}); "
                "nothing is lost, and the next stage or `make sync` sends the rest",
                file=sys.stderr,
            )

    @property
    def _journal(self) -> Journal:
        assert self.journal is not None, "begin() comes first"
        return self.journal

    def _append(self, record: AnyRecord) -> None:
        self._journal.append(record)

    def _tell(self, line: str) -> None:
        """A line for the sender; one that has died is heard of at the end."""
        assert self._sender.stdin is not None
        try:
            self._sender.stdin.write(line + "\n")
            self._sender.stdin.flush()
        except OSError:
            pass


def to_png(image: NDArray[np.uint8]) -> bytes:
    """A gray image (H, W) as a PNG file."""
    from PIL import Image as Pillow

    content = io.BytesIO()
    Pillow.fromarray(image).save(content, "png")
    return content.getvalue()

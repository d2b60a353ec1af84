"""MLflow in a process of its own, beside the stage.

MLflow with its store takes longer to load than a picture to draw. So another process loads them while the stage loads
torch and works, and does what ``mnist_vae.tracking`` offers, under the same names. Calls are done in their order while
the stage goes on; what one of them raises is raised by a later call, or by ``settle`` at the stage's end.
"""

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from mnist_vae.errors import UserError


class Run:
    """The run that the other process has open, with the methods of ``tracking.Run``."""

    def __init__(self, run_id: Future) -> None:
        self._id = run_id

    @property
    def id(self) -> str:
        """Waits until the run is there."""
        return self._id.result()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return partial(_beside, _on_run, method)


def start(workspace: Path) -> None:
    """Start the other process and have it open the store."""
    _beside(_open, workspace)


def expect_models() -> None:
    """Have the other process load what ``register_models`` will need: torch, which no other call does."""
    _beside(_load_serving)


@contextmanager
def start_run(workspace: Path, name: str, tags: Mapping[str, Any]) -> Iterator[Run]:
    """``tracking.start_run``: a new run, marked finished at a clean exit, failed or killed otherwise."""
    run = Run(_beside(_start, workspace, name, tags))
    try:
        yield run
        settle()
    except BaseException as error:
        _pool.submit(_end, KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else Exception)
        raise
    _beside(_end, None)


def resume_run(workspace: Path, run_id: str) -> Run:
    """``tracking.resume_run``: the run of this id, for more to be logged."""
    return Run(_beside(_resume, workspace, run_id))


def register_models(workspace: Path, path: Path, measured_on: Mapping[str, Any], nll: float) -> Future:
    """``tracking.register_models`` for the run that is open; the result is whether its models are the champions now."""
    return _beside(_register, workspace, path, measured_on, nll)


def settle() -> None:
    """Wait until all calls are done, and raise what the first that failed has raised."""
    while _calls:
        _calls.pop(0).result()


def _beside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future:
    while _calls and _calls[0].done():
        _calls.pop(0).result()
    _calls.append(_pool.submit(function, *args, **kwargs))
    return _calls[-1]


# From here on: in the other process, which has one run open.

_run: Any = None
_context = ExitStack()


def _settle_in() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the stage, which then says how the run ended
    threading.Thread(target=_leave_with_the_stage, daemon=True).start()
    atexit.register(os._exit, 0)  # all that was asked for is done by then, and tearing down would take a while


def _leave_with_the_stage() -> None:
    parent_process().join()
    os._exit(1)


def _open(workspace: Path) -> None:
    from mnist_vae import tracking

    with suppress(UserError):  # the first call that needs the store says so
        tracking.open_store(workspace)


def _load_serving() -> None:
    from mnist_vae import serving  # noqa: F401


def _start(workspace: Path, name: str, tags: Mapping[str, Any]) -> str:
    from mnist_vae import tracking

    global _run
    _run = _context.enter_context(tracking.start_run(workspace, name, tags))
    return _run.id


def _end(error: type[BaseException] | None) -> None:
    _context.__exit__(error, error and error(), None)


def _resume(workspace: Path, run_id: str) -> str:
    from mnist_vae import tracking

    global _run
    _run = tracking.resume_run(workspace, run_id)
    return _run.id


def _register(workspace: Path, *args: Any) -> bool:
    from mnist_vae import tracking

    return tracking.register_models(workspace, _run, *args)


def _on_run(method: str, *args: Any, **kwargs: Any) -> None:
    getattr(_run, method)(*args, **kwargs)


_pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_settle_in)
_calls: list[Future] = []  # in their order; those before have succeeded

"""Where a process's seconds go: every moment is booked to one account, the innermost that is open.

Imports are seen wherever they happen, also inside a function of the library or of MLflow, since ``import`` statements
and ``importlib.import_module`` are both replaced by versions that book their time.
"""

import builtins
import importlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


class Accounts:
    """Seconds by account, from the moment this is made; what is in no other account is ``compute``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.thread = threading.get_ident()  # the only one with accounts
        self.account, self.since = "compute", time.perf_counter()

    @contextmanager
    def book(self, account: str) -> Iterator[None]:
        """Book what happens inside to ``account``, except for what is booked to another further inside."""
        outer = self._switch(account)
        try:
            yield
        finally:
            self._switch(outer)

    def booked(self, account: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, with its calls booked to ``account``."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self.thread:
                return function(*args, **kwargs)
            outer = self._switch(account)  # no context manager: this runs for every import statement
            try:
                return function(*args, **kwargs)
            finally:
                self._switch(outer)

        return call

    def book_imports(self) -> None:
        """From now on, book the imports of this process to ``imports``."""
        builtins.__import__ = self.booked("imports", builtins.__import__)
        importlib.import_module = self.booked("imports", importlib.import_module)

    def book_calls(self, account: str, owner: Any, names: list[str]) -> None:
        """From now on, book the calls of ``owner``'s functions to ``account``."""
        for name in names:
            setattr(owner, name, self.booked(account, getattr(owner, name)))

    def close(self) -> dict[str, float]:
        """The seconds of each account until now."""
        self._switch(self.account)
        return dict(self.seconds)

    def _switch(self, account: str) -> str:
        now, outer = time.perf_counter(), self.account
        self.seconds[outer] += now - self.since
        self.account, self.since = account, now
        return outer

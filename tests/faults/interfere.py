"""What a victim runs: rules that kill, stop, delay or fail it at a named call. Copied into a clone as sitecustomize.py.

Python imports a module of that name at its start. This one does nothing unless FAULT_RULES is set, a JSON list of
objects: ``at`` ("module:Class.function"), ``call`` (the how many-th such call, 0 for each), ``given`` (a text that the
arguments must show), ``do`` (a signal's name, ``sleep 3``, or ``raise OSError(28, 'no space')``), and ``after`` (true:
when the call has returned). Calls are counted in each process on its own. What was done is noted in FAULT_NOTES.
"""

import builtins
import functools
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time


def act(do: str) -> None:
    with open(os.environ["FAULT_NOTES"], "a") as file:  # noqa: PTH123  pathlib may be what is interfered with
        file.write(f"{os.getpid()} {do}\n")
    verb, _, rest = do.partition(" ")
    if verb == "sleep":
        time.sleep(float(rest))
    elif verb == "raise":
        name, _, arguments = rest.partition("(")
        raise getattr(builtins, name)(*eval(f"({arguments.rstrip(')')},)"))
    else:
        os.kill(os.getpid(), getattr(signal, verb))


def wrap(module, rule) -> None:
    *owners, name = rule["at"].partition(":")[2].split(".")
    owner = functools.reduce(getattr, owners, module)
    original, calls = getattr(owner, name), 0

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        nonlocal calls
        counts = rule.get("given", "") in repr((args, kwargs))
        calls += counts
        hit = counts and rule.get("call", 1) in (0, calls)
        if hit and not rule.get("after"):
            act(rule["do"])
        result = original(*args, **kwargs)
        if hit and rule.get("after"):
            act(rule["do"])
        return result

    setattr(owner, name, wrapped)


class Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module, and wraps its functions once it is loaded."""

    def __init__(self, rules) -> None:
        self.rules = rules

    def find_spec(self, name, path=None, target=None):
        mine = [rule for rule in self.rules if rule["at"].partition(":")[0] == name]
        if not mine:
            return None
        self.rules = [rule for rule in self.rules if rule not in mine]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module) -> None:
                load(module)
                for rule in mine:
                    wrap(module, rule)

            spec.loader.exec_module = exec_module
        return spec


def begin() -> None:
    finder = Finder(json.loads(os.environ["FAULT_RULES"]))
    for rule in list(finder.rules):
        if (module := sys.modules.get(rule["at"].partition(":")[0])) is not None:
            finder.rules.remove(rule)
            wrap(module, rule)
    sys.meta_path.insert(0, finder)


if os.environ.get("FAULT_RULES"):
    begin()

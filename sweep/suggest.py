"""Points that Optuna chooses, each from the values of those before it."""

import hashlib
import warnings
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from mnist_vae.errors import UserError
from sweep.driver import Goal
from sweep.repository import redacted
from sweep.space import Point, Range, Space, as_yaml, rounded

DRIVER = "driver"  # a trial's attribute: who asked for it


class Suggestions:
    """``total`` points in a study that its storage keeps, told and asked one by one."""

    all_at_once = False

    def __init__(self, space: Space, total: int, goal: Goal, storage: str, commit: str, driver: str) -> None:
        """Open the study of this space, goal and commit, made where there is none.

        What a driver of this name left running when it was killed counts as failed, and its points come first. Those
        of other drivers are left to them.

        Raises:
            UserError: the storage does not open.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # constant_liar
        self._distributions = {name: distribution(values) for name, values in space.items()}
        # Lists are no categories to a database, so a category is a value as it is written.
        self._values = {name: values_by_text(values) for name, values in space.items()}
        way: Literal["maximize", "minimize"] = "maximize" if goal.maximize else "minimize"
        name = study_name(space, goal, commit)
        try:
            study = optuna.create_study(storage=storage, study_name=name, direction=way, load_if_exists=True)
            trials = study.get_trials(deepcopy=False)
            # A seed of its own for each start, and for each driver beside others: a sampler forgets how far it was, and
            # would choose the same again.
            is_alone = all(trial.user_attrs.get(DRIVER, driver) == driver for trial in trials)
            seed = 1 + len(trials) if is_alone else zlib.crc32(f"{driver} {len(trials)}".encode())
            study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        except Exception as error:  # whatever a database raises
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"--storage: {redacted(storage)} does not open: {redacted(reason)}") from error
        self._study, self._driver = study, driver
        for left in trials:
            if left.state == TrialState.RUNNING and left.user_attrs.get(DRIVER) == driver:
                self._study.tell(left.number, state=TrialState.FAIL)
                self._study.enqueue_trial(left.params, user_attrs={DRIVER: driver}, skip_if_exists=False)
        self._told = [left for left in trials if left.state == TrialState.COMPLETE]
        self._missing = max(0, total - len(self._told))
        self._running: list[tuple[Point, int]] = []
        self.total = total

    def points(self) -> Iterator[Point]:
        """First those that have their value already, in their order, then new ones."""
        for known in self._told:
            yield self._point(known.params)
        for _ in range(self._missing):
            if not self._study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
                self._study.enqueue_trial({}, user_attrs={DRIVER: self._driver})  # named before it runs
            trial = self._study.ask(self._distributions)
            trial.set_user_attr(DRIVER, self._driver)  # what waited may have been another driver's
            point = self._point(trial.params)
            self._running.append((point, trial.number))
            yield point

    def done(self, point: Point, value: float | None) -> None:
        """Tell Optuna what a point is worth; a failure, or a metric that is missing, is worth nothing."""
        for asked in self._running:
            if asked[0] == point:
                self._running.remove(asked)
                state = TrialState.FAIL if value is None else TrialState.COMPLETE
                self._study.tell(asked[1], value, state=state)
                return

    def _point(self, params: Mapping[str, Any]) -> Point:
        """A trial's parameters as values of params.yaml."""
        return {name: self._value(name, params[name]) for name in self._distributions}

    def _value(self, name: str, chosen: Any) -> Any:
        if texts := self._values[name]:
            return texts[chosen]
        return rounded(chosen) if isinstance(chosen, float) else chosen


def distribution(values: list[Any] | Range) -> BaseDistribution:
    """Where Optuna draws a parameter from."""
    if not isinstance(values, Range):
        return CategoricalDistribution([as_yaml(value) for value in values])
    if values.is_whole:
        return IntDistribution(int(values.low), int(values.high), log=values.is_log)
    return FloatDistribution(values.low, values.high, log=values.is_log)


def values_by_text(values: list[Any] | Range) -> dict[str, Any]:
    """The values of a list by how they are written; none of a range."""
    return {} if isinstance(values, Range) else {as_yaml(value): value for value in values}


def study_name(space: Space, goal: Goal, commit: str) -> str:
    """The same for the same space, goal and commit: a study cannot mix others."""
    ranges = [f"{name}={values if isinstance(values, Range) else as_yaml(values)}" for name, values in space.items()]
    text = " ".join([*ranges, goal.metric, str(goal.maximize)])
    return f"{commit[:7]} {goal.metric} {hashlib.sha256(text.encode()).hexdigest()[:8]}"

"""The trials of an Optuna study that outlives its workers, of which any may die at any moment.

A worker is one process that runs trials. Several share a study through its database. A trial whose
worker died is *interrupted*: it counts for nothing, and another takes its place.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machinery.errors import UserError, check

# Optuna is imported where it is needed: it takes a second, and --help can do without it.
if TYPE_CHECKING:
    import optuna
    import sqlalchemy

    Objective = Callable[[optuna.Trial], float]
    Listener = Callable[[optuna.Study, optuna.trial.FrozenTrial], None]

# ------------------------------------------------------------------------------------------------
# Which trials count
# ------------------------------------------------------------------------------------------------


class NotCounted(Exception):
    """Ends a trial that is no part of the study: one beyond its last, or one taken over."""


class Unusable(Exception):
    """Ends a trial that counts, and failed: the values that it was given cannot be tried."""


def was_interrupted(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial ended without an outcome and without an error of its own."""
    return trial.state.name == "FAIL" and "error" not in trial.user_attrs


def counted(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials of all workers, finished or not, without those that were interrupted."""
    return [trial for trial in study.get_trials(deepcopy=False) if not was_interrupted(trial)]


def n_finished(study: optuna.Study) -> int:
    """How many of the study's trials have come to an end of their own."""
    return sum(trial.state.is_finished() for trial in counted(study))


def place_in_study(study: optuna.Study, number: int) -> int:
    """How many trials came before the one with this number, interrupted ones not counted."""
    return sum(trial.number < number for trial in counted(study))


# ------------------------------------------------------------------------------------------------
# The database
# ------------------------------------------------------------------------------------------------


def quiet_optuna() -> None:
    """Silence Optuna's log, which repeats what is printed, and its notes on heartbeats."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", message="Fixed parameter .* is out of range")  # it fails
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def open_database(url: str, name: str, heartbeat: int | None) -> optuna.Study:
    """The study `name`, to be minimised, in the database at `url`; made if it is not there.

    Workers of a shared study give a sign of life every `heartbeat` / 4 seconds; without any for
    `heartbeat` seconds, another worker retries their trial. None is for a study that has one
    worker at a time. Raises UserError when the database fails.
    """
    import sqlalchemy.exc

    for attempt in range(4):  # of workers that start together, only one succeeds in making tables
        try:
            return connect(url, name, heartbeat)
        except Exception as error:  # whatever the database's driver raises
            if attempt < 3 and isinstance(error, sqlalchemy.exc.DBAPIError):
                time.sleep(0.5 * 2**attempt)
                continue
            raise UserError(database_problem(url, error, "check the URL")) from None
    raise AssertionError("the last attempt returns or raises")


def fail_what_was_killed(study: optuna.Study) -> None:
    """Fail the trials that seem to run in a study of one worker, before that worker begins."""
    import optuna

    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


def connect(url: str, name: str, heartbeat: int | None) -> optuna.Study:
    """`open_database` in one attempt. Raises what the database's driver raises."""
    import optuna

    signs: dict[str, Any] = {}
    if heartbeat is not None:
        signs = {
            "heartbeat_interval": max(1, heartbeat // 4),
            "grace_period": heartbeat,
            "heartbeat_stale_trial_callback": retry,
        }
    await_lock = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    storage = optuna.storages.RDBStorage(url, engine_kwargs=await_lock, **signs)
    if await_lock:
        lock_when_begun(storage.engine)
    return optuna.create_study(
        storage=storage, study_name=name, load_if_exists=True, direction="minimize"
    )


def lock_when_begun(engine: sqlalchemy.Engine) -> None:
    """Let each transaction of a SQLite database lock it as soon as it begins.

    Else it does so where it first writes, and what it has read until then another worker may have
    changed: two would find the same trial dead, and both retry it.
    """
    from sqlalchemy import event

    event.listen(engine, "begin", lambda opened: opened.exec_driver_sql("BEGIN IMMEDIATE"))


def retry(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Queue the parameters of a trial whose worker died again, three times at most."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    if trial.user_attrs.pop("drawn", False):  # its next worker says so again
        RetryHeartbeatStaleTrialCallback(max_retry=3)(study, trial)


def database_errors() -> tuple[type[Exception], ...]:
    """What is raised when a database fails."""
    import optuna
    import sqlalchemy.exc

    return sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError


def database_problem(url: str, error: Exception, remedy: str) -> str:
    """One line about a database that fails, without the password that its URL may hold."""
    password = re.search(r"//[^/@]*:([^/@]+)@", url)
    reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    if "optuna storage upgrade" in reason:  # made by an older Optuna, which says so itself
        reason, remedy = "its tables are an older Optuna's", "run `optuna storage upgrade` on it"
    elif "table schema" in reason:
        reason, remedy = "its tables are a newer Optuna's", "update Optuna"
    text = f"--storage {url} cannot be used ({reason}): {remedy}"
    return text.replace(password[1], "***") if password else text


def require_same_task(study: optuna.Study, task: dict[str, Any], older: dict[str, Any]) -> None:
    """Note in a new study what it is about; raise UserError if an older one is about another task.

    task: {flag: value}. older: values of flags that a study made before they existed lacks.
    """
    from optuna.study import StudyDirection

    another = f"--study_name {study.study_name}"
    is_new = not study.get_trials(deepcopy=False)
    is_ours = study.directions == [StudyDirection.MINIMIZE]
    # Read after the trials: a worker that starts at this moment notes its task before it tries.
    noted = study.user_attrs.get("task")
    if noted is None:
        problem = "is the study of another program: name another study"
        check(is_new and is_ours, f"{another} {problem}")
        study.set_user_attr("task", task)
        return

    theirs = {key: noted.get(key, older[key]) for key in task}
    other = ", ".join(f"--{key} {theirs[key]}" for key in task if theirs[key] != task[key])
    check(not other, f"{another} has trials with {other}: name another study")


def require_same_data(study: optuna.Study, dataset: str, data: dict[str, Any]) -> None:
    """Note in a new study what its data are; raise UserError if an older one has trials on others.

    data: their `fingerprint`, and what else there is to say; where they lie does not matter. A
    study without this record, of an earlier version, noted the name alone.
    """
    another = f"--study_name {study.study_name}"
    noted = study.user_attrs.get("data")
    if noted is not None:
        problem = f"has trials on other data than --dataset {dataset} now is"
        same = noted["fingerprint"] == data["fingerprint"]
        check(same, f"{another} {problem}: name another study, or give it the same images")
        return

    if named := study.user_attrs["task"].get("dataset"):
        problem = f"has trials with --dataset {named}"
        same = Path(named).resolve().name == Path(dataset).resolve().name
        check(same, f"{another} {problem}: name another study")
        doubt = f"take care that {dataset} holds the same images"
        print(f"warning: {another} has no record of its data: {doubt}", file=sys.stderr)
    study.set_user_attr("data", data)


# ------------------------------------------------------------------------------------------------
# One worker
# ------------------------------------------------------------------------------------------------


def run_trials(
    study: optuna.Study,
    objective: Objective,
    listener: Listener,
    n_trials: int,
    heartbeat: int,
    timeout: float | None = None,
) -> None:
    """Run the trials that are missing of `n_trials`, one after the other.

    `listener` hears of each that ends. Trials that other workers have begun are waited for. No
    trial begins after `timeout` seconds.
    """
    deadline = time.monotonic() + (timeout or math.inf)
    waiting_since: dict[int, float] = {}
    while time.monotonic() < deadline:
        states = [trial.state.name for trial in counted(study)]
        if "WAITING" in states or len(states) < n_trials:
            run_trial(study, objective, listener)
        elif "RUNNING" not in states:
            return
        else:
            if not waiting_since:
                running = states.count("RUNNING")
                print(f"waiting for {running} trials of other workers", flush=True)
            waiting_since = wait_for_others(study, waiting_since, heartbeat)


def run_trial(study: optuna.Study, objective: Objective, listener: Listener) -> None:
    """Run one trial, whatever becomes of it."""
    try:
        study.optimize(
            objective,
            n_trials=1,
            callbacks=[listener],
            catch=(MemoryError, NotCounted, Unusable),
            # A trainer's objects refer to each other: free them before the next trial.
            gc_after_trial=True,
        )
    # Optuna 5.0.0 stumbles over an error while it tells a trial's outcome: _tell.py, line 113,
    # raises ValueError for a trial that another worker has ended, and the `finally` of
    # _optimize.py's _run_trial then fails an assertion, or misses a variable that was never set.
    except (ValueError, AssertionError, UnboundLocalError) as error:
        reasons: list[BaseException] = [error]
        while reason := reasons[-1].__context__:
            reasons.append(reason)
        if any("Cannot tell" in str(reason) for reason in reasons):
            problem = "a trial was given to another worker, as this one gave no sign of life"
            print(f"{problem}: raise --heartbeat", file=sys.stderr)
            return
        of_database = [reason for reason in reasons if isinstance(reason, database_errors())]
        raise next(iter(of_database), error) from None


def wait_for_others(
    study: optuna.Study, waiting_since: dict[int, float], heartbeat: int
) -> dict[int, float]:
    """Wait a second, then fail the trials whose workers have died.

    `waiting_since` says, and the answer says anew, since when each running trial is waited for.
    Optuna notices a death by the heartbeats. A worker killed before its trial's first one is
    noticed because nothing was ever drawn for the trial.
    """
    import optuna

    running = (optuna.trial.TrialState.RUNNING,)
    now = time.monotonic()
    trials = study.get_trials(deepcopy=False, states=running)
    waiting_since = {trial.number: waiting_since.get(trial.number, now) for trial in trials}

    time.sleep(1)
    optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=running):
        now = time.monotonic()
        waited = now - waiting_since.get(trial.number, now)
        if waited > heartbeat and "drawn" not in trial.user_attrs:
            # Another worker may be faster.
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                failed = optuna.trial.TrialState.FAIL
                study.tell(trial.number, state=failed, skip_if_finished=True)
    return waiting_since


# ------------------------------------------------------------------------------------------------
# Several workers on this machine
# ------------------------------------------------------------------------------------------------


def run_workers(
    study: optuna.Study,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    listener: Listener,
    workers: int,
) -> list[int]:
    """Run `work(*arguments, index)` in `workers` processes, until all of them have ended.

    `listener` hears of each trial that ends. Returns the exit statuses of those that were lost.
    """
    shown = {t.number for t in study.get_trials(deepcopy=False) if t.state.is_finished()}
    context = multiprocessing.get_context("spawn")
    started = [
        context.Process(target=work, args=(*arguments, index), daemon=True)
        for index in range(workers)
    ]

    # The terminal sends Ctrl-C to all of them. Workers inherit that they ignore it, so that this
    # process alone decides when they end.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for worker in started:
        worker.start()
    signal.signal(signal.SIGINT, handler)

    try:
        follow(study, started, listener, shown)
    finally:
        for worker in started:
            worker.kill()
            worker.join()
    return [worker.exitcode for worker in started if worker.exitcode]


def follow(
    study: optuna.Study, workers: list[SpawnProcess], listener: Listener, shown: set[int]
) -> None:
    """Tell `listener` of the trials that end, until no worker is alive."""
    at_work = True
    while at_work:
        at_work = any(worker.is_alive() for worker in workers)  # before the last look
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished() and trial.number not in shown:
                shown.add(trial.number)
                listener(study, trial)
        time.sleep(0.2)


def end_with_parent() -> None:
    """End this process when the one that started it is gone, however that was ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

"""One sitting of a training run: open its folder, train for a while, keep the log, leave a state to go on from."""

from __future__ import annotations

import json
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from demo_model.evaluation import validate
from demo_model.feeder import Feeder
from demo_model.memory import keep_memory
from demo_model.state import LOG_NAME, Plan, Progress, export_weights, load_progress, save_progress
from demo_model.training import Record, Trainer, begin
from mt3_runtime.errors import CheckpointError, DeviceError, OptionError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

SAVE_MINUTES = 5.0
LOG_STEPS = 20  # averaged in one line of the log
CLIPS = 6  # of each kind, for validation


@dataclass(frozen=True, slots=True)
class Conditions:
    """What does not decide the outcome, but for rounding: time limit, device, threads, processes that make batches."""

    minutes: float | None = None
    validate_minutes: float = 15.0
    device: str = "cpu"
    threads: int | None = None
    workers: int = 1


def train(folder: Path, chosen: Mapping[str, Any], conditions: Conditions) -> Progress:
    """Begin the run in `folder`, or go on with it, until the time is up or its plan is done.

    Args:
        folder: made if it is not there.
        chosen: fields of `Plan`; for a run that has begun they must be its own, but for `steps`.
        conditions: of this sitting.

    Raises:
        CheckpointError: the folder's state cannot be read.
        DeviceError: torch cannot use the device.
        OptionError: `chosen` is not the plan of this run, or out of range.
        OutputError: the folder or the log cannot be written; if only the log cannot, the state is saved.
    """
    plan = Plan(**chosen)  # first of all: what is refused leaves no folder behind
    device = _device(conditions.device)
    if conditions.threads:
        torch.set_num_threads(conditions.threads)
    keep_memory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made ({error.strerror}): choose another folder") from error
    progress = load_progress(folder, device)
    if progress is None:
        progress = begin(plan, device)
    else:
        progress.plan = _same_plan(progress.plan, chosen)
    sitting = _Sitting(folder, Trainer(progress), conditions)
    with Feeder(conditions.workers) as feeder, _until_told(sitting):
        sitting.trainer.run(feeder, sitting.enough, sitting.report)
    sitting.finish()
    return sitting.trainer.progress


def export(folder: Path, path: Path) -> None:
    """Write the weights of the run in `folder` as safetensors.

    Raises:
        CheckpointError: there is no run, or it cannot be read.
        OutputError: the file cannot be written.
    """
    progress = load_progress(folder, torch.device("cpu"))
    if progress is None:
        raise CheckpointError(f"{folder} holds no training run: train one first")
    export_weights(progress, path)


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"torch cannot use the device {name!r}: use cpu, or install torch for it") from error


def _same_plan(plan: Plan, chosen: Mapping[str, Any]) -> Plan:
    for name, value in chosen.items():
        if name != "steps" and value != getattr(plan, name):
            raise OptionError(f"this run has {name} {getattr(plan, name)}, not {value}: choose another folder")
    return replace(plan, steps=chosen.get("steps", plan.steps))


class _Sitting:
    """Keeps the time, the log and the state."""

    def __init__(self, folder: Path, trainer: Trainer, conditions: Conditions) -> None:
        self.folder, self.trainer, self.conditions = folder, trainer, conditions
        now = time.monotonic()
        self.begun, self.saved, self.validated = now, now, now
        self.told = False
        self.records: list[Record] = []
        if trainer.progress.step == 0:
            self._log({"plan": asdict(trainer.progress.plan)})
        else:
            self._write("")  # finds out before the work whether it can

    def enough(self) -> bool:
        limit = self.conditions.minutes
        return self.told or (limit is not None and time.monotonic() - self.begun >= 60 * limit)

    def report(self, record: Record) -> None:
        self.records.append(record)
        if len(self.records) == LOG_STEPS:
            self._log_records()
        now = time.monotonic()
        if now - self.validated >= 60 * self.conditions.validate_minutes:
            self._validate()
            self.validated = time.monotonic()
        if now - self.saved >= 60 * SAVE_MINUTES:
            save_progress(self.folder, self.trainer.progress_now())
            self.saved = now

    def finish(self) -> None:
        if self.records:
            self._log_records()
        progress = self.trainer.progress_now()
        save_progress(self.folder, progress)
        if progress.step == progress.plan.steps:
            self._validate()

    def _validate(self) -> None:
        progress = self.trainer.progress
        self._log({"step": progress.step, "f1": validate(self.trainer.model, progress.weights, CLIPS)})

    def _log_records(self) -> None:
        names = dict.fromkeys(name for record in self.records for name in record)
        values = {name: [record[name] for record in self.records if name in record] for name in names}
        means = {name: round(sum(found) / len(found), 4) for name, found in values.items()}
        last = {name: self.records[-1][name] for name in ("step", "stage")}
        self._log({**means, **last, "minutes": round(self.trainer.progress.seconds / 60, 2)})
        self.records.clear()

    def _log(self, entry: Mapping[str, Any]) -> None:
        try:
            self._write(json.dumps(entry) + "\n")
        except OutputError:
            if self.trainer.progress.step:  # what was learned is worth more than its log
                save_progress(self.folder, self.trainer.progress_now())
            raise

    def _write(self, text: str) -> None:
        path = self.folder / LOG_NAME
        try:
            with path.open("a", encoding="utf-8") as log:
                log.write(text)
            print(text, end="", flush=True)
        except OSError as error:
            raise OutputError(
                f"{path}, or its copy on standard output, cannot be written ({error.strerror}): "
                "see to that, then give the same command again"
            ) from error


@contextmanager
def _until_told(sitting: _Sitting) -> Iterator[None]:
    """Take SIGINT and SIGTERM as a wish to stop after the present step."""

    def tell(*_: object) -> None:
        sitting.told = True

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

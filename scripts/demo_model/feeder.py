"""Batches made ahead of time in other processes."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import TYPE_CHECKING, Self

from demo_model.examples import ExampleMaker

if TYPE_CHECKING:
    from demo_model.curriculum import Stage
    from demo_model.examples import Batch


@cache
def _maker() -> ExampleMaker:
    return ExampleMaker()


def make_batch(seed: int, number: int, size: int, stage: Stage) -> list[Batch]:
    """As `ExampleMaker.batch`, with one maker for each process."""
    return _maker().batch(seed, number, size, stage)


class Feeder:
    """Makes the batches that are asked for, in that order.

    `workers`: processes, each on one core; 0 makes every batch when it is taken, in this process.
    """

    def __init__(self, workers: int) -> None:
        self._waiting: deque[Future[list[Batch]] | tuple[int, int, int, Stage]] = deque()
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            # Inherited: a worker that computes on all cores would stand in the way of training.
            for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
                os.environ[name] = "1"
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def ask(self, seed: int, number: int, size: int, stage: Stage) -> None:
        """Begin one more batch."""
        order = (seed, number, size, stage)
        self._waiting.append(self._pool.submit(make_batch, *order) if self._pool else order)

    def take(self) -> list[Batch]:
        """The batch asked for first."""
        first = self._waiting.popleft()
        return first.result() if isinstance(first, Future) else make_batch(*first)

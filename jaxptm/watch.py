"""What is kept an eye on while a run trains: its best evaluation, its alarms, its means and its speed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np

from jaxptm.checkpoint import is_better
from jaxptm.config import LoopConfig
from jaxptm.metrics import TrainingProgress, read_metrics
from jaxptm.run import Run
from jaxptm.types import JaxptmError, Means


class Best:
    """The best evaluation of a run so far, and how many after it were no better."""

    def __init__(self, loop: LoopConfig, log: Path) -> None:
        """Goes over what `log` tells of the steps before, so that a resumed run decides as it would have."""
        self._metric, self._patience = loop.metric, loop.patience
        self._asked = loop.patience is not None or loop.export == "best"
        self._value: float | None = None
        self._waited = 0
        for line in read_metrics(log) if log.exists() else []:
            self.note({name.removeprefix("eval/"): value for name, value in line.items() if name.startswith("eval/")})

    @property
    def enough(self) -> bool:
        """Whether the run is to stop early."""
        return self._patience is not None and self._waited >= self._patience

    @property
    def told(self) -> str:
        return f"the best {self._metric} is {self._value:.6g}, and {self._waited} evaluation(s) since were no better"

    def note(self, evaluation: Mapping[str, float]) -> bool:
        """Takes an evaluation, or an empty one; whether its checkpoint is to be kept for being the best."""
        if not evaluation:
            return False
        if is_better(self._metric, evaluation[self._metric], self._value):
            self._value, self._waited = evaluation[self._metric], 0
            return self._asked
        self._waited += 1
        return False


class Alarms:
    """Says what goes wrong, and once what goes on."""

    def __init__(self, run: Run, progress: TrainingProgress) -> None:
        self._run, self._progress = run, progress
        self._sounding = False

    def sound(self, step: int, means: Mapping[str, float]) -> None:
        message = self._run.objective.alarm(means) if step > self._run.steps // 10 else None
        if message is not None and not self._sounding:
            self._progress.print(f"WARNING: step {step}: {message}")
        self._sounding = message is not None


class Window:
    """Sums the means of the steps since the last log, and the time that they took."""

    COUNTED: ClassVar[dict[str, str]] = {
        "token_share": "tokens_per_second",
        "audio_seconds": "audio_seconds_per_second",
    }
    """Scores whose totals count what is read, and what their rates are called."""

    def __init__(self, run: Run, start: int, peak: float) -> None:
        self._run, self._step, self._peak = run, start, peak
        self._pending: list[tuple[Means, bool]] = []
        self._shapes: dict[tuple[int, ...], float] = {}
        self._shape: tuple[int, ...] = ()
        self._new = False
        self._clock = time.perf_counter()
        self._clear()

    @contextmanager
    def step(self, shape: tuple[int, ...]) -> Iterator[None]:
        """Around the call of a step on token ids of this shape."""
        self._shape, self._new = shape, shape not in self._shapes
        if not self._new:
            yield
            return
        *rows, length = shape
        self._shapes[shape] = 3 * self._run.objective.flops(math.prod(rows), length)
        # The first step of a shape compiles: it counts for the means and not for the time.
        with self.paused():
            yield

    def add(self, means: Means) -> None:
        """Takes the means of the step, which may still be under way on the device."""
        self._pending.append((means, not self._new))
        if self._new:
            self._fetch()
            self._clock = time.perf_counter()
        else:
            self._flops += self._shapes[self._shape]

    def close(self) -> dict[str, float]:
        """The means since the last call, tokens or audio (without padding) a second, and model FLOP utilisation."""
        with self.paused():
            values = {name: float(total / max(weight, 1e-5)) for name, (total, weight) in self._sums.items()}
            for name, count in self._counts.items():
                values[self.COUNTED[name]] = count / self._seconds
            if self._counts:
                values["utilisation"] = self._flops / self._seconds / self._peak
            self._clear()
        return values

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for the steps under way, checks them, and stops the clock for what follows."""
        self._fetch()
        self._seconds += time.perf_counter() - self._clock
        yield
        self._clock = time.perf_counter()

    def _fetch(self) -> None:
        for means, timed in jax.device_get(self._pending):
            self._step += 1
            for name in ("loss", "grad_norm"):
                if not np.isfinite(means[name].total):
                    raise JaxptmError(
                        f"step {self._step}: the {name} is {means[name].total}. Earlier checkpoints are kept in "
                        f"{self._run.checkpoints}; lower optimizer.learning_rate, lengthen "
                        "optimizer.warmup or tighten optimizer.clip, and start in another `out`."
                    )
            for name in self.COUNTED.keys() & means.keys() if timed else ():
                self._counts[name] = self._counts.get(name, 0.0) + float(means[name].total)
            for name, mean in means.items():
                self._sums[name] = self._sums.get(name, np.zeros(2)) + np.array(mean, np.float64)
        self._pending = []

    def _clear(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, float] = {}
        self._flops, self._seconds = 0.0, 0.0

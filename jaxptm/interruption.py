"""How a run ends before its end: by a signal, for want of memory, or because another process died."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils

from jaxptm.config import TrainConfig
from jaxptm.types import JaxptmError


class StopSignal:
    """Notes SIGTERM and Ctrl-C, so that the loop can finish its step and save; a second one acts at once.

    Of several processes one such signal stops all, after the same step: JAX passes on a SIGTERM to any of them.
    """

    def __enter__(self) -> StopSignal:
        self._noted = False
        self._alone = jax.process_count() == 1
        kinds = (signal.SIGTERM, signal.SIGINT) if self._alone else (signal.SIGINT,)  # the other is JAX's
        try:
            self._before = {kind: signal.signal(kind, self._note) for kind in kinds}
        except ValueError:  # only the main thread may listen
            self._before = {}
        return self

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; to be asked at every step, since all processes agree on one."""
        return self._noted if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def _note(self, kind: int, _: FrameType | None) -> None:
        self._noted = True
        signal.signal(kind, self._before[signal.Signals(kind)])
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)


@contextmanager
def explain_failures(config: TrainConfig) -> Iterator[None]:
    """Says what to change where a device ran out of memory, and what to do where another process died."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0][:300]
        if re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
            raise JaxptmError(_memory_advice(config, reason)) from error
        if jax.process_count() > 1 and re.search(
            "UNAVAILABLE|DEADLINE_EXCEEDED|[Gg]loo|NCCL|[Cc]onnection", str(error)
        ):
            raise JaxptmError(
                f"process {jax.process_index()} lost the others, most likely because one of them died ({reason}). "
                "Start all of them again: the run goes on from its last checkpoint."
            ) from error
        raise


def _memory_advice(config: TrainConfig, reason: str) -> str:
    loop, parallel = config.train, config.parallel
    shared = (parallel.data or jax.device_count() // (parallel.fsdp * parallel.tensor)) * parallel.fsdp
    rows = loop.batch_size // loop.accumulate // shared
    advice = []
    if rows > 1:
        advice.append(
            f"a larger train.accumulate (now {loop.accumulate}, which puts {rows} rows on a device at a time; the "
            "result does not change)"
        )
    if parallel.remat is not True:
        advice.append("parallel.remat=true")
    if shared > parallel.fsdp and parallel.mode == "jit":
        advice.append(
            f"parallel.fsdp={shared} parallel.data=1 (parameters and optimizer state divided among the devices)"
        )
    if loop.dtype == "float32":
        advice.append("train.dtype=bfloat16 (in another `out`)")
    elif loop.param_dtype == "float32":
        advice.append("train.param_dtype=bfloat16 (in another `out`)")
    tried = ", or ".join(advice) or "a smaller model or train.batch_size, or more devices"
    return f"a device ran out of memory ({reason.rstrip('.')}). In this order, try {tried}."

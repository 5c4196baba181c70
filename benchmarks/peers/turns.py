"""Processes that take turns: each holds one side's model, and takes steps when it is told to."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def serve(
    packages: Sequence[str],
    device: str,
    parameters: int,
    step: Callable[[], Any],
    settle: Callable[[Any], float],
) -> None:
    """Takes the first step, says what there is, and then as many steps as each line of standard input asks for.

    Args:
        packages: whose versions to tell.
        device: "cpu", or the kind of the accelerator.
        step: takes one, and returns what `settle` waits for and makes the loss of.
    """
    first = settle(step())
    versions = {name: metadata.version(name) for name in packages}
    print(
        json.dumps({"device": device, "parameters": parameters, "first_loss": first, "versions": versions}), flush=True
    )
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            out = step()
        loss = settle(out)
        seconds = (time.perf_counter() - began) / int(line)
        print(json.dumps({"seconds": seconds, "loss": loss, "peak": most_memory(device)}), flush=True)


def most_memory(device: str) -> int:
    """The most bytes that were taken so far: of an accelerator what arrays took there, else what the process did."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if "jax" in sys.modules:
        return int(sys.modules["jax"].devices()[0].memory_stats()["peak_bytes_in_use"])
    return int(sys.modules["torch"].cuda.max_memory_allocated())


class Side:
    """One of those processes, seen from the outside."""

    def __init__(self, python: str, script: str, work: str, environment: Mapping[str, str]) -> None:
        """Starts it and waits for its first step, which is in `ready_seconds` with the imports and the compilation.

        Raises:
            RuntimeError: it ended before.
        """
        began = time.perf_counter()
        command = [python, str(HERE / script), work]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(environment)
        )
        self.about = self._answer()
        self.ready_seconds = time.perf_counter() - began

    def steps(self, count: int) -> dict[str, float]:
        """Seconds of a step, the loss of the last, and `most_memory`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print, too
                return json.loads(line)
        raise RuntimeError(f"{self._process.args} ended with status {self._process.wait()}")

"""How long an epoch takes from the command to the figures, here and in transformers + torch, in turns on one machine.

    python experiments/fine_tuning/epoch_time.py OUT.json ROUNDS init_from=MODEL data.path=GLUE [key.key=value ...]

Each run is a process of its own, its time that of the whole process: imports, tokenizing, compiling, training,
evaluation and writing the model (which the Trainer is not asked for). `default` is the Trainer as it comes, which draws
its batches at random; `by length` has its sampler that groups texts of similar length. Nothing else should run.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    target, rounds, *overrides = sys.argv[1:]
    common = [str(HERE / "glue.yaml"), "data.task=sst2", "train.epochs=1", *overrides]
    theirs = [sys.executable, str(HERE / "with_transformers.py"), *common]
    commands = {
        "jaxptm": ([sys.executable, "-m", "jaxptm.cli", "train", *common], {}),
        "default": (theirs, {"SAMPLING": "random"}),
        "by length": (theirs, {"SAMPLING": "group_by_length"}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(int(rounds)):
        for name, (command, environment) in commands.items():
            out = Path(tempfile.mkdtemp())
            begin = time.perf_counter()
            subprocess.run([*command, f"out={out}"], check=True, env=os.environ | environment)
            seconds[name].append(time.perf_counter() - begin)
            figures[name].append(json.loads((out / "results.json").read_text())["eval"])
            shutil.rmtree(out)
            median = {name: statistics.median(values) for name, values in seconds.items() if values}
            ratios = {f"jaxptm / {name}": median["jaxptm"] / value for name, value in median.items()}
            said = {"seconds": seconds, "median": median, "ratio": ratios, "figures": figures, "overrides": overrides}
            Path(target).write_text(json.dumps(said, indent=2) + "\n")
            print(name, f"{seconds[name][-1]:.1f} s", ratios, flush=True)


if __name__ == "__main__":
    main()

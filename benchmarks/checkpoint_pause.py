"""How long a checkpoint keeps training from going on, and how long it takes to be on disk.

    python benchmarks/checkpoint_pause.py [--preset bert-base] [--steps N] [--rows B] [--length L] [--directory DIR]
        [--repeats R]

The state of a training with Adam is saved as `jaxptm train` saves it, while masked-LM steps go on:

    step           without a checkpoint being written
    pause          `Checkpoints.save`, until the next step may begin
    step beside    as long as a checkpoint is being written beside the steps, a step of them
    on disk        from the beginning of the save until it is whole
    torch.save     the same arrays in one file, which is what a Trainer writes between two steps

Medians of `--repeats`, and gigabytes, as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxptm.allocation import keep_freed_memory

keep_freed_memory()

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from jaxptm.checkpoint import Checkpoints
from jaxptm.config import LoopConfig, MaskedLmConfig, OptimizerConfig, ParallelConfig
from jaxptm.models import PRESETS
from jaxptm.nn.core import Execution
from jaxptm.objectives import language
from jaxptm.ops.masking import VocabularyTables
from jaxptm.optim import optimizer
from jaxptm.parallel import compile_update, make_mesh, mapped_axis, put_batch
from jaxptm.step import make_update
from jaxptm.types import TrainState


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="bert-base")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--directory", type=Path, help="of the disk; default where temporary files go")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows, length = arguments.rows, arguments.length
    family, config = PRESETS[arguments.preset]
    tables = VocabularyTables(*(np.zeros(config.vocab_size, bool) for _ in range(2)))
    module = family.module(config, "masked-lm", Execution())
    objective = language.masked_language_model(MaskedLmConfig(name="masked-lm"), module, tables, 103, length)
    layout = ParallelConfig(data=1)
    mesh = make_mesh(layout, LoopConfig(steps=1000, batch_size=rows))
    params = jax.jit(objective.init)(jax.random.key(0))
    transform = optimizer(OptimizerConfig(learning_rate=1e-4, schedule="constant"), 1000, params)
    state = TrainState(jnp.zeros((), jnp.int32), params, transform.init(params))
    state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    update = make_update(objective, transform, 1, mapped_axis(mesh, layout.mode))
    compiled: Any = compile_update(update, mesh, layout.mode, jax.eval_shape(lambda: state))
    ids = np.random.default_rng(0).integers(1000, config.vocab_size, (rows, length)).astype(np.int32)
    batch = put_batch(mesh, {"input_ids": ids, "attention_mask": np.ones_like(ids)}, rows)
    key = np.asarray(jax.random.key_data(jax.random.key(1)))

    def step() -> float:
        nonlocal state
        began = time.perf_counter()
        state, means = compiled(state, batch, key)
        jax.block_until_ready(means["loss"].value)
        return time.perf_counter() - began

    step()
    seconds: dict[str, list[float]] = {"step": [], "pause": [], "step beside": [], "on disk": [], "torch.save": []}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with (
        tempfile.TemporaryDirectory(dir=arguments.directory) as directory,
        Checkpoints(Path(directory) / "checkpoints", keep=1) as checkpoints,
    ):
        for repeat in track(range(arguments.repeats + 1), "turns", console=Console(stderr=True)):
            turn = {"step": statistics.median(step() for _ in range(arguments.steps))}
            began = time.perf_counter()
            checkpoints.save(state, None, {})
            turn["pause"] = time.perf_counter() - began
            beside = []
            while checkpoints.saving:
                beside.append(step())
            checkpoints.wait()
            turn["on disk"] = time.perf_counter() - began
            turn["step beside"] = statistics.median(beside) if beside else turn["step"]
            began = time.perf_counter()
            arrays = [torch.from_numpy(np.asarray(leaf)) for leaf in jax.tree.leaves(state) if leaf.ndim]
            torch.save(arrays, Path(directory) / "torch.pt")
            turn["torch.save"] = time.perf_counter() - began
            del arrays
            if repeat:  # the first one warms up
                for name, value in turn.items():
                    seconds[name].append(value)
    device = jax.devices()[0]
    figures = {
        "preset": arguments.preset,
        "device": device.device_kind,
        "gigabytes": round(size / 1e9, 3),
        "seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "all_seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

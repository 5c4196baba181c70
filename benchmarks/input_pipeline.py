"""Speed of the input pipeline against the training step that it feeds.

    python benchmarks/input_pipeline.py CONFIG [key.key=value ...] [--steps N] [--repeats R]

Times N batches of the pipeline alone and N training steps on one batch that is there already, in turns, and prints the
medians and their ratio as JSON. The corpus of CONFIG is prepared first where that has not been done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp

from jaxptm.config import load_config
from jaxptm.data.batching import batches
from jaxptm.optim import optimizer
from jaxptm.run import open_run
from jaxptm.step import make_update
from jaxptm.types import TrainState


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    run = open_run(config)
    rows, steps = config.train.batch_size, arguments.steps

    params = run.objective.init(jax.random.key(0))
    transform = optimizer(config.optimizer, run.steps, params)
    state = TrainState(jnp.zeros((), jnp.int32), params, transform.init(params))
    update = jax.jit(
        make_update(run.objective, transform, jax.random.key(1), config.train.accumulate), donate_argnums=0
    )
    batch = jax.device_put(run.train.rows(range(rows)))
    state, _ = jax.block_until_ready(update(state, batch))

    pipeline_seconds, step_seconds = [], []
    for repeat in range(arguments.repeats):
        # Enough batches that starting the reader threads does not count.
        count = 100 * steps
        began = time.perf_counter()
        for _ in batches(run.train, rows, repeat * count, count):
            pass
        pipeline_seconds.append((time.perf_counter() - began) / count)
        began = time.perf_counter()
        for _ in range(steps):
            state, _ = update(state, batch)
        jax.block_until_ready(state)
        step_seconds.append((time.perf_counter() - began) / steps)
    pipeline, step = statistics.median(pipeline_seconds), statistics.median(step_seconds)
    result = {"rows": rows, "length": config.data.sequence_length, "pipeline_seconds": pipeline, "step_seconds": step}
    print(json.dumps({**result, "ratio": step / pipeline, "rows_per_second": rows / pipeline}, indent=1))


if __name__ == "__main__":
    main()

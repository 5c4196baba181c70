"""What XLA says of a pre-training step, layout by layout; nothing is run, so that eight devices may be make-believe.

    python benchmarks/layouts.py --model bert-large --rows 64 --length 128

prints three tables: bytes that a device holds under FSDP, bytes that a step allocates with and without
rematerialisation, and seconds to compile scanned and unrolled layers, compiled in turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any, NamedTuple

if "JAX_PLATFORMS" not in os.environ:
    os.environ["JAX_PLATFORMS"] = "cpu"
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import jax.numpy as jnp
import numpy as np

from jaxptm.config import LoopConfig, MaskedLmConfig, OptimizerConfig, ParallelConfig
from jaxptm.cost import step_cost
from jaxptm.models import PRESETS
from jaxptm.nn.core import Execution
from jaxptm.objectives.language import masked_language_model
from jaxptm.ops.masking import VocabularyTables
from jaxptm.optim import optimizer
from jaxptm.parallel import compile_update, make_mesh, mapped_axis
from jaxptm.step import make_update
from jaxptm.types import TrainState

GIB = 2**30


class Step(NamedTuple):
    seconds: float
    """To trace and compile."""
    state: int
    """Bytes a device holds of parameters and moments, by XLA."""
    temporary: int
    """Bytes a device allocates during the step, by XLA."""
    estimate: float
    """The same by `jaxptm.cost`."""


def compile_step(arguments: argparse.Namespace, dtype: str = "bfloat16", **parallel: Any) -> Step:
    layout = ParallelConfig(**{"data": 1, **parallel})
    loop = LoopConfig(steps=100, batch_size=arguments.rows)
    mesh = make_mesh(layout, loop)
    family, config = PRESETS[arguments.model]
    execution = Execution(dtype=jnp.dtype(dtype), remat=layout.remat, scan=layout.scan)
    module = family.module(config, "pretraining", execution)
    settings = MaskedLmConfig(name="pretraining")
    tables = VocabularyTables(np.zeros(config.vocab_size, bool), np.zeros(config.vocab_size, bool))
    objective = masked_language_model(settings, module, tables, 103, arguments.length)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    transform = optimizer(OptimizerConfig(learning_rate=1e-4), loop.steps or 1, params)
    state = jax.eval_shape(lambda p: TrainState(jnp.zeros((), jnp.int32), p, transform.init(p)), params)
    rows = jax.ShapeDtypeStruct((arguments.rows, arguments.length), jnp.int32)
    batch = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), rows)
    batch["next_sentence_label"] = jax.ShapeDtypeStruct((arguments.rows,), jnp.int32)

    began = time.perf_counter()
    update = make_update(objective, transform, 1, mapped_axis(mesh, layout.mode))
    step: Any = compile_update(update, mesh, layout.mode, state)
    memory = step.lower(state, batch, jax.ShapeDtypeStruct((2,), jnp.uint32)).compile().memory_analysis()
    seconds = time.perf_counter() - began
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in batch.values()) // (mesh.shape["data"] * mesh.shape["fsdp"])
    cost = step_cost(
        config, "pretraining", execution, rows=arguments.rows, length=arguments.length,
        predictions=settings.slots(arguments.length), **mesh.shape,
    )  # fmt: skip
    estimate = cost.gradients + cost.activations
    return Step(seconds, memory.argument_size_in_bytes - held, memory.temp_size_in_bytes, estimate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bert-large", choices=PRESETS)
    parser.add_argument("--rows", type=int, default=64, help="of the whole batch")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="compilations of each, in turns")
    arguments = parser.parse_args()
    batch = f"{arguments.rows} rows of {arguments.length}"
    print(f"{arguments.model}, {batch}, jax {jax.__version__}, {jax.default_backend()}")

    print("\n| fsdp | parameters and moments a device, GiB | of one device's |\n|---|---|---|", flush=True)
    whole = 0
    for devices in (1, 2, 4, 8):
        state = compile_step(arguments, scan=True, fsdp=devices).state
        whole = whole or state
        print(f"| {devices} | {state / GIB:.3f} | 1 / {whole / state:.2f} |", flush=True)

    print("\n| type | layers | remat | allocated in a step, GiB | estimated, GiB |\n|---|---|---|---|---|", flush=True)
    for dtype in ("float32", "bfloat16"):
        for remat in (False, "dots", True):
            step = compile_step(arguments, dtype, scan=True, remat=remat)
            sizes = f"{step.temporary / GIB:.2f} | {step.estimate / GIB:.2f}"
            print(f"| {dtype} | scanned | {remat} | {sizes} |", flush=True)

    print("\n| layers | seconds to trace and compile |\n|---|---|", flush=True)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(arguments.repeats):
        for scan, taken in seconds.items():
            taken.append(compile_step(arguments, scan=scan).seconds)
    for scan, taken in seconds.items():
        print(f"| {'scanned' if scan else 'unrolled'} | {statistics.median(taken):.1f} |", flush=True)


if __name__ == "__main__":
    main()

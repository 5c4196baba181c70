"""A step of jaxptm, as `jaxptm train` takes it: python with_jaxptm.py WORK

With XLA_ATTENTION=1 in the environment attention is XLA's on GPUs, too.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from jaxptm.allocation import keep_freed_memory

keep_freed_memory()

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from turns import serve
from work import CHARACTERS, CLIP, DROPOUTS, EPSILON, LEARNING_RATE, MASK, WEIGHT_DECAY, Work, batch, named

from jaxptm.config import (
    CausalLmConfig,
    ContrastiveConfig,
    CtcConfig,
    LoopConfig,
    MaskedLmConfig,
    OptimizerConfig,
    ParallelConfig,
    ReplacedTokenConfig,
)
from jaxptm.models import PRESETS
from jaxptm.nn.core import Execution
from jaxptm.objectives import Objective, electra, language, speech
from jaxptm.ops import attention
from jaxptm.ops.masking import VocabularyTables
from jaxptm.optim import optimizer
from jaxptm.parallel import compile_update, make_mesh, mapped_axis, put_batch
from jaxptm.step import make_update
from jaxptm.types import TrainState

INPUTS = {
    "masked-lm": ("attention_mask",),
    "replaced-token": ("attention_mask",),
    "causal-lm": ("attention_mask",),
    "contrastive": ("input_values", "attention_mask"),
    "ctc": ("input_values", "attention_mask", "labels"),
}


def objective_of(work: Work, execution: Execution) -> Objective:
    family, config = PRESETS[work.preset]
    if work.objective in ("contrastive", "ctc"):
        theirs = {hf_key: ours for ours, hf_key in family.renamed.items()}
        drops = {theirs.get(name, name): value for name, value in DROPOUTS.items()}
        assert drops.keys() <= type(config).model_fields.keys()
        config = config.model_copy(update=drops | ({"vocab_size": CHARACTERS} if work.objective == "ctc" else {}))
    module = family.module(config, work.objective, execution)
    tables = VocabularyTables(*(np.zeros(getattr(config, "vocab_size", 0), bool) for _ in range(2)))
    match work.objective:
        case "masked-lm":
            return language.masked_language_model(MaskedLmConfig(name="masked-lm"), module, tables, MASK, work.length)
        case "causal-lm":
            return language.causal_language_model(CausalLmConfig(name="causal-lm"), module)
        case "replaced-token":
            generator = family.module(config.generator(), "masked-lm", execution)
            settings = ReplacedTokenConfig(name="replaced-token")
            return electra.replaced_token_detection(settings, module, generator, tables, MASK, work.length)
        case "contrastive":
            return speech.contrastive(ContrastiveConfig(name="contrastive"), module)
        case "ctc":
            return speech.ctc(CtcConfig(name="ctc"), module)
    raise ValueError(work.objective)


def main() -> None:
    work = named(sys.argv[1])
    if os.environ.get("XLA_ATTENTION"):
        attention.fits_tiles = lambda query: False
    execution = Execution(dtype=jnp.dtype(os.environ.get("DTYPE", "float32")))
    objective = objective_of(work, execution)
    layout = ParallelConfig(data=1)
    mesh = make_mesh(layout, LoopConfig(steps=1000, batch_size=work.rows))
    adam = OptimizerConfig(
        learning_rate=LEARNING_RATE, schedule="constant", weight_decay=WEIGHT_DECAY, clip=CLIP, epsilon=EPSILON
    )
    params = jax.jit(objective.init)(jax.random.key(0))
    transform = optimizer(adam, 1000, params)
    state = TrainState(jnp.zeros((), jnp.int32), params, transform.init(params))
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))  # where steps leave it, or it compiles twice
    update = make_update(objective, transform, 1, mapped_axis(mesh, layout.mode))
    compiled: Any = compile_update(update, mesh, layout.mode, jax.eval_shape(lambda: state))
    arrays, key = batch(work), np.asarray(jax.random.key_data(jax.random.key(1)))
    rows = {name: arrays[name] for name in INPUTS[work.objective]}
    if "original_ids" in arrays or "input_ids" in arrays:  # masked here inside of the step
        rows["input_ids"] = arrays.get("original_ids", arrays.get("input_ids"))
    on_device = put_batch(mesh, rows, work.rows)

    def step() -> Any:
        nonlocal state
        state, means = compiled(state, on_device, key)
        return means["loss"]

    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    device = jax.devices()[0]
    kind = "cpu" if device.platform == "cpu" else device.device_kind
    serve(("jax", "jaxlib", "flax", "optax"), kind, parameters, step, lambda loss: float(loss.value))


if __name__ == "__main__":
    main()

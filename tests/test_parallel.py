"""The step on every layout of eight fake devices: the numbers are those of one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import pair_batch

from jaxptm.config import LoopConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from jaxptm.models.bert import BertConfig
from jaxptm.models.params import stacked, unstacked
from jaxptm.nn.core import Execution
from jaxptm.nn.text import TextModel
from jaxptm.objectives import Objective
from jaxptm.objectives.language import masked_language_model
from jaxptm.ops.masking import VocabularyTables
from jaxptm.optim import optimizer
from jaxptm.parallel import (
    check_tensor,
    compile_update,
    host_rows,
    make_mesh,
    mapped_axis,
    partition,
    put_batch,
    shardings,
)
from jaxptm.step import make_update
from jaxptm.types import JaxptmError, Params, TrainState

VOCABULARY, LENGTH, ROWS, STEPS = 104, 24, 16, 20
CONFIG = BertConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    intermediate_size=128,
    max_position_embeddings=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
ADAM = OptimizerConfig(learning_rate=1e-3, schedule="constant")


def objective_of(config: BertConfig = CONFIG, **execution: Any) -> Objective:
    special = np.arange(config.vocab_size) < 5
    continues = np.arange(config.vocab_size) % 3 == 0
    module = TextModel(config, "pretraining", Execution(**execution))
    settings = ObjectiveConfig(name="pretraining")
    return masked_language_model(settings, module, VocabularyTables(special, continues), 4, LENGTH)


@pytest.fixture(scope="module")
def start() -> Params:
    """Parameters with noise on each, so that no norm or bias stands where it does not matter."""
    params = jax.device_get(objective_of().init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32), params)


def batch_of(step: int) -> dict[str, np.ndarray]:
    batch = pair_batch(np.random.default_rng(step), ROWS, LENGTH, VOCABULARY)
    batch["attention_mask"][3] = batch["input_ids"][3] = 0  # devices with unequal numbers of predictions
    return batch


def run(
    start: Params, parallel: dict[str, Any], steps: int = STEPS, accumulate: int = 1, objective: Objective | None = None
) -> tuple[list[float], TrainState]:
    """The losses and the last state of some steps on a layout."""
    objective = objective or objective_of()
    layout = ParallelConfig(**{"data": 1, **parallel})
    mesh = make_mesh(layout, LoopConfig(steps=steps, batch_size=ROWS, accumulate=accumulate))
    transform = optimizer(ADAM, steps, start)
    update = make_update(objective, transform, jax.random.key(1), accumulate, mapped_axis(mesh, layout.mode))

    def create(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, transform.init(params))

    shapes = jax.eval_shape(create, start)
    state = jax.jit(create, out_shardings=shardings(shapes, mesh))(start)
    step = compile_update(update, mesh, layout.mode, shapes)
    losses = []
    for index in range(steps):
        state, means = step(state, put_batch(mesh, batch_of(index), ROWS))
        losses.append(float(means["loss"].value))
    return losses, state


@pytest.fixture(scope="module")
def alone(start: Params) -> tuple[list[float], TrainState]:
    return run(start, {})


LAYOUTS = [
    {"data": 2},
    {"data": 4},
    {"data": 8},
    {"fsdp": 2},
    {"fsdp": 4},
    {"fsdp": 8},
    {"tensor": 2},
    {"tensor": 4},
    {"tensor": 8},
    {"data": 2, "fsdp": 2},
    {"data": 4, "tensor": 2},
    {"fsdp": 2, "tensor": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"mode": "pmap", "data": 1},
    {"mode": "pmap", "data": 2},
    {"mode": "pmap", "data": 8},
]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_layouts_change_nothing(start: Params, alone: tuple[list[float], TrainState], parallel: dict[str, Any]) -> None:
    losses, state = run(start, parallel)
    np.testing.assert_allclose(losses, alone[0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, alone[1].params)

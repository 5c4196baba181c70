"""Costs on paper against what XLA says of compiled steps, and the page that is made of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import key_data

from experiments import bert_large_on_paper as paper
from experiments import rooflines
from jaxptm.config import LoopConfig, MaskedLmConfig, ParallelConfig
from jaxptm.cost import StepCost, format_memory, least_seconds, step_cost, step_seconds, utilisation
from jaxptm.models.bert import PRESETS, BertConfig
from jaxptm.models.params import abstract_params
from jaxptm.nn.core import Execution
from jaxptm.nn.text import TextModel, forward_flops
from jaxptm.objectives.language import masked_language_model
from jaxptm.ops.masking import VocabularyTables
from jaxptm.parallel import compile_update, make_mesh, mapped_axis, shardings
from jaxptm.step import make_update
from jaxptm.types import JaxptmError, Params, TrainState

ROOT = Path(__file__).resolve().parents[1]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""Halves the time that a step takes to compile."""


def sizes(layers: int, width: int, vocabulary: int, **fields: Any) -> BertConfig:
    return BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        vocab_size=vocabulary,
        **fields,
    )


def compiled_step(
    config: BertConfig,
    execution: Execution,
    rows: int,
    length: int,
    predictions: int,
    accumulate: int = 1,
    data: int = 1,
    task: str = "pretraining",
) -> jax.stages.Compiled:
    """A whole training step, compiled and never run. Plain gradient descent compiles in less time than Adam."""
    vocabulary = VocabularyTables(np.arange(config.vocab_size) < 5, np.arange(config.vocab_size) % 3 == 0)
    settings = MaskedLmConfig(name=task, max_predictions=predictions)
    objective = masked_language_model(settings, TextModel(config, task, execution), vocabulary, 4, length)
    layout = ParallelConfig(data=data)
    mesh = make_mesh(layout, LoopConfig(steps=1, batch_size=rows, accumulate=accumulate))
    transform = optax.sgd(0.1)
    update = make_update(objective, transform, accumulate, mapped_axis(mesh, layout.mode))

    def create(key: jax.Array) -> TrainState:
        params = objective.init(key)
        return TrainState(jnp.zeros((), jnp.int32), params, transform.init(params))

    state = jax.eval_shape(create, jax.random.key(0))
    names = ("input_ids", "attention_mask", "token_type_ids")
    batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names}
    batch["next_sentence_label"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return compile_update(update, mesh, layout.mode, state).lower(state, batch, key_data(0)).compile()


def lowered(config: BertConfig, execution: Execution, rows: int, length: int, predictions: int, gradient: bool) -> Any:
    """The model with its heads, forward or with the gradient, before XLA compiles it."""
    module = TextModel(config, "pretraining", execution)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    positions = jax.ShapeDtypeStruct((rows, predictions), jnp.int32)

    def loss(params: Params, ids: jax.Array, positions: jax.Array) -> jax.Array:
        rngs = {"dropout": jax.random.key(0)}
        out = module.apply({"params": params}, ids, ids, ids, mlm_positions=positions, train=True, rngs=rngs)
        return out["prediction_logits"].sum() + out["seq_relationship_logits"].sum()

    function: Callable[..., Any] = jax.grad(loss) if gradient else loss
    return jax.jit(function).lower(abstract_params(module), ids, positions)


# XLA counts elementwise work as well, one operation an element and operator: norms, softmax, gelu and the masks of
# dropout come to some ten operations a value of the width, where the products take 24 times the width.
def test_flops_of_a_forward_pass_are_those_that_xla_counts() -> None:
    config = sizes(2, 512, 2000)
    cost = step_cost(config, "pretraining", Execution(), rows=2, length=192, predictions=10)
    assert cost.model_flops == 3 * forward_flops(config, "pretraining", 2, 192, 10) == cost.executed_flops
    found = lowered(config, Execution(), 2, 192, 10, gradient=False).compile().cost_analysis()["flops"]
    assert 1 <= found / (cost.model_flops / 3) < 1.1


def test_flops_and_memory_of_a_step_are_near_what_xla_says() -> None:
    """A wide layer, so that products dominate the work, and many entries, so that logits dominate the memory."""
    config, shape = sizes(1, 512, 30000, **NO_DROPOUT), {"rows": 32, "length": 64, "predictions": 10}
    step = compiled_step(config, Execution(), **shape, task="masked-lm")
    cost = step_cost(config, "masked-lm", Execution(), **shape, moments=0)
    assert 1 <= step.cost_analysis()["flops"] / cost.executed_flops < 1.1
    assert 0.8 < (cost.gradients + cost.activations) / step.memory_analysis().temp_size_in_bytes < 1.5


@pytest.mark.parametrize("remat", [False, "dots", True])
def test_recomputed_flops_are_those_that_xla_is_given(remat: bool | str) -> None:
    """Before XLA optimises: on CPU it drops some of the recomputation again, up to a quarter of it."""
    config, execution = sizes(2, 512, 2000), Execution(remat=remat)
    cost = step_cost(config, "pretraining", execution, rows=4, length=192, predictions=10)
    flops = lowered(config, execution, 4, 192, 10, gradient=True).cost_analysis()["flops"]
    assert 1 <= flops / cost.executed_flops < 1.05


MEMORY = [
    # layers, width, vocabulary, rows, length, predictions, remat
    (4, 128, 2000, 8, 512, 77, True),  # mostly attention weights
    (3, 256, 2000, 32, 128, 20, "dots"),
    (3, 256, 2000, 8, 384, 77, False),
]


@pytest.mark.parametrize(("layers", "width", "vocabulary", "rows", "length", "predictions", "remat"), MEMORY)
def test_memory_of_a_step_with_dropout_is_near_what_xla_allocates(
    layers: int, width: int, vocabulary: int, rows: int, length: int, predictions: int, remat: Any
) -> None:
    config, execution = sizes(layers, width, vocabulary), Execution(remat=remat, scan=bool(remat))
    shape = {"rows": rows, "length": length, "predictions": predictions}
    memory = compiled_step(config, execution, **shape, task="masked-lm").memory_analysis()
    cost = step_cost(config, "masked-lm", execution, **shape, moments=0)
    assert memory.argument_size_in_bytes == pytest.approx(cost.parameters, rel=0.05)
    # What is cheap, XLA computes again and does not keep.
    assert 0.8 < (cost.gradients + cost.activations) / memory.temp_size_in_bytes < 1.5


def test_data_parallel_steps_sum_their_gradients_once() -> None:
    config = sizes(1, 64, 1000, **NO_DROPOUT)
    shape = {"rows": 16, "length": 16, "predictions": 4, "accumulate": 2, "data": 8}
    hlo = compiled_step(config, Execution(), **shape, task="masked-lm").as_text()
    assert not re.findall(r" (all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", hlo)
    summed = 0
    for shapes in re.findall(r"= (.*?) all-reduce(?:-start)?\(", hlo):
        for kind, axes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            summed += {"f32": 4, "u32": 4, "s32": 4}[kind] * int(np.prod([int(n) for n in axes.split(",") if n]))
    cost = step_cost(config, "masked-lm", Execution(), **shape)
    (sent,) = cost.collectives.values()
    assert sent == 2 * 7 / 8 * cost.parameters
    assert sent == pytest.approx(2 * 7 / 8 * summed, rel=1e-3)  # a few metrics travel along


@pytest.mark.parametrize("scan", [False, True])
def test_parameters_are_divided_as_they_are_laid_out(scan: bool) -> None:
    config, execution = sizes(2, 128, 1001), Execution(scan=scan)  # neither 2 nor 4 divides the vocabulary
    params = abstract_params(TextModel(config, "pretraining", execution))
    for data, fsdp, tensor in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)):
        mesh = make_mesh(ParallelConfig(data=data, fsdp=fsdp, tensor=tensor), LoopConfig(steps=1, batch_size=8))
        layout = shardings(params, mesh)
        expected = jax.tree.map(lambda leaf, where: 4 * int(np.prod(where.shard_shape(leaf.shape))), params, layout)
        shape = {"rows": 8, "length": 16, "predictions": 4, "data": data, "fsdp": fsdp, "tensor": tensor}
        cost = step_cost(config, "pretraining", execution, **shape)
        assert cost.parameters == sum(jax.tree.leaves(expected)) == cost.gradients == cost.optimizer / 2


def test_costs_add_up() -> None:
    def cost(rows: int = 8, **layout: int) -> StepCost:
        return step_cost(
            PRESETS["bert-mini"], "pretraining", Execution(), rows=rows, length=64, predictions=10, **layout
        )

    alone, twice = cost(), cost(16)
    assert alone.collectives == {} and alone.peak == alone.parameters * 4 + alone.activations
    assert twice.model_flops == 2 * alone.model_flops and twice.parameters == alone.parameters
    assert twice.activations == pytest.approx(2 * alone.activations)
    assert cost(16, data=2).model_flops == alone.model_flops
    assert cost(16, accumulate=2).activations == alone.activations
    assert cost(tensor=2).model_flops == alone.model_flops / 2
    assert cost(tensor=2).activations < alone.activations
    both = cost(16, data=2, fsdp=2, tensor=2, accumulate=2)
    assert set(both.collectives) == {
        "gradients summed over data",
        "parameters gathered over fsdp",
        "gradients scattered over fsdp",
        "activations summed over tensor",
    }


def test_bfloat16_halves_what_is_computed_and_not_what_is_stored() -> None:
    config = sizes(2, 128, 1000)
    single, half = (
        step_cost(config, "masked-lm", Execution(dtype=dtype), rows=64, length=128, predictions=20)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half.parameters == single.parameters and half.optimizer == single.optimizer
    assert 0.5 < half.activations / single.activations < 0.75  # norms, softmax and logits stay in float32


def test_rows_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(JaxptmError, match=r"12 rows do not divide into 2 microbatch\(es\) over 4 devices"):
        step_cost(sizes(1, 64, 100), None, Execution(), rows=12, length=8, predictions=1, data=4, accumulate=2)


def test_the_line_for_people() -> None:
    config = PRESETS["bert-tiny"]
    cost = step_cost(config, "pretraining", Execution(), rows=256, length=128, predictions=20)
    number = r"\d+(\.\d)? [GM]iB"
    parts = ", ".join(f"{name} {number}" for name in ("parameters", "optimizer", "gradients", "activations"))
    assert re.fullmatch(f"memory per device, about: {parts}: {number} in all", format_memory(cost))


def test_the_page_holds_the_tables_as_they_are_computed() -> None:
    page = (ROOT / "docs" / "bert_large_on_paper.md").read_text(encoding="utf-8")
    for name, table in paper.tables().items():
        assert f"\n{table}\n" in page, f"run experiments/bert_large_on_paper.py and put in its table `{name}`"
    assert page.count("\n| --- ") == len(paper.tables())


def test_the_rooflines_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert sum(f"| {case.preset} | {case.rows} x {case.length} |" in page for case in rooflines.CASES) == len(
        rooflines.CASES
    )
    for case in (rooflines.CASES[1], rooflines.CASES[5]):  # each of the others takes as long
        assert f"\n{rooflines.line(case)}\n" in page, "run experiments/rooflines.py and put in its table"


def test_nothing_is_expected_beyond_the_peaks() -> None:
    for plan in paper.PLANS:
        cost = paper.cost(plan)
        least = least_seconds(cost, plan.device)
        assert least < plan.fast < plan.slow
        assert 0 < utilisation(cost, plan.device, plan.slow) < utilisation(cost, plan.device, least) <= 1
        assert step_seconds(cost, plan.device, paper.SLOW) == plan.slow


def test_published_throughput_is_a_fifth_to_a_quarter_below_what_is_expected() -> None:
    for plan, measured in paper.PUBLISHED:
        assert 0.74 < measured / (plan.rows / plan.slow) < 0.81

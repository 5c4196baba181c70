"""The step on every layout of eight fake devices: the numbers are those of one device."""

from __future__ import annotations

import os
import re
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from reference import key_data, pair_batch

from jaxptm.config import LoopConfig, MaskedLmConfig, OptimizerConfig, ParallelConfig
from jaxptm.models.bert import BertConfig
from jaxptm.models.params import stacked, unstacked
from jaxptm.nn.core import Execution
from jaxptm.nn.text import TextModel
from jaxptm.objectives import Objective
from jaxptm.objectives.language import masked_language_model
from jaxptm.ops.masking import VocabularyTables
from jaxptm.optim import optimizer
from jaxptm.parallel import (
    OPTIONS,
    check_tensor,
    compile_evaluate,
    compile_update,
    compiler_options,
    host_rows,
    make_mesh,
    mapped_axis,
    partition,
    put_batch,
    shardings,
)
from jaxptm.state import first_state
from jaxptm.step import make_evaluate, make_update
from jaxptm.types import JaxptmError, Params, TrainState

LENGTH, ROWS, STEPS = 24, 16, 20
CONFIG = BertConfig(
    vocab_size=104,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    intermediate_size=128,
    max_position_embeddings=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
DROPOUT = CONFIG.model_copy(update={"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2})
ADAM = OptimizerConfig(learning_rate=1e-3, schedule="constant")


class Outcome(NamedTuple):
    losses: list[float]
    first: Params
    """Parameters after one step."""
    state: TrainState
    compiled: Any
    """What XLA made of the step; None under pmap."""


def objective_of(config: BertConfig = CONFIG, **execution: Any) -> Objective:
    special = np.arange(config.vocab_size) < 5
    continues = np.arange(config.vocab_size) % 3 == 0
    module = TextModel(config, "pretraining", Execution(**execution))
    settings = MaskedLmConfig(name="pretraining")
    return masked_language_model(settings, module, VocabularyTables(special, continues), 4, LENGTH)


def start_of(config: BertConfig) -> Params:
    """Parameters with noise on each, so that no norm or bias stands where it does not matter."""
    params = jax.device_get(objective_of(config).init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32), params)


def batch_of(step: int, config: BertConfig = CONFIG) -> dict[str, np.ndarray]:
    batch = pair_batch(np.random.default_rng(step), ROWS, LENGTH, config.vocab_size)
    batch["attention_mask"][3] = batch["input_ids"][3] = 0  # devices with unequal numbers of predictions
    return batch


def mesh_of(accumulate: int = 1, **parallel: Any) -> jax.sharding.Mesh:
    layout = ParallelConfig(**{"data": 1, **parallel})
    return make_mesh(layout, LoopConfig(steps=1, batch_size=ROWS, accumulate=accumulate))


@cache
def run(
    config: BertConfig = CONFIG, steps: int = STEPS, accumulate: int = 1, scan: bool = False, **parallel: Any
) -> Outcome:
    """Some steps on a layout, from the same parameters."""
    objective, mesh, mode = (
        objective_of(config, scan=scan),
        mesh_of(accumulate, **parallel),
        parallel.get("mode", "jit"),
    )
    start = stacked(start_of(config)) if scan else start_of(config)
    transform = optimizer(ADAM, steps, start)
    update = make_update(objective, transform, accumulate, mapped_axis(mesh, mode))

    def create(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, transform.init(params))

    shapes = jax.eval_shape(create, start)
    state = jax.jit(create, out_shardings=shardings(shapes, mesh))(start)
    step: Any = compile_update(update, mesh, mode, shapes)
    if mode == "jit":
        step = step.lower(state, put_batch(mesh, batch_of(0, config), ROWS), key_data(1)).compile()
    losses, first = [], {}
    for index in range(steps):
        state, means = step(state, put_batch(mesh, batch_of(index, config), ROWS), key_data(1))
        losses.append(float(means["loss"].value))
        first = first or jax.device_get(state.params)
    return Outcome(losses, first, state, step if mode == "jit" else None)


def assert_close(one: Outcome, other: Outcome) -> None:
    np.testing.assert_allclose(one.losses, other.losses, atol=1e-5)
    for ours, theirs in ((one.first, other.first), (one.state.params, other.state.params)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), unstacked(ours), unstacked(theirs))


def test_the_steps_learn_something_to_be_compared() -> None:
    losses = run().losses
    assert losses[-1] < losses[0] - 0.05 and len(set(losses)) == STEPS


@pytest.mark.parametrize(
    "parallel",
    [
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
        {"accumulate": 4},
        {"accumulate": 4, "data": 4},
        {"accumulate": 4, "data": 2, "fsdp": 2},
        {"accumulate": 2, "data": 2, "mode": "pmap"},
        {"scan": True, "data": 2, "fsdp": 2, "tensor": 2},
    ],
    ids=str,
)
def test_layouts_change_nothing(parallel: dict[str, Any]) -> None:
    assert_close(run(**parallel), run())


def test_what_does_not_divide_is_copied() -> None:
    odd = CONFIG.model_copy(update={"vocab_size": 97, "max_position_embeddings": 27})
    assert_close(run(odd, 3, fsdp=2, tensor=4), run(odd, 3))
    spec = partition(("embeddings", "token", "embedding"), (97, 64), {"fsdp": 2, "tensor": 4})
    assert spec == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize("parallel", [{"data": 4}, {"data": 2, "fsdp": 2, "tensor": 2, "accumulate": 2}], ids=str)
def test_another_model_on_layouts(parallel: dict[str, Any]) -> None:
    other = CONFIG.model_copy(update={"num_hidden_layers": 1, "type_vocab_size": 2, "tie_word_embeddings": False})
    assert_close(run(other, 3, **parallel), run(other, 3))


@pytest.mark.parametrize("parallel", [{"data": 2}, {"fsdp": 2, "tensor": 2}, {"mode": "pmap", "data": 2}], ids=str)
def test_with_dropout_a_layout_repeats_itself_to_the_bit(parallel: dict[str, Any]) -> None:
    first, again = (run.__wrapped__(DROPOUT, 3, **parallel) for _ in range(2))
    assert first.losses == again.losses
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(first.state), jax.device_get(again.state))
    assert first.losses != run.__wrapped__(CONFIG, 3, **parallel).losses


@pytest.mark.parametrize("devices", [2, 8])
def test_fsdp_divides_what_a_device_holds(devices: int) -> None:
    def held(outcome: Outcome) -> int:
        """Bytes of parameters and moments on the first device."""
        leaves = jax.tree.leaves((outcome.state.params, outcome.state.opt_state))
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)

    def arguments(outcome: Outcome) -> int:
        """What XLA says of a step's arguments, which are these and the batch."""
        return outcome.compiled.memory_analysis().argument_size_in_bytes

    whole, divided = run(), run(fsdp=devices)
    assert held(divided) / held(whole) == pytest.approx(1 / devices, rel=0.01)
    assert arguments(divided) / arguments(whole) == pytest.approx(1 / devices, rel=0.05)


def collectives(compiled: Any, kind: str) -> list[tuple[str, int]]:
    """(computation, bytes) of each collective that XLA put in."""
    found, computation = [], ""
    for line in compiled.as_text().splitlines():
        computation = match[1] if (match := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*{$", line)) else computation
        if match := re.search(rf"= (.*?) {kind}(-start)?\(", line):
            shapes = re.findall(r"(?:f32|s32|u32)\[([\d,]*)\]", match[1])
            found.append((computation, sum(4 * int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes)))
    return found


def test_fsdp_gathers_parameters_and_not_activations() -> None:
    compiled = run(fsdp=8).compiled
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(run().state.params))
    gathered = sum(size for _, size in collectives(compiled, "all-gather"))
    assert parameters < gathered < 1.2 * parameters
    assert sum(size for _, size in collectives(compiled, "all-reduce")) < 1.2 * parameters


def test_data_parallelism_sums_once_a_step() -> None:
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(run().state.params))
    found = collectives(run(accumulate=4, data=4).compiled, "all-reduce")
    assert sum(size for _, size in found) == pytest.approx(parameters, rel=0.01)
    assert {computation.startswith("main") for computation, _ in found} == {True}  # in no loop over microbatches


def test_evaluation_gives_the_same_on_any_layout() -> None:
    def evaluate(**parallel: Any) -> Any:
        mesh = mesh_of(**parallel)
        params = jax.device_put(start_of(CONFIG), shardings(start_of(CONFIG), mesh))
        step = compile_evaluate(make_evaluate(objective_of()), mesh)
        return jax.device_get(step(params, put_batch(mesh, batch_of(0), ROWS), jnp.int32(3), key_data(2)))

    alone = evaluate()
    for parallel in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), evaluate(**parallel), alone)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        # Megatron: outputs of the first product of a pair, inputs of the second
        ("encoder/layer_0/attention/query/kernel", (64, 64), ("fsdp", "tensor")),
        ("encoder/layer_0/attention/query/bias", (64,), ("tensor",)),
        ("encoder/layer_0/attention/output/kernel", (64, 64), ("tensor", "fsdp")),
        ("encoder/layer_0/attention/output/bias", (64,), ("fsdp",)),
        ("encoder/layer_0/mlp/up/kernel", (64, 128), ("fsdp", "tensor")),
        ("encoder/layer_0/mlp/down/kernel", (128, 64), ("tensor", "fsdp")),
        ("encoder/layers/mlp/up/kernel", (2, 64, 128), (None, "fsdp", "tensor")),
        ("encoder/layers/mlp_norm/scale", (2, 64), (None, "fsdp")),
        ("embeddings/token/embedding", (104, 64), ("tensor", "fsdp")),
        ("embeddings/position/embedding", (32, 64), (None, "fsdp")),
        ("mlm_head/bias", (104,), ("tensor",)),
        ("mlm_head/dense/kernel", (64, 64), ("fsdp", None)),
        ("nsp_head/dense/bias", (2,), ("fsdp",)),
        ("nsp_head/dense/bias", (3,), (None,)),
    ],
)
def test_where_parameters_lie(path: str, shape: tuple[int, ...], expected: tuple[str | None, ...]) -> None:
    assert partition(tuple(path.split("/")), shape, {"fsdp": 2, "tensor": 2}) == PartitionSpec(*expected)


def test_moments_lie_where_their_parameters_do() -> None:
    state = run(fsdp=2, tensor=4).state
    adam = next(
        part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")
    )
    for moments in (adam.mu, adam.nu):
        jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(str(a.sharding)), moments, state.params)
    assert state.params["embeddings"]["token"]["embedding"].sharding.spec == PartitionSpec("tensor", "fsdp")


def test_the_first_state_is_made_in_its_shards() -> None:
    objective = objective_of()
    opened = SimpleNamespace(config=SimpleNamespace(init_from=None), objective=objective)
    transform = optimizer(ADAM, STEPS, jax.eval_shape(objective.init, jax.random.key(0)))

    def create(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, transform.init(params))

    shapes = jax.eval_shape(lambda key: create(objective.init(key)), jax.random.key(0))
    optimization = SimpleNamespace(create=create, init_key=jax.random.key(5), shapes=shapes)
    # Past the check of types: of all that a `Run` holds, only these two are needed.
    whole, divided = (first_state.__wrapped__(opened, optimization, mesh_of(fsdp=n)) for n in (1, 8))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(divided), jax.device_get(whole))
    expected = shardings(divided, mesh_of(fsdp=8))
    jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted or pytest.fail(str(leaf.sharding)), divided, expected)


def test_hosts_read_what_their_devices_hold() -> None:
    for parallel in ({"data": 8}, {"fsdp": 4, "tensor": 2}, {"tensor": 8}):
        np.testing.assert_array_equal(host_rows(mesh_of(**parallel), ROWS), np.arange(ROWS))


@pytest.mark.parametrize(
    ("parallel", "loop", "message"),
    [
        ({"data": 16}, {}, "data 16 x fsdp 1 x tensor 1 is 16 devices asked for, 8 here; lower parallel.data"),
        ({"data": 4, "fsdp": 4}, {}, "is 16 devices asked for, 8 here"),
        ({"fsdp": 3}, {}, "8 device.s. do not divide into fsdp 3 x tensor 1; change parallel.fsdp"),
        ({"data": 4}, {"batch_size": 18}, "18 rows in 1 microbatch.es. do not divide among 4 devices"),
        ({"data": 2, "fsdp": 2}, {"batch_size": 16, "accumulate": 8}, "16 rows in 8 .* among 4 devices"),
    ],
)
def test_meshes_that_do_not_fit(parallel: dict[str, Any], loop: dict[str, Any], message: str) -> None:
    with pytest.raises(JaxptmError, match=message):
        make_mesh(ParallelConfig(**parallel), LoopConfig(**{"steps": 1, "batch_size": 16, **loop}))


def test_tensor_parallelism_divides_heads_and_inner_width() -> None:
    check_tensor(mesh_of(tensor=8), CONFIG)
    with pytest.raises(JaxptmError, match=r"parallel.tensor: 8 does not divide the model's 4 \(num_attention_heads\)"):
        check_tensor(mesh_of(tensor=8), CONFIG.model_copy(update={"num_attention_heads": 4}))
    with pytest.raises(JaxptmError, match=r"4 does not divide the model's 130 \(intermediate_size\)"):
        check_tensor(mesh_of(tensor=4), CONFIG.model_copy(update={"intermediate_size": 130}))


def test_pmap_copies_parameters() -> None:
    with pytest.raises(ValueError, match="leave `fsdp` and `tensor` at 1"):
        ParallelConfig(mode="pmap", fsdp=2)


def test_options_of_xla_are_those_it_knows_and_the_user_does_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler_options() == {}  # on CPUs
    every = OPTIONS["gpu"] | {"xla_gpu_no_such_option": 1}
    monkeypatch.setitem(OPTIONS, "cpu", every)  # CPUs take options of GPUs, and do nothing with them
    compiler_options.cache_clear()
    try:
        assert compiler_options() == OPTIONS["gpu"]
        compiler_options.cache_clear()
        monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=true")
        assert compiler_options() == {"xla_gpu_dot_merger_threshold_mb": 0}
    finally:
        compiler_options.cache_clear()

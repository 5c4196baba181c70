"""What one optimizer step costs on paper: operations, memory and communication of one device, and the time they take.

Nothing here computes a model. Parameters are counted from their shapes, and activations from what `jax.vjp` of a layer
keeps, both by tracing alone, so that a changed layer changes the estimate.

What XLA makes of it is modelled, not known. For CPU it compiles steps that hold 0.8 to 1.2 times the bytes that
are estimated here for gradients and activations (tests/test_cost.py); GPU and TPU were not compared. On CPU, `remat`
without `scan` saves nothing, because XLA computes all layers again before it goes backward through the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from jaxptm.models.params import abstract_params
from jaxptm.nn.core import Execution, PostNormLayer, PreNormLayer, encoder_products
from jaxptm.nn.text import TextModel, forward_flops, queries_of_last_layer
from jaxptm.nn.text_config import TextConfig
from jaxptm.ops.losses import parts_of_logits
from jaxptm.parallel import partition
from jaxptm.types import Array, JaxptmError, Params

ROWS = 104729
"""Rows that are traced: a prime, so that what it divides is what rows have."""


@dataclass(frozen=True)
class StepCost:
    """One optimizer step on one device. Operations are floating point ones, two a multiply-add; the rest is in bytes.

    Attributes:
        model_flops: three times the matrix products of a forward pass, the usual count for utilisation.
        executed_flops: `model_flops` and what `remat` computes again.
        parameters: as they are stored.
        optimizer: its moments.
        gradients: of the whole step and, with microbatches, of the one under way.
        activations: everything else at the moment when most is held: what the backward pass waits for, logits, weights
            in the type of the computation or gathered from other devices.
        traffic: read from and written to the device's memory; `activations` once each way, see `Efficiency.passes`.
        collectives: sent to other devices, by what for. Rings: a sum of N bytes over k devices sends 2 (k - 1) / k N.
    """

    model_flops: float
    executed_flops: float
    parameters: float
    optimizer: float
    gradients: float
    activations: float
    traffic: dict[str, float]
    collectives: dict[str, float]

    def __add__(self, other: StepCost) -> StepCost:
        """Both in one step."""

        def sums(ours: Any, theirs: Any) -> Any:
            if isinstance(ours, dict):
                return {name: ours.get(name, 0.0) + theirs.get(name, 0.0) for name in ours | theirs}
            return ours + theirs

        return StepCost(*(sums(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    @property
    def peak(self) -> float:
        """Bytes of memory that the step needs."""
        return self.parameters + self.optimizer + self.gradients + self.activations


@dataclass(frozen=True)
class Device:
    """What a vendor says of a device.

    Attributes:
        name: for people.
        flops: dense matrix products in bfloat16, operations a second.
        memory: bytes.
        memory_bandwidth: bytes a second.
        link_bandwidth: bytes a second that it can send to its peers, over all links together.
    """

    name: str
    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float


@dataclass(frozen=True)
class Efficiency:
    """How close a program comes to a device's peaks.

    Attributes:
        matmul: share of `Device.flops` in matrix products.
        memory: share of `Device.memory_bandwidth`.
        links: share of `Device.link_bandwidth`.
        passes: times that activations travel to memory and back: 1 where each kept value is written and read once, 2
            where the gradient of each does so too.
        overlap: share of the computation that collectives may hide behind.
    """

    matmul: float
    memory: float
    links: float
    passes: float
    overlap: float


def step_cost(
    config: TextConfig,
    task: str | None,
    execution: Execution,
    *,
    rows: int,
    length: int,
    predictions: int,
    moments: int = 2,
    accumulate: int = 1,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    shares_embeddings: bool = False,
) -> StepCost:
    """The cost of one optimizer step of a text model, laid out as `jaxptm.parallel` does.

    Takes a second or two: a layer and the model are traced, not compiled.

    Args:
        rows: of the whole batch, over all devices and microbatches.
        length: tokens a row.
        predictions: tokens a row that a language-model head runs on.
        moments: values that the optimizer keeps for each parameter; 2 for `adamw`, `bert_adam` and `lamb`.
        shares_embeddings: the tables are another model's, and counted there.

    Raises:
        JaxptmError: the rows do not divide among microbatches and devices.
    """
    if rows % (accumulate * data * fsdp):
        raise JaxptmError(
            f"{rows} rows do not divide into {accumulate} microbatch(es) over {data * fsdp} devices; choose a multiple "
            f"of {accumulate * data * fsdp}."
        )
    here = rows // (data * fsdp)
    layers, compute = config.num_hidden_layers, jnp.dtype(execution.dtype).itemsize
    has_head = task in ("masked-lm", "pretraining", "causal-lm")
    weights = _weights(config, task, execution, fsdp, tensor, shares_embeddings)
    cast = jnp.dtype(execution.dtype) != jnp.dtype(execution.param_dtype)

    forward = forward_flops(config, task, here, length, predictions, scan=execution.scan) / tensor
    # The last layer has an output at some tokens only; `outputs` are all layers' together.
    queries = length if execution.scan else queries_of_last_layer(task, length, predictions)
    outputs = (layers - 1) * length + queries
    again = {
        False: 0.0,
        True: 2.0 * here * encoder_products(config, length, queries) / tensor,
        "dots": 4.0 * here * outputs * length * config.hidden_size / tensor,  # scores, and what they mix
    }[execution.remat]

    # Activations, bytes a row: of one layer, of all of them, and of what comes before and after them. Dropout keeps
    # nothing, since its masks are drawn again, but what it lets through (`train`) is written and read.
    without_remat = replace(execution, remat=False)

    def of_layer(execution: Execution, queries: int = length, train: bool = False) -> float:
        return _kept_by_layer(config, execution, length, queries, tensor, train)

    def of_layers(execution: Execution, train: bool) -> float:
        return (layers - 1) * of_layer(execution, train=train) + of_layer(execution, queries, train)

    def of_ends(train: bool) -> float:
        return _kept_by_ends(config, task, execution, length, predictions, train)

    moved = 1.5 * of_layers(without_remat, train=True) - 0.5 * of_layers(execution, train=True) + of_ends(train=True)
    logits = 4.0 * predictions * config.vocab_size / _parts(config.vocab_size, tensor) if has_head else 0.0
    parts = parts_of_logits(here // accumulate * length) if task == "causal-lm" else 1
    # And what is held for a while: the logits with their gradient; later a layer's gradients, and what it computes
    # again. Gradients take about half of the layer's activations, because each goes when the next is there.
    passing = max(2 * logits / parts, 1.5 * of_layer(without_remat) - of_layer(execution))
    # Weights beside the stored ones: cast to the type of the computation, or gathered. A scan gathers layer by layer.
    copies = weights.count * compute / (fsdp if execution.scan else 1) if cast else 0.0
    if fsdp > 1 and execution.scan:
        copies += compute * (weights.count - weights.in_layers * (1 - 1 / layers))
    elif fsdp > 1 and not cast:
        copies += compute * weights.count

    # What GSPMD sums over `tensor`, in tokens. Forward: the outputs of attention and mlp, and what is looked up.
    # Backward: the inputs of query, key, value and up, and that of the decoder.
    sums = (6 if execution.remat is True else 4) * outputs + 2 * layers * length
    sums += length + (predictions if has_head else 0)
    return StepCost(
        model_flops=3 * forward,
        executed_flops=3 * forward + again,
        parameters=weights.stored,
        optimizer=moments * 4 / weights.itemsize * weights.stored,  # in float32, whatever the parameters are
        gradients=4 / weights.itemsize * weights.stored * (2 if accumulate > 1 else 1),
        activations=here / accumulate * (of_layers(execution, train=False) + of_ends(train=False) + passing) + copies,
        traffic={
            # Parameters and moments are read and written; gradients are written, read for their norm, and read again.
            "optimizer": (2 + 3 + 2 * moments * 4 / weights.itemsize) * weights.stored,
            # A product and its two gradients each touch the weights; before that they are cast.
            "weights": accumulate * weights.count * (3 * compute + (weights.itemsize + compute if cast else 0)),
            "activations": 2 * here * (moved + logits),
        },
        collectives=_collectives(
            weights, execution, here * sums * config.hidden_size * compute, accumulate, data, fsdp, tensor
        ),
    )


def step_seconds(cost: StepCost, device: Device, efficiency: Efficiency) -> float:
    """Expected seconds of a step: matrix products, then memory traffic, then the collectives that stay in sight.

    Products and traffic add up, because operations on one device follow each other.
    """
    traffic = cost.traffic | {"activations": efficiency.passes * cost.traffic["activations"]}
    computing = cost.executed_flops / (efficiency.matmul * device.flops)
    computing += sum(traffic.values()) / (efficiency.memory * device.memory_bandwidth)
    sending = sum(cost.collectives.values()) / (efficiency.links * device.link_bandwidth)
    return computing + max(0.0, sending - efficiency.overlap * computing)


def least_seconds(cost: StepCost, device: Device) -> float:
    """Seconds below which no program with these costs gets: the slowest of the peaks, the others hidden behind it.

    Activations are left out of the memory traffic, since a better compiler may keep fewer of them.
    """
    return max(
        cost.executed_flops / device.flops,
        (cost.traffic["optimizer"] + cost.traffic["weights"]) / device.memory_bandwidth,
        sum(cost.collectives.values()) / device.link_bandwidth,
    )


def utilisation(cost: StepCost, device: Device, seconds: float) -> float:
    """Model FLOP utilisation: the share of the device's peak that the model's own operations use."""
    return cost.model_flops / (seconds * device.flops)


def format_memory(cost: StepCost) -> str:
    """One line for people: what a step is expected to hold on each device."""
    parts = ", ".join(
        f"{name} {_gib(getattr(cost, name))}" for name in ("parameters", "optimizer", "gradients", "activations")
    )
    return f"memory per device, about: {parts}: {_gib(cost.peak)} in all"


def _gib(size: float) -> str:
    gib = size / 2**30
    return f"{gib:.1f} GiB" if gib >= 0.95 else f"{size / 2**20:.{0 if size >= 10 * 2**20 else 1}f} MiB"


@dataclass(frozen=True)
class _Weights:
    """The parameters of a model on one device.

    Attributes:
        stored: bytes, as fsdp and tensor parallelism divide them.
        count: values, as tensor parallelism alone divides them: what the products need.
        in_layers: how many of `count` are in the layers.
        itemsize: bytes of a stored value.
    """

    stored: float
    count: float
    in_layers: float
    itemsize: int


@cache
def _weights(
    config: TextConfig, task: str | None, execution: Execution, fsdp: int, tensor: int, shares_embeddings: bool
) -> _Weights:
    """Counts parameters as `jaxptm.parallel.partition` divides them."""
    stored = count = in_layers = 0.0
    itemsize = jnp.dtype(execution.param_dtype).itemsize
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(TextModel(config, task, execution))):
        names = tuple(str(part.key) for part in path)
        if shares_embeddings and names[0] == "embeddings":
            continue
        divided = partition(names, leaf.shape, {"fsdp": fsdp, "tensor": tensor})
        size = leaf.size / (tensor if "tensor" in divided else 1)
        stored += itemsize * size / (fsdp if "fsdp" in divided else 1)
        count += size
        in_layers += size if "encoder" in names else 0.0
    return _Weights(stored, count, in_layers, itemsize)


def _parts(entries: int, devices: int) -> int:
    """Into how many parts an axis is divided over `devices`: it is copied where they do not divide it."""
    return devices if entries % devices == 0 else 1


@cache
def _kept_by_layer(
    config: TextConfig, execution: Execution, length: int, queries: int, tensor: int, train: bool
) -> float:
    """Bytes a row that autodiff keeps of one layer for its backward pass, in training with what belongs to dropout.

    With `tensor`, whatever has an axis of heads or of the inner width is divided.

    Args:
        queries: tokens that it computes its output for.
    """
    kind = PostNormLayer if config.norm == "post" else PreNormLayer
    layer = kind(config, execution, train)
    policies = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    x = jax.ShapeDtypeStruct((ROWS, length, config.hidden_size), execution.dtype)
    mask = jax.ShapeDtypeStruct((ROWS, 1, 1, length), jnp.bool_)
    positions = jax.ShapeDtypeStruct((ROWS, queries), jnp.int32)

    def keep(variables: Params, key: Array, x: Array, mask: Array, positions: Array) -> Any:
        def apply(variables: Params, x: Array) -> Array:
            some = positions if queries < length else None
            return layer.apply(variables, x, mask, positions=some, rngs={"dropout": key})[0]

        if execution.remat:
            apply = jax.checkpoint(apply, policy=policies.get(str(execution.remat)))
        return jax.vjp(apply, variables, x)[1]

    def parts(shape: tuple[int, ...]) -> int:
        return tensor if len(shape) == 4 or shape[-1:] == (config.intermediate_size,) else 1

    variables = jax.eval_shape(layer.init, _key(), x, mask)
    return _bytes_a_row(jax.eval_shape(keep, variables, _key(), x, mask, positions), parts)


@cache
def _kept_by_ends(
    config: TextConfig, task: str | None, execution: Execution, length: int, predictions: int, train: bool
) -> float:
    """Bytes a row that embeddings and heads keep for their backward pass: a model of one layer, less the layer.

    The layer has all of its output here, because all hidden states are asked for.
    """
    execution = replace(execution, scan=False, remat=False)
    module = TextModel(config.model_copy(update={"num_hidden_layers": 1}), task, execution)
    ids = jax.ShapeDtypeStruct((ROWS, length), jnp.int32)
    positions = jax.ShapeDtypeStruct((ROWS, predictions), jnp.int32)

    def keep(variables: Params, key: Array, ids: Array, positions: Array) -> Any:
        def apply(variables: Params) -> Any:
            options: Any = {"train": train, "output_hidden_states": True, "rngs": {"dropout": key}}
            return module.apply(variables, ids, ids, ids, mlm_positions=positions, **options)

        return jax.vjp(apply, variables)[1]

    of_model = jax.eval_shape(keep, {"params": abstract_params(module)}, _key(), ids, positions)
    return _bytes_a_row(of_model, lambda shape: 1) - _kept_by_layer(config, execution, length, length, 1, train)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _bytes_a_row(residuals: Any, parts: Callable[[tuple[int, ...]], int]) -> float:
    """Bytes of what ROWS rows keep, a row; weights have no axis of rows, and masks XLA makes again."""
    return math.fsum(
        leaf.size / ROWS * leaf.dtype.itemsize / parts(leaf.shape)
        for leaf in jax.tree.leaves(residuals)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and leaf.dtype != jnp.bool_ and leaf.size % ROWS == 0
    )


def _collectives(
    weights: _Weights,
    execution: Execution,
    activations: float,
    accumulate: int,
    data: int,
    fsdp: int,
    tensor: int,
) -> dict[str, float]:
    """Bytes that a device sends; `activations` are those that are summed over `tensor`."""
    compute = jnp.dtype(execution.dtype).itemsize
    sent: dict[str, float] = {}
    if data > 1 and fsdp == tensor == 1:  # the step itself sums, once and in float32
        sent["gradients summed over data"] = _ring(data) * weights.stored * 4 / weights.itemsize
    elif data > 1:  # XLA sums, after every microbatch and in the type of the products
        sent["gradients summed over data"] = accumulate * _ring(data) * weights.count * compute / fsdp
    if fsdp > 1:
        # A scan gathers a layer again for its backward pass, as does remat; and it gathers for every microbatch, where
        # XLA gathers unrolled layers once a step and keeps them.
        gathered = weights.count + (weights.in_layers if execution.scan or execution.remat else 0.0)
        times = accumulate if execution.scan else 1
        sent["parameters gathered over fsdp"] = times * _ring(fsdp) / 2 * gathered * compute
        sent["gradients scattered over fsdp"] = accumulate * _ring(fsdp) / 2 * weights.count * compute
    if tensor > 1:
        sent["activations summed over tensor"] = _ring(tensor) * activations
    return sent


def _ring(devices: int) -> float:
    """Bytes sent for each byte that is summed over `devices`; gathering or scattering takes half of it."""
    return 2 * (devices - 1) / devices

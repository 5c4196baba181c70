"""Where arrays lie and how a step is compiled: one mesh of devices, sharding rules by path and shape.

The modules know nothing of it. XLA reads the shardings of a step's inputs and outputs and puts in the communication
(GSPMD, Xu et al. 2021); under `pmap` the body of the step says itself what it adds up.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxptm.config import LoopConfig, ParallelConfig
from jaxptm.nn.core import TransformerConfig
from jaxptm.types import Array, Batch, JaxptmError, Means, Params, TrainState

log = logging.getLogger("jaxptm")
AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""Axes that divide the rows of a batch."""

TENSOR_AXIS: dict[tuple[str, ...], int] = {
    # Megatron-LM (Shoeybi et al. 2019, section 3): the first product of a pair is split by its outputs, the second by
    # its inputs, so that a pair costs one sum over devices; attention is so split by heads, and the tables by entries.
    **{(name, leaf): -1 for name in ("query", "key", "value", "up") for leaf in ("kernel", "bias")},
    ("attention", "output", "kernel"): -2,
    ("down", "kernel"): -2,
    ("token", "embedding"): -2,
    ("mlm_head", "embedding"): -2,
    ("causal_lm_head", "embedding"): -2,
    ("mlm_head", "bias"): -1,
}
"""End of a parameter's path -> the axis that tensor parallelism divides; parameters that are not here are copied."""

OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {
        # cuBLAS adds biases and gradients of the residual stream within its products; XLA's own kernels for products
        # leave that to another pass over the activations, and take a minute to choose from.
        "xla_gpu_enable_triton_gemm": False,
        # What products of one input, merged into one, give has to be cut apart again.
        "xla_gpu_dot_merger_threshold_mb": 0,
    },
}
"""Of XLA, by platform: how it compiles steps."""

Tree = TypeVar("Tree")
KeyData = Array | np.ndarray
"""What a key is made of (`jax.random.key_data`): steps take it as an input, so that all seeds share one program."""
Update = Callable[[TrainState, Batch, KeyData], tuple[TrainState, Means]]
Evaluation = tuple[Means, Means, dict[str, Array]]
Evaluate = Callable[[Params, Batch, Array, KeyData], Evaluation]


def make_mesh(config: ParallelConfig, train: LoopConfig) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over the devices that `config` asks for, of all hosts.

    Raises:
        JaxptmError: the devices do not suffice, devices or the batch do not divide, or a host would be left out.
    """
    devices = jax.devices()
    shared = config.fsdp * config.tensor
    if config.data is None and len(devices) % shared:
        raise JaxptmError(
            f"parallel: {len(devices)} device(s) do not divide into fsdp {config.fsdp} x tensor {config.tensor}; "
            "change parallel.fsdp or parallel.tensor, or give parallel.data to use fewer devices."
        )
    data = config.data or len(devices) // shared
    count = data * shared
    if count > len(devices):
        raise JaxptmError(
            f"parallel: data {data} x fsdp {config.fsdp} x tensor {config.tensor} is {count} devices asked for, "
            f"{len(devices)} here; lower parallel.data, parallel.fsdp or parallel.tensor."
        )
    if count < len(devices) and jax.process_count() > 1:
        raise JaxptmError(
            f"parallel: data {data} x fsdp {config.fsdp} x tensor {config.tensor} uses {count} of the {len(devices)} "
            f"devices of {jax.process_count()} processes; leave parallel.data out to use them all."
        )
    if (train.batch_size // train.accumulate) % (data * config.fsdp):
        raise JaxptmError(
            f"train.batch_size: {train.batch_size} rows in {train.accumulate} microbatch(es) do not divide among "
            f"{data * config.fsdp} devices (data {data} x fsdp {config.fsdp}); change train.batch_size, "
            "train.accumulate, parallel.data or parallel.fsdp."
        )
    arranged = _arrange((data, config.fsdp, config.tensor), devices[:count], config.mode)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def _arrange(shape: tuple[int, int, int], devices: list[jax.Device], mode: str) -> np.ndarray:
    """Devices by mesh position: on TPU neighbours of an axis are neighbours in the torus, slices lie along data."""
    if devices[0].platform != "tpu" or mode == "pmap":  # pmap maps over devices in this order
        return np.array(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise JaxptmError(
            f"parallel.data: {shape[0]} does not divide over {slices} TPU slices, which only the rows may go across; "
            "change parallel.fsdp or parallel.tensor."
        )
    try:
        if slices > 1:
            inside = (shape[0] // slices, *shape[1:])
            return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise JaxptmError(
            f"parallel: data {shape[0]} x fsdp {shape[1]} x tensor {shape[2]} does not fit the torus of these "
            f"{len(devices)} TPU devices ({error}); choose divisors of its sides."
        ) from error


def check_tensor(mesh: Mesh, config: TransformerConfig) -> None:
    """Raises JaxptmError where tensor parallelism does not divide the heads or the inner width of the layers."""
    tensor = mesh.shape["tensor"]
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % tensor:
            raise JaxptmError(
                f"parallel.tensor: {tensor} does not divide the model's {getattr(config, name)} ({name}); "
                "choose a common divisor."
            )


def partition(path: tuple[str, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """How one parameter, or an optimizer's moment of it, is divided over the mesh.

    `tensor` divides the axis that `TENSOR_AXIS` names, `fsdp` the largest other axis that it can (Rajbhandari et al.
    2020, ZeRO stage 3). What an axis of the mesh does not divide is copied over it.

    Args:
        sizes: of the axes fsdp and tensor (`mesh.shape`).
    """
    axes: list[str | None] = [None] * len(shape)
    split = next((axis for end, axis in TENSOR_AXIS.items() if path[-len(end) :] == end), None)
    if split is not None and sizes["tensor"] > 1 and shape[split] % sizes["tensor"] == 0:
        axes[split] = "tensor"
    layers = 1 if "layers" in path else 0  # stacked layers stay whole: each is used by every device in turn
    free = [i for i in range(layers, len(shape)) if axes[i] is None and shape[i] % sizes["fsdp"] == 0]
    if free:
        axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes)


def shardings(tree: Tree, mesh: Mesh) -> Tree:
    """The sharding of every leaf of a training state, or of any part of it, by its path and shape."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition(_names(path), leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(mesh: Mesh) -> NamedSharding:
    """The first axis divided over the axes data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch the devices of this host hold, in order.

    A row is held by several hosts where the axis tensor goes across them.
    """
    held = split_rows(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, Array]:
    """A batch as global arrays divided by rows; `batch` holds the `host_rows` of it.

    Where it has several times as many rows, each of the `batch_size` stands for as many in a line.
    """
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), split_rows(mesh))
    rows = host_rows(mesh, batch_size)

    def put(values: np.ndarray) -> Array:
        each = len(values) // len(rows)

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(batch_size * each)
            return values[np.searchsorted(rows, first // each) * each : np.searchsorted(rows, last // each) * each]

        return jax.make_array_from_callback((batch_size * each, *values.shape[1:]), split_rows(mesh), part)

    return {name: put(values) for name, values in batch.items()}


def mapped_axis(mesh: Mesh, mode: str) -> str | None:
    """The axis over which the body of a step has to add up by itself; None where XLA finds the sums.

    With copies of the parameters on every device, the body says when to add: once a step. XLA by itself would add after
    every microbatch, and a tied table's two gradients apart.
    """
    return "data" if mode == "pmap" or 1 < mesh.size == mesh.shape["data"] else None


def compile_update(update: Update, mesh: Mesh, mode: str, state: TrainState) -> Update:
    """The compiled step; it takes and returns global arrays laid out as `shardings` says, and donates the old state.

    Args:
        update: from `make_update`, for the axis that `mapped_axis` names.
        mode: `jit` or `pmap`.
        state: the shapes of the state.
    """
    if mode == "pmap":
        return _map_devices(update, mesh)
    layout, rows = shardings(state, mesh), split_rows(mesh)
    body: Callable[..., Any]
    if mapped_axis(mesh, mode) is None:

        def body(state: TrainState, batch: Batch, key: KeyData) -> tuple[TrainState, Means]:
            with _laid_out(mesh):
                return update(state._replace(params=_gather_tables(state.params, mesh)), batch, key)

    else:
        body = jax.shard_map(
            update,
            mesh=mesh,
            in_specs=(PartitionSpec(), rows.spec, PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    ins, outs = (layout, rows, replicated(mesh)), (layout, replicated(mesh))
    return jax.jit(body, in_shardings=ins, out_shardings=outs, donate_argnums=0, compiler_options=compiler_options())


@cache
def compiler_options() -> dict[str, Any]:
    """`OPTIONS` for the devices that are here, as far as they are `accepted`."""
    return accepted(OPTIONS.get(jax.default_backend(), {}))


def accepted(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of XLA without those that XLA_FLAGS names itself, and those that this XLA does not know."""

    def known(name: str, value: Any) -> bool:
        try:
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
        except Exception:
            log.debug("this XLA has no option %s", name)
            return False
        return True

    said = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in said and known(name, value)}


def compile_evaluate(evaluate: Evaluate, mesh: Mesh) -> Evaluate:
    """The compiled step of `make_evaluate`: parameters laid out as `shardings` says, copies of all that comes out."""

    def body(params: Params, batch: Batch, index: Array, key: KeyData) -> Evaluation:
        with _laid_out(mesh):
            return evaluate(_gather_tables(params, mesh), batch, index, key)

    return jax.jit(body, out_shardings=replicated(mesh), compiler_options=compiler_options())


def _map_devices(update: Update, mesh: Mesh) -> Update:
    """`pmap` with arrays of the whole mesh outside and those of this host inside."""
    devices = mesh.local_devices if jax.process_count() == 1 else None  # with several processes: all, in jax's order
    # Neither the state nor what comes out is mapped: each is one array with a copy on every device.
    mapped = jax.pmap(update, "data", in_axes=(None, 0, None), out_axes=None, donate_argnums=0, devices=devices)

    def step(state: TrainState, batch: Batch, key: KeyData) -> tuple[TrainState, Means]:
        local_state = multihost_utils.global_array_to_host_local_array(state, mesh, PartitionSpec())
        local_batch = multihost_utils.global_array_to_host_local_array(dict(batch), mesh, PartitionSpec(ROWS))
        by_device = {name: x.reshape(len(mesh.local_devices), -1, *x.shape[1:]) for name, x in local_batch.items()}
        return multihost_utils.host_local_array_to_global_array(
            mapped(local_state, by_device, key), mesh, PartitionSpec()
        )

    return step


def _laid_out(mesh: Mesh) -> Any:
    """A context in which whatever a module returns stays divided by rows, as the batch is.

    Left to itself, XLA takes the division of the parameters by `fsdp` over to the width of the activations, and gathers
    whole batches. So told, it gathers a product's parameters when it comes to it, inside the loop of scanned layers.
    """

    def keep_rows(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.ndim < 2 or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
            return x
        rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(ROWS, *rest)))

    def interceptor(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        out = call(*args, **kwargs)
        return jax.tree.map(keep_rows, out) if context.method_name == "__call__" else out

    return nn.intercept_methods(interceptor)


def _gather_tables(params: Params, mesh: Mesh) -> Params:
    """Embedding tables, made whole over `fsdp`: looking up in one of divided width would divide what is found."""

    def gather(path: tuple[Any, ...], leaf: Array) -> Array:
        names = _names(path)
        if names[-1] != "embedding":
            return leaf
        spec = [None if axis == "fsdp" else axis for axis in partition(names, leaf.shape, mesh.shape)]
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(gather, params)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey))


@cache
def matmul_ceiling(dtype: np.dtype) -> float:
    """Floating point operations a second of a large square matrix product on the first device: what utilisation is of.

    The best of a few, measured once a process; takes well under a second on an accelerator and on a laptop.
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192
    noise = jax.random.normal(jax.random.key(0), (size, size), dtype)  # GPUs are faster with equal numbers
    matrix = jax.device_put(noise, jax.local_devices()[0])
    multiply = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    jax.block_until_ready(multiply(matrix, matrix))
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(multiply(matrix, matrix))
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(seconds)

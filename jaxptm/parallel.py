"""One mesh of devices, and what lies where on it."""

from __future__ import annotations

import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxptm.config import LoopConfig, ParallelConfig
from jaxptm.types import Array, JaxptmError

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: ParallelConfig, train: LoopConfig) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over the devices that `config` asks for.

    Raises:
        JaxptmError: there are fewer devices, or the batch does not divide among them.
    """
    devices = jax.devices()
    count = config.data or len(devices)
    if count > len(devices):
        raise JaxptmError(f"parallel.data: {count} devices asked for, {len(devices)} here.")
    if (train.batch_size // train.accumulate) % count:
        raise JaxptmError(
            f"train.batch_size: {train.batch_size} rows in {train.accumulate} microbatch(es) do not divide among "
            f"{count} devices; change train.batch_size, train.accumulate or parallel.data."
        )
    return jax.make_mesh((count, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(mesh: Mesh) -> NamedSharding:
    """The first axis divided over the data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
    """This host's rows of a batch, as global arrays divided by rows."""
    return {name: jax.make_array_from_process_local_data(split_rows(mesh), rows) for name, rows in batch.items()}


def matmul_ceiling(dtype: np.dtype) -> float:
    """Floating point operations a second of a large square matrix product on the first device: what utilisation is of.

    The best of a few; takes well under a second on an accelerator and on a laptop.
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192
    matrix = jax.device_put(jnp.ones((size, size), dtype), jax.devices()[0])
    multiply = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    jax.block_until_ready(multiply(matrix, matrix))
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(multiply(matrix, matrix))
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(seconds)

"""Attention in tiles that never leave the core of a GPU that computes them: FlashAttention-2 (Dao 2023), with dropout.

XLA writes the weights, [H, Q, K] a row, to memory and reads them again, forwards and backwards; at 512 tokens that is
half of all that a BERT moves (docs/speed.md). Here each tile of scores is computed where it is needed, once forwards
and twice backwards, and so is its mask of dropout: that of `ops.dropout`, bit for bit, hence both ways train alike.

The kernels are written in Pallas, which Triton compiles for GPUs; elsewhere they are interpreted, which is for tests.
With S the scores in units of log2, P = 2**(S - top) / total the weights, and R dropout's mask over (1 - rate):

    O = (R * P) V    dV = (R * P)T dO    dS = P * (R * (dO VT) - delta)    dQ = dS K    dK = dST Q

where delta is the sum of O * dO over the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int8, Key, UInt32

from jaxptm.ops.dropout import words_of_rows
from jaxptm.ops.kernels import MULTIPLE, Static, forward_kernel, keys_kernel, queries_kernel
from jaxptm.types import Array


class Tiling(NamedTuple):
    """How a kernel divides its work.

    Attributes:
        own: queries (of the third kernel: keys) that an instance of it works for.
        inner: keys (queries) that it takes at a time.
        warps: of 32 threads, that share an instance.
        stages: of loads, ahead of what is computed.
    """

    own: int
    inner: int
    warps: int
    stages: int


FORWARD, OF_QUERIES, OF_KEYS = Tiling(64, 64, 4, 3), Tiling(64, 32, 4, 2), Tiling(64, 64, 4, 3)
"""The fastest of seven on an H100 at 64 x 512, 12 heads of 64 (docs/speed.md)."""


def attention_in_tiles(
    query: Float[Array, "B Q H W"],
    key: Float[Array, "B K H W"],
    value: Float[Array, "B K H W"],
    mask: Bool[Array, "#B 1 #Q K"] | None,
    rng: Key[Array, ""] | None,
    rate: float,
) -> Float[Array, "B Q H W"]:
    """`ops.attention.attention` for W = 16, 32, 64 or 128."""
    rows, queries, heads, width = query.shape
    keys = key.shape[1]
    seen = jnp.ones((1, 1, keys), jnp.int8) if mask is None else mask[:, 0].astype(jnp.int8)
    words = jnp.zeros((2, rows), jnp.uint32) if rng is None else words_of_rows(rng, rows)
    static = Static(queries, keys, width**-0.5, 0.0 if rng is None else rate)
    return _attention(
        _filled(query, 1),
        _filled(key, 1),
        _filled(value, 1),
        _filled(seen, 2) if seen.shape[1] == 1 else _filled(_filled(seen, 1), 2),
        words,
        jnp.arange(heads, dtype=jnp.uint32),
        static,
    )[:, :queries]


def _filled(x: Array, axis: int) -> Array:
    """x with zeros up to a multiple of `MULTIPLE`."""
    lacks = -x.shape[axis] % MULTIPLE
    return jnp.pad(x, [(0, lacks if i == axis else 0) for i in range(x.ndim)]) if lacks else x


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(
    query: Float[Array, "B Q H W"],
    key: Float[Array, "B K H W"],
    value: Float[Array, "B K H W"],
    seen: Int8[Array, "#B #Q K"],
    words: UInt32[Array, "2 B"],
    heads: UInt32[Array, " H"],
    static: Static,
) -> Float[Array, "B Q H W"]:
    """Attention over lengths that are multiples of `MULTIPLE`.

    Args:
        words: two random ones a row, which dropout's mask is made of.
        heads: their numbers, in the whole model where several devices divide them.
    """
    return _forward(query, key, value, seen, words, heads, static)[0]


def _attention_forward(*arguments: Any) -> tuple[Array, tuple[Array, ...]]:
    *operands, static = arguments
    out, top, total = _forward(*operands, static)
    return out, (*operands, out, top, total)


def _attention_backward(static: Static, kept: tuple[Array, ...], slope: Array) -> tuple[Array | None, ...]:
    *operands, out, top, total = kept
    delta = jnp.einsum("bqhw,bqhw->bhq", out, slope, preferred_element_type=jnp.float32)
    return *_backward(*operands, slope, top, total, delta, static), None, None, None


_attention.defvjp(_attention_forward, _attention_backward)


@partial(jax.jit, static_argnums=6)
def _forward(
    query: Array, key: Array, value: Array, seen: Array, words: Array, heads: Array, static: Static
) -> tuple[Float[Array, "B Q H W"], Float[Array, "B H Q"], Float[Array, "B H Q"]]:
    """What is delta; of each query the highest score and `total`."""

    def forward(query: Array, key: Array, value: Array, *mask: Array) -> tuple[Array, ...]:
        return _run(forward_kernel, FORWARD, static, [query], [key, value], mask, outs=[query, *2 * [_a_query(query)]])

    run: Any = _divided(forward, ["b q h w", "b k h w", "b k h w", *_axes_of_mask(seen)], ["b q h w", "b h q", "b h q"])
    return run(query, key, value, seen, words, heads)


@partial(jax.jit, static_argnums=10)
def _backward(
    query: Array,
    key: Array,
    value: Array,
    seen: Array,
    words: Array,
    heads: Array,
    slope: Float[Array, "B Q H W"],
    top: Float[Array, "B H Q"],
    total: Float[Array, "B H Q"],
    delta: Float[Array, "B H Q"],
    static: Static,
) -> tuple[Float[Array, "B Q H W"], Float[Array, "B K H W"], Float[Array, "B K H W"]]:
    """The gradients of queries, keys and values, where `slope` is that of what was mixed."""

    def backward(query: Array, key: Array, value: Array, *rest: Array) -> tuple[Array, ...]:
        mask, of_queries = rest[:3], [query, *rest[3:]]
        (to_query,) = _run(queries_kernel, OF_QUERIES, static, of_queries, [key, value], mask, outs=[query])
        to_key, to_value = _run(keys_kernel, OF_KEYS, static, [key, value], of_queries, mask, outs=[key, value])
        return to_query, to_key, to_value

    of_queries, of_keys, statistic = "b q h w", "b k h w", "b h q"
    run: Any = _divided(
        backward,
        [of_queries, of_keys, of_keys, *_axes_of_mask(seen), of_queries, statistic, statistic, statistic],
        [of_queries, of_keys, of_keys],
    )
    return run(query, key, value, seen, words, heads, slope, top, total, delta)


def _a_query(query: Array) -> jax.ShapeDtypeStruct:
    rows, queries, heads, _ = query.shape
    return jax.ShapeDtypeStruct((rows, heads, queries), jnp.float32)


def _run(
    kernel: Callable[..., None],
    tiling: Tiling,
    static: Static,
    own: Sequence[Array],
    others: Sequence[Array],
    mask: Sequence[Array],
    outs: Sequence[Array | jax.ShapeDtypeStruct],
) -> tuple[Array, ...]:
    """One instance of a kernel for each tile of `own`, head and row; it writes the same tile of each of `outs`.

    It reads a tile of `own` and all of `others` of its row and head. Both are [B, L, H, W] or [B, H, L].
    """

    def tile(x: Array | jax.ShapeDtypeStruct, size: int | None) -> pallas.BlockSpec:
        if x.ndim == 4:
            block = (None, size or x.shape[1], None, x.shape[3])
            return pallas.BlockSpec(block, lambda i, h, b: (b, i if size else 0, h, 0))
        return pallas.BlockSpec((None, None, size or x.shape[2]), lambda i, h, b: (b, h, i if size else 0))

    seen = mask[0]
    length, heads, rows = own[0].shape[1], own[0].shape[2], own[0].shape[0]
    size = math.gcd(tiling.own, length)
    shapes = [jax.ShapeDtypeStruct(out.shape, out.dtype) for out in outs]
    return pallas.pallas_call(
        partial(kernel, static, math.gcd(tiling.inner, others[0].shape[1])),
        grid=(length // size, heads, rows),
        in_specs=[
            *(tile(x, size) for x in own),
            *(tile(x, None) for x in others),
            pallas.BlockSpec((None, *seen.shape[1:]), lambda i, h, b: (b if seen.shape[0] > 1 else 0, 0, 0)),
            pallas.BlockSpec((2, None), lambda i, h, b: (0, b)),
            pallas.BlockSpec((1,), lambda i, h, b: (h,)),
        ],
        out_specs=[tile(x, size) for x in shapes],
        out_shape=shapes,
        interpret=jax.default_backend() != "gpu",
        compiler_params=triton.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        name=kernel.__name__,
    )(*own, *others, *mask)


def _axes_of_mask(seen: Array) -> list[str]:
    """The axes of `seen`, `words` and `heads`; those of length 1 are nobody's."""
    rows = "b" if seen.shape[0] > 1 else "one_row"
    queries = "q" if seen.shape[1] > 1 else "one_query"
    return [f"{rows} {queries} k", "two b", "h"]


def _divided(
    function: Callable[..., tuple[Array, ...]], operands: Sequence[str], results: Sequence[str]
) -> Callable[..., tuple[Array, ...]]:
    """`function` that devices run on their own rows and heads, where XLA lays out the program that it is part of.

    XLA knows nothing of what a kernel computes, and would gather all operands on every device.

    Args:
        operands: names of their axes, `b` for rows and `h` for heads; the first one has axes b, q, h, w.
        results: likewise.
    """
    divided = custom_partitioning(function)

    def layouts(mesh: Mesh, shapes: Sequence[Any]) -> dict[str, NamedSharding]:
        spec = (*shapes[0].sharding.spec, *4 * [None])
        over = {"b": spec[0], "h": spec[2]}
        return {
            axes: NamedSharding(mesh, PartitionSpec(*(over.get(axis) for axis in axes.split())))
            for axes in (*operands, *results)
        }

    def partition(mesh: Mesh, arguments: Any, outs: Any) -> tuple[Any, ...]:
        found = layouts(mesh, arguments)
        return mesh, function, tuple(found[axes] for axes in results), tuple(found[axes] for axes in operands)

    def infer(mesh: Mesh, arguments: Any, outs: Any) -> tuple[NamedSharding, ...]:
        found = layouts(mesh, arguments)
        return tuple(found[axes] for axes in results)

    rule = f"{', '.join(operands)} -> {', '.join(results)}"
    whole = [axis for axis in dict.fromkeys(" ".join(operands).split()) if axis not in ("b", "h")]
    divided.def_partition(partition, infer, sharding_rule=rule, need_replication_factors=tuple(whole))
    return divided

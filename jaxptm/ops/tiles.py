"""Attention in tiles that never leave the core of a GPU that computes them: FlashAttention-2 (Dao 2023), with dropout.

XLA writes the weights, [H, Q, K] a row, to memory and reads them again, forwards and backwards; at 512 tokens that is
two thirds of all that a BERT moves (docs/speed.md). Here each tile of scores is computed where it is needed, once
forwards and twice backwards, and so is its mask of dropout: that of `ops.dropout`, bit for bit, hence both ways train
alike.

The kernels are written in Pallas, which Triton compiles for GPUs; elsewhere they are interpreted, which is for tests.
With S the scores in units of log2, P = share * 2**(S - top) the weights, and R dropout's mask over (1 - rate):

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

from jaxptm.ops.attention import UNSEEN
from jaxptm.ops.dropout import words_of_places, words_of_rows
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


FORWARD, OF_QUERIES, OF_KEYS = Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 3), Tiling(64, 64, 4, 3)
"""The fastest of six or seven on an H100 at 64 x 512, 12 heads of 64 (docs/speed.md)."""
QUERY, KEY, STATISTIC = "b q h w", "b k h w", "b h q"
"""Names of the axes of operands."""


def attention_in_tiles(
    query: Float[Array, "B Q H W"],
    key: Float[Array, "B K H W"],
    value: Float[Array, "B K H W"],
    mask: Bool[Array, "#B 1 #Q K"] | None,
    rng: Key[Array, ""] | None,
    rate: float,
    causal: bool,
) -> Float[Array, "B Q H W"]:
    """`ops.attention.attention` for W = 16, 32, 64 or 128."""
    rows, queries, heads, width = query.shape
    keys = key.shape[1]
    static = Static(width**-0.5, 0.0 if rng is None else rate, causal, jax.default_backend() != "gpu")
    words = jnp.zeros((2, rows), jnp.uint32) if rng is None else words_of_rows(rng, rows)
    of_queries, of_keys = words_of_places(words, (heads, queries, keys))
    return _attention(
        _filled(query, 1),
        _filled(key, 1),
        _filled(value, 1),
        _filled(of_queries[..., 0], 2),
        _filled(of_keys[:, 0, 0], 1),
        _mask(mask, keys),
        static,
    )[:, :queries]


def _mask(mask: Bool[Array, "#B 1 #Q K"] | None, keys: int) -> Float[Array, "#B 1 L"] | Int8[Array, "#B P L"]:
    """What is added to the scores: 0, `UNSEEN`, which takes in any score, or -inf for what keys are filled up with.

    A mask that every query has its own of is four times smaller as 1, 0, and -1.
    """
    seen = jnp.ones((1, 1, keys), bool) if mask is None else mask[:, 0]
    if seen.shape[1] == 1:
        return _filled(jnp.where(seen, 0, jnp.float32(UNSEEN)), 2, -jnp.inf)
    return _filled(_filled(seen.astype(jnp.int8), 1), 2, -1)


def _filled(x: Array, axis: int, value: float = 0) -> Array:
    """x with more of the value, up to a multiple of `MULTIPLE`."""
    lacks = -x.shape[axis] % MULTIPLE
    widths = [(0, lacks if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if lacks else x


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(
    query: Float[Array, "B Q H W"],
    key: Float[Array, "B K H W"],
    value: Float[Array, "B K H W"],
    words: UInt32[Array, "B H Q"],
    key_words: UInt32[Array, "B K"],
    mask: Float[Array, "#B 1 K"] | Int8[Array, "#B Q K"],
    static: Static,
) -> Float[Array, "B Q H W"]:
    """Attention over lengths that are multiples of `MULTIPLE`.

    Args:
        words: that dropout's mask is made of, with `key_words`.
    """
    return _forward(query, key, value, words, key_words, mask, static)[0]


def _attention_forward(*arguments: Any) -> tuple[Array, tuple[Array, ...]]:
    *operands, static = arguments
    out, top, share = _forward(*operands, static)
    return out, (*operands, out, top, share)


def _attention_backward(static: Static, kept: tuple[Array, ...], slope: Array) -> tuple[Array | None, ...]:
    *operands, out, top, share = kept
    # A query that sees no key weighs all alike, whatever its scores are.
    sees = top > UNSEEN
    gain = jnp.where(sees, static.gain, 0)
    delta = jnp.where(sees, jnp.einsum("bqhw,bqhw->bhq", out, slope, preferred_element_type=jnp.float32), 0)
    return *_backward(*operands, slope, top, share, gain, delta, static), None, None, None


_attention.defvjp(_attention_forward, _attention_backward)


@partial(jax.jit, static_argnums=6)
def _forward(
    query: Array, key: Array, value: Array, words: Array, key_words: Array, mask: Array, static: Static
) -> tuple[Float[Array, "B Q H W"], Float[Array, "B H Q"], Float[Array, "B H Q"]]:
    """The mixed values; of each query the highest score, and the share of a key that has it."""

    def forward(*operands: Array) -> tuple[Array, ...]:
        query, key, value, words, key_words, mask = operands
        statistic = jax.ShapeDtypeStruct(words.shape, jnp.float32)
        of_keys = [key, value, key_words]
        return _run(forward_kernel, FORWARD, static, [query, words], of_keys, mask, [query, statistic, statistic])

    run: Any = _divided(forward, [QUERY, KEY, KEY, STATISTIC, "b k", _axes(mask)], [QUERY, STATISTIC, STATISTIC])
    return run(query, key, value, words, key_words, mask)


@partial(jax.jit, static_argnums=11)
def _backward(
    query: Array,
    key: Array,
    value: Array,
    words: Array,
    key_words: Array,
    mask: Array,
    slope: Float[Array, "B Q H W"],
    top: Float[Array, "B H Q"],
    share: Float[Array, "B H Q"],
    gain: Float[Array, "B H Q"],
    delta: Float[Array, "B H Q"],
    static: Static,
) -> tuple[Float[Array, "B Q H W"], Float[Array, "B K H W"], Float[Array, "B K H W"]]:
    """The gradients of queries, keys and values, where `slope` is that of what was mixed."""

    def backward(*operands: Array) -> tuple[Array, ...]:
        query, key, value, words, key_words, mask, slope, *statistics = operands
        of_queries, of_keys = [query, slope, words, *statistics], [key, value, key_words]
        (to_query,) = _run(queries_kernel, OF_QUERIES, static, of_queries, of_keys, mask, [query])
        to_key, to_value = _run(keys_kernel, OF_KEYS, static, of_keys, of_queries, mask, [key, value])
        return to_query, to_key, to_value

    run: Any = _divided(
        backward, [QUERY, KEY, KEY, STATISTIC, "b k", _axes(mask), QUERY, *4 * [STATISTIC]], [QUERY, KEY, KEY]
    )
    return run(query, key, value, words, key_words, mask, slope, top, share, gain, delta)


def _run(
    kernel: Callable[..., None],
    tiling: Tiling,
    static: Static,
    own: Sequence[Array],
    others: Sequence[Array],
    mask: Array,
    outs: Sequence[Array | jax.ShapeDtypeStruct],
) -> tuple[Array, ...]:
    """One instance of a kernel for each tile of `own`, head and row; it writes the same tile of each of `outs`.

    It reads a tile of `own` and all of `others` of its row and head: [B, L, H, W], [B, H, L] or [B, L].
    """

    def tile(x: Array | jax.ShapeDtypeStruct, size: int | None) -> pallas.BlockSpec:
        match x.ndim:
            case 4:
                block = (None, size or x.shape[1], None, x.shape[3])
                return pallas.BlockSpec(block, lambda i, h, b: (b, i if size else 0, h, 0))
            case 3:
                return pallas.BlockSpec((None, None, size or x.shape[2]), lambda i, h, b: (b, h, i if size else 0))
            case _:
                return pallas.BlockSpec((None, size or x.shape[1]), lambda i, h, b: (b, i if size else 0))

    rows, length, heads, _ = own[0].shape
    size = math.gcd(tiling.own, length)
    shapes = [jax.ShapeDtypeStruct(out.shape, out.dtype) for out in outs]
    return pallas.pallas_call(
        partial(kernel, static, math.gcd(tiling.inner, others[0].shape[1])),
        grid=(length // size, heads, rows),
        in_specs=[
            *(tile(x, size) for x in own),
            *(tile(x, None) for x in others),
            pallas.BlockSpec((None, *mask.shape[1:]), lambda i, h, b: (b if mask.shape[0] > 1 else 0, 0, 0)),
        ],
        out_specs=[tile(x, size) for x in shapes],
        out_shape=shapes,
        interpret=static.interpret,
        compiler_params=triton.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        name=kernel.__name__,
    )(*own, *others, mask)


def _axes(mask: Array) -> str:
    """Those of the mask; one of length 1 is nobody's."""
    return f"{'b' if mask.shape[0] > 1 else 'one_row'} {'q' if mask.shape[1] > 1 else 'one_query'} k"


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

    def called(*given: Array) -> tuple[Array, ...]:  # on one device there is nothing to divide, and `jax.vmap` works
        return (function if jax.device_count() == 1 else divided)(*given)

    return called

"""Attention in tiles that never leave the core of a GPU that computes them: FlashAttention-2 (Dao 2023), with dropout.

XLA writes the weights, [H, Q, K] a row, to memory and reads them again, forwards and backwards; at 512 tokens that is
half of all that a BERT moves (docs/speed.md). Here each tile of scores is computed where it is needed, once forwards
and twice backwards, and so is its mask of dropout: that of `ops.dropout`, bit for bit, hence both ways train alike.

The kernels are written in Pallas, which Triton compiles for GPUs; elsewhere they are interpreted, which is for tests.
With S the scores in units of log2, P = 2**(S - top) / total the weights, and R dropout's mask over (1 - rate):

    O = (R * P) V    dV = (R * P)T dO    dS = P * (R * (dO VT) - rowsum(O * dO))    dQ = dS K    dK = dST Q
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
from jaxptm.ops.dropout import kept_at, words_of_rows
from jaxptm.types import Array


class Static(NamedTuple):
    """What kernels are compiled for, besides the shapes.

    Attributes:
        queries: of a row, without what they are filled up with.
        keys: likewise.
        scale: of the products of queries and keys.
        rate: of dropout.
    """

    queries: int
    keys: int
    scale: float
    rate: float


class Span(NamedTuple):
    """Queries or keys of a tile, of their row."""

    start: Any
    size: int

    @property
    def of(self) -> Any:
        """As an index of a reference."""
        return pallas.ds(self.start, self.size)


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


MULTIPLE = 64
"""Queries and keys are filled up to a multiple of it."""
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
    mixed = jnp.einsum("bqhw,bqhw->bhq", out, slope, preferred_element_type=jnp.float32)
    return *_backward(*operands, slope, top, total, mixed, static), None, None, None


_attention.defvjp(_attention_forward, _attention_backward)


@partial(jax.jit, static_argnums=6)
def _forward(
    query: Array, key: Array, value: Array, seen: Array, words: Array, heads: Array, static: Static
) -> tuple[Float[Array, "B Q H W"], Float[Array, "B H Q"], Float[Array, "B H Q"]]:
    """What is mixed; of each query the highest score and `total`."""

    def forward(query: Array, key: Array, value: Array, *mask: Array) -> tuple[Array, ...]:
        return _run(_forward_kernel, FORWARD, static, [query], [key, value], mask, outs=[query, *2 * [_a_query(query)]])

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
    mixed: Float[Array, "B H Q"],
    static: Static,
) -> tuple[Float[Array, "B Q H W"], Float[Array, "B K H W"], Float[Array, "B K H W"]]:
    """The gradients of queries, keys and values, where `slope` is that of what was mixed."""

    def backward(query: Array, key: Array, value: Array, *rest: Array) -> tuple[Array, ...]:
        mask, of_queries = rest[:3], [query, *rest[3:]]
        (to_query,) = _run(_queries_kernel, OF_QUERIES, static, of_queries, [key, value], mask, outs=[query])
        to_key, to_value = _run(_keys_kernel, OF_KEYS, static, [key, value], of_queries, mask, outs=[key, value])
        return to_query, to_key, to_value

    of_queries, of_keys, statistic = "b q h w", "b k h w", "b h q"
    run: Any = _divided(
        backward,
        [of_queries, of_keys, of_keys, *_axes_of_mask(seen), of_queries, statistic, statistic, statistic],
        [of_queries, of_keys, of_keys],
    )
    return run(query, key, value, seen, words, heads, slope, top, total, mixed)


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
        name=kernel.__name__.strip("_"),
    )(*own, *others, *mask)


class _Mask:
    """Which weights of a row and head count, for any of its tiles: what attention masks, and what dropout drops."""

    def __init__(self, static: Static, seen: Any, words: Any, head: Any, *, keys_first: bool = False) -> None:
        """Tiles are [queries, keys], or the other way around."""
        self._static, self._seen, self._keys_first = static, seen, keys_first
        self._words, self._head = (words[0], words[1]), head[0]

    def scores(self, products: Array, queries: Span, keys: Span) -> tuple[Array, Array]:
        """Scores in units of log2, and which keys are seen."""
        rows = queries if self._seen.shape[0] > 1 else Span(0, 1)
        seen = self._seen[rows.of, keys.of] != 0
        if self._keys_first:
            seen = seen.T
        scores = jnp.where(seen, products * (self._static.scale * math.log2(math.e)), UNSEEN)
        if self._static.keys % MULTIPLE:
            scores = jnp.where(self._positions(keys, is_key=True) < self._static.keys, scores, -jnp.inf)
        return scores, seen

    def dropped(self, x: Array, queries: Span, keys: Span) -> Array:
        """x, with dropout's mask over (1 - rate)."""
        if not self._static.rate:
            return x
        query = self._positions(queries, is_key=False).astype(jnp.uint32)
        key = self._positions(keys, is_key=True).astype(jnp.uint32)
        above = self._head * jnp.uint32(self._static.queries)
        position = (above + query) * jnp.uint32(self._static.keys) + key
        return jnp.where(kept_at(position, *self._words, self._static.rate), x * (1 / (1 - self._static.rate)), 0)

    def _positions(self, span: Span, *, is_key: bool) -> Array:
        return jnp.expand_dims(span.start + jnp.arange(span.size), 1 if is_key == self._keys_first else 0)


def _forward_kernel(
    static: Static,
    inner: int,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    seen_ref: Any,
    words_ref: Any,
    head_ref: Any,
    out_ref: Any,
    top_ref: Any,
    total_ref: Any,
) -> None:
    mask = _Mask(static, seen_ref, words_ref, head_ref)
    query = query_ref[...]
    size = len(query)
    queries = Span(pallas.program_id(0) * size, size)

    def step(at: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, top, total = carry
        keys = Span(at * inner, inner)
        scores, _ = mask.scores(_product(query, key_ref[keys.of, :], (1, 1)), queries, keys)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - higher[:, None])
        fade = jnp.exp2(top - higher)
        mixed = _product(mask.dropped(weights, queries, keys).astype(query.dtype), value_ref[keys.of, :], (1, 0))
        return out * fade[:, None] + mixed, higher, total * fade + jnp.sum(weights, axis=1)

    begin = jnp.zeros(query.shape, jnp.float32), jnp.full(size, UNSEEN, jnp.float32), jnp.zeros(size, jnp.float32)
    out, top, total = jax.lax.fori_loop(0, key_ref.shape[0] // inner, step, begin)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    top_ref[...], total_ref[...] = top, total


def _queries_kernel(
    static: Static,
    inner: int,
    query_ref: Any,
    slope_ref: Any,
    top_ref: Any,
    total_ref: Any,
    mixed_ref: Any,
    key_ref: Any,
    value_ref: Any,
    seen_ref: Any,
    words_ref: Any,
    head_ref: Any,
    to_query_ref: Any,
) -> None:
    mask = _Mask(static, seen_ref, words_ref, head_ref)
    query, slope = query_ref[...], slope_ref[...]
    top, share, mixed = top_ref[...][:, None], 1 / total_ref[...][:, None], mixed_ref[...][:, None]
    queries = Span(pallas.program_id(0) * len(query), len(query))

    def step(at: Array, to_query: Array) -> Array:
        keys = Span(at * inner, inner)
        key = key_ref[keys.of, :]
        scores, seen = mask.scores(_product(query, key, (1, 1)), queries, keys)
        to_weights = mask.dropped(_product(slope, value_ref[keys.of, :], (1, 1)), queries, keys)
        to_scores = jnp.where(seen, jnp.exp2(scores - top) * share * (to_weights - mixed), 0)
        return to_query + _product(to_scores.astype(key.dtype), key, (1, 0))

    begin = jnp.zeros(query.shape, jnp.float32)
    to_query = jax.lax.fori_loop(0, key_ref.shape[0] // inner, step, begin)
    to_query_ref[...] = (to_query * static.scale).astype(to_query_ref.dtype)


def _keys_kernel(
    static: Static,
    inner: int,
    key_ref: Any,
    value_ref: Any,
    query_ref: Any,
    slope_ref: Any,
    top_ref: Any,
    total_ref: Any,
    mixed_ref: Any,
    seen_ref: Any,
    words_ref: Any,
    head_ref: Any,
    to_key_ref: Any,
    to_value_ref: Any,
) -> None:
    mask = _Mask(static, seen_ref, words_ref, head_ref, keys_first=True)
    key, value = key_ref[...], value_ref[...]
    keys = Span(pallas.program_id(0) * len(key), len(key))

    def step(at: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        to_key, to_value = carry
        queries = Span(at * inner, inner)
        query, slope = query_ref[queries.of, :], slope_ref[queries.of, :]
        top, share, mixed = top_ref[queries.of][None], 1 / total_ref[queries.of][None], mixed_ref[queries.of][None]
        scores, seen = mask.scores(_product(key, query, (1, 1)), queries, keys)
        weights = jnp.exp2(scores - top) * share
        to_weights = mask.dropped(_product(value, slope, (1, 1)), queries, keys)
        to_scores = jnp.where(seen, weights * (to_weights - mixed), 0)
        to_value += _product(mask.dropped(weights, queries, keys).astype(slope.dtype), slope, (1, 0))
        return to_key + _product(to_scores.astype(query.dtype), query, (1, 0)), to_value

    begin = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    to_key, to_value = jax.lax.fori_loop(0, query_ref.shape[0] // inner, step, begin)
    to_key_ref[...] = (to_key * static.scale).astype(to_key_ref.dtype)
    to_value_ref[...] = to_value.astype(to_value_ref.dtype)


def _product(left: Array, right: Array, over: tuple[int, int]) -> Array:
    """Of two matrices, summed over these axes of theirs, in float32."""
    contracted = ((over[:1], over[1:]), ((), ()))
    return jax.lax.dot_general(left, right, contracted, preferred_element_type=jnp.float32)


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

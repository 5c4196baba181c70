"""The kernels of attention in tiles, in Pallas: forwards, and the gradients of queries and of keys and values.

An instance of a kernel works for one tile of a row and head, and goes over the tiles of the other side; `ops.tiles` has
the equations and calls them. The last axis of queries, keys and values is the width; statistics have one value a query.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas

from jaxptm.ops.attention import UNSEEN
from jaxptm.ops.dropout import kept_at
from jaxptm.types import Array

MULTIPLE = 64
"""Queries and keys are filled up to a multiple of it."""


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


def forward_kernel(
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


def queries_kernel(
    static: Static,
    inner: int,
    query_ref: Any,
    slope_ref: Any,
    top_ref: Any,
    total_ref: Any,
    delta_ref: Any,
    key_ref: Any,
    value_ref: Any,
    seen_ref: Any,
    words_ref: Any,
    head_ref: Any,
    to_query_ref: Any,
) -> None:
    mask = _Mask(static, seen_ref, words_ref, head_ref)
    query, slope = query_ref[...], slope_ref[...]
    top, share, delta = top_ref[...][:, None], 1 / total_ref[...][:, None], delta_ref[...][:, None]
    queries = Span(pallas.program_id(0) * len(query), len(query))

    def step(at: Array, to_query: Array) -> Array:
        keys = Span(at * inner, inner)
        key = key_ref[keys.of, :]
        scores, seen = mask.scores(_product(query, key, (1, 1)), queries, keys)
        to_weights = mask.dropped(_product(slope, value_ref[keys.of, :], (1, 1)), queries, keys)
        to_scores = jnp.where(seen, jnp.exp2(scores - top) * share * (to_weights - delta), 0)
        return to_query + _product(to_scores.astype(key.dtype), key, (1, 0))

    begin = jnp.zeros(query.shape, jnp.float32)
    to_query = jax.lax.fori_loop(0, key_ref.shape[0] // inner, step, begin)
    to_query_ref[...] = (to_query * static.scale).astype(to_query_ref.dtype)


def keys_kernel(
    static: Static,
    inner: int,
    key_ref: Any,
    value_ref: Any,
    query_ref: Any,
    slope_ref: Any,
    top_ref: Any,
    total_ref: Any,
    delta_ref: Any,
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
        top, share, delta = top_ref[queries.of][None], 1 / total_ref[queries.of][None], delta_ref[queries.of][None]
        scores, seen = mask.scores(_product(key, query, (1, 1)), queries, keys)
        weights = jnp.exp2(scores - top) * share
        to_weights = mask.dropped(_product(value, slope, (1, 1)), queries, keys)
        to_scores = jnp.where(seen, weights * (to_weights - delta), 0)
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

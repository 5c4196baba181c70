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
from jax.experimental.pallas import triton

from jaxptm.ops.attention import UNSEEN
from jaxptm.ops.dropout import kept_at
from jaxptm.types import Array

MULTIPLE = 64
"""Queries and keys are filled up to a multiple of it."""


class Static(NamedTuple):
    """What kernels are compiled for, besides the shapes.

    Attributes:
        scale: of the products of queries and keys.
        rate: of dropout.
        causal: no query sees a key after it.
        interpret: rather than compile for a GPU.
    """

    scale: float
    rate: float
    causal: bool
    interpret: bool

    @property
    def gain(self) -> float:
        """Of what dropout keeps."""
        return 1 / (1 - self.rate)

    def tiles_of_keys(self, size: int, key_ref: Any, inner: int) -> Any:
        """How many an instance's queries go over."""
        tiles = key_ref.shape[0] // inner
        return jnp.minimum(pallas.cdiv((pallas.program_id(0) + 1) * size, inner), tiles) if self.causal else tiles

    def scores(self, products: Array, mask: Array) -> Array:
        """In units of log2; `mask` has what is added, or where it is of every query (int8) which keys are seen."""
        scale = self.scale * math.log2(math.e)
        if mask.dtype != jnp.int8:
            return self.multiply_add(products, scale, mask)
        return jnp.where(mask > 0, products * scale, jnp.where(mask < 0, -jnp.inf, UNSEEN))

    def multiply_add(self, x: Array, factor: Array | float, addend: Array) -> Array:
        """x * factor + addend, rounded once. Triton would take two instructions."""
        if self.interpret:
            return x * factor + addend
        return _instruction("fma.rn.f32 $0, $1, $2, $3;", x, factor, addend)

    def power(self, x: Array) -> Array:
        """2**x, with 0 for what is no normal number. Triton's own takes three instructions more for those."""
        return jnp.exp2(x) if self.interpret else _instruction("ex2.approx.ftz.f32 $0, $1;", x)

    def dropped(self, x: Array, words: Array, words_along: Array) -> Array:
        """x times dropout's mask of ones and zeros."""
        return jnp.where(kept_at(words, words_along, self.rate), x, 0) if self.rate else x


def forward_kernel(
    static: Static,
    inner: int,
    query_ref: Any,
    words_ref: Any,
    key_ref: Any,
    value_ref: Any,
    key_words_ref: Any,
    mask_ref: Any,
    out_ref: Any,
    top_ref: Any,
    share_ref: Any,
) -> None:
    query, words = query_ref[...], words_ref[...][:, None]
    queries = _of_mask(mask_ref, _span(len(query)))

    def step(at: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, top, total = carry
        keys = pallas.ds(at * inner, inner)
        scores = static.scores(_product(query, key_ref[keys, :], (1, 1)), mask_ref[queries, keys])
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = static.power(scores - higher[:, None])
        fade = static.power(top - higher)
        stay = static.dropped(weights, words, key_words_ref[keys][None])
        mixed = _product(stay.astype(query.dtype), value_ref[keys, :], (1, 0))
        return out * fade[:, None] + mixed, higher, total * fade + jnp.sum(weights, axis=1)

    begin = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.full(len(query), UNSEEN, jnp.float32),
        jnp.zeros(len(query), jnp.float32),
    )
    out, top, total = jax.lax.fori_loop(0, static.tiles_of_keys(len(query), key_ref, inner), step, begin)
    share = 1 / total
    out_ref[...] = (out * (share * static.gain)[:, None]).astype(out_ref.dtype)
    top_ref[...], share_ref[...] = top, share


def queries_kernel(
    static: Static,
    inner: int,
    query_ref: Any,
    slope_ref: Any,
    words_ref: Any,
    top_ref: Any,
    share_ref: Any,
    gain_ref: Any,
    delta_ref: Any,
    key_ref: Any,
    value_ref: Any,
    key_words_ref: Any,
    mask_ref: Any,
    to_query_ref: Any,
) -> None:
    query, slope = query_ref[...], slope_ref[...]
    words, top, share, gain, delta = (ref[...][:, None] for ref in (words_ref, top_ref, share_ref, gain_ref, delta_ref))
    queries = _of_mask(mask_ref, _span(len(query)))

    def step(at: Array, to_query: Array) -> Array:
        keys = pallas.ds(at * inner, inner)
        key = key_ref[keys, :]
        scores = static.scores(_product(query, key, (1, 1)), mask_ref[queries, keys])
        to_weights = static.dropped(_product(slope, value_ref[keys, :], (1, 1)), words, key_words_ref[keys][None])
        to_scores = static.power(scores - top) * static.multiply_add(to_weights, gain, -delta)
        return to_query + _product(to_scores.astype(key.dtype), key, (1, 0))

    tiles = static.tiles_of_keys(len(query), key_ref, inner)
    to_query = jax.lax.fori_loop(0, tiles, step, jnp.zeros(query.shape, jnp.float32))
    to_query_ref[...] = (to_query * (share * static.scale)).astype(to_query_ref.dtype)


def keys_kernel(
    static: Static,
    inner: int,
    key_ref: Any,
    value_ref: Any,
    key_words_ref: Any,
    query_ref: Any,
    slope_ref: Any,
    words_ref: Any,
    top_ref: Any,
    share_ref: Any,
    gain_ref: Any,
    delta_ref: Any,
    mask_ref: Any,
    to_key_ref: Any,
    to_value_ref: Any,
) -> None:
    key, value, key_words = key_ref[...], value_ref[...], key_words_ref[...][:, None]
    keys = _span(len(key))

    def step(at: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        to_key, to_value = carry
        queries = pallas.ds(at * inner, inner)
        query, slope = query_ref[queries, :], slope_ref[queries, :]
        words, top, share, gain, delta = (
            ref[queries][None] for ref in (words_ref, top_ref, share_ref, gain_ref, delta_ref)
        )
        mask = mask_ref[_of_mask(mask_ref, queries), keys].T
        scores = static.scores(_product(key, query, (1, 1)), mask)
        weights = static.power(scores - top) * share
        to_weights = static.dropped(_product(value, slope, (1, 1)), words, key_words)
        to_scores = weights * static.multiply_add(to_weights, gain, -delta)
        stay = static.dropped(weights, words, key_words)
        to_value += _product(stay.astype(slope.dtype), slope, (1, 0))
        return to_key + _product(to_scores.astype(query.dtype), query, (1, 0)), to_value

    begin = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    first = pallas.program_id(0) * len(key) // inner if static.causal else 0
    to_key, to_value = jax.lax.fori_loop(first, query_ref.shape[0] // inner, step, begin)
    to_key_ref[...] = (to_key * static.scale).astype(to_key_ref.dtype)
    to_value_ref[...] = (to_value * static.gain).astype(to_value_ref.dtype)


def _span(size: int) -> Any:
    """What an instance works for, as an index."""
    return pallas.ds(pallas.program_id(0) * size, size)


def _of_mask(mask_ref: Any, queries: Any) -> Any:
    """The rows of the mask that are for these queries; it may have one for all."""
    return queries if mask_ref.shape[0] > 1 else pallas.ds(0, 1)


def _product(left: Array, right: Array, over: tuple[int, int]) -> Array:
    """Of two matrices, summed over these axes of theirs, in float32."""
    contracted = ((over[:1], over[1:]), ((), ()))
    return jax.lax.dot_general(left, right, contracted, preferred_element_type=jnp.float32)


def _instruction(code: str, *operands: Any) -> Array:
    """One of PTX for each element, in float32; operands are broadcast to the first."""
    shape = operands[0].shape
    same = [jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape) for x in operands]
    constraints = ",".join(["=f", *len(same) * ["f"]])
    out = [jax.ShapeDtypeStruct(shape, jnp.float32)]
    return triton.elementwise_inline_asm(code, args=same, constraints=constraints, pack=1, result_shape_dtypes=out)[0]

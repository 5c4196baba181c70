"""Text generation with a key-value cache, inside one compiled loop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key

from jaxptm.nn.text import TextModel, empty_caches
from jaxptm.types import Array, JaxptmError, Params

PROMPT_STEP = 32
"""Prompts and the room behind them are padded to a multiple of this, so that few shapes are compiled."""


class Sampling(NamedTuple):
    """How a token is drawn from the model's distribution; see `filter_logits`."""

    temperature: float
    top_k: int
    top_p: float


def generate(
    module: TextModel,
    params: Params,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int = 0,
    first_row: int = 0,
) -> np.ndarray:
    """Continues prompts token by token, as `generate` of transformers does.

    A row's text depends on (seed, `first_row` + its number) and its prompt, not on the rows beside it, nor on padding.

    Args:
        input_ids: int [B, P] prompts; shorter ones are padded on the left.
        attention_mask: int [B, P], 0 for that padding; default all ones.
        max_new_tokens: tokens to add at most, to all rows or to each.
        sampling: None takes the likeliest token each time.
        eos_token_id: a row ends behind one of these; none of them where empty or None.
        pad_token_id: what follows a row that has ended; default the first end token.
        first_row: number of the first row, for whoever cuts many prompts into batches.

    Returns:
        int32 [B, P + n]: prompts and what was added; n is what the longest row took.

    Raises:
        JaxptmError: empty or too long prompts, ids outside the vocabulary, a mask that is not one of left padding, or
            settings out of range.
    """
    config = module.config
    if not config.causal or module.task != "causal-lm":
        raise JaxptmError(
            f"a {module.task or 'bare'} model does not generate text; open a GPT-2 with the task causal-lm."
        )
    ids, mask = _checked_prompts(config.vocab_size, input_ids, attention_mask)
    limits = _checked_limits(config.max_length, mask.sum(axis=1), max_new_tokens)
    if sampling is not None:
        sampling = _in_range(sampling, config.vocab_size)
    ends = [] if eos_token_id is None else np.atleast_1d(np.asarray(eos_token_id, np.int32)).tolist()
    pad = pad_token_id if pad_token_id is not None else ends[0] if ends else 0
    for name, token in [("eos_token_id", end) for end in ends] + [("pad_token_id", pad)]:
        if not 0 <= token < config.vocab_size:
            raise JaxptmError(
                f"{name} is {token}, outside the vocabulary of {config.vocab_size}; give one of its ids, or "
                "eos_token_id=[] for texts that never end."
            )
    more = -ids.shape[1] % PROMPT_STEP
    padded = np.pad(ids, ((0, 0), (more, 0)), constant_values=pad)
    rows = first_row + np.arange(len(ids))
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(rows)
    new, count = _decode(
        module,
        -(-int(limits.max()) // PROMPT_STEP) * PROMPT_STEP,
        params,
        padded,
        np.pad(mask, ((0, 0), (more, 0))),
        limits,
        keys,
        sampling,
        np.asarray(ends, np.int32),
        pad,
    )
    return np.concatenate([ids, np.asarray(new)[:, : int(count)]], axis=1)


@partial(jax.jit, static_argnums=(0, 1))
def _decode(
    module: TextModel,
    room: int,
    params: Params,
    input_ids: Int[Array, "B P"],
    attention_mask: Int[Array, "B P"],
    limits: Int[Array, " B"],
    keys: Key[Array, " B"],
    sampling: Sampling | None,
    ends: Int[Array, " E"],
    pad: int | Array,
) -> tuple[Int[Array, "B N"], Int[Array, ""]]:
    """The new tokens, with `pad` behind a row's end, and how many there are in the longest row.

    Args:
        room: N, for new tokens.
        limits: how many of them each row gets at most, from 1 to N.
    """
    rows, length = input_ids.shape
    lengths = attention_mask.sum(axis=1)
    # Nothing sees what has not been written: each query sees up to its own place in the cache.
    visible = jnp.pad(attention_mask, ((0, 0), (0, room)), constant_values=1)

    def forward(ids: Array, positions: Array, caches: Any) -> tuple[Array, Any]:
        """Logits behind the last of these tokens."""
        last = jnp.full((rows, 1), ids.shape[1] - 1)
        out = module.apply({"params": params}, ids, visible, position_ids=positions, mlm_positions=last, caches=caches)
        return out["logits"][:, 0], out["caches"]

    def choose(logits: Array, step: Array | int) -> Array:
        if sampling is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        now = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jax.vmap(jax.random.categorical)(now, filter_logits(logits, *sampling)).astype(jnp.int32)

    def ended(token: Array, count: Array | int) -> Array:
        return jnp.isin(token, ends) | (count >= limits)

    def unfinished(state: tuple[Any, ...]) -> Array:
        _, _, done, _, _ = state
        return ~done.all()

    def extend(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, done, tokens, caches = state
        places = lengths + jnp.minimum(step, limits) - 1  # a row that has ended may have come to the last there is
        logits, caches = forward(token[:, None], places[:, None], caches)
        token = jnp.where(done, pad, choose(logits, step)).astype(jnp.int32)
        return step + 1, token, done | ended(token, step + 1), tokens.at[:, step].set(token), caches

    positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
    caches = empty_caches(module.config, module.execution, rows, length + room)
    logits, caches = forward(input_ids, positions, caches)
    token = choose(logits, 0)
    tokens = jnp.full((rows, room), pad, jnp.int32).at[:, 0].set(token)
    state = (jnp.int32(1), token, ended(token, 1), tokens, caches)
    count, _, _, tokens, _ = jax.lax.while_loop(unfinished, extend, state)
    return tokens, count


def filter_logits(
    logits: Float[Array, "B V"], temperature: float | Array, top_k: int | Array, top_p: float | Array
) -> Float[Array, "B V"]:
    """Logits over the temperature; -inf outside the `top_k` best, and then outside the best that make up `top_p`.

    In the order and by the rules of transformers (generation/logits_process.py): tokens that tie with the k-th stay; a
    token stays while those better than it hold less than `top_p` (Holtzman et al. 2020, section 3.1), the best always;
    of equal tokens the one with the higher id is the better.
    """
    scaled = logits / temperature
    size = logits.shape[-1]
    order = jnp.argsort(scaled, axis=-1, stable=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    least = jax.lax.dynamic_index_in_dim(ranked, size - top_k, axis=-1)
    ranked = jnp.where(ranked < least, -jnp.inf, ranked)
    # The share of a token and all below it.
    share = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
    best = (jnp.arange(size) == size - 1)[None]
    kept = (share > 1 - top_p) | best | jnp.asarray(top_p >= 1)  # 1 drops nothing
    return jnp.put_along_axis(scaled, order, jnp.where(kept, ranked, -jnp.inf), axis=-1, inplace=False)


def _checked_prompts(vocab_size: int, input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise JaxptmError(f"`input_ids` is {ids.dtype} of shape {list(ids.shape)}, expected integers [batch, length].")
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
    if mask.shape != ids.shape:
        raise JaxptmError(f"`attention_mask` has shape {list(mask.shape)}, `input_ids` {list(ids.shape)}.")
    mask = mask.astype(np.int32)
    empty = np.flatnonzero(mask.sum(axis=1) == 0)
    if ids.size == 0 or empty.size:
        row = int(empty[0]) if empty.size else 0
        raise JaxptmError(f"prompt {row} is empty: give at least one token, such as the end of text that begins one.")
    if np.any(np.diff(mask, axis=1) < 0) or not np.isin(mask, (0, 1)).all():
        raise JaxptmError(
            "`attention_mask`: pad prompts on the left (tokenizer.padding_side = 'left'), with 0 for padding."
        )
    if not 0 <= ids.min() <= ids.max() < vocab_size:
        raise JaxptmError(f"`input_ids` goes from {ids.min()} to {ids.max()}; the model takes 0 to {vocab_size - 1}.")
    return ids.astype(np.int32), mask


def _checked_limits(max_length: int, lengths: np.ndarray, max_new_tokens: int | Sequence[int]) -> np.ndarray:
    """int32 [B], how many tokens each prompt gets at most."""
    limits = np.array(max_new_tokens, np.int32)
    if limits.shape not in ((), lengths.shape):
        raise JaxptmError(f"max_new_tokens holds {limits.size} numbers for {len(lengths)} prompts: give one each.")
    if limits.min() < 1:
        raise JaxptmError(f"max_new_tokens is {limits.min()}, expected at least 1.")
    limits = np.broadcast_to(limits, lengths.shape)
    longest = int(np.argmax(lengths + limits))
    length, new = int(lengths[longest]), int(limits[longest])
    if length + new > max_length:
        raise JaxptmError(
            f"a prompt of {length} tokens and {new} new ones are {length + new}, the model takes {max_length}; "
            "shorten the prompt or lower max_new_tokens."
        )
    return limits


def _in_range(sampling: Sampling, vocab_size: int) -> Sampling:
    temperature, top_k, top_p = sampling
    if not temperature > 0:
        raise JaxptmError(f"temperature is {temperature}, expected more than 0 (greedy: do_sample=False).")
    if top_k < 1:
        raise JaxptmError(f"top_k is {top_k}, expected at least 1.")
    if not 0 < top_p <= 1:
        raise JaxptmError(f"top_p is {top_p}, expected more than 0 and at most 1.")
    return Sampling(float(temperature), min(int(top_k), vocab_size), float(top_p))

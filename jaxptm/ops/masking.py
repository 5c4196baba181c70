"""Masked language modelling inside the training step: which tokens are predicted, and what the model sees instead.

The host ships token ids only. Each row has its own key, so its masks do not depend on the rows beside it: however a
batch is cut into microbatches or spread over devices, the masks stay the same (with jax's default threefry generator;
`rbg` keys give this up).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int, Key

from jaxptm.types import Array

Strategy = Literal["tokens", "words", "spans"]

# SpanBERT section 3.1: span lengths in words are geometric with p = 0.2, cut off at 10 and renormalised; mean 3.8.
SPAN_LENGTHS = np.arange(1, 11)
SPAN_PROBABILITIES = 0.2 * 0.8 ** (SPAN_LENGTHS - 1) / (1 - 0.8**10)

HASH_BASE = 0x9E3779B1
"""Odd, and its bits look random: rows that differ in one token differ in their hash."""


class Masked(NamedTuple):
    """A batch to predict from. Slots that hold a prediction come first, by position; the others are 0 throughout."""

    input_ids: Int[Array, "B L"]
    """What the model reads."""
    positions: Int[Array, "B P"]
    """Where the model predicts; no position twice among the slots of weight 1."""
    labels: Int[Array, "B P"]
    """The ids that stood there."""
    weights: Float[Array, "B P"]
    """1 for a prediction, 0 for an empty slot."""


def mask_tokens(
    keys: Key[Array, " B"],
    input_ids: Int[Array, "B L"],
    eligible: Bool[Array, "B L"],
    *,
    word_start: Bool[Array, "B L"],
    lengths: Int[Array, " B"],
    strategy: Strategy,
    probability: float,
    max_predictions: int,
    mask_id: int,
    vocab_size: int,
    never_id: int | None = None,
) -> Masked:
    """Chooses the tokens to predict and hides them: 80% become `mask_id`, 10% a random id, 10% stay (BERT section 3.1).

    The fate of each chosen token is drawn on its own; of a span all tokens have one, and the random ids are still drawn
    for each (SpanBERT section 3.1).

    Args:
        keys: one typed PRNG key (`jax.random.key`) a row.
        input_ids: token ids.
        eligible: which tokens may be predicted; special and padding tokens may not.
        word_start: which tokens begin a word. A token after an ineligible one begins a word in any case. `tokens` does
            not look at it.
        lengths: tokens of each row that are not padding, special ones included.
        strategy: `tokens`, uniformly without replacement; `words`, whole words in random order; `spans`, runs of whole
            words. `tokens` makes exactly as many predictions as `prediction_counts` says, while there are eligible
            tokens; the other two never more, and fewer only where no remaining word fits.
        probability: share of the tokens to predict.
        max_predictions: slots a row, P.
        mask_id: id of the mask token.
        vocab_size: random ids are drawn from [0, vocab_size), special tokens included as in BERT.
        never_id: the one that is not among them; where it is drawn, the token stays.
    """
    length = input_ids.shape[1]
    counts = jnp.asarray(prediction_counts(length, probability, max_predictions))

    def mask_row(
        key: Array, ids: Array, eligible: Array, word_start: Array, tokens: Array
    ) -> tuple[Array, Array, Array, Array]:
        choice_key, fate_key, random_key = jax.random.split(key, 3)
        count = jnp.minimum(counts[tokens], eligible.sum(dtype=jnp.int32))
        chosen, decides = _choose(choice_key, strategy, eligible, word_start, count)
        (positions,) = jnp.nonzero(chosen, size=max_predictions, fill_value=length)
        filled = positions < length
        labels = ids.at[positions].get(mode="fill", fill_value=0)
        fate = jax.random.uniform(fate_key, labels.shape)
        if strategy == "spans":
            slots = jnp.cumsum(chosen) - 1
            fate = fate[slots[decides.at[positions].get(mode="fill", fill_value=0)]]
        random_ids = jax.random.randint(random_key, labels.shape, 0, vocab_size, labels.dtype)
        if never_id is not None:
            random_ids = jnp.where(random_ids == never_id, labels, random_ids)
        shown = jnp.where(fate < 0.8, mask_id, jnp.where(fate < 0.9, random_ids, labels))
        hidden = ids.at[positions].set(shown.astype(ids.dtype), mode="drop")
        return hidden, jnp.where(filled, positions, 0), labels, filled.astype(jnp.float32)

    return Masked(*jax.vmap(mask_row)(keys, input_ids, eligible, word_start, lengths))


def static_keys(keys: Key[Array, " B"], input_ids: Int[Array, "B L"], dupe_factor: int) -> Key[Array, " B"]:
    """For each row one of `dupe_factor` keys that depend on its tokens alone, drawn by its own key.

    Static masks, as where each row was written to disk with so many masks before training (create_pretraining_data.py
    of google-research/bert, `dupe_factor`; Liu et al. 2019, section 4.1), of all seeds the same.
    """
    powers = np.array([pow(HASH_BASE, i + 1, 2**32) for i in range(input_ids.shape[1])], np.uint32)
    contents = jnp.sum(input_ids.astype(jnp.uint32) * powers[None], axis=1, dtype=jnp.uint32)
    root = jax.random.key(0, impl=jax.random.key_impl(keys))

    def key_of(key: Array, content: Array) -> Array:
        copy = jax.random.randint(key, (), 0, dupe_factor)
        return jax.random.fold_in(jax.random.fold_in(root, content), copy)

    return jax.vmap(key_of)(keys, contents)


def mask_with_replacement(
    keys: Key[Array, " B"],
    input_ids: Int[Array, "B L"],
    eligible: Bool[Array, "B L"],
    *,
    lengths: Int[Array, " B"],
    probability: float,
    max_predictions: int,
    mask_id: int,
) -> Masked:
    """ELECTRA's choice of tokens (google-research/electra, pretrain_helpers.py `mask`).

    Positions are drawn uniformly *with* replacement, so that a position may fill several slots, each of which counts.
    85% of the slots become `mask_id` and 15% stay as they are; none becomes a random token. The first token of a row
    is never chosen: the reference never changes it.

    Args:
        keys: one typed PRNG key a row.
        eligible: which tokens may be chosen; special and padding tokens may not.
        lengths: tokens of each row that are not padding, special ones included.
        probability: slots as a share of the tokens.
        max_predictions: slots a row, P.
    """
    length = input_ids.shape[1]
    counts = jnp.asarray(prediction_counts(length, probability, max_predictions))
    slots = jnp.arange(max_predictions)

    def mask_row(key: Array, ids: Array, eligible: Array, tokens: Array) -> tuple[Array, Array, Array, Array]:
        choice_key, fate_key = jax.random.split(key)
        (candidates,) = jnp.nonzero(eligible, size=length, fill_value=0)
        number = eligible.sum(dtype=jnp.int32)
        filled = (slots < counts[tokens]) & (number > 0)
        drawn = candidates[jax.random.randint(choice_key, slots.shape, 0, jnp.maximum(number, 1))]
        hides = filled & (jax.random.uniform(fate_key, slots.shape) < 0.85)
        hidden = ids.at[jnp.where(hides, drawn, length)].set(mask_id, mode="drop")
        positions = jnp.where(filled, drawn, 0)
        return hidden, positions, jnp.where(filled, ids[positions], 0), filled.astype(jnp.float32)

    return Masked(*jax.vmap(mask_row)(keys, input_ids, eligible.at[:, 0].set(False), lengths))


def replace_masked(
    keys: Key[Array, " B"],
    input_ids: Int[Array, "B L"],
    masked: Masked,
    logits: Float[Array, "B P V"],
    temperature: float,
) -> Int[Array, "B L"]:
    """The row as it was, with tokens drawn from softmax(logits / temperature) in the places of the slots.

    Drawn by Gumbel noise (ELECTRA section 2); no gradient passes. Of several slots at one position the first decides
    ("only applied once" in the reference, which in truth takes the mean of their ids).

    Args:
        input_ids: the original ids, without masks.
    """
    length = input_ids.shape[1]

    def replace_row(key: Array, ids: Array, positions: Array, weights: Array, logits: Array) -> Array:
        drawn = jax.random.categorical(key, logits / temperature).astype(ids.dtype)
        earlier = jnp.tril(positions[:, None] == positions[None, :], -1).any(axis=1)
        return ids.at[jnp.where((weights > 0) & ~earlier, positions, length)].set(drawn, mode="drop")

    return jax.vmap(replace_row)(keys, input_ids, masked.positions, masked.weights, lax.stop_gradient(logits))


def prediction_counts(length: int, probability: float, max_predictions: int) -> np.ndarray:
    """Predictions of a row by its number of tokens, 0 to `length`: the rule of BERT's create_pretraining_data.py.

    A table, because the reference rounds in float64 and halves to even.
    """
    counts = [min(max_predictions, max(1, round(tokens * probability))) for tokens in range(length + 1)]
    return np.array([0, *counts[1:]], np.int32)


def word_bounds(
    eligible: Bool[Array, " L"], word_start: Bool[Array, " L"]
) -> tuple[Bool[Array, " L"], Int[Array, " L"], Int[Array, " L"]]:
    """Which tokens begin an eligible word, and for each eligible token where its word begins and ends (exclusive)."""
    index = jnp.arange(eligible.shape[0])
    continues = eligible & ~word_start & jnp.roll(eligible, 1).at[0].set(False)
    starts = eligible & ~continues
    ends = ~jnp.roll(continues, -1).at[-1].set(False)
    begin = lax.cummax(jnp.where(starts, index, 0))
    end = lax.cummin(jnp.where(ends, index + 1, index.size), reverse=True)
    return starts, begin, end


def select_words(
    order: Int[Array, " L"], eligible: Bool[Array, " L"], word_start: Bool[Array, " L"], count: Int[Array, ""]
) -> Bool[Array, " L"]:
    """Whole words, visited in `order` (positions of their first tokens first), until `count` tokens are chosen.

    A word that does not fit any more is passed over and the walk goes on (create_masked_lm_predictions in BERT).
    """
    starts, begin, end = word_bounds(eligible, word_start)
    sizes = jnp.where(starts, end - begin, 0)

    def visit(left: Array, size: Array) -> tuple[Array, Array]:
        taken = size <= left
        return left - jnp.where(taken, size, 0), taken

    _, taken = lax.scan(visit, count, sizes[order], unroll=8)
    return eligible & jnp.zeros_like(taken).at[order].set(taken)[begin]


def select_spans(
    order: Int[Array, " L"],
    span_lengths: Int[Array, " L"],
    eligible: Bool[Array, " L"],
    word_start: Bool[Array, " L"],
    count: Int[Array, ""],
) -> tuple[Bool[Array, " L"], Int[Array, " L"]]:
    """Spans of whole words, begun in `order`, until `count` tokens are chosen (SpanBERT section 3.1).

    Returns which tokens are chosen, and for each of them the first token of its span.

    The i-th span begins at `order[i]`, unless that word is chosen already, and covers `span_lengths[i]` words, words
    chosen before included. It ends early before an ineligible token or a word that does not fit any more.
    """
    index = jnp.arange(eligible.shape[0])
    starts, _, end = word_bounds(eligible, word_start)
    word = jnp.cumsum(starts)
    words = starts.sum()

    def unfinished(state: tuple[Array, ...]) -> Array:
        i, _, _, left = state
        return (i < words) & (left > 0)

    def visit(state: tuple[Array, ...]) -> tuple[Array, ...]:
        i, chosen, begins, left = state
        first = order[i]
        after = index >= first
        cost = jnp.cumsum(after & ~chosen)[end - 1]  # of the span, if it ended with this token's word
        stop = ~eligible | (word - word[first] >= span_lengths[i]) | (cost > left)
        span = after & (jnp.cumsum(after & stop) == 0) & ~chosen & ~chosen[first]
        return i + 1, chosen | span, jnp.where(span, first, begins), left - span.sum(dtype=left.dtype)

    nothing: tuple[Array, ...] = (jnp.int32(0), jnp.zeros_like(eligible), jnp.zeros_like(order), count)
    _, chosen, begins, _ = lax.while_loop(unfinished, visit, nothing)
    return chosen, begins


def _choose(
    key: Array, strategy: Strategy, eligible: Array, word_start: Array, count: Array
) -> tuple[Bool[Array, " L"], Int[Array, " L"]]:
    """The tokens of one row to predict, `count` of them or, where words do not fit, fewer; and which decides for it."""
    length = eligible.shape[0]
    order_key, span_key = jax.random.split(key)
    candidates = eligible if strategy == "tokens" else word_bounds(eligible, word_start)[0]
    order = jnp.argsort(jnp.where(candidates, jax.random.uniform(order_key, (length,)), jnp.inf))
    if strategy == "tokens":
        return jnp.zeros_like(eligible).at[order].set(jnp.arange(length) < count), jnp.arange(length)
    if strategy == "words":
        return select_words(order, eligible, word_start, count), jnp.arange(length)
    span_lengths = jax.random.choice(span_key, SPAN_LENGTHS, (length,), p=SPAN_PROBABILITIES)
    return select_spans(order, span_lengths, eligible, word_start, count)


class VocabularyTables(NamedTuple):
    """What masking has to know of each id; index them with token ids."""

    is_special: Bool[np.ndarray, " V"]
    continues_word: Bool[np.ndarray, " V"]


def vocabulary_tables(tokenizer: Any) -> VocabularyTables:
    """Reads the tables off a `transformers` tokenizer (`len`, `convert_ids_to_tokens`, `all_special_ids`).

    WordPiece marks what continues a word (`##ing`), byte-level BPE and SentencePiece what begins one (`Ġthe`, `▁the`).
    Each vocabulary holds a few of the others' marks as plain text, so the commonest mark tells which it is. Where there
    is none, every token is a word.
    """
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    marked = {mark: np.array([token.startswith(mark) for token in tokens], bool) for mark in ("##", "Ġ", "▁")}
    mark = max(marked, key=lambda mark: marked[mark].sum())
    is_special = np.zeros(len(tokens), bool)
    is_special[list(tokenizer.all_special_ids)] = True
    continues = marked[mark] if mark == "##" or not marked[mark].any() else ~marked[mark]
    return VocabularyTables(is_special, continues & ~is_special)

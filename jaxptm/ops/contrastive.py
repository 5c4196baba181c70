"""What wav2vec 2.0 learns from (Baevski et al. 2020, section 3): masked spans of frames, negatives, and the loss.

All of it inside the training step, each row by its own key, so that a row's draws do not depend on the rows beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from jaxptm.types import Array, Mean

MINIMUM_SPANS = 2
"""Of a row (fairseq, wav2vec2.py, `min_masks`)."""


class MaskedFrames(NamedTuple):
    """Frames to hide, and the same as slots: those that hold one come first, by position; the others have weight 0."""

    mask: Bool[Array, "B F"]
    positions: Int[Array, "B P"]
    weights: Float[Array, "B P"]


def target_slots(frames: int, probability: float, span: int) -> int:
    """Static number of slots for the masked frames of a row: as many as spans that do not overlap would hide."""
    return min(frames, max(MINIMUM_SPANS, int(probability * frames / span) + 1) * span)


def mask_frames(
    keys: Key[Array, " B"],
    lengths: Int[Array, " B"],
    frames: int,
    *,
    probability: float,
    span: int,
    at_least: int = MINIMUM_SPANS,
) -> MaskedFrames:
    """Hides spans of `span` frames, which may overlap (Baevski et al. 2020, sections 3.1 and 4.2).

    A row of n frames has int(probability * n / span + u) spans, u uniform in [0, 1), and `at_least`. Their first
    frames are drawn without replacement from those that a whole span fits behind (fairseq, data_utils.py,
    `compute_mask_indices`). With the paper's 0.65 and 10 about half of the frames are hidden.

    Args:
        lengths: frames of each row that are no padding.
        frames: of a row, padding included.
        at_least: spans of a row; two in fairseq's wav2vec 2.0.
    """
    slots = target_slots(frames, probability, span)

    def of_row(key: Array, length: Array) -> Array:
        count_key, start_key = jax.random.split(key)
        count = jnp.floor(probability * length / span + jax.random.uniform(count_key)).astype(jnp.int32)
        count = jnp.maximum(count, at_least)
        index = jnp.arange(frames)
        fits = index <= length - span
        order = jnp.argsort(jnp.where(fits, jax.random.uniform(start_key, (frames,)), jnp.inf))
        starts = jnp.zeros(frames, jnp.int32).at[order].set((jnp.arange(frames) < count).astype(jnp.int32))
        begun = jnp.cumsum(jnp.where(fits, starts, 0))
        return begun - jnp.where(index >= span, jnp.roll(begun, span), 0) > 0

    mask = jax.vmap(of_row)(keys, lengths)
    positions = jnp.argsort(~mask, axis=1, stable=True)[:, :slots]
    weights = (jnp.arange(slots)[None] < mask.sum(axis=1, keepdims=True)).astype(jnp.float32)
    return MaskedFrames(mask, jnp.where(weights > 0, positions, 0), weights)


def draw_negatives(keys: Key[Array, " B"], counts: Int[Array, " B"], slots: int, negatives: int) -> Int[Array, "B P K"]:
    """For each slot K others of the same row, drawn uniformly with replacement (Baevski et al. 2020, section 3.2).

    Args:
        counts: how many slots of each row, the first ones, hold a frame; a row with one has no others, and gets it.
        slots: of a row.
    """

    def of_row(key: Array, count: Array) -> Array:
        drawn = jax.random.randint(key, (slots, negatives), 0, jnp.maximum(count - 1, 1))
        others = drawn + (drawn >= jnp.arange(slots)[:, None])
        return jnp.minimum(others, jnp.maximum(count - 1, 0))

    return jax.vmap(of_row)(keys, counts)


def contrastive_loss(
    states: Float[Array, "B P W"],
    quantized: Float[Array, "B P W"],
    codes: Int[Array, "B P G"],
    negatives: Int[Array, "B P K"],
    weights: Float[Array, "B P"],
    temperature: float,
) -> tuple[Mean, Mean]:
    """Cross entropy in nats of finding the quantised frame of each slot among its negatives, and how often it is found.

    The logits are cosine similarities over `temperature`. A negative that is quantised as the frame itself is none
    (fairseq, wav2vec2.py, `compute_preds`). A frame counts as found where it has the largest logit, and not all are
    equal. Chance is log(K + 1).

    Args:
        codes: of the quantised frames: two are the same where all of them are.
    """
    similar = jnp.einsum("bpw,bqw->bpq", _unit(states), _unit(quantized)) / temperature
    same = (codes[:, :, None] == codes[:, None]).all(axis=-1)
    others, equal = (jnp.take_along_axis(values, negatives, axis=2) for values in (similar, same))
    others = jnp.where(equal, -jnp.inf, others)
    right = jnp.diagonal(similar, axis1=1, axis2=2)
    logits = jnp.concatenate([right[..., None], others], axis=-1)
    found = (right >= others.max(axis=-1)) & (right > others.min(axis=-1))
    return Mean.of(jax.nn.logsumexp(logits, axis=-1) - right, weights), Mean.of(found, weights)


def _unit(x: Float[Array, "B P W"]) -> Float[Array, "B P W"]:
    """As torch.cosine_similarity: norms of less than 1e-8 count as that."""
    norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-16))
    return x / norm

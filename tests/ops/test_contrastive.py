"""Masked spans, negatives and the contrastive loss against transformers, torch and their laws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2ForPreTraining, _compute_mask_indices

from jaxptm.ops.contrastive import contrastive_loss, draw_negatives, mask_frames, target_slots


def keys(seed: int, rows: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), rows)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.lists(st.integers(14, 60), min_size=1, max_size=5), st.sampled_from([0.3, 0.65, 0.9]))
def test_masks_are_spans_inside_the_row_and_fit_the_slots(seed: int, lengths: list[int], probability: float) -> None:
    frames, span = 60, 5
    masked = mask_frames(keys(seed, len(lengths)), jnp.array(lengths), frames, probability=probability, span=span)
    for mask, positions, weights, length in zip(*map(np.asarray, masked), lengths, strict=True):
        assert not mask[length:].any() and mask.any()
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
        assert (edges[1::2] - edges[::2] >= span).all()
        count = int(weights.sum())
        assert len(weights) == target_slots(frames, probability, span)
        assert (weights[:count] == 1).all() and positions[:count].tolist() == np.flatnonzero(mask).tolist()
        assert not positions[count:].any()


def test_as_many_frames_are_masked_as_by_transformers() -> None:
    frames, rows, span = 200, 3000, 10  # of which 0.6 makes whole numbers of spans: they round once a batch
    lengths = np.repeat([200, 150], rows // 2)
    ours = np.asarray(mask_frames(keys(0, rows), jnp.array(lengths), frames, probability=0.6, span=span).mask)
    attention = torch.arange(frames)[None] < torch.tensor(lengths)[:, None]
    np.random.seed(0)  # noqa: NPY002  (theirs draws from it)
    theirs = _compute_mask_indices((rows, frames), 0.6, span, attention_mask=attention.long(), min_masks=2)
    for part in (slice(0, rows // 2), slice(rows // 2, rows)):
        shares = [mask[part].sum(axis=1) / lengths[part] for mask in (ours, theirs)]
        error = 4 * np.sqrt(sum(share.var() / len(share) for share in shares))
        assert abs(shares[0].mean() - shares[1].mean()) < error
        # Where in the row: each tenth of it as often.
        count = int(lengths[part][0])
        where = [mask[part, :count].reshape(-1, 10, count // 10).mean(axis=(0, 2)) for mask in (ours, theirs)]
        np.testing.assert_allclose(where[0], where[1], atol=0.035)


def test_the_paper_masks_about_half_of_the_frames() -> None:
    mask = mask_frames(keys(0, 500), jnp.full(500, 780), 780, probability=0.65, span=10).mask
    assert float(mask.mean()) == pytest.approx(0.49, abs=0.01)  # section 4.2, of 15.6 s


def test_a_row_draws_the_same_whatever_is_beside_it() -> None:
    lengths = jnp.array([40, 50, 60])
    whole = mask_frames(keys(1, 3), lengths, 60, probability=0.65, span=5)
    alone = mask_frames(keys(1, 3)[1:2], lengths[1:2], 60, probability=0.65, span=5)
    for many, one in zip(whole, alone, strict=True):
        assert (many[1:2] == one).all()


def test_negatives_are_other_slots_each_as_often() -> None:
    counts, slots = np.array([7, 3, 2, 1]), 7
    drawn = np.asarray(draw_negatives(keys(2, 4), jnp.array(counts), slots, 6000))
    for row, count in enumerate(counts[:3]):
        for slot in range(count):
            seen = np.bincount(drawn[row, slot], minlength=slots)
            assert seen[slot] == 0 and not seen[count:].any()
            others = np.delete(seen[:count], slot)
            np.testing.assert_allclose(others / 6000, 1 / (count - 1), atol=0.035)
    assert (drawn[3] == 0).all()


def test_the_loss_is_that_of_transformers() -> None:
    rng = np.random.default_rng(0)
    rows, slots, width, count = 3, 9, 12, 20
    states, codebook = rng.normal(size=(rows, slots, width)), rng.normal(size=(4, width))
    codes = rng.integers(0, 4, (rows, slots))
    quantized = codebook[codes]
    weights = (np.arange(slots) < np.array([9, 6, 4])[:, None]).astype(np.float32)
    negatives = np.asarray(draw_negatives(keys(3, rows), jnp.array([9, 6, 4]), slots, count))
    loss, found = contrastive_loss(
        *(jnp.asarray(x, jnp.float32) for x in (states, quantized)),
        jnp.asarray(codes)[..., None],
        jnp.asarray(negatives),
        jnp.asarray(weights),
        0.1,
    )
    target = torch.tensor(quantized)
    gathered = torch.stack([target[row][torch.tensor(negatives[row])] for row in range(rows)])  # [B, P, K, W]
    logits = Wav2Vec2ForPreTraining.compute_contrastive_logits(
        target[None], gathered.permute(2, 0, 1, 3), torch.tensor(states), 0.1
    )
    same = (target[None] == gathered.permute(2, 0, 1, 3)).all(-1)
    logits[1:][same] = float("-inf")
    values = torch.logsumexp(logits, 0) - logits[0]
    assert float(loss.total) == pytest.approx(float((values * torch.tensor(weights)).sum()), rel=1e-5)
    assert float(loss.weight) == weights.sum()
    best, worst = logits.argmax(0) == 0, logits.argmin(0) == 0
    assert float(found.total) == float(((best & ~(best & worst)) * torch.tensor(weights)).sum())
    assert same.any()


def test_a_codebook_of_one_entry_finds_nothing() -> None:
    states = jax.random.normal(jax.random.key(0), (1, 5, 4))
    negatives = draw_negatives(keys(0, 1), jnp.array([5]), 5, 8)
    same = jnp.ones((1, 5, 4))
    loss, found = contrastive_loss(states, same, jnp.zeros((1, 5, 1), jnp.int32), negatives, jnp.ones((1, 5)), 0.1)
    assert float(loss.value) == 0 and float(found.value) == 1  # nothing to tell apart: what an alarm looks for
    gradient = jax.grad(
        lambda x: contrastive_loss(x, same, jnp.zeros((1, 5, 1), jnp.int32), negatives, jnp.ones((1, 5)), 0.1)[0].total
    )
    assert np.isfinite(np.asarray(gradient(states))).all()

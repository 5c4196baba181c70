"""Replaced-token detection (ELECTRA, Clark et al. 2020; google-research/electra, run_pretraining.py)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxptm.config import ReplacedTokenConfig
from jaxptm.models.params import initialise
from jaxptm.nn.text import TextModel
from jaxptm.objectives.objective import Objective
from jaxptm.ops.losses import accuracy, binary_cross_entropy, cross_entropy, token_share
from jaxptm.ops.masking import VocabularyTables, mask_with_replacement, replace_masked
from jaxptm.types import Array, Batch, JaxptmError, Mean, Means, Params

SHARED = "embeddings"
"""Token, position and type tables and their norm serve both models; each has its own `embeddings_project`."""


def replaced_token_detection(
    config: ReplacedTokenConfig,
    discriminator: TextModel,
    generator: TextModel,
    vocabulary: VocabularyTables,
    mask_id: int,
    sequence_length: int,
) -> Objective:
    """A generator fills in masked tokens, and a discriminator says of every token whether it is still the original.

    A token that the generator guessed right counts as original. Batches hold `input_ids` and `attention_mask` [B, L],
    and `token_type_ids` or `segment_ids` where the data has them. Terms, in nats: `generator_loss` (mean over masked
    slots) and `discriminator_loss` (mean over all tokens that are no padding).

    Parameters are `embeddings`, which both models share, and the rest of each under `generator` and `discriminator`.
    """
    slots = config.slots(sequence_length)
    is_special = jnp.asarray(vocabulary.is_special)

    def split(params: Params) -> dict[str, Params]:
        shared = {SHARED: params[SHARED]}
        return {"model": shared | params["discriminator"], "generator": shared | params["generator"]}

    def merge(model: Params, generator: Params) -> Params:
        own = ({name: part for name, part in params.items() if name != SHARED} for params in (model, generator))
        return {SHARED: model[SHARED]} | dict(zip(("discriminator", "generator"), own, strict=True))

    def join(parts: Mapping[str, Params]) -> Params:
        ours, theirs = (jax.tree.leaves(parts[name][SHARED]) for name in ("model", "generator"))
        if not all(map(np.array_equal, ours, theirs)):
            raise JaxptmError("the discriminator and the generator do not have the same embeddings, which they share.")
        return merge(parts["model"], parts["generator"])

    def init(key: Array) -> Params:
        return merge(initialise(discriminator, key), initialise(generator, jax.random.fold_in(key, 1)))

    def loss(
        params: Params, batch: Batch, keys: Array, *, train: bool, step: int | Int[Array, ""] = 0
    ) -> tuple[Means, Means]:
        parts = split(params)
        mask_keys, sample_keys, *dropout_keys = jax.vmap(lambda key: jax.random.split(key, 4), out_axes=1)(keys)
        arrays = {name: jnp.asarray(rows) for name, rows in batch.items()}
        ids, real = arrays["input_ids"], arrays["attention_mask"].astype(bool)
        context = {name: arrays.get(name) for name in ("attention_mask", "token_type_ids", "segment_ids")}
        masked = mask_with_replacement(
            mask_keys,
            ids,
            real & ~is_special[ids],
            lengths=real.sum(axis=1),
            probability=config.mask_probability,
            max_predictions=slots,
            mask_id=mask_id,
        )
        guesses = generator.apply(
            {"params": parts["generator"]},
            masked.input_ids,
            **context,
            mlm_positions=masked.positions,
            train=train,
            rngs={"dropout": dropout_keys[0][0]},
        )["logits"]
        corrupted = replace_masked(sample_keys, ids, masked, guesses, config.temperature)
        replaced = corrupted != ids
        judged = discriminator.apply(
            {"params": parts["model"]}, corrupted, **context, train=train, rngs={"dropout": dropout_keys[1][0]}
        )["logits"]
        said, weights = judged > 0, real.astype(jnp.float32)
        found = (said & replaced).astype(jnp.float32)
        terms = {
            "generator_loss": cross_entropy(guesses, masked.labels, masked.weights),
            "discriminator_loss": binary_cross_entropy(judged, replaced, weights),
        }
        scores = {
            "generator_accuracy": accuracy(guesses, masked.labels, masked.weights),
            "discriminator_accuracy": Mean.of(said == replaced, weights),
            "discriminator_precision": Mean.of(found, weights * said),
            "discriminator_recall": Mean.of(found, weights * replaced),
            "replaced_share": Mean.of(replaced, weights),
            "token_share": token_share(real),
        }
        return terms, scores

    return Objective(
        modules={"model": discriminator, "generator": generator},
        init=init,
        loss=loss,
        flops=lambda rows, length: sum(module.flops(rows, length, slots) for module in (discriminator, generator)),
        coefficients={
            "generator_loss": config.generator_weight,
            "discriminator_loss": config.discriminator_weight,
        },
        split=split,
        join=join,
    )

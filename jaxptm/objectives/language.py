"""Language modelling: masked, alone (RoBERTa) or with a judgement of pairs (BERT, ALBERT), and causal (GPT-2)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxptm.config import CausalLmConfig, MaskedLmConfig
from jaxptm.models.params import initialise
from jaxptm.nn.text import TextModel, output_table
from jaxptm.objectives.objective import Objective
from jaxptm.ops.hashed_rng import hashed
from jaxptm.ops.losses import accuracy, cross_entropy, linear_cross_entropy, token_share
from jaxptm.ops.masking import VocabularyTables, mask_tokens, static_keys
from jaxptm.types import Array, Batch, Means, Params


def masked_language_model(
    config: MaskedLmConfig, module: TextModel, vocabulary: VocabularyTables, mask_id: int, sequence_length: int
) -> Objective:
    """Predict hidden tokens (Devlin et al. 2019, section 3.1) and, with a module for `pretraining`, judge the pair.

    Batches hold `input_ids` and `attention_mask` [B, L]; `token_type_ids` and `next_sentence_label` [B] for pairs;
    `segment_ids` where packed documents are kept apart. Terms: `mlm_loss` (mean over predictions) and `nsp_loss`, or
    for ALBERT `sop_loss` (mean over rows), in nats.
    """
    slots = config.slots(sequence_length)
    is_special, continues_word = (jnp.asarray(table) for table in vocabulary)

    def loss(
        params: Params, batch: Batch, keys: Array, *, train: bool, step: int | Int[Array, ""] = 0
    ) -> tuple[Means, Means]:
        mask_keys, dropout_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        arrays = {name: jnp.asarray(rows) for name, rows in batch.items()}
        ids, real = arrays["input_ids"], arrays["attention_mask"].astype(bool)
        if train and config.dupe_factor:
            mask_keys = static_keys(mask_keys, ids, config.dupe_factor)
        masked = mask_tokens(
            mask_keys,
            ids,
            real & ~is_special[ids],
            word_start=~continues_word[ids],
            lengths=real.sum(axis=1),
            strategy=config.masking,
            probability=config.mask_probability,
            max_predictions=slots,
            mask_id=mask_id,
            vocab_size=module.config.vocab_size,
            # A padding id in the middle of a row would move all positions behind it.
            never_id=module.config.pad_token_id if module.config.counts_tokens else None,
        )
        out = module.apply(
            {"params": params},
            masked.input_ids,
            attention_mask=arrays["attention_mask"],
            token_type_ids=arrays.get("token_type_ids"),
            segment_ids=arrays.get("segment_ids"),
            mlm_positions=masked.positions,
            train=train,
            rngs={"dropout": hashed(dropout_keys[0])},
        )
        logits = out["logits"] if module.task == "masked-lm" else out["prediction_logits"]
        terms = {"mlm_loss": cross_entropy(logits, masked.labels, masked.weights)}
        scores = {
            "mlm_accuracy": accuracy(logits, masked.labels, masked.weights),
            "token_share": token_share(real),
        }
        if module.task == "pretraining":
            rows = real.any(axis=1).astype(jnp.float32)
            labels = arrays["next_sentence_label"]
            kind, judged = "sop" if module.config.sentence_order else "nsp", out[module.config.pair_logits]
            terms[f"{kind}_loss"] = cross_entropy(judged, labels, rows)
            scores[f"{kind}_accuracy"] = accuracy(judged, labels, rows)
        return terms, scores

    return Objective(
        modules={"model": module},
        init=lambda key: initialise(module, key),
        loss=loss,
        flops=lambda rows, length: module.flops(rows, length, slots),
    )


def causal_language_model(config: CausalLmConfig, module: TextModel) -> Objective:
    """Predict each token from those before it in its row (Radford et al. 2019, section 2).

    Batches hold `input_ids` and `attention_mask` [B, L], and `segment_ids` where documents are kept apart: then nothing
    is predicted across their borders. Term: `clm_loss`, the mean over all predicted tokens, in nats.
    """
    body = module.clone(task=None)

    def loss(
        params: Params, batch: Batch, keys: Array, *, train: bool, step: int | Int[Array, ""] = 0
    ) -> tuple[Means, Means]:
        arrays = {name: jnp.asarray(rows) for name, rows in batch.items()}
        ids, real, segments = arrays["input_ids"], arrays["attention_mask"].astype(bool), arrays.get("segment_ids")
        hidden = body.apply(
            {"params": params},
            ids,
            attention_mask=arrays["attention_mask"],
            segment_ids=segments,
            train=train,
            rngs={"dropout": hashed(keys[0])},
        )["last_hidden_state"]
        predicted = real[:, :-1] & real[:, 1:]
        if segments is not None:
            predicted &= segments[:, :-1] == segments[:, 1:]
        # The last token predicts nothing: it has no weight, which is cheaper than a copy of all others.
        labels, weights = jnp.roll(ids, -1, axis=1), jnp.pad(predicted, ((0, 0), (0, 1))).astype(jnp.float32)
        clm_loss, clm_accuracy = linear_cross_entropy(hidden, output_table(module.config, params), labels, weights)
        return {"clm_loss": clm_loss}, {"clm_accuracy": clm_accuracy, "token_share": token_share(real)}

    return Objective(
        modules={"model": module},
        init=lambda key: initialise(module, key),
        loss=loss,
        flops=lambda rows, length: module.flops(rows, length, config.slots(length)),
        summary=lambda values: {"perplexity": math.exp(min(values["clm_loss"], 700.0))},
    )

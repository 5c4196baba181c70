"""Masked language modelling, alone (RoBERTa) or with next-sentence prediction (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxptm.config import ObjectiveConfig
from jaxptm.models.params import initialise
from jaxptm.nn.text import TextModel, forward_flops
from jaxptm.objectives.objective import Objective
from jaxptm.ops.losses import accuracy, cross_entropy
from jaxptm.ops.masking import VocabularyTables, mask_tokens
from jaxptm.types import Array, Batch, Mean, Means, Params


def masked_language_model(
    config: ObjectiveConfig, module: TextModel, vocabulary: VocabularyTables, mask_id: int, sequence_length: int
) -> Objective:
    """Predict hidden tokens and, with a module for the task `pretraining`, whether B follows A.

    Batches hold `input_ids` and `attention_mask` [B, L]; `token_type_ids` and `next_sentence_label` [B] for pairs;
    `segment_ids` where packed documents are kept apart. Terms: `mlm_loss` (mean over predictions) and `nsp_loss` (mean
    over rows), in nats.
    """
    slots = config.slots(sequence_length)
    is_special, continues_word = (jnp.asarray(table) for table in vocabulary)

    def loss(params: Params, batch: Batch, keys: Array, *, train: bool) -> tuple[Means, Means]:
        mask_keys, dropout_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        arrays = {name: jnp.asarray(rows) for name, rows in batch.items()}
        ids, real = arrays["input_ids"], arrays["attention_mask"].astype(bool)
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
        )
        out = module.apply(
            {"params": params},
            masked.input_ids,
            attention_mask=arrays["attention_mask"],
            token_type_ids=arrays.get("token_type_ids"),
            segment_ids=arrays.get("segment_ids"),
            mlm_positions=masked.positions,
            train=train,
            rngs={"dropout": dropout_keys[0]},
        )
        logits = out["logits"] if module.task == "masked-lm" else out["prediction_logits"]
        terms = {"mlm_loss": cross_entropy(logits, masked.labels, masked.weights)}
        scores = {
            "mlm_accuracy": accuracy(logits, masked.labels, masked.weights),
            "token_share": Mean.of(real, jnp.broadcast_to(real.any(axis=1, keepdims=True), real.shape)),
        }
        if module.task == "pretraining":
            rows = real.any(axis=1).astype(jnp.float32)
            labels = arrays["next_sentence_label"]
            terms["nsp_loss"] = cross_entropy(out["seq_relationship_logits"], labels, rows)
            scores["nsp_accuracy"] = accuracy(out["seq_relationship_logits"], labels, rows)
        return terms, scores

    return Objective(
        module=module,
        init=lambda key: initialise(module, key),
        loss=loss,
        flops=lambda rows, length: forward_flops(module.config, module.task, rows, length, slots),
    )

"""Learning from audio: without transcripts (wav2vec 2.0), and to write (connectionist temporal classification)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Bool, Float, Int

from jaxptm.config import IGNORED, ContrastiveConfig, CtcConfig
from jaxptm.models.params import initialise
from jaxptm.nn.audio import AudioModel
from jaxptm.nn.audio_config import AudioConfig
from jaxptm.nn.quantizer import perplexity
from jaxptm.objectives.objective import Objective
from jaxptm.ops.contrastive import contrastive_loss, draw_negatives, mask_frames, target_slots
from jaxptm.ops.hashed_rng import hashed
from jaxptm.ops.losses import audio_seconds
from jaxptm.types import Array, Batch, Mean, Means, Params

FEATURE_ENCODER = "embeddings/feature_encoder/"


def contrastive(config: ContrastiveConfig, module: AudioModel) -> Objective:
    """Finds the quantised form of each masked frame among others (Baevski et al. 2020, section 3.2).

    Batches hold `input_values` [B, T] and `attention_mask` [B, T]. Terms, as fairseq's wav2vec criterion adds them up:
    `contrastive_loss`, the mean over the masked frames in nats (chance is log(negatives + 1)); `diversity_loss`, the
    share of the codebooks that the mean probabilities leave unused, of the rows at hand; `feature_penalty`, the mean
    square of what the convolutions give. Scores: `contrastive_accuracy`, `code_perplexity_1` and so on, one a codebook:
    entries in use, by the mean probabilities of the rows at hand.
    """
    groups, entries = module.config.num_codevector_groups, module.config.num_codevectors_per_group

    def loss(
        params: Params, batch: Batch, keys: Array, *, train: bool, step: int | Int[Array, ""] = 0
    ) -> tuple[Means, Means]:
        mask_keys, negative_keys, noise_keys, dropout_keys = jax.vmap(lambda key: jax.random.split(key, 4), out_axes=1)(
            keys
        )
        values, attention = (jnp.asarray(batch[name]) for name in ("input_values", "attention_mask"))
        lengths, frames, real = _frames(module.config, attention)
        masked = mask_frames(mask_keys, lengths, frames, probability=config.mask_probability, span=config.mask_length)
        slots = masked.positions.shape[1]
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (slots, groups, entries)))(noise_keys)
        out = module.apply(
            {"params": _gradient_scaled(params, config.feature_gradient)},
            values,
            attention,
            masked.mask,
            target_positions=masked.positions,
            target_weights=masked.weights,
            gumbel_noise=noise,
            temperature=jnp.maximum(
                config.temperature * jnp.exp(step * math.log(config.temperature_decay)),
                config.last_temperature,
            ),
            train=train,
            rngs={"dropout": hashed(dropout_keys[0])},
        )
        counts = masked.weights.sum(axis=1).astype(jnp.int32)
        found, accuracy = contrastive_loss(
            out["projected_states"],
            out["projected_quantized_states"],
            out["codes"],
            draw_negatives(negative_keys, counts, slots, config.negatives),
            masked.weights,
            config.logit_temperature,
        )
        used = perplexity(out["code_probabilities"].value)
        targets = masked.weights.sum()
        unused = (groups * entries - used.sum()) / (groups * entries)
        terms = {
            "contrastive_loss": found,
            "diversity_loss": Mean(unused * targets, targets),
            "feature_penalty": Mean.of(out["feature_penalty"], real.astype(jnp.float32)),
        }
        scores = {
            "contrastive_accuracy": accuracy,
            **{f"code_perplexity_{i + 1}": Mean(used[i] * targets, targets) for i in range(groups)},
            "audio_seconds": audio_seconds(attention),
        }
        return terms, scores

    def flops(rows: int, samples: int) -> float:
        frames = module.config.frames(samples)
        targets = target_slots(frames, config.mask_probability, config.mask_length)
        return module.flops(rows, samples, targets)

    return Objective(
        modules={"model": module},
        init=lambda key: initialise(module, key),
        loss=loss,
        flops=flops,
        coefficients={"diversity_loss": config.diversity_weight, "feature_penalty": config.feature_weight},
        alarm=partial(collapse, negatives=config.negatives),
    )


def collapse(values: Mapping[str, float], *, negatives: int) -> str | None:
    """What is wrong with a pre-training that has stopped to learn (fairseq issues 3661, 3687, 3744), or None.

    Args:
        values: of the terms and scores of `contrastive`.
    """
    chance = math.log(negatives + 1)
    used = [value for name, value in values.items() if name.startswith("code_perplexity")]
    remedy = (
        "raise train.batch_size (more seconds of audio a step), lower optimizer.learning_rate or lengthen its warmup"
    )
    if max(used) < 2:
        return f"the codebooks have collapsed: each uses {max(used):.1f} of its entries at most; {remedy}."
    accuracy, loss = values["contrastive_accuracy"], values["contrastive_loss"]
    if accuracy > 0.95 and min(used) < 4:
        return f"the task has become trivial: accuracy {accuracy:.1%} with {min(used):.1f} entries in use; {remedy}."
    if loss > 0.995 * chance:
        bits = loss / math.log(2)
        return f"the contrastive loss stands at chance: {loss:.3f} nats of {chance:.3f}, {bits:.3f} bits; {remedy}."
    return None


def ctc(config: CtcConfig, module: AudioModel) -> Objective:
    """Writes a transcript, one symbol or a blank a frame (Graves et al. 2006; Baevski et al. 2020, section 4.3).

    Batches hold `input_values` [B, T], `attention_mask` [B, T] and `labels` [B, U], -100 behind the last symbol. In
    training spans of frames, and of channels, are hidden. Term: `ctc_loss`, the mean over the symbols in nats. A row
    that has fewer frames than its transcript needs counts nothing. Scores: `blank_share` of the frames and, in
    training, `hidden_share`.
    """
    blank = module.config.pad_token_id or 0

    def inputs(batch: Batch) -> dict[str, Array]:
        return {name: jnp.asarray(batch[name]) for name in ("input_values", "attention_mask")}

    def hidden(keys: Array, lengths: Int[Array, " B"], frames: int) -> dict[str, Any]:
        masks: dict[str, Any] = {}
        time_keys, channel_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        if config.mask_probability:
            masks["mask_time_indices"] = mask_frames(
                time_keys, lengths, frames, probability=config.mask_probability, span=config.mask_length
            ).mask
        if config.channel_mask_probability:
            width = module.config.hidden_size
            masks["mask_feature_indices"] = mask_frames(
                channel_keys,
                jnp.full(len(keys), width),
                width,
                probability=config.channel_mask_probability,
                span=config.channel_mask_length,
                at_least=0,
            ).mask
        return masks

    def loss(
        params: Params, batch: Batch, keys: Array, *, train: bool, step: int | Int[Array, ""] = 0
    ) -> tuple[Means, Means]:
        mask_keys, dropout_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        labels = jnp.asarray(batch["labels"])
        lengths, frames, real = _frames(module.config, jnp.asarray(batch["attention_mask"]))
        masks = hidden(mask_keys, lengths, frames) if train else {}
        logits = module.apply(
            {"params": params}, **inputs(batch), **masks, train=train, rngs={"dropout": hashed(dropout_keys[0])}
        )["logits"]
        written = labels != IGNORED
        symbols = jnp.where(written, labels, 0)
        values = optax.ctc_loss(logits, 1.0 - real, symbols, 1.0 - written, blank_id=blank)
        # Between two equal symbols there has to be a blank.
        doubles = (symbols[:, 1:] == symbols[:, :-1]) & written[:, 1:]
        fits = lengths >= written.sum(axis=1) + doubles.sum(axis=1)
        counted = jnp.where(fits, written.sum(axis=1), 0).astype(jnp.float32)
        terms = {"ctc_loss": Mean(jnp.sum(jnp.where(fits & (counted > 0), values, 0.0)), counted.sum())}
        counted_frames = real.astype(jnp.float32)
        shares = {"blank_share": jnp.argmax(logits, axis=-1) == blank}
        if "mask_time_indices" in masks:
            shares["hidden_share"] = masks["mask_time_indices"]
        scores = {name: Mean.of(share, counted_frames) for name, share in shares.items()}
        return terms, scores | {"audio_seconds": audio_seconds(jnp.asarray(batch["attention_mask"]))}

    def predict(params: Params, batch: Batch) -> dict[str, Array]:
        _, _, real = _frames(module.config, jnp.asarray(batch["attention_mask"]))
        logits = module.apply({"params": params}, **inputs(batch))["logits"]
        return {"path": jnp.where(real, jnp.argmax(logits, axis=-1), blank)}

    return Objective(
        modules={"model": module},
        init=lambda key: initialise(module, key),
        loss=loss,
        flops=module.flops,
        alarm=partial(hides_too_much, config=config),
        predict=predict,
    )


def hides_too_much(values: Mapping[str, float], *, config: CtcConfig) -> str | None:
    """What is wrong where rows are so short that two spans are most of them, or None.

    A model that has never heard a row without a mask may write nothing of one: of words of 20 frames with two spans of
    4, one from random weights had a training loss of 0.15 and, unmasked, of 9.9 on the same words.

    Args:
        values: of the terms and scores of `ctc`.
    """
    share = values.get("hidden_share", 0.0)
    if share <= 1.5 * config.mask_probability:
        return None
    return (
        f"{share:.0%} of the frames are hidden in training, where objective.mask_probability says "
        f"{config.mask_probability:.0%}: every row, however short, has two spans of {config.mask_length}. Lower "
        "objective.mask_length, or set objective.mask_probability to 0."
    )


def _frames(config: AudioConfig, attention_mask: Int[Array, "B T"]) -> tuple[Int[Array, " B"], int, Bool[Array, "B F"]]:
    """Frames of each row that are no padding, frames of a row, and which they are."""
    frames = config.frames(attention_mask.shape[1])
    lengths = jnp.maximum(config.frames(attention_mask.sum(axis=1)), 0)
    return lengths, frames, jnp.arange(frames)[None] < lengths[:, None]


def _gradient_scaled(params: Params, factor: float) -> Params:
    """The same parameters; the gradient of the convolutions is multiplied (fairseq, `feature_grad_mult`)."""
    if factor == 1:
        return params

    def scaled(x: Float[Array, ...]) -> Float[Array, ...]:
        fixed = jax.lax.stop_gradient(x)
        return fixed + factor * (x - fixed)  # x to the bit, in any type

    flat = flatten_dict(params, sep="/")
    return unflatten_dict(
        {path: scaled(leaf) if path.startswith(FEATURE_ENCODER) else leaf for path, leaf in flat.items()}, sep="/"
    )

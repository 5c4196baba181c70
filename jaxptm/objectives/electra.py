"""A generator fills in masked tokens, and a model learns from them (ELECTRA, Clark et al. 2020).

Replaced-token detection is google-research/electra's, run_pretraining.py; All-Tokens MLM, which the paper compares it
with in section 3.4, was never published as code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxptm.config import AllTokensMlmConfig, GeneratorConfig, ReplacedTokenConfig
from jaxptm.models.params import initialise
from jaxptm.nn.heads import CopyHead
from jaxptm.nn.text import TextModel
from jaxptm.objectives.objective import Objective
from jaxptm.ops.hashed_rng import hashed
from jaxptm.ops.losses import accuracy, binary_cross_entropy, cross_entropy, token_share
from jaxptm.ops.masking import VocabularyTables, mask_with_replacement, replace_masked
from jaxptm.types import Array, Batch, JaxptmError, Mean, Means, Params

SHARED = "embeddings"
"""Token, position and type tables and their norm serve both models; each has its own `embeddings_project`."""
COPY = "copy_head"


class Corrupted(NamedTuple):
    """Rows in which a generator has filled in the masked tokens.

    Attributes:
        input_ids: what the model reads.
        original: what stood there. A token that the generator guessed right is no other than that.
        real: no padding.
        context: further arguments of the model.
        generator_loss: in nats, the mean over masked slots.
        dropout_key: of the model.
    """

    input_ids: Int[Array, "B L"]
    original: Int[Array, "B L"]
    real: Bool[Array, "B L"]
    context: dict[str, Array | None]
    generator_loss: Mean
    generator_accuracy: Mean
    dropout_key: Array

    @property
    def replaced(self) -> Bool[Array, "B L"]:
        return self.input_ids != self.original

    @property
    def weights(self) -> Float[Array, "B L"]:
        return self.real.astype(jnp.float32)


def _corrupts(
    config: GeneratorConfig, generator: TextModel, vocabulary: VocabularyTables, mask_id: int, slots: int
) -> Callable[[Params, Batch, Array, bool], Corrupted]:
    """(parameters of the generator, batch, keys of the rows, train) -> `Corrupted`."""
    is_special = jnp.asarray(vocabulary.is_special)

    def corrupt(params: Params, batch: Batch, keys: Array, train: bool) -> Corrupted:
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
        with jax.named_scope("generator"):
            guesses = generator.apply(
                {"params": params},
                masked.input_ids,
                **context,
                mlm_positions=masked.positions,
                train=train,
                rngs={"dropout": hashed(dropout_keys[0][0])},
            )["logits"]
        return Corrupted(
            replace_masked(sample_keys, ids, masked, guesses, config.temperature),
            ids,
            real,
            context,
            cross_entropy(guesses, masked.labels, masked.weights),
            accuracy(guesses, masked.labels, masked.weights),
            dropout_keys[1][0],
        )

    return corrupt


class _Pair(NamedTuple):
    """The model and its generator, and their parameters in one tree: `embeddings`, which both share, and the rest of
    each under `name` and `generator`.
    """

    name: str
    model: TextModel
    generator: TextModel

    def split(self, params: Params) -> dict[str, Params]:
        shared = {SHARED: params[SHARED]}
        return {"model": shared | params[self.name], "generator": shared | params["generator"]}

    def merge(self, model: Params, generator: Params) -> Params:
        own = ({name: part for name, part in params.items() if name != SHARED} for params in (model, generator))
        return {SHARED: model[SHARED]} | dict(zip((self.name, "generator"), own, strict=True))

    def join(self, parts: Mapping[str, Params]) -> Params:
        ours, theirs = (jax.tree.leaves(parts[name][SHARED]) for name in ("model", "generator"))
        if not all(map(np.array_equal, ours, theirs)):
            raise JaxptmError(f"the {self.name} and the generator do not have the same embeddings, which they share.")
        return self.merge(parts["model"], parts["generator"])

    def apply(self, parts: Mapping[str, Params], rows: Corrupted, train: bool, **options: bool) -> dict[str, Any]:
        """What the model makes of the rows."""
        variables, rngs = {"params": parts["model"]}, {"dropout": hashed(rows.dropout_key)}
        with jax.named_scope(self.name):  # `jaxptm.profiling` tells the two apart by it
            out: dict[str, Any] = self.model.apply(
                variables, rows.input_ids, **rows.context, train=train, rngs=rngs, **options
            )
        return out

    def init(self, key: Array) -> Params:
        return self.merge(initialise(self.model, key), initialise(self.generator, jax.random.fold_in(key, 1)))


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
    pair = _Pair("discriminator", discriminator, generator)
    corrupt = _corrupts(config, generator, vocabulary, mask_id, slots)

    def loss(
        params: Params, batch: Batch, keys: Array, *, train: bool, step: int | Int[Array, ""] = 0
    ) -> tuple[Means, Means]:
        parts = pair.split(params)
        rows = corrupt(parts["generator"], batch, keys, train)
        judged = pair.apply(parts, rows, train)["logits"]
        said, replaced, weights = judged > 0, rows.replaced, rows.weights
        found = (said & replaced).astype(jnp.float32)
        terms = {
            "generator_loss": rows.generator_loss,
            "discriminator_loss": binary_cross_entropy(judged, replaced, weights),
        }
        scores = {
            "generator_accuracy": rows.generator_accuracy,
            "discriminator_accuracy": Mean.of(said == replaced, weights),
            "discriminator_precision": Mean.of(found, weights * said),
            "discriminator_recall": Mean.of(found, weights * replaced),
            "replaced_share": Mean.of(replaced, weights),
            "token_share": token_share(rows.real),
        }
        return terms, scores

    return Objective(
        modules={"model": discriminator, "generator": generator},
        init=pair.init,
        loss=loss,
        flops=lambda rows, length: sum(module.flops(rows, length, slots) for module in (discriminator, generator)),
        coefficients={
            "generator_loss": config.generator_weight,
            "discriminator_loss": config.discriminator_weight,
        },
        split=pair.split,
        join=pair.join,
    )


def all_tokens_mlm(
    config: AllTokensMlmConfig,
    model: TextModel,
    generator: TextModel,
    vocabulary: VocabularyTables,
    mask_id: int,
    sequence_length: int,
) -> Objective:
    """A generator fills in masked tokens, and a masked LM says of every token what stood there, or that it still does.

    With D how sure the model is that a token is to be copied, the original x has probability

        D [what is read = x] + (1 - D) softmax(logits)[x]

    Batches are those of `replaced_token_detection`. Terms, in nats: `generator_loss` (mean over masked slots) and
    `model_loss` (mean over all tokens that are no padding). Scores: `model_accuracy`, how often x is the likeliest, and
    `restored_share`, how often among what was replaced.

    Parameters are `embeddings`, the rest of each model under `model` and `generator`, and `copy_head`, which belongs to
    none of them: it stays behind in the checkpoints of the run when the models leave it.
    """
    slots = config.slots(sequence_length)
    pair = _Pair("model", model, generator)
    corrupt = _corrupts(config, generator, vocabulary, mask_id, slots)
    copy_head = CopyHead(model.config, model.execution, name=COPY)
    width = model.config.hidden_size

    def init(key: Array) -> Params:
        hidden = jnp.zeros((1, 1, width), model.execution.dtype)
        return pair.init(key) | {COPY: copy_head.init(jax.random.fold_in(key, 2), hidden)["params"]}

    def join(parts: Mapping[str, Params]) -> Params:
        raise JaxptmError(
            "all-tokens-mlm: its head for copying is in the checkpoints of a run alone, so it begins with random "
            "weights or resumes, and is evaluated while it trains."
        )

    def loss(
        params: Params, batch: Batch, keys: Array, *, train: bool, step: int | Int[Array, ""] = 0
    ) -> tuple[Means, Means]:
        parts = pair.split(params)
        rows = corrupt(parts["generator"], batch, keys, train)
        out = pair.apply(parts, rows, train, output_hidden_states=True)
        copies = copy_head.apply({"params": params[COPY]}, out["hidden_states"][-1])
        nats, right = restore(copies, out["logits"], rows.input_ids, rows.original)
        terms = {"generator_loss": rows.generator_loss, "model_loss": Mean.of(nats, rows.weights)}
        scores = {
            "generator_accuracy": rows.generator_accuracy,
            "model_accuracy": Mean.of(right, rows.weights),
            "restored_share": Mean.of(right, rows.weights * rows.replaced),
            "replaced_share": Mean.of(rows.replaced, rows.weights),
            "token_share": token_share(rows.real),
        }
        return terms, scores

    def flops(rows: int, length: int) -> float:
        return model.flops(rows, length, length) + generator.flops(rows, length, slots) + 2.0 * rows * length * width

    return Objective(
        modules={"model": model, "generator": generator},
        init=init,
        loss=loss,
        flops=flops,
        coefficients={
            "generator_loss": config.generator_weight,
            "model_loss": 1 / config.mask_probability if config.model_weight is None else config.model_weight,
        },
        split=pair.split,
        join=join,
    )


def restore(
    copies: Float[Array, "B L"], logits: Float[Array, "B L V"], read: Int[Array, "B L"], original: Int[Array, "B L"]
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
    """The negative log probability of the original tokens, and whether they are the likeliest.

    Args:
        copies: log odds of D, see `all_tokens_mlm`.
        logits: over the vocabulary, where nothing is copied.
        read: what the model was given.
    """
    # Of what the vocabulary gives; the logits are not written again for it.
    chosen = jax.nn.log_sigmoid(-copies) - jax.nn.logsumexp(logits, axis=-1)
    of_original, of_read = (
        jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] for tokens in (original, read)
    )
    best = logits.max(axis=-1)
    copy = jnp.logaddexp(jax.nn.log_sigmoid(copies), chosen + of_read)
    nats = -jnp.where(original == read, copy, chosen + of_original)
    # What is read rivals the vocabulary's best alone.
    anew = (of_original >= best) & (chosen + of_original >= copy)
    return nats, jnp.where(original == read, copy >= chosen + best, anew)

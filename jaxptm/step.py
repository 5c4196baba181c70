"""The body of a training step and of an evaluation step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from jaxptm.objectives import Objective
from jaxptm.optim import apply_updates
from jaxptm.parallel import Evaluate, Evaluation, KeyData, Update
from jaxptm.types import Array, Batch, Mean, Means, Params, TrainState

NO_ROW = 2**32 - 1
"""Number of the stream of a step's key that no row has."""


def make_update(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulate: int,
    axis: str | None = None,
) -> Update:
    """One optimizer step: (state, batch, key data) -> (next state, its means).

    All randomness comes from (key, state.step, row). The means are the objective's terms and scores, `loss` (what the
    objective makes of the terms) and `grad_norm` (before clipping).

    Args:
        accumulate: microbatches that the batch is worked off in; changes memory and time, not the result.
        axis: name of a mapped axis (`jax.pmap`, `jax.shard_map`) that the rows of the batch are divided over; None
            where `batch` holds all rows.
    """

    def update(state: TrainState, batch: Batch, key: KeyData) -> tuple[TrainState, Means]:
        step_key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(key)), state.step)
        grads, means = gradients(
            objective, state.params, batch, row_keys(step_key, batch, axis), accumulate, axis, state.step
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        means["grad_norm"] = Mean(optax.tree.norm(grads), jnp.ones(()))
        params = apply_updates(state.params, updates, jax.random.fold_in(step_key, NO_ROW))
        return TrainState(state.step + 1, params, opt_state), means

    return update


def row_keys(key: Array, batch: Batch, axis: str | None = None) -> Array:
    """One key a row; where the rows are divided over a mapped axis, those of the rows that are here."""
    rows = next(iter(batch.values())).shape[0]
    if axis is None:
        return jax.random.split(key, rows)
    keys = jax.random.split(key, rows * jax.lax.axis_size(axis))
    return jax.lax.dynamic_slice_in_dim(keys, rows * jax.lax.axis_index(axis), rows)


def gradients(
    objective: Objective,
    params: Params,
    batch: Batch,
    keys: Array,
    accumulate: int,
    axis: str | None = None,
    step: int | Int[Array, ""] = 0,
) -> tuple[Params, Means]:
    """The gradient of the loss over the whole batch, in float32, and the batch's means with `loss` among them."""

    def over_devices(sums: Any) -> Any:
        return sums if axis is None else jax.lax.psum(sums, axis)

    def weights_of(batch: Batch, keys: Array) -> dict[str, Array]:
        return {
            name: term.weight for name, term in objective.loss(params, batch, keys, train=True, step=step)[0].items()
        }

    def value(params: Params, batch: Batch, keys: Array, weights: dict[str, Array] | None) -> tuple[Array, Means]:
        terms, scores = objective.loss(params, batch, keys, train=True, step=step)
        if weights is None:
            weights = over_devices(jax.lax.stop_gradient({name: term.weight for name, term in terms.items()}))
        # Each term is divided by its weight over the whole batch, so that the gradients of parts simply add up.
        loss = objective.total({name: Mean(term.total, weights[name]) for name, term in terms.items()})
        return loss, {**terms, **scores, "loss": Mean(loss, jnp.zeros(()))}

    def gradient(*arguments: Any) -> tuple[Params, Means]:
        grads, means = jax.grad(value, has_aux=True)(*arguments)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads), means  # also of bfloat16 parameters

    if accumulate == 1:
        sums = gradient(params, batch, keys, None)
    else:
        micro = microbatches((dict(batch), keys), accumulate)
        # The weights depend on the masks alone: XLA drops the model from this pass.
        weights = over_devices(jax.tree.map(jnp.sum, jax.lax.map(lambda part: weights_of(*part), micro)))

        def add(sums: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(params, *part, weights)), None

        shapes = jax.eval_shape(gradient, params, *jax.tree.map(lambda x: x[0], micro), weights)
        sums, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), micro)
    grads, means = over_devices(sums)
    means["loss"] = Mean(means["loss"].total, jnp.ones(()))
    return grads, means


def microbatches(rows: Any, accumulate: int) -> Any:
    """[B, ...] -> [accumulate, B / accumulate, ...] of each array.

    Strided, so that with the rows spread over devices every microbatch is spread as well.
    """
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), rows)


def make_evaluate(objective: Objective, accumulate: int = 1) -> Evaluate:
    """One evaluation step without dropout: (params, batch, its index, key data) -> its (terms, scores, predictions).

    The masks depend on (key, index, row) alone, so every evaluation asks the same questions. The predictions are those
    of `Objective.predict`, [B, ...] each.

    Args:
        accumulate: microbatches that the batch is worked off in; changes memory and time, not the result.
    """

    def judge(params: Params, batch: Batch, keys: Array) -> Evaluation:
        # XLA sees that both run the same model on the same rows.
        predictions = {} if objective.predict is None else objective.predict(params, batch)
        return *objective.loss(params, batch, keys, train=False), predictions

    def evaluate(params: Params, batch: Batch, index: Array, key: KeyData) -> Evaluation:
        of_batch = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(key)), index)
        parts = microbatches((dict(batch), row_keys(of_batch, batch)), accumulate)
        terms, scores, predictions = jax.lax.map(lambda part: judge(params, *part), parts)
        terms, scores = jax.tree.map(lambda sums: sums.sum(axis=0), (terms, scores))
        whole = {name: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]) for name, x in predictions.items()}
        return terms, scores, whole

    return evaluate

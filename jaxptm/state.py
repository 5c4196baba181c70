"""The state of a run: how it is made, how checkpoints hold it, and how its parameters come together for export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int

from jaxptm.config import FineTuningConfig
from jaxptm.hf import files
from jaxptm.hosts import together
from jaxptm.models.params import flatten, map_params, stacked, unstacked
from jaxptm.nn.text_config import TextConfig
from jaxptm.objectives import Objective
from jaxptm.optim import optimizer, stop_frozen
from jaxptm.parallel import Update, compile_update, mapped_axis, shardings
from jaxptm.pretrained import Model
from jaxptm.recipe import open_models
from jaxptm.run import Run
from jaxptm.step import make_update
from jaxptm.types import Array, Batch, JaxptmError, Means, Params, TrainState

SHAPELESS = ("num_attention_heads", "hidden_act", "layer_norm_eps")
"""Fields of a config that weights were trained with and whose change no shape shows."""
Rearrange = Callable[[TrainState], TrainState]


class Optimization(NamedTuple):
    """The optimizer step of a run, compiled when it is first called, and the states that it goes between."""

    update: Update
    create: Callable[[Params], TrainState]
    """Parameters -> the state at step 0."""
    shapes: TrainState
    init_key: Array
    """Of fresh parameters."""
    step_key: np.ndarray
    """Key data, of all steps."""


def optimization_of(run: Run, mesh: Mesh) -> Optimization:
    """The optimizer step that `run.config` describes, over the devices of `mesh`.

    All randomness comes from `train.seed`: stream 0 of it makes the parameters, stream 1 the steps.
    """
    config = run.config
    key = jax.random.key(config.train.seed)
    init_key, step_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    params = jax.eval_shape(run.objective.init, init_key)
    transform = optimizer(config.optimizer, run.steps, params)

    def create(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, transform.init(params))

    shapes = jax.eval_shape(create, params)
    learnt, mode = _without_frozen(run.objective, config.optimizer.frozen), config.parallel.mode
    body = make_update(learnt, transform, config.train.accumulate, mapped_axis(mesh, mode))
    update = compile_update(body, mesh, mode, shapes)
    return Optimization(update, create, shapes, init_key, np.asarray(jax.random.key_data(step_key)))


def _without_frozen(objective: Objective, frozen: Sequence[str]) -> Objective:
    def loss(
        params: Params, batch: Batch, keys: Array, *, train: bool, step: int | Int[Array, ""] = 0
    ) -> tuple[Means, Means]:
        return objective.loss(stop_frozen(params, frozen), batch, keys, train=train, step=step)

    return replace(objective, loss=loss) if frozen else objective


def stored_form(run: Run, shapes: TrainState, mesh: Mesh) -> tuple[TrainState, Rearrange, Rearrange]:
    """How a checkpoint holds the state: one entry a layer, whether the layers are scanned or not.

    Returns:
        The shapes and shardings of what is stored, and the ways there and back.
    """
    stored = jax.eval_shape(partial(map_params, unstacked), shapes)
    layout = shardings(stored, mesh)
    placed = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), stored, layout)
    if not run.objective.execution.scan:
        return placed, lambda state: state, lambda state: state
    there = jax.jit(partial(map_params, unstacked), out_shardings=layout)
    back = jax.jit(partial(map_params, stacked), out_shardings=shardings(shapes, mesh))
    return placed, there, back


def first_state(run: Run, optimization: Optimization, mesh: Mesh) -> TrainState:
    """The state at step 0, made where it stays: from fresh parameters, or from those of `init_from`."""
    create = optimization.create
    if run.config.init_from is None:

        def made(key: Array) -> TrainState:
            return create(run.objective.init(key))

        return jax.jit(made, out_shardings=shardings(optimization.shapes, mesh))(optimization.init_key)
    with together():
        params = jax.device_get(_loaded_params(run, run.config.init_from))
    params = jax.device_put(params, shardings(params, mesh))
    layout = shardings(jax.eval_shape(create, params), mesh)
    return jax.jit(create, out_shardings=layout, donate_argnums=0)(params)


def gathered(params: Params) -> Params:
    """Parameters as numpy arrays on every process."""

    def gather(leaf: Array) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(gather, params)


def _refuse_another_vocabulary(model: Model, run: Run) -> None:
    """Raises JaxptmError where the rows of the embeddings stand for other tokens than the ids of the data."""
    known = model.source is not None and files.found(model.source, files.TOKENIZER_FILES)
    if not isinstance(model.config, TextConfig) or not known:
        return
    theirs, ours = model.tokenizer.get_vocab(), run.tokenizer.get_vocab()
    if theirs != ours:
        odd = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
        raise JaxptmError(
            f"init_from: {model.source} has another vocabulary ({len(theirs)} entries) than the tokenizer of the data "
            f"({len(ours)}); they differ in {', '.join(map(repr, odd[:5]))}. Set data.tokenizer to the model's."
        )


def _loaded_params(run: Run, source: str) -> Params:
    """The parameters of `init_from`, in the form that the module has."""
    objective = run.objective
    options: dict[str, Any] = {"param_dtype": objective.execution.param_dtype, "seed": run.config.train.seed}
    if isinstance(run.config.objective, FineTuningConfig):
        options["new_head"] = run.config.objective.new_head
    if run.config.objective.name == "ctc":
        options["vocab_size"] = objective.module.config.vocab_size
    models = open_models(source, run.config, **options)
    for model in models.values():
        _refuse_another_vocabulary(model, run)
    loaded = objective.join({name: model.params for name, model in models.items()})
    ours, theirs = (
        {path: leaf.shape for path, leaf in flatten(params).items()}
        for params in (jax.eval_shape(lambda key: unstacked(objective.init(key)), jax.random.key(0)), loaded)
    )
    wrong = [
        f"{path} {theirs.get(path)} there, {ours.get(path)} here"
        for path in ours | theirs
        if ours.get(path) != theirs.get(path)
    ]
    wrong += [
        f"{name}: {field} {getattr(model.config, field)} there, {getattr(objective.modules[name].config, field)} here"
        for name, model in models.items()
        for field in SHAPELESS
        if getattr(model.config, field) != getattr(objective.modules[name].config, field)
    ]
    if wrong:
        raise JaxptmError(
            "\n  ".join([f"init_from: {source} does not fit `model`, which may name the same path:", *wrong])
        )
    return stacked(loaded) if objective.execution.scan else loaded

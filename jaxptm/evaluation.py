"""Evaluation on held-out data: while training, and of a finished run or any model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxptm.config import TrainConfig
from jaxptm.data.batching import one_pass
from jaxptm.data.tokenizer import load_tokenizer
from jaxptm.parallel import check_tensor, compile_evaluate, host_rows, make_mesh, put_batch, shardings
from jaxptm.run import Run, open_models, open_run
from jaxptm.step import make_evaluate
from jaxptm.types import JaxptmError, Params

EVALUATION = 2
"""Stream of the seed that draws the masks of an evaluation; training uses 0 (parameters) and 1 (steps)."""


def evaluate(path: str | Path, config: TrainConfig) -> dict[str, Any]:
    """Measures a model on the held-out data of `config`.

    Args:
        path: a run directory or its URL (its `model/` is taken, and for ELECTRA its `generator/`), a Hugging Face
            directory or a hub name.
        config: says the data, the objective and the masks (`train.seed`).

    Raises:
        JaxptmError: the config holds nothing out, or the model does not fit it.
    """
    models = open_models(path, config.objective, dtype=config.train.dtype)
    if len({model.source for model in models.values()}) < len(models):
        raise JaxptmError(
            f"{path}: is one model, and {config.objective.name} is measured with {' and '.join(models)} of a run; give "
            "the run's directory."
        )
    run = open_run(config, {name: model.module for name, model in models.items()})
    if run.held_out is None:
        raise JaxptmError("nothing is held out: set data.eval_files or data.eval_fraction.")
    for model in models.values():
        if model.tokenizer.get_vocab() != load_tokenizer(run.tokenizer_directory).get_vocab():
            raise JaxptmError(f"{model.source} has another vocabulary than data.tokenizer {config.data.tokenizer}.")
    mesh = make_mesh(config.parallel, config.train)
    for module in run.objective.modules.values():
        check_tensor(mesh, module.config)
    params = run.objective.join({name: model.params for name, model in models.items()})
    return make_evaluator(run, mesh)(jax.device_put(params, shardings(params, mesh)))


def make_evaluator(run: Run, mesh: jax.sharding.Mesh) -> Callable[[Params], dict[str, float]]:
    """A function of the parameters: `loss` and every term and score over the held-out examples, none lost."""
    assert run.held_out is not None
    loop, source = run.config.train, run.held_out
    rows = host_rows(mesh, loop.batch_size)
    key = jax.random.fold_in(jax.random.key(loop.seed), EVALUATION)
    step = compile_evaluate(make_evaluate(run.objective, key, loop.accumulate), mesh)

    def evaluator(params: Params) -> dict[str, float]:
        means = None
        for index, batch in enumerate(one_pass(source, loop.batch_size, loop.eval_batches, rows)):
            part = step(params, put_batch(mesh, batch, loop.batch_size), jnp.int32(index))
            means = part if means is None else jax.tree.map(jnp.add, means, part)
        terms, scores = jax.device_get(means)
        values = {name: float(mean.value) for name, mean in {**terms, **scores}.items()}
        return {"loss": float(run.objective.total(terms))} | values | run.objective.summary(values)

    return evaluator

"""Evaluation on held-out data: while training, and of a finished run or any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxptm.config import TrainConfig
from jaxptm.data.batching import Rows, one_pass
from jaxptm.data.examples import Buckets
from jaxptm.hosts import is_main
from jaxptm.parallel import check_tensor, compile_evaluate, host_rows, make_mesh, put_batch, shardings
from jaxptm.recipe import open_models
from jaxptm.resolving import resolve
from jaxptm.run import Run, open_run
from jaxptm.step import make_evaluate
from jaxptm.tasks import Outputs
from jaxptm.types import JaxptmError, Params

EVALUATION = 2
"""Stream of the seed that draws the masks of an evaluation; training uses 0 (parameters) and 1 (steps)."""


def evaluate(path: str | Path, config: TrainConfig, predictions: str | Path | None = None) -> dict[str, Any]:
    """Measures a model on the held-out data of `config`.

    Args:
        path: a run directory or its URL (its `model/` is taken, and for ELECTRA its `generator/`), a Hugging Face
            directory or a hub name.
        config: says the data, the objective and the masks (`train.seed`).
        predictions: a directory to write what the model says to, in the files that the task's official scorer reads.

    Raises:
        JaxptmError: the config holds nothing out, or the model does not fit it.
    """
    config = resolve(config, str(path))
    models = open_models(path, config, dtype=config.train.dtype)
    if len({model.source for model in models.values()}) < len(models):
        raise JaxptmError(
            f"{path}: is one model, and {config.objective.name} is measured with {' and '.join(models)} of a run; give "
            "the run's directory."
        )
    for model in models.values():
        model.refuse_random_heads()
    run = open_run(config, models)
    if not run.held_out:
        raise JaxptmError("nothing is held out: set data.eval_files, data.eval_file or data.eval_fraction.")
    if predictions is not None and not any(part.write for part in run.held_out.values()):
        raise JaxptmError(
            "--predictions: files for an official scorer are those of GLUE's test sets (data.eval_split=test) and of "
            "SQuAD; what a model says of other data `jaxptm predict` tells."
        )
    if predictions is None and not any(part.labelled for part in run.held_out.values()):
        raise JaxptmError(
            "data.eval_split: the test set of GLUE has no labels to measure with; ask for its predictions "
            "(--predictions DIR), or evaluate the split dev."
        )
    mesh = make_mesh(config.parallel, config.train)
    for module in run.objective.modules.values():
        check_tensor(mesh, module.config)
    params = run.objective.join({name: model.params for name, model in models.items()})
    params = jax.device_put(params, shardings(params, mesh))
    return Evaluator(run, mesh)(params, None if predictions is None else Path(predictions))


class Evaluator:
    """Figures over the held-out rows of a run, none lost, and what the model says of them."""

    def __init__(self, run: Run, mesh: jax.sharding.Mesh) -> None:
        """Nothing is compiled before the first call."""
        self._run, self._mesh = run, mesh
        loop = run.config.train
        self._local_rows = host_rows(mesh, loop.batch_size)
        self._key = np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(loop.seed), EVALUATION)))
        self._step = compile_evaluate(make_evaluate(run.objective, loop.accumulate), mesh)

    def __call__(self, params: Params, predictions: Path | None = None) -> dict[str, float]:
        """`loss` and every term and score, by name; those of further held-out sets as `<set>/<name>`.

        Args:
            predictions: a directory that process 0 writes what the model says to.
        """
        figures: dict[str, float] = {}
        for name, part in self._run.held_out.items():
            if not part.labelled and (predictions is None or part.write is None):
                continue
            values, outputs = self._read(params, part.rows)
            if predictions is not None and part.write is not None and is_main():
                predictions.mkdir(parents=True, exist_ok=True)
                part.write(outputs, predictions)
            if not part.labelled:
                continue
            if part.score is not None:
                values = {"loss": values["loss"]} | part.score(outputs)
            figures |= {f"{name}/{figure}" if name else figure: value for figure, value in values.items()}
        return figures

    def names(self) -> list[str]:
        """The names of what a call returns. Nothing is compiled: what would be said of each example is put at zero."""
        objective, found = self._run.objective, []
        params = jax.eval_shape(objective.init, jax.random.key(0))
        for name, part in self._run.held_out.items():
            if not part.labelled:
                continue
            plan = part.rows.plan(0) if isinstance(part.rows, Buckets) else None
            longest = 0 if plan is None else int(np.argmax(plan.lengths))
            batch = part.rows.rows([longest * self._run.config.train.batch_size])
            terms, scores, said = jax.eval_shape(make_evaluate(objective), params, batch, jnp.int32(0), self._key)
            values = dict.fromkeys([*terms, *scores], 1.0)
            figures = {"loss": 1.0} | values | objective.summary(values)
            if part.score is not None and plan is not None:
                count = sum(np.count_nonzero(places >= 0) for places in plan.examples)
                nothing = {slot: [np.zeros(rows.shape[1:], rows.dtype)] * count for slot, rows in said.items()}
                figures = {"loss": 1.0} | part.score(nothing)
            found += [f"{name}/{figure}" if name else figure for figure in figures]
        return found

    def _read(self, params: Params, source: Rows) -> tuple[dict[str, float], Outputs]:
        loop, objective = self._run.config.train, self._run.objective
        means, said = None, []
        for index, batch in enumerate(one_pass(source, loop.batch_size, loop.eval_batches, self._local_rows)):
            put = put_batch(self._mesh, batch, loop.batch_size)
            *part, outputs = self._step(params, put, jnp.int32(index), self._key)
            means = part if means is None else jax.tree.map(jnp.add, means, part)
            said.append(jax.device_get(outputs))
        if means is None:
            raise JaxptmError("the held-out data has no rows.")
        terms, scores = jax.device_get(means)
        values = {name: float(mean.value) for name, mean in {**terms, **scores}.items()}
        figures = {"loss": float(objective.total(terms))} | values | objective.summary(values)
        if not isinstance(source, Buckets):
            return figures, {}
        # Back from the order of the buckets to that of the file.
        places = np.concatenate(source.plan(0).examples)
        order = np.argsort(places, kind="stable")[np.count_nonzero(places < 0) :]
        by_slot = {name: [row for batch in said for row in batch[name]] for name in said[0]}
        return figures, {name: [rows[slot] for slot in order] for name, rows in by_slot.items()}

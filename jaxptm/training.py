"""Training: from a config to a run directory. The loop stands in plain sight in `_train`."""

from __future__ import annotations

import logging
import operator
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from jaxptm.checkpoint import Checkpoints
from jaxptm.config import AllTokensMlmConfig, TrainConfig, load_config, validate
from jaxptm.cost import StepCost, format_memory, step_cost
from jaxptm.data.batching import batches
from jaxptm.data.examples import LengthBuckets
from jaxptm.data.tokenizer import load_tokenizer
from jaxptm.directories import TOKENIZER, claim_directory
from jaxptm.evaluation import Evaluator
from jaxptm.hosts import is_main, together
from jaxptm.interruption import StopSignal, explain_failures
from jaxptm.metrics import (
    MetricsLog,
    TrainingProgress,
    plot_curves,
    progress_lines,
    read_metrics,
    versions,
    write_results,
)
from jaxptm.models import family_of
from jaxptm.models.params import unstacked
from jaxptm.nn.text import TextModel
from jaxptm.nn.text_config import TextConfig
from jaxptm.objectives import Objective
from jaxptm.optim import decayed_leaves, optimizer, schedule
from jaxptm.parallel import check_tensor, host_rows, make_mesh, matmul_ceiling, put_batch
from jaxptm.pretrained import Model
from jaxptm.recipe import make_objective, open_tokenizer
from jaxptm.resolving import hf_labels, resolve
from jaxptm.run import Run, open_run
from jaxptm.state import first_state, gathered, optimization_of, stored_form
from jaxptm.storage import Mirror, checkpoint_directory
from jaxptm.types import JaxptmError, Params, TrainState
from jaxptm.watch import Alarms, Best, Window
from jaxptm.writing import whole_directory

log = logging.getLogger("jaxptm")


def train(config: TrainConfig | Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """Trains as `config` says (or the YAML file that it names, or its fields as a dict), in the directory `config.out`.

    A directory that holds checkpoints is resumed: the run ends with the parameters, bit for bit, of one that was never
    interrupted. SIGTERM and Ctrl-C save a checkpoint and return.

    Every process of a run calls it (see `jaxptm.hosts`), with the same config and a directory that all of them see.

    Returns:
        What `results.json` says, on process 0; on the others, and where a signal ended the run early, whether it is
        `finished` and the `step`.

    Raises:
        JaxptmError: anything that the user can mend; what was saved before stays.
    """
    if isinstance(config, Mapping):
        config = validate(TrainConfig, dict(config), "config")
    elif not isinstance(config, TrainConfig):
        config = load_config(config)
    with explain_failures(config):
        return _train(config)


def _train(config: TrainConfig) -> dict[str, Any]:
    config = resolve(config)
    loop = config.train
    mesh = make_mesh(config.parallel, loop)
    mirror = claim_directory(config)
    run = open_run(config, progress=progress_lines(log.info))
    if not run.held_out and (loop.export == "best" or loop.patience is not None):
        raise JaxptmError(
            "train.export and train.patience: nothing is held out to tell the best by; hold something out "
            "(data.eval_file, data.eval_fraction), or set train.export=last and no patience."
        )
    for module in run.objective.modules.values():
        check_tensor(mesh, module.config)

    optimization = optimization_of(run, mesh)
    update, shapes = optimization.update, optimization.shapes
    learning_rate = schedule(config.optimizer, run.steps)
    evaluate = Evaluator(run, mesh)
    if run.held_out and loop.metric != "loss" and loop.metric not in (names := evaluate.names()):
        raise JaxptmError(f"train.metric: an evaluation here has no {loop.metric!r}, only {', '.join(names)}.")
    eval_every, checkpoint_every = run.every(loop.eval_every), run.every(loop.checkpoint_every)
    rows = host_rows(mesh, loop.batch_size)
    stored_shapes, to_stored, from_stored = stored_form(run, shapes, mesh)

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if not is_main():
        console = Console(quiet=True, force_terminal=False)
    for line in _introduction(run, shapes.params, mesh):
        console.print(line, markup=False)

    with Checkpoints(run.checkpoints, loop.keep, loop.metric) as checkpoints:
        restored = checkpoints.restore(stored_shapes)
        if restored is None:
            state, seconds = first_state(run, optimization, mesh), 0.0
        else:
            state, seconds = from_stored(restored[0]), restored[1]["seconds"]
            if restored[1]["corpus"] != run.corpus:
                raise JaxptmError(
                    f"{config.out}: the data has changed since its checkpoints were written; put the old data "
                    "back, or choose another `out`."
                )
        start, meta = int(state.step), {"corpus": run.corpus}

        with together():
            if is_main():
                _keep_tokenizer(run)
            metrics = MetricsLog(run.directory, enabled=is_main())
            metrics.truncate(start)
            best = Best(loop, run.directory / "metrics.jsonl")
        with metrics, TrainingProgress(run.steps, start, console) as progress, StopSignal() as stop:
            if start:
                progress.print(f"resuming at step {start} of {run.steps}")
            window = Window(run, start, peak=mesh.size * matmul_ceiling(jnp.dtype(loop.dtype)))
            alarms = Alarms(run, progress)
            clock = time.perf_counter() - seconds
            predictions, told = run.directory / "predictions", False
            ahead = 0 if best.enough else run.steps - start
            source = batches(run.train, loop.batch_size, start, ahead, rows)
            for step, batch in enumerate(source, start + 1):
                on_device = put_batch(mesh, batch, loop.batch_size)
                with window.step(on_device[run.objective.module.config.input_names[0]].shape):
                    state, means = update(state, on_device, optimization.step_key)
                window.add(means)
                progress.advance(step)

                record: dict[str, float] = {}
                evaluation: dict[str, float] = {}
                if run.held_out and (step == run.steps or step % eval_every == 0):
                    told = step == run.steps and loop.export == "last"  # what `model/` will say, in full
                    with window.paused():
                        try:
                            evaluation = evaluate(state.params, predictions if told else None)
                        except Exception:  # what has been learned is not lost; of several processes the others
                            if jax.process_count() == 1:  # may be well, and a save would wait for them
                                checkpoints.save(to_stored(state), {}, meta | {"seconds": time.perf_counter() - clock})
                            raise
                    record = {f"eval/{name}": value for name, value in evaluation.items()}
                improved = best.note(evaluation)
                last = stop.requested(step) or step == run.steps or best.enough
                if last or step % loop.log_every == 0:
                    closed = window.close()
                    alarms.sound(step, closed)
                    learned = {f"train/{name}": value for name, value in closed.items()}
                    record = learned | {"train/learning_rate": float(learning_rate(step - 1))} | record
                if record:
                    metrics.write(step, record)
                    progress.log(step, record)
                if last or improved or step % checkpoint_every == 0:
                    with window.paused():
                        mirror.try_push()  # first, so that no checkpoint knows of steps that the metrics do not
                        checkpoints.save(to_stored(state), evaluation, meta | {"seconds": time.perf_counter() - clock})
                checkpoints.check_for_errors()
                if last:
                    break
            checkpoints.wait()
            step = int(state.step)
            finished = step == run.steps or best.enough
            if not finished:
                progress.print(f"stopped at step {step} of {run.steps}, saved; the same command goes on from there.")
            elif step < run.steps:
                progress.print(f"stopped early at step {step}: {best.told}.")
            exported = checkpoints.best_step if finished and loop.export == "best" else None
            if exported is not None:
                progress.print(f"taking the parameters of step {exported}: {best.told}.")
                chosen = checkpoints.restore(stored_shapes, exported)
                assert chosen is not None
                state = from_stored(chosen[0])

        if not finished:
            with together():
                mirror.push()
            return {"finished": False, "step": step}
        if not told and any(part.write for part in run.held_out.values()):
            evaluate(state.params, predictions)
        params = gathered(state.params)
        with together():
            if is_main():
                models = export(run, params)
                results = _results(run, params, mesh, time.perf_counter() - clock, step, exported or step)
                written = (*models, plot_curves(run.directory), write_results(run.directory, results))
                mirror.push()
                log.info("written: %s", ", ".join(str(path) for path in written))
                return results
        return {"finished": True, "step": step}


def export(run: Run, params: Params) -> list[Path]:
    """Writes `model/`, and for ELECTRA `generator/`, of the run directory in Hugging Face's format, with tokenizers."""
    models = _models(run.objective, params, run.directory / TOKENIZER, run.hf_config)
    for name, model in models.items():
        model.save_pretrained(run.directory / name)
    return [run.directory / name for name in models]


def _keep_tokenizer(run: Run) -> None:
    """What stands in `data.tokenizer` or with the shards may be another one by the time that the run ends."""
    with whole_directory(run.directory / TOKENIZER, replaces=r"[^.].*") as folder:
        run.tokenizer.save_pretrained(folder)


def _models(objective: Objective, params: Params, directory: Path, hf_config: Mapping[str, Any]) -> dict[str, Model]:
    ends = {}
    if isinstance(objective.module, TextModel):
        tokenizer = load_tokenizer(directory)
        ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    return {
        name: Model(
            family_of(module.config),
            module.config,
            module.task,
            module,
            objective.split(params)[name],
            directory,
            {**ends, **hf_config},
        )
        for name, module in objective.modules.items()
    }


def restore_model(directory: str | Path, step: int | None = None, part: str = "model") -> Model:
    """The model of the newest checkpoint of a run (its directory, or URL), or of the one at `step`.

    Args:
        part: of ELECTRA's two models, `model` or `generator`.

    Raises:
        JaxptmError: the directory holds no such checkpoint or part, or no tokenizer.
    """
    mirror = Mirror(str(directory))
    config = load_config(mirror.pull("config.yaml"))
    tokenizer = mirror.pull(TOKENIZER)
    objective = make_objective(config, open_tokenizer(config, tokenizer))
    directory = checkpoint_directory(str(directory))
    if part not in objective.modules:
        raise JaxptmError(f"{directory}: the run trains no part {part!r}, only {', '.join(objective.modules)}.")
    shapes = jax.eval_shape(lambda key: unstacked(objective.init(key)), jax.random.key(0))  # as they are stored
    # Only the form of its state is wanted, which the number of steps does not change.
    transform = optimizer(config.optimizer, 10**9, shapes)
    like = jax.eval_shape(lambda params: TrainState(jnp.zeros((), jnp.int32), params, transform.init(params)), shapes)
    with Checkpoints(directory, config.train.keep) as checkpoints:
        restored = checkpoints.restore(like, step)
    if restored is None:
        raise JaxptmError(f"{directory}: holds no checkpoint{'' if step is None else f' of step {step}'}.")
    model = _models(objective, restored[0].params, tokenizer, hf_labels(config))[part]
    unscanned = replace(model.module.execution, scan=False)  # as the parameters are stored
    return replace(model, module=model.module.clone(execution=unscanned))


def newest_step(directory: str | Path) -> int | None:
    """Of the checkpoints of a run, damaged ones included; None where there is none."""
    config = load_config(Mirror(str(directory)).pull("config.yaml"))
    with Checkpoints(checkpoint_directory(str(directory)), config.train.keep) as checkpoints:
        return checkpoints.latest_step


def _introduction(run: Run, params: Params, mesh: Mesh) -> list[str]:
    """What a user checks before letting a run go on."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    # One entry a kind of leaf, not a layer.
    kinds = (re.sub(r"layer_\d+", "layer_*", path) for path in decayed_leaves(jax.eval_shape(unstacked, params)))
    decayed = dict.fromkeys(kinds)
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    return [
        f"{run.checkpoints.parent}: {run.config.objective.name}, {count:,} parameters, {devices}",
        f"{len(run.train):,} rows an epoch, {run.train.token_share():.1%} of what they hold is not padding",
        f"weight decay {run.config.optimizer.weight_decay} on {', '.join(decayed)}",
        *_cut(run),
        *_repeated(run),
        *([format_memory(_cost(run, mesh))] if isinstance(run.objective.module, TextModel) else []),
    ]


def _repeated(run: Run) -> list[str]:
    rows, batch = len(run.train), run.config.train.batch_size
    if rows >= batch:
        return []
    return [f"WARNING: {rows:,} rows are fewer than train.batch_size {batch}, so that each batch holds some repeatedly"]


def _cut(run: Run) -> list[str]:
    """How many texts are read in part."""
    rows = {"": run.train, **{name or "held out": part.rows for name, part in run.held_out.items()}}
    found = {name: source.examples for name, source in rows.items() if isinstance(source, LengthBuckets)}
    told = [
        f"{examples.cut:,} of {len(examples.ends):,}{name and f' ({name})'}"
        for name, examples in found.items()
        if examples.cut
    ]
    limit = getattr(run.config.data, "max_length", None)
    return [f"cut to data.max_length {limit}: {', '.join(told)} texts"] if told else []


def _cost(run: Run, mesh: Mesh) -> StepCost:
    loop, objective, settings = run.config.train, run.objective, run.config.objective
    choices = run.train.examples.choices if isinstance(run.train, LengthBuckets) else 0
    costs = [
        step_cost(
            module.config,
            module.task,
            module.execution,
            rows=loop.batch_size * max(choices, 1),
            length=run.length,
            predictions=run.length
            if name == "model" and isinstance(settings, AllTokensMlmConfig)
            else settings.slots(run.length),
            accumulate=loop.accumulate,
            shares_embeddings=name != "model",
            **mesh.shape,
        )
        for name, module in objective.modules.items()
        if isinstance(module.config, TextConfig)
    ]
    return reduce(operator.add, costs)


def _results(run: Run, params: Params, mesh: Mesh, seconds: float, step: int, exported: int) -> dict[str, Any]:
    lines = read_metrics(run.directory / "metrics.jsonl")

    def newest(prefix: str, until: int) -> dict[str, float]:
        values = [pair for line in lines if line["step"] <= until for pair in line.items()]
        return {name.removeprefix(prefix): value for name, value in values if name.startswith(prefix)}

    def typical(name: str) -> float | None:
        values = [line[name] for line in lines if name in line]
        return statistics.median(values) if values else None

    return {
        "finished": True,
        "step": step,
        "exported_step": exported,
        "train": newest("train/", step),
        "eval": newest("eval/", exported),
        **{name: rate for name in Window.COUNTED.values() if (rate := typical(f"train/{name}")) is not None},
        "utilisation": typical("train/utilisation"),
        "seconds": seconds,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "devices": [device.device_kind for device in mesh.devices.flat],
        "versions": versions(),
        "config": run.config.model_dump(mode="json"),
    }

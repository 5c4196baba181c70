"""How fast a config trains, and where the time of a step goes."""

from __future__ import annotations

import logging
import math
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxptm.config import TrainConfig
from jaxptm.data.batching import batches
from jaxptm.hosts import is_main
from jaxptm.interruption import explain_failures
from jaxptm.metrics import MetricsLog, progress_lines, versions
from jaxptm.parallel import accepted, check_tensor, host_rows, make_mesh, matmul_ceiling, put_batch
from jaxptm.profiling import Part, table, time_by_module
from jaxptm.resolving import resolve
from jaxptm.run import Run, open_run
from jaxptm.state import first_state, optimization_of
from jaxptm.types import Batch, JaxptmError, TrainState
from jaxptm.watch import Window

log = logging.getLogger("jaxptm")
ROUNDS = 3
"""Times that each speed is measured; the median counts."""
PROFILED_STEPS = 5
PIPELINE_BATCHES, PIPELINE_SECONDS = 200, 2.0
"""How much is read to time the pipeline alone: the batches, or what comes in the seconds."""
RATES = tuple(Window.COUNTED.values())
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes, in `getrusage`."""
Shape = tuple[int, ...]


class Timed(NamedTuple):
    """One shape of batch.

    Attributes:
        shape: of the model's main input.
        batches: of this shape among the steps.
        compile_seconds: from the step's trace to the end of its first run; little where XLA's persistent cache has it.
        step_seconds: of a step, on a batch that is on the device.
        model_flops: of a step, three times the matrix products of a forward pass.
        allocated: bytes that XLA plans for the step on one device, the state included; None under `pmap`.
    """

    shape: Shape
    batches: int
    compile_seconds: float
    step_seconds: float
    model_flops: float
    allocated: int | None


class Loop(NamedTuple):
    """Steps as in training: of each its seconds and those spent waiting for its batch; what was read a second."""

    step_seconds: float
    input_seconds: float
    rates: dict[str, float]


def benchmark(config: TrainConfig, steps: int = 20, profile: str | Path | None = None) -> dict[str, Any]:
    """Trains some steps on the data of `config` and says what they cost; nothing is written to `config.out`.

    The corpus is prepared first where that has not been done.

    Args:
        steps: of the run, from its second batch on, whose time is split.
        profile: a directory for a trace of some of them, for TensorBoard's profiler and ui.perfetto.dev. It also has
            the parts of the model measured.

    Returns:
        Seconds, bytes, and floating point operations:

        - `step_seconds`: of a step as in training, from the wait for its batch to its line in the log. It is the sum of
          `input_seconds` (waiting for the pipeline), `compute_seconds` (the step on batches that are on the device) and
          `other_seconds` (copying to the device, starting the step, logging). These overlap on an accelerator, so the
          last may be below zero.
        - `pipeline_seconds`: the pipeline alone, a batch.
        - `tokens_per_second` or `audio_seconds_per_second`: without padding, as the log of a run has them.
        - `utilisation`: of `ceiling_flops`, which a large matrix product reached just now on each device, by the whole
          step; `compute_utilisation`: by the computation alone.
        - `shapes`: a `Timed` each, as a dict.
        - `memory`: `allocated`, by XLA for the largest step; `device_peak`, what the first device has held at most
          (None where it does not tell); `host_peak`, of this process.
        - `parts`: of the model, with `profile`: a `profiling.Part` each, as a dict, of a step of the shape that is most
          frequent. Empty under `pmap`, whose programs cannot be read.

    Raises:
        JaxptmError: whatever `open_run` finds, or fewer than 1 step.
    """
    if steps < 1:
        raise JaxptmError(f"--steps {steps}: measure at least 1.")
    config = resolve(config)
    with explain_failures(config):
        return _benchmark(config, steps, profile)


def _benchmark(config: TrainConfig, steps: int, profile: str | Path | None) -> dict[str, Any]:
    mesh = make_mesh(config.parallel, config.train)
    run = open_run(config, progress=progress_lines(log.info))
    for module in run.objective.modules.values():
        check_tensor(mesh, module.config)
    rows = config.train.batch_size
    here = host_rows(mesh, rows)
    optimization = optimization_of(run, mesh)
    state = first_state(run, optimization, mesh)
    ceiling = matmul_ceiling(jnp.dtype(config.train.dtype))

    samples: dict[Shape, Any] = {}
    count: Counter[Shape] = Counter()
    for batch in _read(run, here, steps):
        shape = _shape(run, batch)
        samples.setdefault(shape, batch)
        count[shape] += 1

    updates: dict[Shape, Any] = {}
    timed: list[Timed] = []
    for shape in sorted(samples):
        on_device = put_batch(mesh, samples[shape], rows)
        inputs = (on_device, optimization.step_key)
        began = time.perf_counter()
        updates[shape], allocated = _compiled(optimization.update, state, *inputs)
        state, _ = jax.block_until_ready(updates[shape](state, *inputs))
        compile_seconds = time.perf_counter() - began
        state, seconds = _step_seconds(updates[shape], state, inputs, max(1, steps // ROUNDS))
        *whole_rows, length = _shape(run, on_device)  # of all hosts
        flops = 3 * run.objective.flops(math.prod(whole_rows), length)
        timed.append(Timed(shape, count[shape], compile_seconds, seconds, flops, allocated))
        log.info("%s: compiled in %.1f s, %s a step", _by(shape), compile_seconds, _milliseconds(seconds))

    window = Window(run, 0, peak=mesh.size * ceiling)
    for shape in samples:
        with window.step(shape):
            pass  # compiled already, so that its first step is a step as any other

    def trained(state: TrainState, steps: int, metrics: MetricsLog) -> tuple[TrainState, Loop]:
        """The loop of a run."""
        counts: dict[str, list[Any]] = {}
        source = _read(run, here, steps)
        began, waited = time.perf_counter(), 0.0
        for step in range(1, steps + 1):
            asked = time.perf_counter()
            batch = next(source)
            waited += time.perf_counter() - asked
            shape = _shape(run, batch)
            with window.step(shape):
                state, means = updates[shape](state, put_batch(mesh, batch, rows), optimization.step_key)
            window.add(means)
            for name in Window.COUNTED.keys() & means.keys():
                counts.setdefault(Window.COUNTED[name], []).append(means[name].total)
            if step % config.train.log_every == 0:
                metrics.write(step, window.close())
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        window.close()
        rates = {name: float(sum(jax.device_get(totals))) / seconds for name, totals in counts.items()}
        return state, Loop(seconds / steps, waited / steps, rates)

    with tempfile.TemporaryDirectory() as scratch, MetricsLog(scratch, enabled=is_main()) as metrics:
        metrics.write(0, {})
        loops = []
        for _ in range(ROUNDS):
            state, loop = trained(state, steps, metrics)
            loops.append(loop)
        if profile is not None and jax.default_backend() == "gpu":
            # A GPU is given the operations of a step as one command, and the profiler would see but that.
            options = accepted({"xla_gpu_enable_command_buffer": ""})
            for shape, batch in samples.items():
                inputs = (put_batch(mesh, batch, rows), optimization.step_key)
                updates[shape], _ = _compiled(optimization.update, state, *inputs, **options)
        if profile is not None:
            with jax.profiler.trace(str(profile), create_perfetto_trace=True):
                state, _ = trained(state, min(steps, PROFILED_STEPS), metrics)
    parts: list[Part] = []
    commonest = count.most_common(1)[0][0]
    if profile is not None and config.parallel.mode == "pmap":
        log.warning("parallel.mode: pmap: what it compiles cannot be read, so the modules are not timed")
    elif profile is not None:
        on_device = put_batch(mesh, samples[commonest], rows)

        def step() -> Any:
            nonlocal state
            state, means = updates[commonest](state, on_device, optimization.step_key)
            return means

        parts = time_by_module(step, min(steps, PROFILED_STEPS), updates[commonest].as_text(), state.params)
        if not parts:
            log.warning("the profiler saw none of the step's operations, so the modules are not timed")
    whole = sorted(loops, key=lambda loop: loop.step_seconds)[ROUNDS // 2]
    compute = sum(each.batches * each.step_seconds for each in timed) / steps
    flops = sum(each.batches * each.model_flops for each in timed) / steps
    allocated_bytes = [each.allocated for each in timed if each.allocated is not None]
    return {
        "step_seconds": whole.step_seconds,
        "input_seconds": whole.input_seconds,
        "compute_seconds": compute,
        "other_seconds": whole.step_seconds - whole.input_seconds - compute,
        "pipeline_seconds": _pipeline_seconds(run, here),
        **whole.rates,
        "utilisation": flops / whole.step_seconds / mesh.size / ceiling,
        "compute_utilisation": flops / compute / mesh.size / ceiling,
        "ceiling_flops": ceiling,
        "model_flops": flops,
        "compile_seconds": sum(each.compile_seconds for each in timed),
        "shapes": [each._asdict() for each in timed],
        "memory": {
            "allocated": max(allocated_bytes, default=None),
            "device_peak": (mesh.local_devices[0].memory_stats() or {}).get("peak_bytes_in_use"),
            "host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT,
        },
        "parts": [each._asdict() for each in parts],
        "objective": config.objective.name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "steps": steps,
        "devices": [device.device_kind for device in mesh.devices.flat],
        "versions": versions(),
        "config": config.model_dump(mode="json"),
    }


def summary(figures: Mapping[str, Any]) -> str:
    """The figures of `benchmark` for people."""
    devices = Counter(figures["devices"])
    memory = {
        "planned by XLA": figures["memory"]["allocated"],
        "held by the device at most": figures["memory"]["device_peak"],
        "held by this process at most": figures["memory"]["host_peak"],
    }
    rates = {name: name.removesuffix("_per_second").replace("_", " ") for name in RATES if name in figures}
    lines = [
        f"{figures['objective']}, {figures['parameters']:,} parameters, "
        f"{', '.join(f'{count} x {kind}' for kind, count in devices.items())}, {figures['config']['train']['dtype']}",
        "",
        f"{'batch':>16}  {'steps':>5}  {'compile':>8}  {'step':>10}  {'utilisation':>11}",
    ]
    peak = figures["ceiling_flops"] * len(figures["devices"])
    for each in figures["shapes"]:
        share = each["model_flops"] / each["step_seconds"] / peak
        lines.append(
            f"{_by(each['shape']):>16}  {each['batches']:>5}  {each['compile_seconds']:>6.1f} s  "
            f"{_milliseconds(each['step_seconds']):>10}  {share:>11.1%}"
        )
    parts = (f"{name} {_milliseconds(figures[f'{name}_seconds'])}" for name in ("input", "compute", "other"))
    lines += [
        "",
        f"a step: {_milliseconds(figures['step_seconds'])} ({', '.join(parts)})",
        f"the input pipeline alone: {_milliseconds(figures['pipeline_seconds'])} a batch",
        *(f"{figures[name]:,.0f} {what} a second" for name, what in rates.items()),
        f"utilisation: {figures['utilisation']:.1%}, by the computation alone {figures['compute_utilisation']:.1%}, of "
        f"the {figures['ceiling_flops'] / 1e9:,.0f} GFLOP/s that a large matrix product reaches here on a device",
        "memory: " + ", ".join(f"{size / 2**20:,.0f} MiB {what}" for what, size in memory.items() if size is not None),
    ]
    if figures["parts"]:
        lines += ["", table([Part(**each) for each in figures["parts"]])]
    return "\n".join(lines)


def _compiled(update: Any, state: TrainState, *inputs: Any, **options: Any) -> tuple[Any, int | None]:
    """The step for one shape, and the bytes of its plan; with `pmap`, which has none, the step as it was."""
    if not hasattr(update, "lower"):
        return update, None
    compiled = update.lower(state, *inputs).compile(compiler_options=options)
    plan = compiled.memory_analysis()
    if plan is None:
        return compiled, None
    return compiled, (
        plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes
    )


def _step_seconds(update: Any, state: TrainState, inputs: Any, steps: int) -> tuple[TrainState, float]:
    """The state after some steps on the same inputs, and the seconds of one."""
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(steps):
            state, _ = update(state, *inputs)
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - began) / steps)
    return state, statistics.median(seconds)


def _read(run: Run, here: Any, steps: int) -> Iterator[dict[str, Any]]:
    """The batches of steps 1 and on; that of step 0 is read already, and with it the reading threads have begun."""
    source = batches(run.train, run.config.train.batch_size, 0, steps + 1, here)
    next(source)
    return source


def _pipeline_seconds(run: Run, here: Any) -> float:
    """Of one batch, read as fast as it goes. Many, for the first ones have been read ahead."""
    source = _read(run, here, PIPELINE_BATCHES)
    began, read, seconds = time.perf_counter(), 0, 0.0
    while read < PIPELINE_BATCHES and seconds < PIPELINE_SECONDS:
        next(source)
        read, seconds = read + 1, time.perf_counter() - began
    return seconds / read


def _shape(run: Run, batch: Batch) -> Shape:
    return tuple(batch[run.objective.module.config.input_names[0]].shape)


def _by(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"

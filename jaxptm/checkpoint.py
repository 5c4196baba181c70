"""Checkpoints of a training run: saved in the background, restored onto any devices, never half.

Orbax writes each one into a temporary directory and renames it when it is whole. A list of checksums travels inside,
so that damage that happens later (a truncated file, a bad disk) is noticed before anything is restored.

In a bucket, where renaming is copying, Orbax writes a file `commit_success.txt` instead once a checkpoint is whole; and
buckets keep checksums of their own.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import SingleDeviceSharding

from jaxptm.checksums import damage_of, write_checksums
from jaxptm.hosts import is_main, together
from jaxptm.storage import is_remote, reachable
from jaxptm.types import JaxptmError, TrainState

logger = logging.getLogger(__name__)
# Orbax narrates through absl; what a user must know is said here, once.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)

_TEMPORARY = ".orbax-checkpoint-tmp"


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and besides them the best one by a figure of its evaluation.

    One directory a step holds two items: `state` (step, parameters, optimizer state) and `meta` (small JSON).

    Only saving changes what is on disk, so a run can be read while it trains.
    """

    def __init__(self, directory: str | Path | Any, keep: int, metric: str = "loss") -> None:
        """Opens `directory` (an `epath.Path` for one in a bucket), made when absent; `keep` >= 1.

        Args:
            metric: the figure that names the best one (see `is_better`).

        Raises:
            JaxptmError: the directory cannot be made or reached.
        """
        self._remote = is_remote(str(directory))
        self.directory: Path | Any = epath.Path(directory) if self._remote else Path(directory).absolute()
        self._keep = keep
        self._metric = metric
        self._figures: dict[int, float] = {}
        self._damaged: list[int] = []
        self._cleared = False
        self._saving: int | None = None
        with together(), self._usable():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._leftovers = self._unfinished()
        with self._usable():
            self._manager = self._open()
        for step in self._manager.all_steps():
            self._note_figure(step)

    @property
    def latest_step(self) -> int | None:
        """The newest step on disk, or being written."""
        return self._manager.latest_step()

    @property
    def saving(self) -> bool:
        """Something is still being written in the background."""
        return self._saving is not None and self._manager.is_saving_in_progress()

    @property
    def best_step(self) -> int | None:
        """The step with the best evaluation, the first of equals, or None when none was evaluated."""
        best = None
        for step in self._manager.all_steps():
            than = None if best is None else self._figures[best]
            if step in self._figures and is_better(self._metric, self._figures[step], than):
                best = step
        return best

    def save(self, state: TrainState, metrics: Mapping[str, SupportsFloat] | None, meta: Mapping[str, Any]) -> None:
        """Begins to save `state` under its own step and returns once it may be donated or overwritten.

        Waits for the save before it. A step that is saved already stays as it is.

        Args:
            state: arrays of any sharding.
            metrics: of an evaluation at this step, or None; the run's figure among them says which checkpoint is best.
            meta: small JSON that `restore` hands back.

        Raises:
            JaxptmError: this save could not begin, or the one before it has failed; for instance the disk is full.
        """
        self.wait()
        self._set_aside()
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        if jax.default_backend() == "cpu":
            # Orbax reads the buffers themselves in the background; on other backends it has copied them to the host.
            state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        evaluation = {name: float(value) for name, value in (metrics or {}).items()}
        if math.isfinite(evaluation.get(self._metric, math.nan)):
            self._figures[step] = evaluation[self._metric]
        self._saving = step
        with self._reported():
            record = {"meta": dict(meta), "metrics": evaluation}
            items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(record))
            self._manager.save(step, args=items, force=True)

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]] | None:
        """Reads the newest whole checkpoint, or that of `step`.

        Half-written and damaged ones are passed over, each with one logged sentence.

        Args:
            like: arrays or `jax.ShapeDtypeStruct`s: the structure, shapes, types and shardings to restore. The devices
                need not be those that saved. A leaf without a sharding goes to the first device.

        Returns:
            The state and its `meta`; None when there is no checkpoint at all.

        Raises:
            JaxptmError: the checkpoint holds another model or optimizer, or every checkpoint is damaged.
        """
        self.wait()
        self._cleared = False
        whole = None
        with together():
            if is_main():
                whole = self._newest_whole(step)
        # What process 0 has chosen, the others restore as well.
        (chosen,) = broadcast_one_to_all(np.array([-1 if whole is None else whole]))
        return None if chosen < 0 else self._read(int(chosen), like)

    def check_for_errors(self) -> None:
        """Raises the JaxptmError of a background save that has failed; never waits."""
        if not self.saving:
            self.wait()

    def wait(self) -> None:
        """Waits until the save in progress is on disk; raises JaxptmError when it failed."""
        if self._saving is not None:
            with self._reported():
                self._manager.wait_until_finished()
            self._saving = None

    def close(self) -> None:
        """Waits as `wait` does, and ends the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        died = kind is not None and issubclass(kind, jax.errors.JaxRuntimeError) and jax.process_count() > 1
        if not died:  # else the save in progress would wait for the process that is gone
            self.close()

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            with reachable(str(self.directory)) if self._remote else nullcontext():
                yield
        except OSError as error:
            raise JaxptmError(f"{self.directory}: cannot be used for checkpoints: {error.strerror}.") from error

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(self),
            lightweight_initialize=True,
            save_root_metadata=False,
            async_options=ocp.AsyncOptions(post_finalization_callback=None if self._remote else self._write_checksums),
        )
        registry = ocp.DefaultCheckpointHandlerRegistry()
        state, meta = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
        registry.add("state", ocp.args.StandardSave, state)
        registry.add("state", ocp.args.StandardRestore, state)
        registry.add("meta", ocp.args.JsonSave, meta)
        registry.add("meta", ocp.args.JsonRestore, meta)
        return ocp.CheckpointManager(self.directory, options=options, handler_registry=registry)

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        path = self.directory / str(step)
        try:
            saved = _leaves(self._manager.item_metadata(step).state.tree)
            differences = _differences(saved, _leaves(like))
            if not differences:
                items = ocp.args.Composite(
                    state=ocp.args.StandardRestore(jax.tree.map(_abstract, like)), meta=ocp.args.JsonRestore()
                )
                restored = self._manager.restore(step, args=items)
                return restored.state, restored.meta["meta"]
        except Exception as error:
            whole = "" if self._remote else " though its files are whole"
            raise JaxptmError(f"{path}: cannot be restored{whole}: {_reason(error)}.") from error
        shown, more = "; ".join(differences[:4]), len(differences) - 4
        raise JaxptmError(
            f"{path}: holds another model or optimizer: {shown}{f'; and {more} more' if more > 0 else ''}. "
            "Go back to the config and the text that trained it, or choose another `out`."
        )

    def _newest_whole(self, step: int | None) -> int | None:
        for path in self._leftovers:
            logger.warning("%s was never finished and is passed over.", path)
        steps = sorted(self._manager.all_steps(), reverse=True)
        if step is not None:
            steps = [candidate for candidate in steps if candidate == step]
        for candidate in steps:
            path = self.directory / str(candidate)
            damage = None if self._remote else damage_of(path)
            if damage is None:
                return candidate
            logger.warning("%s is damaged (%s) and is passed over.", path, damage)
            if candidate not in self._damaged:
                self._damaged.append(candidate)
        if steps and step is not None:
            others = [str(other) for other in sorted(self._manager.all_steps()) if other != step]
            named = f" ({', '.join(others)})" if others else ""
            raise JaxptmError(
                f"{self.directory / str(step)}: is damaged; name another step{named}, or restore a backup."
            )
        if steps:
            raise JaxptmError(
                f"{self.directory}: every checkpoint is damaged (steps {', '.join(map(str, steps))}); "
                "restore them from a backup, or delete the directory to train from the start."
            )
        return None

    def _note_figure(self, step: int) -> None:
        try:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            figure = float(meta["metrics"][self._metric])
        except Exception:  # damaged, or never evaluated: it is no candidate for the best
            return
        if math.isfinite(figure):
            self._figures[step] = figure

    def _set_aside(self) -> None:
        """Makes way for saving: damaged steps are renamed, and what killed runs left half-written is deleted."""
        if self._cleared:
            return
        self._cleared = True
        with together():
            if is_main():
                for path in self._leftovers:
                    _remove(path)
                for step in self._damaged:
                    path = self.directory / f"{step}.damaged"
                    _remove(path)
                    (self.directory / str(step)).rename(path)
                self._leftovers, self._damaged = [], []
        self._manager.reload()

    def _write_checksums(self) -> None:
        """Runs in the background after the items are written, before their directory gets its final name."""
        if is_main():
            path = self.directory / str(self._saving)
            path = next(self.directory.glob(f"{self._saving}{_TEMPORARY}*"), path)
            write_checksums(path)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            step, self._saving = self._saving, None
            self._recover(step)
            remedy = "free some space" if _is_full(error) else "remove the cause"
            raise JaxptmError(
                f"{self.directory}: the checkpoint of step {step} could not be saved: {_reason(error)}. "
                f"Earlier checkpoints are intact; {remedy} and run the same command again."
            ) from error

    def _recover(self, step: int | None) -> None:
        self._figures.pop(step, None)  # type: ignore[arg-type]
        with suppress(Exception):  # a bucket out of reach; the error that brought us here is the one to tell
            if is_main():
                for path in self._unfinished():
                    if path.name.partition(".")[0] == str(step):
                        _remove(path)
            self._manager.reload()

    def _unfinished(self) -> list[Path | Any]:
        """What saves that were killed, or have failed, left behind."""
        found = sorted(self.directory.iterdir()) if self.directory.exists() else []  # buckets know no empty directory
        if self._remote:
            return [path for path in found if path.name.isdigit() and not ocp.utils.is_checkpoint_finalized(path)]
        return [path for path in found if _TEMPORARY in path.name]


def is_better(metric: str, value: float, than: float | None) -> bool:
    """Whether an evaluation is better than another: lower, of losses, perplexities and errors; larger, of all else."""
    if than is None or not math.isfinite(than):
        return math.isfinite(value)
    lower = metric.endswith(("loss", "error", "entropy", "perplexity")) or metric.split("/")[-1] in ("wer", "cer")
    return value < than if lower else value > than


class _NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Which checkpoints stay; Orbax asks after each save and deletes the others once the new one is whole."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        newest = {info.step for info in checkpoints[-self._checkpoints._keep :]}
        return [info.step in newest or info.step == self._checkpoints.best_step for info in checkpoints]


def _remove(path: Path | Any) -> None:
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(Exception):  # each driver raises its own kinds
            path.rmtree()


def _leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    def form(leaf: Any) -> str:
        return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"

    differences = []
    for name in dict.fromkeys([*wanted, *saved]):
        if name not in saved:
            differences.append(f"`{name}` is missing")
        elif name not in wanted:
            differences.append(f"`{name}` is not wanted")
        elif form(saved[name]) != form(wanted[name]):
            differences.append(f"`{name}` is {form(saved[name])}, not {form(wanted[name])}")
    return differences


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_full(error: BaseException) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT)
    return any(
        getattr(link, "errno", None) in codes or any(os.strerror(code) in str(link) for code in codes)
        for link in _chain(error)
    )


def _reason(error: BaseException) -> str:
    if _is_full(error):
        return "the disk is full"
    return str(error).split("\n")[0].rstrip(".") or type(error).__name__

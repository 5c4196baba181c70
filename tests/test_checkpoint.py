"""Checkpoints: bit-exact, atomic, and clear about everything that goes wrong."""

from __future__ import annotations

import ctypes
import errno
import functools
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxptm import checkpoint
from jaxptm.checkpoint import Checkpoints, is_better
from jaxptm.checksums import damage_of
from jaxptm.types import JaxptmError, TrainState


def make_state(step: int, width: int = 4, seed: int = 0) -> TrainState:
    """Random leaves in the structure that a chained, masked optimizer gives, bfloat16 among them."""
    random = np.random.default_rng(seed)
    shapes = {"encoder": {"kernel": np.zeros((width, 8), np.float32), "bias": np.zeros(8, np.float32)}}
    params = {**shapes, "half": np.zeros(width, jnp.bfloat16)}
    decay = optax.adamw(optax.linear_schedule(1e-3, 0.0, 10), mask={"encoder": True, "half": False})
    opt_state = jax.eval_shape(optax.chain(optax.clip_by_global_norm(1.0), decay).init, params)
    fill = functools.partial(jax.tree.map, lambda x: jax.device_put((99 * random.normal(size=x.shape)).astype(x.dtype)))
    return TrainState(jax.device_put(np.int32(step)), fill(params), fill(opt_state))


def blank(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert got.dtype == wanted.dtype
        assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()


def steps_on_disk(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def test_round_trip_is_bit_exact_and_keeps_the_structure(tmp_path: Path) -> None:
    state = make_state(7)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state, {"loss": 1.5}, {"fingerprint": "abc"})
    for like in (make_state(0, seed=1), jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)):
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            assert (checkpoints.latest_step, checkpoints.best_step) == (7, 7)
            found = checkpoints.restore(like)
        assert found is not None
        assert_same(found[0], state)
        assert found[1] == {"fingerprint": "abc"}


def test_an_empty_directory_holds_nothing(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "new", keep=1) as checkpoints:
        assert checkpoints.latest_step is None
        assert checkpoints.best_step is None
        assert checkpoints.restore(make_state(0)) is None


def test_the_newest_and_the_best_are_kept_across_restarts(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: None, 6: 1.5}
    for step, loss in losses.items():
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            checkpoints.save(make_state(step), None if loss is None else {"loss": loss}, {})
    assert steps_on_disk(tmp_path) == [2, 5, 6]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (6, 2)
        checkpoints.save(make_state(7), {"loss": 0.5}, {})
        checkpoints.wait()
        assert checkpoints.best_step == 7
        best = checkpoints.restore(make_state(0), step=6)
        assert best is not None
        assert int(best[0].step) == 6
    assert steps_on_disk(tmp_path) == [6, 7]


def test_saving_a_step_twice_keeps_the_first(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(make_state(3, seed=0), None, {"try": 1})
        checkpoints.save(make_state(3, seed=1), None, {"try": 2})
        found = checkpoints.restore(blank(make_state(3)))
    assert found is not None
    assert_same(found[0], make_state(3, seed=0))
    assert found[1] == {"try": 1}


def test_the_state_may_be_donated_or_overwritten_right_after_save(tmp_path: Path) -> None:
    state = TrainState(jnp.int32(1), {"large": jax.random.normal(jax.random.key(0), (2_000_000,))}, ())
    state = jax.block_until_ready(state)
    expected = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 3, state), donate_argnums=0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        leaf = state.params["large"]
        checkpoints.save(state, None, {})
        ctypes.memset(leaf.unsafe_buffer_pointer(), 7, leaf.nbytes)  # ruder than any donation
        step(step(state))
        found = checkpoints.restore(expected)
    assert found is not None
    assert_same(found[0], expected)


def test_a_save_that_was_killed_is_passed_over_and_cleared_by_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(make_state(1), None, {})
    half = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", half)
    (half / "checksums.json").unlink()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with caplog.at_level(logging.WARNING):
            found = checkpoints.restore(blank(make_state(1)))
        assert found is not None
        assert int(found[0].step) == 1
        assert [record.getMessage() for record in caplog.records] == [f"{half} was never finished and is passed over."]
        assert half.exists()
        checkpoints.save(make_state(2), None, {})
    assert not half.exists()
    assert steps_on_disk(tmp_path) == [1, 2]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("part", ["array", "state/_METADATA", "meta/metadata", "checksums.json"])
def test_a_damaged_newest_checkpoint_falls_back_and_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str, damage: Any
) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(make_state(step, width=1000, seed=step), {"loss": 1.0 / step}, {})
    files = [path for path in (tmp_path / "2" / "state").rglob("*") if path.is_file()]
    damage(max(files, key=lambda path: path.stat().st_size) if part == "array" else tmp_path / "2" / part)

    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with caplog.at_level(logging.WARNING):
            found = checkpoints.restore(blank(make_state(0, width=1000)))
        assert found is not None
        assert_same(found[0], make_state(1, width=1000, seed=1))
        (message,) = [record.getMessage() for record in caplog.records]
        assert str(tmp_path / "2") in message
        assert "damaged" in message
        checkpoints.save(make_state(2, width=1000, seed=3), None, {})
        found = checkpoints.restore(blank(make_state(0, width=1000)))
        assert found is not None
        assert_same(found[0], make_state(2, width=1000, seed=3))
    assert steps_on_disk(tmp_path) == [1, 2]
    assert (tmp_path / "2.damaged").is_dir()


@pytest.mark.parametrize("list_of", ["[]", "null", "{}"])
def test_a_list_of_checksums_that_names_no_file_is_damage(list_of: str, tmp_path: Path) -> None:
    (tmp_path / "checksums.json").write_text(list_of)
    assert damage_of(tmp_path) == "checksums.json names no files"


def test_when_every_checkpoint_is_damaged_nothing_restarts_silently(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(make_state(1), None, {})
        checkpoints.wait()
        truncate(tmp_path / "1" / "meta" / "metadata")
        with pytest.raises(JaxptmError, match=r"every checkpoint is damaged \(steps 1\)"):
            checkpoints.restore(blank(make_state(0)))
        with pytest.raises(JaxptmError, match=r"1: is damaged; name another step, or restore a backup"):
            checkpoints.restore(blank(make_state(0)), 1)


def test_a_checkpoint_of_another_model_names_the_leaves(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(make_state(1, width=4), None, {})
        wider = make_state(1, width=6)
        with pytest.raises(JaxptmError, match=r"`params/encoder/kernel` is float32\[4, 8\], not float32\[6, 8\].*more"):
            checkpoints.restore(wider)
        cast = wider._replace(params={**make_state(1).params, "half": jnp.zeros(4)}, opt_state=make_state(1).opt_state)
        with pytest.raises(
            JaxptmError, match=r"another model or optimizer: `params/half` is bfloat16\[4\], not float32\[4\]\. "
        ):
            checkpoints.restore(cast)
        other = make_state(1)._replace(params={"new": jnp.zeros(2)})
        with pytest.raises(JaxptmError, match=r"`params/new` is missing; `params/encoder/bias` is not wanted"):
            checkpoints.restore(other)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (8, 1), (2, 8)])
def test_restores_onto_another_number_of_devices(tmp_path: Path, before: int, after: int) -> None:
    def shard(count: int) -> TrainState:
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
        split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(
            lambda leaf: jax.device_put(leaf, split if leaf.ndim == 2 else whole), make_state(1, width=16)
        )

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(shard(before), None, {})
        like = shard(after)
        found = checkpoints.restore(blank(like))
    assert found is not None
    assert_same(found[0], make_state(1, width=16))
    assert jax.tree.map(lambda leaf: leaf.sharding, found[0]) == jax.tree.map(lambda leaf: leaf.sharding, like)


def test_an_error_of_the_background_save_surfaces_and_earlier_checkpoints_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(make_state(1), {"loss": 1.0}, {})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_checksums", full)
            checkpoints.save(make_state(2), {"loss": 0.5}, {})
            with pytest.raises(JaxptmError, match=rf"{tmp_path}: the checkpoint of step 2 .* the disk is full"):
                checkpoints.save(make_state(3), None, {})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
        assert (checkpoints.latest_step, checkpoints.best_step) == (1, 1)
        checkpoints.check_for_errors()
        checkpoints.save(make_state(4), None, {})
    assert steps_on_disk(tmp_path) == [1, 4]


def test_check_for_errors_reports_once_the_background_save_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "write_checksums", lambda path: 1 / 0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(make_state(1), None, {})
        while checkpoints.saving:
            time.sleep(0.01)
        with pytest.raises(JaxptmError, match="division by zero"):
            checkpoints.check_for_errors()
        checkpoints.check_for_errors()


FULL_DISK = """
import sys, jax, jax.numpy as jnp
from jaxptm.checkpoint import Checkpoints
from jaxptm.types import JaxptmError, TrainState
def state(step, size): return TrainState(jnp.int32(step), {"a": jax.random.normal(jax.random.key(0), (size,))}, ())
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    checkpoints.save(state(1, 1000), None, {})
    checkpoints.save(state(2, 2_000_000), None, {})
    try:
        checkpoints.wait()
    except JaxptmError as error:
        print(error)
    print(checkpoints.restore(state(0, 1000))[0].step)
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs a user namespace to mount a small disk")
    mount = 'mount -t tmpfs -o size=4m tmpfs "$1" && exec "$2" -c "$3" "$1/checkpoints"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, FULL_DISK],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[1])},
    )
    if "mount:" in done.stderr:
        pytest.skip("may not mount a small disk")
    assert done.stderr == ""
    message, step = done.stdout.splitlines()
    assert f"{tmp_path}/checkpoints: the checkpoint of step 2 could not be saved: the disk is full" in message
    assert step == "1"


@pytest.mark.parametrize("metric", ["loss", "mlm_loss", "wer", "dev/cer", "mean_squared_error"])
def test_of_losses_and_error_rates_the_lower_is_better(metric: str) -> None:
    assert is_better(metric, 0.1, 0.2) and not is_better(metric, 0.2, 0.1)
    assert is_better("accuracy", 0.2, 0.1) and not is_better("accuracy", 0.1, 0.2)

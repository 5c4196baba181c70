"""The log that a run keeps: what is written comes back, a killed run leaves nothing half behind."""

from __future__ import annotations

import io
import json
import math
import time
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import jaxptm
from jaxptm.metrics import MetricsLog, TrainingProgress, plot_curves, read_metrics, versions, write_results
from jaxptm.types import JaxptmError

NAMES = st.sampled_from(["train/loss", "eval/loss", "learning_rate", "tokens_per_second"])
LINES = st.lists(st.dictionaries(NAMES, st.floats(), max_size=3), max_size=5)


@given(lines=LINES)
def test_every_float_comes_back_and_every_line_is_strict_json(
    tmp_path_factory: pytest.TempPathFactory, lines: list[dict[str, float]]
) -> None:
    run = tmp_path_factory.mktemp("run")
    with MetricsLog(run) as log:
        log._board = type("Silent", (), {"add_scalar": lambda *_: None, "close": lambda *_: None})()
        for step, metrics in enumerate(lines):
            log.write(step, metrics)
    for text in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    expected = [{"step": step, **metrics} for step, metrics in enumerate(lines)]
    np.testing.assert_equal(read_metrics(run / "metrics.jsonl"), expected)


def test_a_line_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, {"train/loss": np.float32(0.5)})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 0.5}\n'


def test_resuming_drops_what_will_be_written_anew(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (10, 20, 30):
            log.write(step, {"train/loss": 1.0 / step, "other": math.nan})
    path = tmp_path / "metrics.jsonl"
    before = path.read_text().splitlines(keepends=True)
    with path.open("a") as file:
        file.write('{"step": 40, "train/lo')  # killed while writing
    assert [line["step"] for line in read_metrics(path)] == [10, 20, 30]
    with MetricsLog(tmp_path) as log:
        log.truncate(20)
        assert path.read_text() == "".join(before[:2])
        log.write(30, {"train/loss": 7.0})
    assert read_metrics(path)[-1] == {"step": 30, "train/loss": 7.0}
    assert sorted(item.name for item in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(JaxptmError, match=r"metrics\.jsonl: line 2 is not a JSON object"):
        read_metrics(path)
    with pytest.raises(JaxptmError, match="absent: cannot read the metrics: No such file"):
        read_metrics(tmp_path / "absent")


def test_tensorboard_holds_the_same_scalars(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, {"train/loss": 0.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_results_are_replaced_whole(tmp_path: Path) -> None:
    write_results(tmp_path, {"step": 1})
    path = write_results(
        tmp_path, {"step": np.int64(3), "loss": math.inf, "devices": ("cpu",), "eval": {"acc": np.float32(0.5)}}
    )
    assert json.loads(path.read_text()) == {"step": 3, "loss": "inf", "devices": ["cpu"], "eval": {"acc": 0.5}}
    assert [item.name for item in tmp_path.iterdir()] == ["results.json"]


def test_versions_are_had_without_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run from a source tree on PYTHONPATH failed when it was over and wrote its results."""
    found = versions()
    assert found["jaxptm"] == jaxptm.__version__
    assert found["jax"] == jax.__version__
    monkeypatch.setattr(metadata.Distribution, "discover", classmethod(lambda *a, **k: iter(())))
    bare = versions()
    assert bare.keys() == found.keys()
    assert bare["jaxptm"] == jaxptm.__version__
    assert bare["jax"] == "unknown"


@pytest.mark.parametrize("evaluated", [True, False])
def test_curves_are_drawn(tmp_path: Path, evaluated: bool) -> None:
    import matplotlib.image

    with MetricsLog(tmp_path) as log:
        for step in range(1, 5):
            log.write(step, {"train/loss": 1 / step, "train/mlm_accuracy": math.nan, "train/learning_rate": 1e-4})
        if evaluated:
            log.write(4, {"eval/loss": 2.0})
    image = matplotlib.image.imread(plot_curves(tmp_path))
    assert image.shape[0] > 500
    assert image.std() > 0.05
    assert not list(tmp_path.glob("*.tmp*"))


METRICS = {
    "train/loss": 2.5,
    "train/mlm_loss": 2.0,
    "train/mlm_accuracy": 0.25,
    "tokens_per_second": 12345.0,
    "utilisation": 0.4,
}


def test_without_a_terminal_progress_is_one_plain_line_a_log() -> None:
    out = io.StringIO()
    with TrainingProgress(total=20, start=10, console=Console(file=out, soft_wrap=True)) as progress:
        progress.advance(11)
        progress.log(12, METRICS)
        progress.print("evaluated")
        progress.log(20, METRICS)
    first, second, last = out.getvalue().splitlines()
    assert first.startswith("step 12/20 loss 2.500 mlm acc 25.0% 12.3k tokens/s util 40%")
    assert second == "evaluated"
    assert last == "step 20/20 loss 2.500 mlm acc 25.0% 12.3k tokens/s util 40%"


def test_the_time_left_goes_by_steps_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    out = io.StringIO()
    with TrainingProgress(total=1000, start=500, console=Console(file=out, soft_wrap=True)) as progress:
        now = 60.0  # it compiled
        progress.advance(501)
        for step, now in ((510, 100), (520, 140), (530, 180), (800, 1000), (900, 1010)):  # noqa: B007 - `now` is the clock
            for begun in range(step - 9, step + 1):
                progress.advance(begun)
            progress.log(step, {})
    # Nine steps in 40 seconds and ten each in as many, then three seconds a step, then ten steps a second.
    told = [line.partition("ETA ")[2] for line in out.getvalue().splitlines()]
    assert told == ["0:36:18", "0:33:41", "0:32:25", "0:10:07", "0:03:44"]


def test_on_a_terminal_progress_is_a_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    with TrainingProgress(total=20, console=console) as progress:
        progress.advance(10)
        progress.log(19, METRICS)
    bar = out.getvalue()
    assert "19/20" in bar and "ETA 0:00:00" in bar
    assert "loss 2.500 mlm acc 25.0% 12.3k tokens/s util 40%" in bar

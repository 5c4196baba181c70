"""What `jaxptm bench` says adds up, and leaves the run alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_finetuning
import test_speech_runs
from test_training import config_of, write_corpus

from jaxptm.benchmark import benchmark, summary
from jaxptm.config import TrainConfig
from jaxptm.data.batching import batches
from jaxptm.resolving import resolve
from jaxptm.run import open_run
from jaxptm.types import JaxptmError

STEPS = 5
finetuning_home = pytest.fixture(scope="module", name="finetuning_home")(test_finetuning.home.__wrapped__)
speech_home = pytest.fixture(scope="module", name="speech_home")(test_speech_runs.home.__wrapped__)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("bench")
    write_corpus(home / "corpus.txt")
    return home


def first_batches(config: TrainConfig) -> list[dict[str, np.ndarray]]:
    run = open_run(resolve(config))
    return list(batches(run.train, config.train.batch_size, 1, STEPS))


def assert_it_adds_up(figures: dict[str, Any], config: TrainConfig) -> None:
    shapes = figures["shapes"]
    assert sum(each["batches"] for each in shapes) == STEPS
    compute = sum(each["batches"] * each["step_seconds"] for each in shapes) / STEPS
    flops = sum(each["batches"] * each["model_flops"] for each in shapes) / STEPS
    assert figures["compute_seconds"] == pytest.approx(compute)
    parts = sum(figures[f"{name}_seconds"] for name in ("input", "compute", "other"))
    assert figures["step_seconds"] == pytest.approx(parts)
    ceiling = figures["ceiling_flops"] * len(figures["devices"])
    assert figures["utilisation"] == pytest.approx(flops / figures["step_seconds"] / ceiling)
    assert figures["compute_utilisation"] == pytest.approx(flops / compute / ceiling)
    assert figures["input_seconds"] > 0 and figures["pipeline_seconds"] > 0
    assert not (Path(config.out) / "checkpoints").exists() and not (Path(config.out) / "metrics.jsonl").exists()
    said = summary(figures)
    for each in shapes:
        assert " x ".join(map(str, each["shape"])) in said


def test_pretraining(home: Path, tmp_path: Path) -> None:
    config = config_of(home, "pretraining")
    figures = benchmark(config, STEPS, tmp_path / "trace")
    assert_it_adds_up(figures, config)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in first_batches(config))
    assert figures["tokens_per_second"] == pytest.approx(tokens / STEPS / figures["step_seconds"])
    (each,) = figures["shapes"]
    state = 3 * 4 * figures["parameters"]  # float32, with Adam's two moments
    assert figures["memory"]["allocated"] == each["allocated"] > state
    assert figures["memory"]["host_peak"] > state
    json.dumps(figures)
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert list((tmp_path / "trace").rglob("perfetto_trace.json.gz"))
    parts = {(each["module"], each["direction"]): each["seconds"] for each in figures["parts"]}
    assert {direction for module, direction in parts if module == "encoder/layer/mlp/up"} == {"forward", "backward"}
    assert ("", "update") in parts
    assert sum(each["share"] for each in figures["parts"]) == pytest.approx(1)
    assert 0 < sum(parts.values()) < 3 * os.cpu_count() * each["step_seconds"]
    assert "encoder/layer/mlp/up, backward" in summary(figures)


def test_batches_of_several_lengths(finetuning_home: Path) -> None:
    config = test_finetuning.config_of(finetuning_home, "bench", train__batch_size=4)
    figures = benchmark(config, STEPS)
    assert_it_adds_up(figures, config)
    lengths = [batch["input_ids"].shape for batch in first_batches(config)]
    assert len(set(lengths)) > 1
    assert {each["shape"]: each["batches"] for each in figures["shapes"]} == {
        shape: lengths.count(shape) for shape in lengths
    }


def test_speech(speech_home: Path) -> None:
    config = test_speech_runs.config_of(speech_home, "ctc", "bench")
    figures = benchmark(config, STEPS)
    assert_it_adds_up(figures, config)
    samples = sum(int(batch["attention_mask"].sum()) for batch in first_batches(config))
    seconds = samples / 16_000 / STEPS
    assert figures["audio_seconds_per_second"] == pytest.approx(seconds / figures["step_seconds"])
    assert "audio seconds a second" in summary(figures)


def test_copies_have_no_plan(home: Path) -> None:
    config = config_of(home, "pmap", parallel__mode="pmap", parallel__data=2)
    figures = benchmark(config, STEPS)
    assert_it_adds_up(figures, config)
    assert figures["memory"]["allocated"] is None and len(figures["devices"]) == 2
    assert "planned" not in summary(figures)


def test_electra_divided_among_devices(home: Path, tmp_path: Path) -> None:
    config = config_of(
        home,
        "electra",
        model={"preset": "electra-tiny", "num_hidden_layers": 1, "max_position_embeddings": 32},
        objective={"name": "replaced-token"},
        parallel={"data": 2, "fsdp": 2},
        train__accumulate=2,
    )
    figures = benchmark(config, STEPS, tmp_path / "trace")
    assert_it_adds_up(figures, config)
    assert len(figures["devices"]) == 4
    modules = {each["module"] for each in figures["parts"]}
    assert {"generator/encoder/layer/mlp/up", "discriminator/encoder/layer/mlp/up"} <= modules


def test_no_step_is_refused(home: Path) -> None:
    with pytest.raises(JaxptmError, match="--steps 0: measure at least 1"):
        benchmark(config_of(home, "none"), 0)

"""Whole runs on a small made-up language: what they leave behind, how they resume, how they fail."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import jaxptm.training
from jaxptm import evaluation
from jaxptm.config import TrainConfig, load_config
from jaxptm.conversion import convert
from jaxptm.data.prepare import prepare
from jaxptm.data.tokenizer import load_tokenizer
from jaxptm.directories import prepared_directory
from jaxptm.evaluation import evaluate
from jaxptm.metrics import read_metrics
from jaxptm.pretrained import from_pretrained
from jaxptm.training import restore_model, train
from jaxptm.types import JaxptmError

STEPS = 24


def write_corpus(path: Path, seed: int = 0, documents: int = 80) -> None:
    """Documents of sentences in which each word decides what may follow, so that there is something to learn."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(60)]
    follows = {word: draw.sample(words, 3) for word in words}
    lines = []
    for _ in range(documents):
        for _ in range(draw.randint(4, 9)):
            sentence = [draw.choice(words)]
            while len(sentence) < draw.randint(4, 14):
                sentence.append(draw.choice(follows[sentence[-1]]))
            lines.append(" ".join(sentence).capitalize() + ".")
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_corpus(home / "corpus.txt")
    return home


def config_of(home: Path, out: str, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 32,
        },
        "objective": {"name": "pretraining"},
        "data": {
            "files": str(home / "corpus.txt"),
            "eval_fraction": 0.1,
            "tokenizer": "train",
            "vocab_size": 200,
            "sequence_length": 32,
        },
        "optimizer": {"name": "adamw", "learning_rate": 2e-3, "schedule": "linear", "warmup": 4},
        "train": {
            "steps": STEPS,
            "batch_size": 8,
            "log_every": 6,
            "eval_every": 12,
            "eval_batches": 2,
            "checkpoint_every": 5,
        },
        "parallel": {"data": 1},
        "out": str(home / out),
    }
    for key, value in changes.items():
        target = fields
        *parents, last = key.split("__")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    path = home / f"{out}.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return load_config(path)


@pytest.fixture(scope="module")
def finished(home: Path) -> tuple[TrainConfig, dict[str, Any]]:
    config = config_of(home, "whole")
    return config, train(config)


def weights(directory: str | Path) -> dict[str, np.ndarray]:
    return load_file(Path(directory) / "model" / "model.safetensors")


def assert_equal_to_the_bit(config: TrainConfig, other: TrainConfig) -> None:
    """The exported parameters, and in the last checkpoints also the optimizer's moments."""
    ours, theirs = weights(config.out), weights(other.out)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)
    first, second = (state_of(each) for each in (config, other))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def state_of(config: TrainConfig) -> Any:
    import orbax.checkpoint as ocp

    path = Path(config.out).absolute() / "checkpoints" / str(config.train.steps) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:  # as numpy: the devices that saved it need not be here
        stored = checkpointer.metadata(path).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        return checkpointer.restore(path, restore_args=arguments)


def die_at(monkeypatch: pytest.MonkeyPatch, step: int, kind: signal.Signals) -> None:
    """The process sends itself a signal while the batch of the given step is asked for."""
    plain = jaxptm.training.batches

    def batches(source: Any, batch_size: int, start: int, steps: int, rows: Any) -> Any:
        for at, batch in enumerate(plain(source, batch_size, start, steps, rows), start + 1):
            if at == step:
                os.kill(os.getpid(), kind)
            yield batch

    monkeypatch.setattr(jaxptm.training, "batches", batches)


def interrupt_and_resume(config: TrainConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs to the end, told to stop on the way."""
    with monkeypatch.context() as patch:
        die_at(patch, step, signal.SIGTERM)
        assert train(config) == {"finished": False, "step": step}
    assert train(config)["finished"]


def test_a_run_leaves_everything_behind(finished: tuple[TrainConfig, dict[str, Any]]) -> None:
    config, results = finished
    out = Path(config.out)
    assert json.loads((out / "results.json").read_text()) == results
    assert results["finished"] and results["step"] == STEPS
    assert {"jax", "jaxptm", "transformers"} <= results["versions"].keys()
    assert results["devices"] == ["cpu"]  # of the eight that there are
    assert results["config"]["optimizer"]["learning_rate"] == 2e-3
    assert results["utilisation"] > 0 and results["tokens_per_second"] > 0
    assert load_config(out / "config.yaml") == config
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert any((out / "tensorboard").iterdir())
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [6, 12, 18, 24]
    assert [line["step"] for line in lines if "eval/loss" in line] == [12, 24]
    assert lines[-1]["train/mlm_loss"] < lines[0]["train/mlm_loss"]
    assert lines[0]["train/learning_rate"] == pytest.approx(2e-3 * (1 - 1 / 20))
    for line in lines:
        assert line["train/loss"] == pytest.approx(line["train/mlm_loss"] + line["train/nsp_loss"], abs=0.05)


def test_the_model_opens_in_transformers(finished: tuple[TrainConfig, dict[str, Any]]) -> None:
    import torch
    import transformers

    config, _ = finished
    directory = Path(config.out) / "model"
    theirs, info = transformers.BertForPreTraining.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = (Path(config.data.files) if isinstance(config.data.files, str) else Path()).read_text().splitlines()[0]
    batch = tokenizer([text], return_tensors="np")
    ours = from_pretrained(directory, "auto")(**batch)
    with torch.no_grad():
        out = theirs.eval()(**{name: torch.tensor(value) for name, value in batch.items()})
    np.testing.assert_allclose(ours.prediction_logits, out.prediction_logits.numpy(), atol=2e-5)
    np.testing.assert_allclose(ours.seq_relationship_logits, out.seq_relationship_logits.numpy(), atol=2e-5)


def test_a_finished_run_is_not_run_again(finished: tuple[TrainConfig, dict[str, Any]]) -> None:
    config, results = finished
    before = weights(config.out)
    again = train(config)
    assert again["train"] == results["train"] and again["eval"] == results["eval"]
    for name, tensor in weights(config.out).items():
        np.testing.assert_array_equal(tensor, before[name])


def test_kill_9_and_resume_end_with_the_same_bits(home: Path, finished: tuple[TrainConfig, dict[str, Any]]) -> None:
    config = config_of(home, "killed", train__keep=3)
    script = (
        "import os, signal, sys, pytest\n"
        "sys.path.insert(0, {tests!r})\n"
        "from test_training import die_at\n"
        "from jaxptm.training import train\n"
        "die_at(pytest.MonkeyPatch(), {step}, signal.SIGKILL)\n"
        "train({config!r})\n"
    )
    for step, reached in ((3, []), (13, [5, 10]), (19, [10, 15])):
        text = script.format(tests=str(Path(__file__).parent), step=step, config=str(home / "killed.yaml"))
        died = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
        assert died.returncode == -signal.SIGKILL, died.stderr
        found = sorted(int(path.name) for path in (home / "killed/checkpoints").iterdir() if path.name.isdigit())
        # The newest may have been under way when the process died.
        assert found in (reached, reached[:-1]) or set(found) <= {5, 10, 15}, found
    results = train(config)
    assert results["finished"]
    assert_equal_to_the_bit(config, finished[0])
    assert [line["step"] for line in read_metrics(home / "killed/metrics.jsonl")] == [6, 12, 18, 24]


def test_a_damaged_checkpoint_is_passed_over_with_a_word(
    home: Path,
    finished: tuple[TrainConfig, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = config_of(home, "damaged")
    with monkeypatch.context() as patch:
        die_at(patch, 12, signal.SIGTERM)
        assert train(config) == {"finished": False, "step": 12}
    newest = home / "damaged/checkpoints/12"
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(
        JaxptmError, match=r"checkpoints/12: is damaged; name another step \(.*10\), or restore a backup"
    ):
        convert(config.out, home / "converted", report=home / "converted.json")
    assert not (home / "converted").exists() and not (home / "converted.json").exists()
    with caplog.at_level(logging.WARNING):
        assert train(config)["finished"]
    convert(config.out, home / "converted", report=home / "converted.json")
    assert json.loads((home / "converted.json").read_text())["step"] == STEPS
    assert str(newest) in caplog.text and "passed over" in caplog.text
    assert_equal_to_the_bit(config, finished[0])


def test_another_text_is_not_mistaken_for_the_first(home: Path, finished: tuple[TrainConfig, dict[str, Any]]) -> None:
    text = home / "changing.txt"
    write_corpus(text)
    tokenizer = {"data__tokenizer": str(Path(finished[0].out) / "model"), "data__vocab_size": None}
    config = config_of(home, "changing", data__files=str(text), train__steps=2, optimizer__warmup=0, **tokenizer)
    fields = config.model_dump()
    assert train(fields)["finished"]  # a dict does as well
    write_corpus(text, seed=1, documents=90)
    with pytest.raises(JaxptmError, match="the data has changed since its checkpoints were written"):
        train(config)


def test_the_same_counts_of_other_words_are_another_text(home: Path) -> None:
    text = home / "reversed.txt"
    write_corpus(text)
    config = config_of(home, "reversed", data__files=str(text), train__steps=2, optimizer__warmup=0)
    assert train(config)["finished"]
    lines = text.read_text().splitlines()
    text.write_text("\n".join(" ".join(reversed(line.rstrip(".").split())) + "." * bool(line) for line in lines))
    with pytest.raises(JaxptmError, match="the data has changed since its checkpoints were written"):
        train(config)


def test_a_run_keeps_its_vocabulary_whatever_becomes_of_the_text(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another run with the same keys learns a new vocabulary in the directory that both read."""
    text = home / "growing.txt"
    write_corpus(text, documents=60)
    config = config_of(home, "growing", data__files=str(text), train__steps=8)
    known = {}

    def meanwhile(run: Any, *_: Any) -> Any:
        known.update(run.tokenizer.get_vocab())
        with text.open("a") as file:
            file.write("\n" + "Zebra quartz xylophone vexing jumble.\n\n" * 40)
        prepare(config.data, prepared_directory(config))
        return evaluation.Evaluator(run, *_)

    with monkeypatch.context() as patch:
        patch.setattr(jaxptm.training, "Evaluator", meanwhile)
        assert train(config)["finished"]
    learnt_since = load_tokenizer(prepared_directory(config) / "tokenizer").get_vocab()
    assert learnt_since != known
    assert from_pretrained(Path(config.out) / "model").tokenizer.get_vocab() == known
    moved = tmp_path / "moved"
    shutil.copytree(config.out, moved)
    assert restore_model(moved).tokenizer.get_vocab() == known


def test_what_stands_in_the_place_of_the_tokenizer_is_not_taken_for_it(home: Path) -> None:
    first = config_of(home, "twice", train__steps=2, optimizer__warmup=0)
    train(first)
    shutil.rmtree(home / "twice/checkpoints")
    second = config_of(home, "twice", data__vocab_size=150, train__steps=2, optimizer__warmup=0)
    train(second)
    assert len(from_pretrained(home / "twice/model").tokenizer) <= 150


def test_what_was_learned_is_there_when_an_evaluation_fails(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(home, "unscored", train__steps=12, train__checkpoint_every=100)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Evaluator, "__call__", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    assert [path.name for path in (home / "unscored/checkpoints").glob("[0-9]*")] == ["12"]


def test_a_config_that_never_saved_anything_may_be_mended(home: Path) -> None:
    with pytest.raises(JaxptmError, match="no preset"):
        train(config_of(home, "mended", model="bert-gigantic"))
    assert train(config_of(home, "mended", train__steps=1, optimizer__warmup=0))["finished"]


def test_reporting_may_change_on_resume_and_nothing_else(
    home: Path, finished: tuple[TrainConfig, dict[str, Any]]
) -> None:
    config_of(home, "whole", train__log_every=3)
    assert train(load_config(home / "whole.yaml"))["finished"]
    before = (home / "whole/config.yaml").read_text()
    changed = config_of(home, "whole", optimizer__learning_rate=1e-3, train__seed=5)
    with pytest.raises(JaxptmError) as error:
        train(changed)
    message = str(error.value)
    assert "belongs to a run with another config" in message
    assert "optimizer.learning_rate: 0.002 there, 0.001 now" in message and "train.seed" in message
    assert (home / "whole/config.yaml").read_text() == before


def test_a_run_moves_to_other_devices(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = {"model__hidden_dropout_prob": 0.0, "model__attention_probs_dropout_prob": 0.0}
    alone = config_of(home, "unmoved", **still)
    train(alone)
    stations: list[tuple[int, int, dict[str, Any]]] = [
        (7, 1, {"data": 8}),
        (12, 4, {"data": 1, "remat": "dots"}),
        (16, 2, {"data": 2, "mode": "pmap"}),
        (STEPS, 1, {"data": 1, "fsdp": 4, "tensor": 2, "scan": True, "remat": True}),
    ]
    for step, accumulate, parallel in stations:
        config = config_of(home, "moved", parallel=parallel, train__accumulate=accumulate, **still)
        with monkeypatch.context() as patch:
            if step < STEPS:
                die_at(patch, step, signal.SIGTERM)
            assert train(config)["step"] == step
    for name, tensor in weights(config.out).items():
        np.testing.assert_allclose(tensor, weights(alone.out)[name], atol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state_of(config), state_of(alone))
    moved, unmoved = (
        {line["step"]: line for line in read_metrics(home / name / "metrics.jsonl")} for name in ("moved", "unmoved")
    )
    # in four microbatches, or in one
    assert moved[12]["eval/loss"] == pytest.approx(unmoved[12]["eval/loss"], abs=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(home: Path) -> None:
    config = config_of(
        home, "diverged", optimizer__learning_rate=1e30, optimizer__clip=None, optimizer__warmup=0,
        train__checkpoint_every=1, train__log_every=20,
    )  # fmt: skip
    with pytest.raises(JaxptmError, match=r"step \d+: the (loss|grad_norm) is (nan|inf).*learning_rate"):
        train(config)
    kept = [path for path in (home / "diverged/checkpoints").iterdir() if path.name.isdigit()]
    assert kept
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restore_model(home / "diverged").params))


def test_another_road_through_the_options(home: Path, finished: tuple[TrainConfig, dict[str, Any]]) -> None:
    first = Path(finished[0].out)
    config = config_of(
        home,
        "packed",
        model=str(first / "model"),
        init_from=str(first / "model"),
        objective={"name": "masked-lm", "masking": "words", "mask_probability": 0.2},
        data__format="packed",
        data__separate_documents=True,
        optimizer={"name": "lamb", "learning_rate": 1e-3, "schedule": "inverse_sqrt", "warmup": 0.25},
        train={
            "epochs": 0.5,
            "batch_size": 8,
            "accumulate": 2,
            "dtype": "bfloat16",
            "param_dtype": "bfloat16",
            "eval_batches": None,
        },
        parallel={"data": 2, "scan": True, "remat": True},
    )
    results = train(config)
    assert results["finished"] and results["train"]["mlm_loss"] < 6
    assert "nsp_loss" not in results["train"]
    model = from_pretrained(home / "packed/model", "masked-lm")
    assert model.config.num_hidden_layers == 2
    again = evaluate(home / "packed", config)
    assert again["mlm_loss"] == pytest.approx(results["eval"]["mlm_loss"], rel=1e-2)


def test_evaluate_gives_the_numbers_of_the_run(finished: tuple[TrainConfig, dict[str, Any]]) -> None:
    config, results = finished
    assert evaluate(config.out, config) == pytest.approx(results["eval"], rel=1e-5)


def test_a_checkpoint_is_restored_as_a_model(finished: tuple[TrainConfig, dict[str, Any]]) -> None:
    config, _ = finished
    model = restore_model(Path(config.out))
    exported = from_pretrained(Path(config.out) / "model", "auto")
    jax.tree.map(np.testing.assert_array_equal, model.params, exported.params)
    with pytest.raises(JaxptmError, match="no checkpoint of step 7"):
        restore_model(Path(config.out), 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel__data": 64}, "64 devices asked for"),
        ({"train__batch_size": 6, "parallel__data": 4}, "do not divide among 4 devices"),
        ({"data__sequence_length": 64}, "64 is more than the 32 tokens that the model has positions for"),
        ({"model__vocab_size": 100}, "model.vocab_size: 100 is too small"),
        ({"model": "bert-gigantic"}, "no preset"),
        ({"model__hidden_size": 33}, "not a multiple of `num_attention_heads`"),
        ({"model__colour": "red"}, "model: 1 value.*\n.*colour: there is no such key"),
        ({"init_from": "/nowhere"}, "no such directory"),
        ({"parallel": {"fsdp": 3}}, "do not divide into fsdp 3"),
        ({"parallel": {"data": 2, "tensor": 4}}, "parallel.tensor: 4 does not divide the model's 2"),
        ({"optimizer__warmup": 100}, "optimizer.warmup is 100 steps"),
        ({"data__files": "/nowhere/*.txt"}, "/nowhere"),
        ({"model__type_vocab_size": 1}, "model.type_vocab_size: 1 is too small for data.format: pairs"),
        ({"data__tokenizer": "/nowhere/vocab.txt", "data__vocab_size": None}, "/nowhere/vocab.txt"),
        ({"train__metric": "bleu"}, "train.metric: an evaluation here has no 'bleu', only loss, mlm_loss"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_step(home: Path, changes: dict[str, Any], message: str) -> None:
    config = config_of(home, f"bad_{abs(hash(message))}", **changes)
    with pytest.raises(JaxptmError, match=f"(?s){message}"):
        train(config)


def test_running_out_of_memory_says_what_to_change(home: Path, finished: tuple[TrainConfig, dict[str, Any]]) -> None:
    config_of(home, "huge", train__batch_size=2**8, model__intermediate_size=2**18)
    script = (
        "import resource, sys\n"
        "import jax\n"
        "jax.devices()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (10 * 2**30,) * 2)\n"  # the step wants some 27 GiB
        "from jaxptm import cli\n"
        f"sys.argv[1:] = ['train', {str(home / 'huge.yaml')!r}]\n"
        "cli.main()\n"
    )
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert died.returncode == 1
    estimate, error = died.stderr.strip().splitlines()[-2:]
    assert re.match(r"memory per device, about: parameters .* activations 2\d\.\d GiB", estimate)
    assert error.startswith("error: a device ran out of memory (RESOURCE_EXHAUSTED")
    assert "train.accumulate (now 1, which puts 256 rows on a device at a time" in error
    assert "parallel.remat=true, or train.dtype=bfloat16" in error

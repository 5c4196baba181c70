"""Whole runs over audio: they resume to the bit, open in transformers, and are measured with labels of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import speech
import transformers
from recorded import tone, write_audio
from test_training import assert_equal_to_the_bit, interrupt_and_resume

from jaxptm.config import TrainConfig, validate
from jaxptm.data.audio import Preprocessor, decode, normalized
from jaxptm.data.batching import one_pass
from jaxptm.data.characters import Characters
from jaxptm.evaluation import evaluate
from jaxptm.pretrained import from_pretrained
from jaxptm.resolving import resolve
from jaxptm.run import Run, open_run
from jaxptm.training import restore_model, train
from jaxptm.types import JaxptmError

SMALL: dict[str, Any] = {
    "preset": "wav2vec2-tiny",
    **{key: value for key, value in (speech.SIZES | speech.QUANTIZER).items() if key not in ("vocab_size",)},
}
WORDS = {"low": 300.0, "high": 1200.0}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "contrastive": {"name": "contrastive", "negatives": 5, "mask_length": 2},
    "ctc": {"name": "ctc", "mask_length": 2, "channel_mask_length": 4},
    "classification": {"name": "sequence-classification", "class_weights": "balanced"},
}

METRICS = {"contrastive": "contrastive_loss", "ctc": "wer", "classification": "accuracy"}
"""Each is looked for before the first step."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones of two heights, three of four of them low, in folders of their names and with a manifest of both."""
    home = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(24):
        word = "high" if number % 4 == 0 else "low"
        samples = tone(0.2, hertz=WORDS[word])
        path = write_audio(home / "audio" / word / f"{number}.wav", samples + 0.01 * rng.normal(size=samples.shape))
        lines.append(json.dumps({"audio": str(path), "text": word, "label": word}) + "\n")
    (home / "train.jsonl").write_text("".join(lines[:16]))
    (home / "dev.jsonl").write_text("".join(lines[16:]))
    return home


def config_of(home: Path, kind: str, out: str, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "model": SMALL,
        "objective": OBJECTIVES[kind],
        "data": {"train": str(home / "train.jsonl"), "eval": str(home / "dev.jsonl"), "max_seconds": 0.3},
        "optimizer": {"learning_rate": 2e-3, "warmup": 2},
        "train": {"steps": 6, "batch_size": 4, "log_every": 2, "eval_every": 3, "checkpoint_every": 2},
        "parallel": {"data": 1},
        "out": str(home / "runs" / f"{kind}_{out}"),
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            fields[part] = fields[part] | {name: value}
        else:
            fields[part] = value
    return validate(TrainConfig, fields, "test")


@pytest.fixture(scope="module", params=OBJECTIVES)
def finished(home: Path, request: pytest.FixtureRequest) -> tuple[str, TrainConfig, dict[str, Any]]:
    config = config_of(home, request.param, "whole", train__metric=METRICS[request.param])
    return request.param, config, train(config)


def opened(config: TrainConfig) -> Run:
    return open_run(resolve(config))


def test_what_a_run_leaves_opens_in_transformers_and_is_measured_alike(
    finished: tuple[str, TrainConfig, dict[str, Any]],
) -> None:
    kind, config, results = finished
    directory = Path(config.out) / "model"
    names = {"contrastive": "ForPreTraining", "ctc": "ForCTC", "classification": "ForSequenceClassification"}
    theirs, info = getattr(transformers, f"Wav2Vec2{names[kind]}").from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    jax.tree.map(
        np.testing.assert_array_equal, restore_model(config.out).params, from_pretrained(directory, "auto").params
    )
    assert evaluate(config.out, config) == pytest.approx(results["eval"], rel=1e-5)
    if kind == "ctc":
        assert set("LOWHIG") <= Characters.load(directory).ids.keys()
        assert theirs.config.pad_token_id == Characters.load(directory).blank
        assert {"wer", "cer"} <= results["eval"].keys()
    if kind == "classification":
        assert theirs.config.id2label == {0: "high", 1: "low"}
        assert results["eval"]["accuracy"] >= 0.5
        run = opened(config)
        assert run.config.data.labels == ["high", "low"]


@pytest.mark.parametrize("finished", ["contrastive"], indirect=True)  # masks, negatives, noise and crops
def test_an_interrupted_run_ends_with_the_same_bits(
    home: Path, finished: tuple[str, TrainConfig, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, whole, _ = finished
    config = config_of(home, kind, "interrupted")
    interrupt_and_resume(config, 3, monkeypatch)
    assert_equal_to_the_bit(config, whole)


def test_a_model_is_evaluated_with_labels_in_the_order_of_its_head(home: Path, tmp_path: Path) -> None:
    style = speech.STYLES["large"]  # hears no padding
    theirs = speech.saved(tmp_path / "model", "sequence-classification", id2label={0: "low", 1: "high"}, **style)
    config = config_of(home, "classification", "measured", model=str(tmp_path / "model"))
    figures = evaluate(tmp_path / "model", config)
    assert resolve(config, str(tmp_path / "model")).data.labels == ["low", "high"]
    model = from_pretrained(tmp_path / "model", "sequence-classification")
    right = 0
    for line in (home / "dev.jsonl").read_text().splitlines():
        record = json.loads(line)
        samples = normalized(decode(record["audio"]))
        said = int(model(input_values=samples[None]).logits.argmax())
        right += theirs.config.id2label[said] == record["label"]
    assert figures["accuracy"] == right / 8
    speech.saved(tmp_path / "other", "sequence-classification", id2label={0: "loud", 1: "quiet"})
    other = config_of(home, "classification", "other", model=str(tmp_path / "other"))
    with pytest.raises(JaxptmError, match=r"has the labels high, low, and the head of .* loud, quiet; set"):
        resolve(other)


def test_labels_are_known_where_the_recordings_are_gone(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "audio", tmp_path / "audio")
    config = config_of(home, "classification", "gone", data__train=str(tmp_path / "audio"), data__eval=None)
    assert opened(config).config.data.labels == ["high", "low"]
    shutil.rmtree(tmp_path / "audio")
    assert opened(config).config.data.labels == ["high", "low"]


def test_classes_count_as_their_weights_say(home: Path) -> None:
    balanced = opened(config_of(home, "classification", "balanced"))
    plain = {"name": "sequence-classification"}
    asked = opened(config_of(home, "classification", "asked", objective=plain | {"class_weights": [2.0, 2 / 3]}))
    none = opened(config_of(home, "classification", "none", objective=plain))
    params = balanced.objective.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    keys = jax.random.split(jax.random.key(1), 4)

    def loss(run: Run) -> float:
        parts = [run.objective.loss(params, batch, keys, train=False)[0] for batch in one_pass(balanced.train, 4)]
        return float(run.objective.total(jax.tree.map(lambda *values: sum(values), *parts)))

    values = [loss(run) for run in (balanced, asked, none)]
    assert values[0] == pytest.approx(values[1]) and values[0] != pytest.approx(values[2])
    with pytest.raises(JaxptmError, match=r"objective.class_weights: has 3 weights for 2 labels"):
        opened(config_of(home, "classification", "three", objective=plain | {"class_weights": [1.0, 1.0, 1.0]}))


def test_a_head_keeps_the_vocabulary_that_it_writes_with(home: Path, tmp_path: Path) -> None:
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"WOLHIG"]
    speech.saved(tmp_path / "model", "ctc", vocab_size=len(letters))
    (tmp_path / "model/vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    ids = Characters.load(tmp_path / "model").ids
    begun = config_of(home, "ctc", "begun", init_from=str(tmp_path / "model"), model=str(tmp_path / "model"))
    assert opened(begun).tokenizer.characters.ids == ids
    assert opened(begun).tokenizer.preprocessor == Preprocessor(True, False)
    (tmp_path / "model/processor_config.json").write_text('{"feature_extractor": {"do_normalize": false}}')
    assert opened(begun).tokenizer.preprocessor == Preprocessor(False, False)
    figures = [
        evaluate(tmp_path / "model", config_of(home, "ctc", "seen", **changes))
        for changes in ({}, {"data__vocabulary": "characters"})
    ]
    assert figures[0] == figures[1]  # what is measured writes as it has learned to
    asked = begun.model_copy(update={"data": begun.data.model_copy(update={"vocabulary": "characters"})})
    with pytest.raises(JaxptmError, match=r"characters is not the vocabulary that the head of .* writes with; leave"):
        opened(asked)
    (tmp_path / "model/vocab.json").rename(tmp_path / "vocab.json")  # with none of its own it takes what is given
    given = begun.model_copy(
        update={"data": begun.data.model_copy(update={"vocabulary": str(tmp_path / "vocab.json")})}
    )
    assert opened(given).tokenizer.characters.ids == ids
    assert evaluate(tmp_path / "model", given) == figures[0]
    with pytest.raises(JaxptmError, match=r"model: has no vocab\.json, so nobody knows .* name the file in data\.voc"):
        evaluate(tmp_path / "model", config_of(home, "ctc", "seen"))
    (tmp_path / "long.json").write_text(json.dumps({token: i for i, token in enumerate([*letters, "X"])}))
    longer = given.model_copy(
        update={"data": given.data.model_copy(update={"vocabulary": str(tmp_path / "long.json")})}
    )
    with pytest.raises(JaxptmError, match=r"long\.json: has 12 entries, and .* tells 11 apart; name its own"):
        evaluate(tmp_path / "model", longer)
    (tmp_path / "vocab.json").rename(tmp_path / "model/vocab.json")
    fresh = asked.model_copy(update={"objective": asked.objective.model_copy(update={"new_head": True})})
    assert opened(fresh).tokenizer.characters.ids != ids


def test_a_recording_has_one_label(home: Path) -> None:
    regression = {"name": "sequence-classification", "problem_type": "regression"}
    with pytest.raises(JaxptmError, match=r"`objective.problem_type: regression` is for text"):
        config_of(home, "classification", "x", objective=regression)

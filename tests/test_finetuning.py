"""Fine-tuning runs from a config to a model that transformers opens, and what they say about wrong input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers
from reference import SMALL, perturbed

from jaxptm.config import TrainConfig, load_config, validate
from jaxptm.conversion import convert
from jaxptm.data.tokenizer import train_wordpiece
from jaxptm.evaluation import evaluate
from jaxptm.metrics import read_metrics
from jaxptm.models.params import flatten
from jaxptm.pipelines import pipeline
from jaxptm.pretrained import from_pretrained
from jaxptm.training import restore_model, train
from jaxptm.types import JaxptmError

GOOD, BAD = ["fine", "lovely", "great", "warm"], ["poor", "dull", "cold", "awful"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT without a head, and data of each kind that it can learn by heart."""
    home = tmp_path_factory.mktemp("finetuning")
    rng = np.random.default_rng(0)
    texts = [
        (f"the {rng.choice(GOOD if label else BAD)} film was {'long ' * int(rng.integers(0, 9))}seen", label)
        for label in rng.integers(0, 2, 60)
    ]
    tokenizer = train_wordpiece([text for text, _ in texts] * 3 + ["who what where a of"] * 3, 150)
    tokenizer.save_pretrained(home / "bert")
    perturbed("BertModel", noise=0.02, **{**SMALL, "vocab_size": len(tokenizer)}).save_pretrained(home / "bert")
    glue = home / "glue/SST-2"
    glue.mkdir(parents=True)
    for name, part in (("train", texts[:45]), ("dev", texts[45:])):
        rows = [f"{text}\t{label}" for text, label in part]
        (glue / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (glue / "test.tsv").write_text("index\tsentence\n0\tthe warm film\n1\tthe dull film\n2\tthe film\n")
    records = [
        {
            "text": text,
            "mood": "good" if label else "bad",
            "moods": ["good"] * int(label) + ["film"],
            "score": 2.0 * label,
            "words": text.split(),
            "tag_ids": [1 if word in GOOD else 2 if word in BAD else 0 for word in text.split()],
            "tags": ["B-G" if word in GOOD else "B-P" if word in BAD else "O" for word in text.split()],
            "endings": ["fine", "poor"] if label else ["poor", "fine"],
            "right": 0,
        }
        for text, label in texts
    ]
    (home / "table.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    paragraphs = []
    for number, record in enumerate(records[:24]):
        word = next(word for word in record["words"] if word in GOOD + BAD)
        answer = {"text": word, "answer_start": record["text"].index(word)}
        none = {"id": f"n{number}", "question": "where", "answers": [], "is_impossible": True}
        qas = [{"id": f"q{number}", "question": "what film", "answers": [answer]}, none]
        paragraphs.append({"context": record["text"], "qas": qas})
    (home / "squad.json").write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": paragraphs}]}))
    return home


def config_of(home: Path, out: str, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "init_from": str(home / "bert"),
        "objective": {"name": "sequence-classification"},
        "data": {"task": "sst2", "path": str(home / "glue"), "max_length": 32},
        "optimizer": {"learning_rate": 1e-2, "warmup": 0.1},
        "train": {"epochs": 3, "batch_size": 8, "log_every": 5, "eval_every": "epoch", "checkpoint_every": "epoch"},
        "parallel": {"data": 1},
        "out": str(home / "runs" / out),
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            fields[part] = {**fields[part], name: value}
        else:
            fields[part] = value
    return validate(TrainConfig, fields, "config")


def table(home: Path, **fields: Any) -> dict[str, Any]:
    return {"train_file": str(home / "table.jsonl"), "eval_fraction": 0.2, "max_length": 32} | fields


@pytest.fixture(scope="module")
def glue_run(home: Path) -> tuple[TrainConfig, dict[str, Any]]:
    config = config_of(home, "sst2", train__epochs=6, train__seed=1)  # of six seeds one ends at 0.73, the others at 1
    return config, train(config)


def test_a_glue_run_learns_and_opens_in_transformers(home: Path, glue_run: tuple[TrainConfig, dict[str, Any]]) -> None:
    config, results = glue_run
    assert results["step"] == 6 * 6 and results["eval"]["accuracy"] >= 0.9
    assert results["eval"]["score"] == results["eval"]["accuracy"]
    out = Path(config.out)
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        out / "model", output_loading_info=True
    )
    assert not any(report.values()) and model.config.problem_type == "single_label_classification"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    rows = [line.split("\t") for line in (home / "glue/SST-2/dev.tsv").read_text().splitlines()[1:]]
    logits = model(**tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")).logits
    right = np.mean(logits.detach().numpy().argmax(1) == [int(label) for _, label in rows])
    assert right == pytest.approx(results["eval"]["accuracy"])
    submission = (out / "predictions/SST-2.tsv").read_text().splitlines()
    assert submission == ["index\tprediction", "0\t1", "1\t0", submission[3]]


def test_evaluation_of_the_model_gives_the_figures_of_the_run(glue_run: tuple[TrainConfig, dict[str, Any]]) -> None:
    config, results = glue_run
    figures = evaluate(config.out, config)
    assert figures == pytest.approx(results["eval"], abs=1e-5)
    assert evaluate(str(Path(config.out) / "model"), config_like(config, batch_size=5)) == pytest.approx(
        figures, abs=1e-5
    )
    restored = flatten(restore_model(config.out).params)
    for path, value in flatten(from_pretrained(Path(config.out) / "model", "auto").params).items():
        np.testing.assert_array_equal(restored[path], value)


def config_like(config: TrainConfig, **loop: Any) -> TrainConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=loop)})


def test_texts_that_are_cut_are_counted_and_held_out_data_is_known_again(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = [f'{{"text": "the fine film {"long " * (at % 9)}", "mood": "{"ab"[at % 2]}"}}\n' for at in range(18)]
    for name, some in (("train", lines), ("eval", lines[:9])):
        (tmp_path / f"{name}.jsonl").write_text("".join(some))
    data = {
        "train_file": str(tmp_path / "train.jsonl"),
        "eval_file": str(tmp_path / "eval.jsonl"),
        "text_columns": ["text"],
        "label_column": "mood",
        "max_length": 8,
    }
    config = config_of(home, "cut", data=data, train__epochs=1)
    assert train(config)["finished"]
    assert "cut to data.max_length 8: 10 of 18, 5 of 9 (held out) texts" in capsys.readouterr().err
    (tmp_path / "eval.jsonl").write_text("".join(lines[:8]))
    with pytest.raises(JaxptmError, match="the data has changed since its checkpoints were written"):
        train(config)


def test_a_test_set_has_no_figures(glue_run: tuple[TrainConfig, dict[str, Any]], tmp_path: Path) -> None:
    config, _ = glue_run
    test = config.model_copy(update={"data": config.data.model_copy(update={"eval_split": "test"})})
    with pytest.raises(JaxptmError, match="the test set of GLUE has no labels to measure with"):
        evaluate(config.out, test)
    assert evaluate(config.out, test, tmp_path) == {}
    assert (tmp_path / "SST-2.tsv").read_text() == (Path(config.out) / "predictions/SST-2.tsv").read_text()


def test_a_resumed_run_ends_to_the_bit(home: Path, glue_run: tuple[TrainConfig, dict[str, Any]]) -> None:
    config, _ = glue_run
    import os
    import signal

    from jaxptm import evaluation

    fields = {**config.model_dump(), "out": str(home / "runs/resumed")}
    calls = []
    read = evaluation.Evaluator.__call__

    def stop_at_the_third(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation.Evaluator, "__call__", stop_at_the_third)
        assert train(fields) == {"finished": False, "step": 18}
    assert train(fields)["finished"]
    whole, resumed = (flatten(restore_model(out).params) for out in (config.out, fields["out"]))
    for path, value in whole.items():
        np.testing.assert_array_equal(resumed[path], value, err_msg=path)
    lines = [read_metrics(Path(out) / "metrics.jsonl") for out in (config.out, fields["out"])]
    assert [line.get("eval/accuracy") for line in lines[0]] == [line.get("eval/accuracy") for line in lines[1]]


TASKS: dict[str, dict[str, Any]] = {
    "labels": {"data": {"text_columns": "text", "label_column": "mood"}, "objective__class_weights": "balanced"},
    "sets": {
        "data": {"text_columns": "text", "label_column": "moods"},
        "objective__problem_type": "multi_label_classification",
    },
    "number": {"data": {"text_columns": "text", "label_column": "score"}, "objective__problem_type": "regression"},
    "words": {"data": {"text_columns": "words", "label_column": "tags"}, "objective": {"name": "token-classification"}},
    "numbered words": {
        "data": {"text_columns": "words", "label_column": "tag_ids"},
        "objective": {"name": "token-classification"},
    },
    "choices": {
        "data": {"text_columns": "text", "choice_columns": "endings", "label_column": "right"},
        "objective": {"name": "multiple-choice"},
    },
}
FIGURES = {
    "labels": {"accuracy", "f1", "matthews_correlation"},
    "sets": {"accuracy", "micro_f1", "macro_f1"},
    "number": {"pearson", "spearman", "mean_squared_error"},
    "words": {"f1", "precision", "recall", "accuracy"},
    "numbered words": {"f1", "precision", "recall", "accuracy"},
    "choices": {"accuracy"},
}


@pytest.mark.parametrize("kind", TASKS)
def test_your_own_table(kind: str, home: Path) -> None:
    changes = {**TASKS[kind], "data": table(home, **TASKS[kind]["data"])}
    metric = sorted(FIGURES[kind])[-1]  # is looked for before the first step
    config = config_of(home, kind, train__epochs=8, train__metric=metric, **changes)
    results = train(config)
    assert set(results["eval"]) == FIGURES[kind] | {"loss"}
    first = read_metrics(Path(config.out) / "metrics.jsonl")[0]["train/loss"]
    assert results["train"]["loss"] < first
    resolved = load_config(Path(config.out) / "config.yaml")
    saved = json.loads((Path(config.out) / "model/config.json").read_text())
    if kind == "labels":
        assert resolved.data.labels == ["bad", "good"] and saved["label2id"] == {"bad": 0, "good": 1}
        assert results["eval"]["accuracy"] >= 0.9
    if kind == "numbered words":
        assert resolved.data.labels == ["0", "1", "2"]
    if kind == "words":
        assert resolved.data.labels == ["B-G", "B-P", "O"] and results["eval"]["f1"] > 0.8
    assert evaluate(config.out, config) == pytest.approx(results["eval"], abs=1e-5)


def test_squad(home: Path) -> None:
    file, same = str(home / "squad.json"), str(home / "the_same.json")
    data = {"train_file": file, "eval_file": file, "version_2": True, "max_length": 24, "stride": 4}
    settings = {"objective": {"name": "question-answering"}, "train__epochs": 6, "train__metric": "best_f1"}
    with pytest.raises(JaxptmError, match=r"data\.eval_file: .* is what is learned from, too; name other questions"):
        train(config_of(home, "squad", data=data, **settings))
    shutil.copy(file, same)
    config = config_of(home, "squad", data={**data, "eval_file": same}, **settings)
    results = train(config)
    assert results["eval"]["f1"] > 50 and results["eval"]["best_f1"] >= results["eval"]["f1"] - 1e-9
    said = json.loads((Path(config.out) / "predictions/predictions.json").read_text())
    assert len(said) == 48 and set(said.values()) > {""}
    assert (Path(config.out) / "predictions/null_odds.json").exists()
    transformers.AutoModelForQuestionAnswering.from_pretrained(Path(config.out) / "model")


@pytest.mark.parametrize("scan", [False, True])
def test_frozen_parts_stay_and_the_rest_learns(scan: bool, home: Path) -> None:
    config = config_of(
        home, f"frozen_{scan}", optimizer__frozen=["embeddings", "encoder/layer_0"], train__epochs=1,
        parallel={"data": 1, "scan": scan},
    )  # fmt: skip
    train(config)
    before = flatten(from_pretrained(home / "bert").params)
    for path, value in flatten(from_pretrained(Path(config.out) / "model").params).items():
        frozen = path.startswith(("embeddings/", "encoder/layer_0/"))
        assert np.array_equal(value, before[path]) == frozen, path


def test_it_stops_early_and_takes_the_best(home: Path) -> None:
    loop = {"train__epochs": 12, "train__patience": 2, "train__metric": "accuracy", "train__export": "best"}
    config = config_of(home, "early", optimizer__learning_rate=0.02, **loop)
    results = train(config)
    figures = [
        line["eval/accuracy"] for line in read_metrics(Path(config.out) / "metrics.jsonl") if "eval/loss" in line
    ]
    best = int(np.argmax(figures))
    assert len(figures) == min(best + 3, 12) and results["step"] == 6 * len(figures)
    assert results["exported_step"] == 6 * (best + 1)
    assert evaluate(config.out, config)["accuracy"] == pytest.approx(max(figures))
    assert train(config)["step"] == results["step"]  # again: it stays stopped


def test_devices_and_microbatches_do_not_matter(home: Path, glue_run: tuple[TrainConfig, dict[str, Any]]) -> None:
    def run(out: str, **changes: Any) -> dict[str, Any]:
        still = {"preset": str(home / "bert"), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return train(config_of(home, out, model=still, train__epochs=1, **changes))

    alone = run("alone")["eval"]
    assert run("spread", parallel={"data": 2, "fsdp": 2}, train__accumulate=2)["eval"] == pytest.approx(alone, abs=1e-4)
    assert run("mapped", parallel={"mode": "pmap", "data": 4})["eval"] == pytest.approx(alone, abs=1e-4)
    assert jax.device_count() == 8


def test_bad_input(home: Path, glue_run: tuple[TrainConfig, dict[str, Any]]) -> None:
    def fails(message: str, **changes: Any) -> None:
        with pytest.raises(JaxptmError, match=message):
            train(config_of(home, "bad", **changes))

    tuned = str(Path(glue_run[0].out) / "model")
    moods = table(home, text_columns="text", label_column="mood")
    fails("has no column 'title', only 'text'", data={**moods, "text_columns": "title"})
    fails(r"table\.jsonl:\d+: the label '(good|bad)' is not one of fine", data={**moods, "labels": ["fine"]})
    fails("has the labels bad, good, and the head of .* 0, 1; set objective.new_head", data=moods, init_from=tuned)
    fails("class_weights: has 3 weights for 2 labels", data=moods, objective__class_weights=[1.0, 2.0, 3.0])
    fails("train.metric: an evaluation here has no 'bleu', only loss, accuracy", train__metric="bleu")
    fails("optimizer.frozen: no parameter's path begins with 'encoder/layer_9'", optimizer__frozen=["encoder/layer_9"])
    fails("data.task: .*'sst3'", data__task="sst3")
    fails("does not go with these keys of `data`", objective={"name": "question-answering"})
    fails("data.tokenizer: is missing", init_from=None, model="bert-tiny")
    fails("data.max_length: 128 is more than the 40 tokens", data__max_length=128)
    train_wordpiece(["other words of another text"] * 9, 150).save_pretrained(home / "other")
    fails(r"init_from: .*bert has another vocabulary \(\d+ entries\)", data__tokenizer=str(home / "other"))
    other_spelling = str(home / "." / "runs" / ".." / "table.jsonl")
    for name in (moods["train_file"], other_spelling):
        same = {**moods, "eval_file": name, "eval_fraction": 0.0}
        fails("data.eval_file: .* is what is learned from, too; hold a part of it out instead", data=same)
    pairs = table(home, text_columns=["text", "mood"], label_column="mood")
    one_kind = {"preset": str(home / "bert"), "type_vocab_size": 1}
    fails("model.type_vocab_size: 1 is too small for two texts a row", data=pairs, model=one_kind, init_from=None)
    fails("data.eval_fraction: 0.999 of the 60 rows of .* leaves none to", data={**moods, "eval_fraction": 0.999})
    alone = {"data": {**moods, "eval_fraction": 0.0}, "train__eval_every": 100}
    fails("train.export and train.patience: nothing is held out", train__export="best", **alone)
    fresh = config_of(home, "fresh", data=moods, init_from=tuned, objective__new_head=True, train__epochs=1)
    assert train(fresh)["finished"]


def test_a_head_is_not_taken_for_another(home: Path, glue_run: tuple[TrainConfig, dict[str, Any]]) -> None:
    moods = table(home, text_columns="text", label_column="mood")
    trained = config_of(home, "mooded", data=moods, train__epochs=1)
    train(trained)
    swapped = config_of(home, "swapped", data={**moods, "labels": ["good", "bad"]}, init_from=trained.out)
    said = r"good, bad are asked for, and the head of .* has bad, good, in this order"
    for ask in (train, lambda config: evaluate(trained.out, config)):
        with pytest.raises(JaxptmError, match=said):
            ask(swapped)
    with pytest.raises(JaxptmError, match=r"data\.labels: 0, 1 are asked for, and the head of .* has bad, good"):
        evaluate(trained.out, glue_run[0])
    away = {**moods, "train_file": str(home / "gone.jsonl"), "eval_file": moods["train_file"], "eval_fraction": 0.0}
    assert evaluate(trained.out, config_of(home, "away", data=away))["accuracy"] >= 0  # only what is measured is read
    numbered = home / "numbered"
    shutil.copytree(Path(trained.out) / "model", numbered)
    hf_config = json.loads((numbered / "config.json").read_text())
    hf_config |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    (numbered / "config.json").write_text(json.dumps(hf_config))
    with pytest.raises(
        JaxptmError, match=r"names its outputs LABEL_0 to LABEL_1, and the data its labels bad, good; li"
    ):
        evaluate(numbered, config_of(home, "numbered_run", data=moods))
    named = config_of(home, "numbered_run", data={**moods, "labels": ["bad", "good"]})
    assert evaluate(numbered, named) == pytest.approx(evaluate(trained.out, trained), abs=1e-6)
    tags = table(home, text_columns="words", label_column="tags")
    for task, data in (("sequence-classification", moods), ("token-classification", tags)):
        with pytest.raises(JaxptmError, match=r"is a BertModel, which nothing has trained to be a BertFor\w+"):
            evaluate(home / "bert", config_of(home, "x", objective={"name": task}, data=data))
    with pytest.raises(JaxptmError, match="--predictions: files for an official scorer are those of GLUE's test sets"):
        evaluate(trained.out, trained, home / "said")
    for task in ("token-classification", "question-answering", "fill-mask"):
        with pytest.raises(JaxptmError, match="is a BertForSequenceClassification, which nothing has trained to be a"):
            pipeline(task, trained.out)


def test_a_run_without_a_model_says_what_to_do(home: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(JaxptmError, match=r"is a run that has not come to its end, .* jaxptm convert"):
        from_pretrained(tmp_path)
    with pytest.raises(JaxptmError, match="is the directory of a run; name another one"):
        convert(str(home / "bert"), tmp_path)


def test_a_place_that_cannot_be_written(home: Path) -> None:
    for out in (home / "table.jsonl", home / "table.jsonl" / "run"):
        with pytest.raises(JaxptmError, match=r"out: .*table\.jsonl.* cannot be written"):
            train(config_of(home, "x").model_copy(update={"out": str(out)}))


def test_random_weights_are_asked_for(home: Path) -> None:
    named = config_of(home, "named", model=str(home / "bert"), train__epochs=1)
    random = named.model_copy(update={"init_from": None, "out": str(home / "runs/random")})
    train(named)
    train(random)
    ours, theirs = (flatten(restore_model(config.out).params) for config in (named, random))
    path = "embeddings/token/embedding"
    assert np.abs(ours[path] - flatten(from_pretrained(home / "bert").params)[path]).max() < 0.1
    assert not np.allclose(ours[path], theirs[path], atol=1e-2)

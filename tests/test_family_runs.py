"""Whole runs of the other objectives: they resume to the bit, run on every layout, and open in transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import test_training
import transformers
from test_training import STEPS, assert_equal_to_the_bit, config_of, interrupt_and_resume, write_corpus

from jaxptm.config import TrainConfig
from jaxptm.evaluation import evaluate
from jaxptm.metrics import read_metrics
from jaxptm.parallel import make_mesh
from jaxptm.pipelines import pipeline
from jaxptm.pretrained import from_pretrained
from jaxptm.resolving import resolve
from jaxptm.run import open_run
from jaxptm.training import _cost, restore_model, train
from jaxptm.types import JaxptmError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BPE = {"tokenizer": "train", "tokenizer_model": "bpe", "vocab_size": 300, "sequence_length": 32, "eval_fraction": 0.1}
RUNS: dict[str, dict[str, Any]] = {
    "electra": {
        # Two models to compile: a layer each.
        "model": {"preset": "electra-tiny", **SMALL, "num_hidden_layers": 1, "embedding_size": 16,
                  "max_position_embeddings": 32},
        "objective": {"name": "replaced-token"},
        "data__format": "packed",
        "optimizer": {"name": "bert_adam", "learning_rate": 2e-3, "schedule": "electra_linear", "warmup": 4},
    },
    "gpt2": {
        "model": {"preset": "gpt2-tiny", **SMALL, "max_position_embeddings": 40},
        "objective": {"name": "causal-lm"},
        "data": {**BPE, "format": "stream", "separate_documents": True},
    },
    "roberta": {
        "model": {"preset": "roberta-tiny", **SMALL, "max_position_embeddings": 34},
        "objective": {"name": "masked-lm"},
        "data": {**BPE, "format": "packed"},
    },
    "albert": {
        "model": {
            "preset": "albert-base", **SMALL, "embedding_size": 16, "max_position_embeddings": 32,
            "attention_probs_dropout_prob": 0.1,
        },
        "objective": {"name": "pretraining"},
    },
}  # fmt: skip
TERMS = {
    "electra": {"generator_loss", "discriminator_loss"},
    "gpt2": {"clm_loss"},
    "roberta": {"mlm_loss"},
    "albert": {"mlm_loss", "sop_loss"},
}
ARCHITECTURES = {
    "electra": {"model": "ElectraForPreTraining", "generator": "ElectraForMaskedLM"},
    "gpt2": {"model": "GPT2LMHeadModel"},
    "roberta": {"model": "RobertaForMaskedLM"},
    "albert": {"model": "AlbertForPreTraining"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("families")
    write_corpus(home / "corpus.txt")
    return home


def run_of(home: Path, kind: str, out: str, **changes: Any) -> TrainConfig:
    fields = {key: dict(value) if isinstance(value, dict) else value for key, value in RUNS[kind].items()}
    if "data" in fields:
        fields["data"]["files"] = str(home / "corpus.txt")
    return config_of(home, f"{kind}_{out}", **{**fields, **changes})


@pytest.fixture(scope="module", params=RUNS)
def finished(home: Path, request: pytest.FixtureRequest) -> tuple[str, TrainConfig, dict[str, Any]]:
    config = run_of(home, request.param, "whole")
    return request.param, config, train(config)


def test_a_run_learns_and_what_it_leaves_opens_in_transformers(
    finished: tuple[str, TrainConfig, dict[str, Any]],
) -> None:
    kind, config, results = finished
    assert TERMS[kind] <= results["train"].keys() and TERMS[kind] <= results["eval"].keys()
    lines = read_metrics(Path(config.out) / "metrics.jsonl")
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    for name, architecture in ARCHITECTURES[kind].items():
        directory = Path(config.out) / name
        model, info = getattr(transformers, architecture).from_pretrained(directory, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        assert len(tokenizer) <= model.config.vocab_size
        assert model.config.eos_token_id == tokenizer.eos_token_id
        ours = restore_model(config.out, part=name)
        exported = from_pretrained(directory, "auto")
        jax.tree.map(np.testing.assert_array_equal, ours.params, exported.params)
    assert evaluate(config.out, config) == pytest.approx(results["eval"], rel=1e-5)
    if kind == "gpt2":
        assert results["eval"]["perplexity"] == pytest.approx(math.exp(results["eval"]["clm_loss"]))
        (answer,) = pipeline("text-generation", Path(config.out) / "model")("Ab", max_new_tokens=5)
        assert answer["generated_text"].startswith("Ab") and len(answer["generated_text"]) > 2
    if kind == "electra":
        assert 0 < results["eval"]["replaced_share"] < 0.2
        with pytest.raises(JaxptmError, match="the run trains no part 'tail', only model, generator"):
            restore_model(config.out, part="tail")


def test_all_tokens_mlm_leaves_two_masked_lms_and_goes_on_where_it_stopped(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(home, "electra", "all_tokens", objective={"name": "all-tokens-mlm"})
    results = train(config)
    assert {"generator_loss", "model_loss", "restored_share"} <= results["eval"].keys()
    for name in ("model", "generator"):
        directory = Path(config.out) / name
        _, info = transformers.ElectraForMaskedLM.from_pretrained(directory, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with pytest.raises(JaxptmError, match="its head for copying is in the checkpoints of a run alone"):
        evaluate(config.out, config)
    again = run_of(home, "electra", "all_tokens_again", objective={"name": "all-tokens-mlm"})
    interrupt_and_resume(again, 13, monkeypatch)
    assert_equal_to_the_bit(again, config)


def test_all_tokens_mlm_is_for_a_model_with_a_generator(home: Path) -> None:
    config = run_of(home, "roberta", "all_tokens", objective={"name": "all-tokens-mlm"})
    with pytest.raises(
        JaxptmError, match=r"objective.name: a roberta does not learn 'all-tokens-mlm'; it learns masked"
    ):
        train(config)


def test_all_tokens_mlm_begins_with_random_weights(home: Path) -> None:
    with pytest.raises(JaxptmError, match=r"`init_from` does not go with `objective.name: all-tokens-mlm`"):
        run_of(home, "electra", "from", objective={"name": "all-tokens-mlm"}, init_from="somewhere")


@pytest.mark.parametrize("name", ["replaced-token", "all-tokens-mlm"])
def test_what_a_run_expects_to_need_goes_by_the_tokens_that_its_heads_run_on(home: Path, name: str) -> None:
    config = run_of(home, "electra", f"cost_{name}", objective={"name": name}, parallel={"data": 1})
    run = open_run(resolve(config))
    expected = 3 * run.objective.flops(config.train.batch_size, run.length)
    found = _cost(run, make_mesh(config.parallel, config.train)).model_flops
    assert found == pytest.approx(expected, rel=0.01)  # the head for copying is not in it


def test_an_interrupted_run_ends_with_the_same_bits(
    home: Path, finished: tuple[str, TrainConfig, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, whole, _ = finished
    config = run_of(home, kind, "interrupted")
    interrupt_and_resume(config, 13, monkeypatch)
    assert_equal_to_the_bit(config, whole)
    if kind == "electra":
        ours, theirs = (test_training.load_file(Path(c.out) / "generator/model.safetensors") for c in (config, whole))
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["electra", "gpt2"])
def test_layouts_change_nothing(home: Path, kind: str) -> None:
    still = {"model__hidden_dropout_prob": 0.0, "model__attention_probs_dropout_prob": 0.0, "train__steps": 8}
    still |= {"model__num_hidden_layers": 2}
    results = []
    for number, (accumulate, parallel) in enumerate(
        [
            (1, {"data": 1}),
            # ELECTRA's small generator has one head, which tensor parallelism cannot divide.
            (1, {"data": 2, "fsdp": 2, "tensor": 1 if kind == "electra" else 2, "scan": True}),
            (2, {"mode": "pmap", "data": 2, "remat": True}),
        ]
    ):
        config = run_of(home, kind, f"layout{number}", parallel=parallel, train__accumulate=accumulate, **still)
        train(config)
        results.append(test_training.weights(config.out))
    for other in results[1:]:
        for name, tensor in results[0].items():
            # Another rounding may let a generator draw another token; in these steps it does not.
            np.testing.assert_allclose(other[name], tensor, atol=2e-5, err_msg=name)


OTHER: dict[str, dict[str, Any]] = {
    name: {"name": name} for name in ("masked-lm", "replaced-token", "causal-lm", "clm")
}
WIDE = {"model__generator_size": 0.9, "model__hidden_size": 192, "model__num_attention_heads": 3}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt2", {"objective": OTHER["masked-lm"]}, "a gpt2 does not learn 'masked-lm'; it learns causal-lm"),
        (
            "roberta",
            {"objective": OTHER["replaced-token"]},
            "a roberta does not learn 'replaced-token'; it learns masked",
        ),
        ("electra", {"objective": OTHER["causal-lm"]}, "a electra does not learn 'causal-lm'"),
        ("electra", WIDE, "model.generator_size: 0.9 of the width 192 is 173, which 2 heads"),
        ("roberta", {"model__pad_token_id": 0}, "model.pad_token_id: is 0, but data.tokenizer train has 1; this model"),
        ("roberta", {"data__sequence_length": 33}, "33 is more than the 32 tokens that the model has positions for"),
        ("gpt2", {"objective": OTHER["clm"]}, "objective: `name` should be 'masked-lm' or 'pretraining'"),
        ("electra", {"optimizer__layer_decay": 0.9}, "optimizer.layer_decay: needs one model whose layers have"),
        ("albert", {"optimizer__layer_decay": 0.9}, "optimizer.layer_decay: needs one model whose layers have"),
    ],
)
def test_what_does_not_go_together(home: Path, kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JaxptmError, match=message):
        train(run_of(home, kind, f"bad{abs(hash(message))}", **changes))


def test_tokenizers_without_the_tokens_that_are_needed(home: Path) -> None:
    """GPT-2's has neither mask nor padding: enough for a stream, for nothing else."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2}, "a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    directory = home / "bare_tokenizer"
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(directory)
    data = {"files": str(home / "corpus.txt"), "tokenizer": str(directory), "sequence_length": 32, "eval_fraction": 0.1}
    bert = {"preset": "bert-tiny", **SMALL}
    for name, model, shape, message in (
        ("masked", bert, "packed", "has no mask token, which objective.name: masked-lm needs"),
        ("packed", RUNS["gpt2"]["model"], "packed", "the tokenizer has no pad, cls, sep token, which rows of text are"),
    ):
        objective = {"name": "masked-lm" if name == "masked" else "causal-lm"}
        config = config_of(home, f"bare_{name}", model=model, objective=objective, data={**data, "format": shape})
        with pytest.raises(JaxptmError, match=message):
            train(config)
    stream = {"model": RUNS["gpt2"]["model"], "objective": {"name": "causal-lm"}, "data": {**data, "format": "stream"}}
    assert train(config_of(home, "bare_stream", train__steps=1, optimizer__warmup=0, **stream))["step"] == 1
    assert STEPS > 1


def test_training_goes_on_from_the_two_models_of_a_run(home: Path) -> None:
    first = run_of(home, "electra", "first", train__steps=2, optimizer__warmup=1)
    train(first)
    second = run_of(home, "electra", "second", train__steps=1, optimizer__warmup=0, init_from=first.out,
                    optimizer__learning_rate=1e-30)  # fmt: skip
    train(second)
    for name in ("model", "generator"):
        ours, theirs = (test_training.load_file(Path(c.out) / name / "model.safetensors") for c in (second, first))
        assert all(np.allclose(ours[key], theirs[key], atol=1e-7) for key in ours)


def test_two_models_may_begin_as_one_masked_lm(home: Path) -> None:
    """Clark et al. 2020, section 3.3: the discriminator begins with the weights of a generator of its size."""
    whole = {"model__generator_size": 1.0}
    first = config_of(
        home,
        "electra_mlm",
        model={**RUNS["electra"]["model"], "generator_size": 1.0, "num_hidden_layers": 2},
        objective={"name": "masked-lm"},
        data__format="packed",
        train__steps=2,
        optimizer__warmup=1,
    )
    train(first)
    options: dict[str, Any] = {"train__steps": 1, "optimizer__warmup": 0, "init_from": str(Path(first.out) / "model")}
    options |= {"model__num_hidden_layers": 2}
    second = run_of(home, "electra", "both", optimizer__learning_rate=1e-30, **options, **whole)
    train(second)
    start = test_training.weights(first.out)
    for name in ("model", "generator"):
        ours = test_training.load_file(Path(second.out) / name / "model.safetensors")
        shared = ours.keys() & start.keys()
        assert any("layer.1" in key for key in shared) and any("word_embeddings" in key for key in shared)
        assert all(np.allclose(ours[key], start[key], atol=1e-7) for key in shared)
    with pytest.raises(JaxptmError, match=r"weight\(s\) do not fit the model|init_from: .* does not fit `model`"):
        train(run_of(home, "electra", "smaller", **options))
    # Four heads cut the same kernels otherwise than two: no shape shows it.
    with pytest.raises(JaxptmError, match="generator: num_attention_heads 2 there, 4 here"):
        train(run_of(home, "electra", "heads", model__num_attention_heads=4, **options, **whole))
    with pytest.raises(
        JaxptmError, match=r"is one model, and replaced-token is measured with model and generator of a"
    ):
        evaluate(Path(first.out) / "model", second)

"""Every config in the repository, and every way to get one wrong."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import yaml

from jaxptm.architectures import model_config
from jaxptm.config import RATE, AudioData, TextData, TrainConfig, dump_config, load_config, validate
from jaxptm.optim import schedule
from jaxptm.types import JaxptmError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SMALL = """
model: bert-tiny
objective: {name: pretraining}
data: {files: corpus.txt, tokenizer: vocab.txt}
optimizer: {name: adamw, learning_rate: 1e-4}
train: {steps: 10, batch_size: 8}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_holds_together(path: Path) -> None:
    config = load_config(path)
    if isinstance(config.data, AudioData):
        if config.objective.name == "contrastive":
            _, model = model_config(config.model, None)
            assert 4 * model.receptive_field < config.data.min_seconds * RATE < config.data.max_seconds * RATE
            assert 0.05 <= config.optimizer.warmup / config.train.steps <= 0.1 or config.optimizer.warmup < 1
        else:
            assert config.model == config.init_from
            assert config.optimizer.frozen == ["embeddings/feature_encoder"]
    elif path.parent.name == "pretrain":
        _, model = model_config(config.model, config.data.vocab_size or 30522)
        assert config.data.sequence_length <= model.max_position_embeddings
        assert config.train.steps is not None
    else:  # begins with somebody's weights, and lasts as long as the data says
        assert config.model == config.init_from and config.data.max_length <= 512
        assert config.train.steps is None and config.train.epochs
    steps, peak = config.train.steps or 1000, config.optimizer.learning_rate
    rates = [float(schedule(config.optimizer, steps)(step)) for step in (0, steps // 10, steps)]
    tri_stage = config.optimizer.schedule == "tri_stage"  # which goes from 1% to 5% of the peak
    assert rates[0] == pytest.approx(0.01 * peak if tri_stage else 0) and 0 < rates[1] <= peak * (1 + 1e-6)
    assert rates[2] == pytest.approx(0.05 * peak if tri_stage else 0, abs=1e-8)
    story = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in story.splitlines())
    for word in ("Paper:", "Command:", "Expect:"):
        assert word in story
    assert f"configs/{path.parent.name}/{path.name}" in story or "make quickstart" in story


def test_the_configs_that_must_exist_do() -> None:
    names = {path.stem for path in CONFIGS if path.parent.name == "pretrain"}
    assert {"quickstart", "bert_tiny", "bert_mini", "bert_base", "bert_large"} <= names
    assert {"roberta_base", "electra_small", "electra_base", "gpt2_small", "wav2vec2_tiny", "wav2vec2_base"} <= names
    names = {path.stem for path in CONFIGS if path.parent.name == "finetune"}
    assert {"glue", "squad", "classification", "token_classification", "ctc", "audio_classification"} <= names


def test_bert_base_is_the_paper_s_recipe() -> None:
    config = load_config(ROOT / "configs/pretrain/bert_base.yaml")
    assert (config.optimizer.name, config.optimizer.learning_rate, config.optimizer.warmup) == (
        "bert_adam",
        1e-4,
        10_000,
    )
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.epsilon) == (0.9, 0.999, 1e-6)
    assert (config.optimizer.weight_decay, config.optimizer.clip, config.train.batch_size) == (0.01, 1.0, 256)
    assert config.optimizer.schedule == "bert_linear" and config.objective.max_predictions == 20


def test_defaults_and_overrides(small: Path) -> None:
    config = load_config(
        small,
        ["train.steps=20", "data.files=[a.txt, b.txt]", "optimizer.learning_rate=3e-5", "model={preset: bert-mini}"],
    )
    assert config.out == "runs/small"
    assert config.train.steps == 20 and config.data.files == ["a.txt", "b.txt"]
    assert config.optimizer.learning_rate == 3e-5  # YAML 1.1 would read a string
    assert config.model == {"preset": "bert-mini"}
    assert config.parallel.mode == "jit" and config.init_from is None


def test_a_dumped_config_is_read_back_equal(small: Path, tmp_path: Path) -> None:
    config = load_config(small, ["optimizer.warmup=0.06", "optimizer.clip=null"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


def test_configs_are_frozen(small: Path) -> None:
    config = load_config(small)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=5", "train.stpes: there is no such key"),
        ("colour=red", "colour: there is no such key"),
        ("train.steps=many", "train.steps: input should be a valid integer, not 'many'"),
        ("train.steps='5'", "train.steps: input should be a valid integer, not '5'"),
        ("train.steps=0", "train.steps: input should be greater than 0, not 0"),
        ("train.batch_size=2.5", "train.batch_size: input should be a valid integer"),
        ("train.epochs=1.0", "train: give exactly one of `steps` and `epochs`"),
        ("train.accumulate=3", "train: `batch_size` 8 does not divide into `accumulate` 3"),
        ("train.dtype=float16", "train.dtype: input should be 'float32' or 'bfloat16', not 'float16'"),
        ("optimizer.name=sgd", "optimizer.name: input should be 'adamw', 'bert_adam' or 'lamb', not 'sgd'"),
        ("optimizer.learning_rate=-1.0", "optimizer.learning_rate: input should be greater than 0, not -1.0"),
        ("optimizer.warmup=1.5", "optimizer.warmup"),
        ("optimizer.warmup=-3", "optimizer.warmup"),
        ("optimizer.beta2=1.0", "optimizer.beta2: input should be less than 1, not 1.0"),
        ("objective.mask_probability=1.5", "objective.mask_probability: input should be less than 1, not 1.5"),
        ("objective.masking=letters", "objective.masking: input should be 'tokens', 'words' or 'spans', not 'letters'"),
        ("data.sequence_length=4", "data.sequence_length: input should be greater than or equal to 8, not 4"),
        ("data.vocab_size=100", "data: `vocab_size` is needed with `tokenizer: train`, and only there"),
        ("data.separate_documents=true", "data: `separate_documents` is for `format: packed`"),
        ("data.format=packed", "`objective.name: pretraining` predicts next sentences and needs `data.format: pairs`"),
        ("objective.dupe_factor=10", "`objective.dupe_factor` needs rows that come back: pairs are cut anew"),
        ("parallel.tensor=0", "parallel.tensor"),
        ("parallel.remat=some", "parallel.remat"),
        ("parallel.mode=xmap", "parallel.mode"),
        ("data=null", "data"),
    ],
)
def test_a_wrong_value_is_named_with_its_path_and_file(small: Path, override: str, message: str) -> None:
    with pytest.raises(JaxptmError) as error:
        load_config(small, [override])
    assert message in str(error.value)
    assert str(small) in str(error.value)


def test_all_wrong_values_are_listed_at_once(small: Path) -> None:
    with pytest.raises(JaxptmError, match=r"(?s)3 value\(s\) do not fit.*train.steps.*") as error:
        load_config(small, ["train.steps=-1", "optimizer.name=sgd", "nonsense=1"])
    assert "optimizer.name" in str(error.value) and "nonsense" in str(error.value)


def test_missing_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bare.yaml"
    path.write_text(yaml.safe_dump({"model": "bert-tiny", "train": {"steps": 1}}))
    with pytest.raises(JaxptmError) as error:
        load_config(path)
    for key in ("objective", "data", "optimizer", "train.batch_size"):
        assert f"{key}: is missing" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [1, 2", "bad.yaml: line 1 is not YAML"),
        (b"just words", "bad.yaml: expected `key: value` lines"),
        (b"train: {steps: 1}\nmodel: x\ntrain: {seed: 2}\n", "bad.yaml: line 3 is not YAML: `train` is there twice"),
        (b"", "bad.yaml: expected `key: value` lines"),
        (b"model: \xff\xfe", "bad.yaml: the config is not UTF-8"),
        (None, "bad.yaml: cannot read the config: No such file"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(JaxptmError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "write it as key.key=value"),
        ("=3", "write it as"),
        ("model.x=1", "`model` holds the value"),
        ("train.steps=[1", "is not YAML"),
        ("data.files=*.txt", "is not YAML: .*; put a value that begins with"),
    ],
)
def test_a_malformed_override(small: Path, override: str, message: str) -> None:
    with pytest.raises(JaxptmError, match=message):
        load_config(small, [override])


SPEECH = """
model: wav2vec2-base
objective: {name: ctc}
data: {train: [dev, "me/speech:clean"], eval: test, max_seconds: 15, vocabulary: characters}
optimizer: {learning_rate: 1e-4}
train: {steps: 10, batch_size: 8}
"""


def test_speech(tmp_path: Path) -> None:
    path = tmp_path / "speech.yaml"
    path.write_text(SPEECH)
    config = load_config(path)
    assert isinstance(config.data, AudioData) and config.data.max_seconds == 15
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pydantic's, where it takes the data for another kind
        (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert load_config(path, ["objective.name=contrastive", "data.vocabulary=null"]).data.vocabulary is None
    labelled = load_config(
        path, ["objective.name=sequence-classification", "data.vocabulary=null", "data.labels=[up, down]"]
    )
    assert isinstance(labelled.data, AudioData)
    some = load_config(path, ["objective.name=contrastive", "data.vocabulary=null", "train.eval_batches=2"])
    assert some.train.eval_batches == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.minimum=3", "data.minimum: there is no such key"),
        ("data.max_seconds=0", "data.max_seconds: input should be greater than 0"),
        ("data.min_seconds=16", "data: `min_seconds` 16.0 is more than `max_seconds` 15.0"),
        ("data.eval_fraction=0.5", "data: give `eval` or `eval_fraction`, not both"),
        ("data.labels=[a, a]", "data: `labels` names one label twice"),
        ("data.unusable=ignore", "data.unusable: input should be 'skip' or 'error', not 'ignore'"),
        ("data.batches=tokens", "data.batches: input should be 'samples' or 'rows', not 'tokens'"),
        ("train.eval_batches=2", "`train.eval_batches` is for pre-training: figures over labelled data read all of it"),
        ("objective.name=contrastive", "`data.vocabulary` is of transcripts, which only `objective.name: ctc` reads"),
        ("objective.name=masked-lm", r"does not go with these keys of `data`: it reads text \(`data.files`\)"),
        ("data={task: rte}", r"does not go with these keys of `data`: it reads speech \(`data.train`\)"),
    ],
)
def test_wrong_speech_is_named(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "speech.yaml"
    path.write_text(SPEECH)
    with pytest.raises(JaxptmError, match=message):
        load_config(path, [override])


def test_parts_are_checked_alone() -> None:
    assert validate(TextData, {"files": "a.txt", "tokenizer": "b"}, "here").sequence_length == 128
    with pytest.raises(JaxptmError, match=r"here: 1 value.*\n  files: .* valid string, not 3 or .* valid list, not 3"):
        validate(TextData, {"files": 3, "tokenizer": "b"}, "here")


def test_home_is_where_a_shell_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fields = {
        "model": {"preset": "~/bert"},
        "objective": {"name": "masked-lm"},
        "data": {"files": ["~/a.txt", "b~/c.txt"], "tokenizer": "~/t", "format": "packed"},
        "optimizer": {"learning_rate": 1e-4},
        "train": {"steps": 1, "batch_size": 1},
        "out": "~/runs/x",
    }
    config = validate(TrainConfig, fields, "here")
    assert config.out == f"{tmp_path}/runs/x" and config.model == {"preset": f"{tmp_path}/bert"}
    assert isinstance(config.data, TextData) and config.data.files == [f"{tmp_path}/a.txt", "b~/c.txt"]

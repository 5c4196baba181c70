"""Training configs: YAML in, typed, frozen, strict objects out.

A key that does not exist, a wrong type or a value out of range is an error that names the file and the dotted path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from jaxptm.errors import JaxptmError

IGNORED = -100
"""Label of a token that is not asked for, as in PyTorch and transformers."""
RATE = 16_000
"""Samples of audio a second, of all models."""
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Base of every config: unknown keys are refused, types are not coerced, instances are immutable and hashable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


C = TypeVar("C", bound=Config)


class TextData(Config):
    """A text corpus and how examples are cut from it."""

    files: str | list[str]
    """Paths, URLs (`gs://`, `s3://`, `https://`) or globs of both (`.txt`, `.jsonl`, both also `.gz` or `.zst`,
    `.parquet`), or names of Hugging Face datasets."""
    eval_files: str | list[str] | None = None
    """Held-out text, in the same forms. Without it `eval_fraction` of the documents of `files` is held out."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    text_field: str = "text"
    """Which field of a `.jsonl`, `.parquet` or dataset record holds the text."""
    tokenizer: str
    """A directory, a `vocab.txt`, a hub name, or `train`: a vocabulary trained on `files`."""
    tokenizer_model: Literal["wordpiece", "bpe"] = "wordpiece"
    """What `tokenizer: train` learns: BERT's WordPiece, or the byte-level BPE of GPT-2 and RoBERTa."""
    vocab_size: Positive | None = None
    """Entries of the vocabulary to train; only with `tokenizer: train`."""
    lowercase: bool = True
    """Whether a WordPiece vocabulary trained here, or read from a bare `vocab.txt`, folds case and strips accents;
    `tokenizer_model: bpe` always keeps both."""
    sequence_length: Annotated[int, Field(ge=8)] = 128
    format: Literal["pairs", "packed", "stream"] = "pairs"
    """`pairs`: [CLS] A [SEP] B [SEP] with B the next segment or a random one (ALBERT: the two in their order or not).
    `packed`: [CLS], as many whole sentences as fit, [SEP]. `stream`: rows full of tokens, with no frame (GPT-2)."""
    short_probability: Share = 0.1
    """Share of the pairs that aim for a random shorter length (BERT: 0.1)."""
    separate_documents: bool = False
    """`packed` and `stream`: tokens of one document do not attend to those of another in the same row."""
    prepared: str | None = None
    """Directory of the token shards, on a local disk; default `<parent of out>/prepared/<fingerprint>`, and for an
    `out` in a bucket `runs/remote/prepared/<fingerprint>`."""

    @model_validator(mode="after")
    def _check(self) -> TextData:
        if (self.tokenizer == "train") != (self.vocab_size is not None):
            raise ValueError("`vocab_size` is needed with `tokenizer: train`, and only there")
        if self.separate_documents and self.format == "pairs":
            raise ValueError(
                "`separate_documents` is for `format: packed` or `stream`; pairs hold one document or two on purpose"
            )
        return self


class LabelledData(Config):
    """What all data with labels has."""

    tokenizer: str | None = None
    """A directory, a `vocab.txt` or a hub name; default that of the model."""
    lowercase: bool = True
    """Whether a tokenizer read from a bare `vocab.txt` folds case and strips accents."""
    max_length: Annotated[int, Field(ge=8)] = 128
    """Tokens of a row at most; longer texts are cut (question-answering: read in several windows)."""


class GlueData(LabelledData):
    """A task of GLUE (Wang et al. 2018)."""

    task: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
    path: str | None = None
    """Directory of the original TSV files, of all tasks or of this one; default `nyu-mll/glue` on the hub."""
    eval_split: Literal["dev", "test"] = "dev"
    """What is evaluated; `test` has no labels, its predictions are written and not scored."""
    labels: list[str] | None = None
    """Names of the labels, in the order of the head; default those of the model, or else that of the task."""


class SquadData(LabelledData):
    """Questions on paragraphs, in the JSON of SQuAD (Rajpurkar et al. 2016, 2018)."""

    train_file: str
    eval_file: str | None = None
    version_2: bool = False
    """Whether questions may have no answer."""
    max_length: Annotated[int, Field(ge=16)] = 384
    stride: Annotated[int, Field(ge=0)] = 128
    """Tokens of the context that a window shares with the one before it, as in run_qa.py of transformers; the
    doc_stride of google-research/bert is what it does not share."""
    max_question_length: Positive = 64
    """Tokens of a question; what is longer is cut."""
    max_answer_length: Positive = 30
    """Tokens of an answer."""
    n_best: Positive = 20
    """Candidates written for each question."""
    null_threshold: float = 0.0
    """An answer is given where the score of none, less that of the best, is at most this (`version_2`)."""


class TableData(LabelledData):
    """Your own examples: CSV, TSV, JSONL or Parquet with named columns, a Hugging Face dataset, or CoNLL columns."""

    train_file: str
    eval_file: str | None = None
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of `train_file` that is held out where there is no `eval_file`."""
    text_columns: str | list[str]
    """One column, or two for pairs; of tokens, for token-classification (of a CoNLL file the number of the column)."""
    choice_columns: str | list[str] | None = None
    """multiple-choice: a column for each ending of the text, or one that lists them."""
    label_column: str | list[str]
    """Several labels an example: one column that lists them, or a column of 0 and 1 for each."""
    labels: list[str] | None = None
    """Names of the labels, in the order of the head; default those of the model, or else what `train_file` holds."""

    @property
    def texts(self) -> list[str]:
        return [self.text_columns] if isinstance(self.text_columns, str) else self.text_columns

    @model_validator(mode="after")
    def _check(self) -> TableData:
        if not 1 <= len(self.texts) <= 2:
            raise ValueError(f"`text_columns` names {len(self.texts)} columns; a row has one text or two")
        if self.eval_file is not None and self.eval_fraction > 0:
            raise ValueError("give `eval_file` or `eval_fraction`, not both")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError("`labels` names one label twice")
        return self


class AudioData(Config):
    """Recorded speech, with transcripts or labels where the objective needs them."""

    train: str | list[str]
    """Folders of audio, LibriSpeech trees, an LJSpeech directory, manifests (`.tsv` of `path<TAB>text`, `.jsonl`),
    globs of them, or Hugging Face datasets (`name:config:split`)."""
    eval: str | list[str] | None = None
    """What is held out, in the same forms."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the utterances of `train` that is held out where there is no `eval`."""
    text_column: str = "text"
    """What a `.jsonl` manifest, a `.tsv` with a header or a dataset calls the transcript."""
    label_column: str = "label"
    """What they call the class; in a folder without transcripts it is the folder that a file lies in."""
    labels: list[str] | None = None
    """Names of the classes, in the order of the head; default those of the model, or else what `train` holds."""
    vocabulary: str | None = None
    """Of the transcripts (`ctc`): a `vocab.json`, a directory or hub name with one, or `characters`: those of `train`;
    default that of the model."""
    ignore_characters: str = ""
    """Taken out of all transcripts, such as `,.;:!?`."""
    min_seconds: Annotated[float, Field(ge=0)] = 0.1
    max_seconds: Annotated[float, Field(gt=0)] = 20.0
    """`contrastive` draws so much of what is longer, at random and anew each epoch; for all else that is unusable."""
    unusable: Literal["skip", "error"] = "skip"
    """What to do with audio that is damaged, empty, too short or too long, and with transcripts that are missing or
    have characters outside the vocabulary: leave out, with a count of each kind in the log, or refuse."""
    batches: Literal["samples", "rows"] = "samples"
    """`samples`: `train.batch_size` of the longest utterances make a batch, and of shorter ones as many times more as
    have no more samples (wav2vec 2.0 and fairseq count so); `rows`: `train.batch_size` of any length."""
    prepared: str | None = None
    """Directory of the decoded audio, on a local disk; default `<parent of out>/prepared/<fingerprint>`."""

    @model_validator(mode="after")
    def _check(self) -> AudioData:
        if self.eval is not None and self.eval_fraction > 0:
            raise ValueError("give `eval` or `eval_fraction`, not both")
        if self.min_seconds > self.max_seconds:
            raise ValueError(f"`min_seconds` {self.min_seconds} is more than `max_seconds` {self.max_seconds}")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError("`labels` names one label twice")
        return self


def _data_kind(data: Any) -> str:
    """Which kind of data some fields describe, by the keys that only it has."""
    keys = set(data) if isinstance(data, dict) else set(getattr(type(data), "model_fields", ()))
    if keys & {"train", "eval", "max_seconds", "vocabulary"}:
        return "audio"
    if keys & {"task", "path"}:
        return "glue"
    if keys & {"text_columns", "choice_columns", "label_column"}:
        return "table"
    return "squad" if keys & {"train_file", "eval_file"} and "files" not in keys else "text"


Data = Annotated[
    Annotated[TextData, Tag("text")]
    | Annotated[GlueData, Tag("glue")]
    | Annotated[SquadData, Tag("squad")]
    | Annotated[TableData, Tag("table")]
    | Annotated[AudioData, Tag("audio")],
    Discriminator(_data_kind),
]


class MaskedLmConfig(Config):
    """`masked-lm`; or `pretraining`, with next sentences (BERT section 3.1) or the order of sentences (ALBERT 3.1)."""

    name: Literal["masked-lm", "pretraining"]
    masking: Literal["tokens", "words", "spans"] = "tokens"
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    max_predictions: Positive | None = None
    """Static number of prediction slots a row; default `ceil(mask_probability * sequence_length)`."""

    def slots(self, sequence_length: int) -> int:
        """Prediction slots of a row of `sequence_length` tokens."""
        return self.max_predictions or math.ceil(self.mask_probability * sequence_length)


class ReplacedTokenConfig(Config):
    """`replaced-token`: a discriminator finds the tokens that a generator, trained beside it, has put in (ELECTRA)."""

    name: Literal["replaced-token"]
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    max_predictions: Positive | None = None
    """Static number of tokens a row to replace; default `int((mask_probability + 0.005) * sequence_length)`."""
    generator_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the generator's masked-LM loss in the sum."""
    discriminator_weight: Annotated[float, Field(ge=0)] = 50.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the generator's distribution that replacements are drawn from."""

    def slots(self, sequence_length: int) -> int:
        """Prediction slots of a row of `sequence_length` tokens (google-research/electra, configure_pretraining.py)."""
        return self.max_predictions or max(1, int((self.mask_probability + 0.005) * sequence_length))


class CausalLmConfig(Config):
    """`causal-lm`: predict each token from those before it (GPT-2)."""

    name: Literal["causal-lm"]

    def slots(self, sequence_length: int) -> int:
        """Tokens of a row that the head runs on."""
        return sequence_length


ClassWeights = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] | Literal["balanced"]


class FineTuningConfig(Config):
    """What all objectives over labelled data have."""

    name: str
    new_head: bool = False
    """Begin with a fresh head, whatever the weights that are loaded have; for a head of other labels."""

    def slots(self, sequence_length: int) -> int:
        """Tokens of a row that a language-model head runs on: there is none."""
        return 0


class SequenceClassificationConfig(FineTuningConfig):
    """`sequence-classification`: a label, several, or a number for each text or pair of texts."""

    name: Literal["sequence-classification"]
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """As in transformers; default what the GLUE task is, or else one label."""
    class_weights: ClassWeights | None = None
    """Weight of the examples of each label in the loss (several labels: of those that have it); `balanced`: inversely
    to how often each occurs, as in scikit-learn."""

    @model_validator(mode="after")
    def _check(self) -> SequenceClassificationConfig:
        if self.class_weights is not None and self.problem_type == "regression":
            raise ValueError("`class_weights` needs labels, and `problem_type: regression` has none")
        return self


class TokenClassificationConfig(FineTuningConfig):
    """`token-classification`: a label for each word."""

    name: Literal["token-classification"]
    class_weights: ClassWeights | None = None
    """Weight of the words of each label in the loss; `balanced` as in scikit-learn."""


class MultipleChoiceConfig(FineTuningConfig):
    """`multiple-choice`: which of several endings belongs to a text."""

    name: Literal["multiple-choice"]


class QuestionAnsweringConfig(FineTuningConfig):
    """`question-answering`: which stretch of a context answers a question, if any."""

    name: Literal["question-answering"]


class ContrastiveConfig(Config):
    """`contrastive`: find the quantised form of each masked frame among others (wav2vec 2.0).

    The defaults are those of the base model (Baevski et al. 2020, section 4.2; fairseq,
    wav2vec2_base_librispeech.yaml). The large one has `last_temperature: 0.1`, `feature_weight: 0` and
    `feature_gradient: 1`.
    """

    name: Literal["contrastive"]
    mask_probability: Annotated[float, Field(gt=0, le=1)] = 0.65
    """Frames in spans over all frames, overlaps counted twice; about half of the frames are masked. The paper's p is a
    tenth of it."""
    mask_length: Positive = 10
    """Frames of a span."""
    negatives: Positive = 100
    """Other masked frames of the same row that each one is found among."""
    logit_temperature: Annotated[float, Field(gt=0)] = 0.1
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Of the quantiser's softmax, at the start."""
    last_temperature: Annotated[float, Field(gt=0)] = 0.5
    temperature_decay: Annotated[float, Field(gt=0, le=1)] = 0.999995
    """What multiplies it at every step, down to `last_temperature`."""
    diversity_weight: Annotated[float, Field(ge=0)] = 0.1
    feature_weight: Annotated[float, Field(ge=0)] = 10.0
    """Of the mean square of the convolutions' features."""
    feature_gradient: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Multiplies the gradient of the convolutions."""

    def slots(self, sequence_length: int) -> int:
        """Tokens of a row that a language-model head runs on: there is none."""
        return 0


class CtcConfig(FineTuningConfig):
    """`ctc`: a transcript, by connectionist temporal classification.

    The masks are those of wav2vec 2.0 with ten hours of labels (fairseq, base_10h.yaml); 0 switches them off.
    """

    name: Literal["ctc"]
    mask_probability: Share = 0.65
    """Frames in spans over all frames, in training."""
    mask_length: Positive = 10
    channel_mask_probability: Share = 0.5
    """Channels in spans over all channels, in training."""
    channel_mask_length: Positive = 64


ObjectiveConfig = Annotated[
    MaskedLmConfig
    | ReplacedTokenConfig
    | CausalLmConfig
    | SequenceClassificationConfig
    | TokenClassificationConfig
    | MultipleChoiceConfig
    | QuestionAnsweringConfig
    | ContrastiveConfig
    | CtcConfig,
    Field(discriminator="name"),
]
"""What the model learns, by `name`."""


class OptimizerConfig(Config):
    """An optax optimizer. `bert_adam` is the one of BERT and ELECTRA: AdamW without bias correction."""

    name: Literal["adamw", "bert_adam", "lamb"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["linear", "bert_linear", "electra_linear", "cosine", "constant", "inverse_sqrt", "tri_stage"] = (
        "linear"
    )
    warmup: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = 0
    """Steps (an integer) or a share of all steps (a fraction below one)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Global gradient norm; null switches clipping off."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Annotated[float, Field(gt=0)] = 1e-6
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate from a layer to the one below (ELECTRA's fine-tuning: 0.8); heads keep all of it."""
    layer_decay_form: Literal["paper", "code"] = "paper"
    """`code`: as google-research/electra computes it, with one factor more below the heads than the paper says."""
    frozen: list[str] = []
    """Parts that stay as they are, by the beginning of their paths: `embeddings`, `encoder/layer_0`, `encoder`."""


class LoopConfig(Config):
    """The training loop. Exactly one of `steps` and `epochs` is given."""

    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Positive
    """Rows an optimizer step, over all devices and microbatches."""
    accumulate: Positive = 1
    """Microbatches a step; the result does not depend on it."""
    seed: Annotated[int, Field(ge=0)] = 0
    log_every: Positive = 10
    eval_every: Positive | Literal["epoch"] = 1000
    """Steps; there is an evaluation at the end in any case."""
    eval_batches: Positive | None = None
    """Batches an evaluation reads; null reads all that is held out."""
    checkpoint_every: Positive | Literal["epoch"] = 1000
    keep: Positive = 2
    """How many of the newest checkpoints stay; the best one stays besides."""
    metric: str = "loss"
    """The figure of an evaluation that makes a checkpoint the best: the largest, of a loss the lowest."""
    patience: Positive | None = None
    """Stop early, after so many evaluations in a row without a better `metric`."""
    export: Literal["last", "best"] = "last"
    """Which parameters become `model/`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; norms, softmax and losses stay in float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the stored parameters; the optimizer's moments stay in float32, and updates are rounded at random."""

    @model_validator(mode="after")
    def _check(self) -> LoopConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        if self.batch_size % self.accumulate:
            raise ValueError(f"`batch_size` {self.batch_size} does not divide into `accumulate` {self.accumulate}")
        return self


class ParallelConfig(Config):
    """How the step is laid out over devices. Results do not depend on it, but for rounding."""

    mode: Literal["jit", "pmap"] = "jit"
    """`pmap`: the same step, mapped over devices that each hold all parameters."""
    data: Positive | None = None
    """Devices that share the batch and hold copies of the parameters; default all that `fsdp` and `tensor` leave."""
    fsdp: Positive = 1
    """Devices that share the batch and divide parameters and optimizer state among them."""
    tensor: Positive = 1
    """Devices that divide each layer among them: its heads, its inner width, and the vocabulary."""
    remat: bool | Literal["dots"] = False
    """Recompute activations in the backward pass: true for all of a layer (least memory, about a third more compute),
    `dots` for all but the products with weight matrices."""
    scan: bool = False
    """Compile one layer and scan it: compiles faster, on CPU runs slower."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.mode == "pmap" and self.fsdp * self.tensor > 1:
            raise ValueError("`mode: pmap` copies the parameters to every device: leave `fsdp` and `tensor` at 1")
        return self


DATA_OF: dict[str, tuple[type[Config], ...]] = {
    "sequence-classification": (GlueData, TableData, AudioData),
    "token-classification": (TableData,),
    "multiple-choice": (TableData,),
    "question-answering": (SquadData,),
    "contrastive": (AudioData,),
    "ctc": (AudioData,),
}
"""What fine-tuning and speech read; all other objectives read `TextData`."""
DATA_KEYS: dict[type[Config], str] = {
    TextData: "text (`data.files`)",
    GlueData: "a task of GLUE (`data.task`)",
    SquadData: "questions (`data.train_file`, and no columns)",
    TableData: "a table (`data.train_file`, `data.text_columns`, `data.label_column`)",
    AudioData: "speech (`data.train`)",
}


class TrainConfig(Config):
    """A whole training run."""

    model: str | dict[str, Any]
    """A preset (`bert-base`), a directory or hub name whose config is taken, or `{preset: ..., field: value}`."""
    objective: ObjectiveConfig
    data: Data
    optimizer: OptimizerConfig
    train: LoopConfig
    parallel: ParallelConfig = ParallelConfig()
    init_from: str | None = None
    """Weights to start from: a Hugging Face directory or hub name, or `model/` of a run. Fine-tuning begins with those
    of `model` where this is absent and `model` names some; null is for random ones."""
    out: str
    """The run directory; it may be one in a bucket, `gs://bucket/runs/name`."""

    @model_validator(mode="before")
    @classmethod
    def _model_of_weights(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("init_from") is not None:
            return {"model": fields["init_from"], **fields}
        return fields

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        name, data = self.objective.name, self.data
        wanted = DATA_OF.get(name, (TextData,))
        if not isinstance(data, wanted):
            raise ValueError(
                f"`objective.name: {name}` does not go with these keys of `data`: it reads "
                f"{' or '.join(DATA_KEYS[kind] for kind in wanted)}"
            )
        if isinstance(data, TextData):
            if name == "pretraining" and data.format != "pairs":
                raise ValueError("`objective.name: pretraining` predicts next sentences and needs `data.format: pairs`")
            if name == "causal-lm" and data.format == "pairs":
                raise ValueError("`objective.name: causal-lm` reads running text: set `data.format: stream` or packed")
        elif self.train.eval_batches is not None and not isinstance(data, AudioData):
            raise ValueError("`train.eval_batches` is for text: figures over labelled data read all of it")
        if isinstance(data, AudioData) and data.vocabulary is not None and name != "ctc":
            raise ValueError("`data.vocabulary` is of transcripts, which only `objective.name: ctc` reads")
        if isinstance(data, TableData) and (data.choice_columns is not None) != (name == "multiple-choice"):
            raise ValueError("`data.choice_columns` is needed with `objective.name: multiple-choice`, and only there")
        return self


class _Loader(yaml.SafeLoader):
    """Reads `1e-4` as a number, as YAML 1.2 does and PyYAML does not."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file, applies `key.key=value` overrides, and checks the result.

    `out` defaults to `runs/<file name>`.

    Raises:
        JaxptmError: the file is missing or not YAML, an override is malformed, or a value does not fit; all wrong
            values are listed at once, each with its dotted path.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise JaxptmError(f"{path}: cannot read the config: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise JaxptmError(f"{path}: the config is not UTF-8 text.") from error
    fields = _parse(text, str(path))
    if not isinstance(fields, dict):
        raise JaxptmError(f"{path}: expected `key: value` lines at the top, as in configs/pretrain/quickstart.yaml.")
    fields.setdefault("out", f"runs/{path.stem}")
    for override in overrides:
        _override(fields, override)
    return validate(TrainConfig, fields, str(path))


def validate(kind: type[C], fields: Any, source: str) -> C:
    """Builds `kind` from plain `fields`; errors name `source` and the dotted path of each wrong value."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for item in error.errors():  # several for one value that may be of several types
            problems.setdefault(_path(item["loc"]), []).append(_reason(item))
        lines = [f"  {path}: {' or '.join(dict.fromkeys(reasons))}" for path, reasons in problems.items()]
        raise JaxptmError("\n".join([f"{source}: {len(lines)} value(s) do not fit:", *lines])) from None


def dump_config(config: Config) -> str:
    """The config as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise JaxptmError(f"{source}:{line} is not YAML: {getattr(error, 'problem', None) or error}.") from error


def _override(fields: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise JaxptmError(f"override {override!r}: write it as key.key=value, for example train.steps=100.")
    *parents, last = key.split(".")
    for parent in parents:
        child = fields.setdefault(parent, {})
        if not isinstance(child, dict):
            raise JaxptmError(f"override {override!r}: `{parent}` holds the value {child!r}, not fields.")
        fields = child
    fields[last] = _parse(value, f"override {override!r}")


def _path(location: tuple[int | str, ...]) -> str:
    # pydantic puts the branches of unions into the location, here their names; they are no keys of the file.
    if location[:1] in (("objective",), ("data",)):
        location = (location[0], *location[2:])
    keys = [str(part) for part in location if not re.search(r"[\[\]]|^(int|float|str|constrained-.*)$", str(part))]
    return ".".join(keys) or "(top level)"


def _reason(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return "there is no such key"
    if item["type"] in ("missing", "union_tag_not_found"):
        return "is missing" if item["type"] == "missing" else "`name` is missing"
    if item["type"] == "union_tag_invalid":
        return f"`name` should be {item['ctx']['expected_tags'].replace(', ', ' or ')}, not {item['ctx']['tag']!r}"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if item["type"] == "value_error" else f", not {item['input']!r}"
    return f"{message[0].lower()}{message[1:]}{shown}"

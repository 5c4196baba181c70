"""What is learned from: text, tasks with labels, questions, tables, speech."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from jaxptm.config.base import Config, Positive, Share


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

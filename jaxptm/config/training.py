"""How it is learned, and a whole training run."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jaxptm.config.base import Config, Positive
from jaxptm.config.data import AudioData, Data, GlueData, SquadData, TableData, TextData
from jaxptm.config.objectives import ObjectiveConfig


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
    frozen: list[str] = Field(default_factory=list)
    """Parts that stay as they are, by the beginning of their paths: `embeddings`, `encoder/layer_0`, `encoder`."""
    head_first: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = 0
    """Updates (an integer), or a share of them all, in which the heads alone learn (wav2vec 2.0 with ten hours of
    transcripts: the first half)."""


class LoopConfig(Config):
    """The training loop. Exactly one of `steps` and `epochs` is given."""

    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Positive
    """Rows an optimizer step, over all devices and microbatches."""
    accumulate: Positive = 1
    """Microbatches a step; the result does not depend on it, but for rounding and the draws of dropout."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    log_every: Positive = 10
    eval_every: Positive | Literal["epoch"] = 1000
    """Steps; there is an evaluation at the end in any case."""
    eval_batches: Positive | None = None
    """Batches an evaluation reads; null reads all that is held out."""
    checkpoint_every: Positive | Literal["epoch"] = 1000
    keep: Positive = 2
    """How many of the newest checkpoints stay; the best one stays besides."""
    metric: str = "loss"
    """The figure of an evaluation that makes a checkpoint the best: the largest, but of losses, perplexities, `wer` and
    `cer` the lowest."""
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
    """How the step is laid out over devices.

    Results do not depend on it, but for rounding, the draws of dropout, and the diversity of wav2vec 2.0's codebooks,
    which is that of a device's rows.
    """

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


def _at_home(value: Any) -> Any:
    """The same with what begins with ~/ below the home directory, as a shell has it: in YAML no shell sees it."""
    if isinstance(value, dict):
        return {key: _at_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_at_home(inner) for inner in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


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
    """The run directory, by default `runs/<name of the YAML file>`; it may be one in a bucket, `gs://bucket/runs/name`."""

    @model_validator(mode="before")
    @classmethod
    def _model_of_weights(cls, fields: Any) -> Any:
        fields = _at_home(fields)
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
        if name == "all-tokens-mlm" and self.init_from is not None:
            raise ValueError(
                "`init_from` does not go with `objective.name: all-tokens-mlm`: its head for copying is in no model, "
                "so it begins with random weights"
            )
        if isinstance(data, TextData):
            if name == "pretraining" and data.format != "pairs":
                raise ValueError("`objective.name: pretraining` predicts next sentences and needs `data.format: pairs`")
            if data.format == "pairs" and getattr(self.objective, "dupe_factor", None):
                raise ValueError(
                    "`objective.dupe_factor` needs rows that come back: pairs are cut anew in each epoch, so set "
                    "`data.format: packed` and `objective.name: masked-lm`"
                )
            if name == "causal-lm" and data.format == "pairs":
                raise ValueError("`objective.name: causal-lm` reads running text: set `data.format: stream` or packed")
        elif self.train.eval_batches is not None and name != "contrastive":
            raise ValueError("`train.eval_batches` is for pre-training: figures over labelled data read all of it")
        if isinstance(data, AudioData) and data.vocabulary is not None and name != "ctc":
            raise ValueError("`data.vocabulary` is of transcripts, which only `objective.name: ctc` reads")
        problem = getattr(self.objective, "problem_type", None)
        if isinstance(data, AudioData) and problem not in (None, "single_label_classification"):
            raise ValueError(f"`objective.problem_type: {problem}` is for text: a recording has one label")
        if isinstance(data, TableData) and (data.choice_columns is not None) != (name == "multiple-choice"):
            raise ValueError("`data.choice_columns` is needed with `objective.name: multiple-choice`, and only there")
        return self

"""What a training config stands for: its directory, corpus, tokenizer, model and objective."""

from __future__ import annotations

import hashlib
import json
import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxptm.config import (
    AudioData,
    CausalLmConfig,
    ContrastiveConfig,
    CtcConfig,
    MaskedLmConfig,
    MultipleChoiceConfig,
    ParallelConfig,
    QuestionAnsweringConfig,
    ReplacedTokenConfig,
    SequenceClassificationConfig,
    TextData,
    TokenClassificationConfig,
    TrainConfig,
    dump_config,
    load_config,
)
from jaxptm.data.batching import Rows
from jaxptm.data.corpus import Corpus, Manifest
from jaxptm.data.examples import LengthBuckets
from jaxptm.data.prepare import prepare
from jaxptm.data.recordings import prepare_audio
from jaxptm.data.shards import Progress
from jaxptm.data.text import PackedSentences, SentencePairs, TextSource, TokenStream
from jaxptm.data.tokenizer import filler, load_tokenizer, special_tokens
from jaxptm.hosts import exchange, is_main, together
from jaxptm.models.electra import ElectraConfig
from jaxptm.nn.core import Execution
from jaxptm.nn.text import TextConfig, TextModel
from jaxptm.objectives import Objective
from jaxptm.objectives.electra import replaced_token_detection
from jaxptm.objectives.finetune import (
    multiple_choice,
    question_answering,
    sequence_classification,
    token_classification,
)
from jaxptm.objectives.language import causal_language_model, masked_language_model
from jaxptm.objectives.speech import contrastive, ctc
from jaxptm.ops.masking import vocabulary_tables
from jaxptm.pretrained import Model, check_vocabulary, from_pretrained, model_config
from jaxptm.speech import Listener, hear
from jaxptm.storage import Mirror, checkpoint_directory, is_remote, local_directory
from jaxptm.tasks import Score, Write, count_labels, hf_labels, open_task, task_tokenizer
from jaxptm.types import JaxptmError

REPORTING = {
    f"train.{key}" for key in ("log_every", "eval_every", "eval_batches", "checkpoint_every", "keep", "export")
}
"""Keys that may change when a run is resumed: its parameters do not depend on them."""
LAYOUT = {"train.accumulate", *(f"parallel.{key}" for key in ParallelConfig.model_fields)}
"""Keys that may change as well, so that a run can go on on other devices: its parameters change by rounding alone."""


@dataclass(frozen=True)
class HeldOut:
    """Rows for evaluation.

    Attributes:
        rows: each of them once, in epoch 0.
        score: what the predictions are worth, by figure; None where the objective's own terms and scores tell.
        write: writes the predictions to files of a directory.
        labelled: whether there is anything to compare the predictions with.
    """

    rows: Rows
    score: Score | None = None
    write: Write | None = None
    labelled: bool = True


@dataclass(frozen=True)
class Run:
    """A training config with everything it names opened.

    Attributes:
        directory: where the run writes; for a remote `out`, what is copied there.
        checkpoints: their directory, which may be remote.
        tokenizer: of the text, to be saved with the model.
        objective: what is learned, and by which modules.
        train: rows by index, without end.
        length: tokens of the longest row.
        held_out: what is evaluated, by the name that its figures begin with; empty where nothing is held out.
        corpus: names the data by its content; a run goes on only with the same.
        steps: length of the run in optimizer steps.
        hf_config: what config.json says of the labels.
    """

    config: TrainConfig
    directory: Path
    checkpoints: Path | Any
    tokenizer: Any
    objective: Objective
    train: Rows
    length: int
    held_out: Mapping[str, HeldOut]
    corpus: str
    steps: int
    hf_config: Mapping[str, Any]

    def every(self, period: int | Literal["epoch"]) -> int:
        """A period of the config in steps."""
        return -(-len(self.train) // self.config.train.batch_size) if period == "epoch" else period


def open_run(config: TrainConfig, models: Mapping[str, Model] | None = None, progress: Progress | None = None) -> Run:
    """Prepares the corpus where that has not been done, and opens everything that `config` names.

    Args:
        config: resolved (see `jaxptm.tasks.resolve`).
        models: instead of those that `config.model` describes; then nothing is to be trained.
        progress: called while the corpus is prepared, with the share done and a line.

    Raises:
        JaxptmError: whatever does not fit together, before any step is taken.
    """
    match config.data:
        case TextData() as data:
            prepared = _prepared(config, progress)
            with together():
                run = _open_prepared(config, data, models, prepared)
        case AudioData() as data:
            prepared = _prepared(config, progress)
            with together():
                run = _open_speech(config, data, models, prepared)
        case _:
            with together():
                run = _open_labelled(config, models)
    if len(set(exchange(run.corpus))) > 1:
        raise JaxptmError("the processes hold different data; give all of them the same files under `data`.")
    return run


def _open_labelled(config: TrainConfig, models: Mapping[str, Model] | None) -> Run:
    loop, data = config.train, config.data
    assert not isinstance(data, TextData | AudioData)
    model = None if models is None else models["model"]
    tokenizer = model.tokenizer if model is not None and data.tokenizer is None else task_tokenizer(config)
    if model is not None and model.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise JaxptmError(f"{model.source} has another vocabulary than data.tokenizer {data.tokenizer}.")
    task = open_task(config, tokenizer, training=model is None)
    objective = make_objective(
        config, tokenizer, None if model is None else {"model": model.module}, task.class_weights
    )
    assert isinstance(objective.module.config, TextConfig)
    limit = objective.module.config.max_length
    if data.max_length > limit:
        raise JaxptmError(f"data.max_length: {data.max_length} is more than the {limit} tokens that the model takes.")
    pad = filler(tokenizer)
    held_out = {
        name: HeldOut(
            LengthBuckets(part.examples, loop.batch_size, pad), part.score, part.write, part.score is not None
        )
        for name, part in task.held_out.items()
    }
    train = LengthBuckets(task.train, loop.batch_size, pad, loop.seed)
    return Run(
        config=config,
        directory=local_directory(config.out),
        checkpoints=checkpoint_directory(config.out),
        tokenizer=tokenizer,
        objective=objective,
        train=train,
        length=train.lengths[-1],
        held_out=held_out,
        corpus=task.fingerprint,
        steps=loop.steps or math.ceil((loop.epochs or 0) * len(train) / loop.batch_size),
        hf_config=hf_labels(config),
    )


def _prepared(config: TrainConfig, progress: Progress | None) -> Path:
    """The directory of shards, on this machine."""
    prepared = prepared_directory(config)
    with together():
        if is_main():  # the other processes wait
            _prepare(config.data, prepared, progress)
    machines, manifests = exchange(socket.gethostname()), exchange(_fingerprint_of(prepared / "manifest.json"))
    with together():
        # Machines that do not see what process 0 has made do the same, by their first process each.
        first = machines.index(socket.gethostname()) == jax.process_index()
        if first and manifests[jax.process_index()] != manifests[0]:
            _prepare(config.data, prepared, None)
    return prepared


def _prepare(data: Any, prepared: Path, progress: Progress | None) -> None:
    shards = (prepare if isinstance(data, TextData) else prepare_audio)(data, prepared, progress=progress)
    if shards is None:
        raise JaxptmError(f"{prepared}: other hosts are still preparing their files; start again when they are done.")


def _open_speech(config: TrainConfig, data: AudioData, models: Mapping[str, Model] | None, prepared: Path) -> Run:
    loop, model = config.train, None if models is None else models["model"]
    heard = hear(config, prepared, config.init_from if model is None else model.source)
    if heard.labels is not None:
        config = config.model_copy(update={"data": data.model_copy(update={"labels": heard.labels})})
    objective = make_objective(config, heard.listener, None if model is None else {"model": model.module})
    held_out = {} if heard.held_out is None else {"": HeldOut(heard.held_out, heard.score)}
    return Run(
        config=config,
        directory=local_directory(config.out),
        checkpoints=checkpoint_directory(config.out),
        tokenizer=heard.listener,
        objective=objective,
        train=heard.train,
        length=heard.train.lengths[-1],
        held_out=held_out,
        corpus=heard.corpus,
        steps=loop.steps or math.ceil((loop.epochs or 0) * len(heard.train) / loop.batch_size),
        hf_config=hf_labels(config),
    )


def _open_prepared(config: TrainConfig, data: TextData, models: Mapping[str, Model] | None, prepared: Path) -> Run:
    manifest = Manifest.load(prepared)
    tokenizer = load_tokenizer(prepared / "tokenizer")
    for model in (models or {}).values():
        if model.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise JaxptmError(f"{model.source} has another vocabulary than data.tokenizer {data.tokenizer}.")
    modules = None if models is None else {name: model.module for name, model in models.items()}
    objective = make_objective(config, tokenizer, modules)
    sizes = objective.module.config
    assert isinstance(sizes, TextConfig)
    if data.sequence_length > sizes.max_length:
        raise JaxptmError(
            f"data.sequence_length: {data.sequence_length} is more than the {sizes.max_length} tokens that "
            f"the model has positions for (model.max_position_embeddings: {sizes.max_position_embeddings})."
        )
    if data.format == "pairs" and sizes.type_vocab_size < 2:
        raise JaxptmError(
            f"model.type_vocab_size: {sizes.type_vocab_size} is too small for data.format: pairs, whose second "
            "segment has token type 1."
        )
    train, held_out = Corpus.open(prepared, "train"), None
    if data.eval_files is not None:
        held_out = Corpus.open(prepared, "eval")
    elif data.eval_fraction > 0:
        train, held_out = train.split(data.eval_fraction)

    def examples(corpus: Corpus, seed: int) -> TextSource[Any]:
        if data.format == "stream":
            return TokenStream(corpus, filler(tokenizer), data.sequence_length, seed, data.separate_documents)
        special = special_tokens(tokenizer)
        if data.format == "packed":
            return PackedSentences(corpus, special, data.sequence_length, seed, data.separate_documents)
        swapped = sizes.sentence_order
        return SentencePairs(corpus, special, data.sequence_length, seed, data.short_probability, swapped)

    seed = config.train.seed
    source = examples(train, seed)
    steps = config.train.steps or math.ceil((config.train.epochs or 0) * len(source) / config.train.batch_size)
    return Run(
        config=config,
        directory=local_directory(config.out),
        checkpoints=checkpoint_directory(config.out),
        tokenizer=tokenizer,
        objective=objective,
        train=source,
        length=data.sequence_length,
        held_out={} if held_out is None else {"": HeldOut(examples(held_out, seed))},
        corpus=_hash([manifest.tokenizer, *(_counts(manifest, split) for split in manifest.splits)]),
        steps=steps,
        hf_config={},
    )


def make_objective(
    config: TrainConfig,
    tokenizer: Any,
    modules: Mapping[str, Any] | None = None,
    class_weights: Sequence[float] | None = None,
) -> Objective:
    """What `config` trains, over text of `tokenizer`.

    Raises:
        JaxptmError: objective, model and tokenizer do not go together.
    """
    settings, data = config.objective, config.data
    modules = modules or make_modules(config, tokenizer)
    if isinstance(data, AudioData):
        return _speech_objective(settings, modules["model"], class_weights)
    source = "the tokenizer of the model" if data.tokenizer is None else f"data.tokenizer {data.tokenizer}"
    for module in modules.values():
        check_vocabulary(tokenizer, module.config, source)
        if module.config.counts_tokens and module.config.pad_token_id != tokenizer.pad_token_id:
            raise JaxptmError(
                f"model.pad_token_id: is {module.config.pad_token_id}, but {source} has {tokenizer.pad_token_id}; "
                "this model counts positions by it."
            )
    model = modules["model"]
    match settings:
        case SequenceClassificationConfig(problem_type=str(problem_type)):
            return sequence_classification(model, problem_type, class_weights)
        case TokenClassificationConfig():
            return token_classification(model, class_weights)
        case MultipleChoiceConfig():
            return multiple_choice(model)
        case QuestionAnsweringConfig():
            return question_answering(model)
        case CausalLmConfig():
            return causal_language_model(settings, model)
    assert isinstance(data, TextData) and isinstance(settings, MaskedLmConfig | ReplacedTokenConfig)
    if tokenizer.mask_token_id is None:
        raise JaxptmError(f"{source}: has no mask token, which objective.name: {settings.name} needs.")
    tables = vocabulary_tables(tokenizer)
    if isinstance(settings, MaskedLmConfig):
        return masked_language_model(settings, model, tables, tokenizer.mask_token_id, data.sequence_length)
    return replaced_token_detection(
        settings, model, modules["generator"], tables, tokenizer.mask_token_id, data.sequence_length
    )


def _speech_objective(settings: Any, module: Any, class_weights: Sequence[float] | None) -> Objective:
    match settings:
        case ContrastiveConfig():
            return contrastive(settings, module)
        case CtcConfig():
            return ctc(settings, module)
    return sequence_classification(module, settings.problem_type, class_weights)


def make_modules(config: TrainConfig, tokenizer: Any) -> dict[str, Any]:
    """The modules that `config` trains, by the directory of the run that they are exported to.

    Raises:
        JaxptmError: the model's family has no head for the objective, or its generator does not come out.
    """
    task, writes = config.objective.name, len(tokenizer) > 0
    # The head of CTC alone depends on the vocabulary, of which a pre-trained encoder knows nothing.
    family, model = model_config(
        config.model, len(tokenizer) if writes and task != "ctc" else None, tokenizer.pad_token_id
    )
    reads_audio = family.module is not TextModel
    if reads_audio != isinstance(config.data, AudioData):
        kind, other = ("audio", "text") if reads_audio else ("text", "audio")
        raise JaxptmError(f"model: a {family.model_type} reads {kind}, and `data` holds {other}.")
    if task not in family.architectures:
        tasks = ", ".join(str(name) for name in family.architectures if name is not None)
        raise JaxptmError(f"objective.name: a {family.model_type} does not learn {task!r}; it learns {tasks}.")
    labels = count_labels(config)
    if labels is not None:
        model = model.model_copy(update={"num_labels": labels})
    if task == "ctc":
        model = model.model_copy(update={"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id})
    execution = Execution(
        dtype=jnp.dtype(config.train.dtype),
        param_dtype=jnp.dtype(config.train.param_dtype),
        remat=config.parallel.remat,
        scan=config.parallel.scan,
    )
    modules = {"model": family.module(model, task, execution)}
    if isinstance(model, ElectraConfig) and task == "replaced-token":
        modules["generator"] = family.module(model.generator(), "masked-lm", execution)
    return modules


def open_models(source: str | Path, config: TrainConfig, **options: Any) -> dict[str, Model]:
    """The models that a config trains, with weights, by the directory of a run that they are exported to.

    Args:
        source: a run directory or its URL, or a model directory or hub name. The latter serves all models: ELECTRA's
            two may begin as one masked LM (Clark et al. 2020, section 3.3), if they have its size.
        **options: of `from_pretrained`.

    Raises:
        JaxptmError: a model is missing or does not fit.
    """
    tasks: dict[str, str] = {"model": config.objective.name}
    if isinstance(config.objective, ReplacedTokenConfig):
        tasks["generator"] = "masked-lm"
    labels = count_labels(config)
    if labels is not None:
        options = {"num_labels": labels} | options
    models = {}
    for name, task in tasks.items():
        path: str | Path = source
        if is_remote(str(source)):
            path = Mirror(str(source)).pull(name)
        elif (Path(source) / name).is_dir():
            path = Path(source) / name
        models[name] = from_pretrained(path, task, **options)
    return models


def prepared_directory(config: TrainConfig) -> Path:
    """Where the shards lie: `data.prepared`, or beside the run's files under a name made from the data keys.

    Raises:
        JaxptmError: `data.prepared` is an URL, or the data is neither text nor speech.
    """
    data = config.data
    if not isinstance(data, TextData | AudioData):
        raise JaxptmError("there is nothing to prepare: fine-tuning reads its examples when it starts.")
    if data.prepared is None:
        return local_directory(config.out).parent / "prepared" / _fingerprint(data)
    if is_remote(data.prepared):
        raise JaxptmError(f"data.prepared: {data.prepared} has to be a local directory, which can be mapped.")
    return Path(data.prepared)


def claim_directory(config: TrainConfig) -> Mirror:
    """Writes `config.yaml` into the run directory, or checks the one that is there once something has been saved.

    Of a remote run, what it has written so far is brought here first.

    Raises:
        JaxptmError: the directory belongs to another config; every key that differs is named. Or it is out of reach, or
            the processes do not have the same config.
    """
    if len(set(exchange(_hash(config.model_dump(mode="json"))))) > 1:
        raise JaxptmError(
            "the processes were started with different configs; give all of them the same file and the same "
            "key.key=value arguments."
        )
    checkpoints, mirror = checkpoint_directory(config.out), Mirror(config.out)
    with together():
        if is_main():
            for name in ("config.yaml", "metrics.jsonl"):
                mirror.pull(name, missing_ok=True)
            _claim(mirror.local, checkpoints, config)
            mirror.push()
    return mirror


def _claim(directory: Path, checkpoints: Path | Any, config: TrainConfig) -> None:
    path = directory / "config.yaml"
    if path.exists() and any(checkpoints.glob("[0-9]*")):
        theirs = _leaves(load_config(path).model_dump(mode="json"))
        ours = _leaves(config.model_dump(mode="json"))
        free = REPORTING | LAYOUT | {"out"}
        keys = [key for key in ours | theirs if ours.get(key) != theirs.get(key) and key not in free]
        if keys:
            lines = [f"  {key}: {theirs.get(key)!r} there, {ours.get(key)!r} now" for key in keys]
            raise JaxptmError(
                "\n".join([f"{checkpoints.parent} belongs to a run with another config; choose another `out`:", *lines])
            )
    directory.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("config.yaml.partial")
    partial.write_text(dump_config(config), encoding="utf-8")
    partial.replace(path)


def tokenizer_directory(config: TrainConfig) -> Path:
    """Where a run keeps its tokenizer: with the token shards, or in its own directory where there are none."""
    if isinstance(config.data, TextData):
        return prepared_directory(config) / "tokenizer"
    return local_directory(config.out) / "tokenizer"


def open_tokenizer(config: TrainConfig) -> Any:
    """What `tokenizer_directory` holds: a tokenizer or, of speech, a listener.

    Raises:
        JaxptmError: it has been moved away.
    """
    directory = tokenizer_directory(config)
    if isinstance(config.data, AudioData):
        return Listener.load(directory, writes=config.objective.name == "ctc")
    return load_tokenizer(directory)


def _fingerprint(data: TextData | AudioData) -> str:
    if isinstance(data, AudioData):  # transcripts and limits decode nothing again
        return _hash({"train": data.train, "eval": data.eval})
    keys = ("files", "eval_files", "text_field", "tokenizer", "tokenizer_model", "vocab_size", "lowercase")
    content = {key: value for key, value in data.model_dump().items() if key in keys}
    return _hash(content)


def _counts(manifest: Manifest, split: str) -> list[Any]:
    """What tells one text from another, wherever its files lie."""
    shards = manifest.splits[split]
    return [split, [(shard.documents, shard.sentences, shard.tokens, shard.bytes, shard.max_token) for shard in shards]]


def _fingerprint_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _leaves(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in fields.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves

"""A training config with everything it names opened: its rows, its model, its objective."""

from __future__ import annotations

import hashlib
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxptm.config import AudioData, LoopConfig, TextData, TrainConfig
from jaxptm.data.batching import Rows
from jaxptm.data.corpus import Corpus, Manifest
from jaxptm.data.examples import LengthBuckets
from jaxptm.data.prepare import prepare
from jaxptm.data.prepare_audio import prepare_audio
from jaxptm.data.recordings import AudioManifest
from jaxptm.data.shards import Progress
from jaxptm.data.text import PackedSentences, SentencePairs, TextSource, TokenStream
from jaxptm.data.tokenizer import filler, load_tokenizer, special_tokens
from jaxptm.directories import digest, prepared_directory
from jaxptm.hosts import exchange, is_main, together
from jaxptm.nn.text_config import TextConfig
from jaxptm.objectives import Objective
from jaxptm.pretrained import Model
from jaxptm.recipe import make_objective
from jaxptm.resolving import hf_labels, task_tokenizer
from jaxptm.speech import hear
from jaxptm.storage import checkpoint_directory, local_directory
from jaxptm.tasks import Score, Write, open_task
from jaxptm.types import JaxptmError


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
        config: resolved (see `jaxptm.resolving.resolve`).
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
    kinds = objective.module.config.type_vocab_size
    asked = max(
        (int(part.tokens.get("token_type_ids", np.zeros(1)).max(initial=0)) for part in task.examples), default=0
    )
    if 0 < kinds <= asked:
        raise JaxptmError(
            f"model.type_vocab_size: {kinds} is too small for two texts a row, the second of which has token type "
            f"{asked}; begin with a model that was trained on pairs."
        )
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
        steps=_steps(loop, len(train)),
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
    heard = hear(config, prepared, model)
    modules = None if model is None else {"model": model.module}
    objective = make_objective(config, heard.listener, modules, heard.class_weights)
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
        corpus=digest([split.digest for _, split in sorted(AudioManifest.load(prepared).splits.items())]),
        steps=_steps(loop, len(heard.train)),
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
    return Run(
        config=config,
        directory=local_directory(config.out),
        checkpoints=checkpoint_directory(config.out),
        tokenizer=tokenizer,
        objective=objective,
        train=source,
        length=data.sequence_length,
        held_out={} if held_out is None else {"": HeldOut(examples(held_out, seed))},
        corpus=digest([manifest.tokenizer, *(_content(manifest, split) for split in manifest.splits)]),
        steps=_steps(config.train, len(source)),
        hf_config={},
    )


def _steps(loop: LoopConfig, rows: int) -> int:
    # Rounded first: 1.1 times 100 is more than 110 by 1e-14, which is no row.
    return loop.steps or math.ceil(round((loop.epochs or 0) * rows / loop.batch_size, 6))


def _content(manifest: Manifest, split: str) -> list[Any]:
    """What tells one text from another, wherever its files lie."""
    shards = manifest.splits[split]
    return [split, [(shard.documents, shard.sentences, shard.tokens, shard.bytes, shard.digest) for shard in shards]]


def _fingerprint_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""

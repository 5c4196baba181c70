"""What a training config stands for: its directory, corpus, tokenizer, model and objective."""

from __future__ import annotations

import hashlib
import json
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxptm.config import (
    CausalLmConfig,
    MaskedLmConfig,
    ObjectiveConfig,
    ParallelConfig,
    ReplacedTokenConfig,
    TextData,
    TrainConfig,
    dump_config,
    load_config,
)
from jaxptm.data.corpus import Corpus, Manifest
from jaxptm.data.prepare import Progress, prepare
from jaxptm.data.text import PackedSentences, SentencePairs, TextSource, TokenStream
from jaxptm.data.tokenizer import filler, load_tokenizer, special_tokens
from jaxptm.hosts import exchange, is_main, together
from jaxptm.models.electra import ElectraConfig
from jaxptm.nn.core import Execution
from jaxptm.nn.text import PRETRAINING_TASKS, TextModel
from jaxptm.objectives import Objective
from jaxptm.objectives.electra import replaced_token_detection
from jaxptm.objectives.language import causal_language_model, masked_language_model
from jaxptm.ops.masking import vocabulary_tables
from jaxptm.pretrained import Model, check_vocabulary, from_pretrained, model_config
from jaxptm.storage import Mirror, checkpoint_directory, is_remote, local_directory
from jaxptm.types import JaxptmError

REPORTING = {"train.log_every", "train.eval_every", "train.eval_batches", "train.checkpoint_every", "train.keep"}
"""Keys that may change when a run is resumed: its parameters do not depend on them."""
LAYOUT = {"train.accumulate", *(f"parallel.{key}" for key in ParallelConfig.model_fields)}
"""Keys that may change as well, so that a run can go on on other devices: its parameters change by rounding alone."""


@dataclass(frozen=True)
class Run:
    """A training config with everything it names opened.

    Attributes:
        directory: where the run writes; for a remote `out`, what is copied there.
        checkpoints: their directory, which may be remote.
        tokenizer_directory: tokenizer files, to be saved with the model.
        objective: what is learned, and by which modules.
        train: examples by index, without end.
        held_out: examples by index for evaluation; None where nothing is held out.
        corpus: names the prepared text by its content; a run goes on only with the same.
        steps: length of the run in optimizer steps.
    """

    config: TrainConfig
    directory: Path
    checkpoints: Path | Any
    tokenizer_directory: Path
    objective: Objective
    train: TextSource[Any]
    held_out: TextSource[Any] | None
    corpus: str
    steps: int


def open_run(
    config: TrainConfig, modules: Mapping[str, TextModel] | None = None, progress: Progress | None = None
) -> Run:
    """Prepares the corpus where that has not been done, and opens everything that `config` names.

    Args:
        modules: instead of those that `config.model` describes.
        progress: called while the corpus is prepared, with the share done and a line.

    Raises:
        JaxptmError: whatever does not fit together, before any step is taken.
    """
    prepared = prepared_directory(config)
    with together():
        if is_main():  # the other processes wait
            _prepare(config, prepared, progress)
    machines, manifests = exchange(socket.gethostname()), exchange(_fingerprint_of(prepared / "manifest.json"))
    with together():
        # Machines that do not see what process 0 has made do the same, by their first process each.
        first = machines.index(socket.gethostname()) == jax.process_index()
        if first and manifests[jax.process_index()] != manifests[0]:
            _prepare(config, prepared, None)
    with together():
        run = _open(config, modules, prepared)
    if len(set(exchange(run.corpus))) > 1:
        raise JaxptmError(f"{prepared}: the processes hold different texts; give all of them the same data.files.")
    return run


def _prepare(config: TrainConfig, prepared: Path, progress: Progress | None) -> None:
    if prepare(config.data, prepared, progress=progress) is None:
        raise JaxptmError(f"{prepared}: other hosts are still preparing their files; start again when they are done.")


def _open(config: TrainConfig, modules: Mapping[str, TextModel] | None, prepared: Path) -> Run:
    data, manifest = config.data, Manifest.load(prepared)
    tokenizer_directory = prepared / "tokenizer"
    tokenizer = load_tokenizer(tokenizer_directory)
    objective = make_objective(config, tokenizer, modules)
    module = objective.module
    if data.sequence_length > module.config.max_length:
        raise JaxptmError(
            f"data.sequence_length: {data.sequence_length} is more than the {module.config.max_length} tokens that "
            f"the model has positions for (model.max_position_embeddings: {module.config.max_position_embeddings})."
        )
    if data.format == "pairs" and module.config.type_vocab_size < 2:
        raise JaxptmError(
            f"model.type_vocab_size: {module.config.type_vocab_size} is too small for data.format: pairs, whose second "
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
        swapped = module.config.sentence_order
        return SentencePairs(corpus, special, data.sequence_length, seed, data.short_probability, swapped)

    seed = config.train.seed
    source = examples(train, seed)
    steps = config.train.steps or math.ceil((config.train.epochs or 0) * len(source) / config.train.batch_size)
    return Run(
        config=config,
        directory=local_directory(config.out),
        checkpoints=checkpoint_directory(config.out),
        tokenizer_directory=tokenizer_directory,
        objective=objective,
        train=source,
        held_out=None if held_out is None else examples(held_out, seed),
        corpus=_hash([manifest.tokenizer, *(_counts(manifest, split) for split in manifest.splits)]),
        steps=steps,
    )


def make_objective(config: TrainConfig, tokenizer: Any, modules: Mapping[str, TextModel] | None = None) -> Objective:
    """What `config` trains, over text of `tokenizer`.

    Raises:
        JaxptmError: objective, model and tokenizer do not go together.
    """
    settings, length = config.objective, config.data.sequence_length
    modules = modules or make_modules(config, tokenizer)
    source = f"data.tokenizer {config.data.tokenizer}"
    for module in modules.values():
        check_vocabulary(tokenizer, module.config, source)
        if module.config.counts_tokens and module.config.pad_token_id != tokenizer.pad_token_id:
            raise JaxptmError(
                f"model.pad_token_id: is {module.config.pad_token_id}, but {source} has {tokenizer.pad_token_id}; "
                "this model counts positions by it."
            )
    if isinstance(settings, CausalLmConfig):
        return causal_language_model(settings, modules["model"])
    if tokenizer.mask_token_id is None:
        raise JaxptmError(f"{source}: has no mask token, which objective.name: {settings.name} needs.")
    tables = vocabulary_tables(tokenizer)
    if isinstance(settings, MaskedLmConfig):
        return masked_language_model(settings, modules["model"], tables, tokenizer.mask_token_id, length)
    return replaced_token_detection(
        settings, modules["model"], modules["generator"], tables, tokenizer.mask_token_id, length
    )


def make_modules(config: TrainConfig, tokenizer: Any) -> dict[str, TextModel]:
    """The modules that `config` trains, by the directory of the run that they are exported to.

    Raises:
        JaxptmError: the model's family has no head for the objective, or its generator does not come out.
    """
    family, model = model_config(config.model, len(tokenizer), tokenizer.pad_token_id)
    task = config.objective.name
    if task not in family.architectures:
        tasks = ", ".join(str(name) for name in family.architectures if name in PRETRAINING_TASKS)
        raise JaxptmError(f"objective.name: a {family.model_type} does not learn {task!r}; it learns {tasks}.")
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


def open_models(source: str | Path, settings: ObjectiveConfig, **options: Any) -> dict[str, Model]:
    """The models that an objective trains, with weights, by the directory of a run that they are exported to.

    Args:
        source: a run directory or its URL, or a model directory or hub name. The latter serves all models: ELECTRA's
            two may begin as one masked LM (Clark et al. 2020, section 3.3), if they have its size.
        **options: of `from_pretrained`.

    Raises:
        JaxptmError: a model is missing or does not fit.
    """
    tasks: dict[str, str] = {"model": settings.name}
    if isinstance(settings, ReplacedTokenConfig):
        tasks["generator"] = "masked-lm"
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
    """Where the token shards lie: `data.prepared`, or beside the run's files under a name made from the data keys.

    Raises:
        JaxptmError: `data.prepared` is an URL.
    """
    if config.data.prepared is None:
        return local_directory(config.out).parent / "prepared" / _fingerprint(config.data)
    if is_remote(config.data.prepared):
        raise JaxptmError(f"data.prepared: {config.data.prepared} has to be a local directory, which can be mapped.")
    return Path(config.data.prepared)


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


def _fingerprint(data: TextData) -> str:
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

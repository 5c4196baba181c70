"""What a config trains: its modules and its objective, with or without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxptm.architectures import check_vocabulary, model_config
from jaxptm.config import (
    AllTokensMlmConfig,
    AudioData,
    CausalLmConfig,
    ContrastiveConfig,
    CtcConfig,
    GeneratorConfig,
    MaskedLmConfig,
    MultipleChoiceConfig,
    QuestionAnsweringConfig,
    ReplacedTokenConfig,
    SequenceClassificationConfig,
    TextData,
    TokenClassificationConfig,
    TrainConfig,
)
from jaxptm.data.tokenizer import load_tokenizer
from jaxptm.models.electra import ElectraConfig
from jaxptm.nn.core import Execution
from jaxptm.nn.text import TextModel
from jaxptm.objectives import Objective
from jaxptm.objectives.electra import all_tokens_mlm, replaced_token_detection
from jaxptm.objectives.finetune import (
    multiple_choice,
    question_answering,
    sequence_classification,
    token_classification,
)
from jaxptm.objectives.language import causal_language_model, masked_language_model
from jaxptm.objectives.speech import contrastive, ctc
from jaxptm.ops.masking import vocabulary_tables
from jaxptm.pretrained import Model, from_pretrained
from jaxptm.resolving import count_labels
from jaxptm.speech import Listener
from jaxptm.storage import Mirror, is_remote
from jaxptm.types import JaxptmError


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
    assert isinstance(data, TextData) and isinstance(
        settings, MaskedLmConfig | ReplacedTokenConfig | AllTokensMlmConfig
    )
    if tokenizer.mask_token_id is None:
        raise JaxptmError(f"{source}: has no mask token, which objective.name: {settings.name} needs.")
    tables = vocabulary_tables(tokenizer)
    if isinstance(settings, MaskedLmConfig):
        return masked_language_model(settings, model, tables, tokenizer.mask_token_id, data.sequence_length)
    both = (model, modules["generator"], tables, tokenizer.mask_token_id, data.sequence_length)
    return (
        replaced_token_detection(settings, *both)
        if isinstance(settings, ReplacedTokenConfig)
        else all_tokens_mlm(settings, *both)
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
    settings, task, writes = config.objective, _head(config), len(tokenizer) > 0
    # The head of CTC alone depends on the vocabulary, of which a pre-trained encoder knows nothing.
    family, model = model_config(
        config.model, len(tokenizer) if writes and task != "ctc" else None, tokenizer.pad_token_id
    )
    reads_audio = family.module is not TextModel
    if reads_audio != isinstance(config.data, AudioData):
        kind, other = ("audio", "text") if reads_audio else ("text", "audio")
        raise JaxptmError(f"model: a {family.model_type} reads {kind}, and `data` holds {other}.")
    has_generator = isinstance(settings, GeneratorConfig)
    if task not in family.architectures or (has_generator and not isinstance(model, ElectraConfig)):
        tasks = ", ".join(str(name) for name in family.architectures if name is not None)
        raise JaxptmError(f"objective.name: a {family.model_type} does not learn {settings.name!r}; it learns {tasks}.")
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
    if isinstance(model, ElectraConfig) and has_generator:
        modules["generator"] = family.module(model.generator(), "masked-lm", execution)
    return modules


def _head(config: TrainConfig) -> str:
    """The head of the model: objectives are named by it, but for one."""
    return "masked-lm" if isinstance(config.objective, AllTokensMlmConfig) else config.objective.name


def open_models(source: str | Path, config: TrainConfig, **options: Any) -> dict[str, Model]:
    """The models that a config trains, with weights, by the directory of a run that they are exported to.

    Args:
        source: a run directory or its URL, or a model directory or hub name. The latter serves all models: ELECTRA's
            two may begin as one masked LM (Clark et al. 2020, section 3.3), if they have its size.
        **options: of `from_pretrained`.

    Raises:
        JaxptmError: a model is missing or does not fit.
    """
    tasks = {"model": _head(config)}
    if isinstance(config.objective, GeneratorConfig):
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


def open_tokenizer(config: TrainConfig, directory: Path) -> Any:
    """The tokenizer of a run or, of speech, the listener.

    Raises:
        JaxptmError: it is not in `directory`.
    """
    if isinstance(config.data, AudioData):
        return Listener.load(directory, writes=config.objective.name == "ctc")
    return load_tokenizer(directory)

"""Training configs: YAML in, typed, frozen, strict objects out.

A key that does not exist, a wrong type or a value out of range is an error that names the file and the dotted path.
"""

from jaxptm.config.base import IGNORED, RATE, Config, Positive, Share
from jaxptm.config.data import AudioData, Data, GlueData, LabelledData, SquadData, TableData, TextData
from jaxptm.config.files import dump_config, load_config, validate
from jaxptm.config.objectives import (
    AllTokensMlmConfig,
    CausalLmConfig,
    ContrastiveConfig,
    CtcConfig,
    FineTuningConfig,
    GeneratorConfig,
    MaskedLmConfig,
    MultipleChoiceConfig,
    ObjectiveConfig,
    QuestionAnsweringConfig,
    ReplacedTokenConfig,
    SequenceClassificationConfig,
    TokenClassificationConfig,
)
from jaxptm.config.training import LoopConfig, OptimizerConfig, ParallelConfig, TrainConfig

__all__ = [
    "IGNORED",
    "RATE",
    "AllTokensMlmConfig",
    "AudioData",
    "CausalLmConfig",
    "Config",
    "ContrastiveConfig",
    "CtcConfig",
    "Data",
    "FineTuningConfig",
    "GeneratorConfig",
    "GlueData",
    "LabelledData",
    "LoopConfig",
    "MaskedLmConfig",
    "MultipleChoiceConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Positive",
    "QuestionAnsweringConfig",
    "ReplacedTokenConfig",
    "SequenceClassificationConfig",
    "Share",
    "SquadData",
    "TableData",
    "TextData",
    "TokenClassificationConfig",
    "TrainConfig",
    "dump_config",
    "load_config",
    "validate",
]

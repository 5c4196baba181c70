"""What a model family is: data about sizes, names and weights. The modules are shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxptm.hf.table import Table
from jaxptm.nn.text import TextConfig, TextModel


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model_type: its name in config.json.
        config: the class of its configs.
        module: the Flax module, called as `module(config, task, execution)`.
        presets: named sizes.
        architectures: task -> Hugging Face class; None is the bare encoder.
        table: (config, task) -> the weight table.
        prefix: what their names of the encoder begin with in a model that has a head.
        modern_name: spells a name of an old checkpoint as today's; one way only.
        from_hf: config.json -> fields of `config`; raises `ValueError` where it asks for what jaxptm lacks.
        to_hf: config -> the keys of config.json.
    """

    model_type: str
    config: type[TextConfig]
    module: type[TextModel]
    presets: Mapping[str, TextConfig]
    architectures: Mapping[str | None, str]
    table: Callable[[Any, str | None], Table]
    prefix: str
    modern_name: Callable[[str], str]
    from_hf: Callable[[Mapping[str, Any]], dict[str, Any]]
    to_hf: Callable[[Any], dict[str, Any]]

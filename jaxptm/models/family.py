"""What a model family is: data about sizes, names and weights. The modules are shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxptm.hf.table import Table
from jaxptm.nn.model import ModelConfig, PretrainedModule
from jaxptm.nn.text import TextModel

ALIASES = ("hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers")
"""Keys of config.json that transformers takes for a family's own keys of that meaning (`attribute_map`)."""
TENSORFLOW_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model_type: its name in config.json.
        config: the class of its configs.
        presets: named sizes.
        architectures: task -> Hugging Face class; None is the bare encoder.
        table: (config, task) -> the weight table.
        prefix: what their names of the encoder begin with in a model that has a head.
        bare: what their names of the encoder begin with where that prefix is missing.
        renamed: our field -> their key of config.json, where the names differ; the others are the same.
        values: our field -> our value -> their value, where the values differ.
        legacy: parts of names that old checkpoints spell otherwise -> how they are spelled now.
        fixed: their key -> the only value that jaxptm computes.
        module: the Flax module, called as `module(config, task, execution)`.
    """

    model_type: str
    config: type[ModelConfig]
    presets: Mapping[str, Any]
    architectures: Mapping[str | None, str]
    table: Callable[[Any, str | None], Table]
    prefix: str
    bare: tuple[str, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    legacy: Mapping[str, str] = field(default_factory=lambda: TENSORFLOW_NAMES)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    module: type[PretrainedModule] = TextModel

    def modern_name(self, name: str) -> str:
        """Spells the names of old checkpoints, and those of a bare encoder, as a model with a head does today."""
        for old, new in self.legacy.items():
            name = name.replace(old, new)
        return f"{self.prefix}{name}" if name.startswith(self.bare) else name

    def from_hf(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `config` that a config.json gives.

        Raises:
            ValueError: it asks for something that jaxptm does not compute.
        """
        for key, usual in self.fixed.items():
            if theirs.get(key, usual) != usual:
                raise ValueError(f"`{key}: {theirs[key]}` is not supported, only {usual!r}")
        fields = {}
        for name in self.config.model_fields:
            keys = (self._key(name), *([name] if name in ALIASES else []))
            said = {key: theirs[key] for key in keys if key is not None and key in theirs}
            if said:
                (key, value), *others = said.items()
                if any(other != value for _, other in others):
                    raise ValueError(f"`{key}: {value}` and `{name}: {theirs[name]}` contradict each other")
                fields[name] = self._our_value(name, value)
        if theirs.get("id2label"):
            fields["num_labels"] = len(theirs["id2label"])
        elif theirs.get("num_labels") is not None:
            fields["num_labels"] = theirs["num_labels"]
        return fields

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of config.json that `config` decides."""
        theirs = {}
        for name, value in config.model_dump().items():
            key = self._key(name)
            if key is not None and (value or name not in config.optional_keys):
                theirs[key] = self.values[name][value] if name in self.values else value
        if config.num_labels != 2:
            theirs["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
            theirs["label2id"] = {f"LABEL_{i}": i for i in range(config.num_labels)}
        return theirs

    def _key(self, name: str) -> str | None:
        """The key of config.json that holds our field `name`."""
        return self.renamed.get(name, None if name in self.config.own_fields else name)

    def _our_value(self, name: str, value: Any) -> Any:
        if name not in self.values:
            return value
        for ours, theirs in self.values[name].items():
            if theirs == value:
                return ours
        raise ValueError(f"`{self._key(name)}: {value}` is not one of {list(self.values[name].values())}")

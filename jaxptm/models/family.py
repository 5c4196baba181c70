"""What a model family is: data about sizes, names and weights. The modules are shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxptm.hf.table import Table
from jaxptm.nn.text import TextConfig, TextModel

OURS = ("norm", "pooler", "num_labels")
"""Fields that config.json does not have under any name, or has in another form."""


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
        fixed: their key -> the only value that jaxptm computes.
        module: the Flax module, called as `module(config, task, execution)`.
    """

    model_type: str
    config: type[TextConfig]
    presets: Mapping[str, Any]
    architectures: Mapping[str | None, str]
    table: Callable[[Any, str | None], Table]
    prefix: str
    bare: tuple[str, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    module: type[TextModel] = TextModel

    def modern_name(self, name: str) -> str:
        """Spells TensorFlow-era norm names, and the names of a bare encoder, as those of a model with a head."""
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        return f"{self.prefix}{name}" if name.startswith(self.bare) else name

    def from_hf(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `config` that a config.json gives.

        Raises:
            ValueError: it asks for something that jaxptm does not compute.
        """
        for key, usual in self.fixed.items():
            if theirs.get(key, usual) != usual:
                raise ValueError(f"`{key}: {theirs[key]}` is not supported, only {usual!r}")
        keys = {name: self.renamed.get(name, name) for name in self.config.model_fields if name not in OURS}
        fields = {name: theirs[key] for name, key in keys.items() if key in theirs}
        if theirs.get("id2label"):
            fields["num_labels"] = len(theirs["id2label"])
        return fields

    def to_hf(self, config: TextConfig) -> dict[str, Any]:
        """The keys of config.json that `config` decides."""
        ours = config.model_dump(exclude=set(OURS))
        # What transformers has no key for is left out where it says nothing.
        silent = [name for name in ("embedding_size", "embedding_dropout_prob", "type_vocab_size") if not ours[name]]
        theirs = {self.renamed.get(name, name): value for name, value in ours.items() if name not in silent}
        if config.num_labels != 2:
            theirs["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
            theirs["label2id"] = {f"LABEL_{i}": i for i in range(config.num_labels)}
        return theirs

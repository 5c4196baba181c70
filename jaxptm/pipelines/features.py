"""Texts as vectors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxptm.hf import files
from jaxptm.pipelines.base import Pipeline, check_lengths, run_rows, window
from jaxptm.pretrained import Model
from jaxptm.types import JaxptmError

POOLINGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
}
"""Names of poolings in newer configs of sentence-transformers, and their switches in older ones, in the order in which
several are joined."""
TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""What sentence-transformers says of a text before it is encoded, in the first of these that is there."""


class FeatureExtraction(Pipeline):
    """Last hidden states: `transformers.pipeline("feature-extraction")`; pooled, `SentenceTransformer.encode`."""

    task = None

    def __call__(
        self, inputs: str | Sequence[str], *, pooling: bool = False, truncation: bool = False, batch_size: int = 16
    ) -> Any:
        """The vectors of texts.

        Args:
            inputs: a text or several.
            pooling: one vector a text, made as the model's `modules.json` of sentence-transformers says (Reimers &
                Gurevych 2019, section 3); texts are cut to the length that it says, and put into lower case if it
                does.
            truncation: cut texts that are longer than the model.
            batch_size: texts that run at once.

        Returns:
            For a text nested lists [1, L, D], one vector a token, and for several texts a list of those; or with
            `pooling` an array [D], for several texts [N, D].

        Raises:
            JaxptmError: a text is longer than the model and not to be cut, or `modules.json` asks for what is not here.
        """
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        steps = Pooling.of(self.model) if pooling else None
        if steps is not None and steps.lower_case:
            texts = [text.lower() for text in texts]
        if steps is not None or truncation:
            limit = window(self.model) if steps is None else steps.length
            encoded = self.model.tokenizer(texts, truncation=True, max_length=limit) if texts else {"input_ids": []}
        else:
            encoded = self.model.tokenizer(texts, verbose=False) if texts else {"input_ids": []}
        check_lengths(self.model, texts, encoded["input_ids"])
        if steps is None:
            nested = run_rows(
                self.model, encoded, lambda out, length: [out["last_hidden_state"][:length].tolist()], batch_size
            )
            return nested[0] if isinstance(inputs, str) else nested
        pool = steps  # of each batch at once: the vectors of all tokens of many texts are too many to keep
        rows = run_rows(self.model, encoded, lambda out, length: pool(out["last_hidden_state"][:length]), batch_size)
        vectors = np.stack(rows) if rows else np.zeros((0, 0), np.float32)
        return vectors[0] if isinstance(inputs, str) else vectors

    def lines(self, given: Any, result: Any) -> Iterator[str]:
        yield str(given)
        vectors = np.atleast_2d(result if isinstance(result, np.ndarray) else result[0])
        for vector in vectors:
            yield f"  {len(vector)} numbers: {' '.join(f'{value:.4f}' for value in vector[:6])} ..."


class Pooling:
    """What makes one vector of those of a text: poolings, one after the other, and perhaps unit length."""

    def __init__(self, poolings: Sequence[str], normalised: bool, length: int, lower_case: bool) -> None:
        self.poolings, self.normalised, self.length, self.lower_case = poolings, normalised, length, lower_case

    @classmethod
    def of(cls, model: Model) -> Pooling:
        """From the `modules.json` in the directory of a model.

        Raises:
            JaxptmError: there is none, or it names a module or a pooling that is not known here.
        """
        if model.source is None or not (model.source / "modules.json").exists():
            raise JaxptmError(
                f"{model.source}: has no modules.json of sentence-transformers, which says how to pool; without "
                "pooling=True there is one vector a token."
            )
        path = model.source / "modules.json"
        poolings: list[str] = []
        normalised = lower_case = False
        length = window(model)
        for module in _modules(path):
            kind, place = module["type"].split(".")[-1], model.source / module["path"]
            match kind:
                case "Transformer":
                    for file in files.found(place, TRANSFORMER_FILES)[:1]:
                        said = files.read_json(file)
                        length = min(length, said.get("max_seq_length") or length)
                        lower_case = bool(said.get("do_lower_case"))
                case "Pooling":
                    poolings = _poolings(place / "config.json")
                case "Normalize":
                    normalised = True
                case _:
                    raise JaxptmError(f"{path}: the module {module['type']} is not known; there is Pooling, Normalize.")
        if not poolings:
            raise JaxptmError(f"{path}: names no pooling.")
        return cls(poolings, normalised, length, lower_case)

    def __call__(self, hidden: Float[np.ndarray, "L D"]) -> Float[np.ndarray, " E"]:
        """[D], or as many times more as there are poolings."""
        ways = {
            "cls": lambda: hidden[0],
            "mean": lambda: hidden.mean(axis=0),
            "max": lambda: hidden.max(axis=0),
            "mean_sqrt_len_tokens": lambda: hidden.sum(axis=0) / np.sqrt(len(hidden)),
        }
        vector = np.concatenate([ways[name]() for name in self.poolings])
        return vector / max(float(np.linalg.norm(vector)), 1e-12) if self.normalised else vector


def _modules(path: Path) -> list[dict[str, Any]]:
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        return [{"type": str(module["type"]), "path": str(module["path"])} for module in modules]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise JaxptmError(f"{path}: is no list of modules of sentence-transformers ({error}).") from error


def _poolings(path: Path) -> list[str]:
    config = files.read_json(path)
    named = config.get("pooling_mode")
    chosen = [named] if isinstance(named, str) else named
    if chosen is None:
        chosen = [name for name, switch in POOLINGS.items() if config.get(switch)]
        other = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
        chosen += [key for key in other if key not in POOLINGS.values()]
    unknown = [name for name in chosen if name not in POOLINGS]
    if unknown:
        raise JaxptmError(f"{path}: the pooling {unknown[0]!r} is not known; there is {', '.join(POOLINGS)}.")
    return list(chosen)

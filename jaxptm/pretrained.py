"""Models with weights: opened from and saved to Hugging Face directories, called with numpy arrays."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxptm.architectures import check_vocabulary, declared_task, read_config, read_family
from jaxptm.config import validate
from jaxptm.data.tokenizer import load_tokenizer
from jaxptm.generation import Sampling, generate
from jaxptm.hf import files
from jaxptm.hf import table as weights
from jaxptm.hf.generation_config import declared_tokens, read_generation_config
from jaxptm.hf.orbax import read_params
from jaxptm.models import Family
from jaxptm.models.params import abstract_params, flatten, initialise, unflatten, unstacked
from jaxptm.nn.audio_config import AudioConfig
from jaxptm.nn.core import Execution
from jaxptm.nn.model import BODY, KEPT, ModelConfig, PretrainedModule
from jaxptm.nn.text import TextModel
from jaxptm.nn.text_config import TextConfig
from jaxptm.types import JaxptmError, Params

log = logging.getLogger("jaxptm")

CLASSIFIERS = ("sequence-classification", "token-classification", "multiple-choice", "question-answering")
"""Tasks whose heads have names alike, and nothing else."""
ORBAX_PARAMS = "params"
"""Name of the Orbax folder in a model directory that holds no safetensors."""


class Outputs(dict[str, Any]):
    """Named outputs, as `out["logits"]` or `out.logits`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this model has no output {name!r}, only {', '.join(self)}") from None


@dataclass
class Model:
    """A module with its parameters, called as a function of numpy arrays.

    Attributes:
        family: what kind of model it is.
        config: its sizes.
        task: its head; None for the bare encoder.
        module: the Flax module; `module.apply({"params": params}, ...)` is what `__call__` compiles.
        params: a plain nested dict.
        source: the directory it came from, whose tokenizer travels along.
        hf_config: the config.json it came with; keys that jaxptm does not read are saved again as they were.
        dead: parameters of the source that no output depends on.
        unused: weights of the source that belong to other heads, by their names there.
        fresh: top-level modules that the source lacks, with random weights.
    """

    family: Family
    config: ModelConfig
    task: str | None
    module: PretrainedModule
    params: Params
    source: Path | None = None
    hf_config: Mapping[str, Any] = field(default_factory=dict)
    dead: Mapping[str, np.ndarray] = field(default_factory=dict)
    unused: Sequence[str] = ()
    fresh: Sequence[str] = ()

    def refuse_random_heads(self) -> None:
        """Raises JaxptmError where the model would answer with weights that nothing has trained for its task."""
        declared = self.hf_config.get("architectures") or []
        own = self.family.architectures[self.task]
        lacking = any(name not in KEPT for name in self.fresh)
        if lacking or (self.task in CLASSIFIERS and declared and own not in declared):
            raise JaxptmError(
                f"{self.source}: is a {' or '.join(declared) or 'model without a head'}, which nothing has trained to "
                f"be a {own}; fine-tune it for that first."
            )

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model's directory.

        Raises:
            JaxptmError: there is none, or it has ids that the model has no embedding for.
        """
        if self.source is None:
            raise JaxptmError("this model came without a tokenizer; load one with transformers.AutoTokenizer.")
        tokenizer = load_tokenizer(self.source)
        check_vocabulary(tokenizer, self.config, str(self.source))
        return tokenizer

    @property
    def labels(self) -> list[str]:
        """The names of the outputs of a classifier, in their order; LABEL_0 and so on where config.json has none."""
        count = self.config.num_labels
        names = {int(key): str(name) for key, name in (self.hf_config.get("id2label") or {}).items()}
        return [names[i] if len(names) == count and i in names else f"LABEL_{i}" for i in range(count)]

    @property
    def max_length(self) -> int:
        """Tokens that a row may have.

        Raises:
            JaxptmError: the model reads no text.
        """
        if not isinstance(self.config, TextConfig):
            raise JaxptmError(f"a {self.family.model_type} reads audio and no text; choose another model.")
        return self.config.max_length

    def __call__(self, *, output_hidden_states: bool = False, **inputs: Any) -> Outputs:
        """Runs the model without dropout.

        Args:
            output_hidden_states: also return the embeddings and the output of every layer.
            **inputs: arrays, named as in transformers. Of text `input_ids` [B, L] (multiple-choice: [B, C, L]), and if
                wanted `attention_mask`, `token_type_ids`, `position_ids`, `segment_ids` of the same shape, and
                `mlm_positions` [B, P], where alone a language-model head runs. Of speech `input_values` [B, T] at
                16 kHz, and if wanted `attention_mask` [B, T] or `lengths` [B], `mask_time_indices` [B, F] and
                `mask_feature_indices` [B, D].

        Raises:
            JaxptmError: an input without a name here, of another shape, or of values that the model cannot take.
        """
        arrays = {name: np.asarray(value) for name, value in inputs.items() if value is not None}
        arrays = self.config.checked_inputs(self.task, arrays)
        return Outputs(self._apply(self.params, arrays, output_hidden_states))

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int | Sequence[int],
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int = 0,
        first_row: int = 0,
    ) -> np.ndarray:
        """Continues prompts: see `jaxptm.generation.generate`; the arguments are those of `generate` of transformers.

        Args:
            do_sample: draw tokens, with `temperature`, among the `top_k` best that make up `top_p`; otherwise take the
                likeliest.
            eos_token_id: default what generation_config.json says, or else config.json; [] for rows that never end.
            pad_token_id: default what these say, or else the end token.
        """
        if not isinstance(self.module, TextModel):
            raise JaxptmError(f"a {self.family.model_type} does not generate text.")
        sampling = None
        if do_sample:
            every = self.config.vocab_size
            sampling = Sampling(temperature, every if top_k is None else top_k, 1.0 if top_p is None else top_p)
        if eos_token_id is None:
            eos_token_id = self.declared_tokens("eos_token_id")
        if pad_token_id is None:
            declared = self.declared_tokens("pad_token_id")
            pad_token_id = self.config.pad_token_id if declared is None else next(iter(declared), None)
        return generate(
            self.module,
            self.params,
            np.asarray(input_ids),
            None if attention_mask is None else np.asarray(attention_mask),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            seed=seed,
            first_row=first_row,
        )

    def declared_tokens(self, name: str) -> list[int] | None:
        """The ids of `eos_token_id` or `pad_token_id` that its files declare; None where neither has the key."""
        return declared_tokens(self._generation_config, name, self.config.vocab_size, str(self.source))

    @cached_property
    def _generation_config(self) -> Mapping[str, Any]:
        return read_generation_config(self.source, self.hf_config)

    @cached_property
    def _apply(self) -> Any:
        def apply(params: Params, inputs: dict[str, Any], output_hidden_states: bool) -> dict[str, Any]:
            return self.module.apply({"params": params}, **inputs, output_hidden_states=output_hidden_states)

        return jax.jit(apply, static_argnums=2)

    def tensors(self) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
        """What `save_pretrained` writes: by their names there, the tensors and the paths of the parameters in each.

        A tensor without paths is a copy of another one, or one that no output depends on.
        """
        table = self.family.table(self.config, self.task)
        paths = {row.theirs: row.paths for row in table.rows}
        prefix = self.family.prefix if self.task is None else ""
        found = weights.save(table, flatten(self.params)) | dict(self.dead)
        return {name.removeprefix(prefix): (tensor, paths.get(name, ())) for name, tensor in found.items()}

    def save_pretrained(self, directory: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Writes config.json, safetensors and the tokenizer files that transformers opens with no key to spare.

        Raises:
            JaxptmError: the directory cannot be written, or holds an Orbax checkpoint.
        """
        directory = Path(directory)
        if (directory / ORBAX_PARAMS).exists():
            raise JaxptmError(f"{directory}: holds a model in Orbax's format; choose another directory.")
        tensors = {name: tensor for name, (tensor, _) in self.tensors().items()}
        config = self._config_json()
        files.write_model(
            directory, config, tensors, max_shard_bytes=max_shard_bytes, companions=self._write_companions
        )

    def save_orbax(self, directory: str | os.PathLike[str]) -> None:
        """Writes the same directory with the parameters as an Orbax checkpoint, for other JAX programs.

        Parameters that no output depends on (`dead`) are not in it.

        Raises:
            JaxptmError: the directory cannot be written, or holds weights in another format.
        """
        import orbax.checkpoint as ocp

        directory = Path(directory)
        if any((directory / name).exists() for name in files.WEIGHTS):
            raise JaxptmError(f"{directory}: holds a model in Hugging Face's format; choose another directory.")
        with files.model_directory(directory) as folder:
            files.write_json(folder / "config.json", self._config_json())
            self._write_companions(folder)
            try:
                with ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save((folder / ORBAX_PARAMS).absolute(), unstacked(self.params))
            except Exception as error:  # Orbax and tensorstore raise many kinds
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise JaxptmError(f"{directory}: the model cannot be written: {reason}.") from error

    def _config_json(self) -> dict[str, Any]:
        theirs, ours = dict(self.hf_config), self.family.to_hf(self.config)
        # Their own names of labels stay where the number of labels did.
        stale = ours if len(theirs.get("id2label") or {}) == self.config.num_labels else theirs
        for key in ("id2label", "label2id"):
            stale.pop(key, None)
        for key in ("num_labels", "torch_dtype"):  # what old versions wrote beside `id2label` and `dtype`
            theirs.pop(key, None)
        return {
            **theirs,
            **ours,
            "model_type": self.family.model_type,
            "architectures": [self.family.architectures[self.task]],
            "dtype": str(jax.tree.leaves(self.params)[0].dtype),
        }

    def companions(self) -> tuple[str, ...]:
        """The files beside a model that belong to it, by patterns: they go where it goes."""
        return (
            *files.TOKENIZER_FILES,
            *files.PROCESSOR_FILES,
            *(files.POOLING_FILES if self.task is None else ()),
            *(files.GENERATION_FILES if self.task == "causal-lm" else ()),
        )

    def _write_companions(self, directory: Path) -> None:
        if self.source is not None:
            files.copy(self.source, directory, self.companions())
        if "tokenizer" in self.__dict__:
            for stale in files.found(directory, files.TOKENIZER_FILES):
                stale.unlink()
            self.tokenizer.save_pretrained(directory)


def from_pretrained(
    path_or_hub_id: str | os.PathLike[str],
    task: str | None = None,
    *,
    num_labels: int | None = None,
    vocab_size: int | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any | None = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    seed: int = 0,
    new_head: bool = False,
    complete: bool = False,
) -> Model:
    """Opens a Hugging Face model directory, a hub repository, or the `model/` of a jaxptm run (or of its directory).

    Args:
        task: the head: None (bare encoder), "masked-lm", "pretraining", "next-sentence", "replaced-token", "causal-lm",
            "sequence-classification", "token-classification", "multiple-choice", "question-answering", "ctc",
            "contrastive", or "auto": what config.json says.
        num_labels: of a classification head; default what config.json says.
        vocab_size: symbols of a CTC head; default what config.json says.
        dtype: of the computation.
        param_dtype: of the parameters; None for the type that all of them are stored in, or else float32.
        mesh: devices that each get a copy of the parameters; default the first device.
        seed: of the weights of a head that the checkpoint lacks; such a head is logged as a warning.
        new_head: leave the classifier of the checkpoint aside, and begin with a fresh one; its pooler stays.
        complete: refuse a checkpoint that lacks a head, or a part of one, or would lose digits.

    Raises:
        JaxptmError: no such model, an unknown architecture or task, or weights that do not fit; all weights at once.
    """
    directory = files.resolve(path_or_hub_id)
    family, hf_config = read_family(directory)
    if task == "auto":
        task = declared_task(family, hf_config, directory)
    if task not in family.architectures:
        tasks = ", ".join(str(name) for name in family.architectures)
        raise JaxptmError(f'{family.model_type} has no head for the task {task!r}; it has {tasks} (or "auto").')
    config = read_config(family, hf_config, directory)
    if task == "question-answering":
        num_labels = 2  # start and end; transformers sizes this head, too, by the number of labels
    sizes = {"num_labels": num_labels, "vocab_size": vocab_size}
    if any(size is not None for size in sizes.values()):
        given = {name: size for name, size in sizes.items() if size is not None}
        config = validate(family.config, {**config.model_dump(), **given}, "from_pretrained")

    if (directory / ORBAX_PARAMS).is_dir():
        tensors = _restore_orbax(directory, family, config, hf_config)
    else:
        tensors = weights.renamed(files.read_tensors(directory), family.modern_name, str(directory))
    if param_dtype is None:
        param_dtype = weights.stored_type(tensors)
    if complete:
        weights.refuse_to_round(tensors, jnp.dtype(param_dtype), str(directory))
        if task != "contrastive":
            config = _without_masks(config, tensors, family)
    if new_head:
        aside = {row.theirs for row in family.table(config, task).rows if row.paths[0].split("/")[0] not in KEPT}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in aside}
    pooled = any(name.startswith(f"{family.prefix}pooler.") for name in tensors)
    if task is None and isinstance(config, TextConfig) and config.pooler and not pooled:
        config = config.model_copy(update={"pooler": False})

    module = family.module(config, task, Execution(jnp.dtype(dtype), jnp.dtype(param_dtype)))
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(module)).items()}
    known = {name for other in family.architectures for name in family.table(config, other).names}
    heads = [name for name in {path.split("/")[0] for path in shapes} if name not in BODY]
    loaded = weights.load(family.table(config, task), tensors, shapes, source=str(directory), heads=heads, known=known)
    flat: dict[str, Any] = dict(loaded.params)
    if loaded.absent and complete:
        kind, lacking = family.architectures[task], ", ".join(loaded.absent)
        raise JaxptmError(
            f"{directory}: is a {kind} without weights for {lacking}, and none are made up here; if it has a "
            "config.json, say there under `architectures` what it is."
        )
    if loaded.absent:
        log.warning("%s has no %s: initialised at random, to be trained.", directory, ", ".join(loaded.absent))
        fresh = flatten(initialise(module, jax.random.key(seed), only=loaded.absent))
        flat |= fresh
    sharding = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = unflatten({path: jax.device_put(jnp.asarray(leaf, param_dtype), sharding) for path, leaf in flat.items()})
    about = loaded.dead, loaded.unused, loaded.absent
    return Model(family, config, task, module, params, directory, hf_config, *about)


def _without_masks(config: ModelConfig, tensors: Mapping[str, np.ndarray], family: Family) -> ModelConfig:
    """A config without masks where the checkpoint lacks their embedding, as released CTC models do.

    Not for pre-training, which is nothing without it.
    """
    masked = f"{family.prefix}masked_spec_embed"
    if not isinstance(config, AudioConfig) or not config.masks or masked in tensors:
        return config
    log.warning("there is no %s: written without masks, mask_time_prob and mask_feature_prob are 0.", masked)
    return config.model_copy(update={"mask_time_prob": 0.0, "mask_feature_prob": 0.0})


def _restore_orbax(
    directory: Path, family: Family, config: ModelConfig, hf_config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The parameters under the names that the head has which config.json declares; others keep their own names."""
    params = flatten(read_params(directory / ORBAX_PARAMS))
    task = declared_task(family, hf_config, directory)
    found = [row for row in family.table(config, task).rows if all(name in params for name in row.paths)]
    named = {name for row in found for name in row.paths}
    return weights.save(weights.Table(found), {name: params[name] for name in named}) | {
        name: tensor for name, tensor in params.items() if name not in named
    }

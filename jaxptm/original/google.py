"""Google's BERT (github.com/google-research/bert) and ELECTRA (google-research/electra): names and sizes."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxptm.data.tokenizer import load_tokenizer
from jaxptm.hf.files import read_json, write_model
from jaxptm.hf.table import renamed
from jaxptm.original.tensor_bundle import Entry, read_entries, read_tensors
from jaxptm.types import JaxptmError

log = logging.getLogger("jaxptm")

LEFT_OUT = re.compile(r"(^|/)(global_step|beta[12]_power|temperature)$|/(adam_[mv]|lamb_[mv]|Adam|Adam_1)$")
"""The step, the moments of the optimizers, and the temperature of ELECTRA's sampling."""
SPELLED = (
    (r"layer_(\d+)", r"layer.\1"),
    (r"(\w+_embeddings)$", r"\1.weight"),
    ("gamma$", "weight"),
    ("beta$", "bias"),
    ("kernel$", "weight"),
    ("^cls/squad/output_weights$", "qa_outputs/weight"),
    ("^cls/squad/output_bias$", "qa_outputs/bias"),
    ("^output_weights$", "classifier/weight"),
    ("^output_bias$", "classifier/bias"),
    ("output_weights$", "weight"),
    ("output_bias$", "bias"),
    ("/", "."),
)
"""What Hugging Face's names have in place of the parts of Google's, in this order."""
HEADS_OF_BERT = {
    # The first whose tensors are all there; their run_pretraining.py, run_squad.py and run_classifier.py.
    "BertForPreTraining": ("cls.predictions.bias", "cls.seq_relationship.weight"),
    "BertForMaskedLM": ("cls.predictions.bias",),
    "BertForNextSentencePrediction": ("cls.seq_relationship.weight",),
    "BertForQuestionAnswering": ("qa_outputs.weight",),
    "BertForSequenceClassification": ("classifier.weight",),
    "BertModel": (),
}
HEAD_WIDTH = 64
"""Of ELECTRA small, base and large (util/training_utils.py); no file of a checkpoint says it."""
HEADS_BESIDE = {"model": "config.json", "generator": "generator_config.json"}


def rewrite_google(prefix: Path, directory: Path, part: str) -> list[str]:
    """Writes `prefix`.index and `prefix`.data-... as a Hugging Face directory; see `jaxptm.original.rewrite`.

    Beside a BERT lies its bert_config.json. An ELECTRA's sizes are those of its tensors, all but its number of heads.
    """
    shards, entries = read_entries(prefix)
    wanted = {name: entry for name, entry in entries.items() if not LEFT_OUT.search(name)}
    electra = any(name.startswith("electra/") for name in wanted)
    if not electra and part != "model":
        raise JaxptmError(f"--part {part} is for ELECTRA; {prefix} is none.")
    if electra:
        wanted = _part_of_electra(wanted, part, prefix)
    elif not any(name.startswith("bert/") for name in wanted):
        raise JaxptmError(f"{prefix}: is neither a BERT nor an ELECTRA; it holds {', '.join(sorted(wanted)[:5])} ...")
    arrays = {
        name: array.T if name.endswith("/kernel") else array
        for name, array in read_tensors(prefix, wanted, shards).items()
    }
    tensors = renamed(arrays, hf_name, str(prefix))
    if electra:
        tensors = renamed(tensors, _renamed_for_electra, str(prefix))
    try:
        config = _electra_config(tensors, part, prefix) if electra else _bert_config(tensors, prefix)
    except KeyError as error:
        raise JaxptmError(f"{prefix}: lacks {error}, which tells the sizes of the model.") from error
    write_model(directory, config, tensors)
    _write_tokenizer(prefix.parent / "vocab.txt", directory, config["vocab_size"])
    return sorted(set(entries) - set(wanted))


def hf_name(name: str) -> str:
    """Hugging Face's name of a variable of BERT; kernels are (in, out) here and (out, in) there."""
    for pattern, replacement in SPELLED:
        name = re.sub(pattern, replacement, name)
    return name


def is_uncased(entries: Iterable[str]) -> bool:
    """Whether no word of a vocabulary has an upper-case letter; no file of a checkpoint says it.

    [SPECIAL] entries, <S> and single letters are no words: Google's Chinese model has them and is uncased
    (tokenization.py, `validate_case_matches_checkpoint`).
    """
    words = (entry.removeprefix("##") for entry in entries if not re.fullmatch(r"\[.*\]|<.*>", entry))
    return not any(word != word.lower() for word in words if len(word) > 1)


def _write_tokenizer(vocabulary: Path, directory: Path, size: int) -> None:
    if not vocabulary.exists():
        log.warning("%s: is not there; the model comes without a tokenizer.", vocabulary)
        return
    tokenizer = load_tokenizer(vocabulary)
    lines = vocabulary.read_text(encoding="utf-8").split("\n")
    if twice := sorted({line for line, count in Counter(lines).items() if count > 1 and line}):
        raise JaxptmError(f"{vocabulary}: has {', '.join(map(repr, twice[:5]))} twice, so that an entry would be lost.")
    if len(tokenizer) > size:
        raise JaxptmError(f"{vocabulary}: has {len(tokenizer)} entries, the model {size}; they do not belong together.")
    uncased = is_uncased(tokenizer.get_vocab())
    log.info("%s: text is %s.", vocabulary, "lower-cased, as the vocabulary is" if uncased else "left as it is")
    (tokenizer if uncased else load_tokenizer(vocabulary, lowercase=False)).save_pretrained(directory)


def _bert_config(tensors: Mapping[str, np.ndarray], prefix: Path) -> dict[str, Any]:
    config = read_json(prefix.parent / "bert_config.json")
    architecture = next(name for name, needed in HEADS_OF_BERT.items() if all(key in tensors for key in needed))
    if architecture == "BertForSequenceClassification":
        config["id2label"] = {str(label): f"LABEL_{label}" for label in range(len(tensors["classifier.weight"]))}
    if not isinstance(config.get("vocab_size"), int):
        raise JaxptmError(f"{prefix.parent / 'bert_config.json'}: has no `vocab_size`.")
    return {**config, "model_type": "bert", "architectures": [architecture], "layer_norm_eps": 1e-12}


def _part_of_electra(entries: Mapping[str, Entry], part: str, prefix: Path) -> dict[str, Entry]:
    """The variables of the discriminator, or of the generator, which has embeddings of its own or the discriminator's.

    (modeling.py of google-research/electra, `BertModel`)
    """
    generator = {name: entry for name, entry in entries.items() if name.startswith("generator")}
    if part == "model":
        return {name: entry for name, entry in entries.items() if name not in generator}
    if part != "generator":
        raise JaxptmError(f"--part {part}: an ELECTRA has a model (the discriminator) and a generator.")
    if not generator:
        raise JaxptmError(f"{prefix}: holds no generator; it was fine-tuned, or saved without.")
    if not any(name.startswith("generator/embeddings/") for name in generator):
        generator |= {name: entry for name, entry in entries.items() if name.startswith("electra/embeddings/")}
    return generator


def _renamed_for_electra(name: str) -> str:
    name = re.sub(r"^generator\.", "electra.", name)
    name = name.replace("generator_predictions.bias", "generator_lm_head.bias")
    return name.replace("discriminator_predictions.dense_1.", "discriminator_predictions.dense_prediction.")


def _electra_heads(width: int, part: str, prefix: Path) -> int:
    """What a file beside the checkpoint says, or as many as the released models have."""
    beside = prefix.parent / HEADS_BESIDE[part]
    if beside.exists():
        heads = read_json(beside).get("num_attention_heads")
        if isinstance(heads, int) and heads > 0 and width % heads == 0:
            return heads
        raise JaxptmError(f"{beside}: `num_attention_heads` is {heads!r}; a divisor of the width {width} is expected.")
    if width % HEAD_WIDTH:
        raise JaxptmError(
            f"{prefix}: does not say how many attention heads share its width of {width}; write a "
            f"{beside.name} with `num_attention_heads` beside it."
        )
    log.warning(
        "%s: %d attention heads are assumed, of width %d as in all released ones; a %s with `num_attention_heads` "
        "beside it says otherwise.", prefix, width // HEAD_WIDTH, HEAD_WIDTH, beside.name,
    )  # fmt: skip
    return width // HEAD_WIDTH


def _electra_config(tensors: Mapping[str, np.ndarray], part: str, prefix: Path) -> dict[str, Any]:
    words, types, places = (
        tensors[f"electra.embeddings.{name}_embeddings.weight"].shape for name in ("word", "token_type", "position")
    )
    inner, width = tensors["electra.encoder.layer.0.intermediate.dense.weight"].shape
    layers = {name.split(".")[3] for name in tensors if name.startswith("electra.encoder.layer.")}
    return {
        "model_type": "electra",
        "architectures": ["ElectraForMaskedLM" if part == "generator" else "ElectraForPreTraining"],
        "vocab_size": words[0],
        "embedding_size": words[1],
        "type_vocab_size": types[0],
        "max_position_embeddings": places[0],
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len(layers),
        "num_attention_heads": _electra_heads(width, part, prefix),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }

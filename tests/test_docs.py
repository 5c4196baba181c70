"""Every Python snippet of the documentation runs, with small models in the places of the large ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from recorded import tone, write_audio
from test_training import write_corpus

import jaxptm
from jaxptm.config import TrainConfig, load_config, validate
from jaxptm.data.characters import Characters
from jaxptm.data.tokenizer import train_bpe, train_wordpiece
from jaxptm.models import PRESETS
from jaxptm.models.params import initialise
from jaxptm.nn.core import Execution
from jaxptm.pretrained import Model
from jaxptm.training import train

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SNIPPETS = [
    pytest.param(match[1], id=f"{page.stem}-{number}")
    for page in PAGES
    for number, match in enumerate(re.finditer(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]
TEXTS = ["The chef ate the meal for his guests.", "A gripping film.", "Dull from end to end.", "He opened the door."]
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
MODELS = {
    "bert-base-uncased": ("bert-tiny", "pretraining"),
    "my-bert": ("bert-tiny", "masked-lm"),
    "google/electra-small-discriminator": ("electra-tiny", "replaced-token"),
    "roberta-base": ("roberta-tiny", "masked-lm"),
    "openai-community/gpt2": ("gpt2-tiny", "causal-lm"),
    "runs/squad/model": ("bert-tiny", "question-answering"),
    "runs/ner/model": ("bert-tiny", "token-classification"),
    "sentence-transformers/all-MiniLM-L6-v2": ("bert-tiny", None),
    "facebook/wav2vec2-base-960h": ("wav2vec2-tiny", "ctc"),
}
SHORT = {"steps": 2, "epochs": None, "batch_size": 4, "log_every": 1, "eval_every": 2, "checkpoint_every": 2}


def save(name: str, preset: str, task: str | None, directory: Path) -> None:
    """A model of random weights under the name of a real one."""
    family, config = PRESETS[preset]
    tokenizer: Any
    if task == "ctc":
        tokenizer = Characters.of_texts(TEXTS)
        changes: dict[str, Any] = {"vocab_size": len(tokenizer)}
    else:
        byte_level = preset.startswith(("roberta", "gpt2"))
        tokenizer = train_bpe(TEXTS, 400) if byte_level else train_wordpiece(TEXTS * 2, 120)
        changes = SMALL | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        if preset.startswith("electra"):
            changes["embedding_size"] = 32
    config = type(config).model_validate(config.model_dump() | changes)
    module = family.module(config, task, Execution())
    target = directory / name
    Model(family, config, task, module, initialise(module, jax.random.key(0))).save_pretrained(target)
    (tokenizer.save if task == "ctc" else tokenizer.save_pretrained)(target)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds whatever a reader of the documentation has."""
    home = tmp_path_factory.mktemp("reader")
    for name, (preset, task) in MODELS.items():
        save(name, preset, task, home)
    pooled = home / "sentence-transformers/all-MiniLM-L6-v2"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    said = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules]
    (pooled / "modules.json").write_text(json.dumps(said))
    (pooled / "1_Pooling").mkdir()
    (pooled / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (home / "configs").symlink_to(ROOT / "configs")
    write_corpus(home / "corpus.txt")
    reviews = [f"{text},{2 + 3 * (number % 2)}" for number, text in enumerate(TEXTS * 6)]
    (home / "reviews.csv").write_text("\n".join(["review,stars", *reviews]) + "\n")
    write_audio(home / "talk.flac", tone(2.0))
    mnli = home / "glue_data/MNLI"
    mnli.mkdir(parents=True)
    columns = "index sentence1 sentence2 gold_label".split()
    rows = [
        [str(number), TEXTS[number % 4], TEXTS[number % 3], ("entailment", "neutral", "contradiction")[number % 3]]
        for number in range(24)
    ]
    for split in ("train", "dev_matched", "dev_mismatched"):
        (mnli / f"{split}.tsv").write_text("\n".join("\t".join(row) for row in [columns, *rows]) + "\n")
    return home


def shortly(config: Any) -> dict[str, Any]:
    """`jaxptm.train`, for two steps."""
    if isinstance(config, dict):
        config = validate(TrainConfig, config, "config")
    elif not isinstance(config, TrainConfig):
        config = load_config(config)
    sizes = {"model": {"preset": config.model, **SMALL}} if config.model in PRESETS else {}
    fields = config.model_dump(mode="json", exclude_unset=True)
    fields |= sizes
    fields["train"] |= SHORT
    fields["optimizer"] |= {"warmup": 0}
    fields["parallel"] = {"data": 1}
    return train(validate(TrainConfig, fields, "config"))


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet(snippet: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr(jaxptm, "train", shortly)
    # What a snippet of the README takes for granted.
    given = {
        "jaxptm": jaxptm,
        "page": "I live in the old house by the river.",
        "texts": TEXTS,
        "ids": np.array([[5, 6, 7, 8]]),
        "mask": np.ones((1, 4), int),
    }
    exec(compile(snippet, "snippet", "exec"), given)


def test_every_page_has_its_links() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"

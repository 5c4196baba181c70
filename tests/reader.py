"""What a reader of the documentation has: random weights under the names of real models, text, tables, audio."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from original.test_fairseq import content_of
from original.test_fairseq import save as save_fairseq
from recorded import tone, write_audio
from test_training import write_corpus

from jaxptm.config import AudioData, TrainConfig, load_config, validate
from jaxptm.data.characters import Characters
from jaxptm.data.tokenizer import train_bpe, train_wordpiece
from jaxptm.models import PRESETS
from jaxptm.models.params import abstract_params
from jaxptm.nn.core import Execution
from jaxptm.pretrained import Model
from jaxptm.training import train

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["The chef ate the meal for his guests.", "A gripping film.", "Dull from end to end.", "He opened the door."]
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SMALL_SPEECH: dict[str, Any] = SMALL | {
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
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
    "runs/bert_mini/model": ("bert-tiny", "masked-lm"),
    "runs/sst2/model": ("bert-tiny", "sequence-classification"),
    "runs/wav2vec2_tiny/model": ("wav2vec2-tiny", "contrastive"),
}
SHORT = {"steps": 1, "epochs": None, "batch_size": 4, "log_every": 1, "eval_every": 1, "checkpoint_every": 1}


def save(name: str, preset: str, task: str | None, directory: Path) -> None:
    """A model of random weights under the name of a real one."""
    family, config = PRESETS[preset]
    tokenizer: Any = None
    changes = SMALL_SPEECH
    if not preset.startswith("wav2vec2"):
        byte_level = preset.startswith(("roberta", "gpt2"))
        tokenizer = train_bpe(TEXTS, 400) if byte_level else train_wordpiece(TEXTS * 2, 120)
        changes = SMALL | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        if preset.startswith("electra"):
            changes["embedding_size"] = 32
    elif task == "ctc":
        tokenizer = Characters.of_texts(TEXTS)
        changes = SMALL_SPEECH | {"vocab_size": len(tokenizer)}
    config = type(config).model_validate(config.model_dump() | changes)
    module = family.module(config, task, Execution())
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draw.normal(0, 0.1, leaf.shape).astype(leaf.dtype), abstract_params(module))
    target = directory / name
    Model(family, config, task, module, params).save_pretrained(target)
    if tokenizer is not None:
        (tokenizer.save if task == "ctc" else tokenizer.save_pretrained)(target)


def furnish(home: Path) -> None:
    """Fills a directory."""
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
        write_table(mnli / f"{split}.tsv", [columns, *rows])
    for split in ("train", "dev"):
        judged = [[text, str(number % 2)] for number, text in enumerate(TEXTS * 2)]
        write_table(home / f"glue_data/SST-2/{split}.tsv", [["sentence", "label"], *judged])
        pairs = [[str(n), TEXTS[n % 4], TEXTS[n % 3], ("entailment", "not_entailment")[n % 2]] for n in range(8)]
        write_table(home / f"glue_data/RTE/{split}.tsv", [["index", "sentence1", "sentence2", "label"], *pairs])
    write_table(home / "news.csv", [["headline"], *([text] for text in TEXTS)])
    page = "I live in the old house by the river."
    asked = {"question": "Where do I live?", "context": page}
    (home / "questions.jsonl").write_text(json.dumps(asked) + "\n")
    answer = {"text": "the old house", "answer_start": page.index("the old house")}
    known = {
        "context": page,
        "qas": [{"id": str(n), "question": asked["question"], "answers": [answer]} for n in range(6)],
    }
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (home / name).write_text(json.dumps({"version": "1.1", "data": [{"title": "", "paragraphs": [known]}]}))
    (home / "corpus").mkdir()
    (home / "corpus/one.txt.gz").write_bytes(gzip.compress((home / "corpus.txt").read_bytes()))
    train_wordpiece([(home / "corpus.txt").read_text()], 200).save_pretrained(home / "trained")
    vocabulary = json.loads((home / "trained/tokenizer.json").read_text())["model"]["vocab"]
    (home / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n")
    said = [text.upper() for text in ("a film", "the door", "he ate")] * 2
    for split in ("train", "dev"):
        spoken = [(f"audio/{split}_{number}.wav", text) for number, text in enumerate(said)]
        for name, _ in spoken:
            write_audio(home / name, tone(2.0))
        write_table(home / f"{split}.tsv", [list(row) for row in spoken])
    lines = (json.dumps({"path": path, "label": text.split()[0]}) for path, text in spoken * 2)
    (home / "words.jsonl").write_text("\n".join(lines) + "\n")
    shutil.copytree(home / "audio", home / "LibriSpeech/train-clean-100")
    shutil.copytree(ROOT / "tests/hf/written_by_flax/BertForPreTraining", home / "my-flax-bert")
    save_fairseq(content_of("contrastive", "base")[0], home / "wav2vec_small.pt")


def write_table(path: Path, rows: list[list[str]]) -> None:
    """Tab-separated, without quotes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n")


def shortly(config: Any) -> dict[str, Any]:
    """`jaxptm.train`, for a step."""
    if isinstance(config, dict):
        config = validate(TrainConfig, config, "config")
    elif not isinstance(config, TrainConfig):
        config = load_config(config)
    small = SMALL_SPEECH if isinstance(config.data, AudioData) else SMALL
    sizes = {"model": {"preset": config.model, **small}} if config.model in PRESETS else {}
    fields = config.model_dump(mode="json", exclude_unset=True)
    fields |= sizes
    fields["train"] |= SHORT | ({} if config.train.eval_batches is None else {"eval_batches": 1})
    fields["optimizer"] |= {"warmup": 0}
    fields["parallel"] = {"data": 1}
    return train(validate(TrainConfig, fields, "config"))

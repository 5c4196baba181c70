"""Models with the tokenizers of their families: byte-level BPE of RoBERTa, SentencePiece's unigram model of XLM-R."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import jaxptm
from jaxptm.data.tokenizer import load_tokenizer, train_bpe
from jaxptm.ops.masking import vocabulary_tables

TEXT = ["The cat sat on the mat.", "A dog slept under the old log all day long, and", "naïve cafés — 日本"] * 4


def unigram() -> Any:
    """A tokenizer of XLM-R's kind, as its tokenizer.json holds one."""
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = tokenizers.trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>")
    backend.train_from_iterator(TEXT, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    names |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta"])
def test_fill_mask_answers_as_transformers_does(kind: str, tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXT, 320) if kind == "Roberta" else unigram()
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=40, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForMaskedLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours = jaxptm.pipeline("fill-mask", tmp_path)
    wanted = transformers.pipeline("fill-mask", model=theirs, tokenizer=load_tokenizer(tmp_path), device="cpu")
    texts = ["The cat <mask> on the mat.", "<mask> dog slept under the old log all day long", "naïve <mask>"]
    for found, expected in zip(ours(texts), wanted(texts), strict=True):
        assert [answer["token"] for answer in found] == [answer["token"] for answer in expected]
        assert [answer["sequence"] for answer in found] == [answer["sequence"] for answer in expected]
        np.testing.assert_allclose(*([a["score"] for a in answers] for answers in (found, expected)), rtol=1e-4)


def test_whole_words_of_each_vocabulary() -> None:
    for tokenizer, begins in ((train_bpe(TEXT, 320), "Ġ"), (unigram(), "▁")):
        tables = vocabulary_tables(tokenizer)
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        assert tables.is_special.sum() == 5
        for token, special, continues in zip(tokens, *tables, strict=True):
            assert continues == (not special and not token.startswith(begins)), token

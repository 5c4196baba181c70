"""Answers to questions, against a plain search of all stretches (transformers 5 has no such pipeline)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from pipeline_pairs import WORDS, assert_close, texts_of_all_lengths
from reference import SMALL, perturbed

import jaxptm
from jaxptm.data.tokenizer import train_wordpiece
from jaxptm.types import JaxptmError

WINDOW = 40


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Our pipeline, and the model of transformers whose logits are far enough apart to prefer some stretches."""
    directory = tmp_path_factory.mktemp("reader")
    tokenizer = train_wordpiece([" ".join(WORDS), "cats mats, dogs logs."] * 4, 90)
    tokenizer.model_max_length = WINDOW
    model = perturbed("BertForQuestionAnswering", noise=0.3, **{**SMALL, "vocab_size": len(tokenizer)})
    with torch.no_grad():
        model.qa_outputs.weight.mul_(3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return jaxptm.pipeline("question-answering", directory), model


def questions(count: int) -> list[dict[str, str]]:
    contexts = texts_of_all_lengths(count, 110)
    rng = np.random.default_rng(1)
    return [
        {"question": " ".join(rng.choice(WORDS, rng.integers(1, 7))) + "?", "context": f"the cat sat on {context}"}
        for context in contexts
    ]


@cache
def logits(model: Any, row: tuple[int, ...], types: tuple[int, ...], chosen: tuple[int, ...]) -> Any:
    with torch.no_grad():
        out = model(input_ids=torch.tensor([row]), token_type_ids=torch.tensor([types]))
    return out.start_logits[0, list(chosen)].double(), out.end_logits[0, list(chosen)].double()


def searched(
    model: Any,
    tokenizer: Any,
    pair: dict[str, str],
    *,
    top_k: int = 1,
    max_seq_len: int = WINDOW,
    doc_stride: int = WINDOW // 2,
    max_answer_len: int = 15,
    handle_impossible_answer: bool = False,
    align_to_words: bool = True,
) -> list[dict[str, Any]]:
    """The same by its definition: windows cut by hand, every stretch scored, and all that count put in order."""
    question = tokenizer(pair["question"], add_special_tokens=False)["input_ids"]
    whole = tokenizer(pair["context"], add_special_tokens=False, return_offsets_mapping=True)
    ids, places, words = whole["input_ids"], whole["offset_mapping"], whole.word_ids()
    room = max_seq_len - len(question) - 3
    answers: list[dict[str, Any]] = []
    nothing = []
    start = 0
    while True:
        part = ids[start : start + room]
        row = [tokenizer.cls_token_id, *question, tokenizer.sep_token_id, *part, tokenizer.sep_token_id]
        before = len(question) + 2
        types = [0] * before + [1] * (len(part) + 1)
        chosen = (0, *range(before, before + len(part)))
        first, last = (torch.softmax(values, 0).tolist() for values in logits(model, tuple(row), tuple(types), chosen))
        nothing.append(first[0] * last[0])
        spans = [
            (first[a + 1] * last[b + 1], a + start, b + start)
            for a in range(len(part))
            for b in range(a, min(a + max_answer_len, len(part)))
        ]
        for score, a, b in sorted(spans, reverse=True)[: 2 * top_k + 10 if align_to_words else top_k]:
            if align_to_words:
                # As far as the window shows them.
                seen = list(zip(places, words, strict=True))[start : start + room]
                begin = min(place[0] for place, word in seen if word == words[a])
                end = max(place[1] for place, word in seen if word == words[b])
            else:
                begin, end = places[a][0], places[b][1]
            text = pair["context"][begin:end]
            same = [answer for answer in answers if answer["answer"].lower() == text.lower()]
            if same:
                same[0]["score"] += score
            else:
                answers.append({"score": score, "start": begin, "end": end, "answer": text})
        if start + room >= len(ids):
            break
        start += room - doc_stride
    if handle_impossible_answer:
        answers.append({"score": min(nothing), "start": 0, "end": 0, "answer": ""})
    return sorted(answers, key=lambda answer: -answer["score"])[:top_k]


def assert_same_answers(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Same strings, places and order but for scores that rounding may swap, at the end for one that was cut off."""
    assert [answer["score"] for answer in ours] == pytest.approx([answer["score"] for answer in theirs], abs=1e-4)
    known = {(answer["start"], answer["end"], answer["answer"]): answer["score"] for answer in theirs}
    assert len({answer["answer"] for answer in ours}) == len(ours)
    for answer in ours:
        expected = known.get((answer["start"], answer["end"], answer["answer"]), theirs[-1]["score"])
        assert answer["score"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3},
        {"top_k": 25, "handle_impossible_answer": True},
        {"align_to_words": False, "max_answer_len": 4},
        {"top_k": 2, "max_seq_len": 30, "doc_stride": 5},
    ],
    ids=["one", "several", "or none", "pieces of words", "narrow"],
)
def test_answers_are_those_of_a_search_of_all_stretches(reader: tuple[Any, Any], options: dict[str, Any]) -> None:
    ours, model = reader
    asked = questions(200)
    found = ours(asked, **options)
    wanted = [searched(model, ours.model.tokenizer, pair, **options) for pair in asked]
    for mine, best in zip(found, wanted, strict=True):
        assert_same_answers([mine] if isinstance(mine, dict) else mine, best)
    tokens = [len(ours.model.tokenizer(pair["context"])["input_ids"]) for pair in asked]
    assert sum(length > 2 * WINDOW for length in tokens) > 50
    if options.get("handle_impossible_answer"):
        assert 0 < sum(any(not answer["answer"] for answer in answers) for answers in found) < len(found)


def test_questions_and_contexts_come_in_several_forms(reader: tuple[Any, Any]) -> None:
    ours, _ = reader
    one, two = questions(2)
    alone = ours(one)
    assert alone.keys() == {"score", "start", "end", "answer"} and ours([one]) == alone == ours(**one)
    assert one["context"][alone["start"] : alone["end"]] == alone["answer"]
    assert_close(ours([one, two]), [ours(one), ours(two)])
    shared = [one["question"], two["question"]]
    assert_close(
        ours(question=shared, context=one["context"]),
        [ours({"question": question, "context": one["context"]}) for question in shared],
    )
    assert ours([]) == []


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"question": "who", "context": " "}, {}, "the context is empty"),
        ({"question": "", "context": "a cat"}, {}, "the question is empty"),
        ({"question": "who"}, {}, 'is no {"question": ..., "context": ...}'),
        ({"question": "cat " * 60, "context": "a cat"}, {}, "has 60 tokens and leaves 0 of the window of 40"),
        ({"question": "who", "context": "a cat"}, {"doc_stride": 36}, "should be more than doc_stride 36"),
        ({"question": "who", "context": "a cat"}, {"max_seq_len": 41}, "max_seq_len is 41, the model takes 40"),
        ({"question": "who", "context": "a cat"}, {"top_k": 0}, "top_k is 0"),
        (None, {"question": ["a", "b"], "context": ["c"]}, "there are 2 questions and 1 contexts"),
        (None, {"question": "a"}, "give `inputs`, or `question` and `context`"),
    ],
)
def test_what_cannot_be_answered(reader: tuple[Any, Any], given: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(JaxptmError) as error:
        reader[0](given, **options)
    assert message in str(error.value)

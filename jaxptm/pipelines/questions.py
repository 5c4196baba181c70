"""Answers to questions, as stretches of a context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxptm.pipelines.base import Pipeline, run_rows, window
from jaxptm.types import JaxptmError

USUAL_LENGTH, USUAL_STRIDE = 384, 128


class QuestionAnswering(Pipeline):
    """Finds the answer in a context: `pipeline("question-answering")` of transformers 4 (transformers 5 has none)."""

    task = "question-answering"
    fields = ("question", "context")
    needed = 2
    bare = True

    def __call__(
        self,
        inputs: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
        *,
        question: str | Sequence[str] | None = None,
        context: str | Sequence[str] | None = None,
        top_k: int = 1,
        doc_stride: int | None = None,
        max_answer_len: int = 15,
        max_seq_len: int | None = None,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
        batch_size: int = 16,
    ) -> Any:
        """The likeliest stretches of each context.

        A context that is too long for the model is read in windows. The score of a stretch is the product of the
        shares of its first and last token in their window; what reads the same is one answer, whose scores add up.

        Args:
            inputs: {"question", "context"}, or several.
            question: instead of `inputs`, a question or several about `context`, one for all or one for each.
            top_k: how many answers, best first.
            doc_stride: tokens of the context that a window shares with the one before; default 128, or half a window.
            max_answer_len: tokens.
            max_seq_len: tokens of a window with its question; default 384, or what the model takes.
            handle_impossible_answer: let "" be an answer, scored by the window in which it is the least likely.
            align_to_words: answers begin and end with whole words.
            batch_size: windows that run at once.

        Returns:
            {"score", "start", "end", "answer"} with characters of the context from `start` up to `end`, or a list of
            them where there are not just one; for several questions a list of those.

        Raises:
            JaxptmError: a question or context is empty, a question leaves no room for the context, or an argument is
                out of range.
        """
        asked = _pairs(inputs, question, context)
        for name, value in (("top_k", top_k), ("max_answer_len", max_answer_len)):
            if value < 1:
                raise JaxptmError(f"{name} is {value}, expected at least 1.")
        limit = window(self.model)
        length = min(limit, USUAL_LENGTH) if max_seq_len is None else max_seq_len
        stride = min(length // 2, USUAL_STRIDE) if doc_stride is None else doc_stride
        if length > limit:
            raise JaxptmError(f"max_seq_len is {length}, the model takes {limit}.")
        if not asked:
            return []
        encoded = self._encode(asked, length, stride)
        logits = run_rows(
            self.model,
            encoded,
            lambda out, length: (out["start_logits"][:length], out["end_logits"][:length]),
            batch_size,
        )
        answers: list[list[dict[str, Any]]] = [[] for _ in asked]
        nothing = [1.0] * len(asked)
        for at, owner in enumerate(encoded["overflow_to_sample_mapping"]):
            of_context = np.array([part == 1 for part in encoded.sequence_ids(at)])
            first, last = (_shares(values, of_context) for values in logits[at])
            nothing[owner] = min(nothing[owner], float(first[0] * last[0]))
            # Some may become one when they are aligned.
            spans = _best_spans(first, last, of_context, max_answer_len, top_k * 2 + 10 if align_to_words else top_k)
            for begin, end, score in spans:
                place = _characters(encoded, at, begin, end, align_to_words)
                _add(answers[owner], asked[owner]["context"], place, score)
        if handle_impossible_answer:
            for found, score in zip(answers, nothing, strict=True):
                found.append({"score": score, "start": 0, "end": 0, "answer": ""})
        best = [sorted(found, key=lambda answer: -answer["score"])[:top_k] for found in answers]
        results = [found[0] if len(found) == 1 else found for found in best]
        return results[0] if len(results) == 1 else results

    def lines(self, given: Any, result: Any) -> Iterator[str]:
        yield given["question"]
        for answer in [result] if isinstance(result, dict) else result:
            yield f"  {answer['score']:6.1%}  {answer['answer'] or '(none)'}  [{answer['start']}:{answer['end']}]"

    def _encode(self, asked: Sequence[Mapping[str, str]], length: int, stride: int) -> Any:
        tokenizer = self.model.tokenizer
        special = tokenizer.num_special_tokens_to_add(pair=True)
        questions = [pair["question"] for pair in asked]
        counted = tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"] if questions else []
        for question, tokens in zip(questions, map(len, counted), strict=True):
            room = length - special - tokens
            if not 0 <= stride < room:
                raise JaxptmError(
                    f"the question {question[:60]!r} has {tokens} tokens and leaves {max(room, 0)} of the "
                    f"window of {length} for the context, which should be more than doc_stride {stride}: shorten it, "
                    "or change max_seq_len or doc_stride."
                )
        return tokenizer(
            questions,
            [pair["context"] for pair in asked],
            truncation="only_second",
            max_length=length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )


def _pairs(
    inputs: Mapping[str, str] | Sequence[Mapping[str, str]] | None,
    question: str | Sequence[str] | None,
    context: str | Sequence[str] | None,
) -> list[Mapping[str, str]]:
    if (inputs is None) != (question is not None and context is not None):
        raise JaxptmError("give `inputs`, or `question` and `context`.")
    if inputs is not None:
        pairs = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    else:
        assert question is not None and context is not None
        questions = [question] if isinstance(question, str) else list(question)
        contexts = [context] * len(questions) if isinstance(context, str) else list(context)
        if len(questions) != len(contexts):
            raise JaxptmError(f"there are {len(questions)} questions and {len(contexts)} contexts.")
        pairs = [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]
    for pair in pairs:
        for name in QuestionAnswering.fields:
            if not isinstance(pair, Mapping) or not isinstance(pair.get(name), str):
                raise JaxptmError(f'{pair!r} is no {{"question": ..., "context": ...}} of texts.')
            if not pair[name].strip():
                raise JaxptmError(f"the {name} is empty, of {dict(pair)!r}.")
    return pairs


def _shares(logits: Float[np.ndarray, " L"], of_context: Bool[np.ndarray, " L"]) -> Float[np.ndarray, " L"]:
    """Softmax over the context and the first token, which stands for no answer."""
    allowed = of_context.copy()
    allowed[0] = True
    values = np.where(allowed, logits.astype(np.float64), -np.inf)
    shares = np.exp(values - values.max())
    return shares / shares.sum()


def _best_spans(
    first: np.ndarray, last: np.ndarray, of_context: np.ndarray, longest: int, count: int
) -> Iterator[tuple[int, int, float]]:
    """(first token, last token, score) of the best stretches of the context, best first."""
    scores = np.tril(np.triu(np.outer(first, last)), longest - 1)
    scores[~of_context] = 0
    scores[:, ~of_context] = 0
    flat = scores.ravel()
    best = np.argpartition(-flat, count)[:count] if count < len(flat) else np.arange(len(flat))
    for at in best[np.argsort(-flat[best], kind="stable")]:
        begin, end = divmod(int(at), len(last))
        if of_context[begin] and begin <= end < begin + longest and of_context[end]:
            yield begin, end, float(flat[at])


def _characters(encoded: Any, at: int, begin: int, end: int, align_to_words: bool) -> tuple[int, int]:
    if align_to_words:
        words = encoded.token_to_word(at, begin), encoded.token_to_word(at, end)
        if None not in words:
            spans = [encoded.word_to_chars(at, word, sequence_index=1) for word in words]
            return spans[0].start, spans[1].end
    places = encoded["offset_mapping"][at]
    return places[begin][0], places[end][1]


def _add(answers: list[dict[str, Any]], context: str, place: tuple[int, int], score: float) -> None:
    text = context[place[0] : place[1]]
    for answer in answers:
        if answer["answer"].lower() == text.lower():
            answer["score"] += score
            return
    answers.append({"score": score, "start": place[0], "end": place[1], "answer": text})

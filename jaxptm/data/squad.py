"""Questions on paragraphs: SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018), from the JSON to the official figures."""

from __future__ import annotations

import json
import logging
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxptm.config import SquadData
from jaxptm.data.examples import Examples
from jaxptm.errors import JaxptmError

log = logging.getLogger("jaxptm")

CHUNK = 1000
"""Questions that are tokenized at once: what a tokenizer returns takes much more memory than what is kept of it."""


class Question(NamedTuple):
    """A question, its context, and the answers that people gave, with their first characters; none if impossible."""

    id: str
    text: str
    context: str
    answers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Windows:
    """Rows [question, stretch of context], one or several a question.

    Attributes:
        examples: with `start_positions` and `end_positions`, 0 where the window does not hold the whole answer.
        question: [N] which question each row is about, in order.
        offsets: of each row, [l, 2] first character and last + 1 of each token in the context.
        in_context: of each row, [l] which tokens are of the context.
    """

    examples: Examples
    question: Int[np.ndarray, " N"]
    offsets: Sequence[np.ndarray]
    in_context: Sequence[np.ndarray]


class Candidate(NamedTuple):
    """A possible answer, its score (the sum of two logits) and its share among the candidates."""

    text: str
    score: float
    probability: float


class Answers(NamedTuple):
    """What was found for one question: candidates, best first, and how far the score of none lies above the best."""

    candidates: list[Candidate]
    null_odds: float


def read_squad(path: str, version_2: bool) -> list[Question]:
    """The questions of a SQuAD file.

    Raises:
        JaxptmError: the file cannot be read, is broken or of another form, or has questions without an answer though it
            is not `version_2`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        articles = json.loads(text)["data"]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        questions = [
            Question(
                str(qa["id"]),
                qa["question"].strip(),
                paragraph["context"],
                tuple((answer["text"], answer["answer_start"]) for answer in qa.get("answers", [])),
            )
            for paragraph in paragraphs
            for qa in paragraph["qas"]
        ]
    except OSError as error:
        raise JaxptmError(f"{path}: cannot be read: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise JaxptmError(f"{path}:{error.lineno}: is not JSON: {error.msg} (column {error.colno}).") from error
    except UnicodeDecodeError as error:
        raise JaxptmError(f"{path}: is not UTF-8 text (byte {error.start}).") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise JaxptmError(f"{path}: is not in the form of SQuAD (data, paragraphs, qas): {error!r}.") from error
    seen: set[str] = set()
    for question in questions:
        where = f"{path}: question {question.id}"
        if question.id in seen:
            raise JaxptmError(f"{where}: is there twice; give each question an id of its own.")
        seen.add(question.id)
        if not question.text or not question.context.strip():
            raise JaxptmError(f"{where}: has an empty {'context' if question.text else 'question'}.")
        for answer, start in question.answers:
            if not isinstance(answer, str) or type(start) is not int or start < 0:
                raise JaxptmError(f"{where}: an answer is no `text` with an `answer_start` from 0 on.")
            if not answer or question.context[start : start + len(answer)] != answer:
                raise JaxptmError(f"{where}: the answer {answer!r} does not stand at character {start} of the context.")
        if not question.answers and not version_2:
            raise JaxptmError(f"{where}: has no answer; for SQuAD 2.0 set data.version_2=true.")
    if not questions:
        raise JaxptmError(f"{path}: holds no questions.")
    return questions


def encode(questions: Sequence[Question], tokenizer: Any, data: SquadData) -> Windows:
    """Cuts contexts to windows of at most `max_length` tokens, the question and special tokens among them.

    Each shares `stride` tokens of the context with the one before it. The positions are those of the first answer: the
    shortest stretch of tokens that covers its characters.

    Raises:
        JaxptmError: a question leaves no room for the context.
    """
    rows: dict[str, list[list[int]]] = {}
    owner: list[int] = []
    offsets: list[np.ndarray] = []
    in_context: list[np.ndarray] = []
    spans: list[tuple[int, int]] = []
    special = tokenizer.num_special_tokens_to_add(pair=True)
    for first in range(0, len(questions), CHUNK):
        some = questions[first : first + CHUNK]
        texts = [_cut(question.text, tokenizer, data.max_question_length) for question in some]
        for question, (_, length) in zip(some, texts, strict=True):
            room = data.max_length - length - special
            if room <= data.stride:
                raise JaxptmError(
                    f"question {question.id}: its {length} tokens leave room for {max(room, 0)} of the context, not "
                    f"more than data.stride {data.stride}: raise data.max_length, or lower data.max_question_length or "
                    "data.stride."
                )
        encoded = tokenizer(
            [text for text, _ in texts],
            [question.context for question in some],
            truncation="only_second",
            max_length=data.max_length,
            stride=data.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for name in ("input_ids", "token_type_ids"):
            if name in encoded:
                rows.setdefault(name, []).extend(encoded[name])
        for at, sample in enumerate(encoded["overflow_to_sample_mapping"]):
            places = np.array(encoded["offset_mapping"][at], np.int32)
            context = np.array([part == 1 for part in encoded.sequence_ids(at)])
            owner.append(first + sample)
            offsets.append(places)
            in_context.append(context)
            spans.append(_span(some[sample], places, context))
    targets = np.array(spans, np.int32).reshape(-1, 2)
    examples = Examples.of(rows, {"start_positions": targets[:, 0], "end_positions": targets[:, 1]})
    return Windows(examples, np.array(owner, np.int64), offsets, in_context)


def decode(
    questions: Sequence[Question],
    windows: Windows,
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    data: SquadData,
) -> list[Answers]:
    """The best stretches of the context of each question, over all of its windows.

    Of each window, the `n_best` best starts and ends in its context are paired to stretches of at most
    `max_answer_length` tokens. The score of no answer is the lowest, over the windows, at their first tokens
    (google-research/bert, run_squad.py). The probabilities are a softmax over the candidates, the empty one among them
    with `version_2`.

    Args:
        start_logits: of each window; what is longer than the window is padding.
        end_logits: as well.
    """
    found: list[dict[tuple[int, int], float]] = [{} for _ in questions]
    null = np.full(len(questions), np.inf)
    for at, owner in enumerate(windows.question):
        places, inside = windows.offsets[at], np.flatnonzero(windows.in_context[at])
        start, end = (np.asarray(logits[at], np.float64) for logits in (start_logits, end_logits))
        null[owner] = min(null[owner], start[0] + end[0])
        starts, ends = (inside[np.argsort(-logits[inside], kind="stable")[: data.n_best]] for logits in (start, end))
        lengths = ends[None, :] - starts[:, None] + 1
        firsts, lasts = np.nonzero((lengths >= 1) & (lengths <= data.max_answer_length))
        scores = start[starts[firsts]] + end[ends[lasts]]
        best = np.argsort(-scores, kind="stable")[: data.n_best]
        for score, first, last in zip(scores[best], starts[firsts[best]], ends[lasts[best]], strict=True):
            span = int(places[first, 0]), int(places[last, 1])
            found[owner][span] = max(found[owner].get(span, -np.inf), float(score))
    results = []
    for question, spans, nothing in zip(questions, found, null, strict=True):
        scored = [(question.context[first:last], score) for (first, last), score in spans.items()]
        scored = sorted(scored or [("", -np.inf)], key=lambda pair: -pair[1])[: data.n_best]
        odds = float(nothing) - scored[0][1]
        if data.version_2:
            scored = sorted([*scored, ("", float(nothing))], key=lambda pair: -pair[1])
        shares = np.exp(np.array([score for _, score in scored]) - max(max(score for _, score in scored), -1e300))
        shares /= max(shares.sum(), 1e-300)
        candidates = [Candidate(*pair, float(share)) for pair, share in zip(scored, shares, strict=True)]
        results.append(Answers(candidates, odds))
    return results


def chosen(questions: Sequence[Question], answers: Sequence[Answers], data: SquadData) -> dict[str, str]:
    """Question id -> its answer; "" where none is likelier than any by more than `null_threshold` (`version_2`)."""
    said = {}
    for question, found in zip(questions, answers, strict=True):
        best = next((candidate.text for candidate in found.candidates if candidate.text), "")
        said[question.id] = "" if data.version_2 and found.null_odds > data.null_threshold else best
    return said


def squad_scores(
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float] | None = None,
    *,
    version_2: bool,
) -> dict[str, float]:
    """`exact_match` and `f1` in percent, as evaluate-v1.1.py or, `version_2`, evaluate-v2.0.py of SQuAD computes them.

    A question without a prediction counts as wrong. Where some questions have no answer, also those figures over the
    questions with one (`has_answer_...`) and without (`no_answer_...`), and with `null_odds` the best that any
    threshold of them would give (`best_exact_match`, `best_f1`) and these thresholds.
    """
    exact, f1 = np.zeros(len(questions)), np.zeros(len(questions))
    missing = 0
    for at, question in enumerate(questions):
        if question.id not in predictions:
            missing += 1
            continue
        said = predictions[question.id]
        right = [text for text, _ in question.answers if normalised(text) or not version_2]
        if right:
            exact[at] = max(normalised(text) == normalised(said) for text in right)
            f1[at] = max(overlap(text, said) for text in right)
        else:  # no answer is left once articles and punctuation are gone, so none is right
            exact[at] = f1[at] = not normalised(said)
    if missing:
        log.warning("%d question(s) have no prediction and count as wrong.", missing)
    figures = {"exact_match": 100 * float(exact.mean()), "f1": 100 * float(f1.mean())}
    answered = np.array([bool(question.answers) for question in questions])
    if answered.all():
        return figures
    for name, which in (("has_answer", answered), ("no_answer", ~answered)):
        if which.any():
            figures |= {
                f"{name}_exact_match": 100 * float(exact[which].mean()),
                f"{name}_f1": 100 * float(f1[which].mean()),
            }
    if null_odds is not None:
        odds = np.array([null_odds.get(question.id, 0.0) for question in questions])
        empty = np.array([not predictions.get(question.id) for question in questions])
        for name, values in (("exact_match", exact), ("f1", f1)):
            figures[f"best_{name}"], figures[f"best_{name}_threshold"] = _best_threshold(values, odds, answered, empty)
    return figures


def write_predictions(
    directory: Path, questions: Sequence[Question], answers: Sequence[Answers], data: SquadData
) -> None:
    """`predictions.json` as the official script reads it, `nbest_predictions.json`, and for 2.0 `null_odds.json`."""
    nbest = {
        question.id: [candidate._asdict() for candidate in found.candidates]
        for question, found in zip(questions, answers, strict=True)
    }
    contents: dict[str, Any] = {"predictions": chosen(questions, answers, data), "nbest_predictions": nbest}
    if data.version_2:
        contents["null_odds"] = {q.id: found.null_odds for q, found in zip(questions, answers, strict=True)}
    for name, content in contents.items():
        (directory / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def normalised(text: str) -> str:
    """Without case, punctuation, articles and superfluous white space."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def overlap(right: str, said: str) -> float:
    """F1 of the words of two texts, as bags; 0 where there are none."""
    ours, theirs = normalised(said).split(), normalised(right).split()
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / max(len(ours) + len(theirs), 1)


def _best_threshold(
    values: np.ndarray, odds: np.ndarray, answered: np.ndarray, empty: np.ndarray
) -> tuple[float, float]:
    """The best mean in percent, and the null odds up to which the prediction is given and not the empty answer.

    Starts where no question is answered, and answers them one by one in the order of their odds.
    """
    order = np.argsort(odds, kind="stable")
    gains = np.where(answered, values, np.where(empty, 0.0, -1.0))[order]
    totals = np.concatenate([[0.0], np.cumsum(gains)]) + np.count_nonzero(~answered)
    best = int(np.argmax(totals))
    return 100 * float(totals[best]) / len(values), float(odds[order[best - 1]]) if best else 0.0


def _cut(text: str, tokenizer: Any, most: int) -> tuple[str, int]:
    """The beginning of a text that has at most so many tokens, and how many it has."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = encoded["offset_mapping"]
    if len(places) <= most:
        return text, len(places)
    return text[: places[most - 1][1]], most


def _span(question: Question, places: np.ndarray, in_context: np.ndarray) -> tuple[int, int]:
    if not question.answers:
        return 0, 0
    text, first = question.answers[0]
    last = first + len(text)
    inside = np.flatnonzero(in_context)
    if not len(inside) or places[inside[0], 0] > first or places[inside[-1], 1] < last:
        return 0, 0
    starts, ends = places[inside, 0], places[inside, 1]
    return int(inside[np.searchsorted(starts, first, side="right") - 1]), int(inside[np.searchsorted(ends, last)])

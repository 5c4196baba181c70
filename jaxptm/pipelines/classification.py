"""Labels of texts and of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy.special import expit, softmax

from jaxptm.pipelines.base import Pipeline, check_lengths, run_rows, window
from jaxptm.pretrained import Model
from jaxptm.types import JaxptmError

Text = str | Mapping[str, str | None]
"""A text, or a pair as {"text", "text_pair"}."""


class TextClassification(Pipeline):
    """The label of a text or a pair: `transformers.pipeline("text-classification")`."""

    task = "sequence-classification"
    fields = ("text", "text_pair")

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.labels = model.labels

    def __call__(
        self,
        inputs: Text | Sequence[Text],
        *,
        top_k: int | Literal[""] | None = "",
        function_to_apply: str | None = None,
        truncation: bool = False,
        batch_size: int = 16,
    ) -> Any:
        """The best label of each text, or several.

        Args:
            inputs: a text, {"text": ..., "text_pair": ...} for a pair, or several of them.
            top_k: how many labels, best first; None for all. Not given: the best one alone.
            function_to_apply: "sigmoid", "softmax" or "none" over the logits; default what the problem type of the
                model asks for: none for numbers, sigmoid for several labels or a single output, or else softmax.
            truncation: cut texts that are longer than the model.
            batch_size: texts that run at once.

        Returns:
            {"label", "score"} for each text in a list, also for one text alone, but for a single pair the dictionary
            itself; with `top_k` a list of such dictionaries in the place of each.

        Raises:
            JaxptmError: a text is longer than the model and not to be cut, or an argument is out of range.
        """
        single = isinstance(inputs, str | Mapping)
        given: list[Text] = [inputs] if single else list(inputs)  # type: ignore[list-item]
        if isinstance(top_k, int) and top_k < 1:
            raise JaxptmError(f"top_k is {top_k}, expected at least 1.")
        function = function_to_apply or self._usual_function()
        functions = {"sigmoid": expit, "softmax": softmax, "none": np.asarray}
        if function not in functions:
            raise JaxptmError(f"function_to_apply is {function!r}, expected one of {', '.join(functions)}.")
        logits = run_rows(self.model, self._encode(given, truncation), lambda out, _: out["logits"], batch_size)
        ranked = [self._ranked(functions[function](row)) for row in logits]
        if top_k == "":
            best = [answers[0] for answers in ranked]
            return best[0] if isinstance(inputs, Mapping) else best
        several = [answers[:top_k] for answers in ranked]
        return several[0] if single else several

    def _usual_function(self) -> str:
        problem = self.model.hf_config.get("problem_type")
        if problem == "regression":
            return "none"
        return "sigmoid" if problem == "multi_label_classification" or self.model.config.num_labels == 1 else "softmax"

    def _encode(self, texts: Sequence[Text], truncation: bool) -> dict[str, list[list[int]]]:
        pairs = []
        for text in texts:
            given = text if isinstance(text, Mapping) else {"text": text}
            pair = {name: value for name, value in given.items() if value is not None}
            known = "text" in pair and pair.keys() <= set(self.fields)
            if not known or not all(isinstance(value, str) for value in pair.values()):
                raise JaxptmError(f'{text!r} is no text; a pair is {{"text": ..., "text_pair": ...}}.')
            pairs.append(pair)
        cut = {"truncation": truncation, "max_length": window(self.model) if truncation else None}
        rows: dict[str, list[list[int]]] = {"input_ids": []}
        # Neighbours of one form at once: the tokenizer takes texts alone or in pairs.
        for names, some in groupby(pairs, key=lambda pair: tuple(sorted(pair))):
            alike = list(some)
            columns = {name: [pair[name] for pair in alike] for name in names}
            for name, ids in self.model.tokenizer(**columns, **cut, verbose=False).items():
                rows.setdefault(name, []).extend(ids)
        check_lengths(self.model, [pair["text"] for pair in pairs], rows["input_ids"])
        return rows

    def _ranked(self, scores: Float[np.ndarray, " K"]) -> list[dict[str, Any]]:
        order = np.argsort(-scores, kind="stable")
        return [{"label": self.labels[i], "score": float(scores[i])} for i in order]

    def lines(self, given: Any, result: Any) -> Iterator[str]:
        answers = [result] if isinstance(result, dict) else result
        labels = "   ".join(f"{answer['label']} {answer['score']:.3f}" for answer in answers)
        yield f"{labels}\t{given if isinstance(given, str) else ' | '.join(given.values())}"


class NextSentence(TextClassification):
    """Whether the second of two texts follows the first (Devlin et al. 2019, section 3.1, task 2).

    Called like `TextClassification`, with pairs; the labels are `is_next` and `not_next`.
    """

    task = "next-sentence"
    needed = 2

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.labels = ["is_next", "not_next"]

    def _usual_function(self) -> str:
        return "softmax"

    def _encode(self, texts: Sequence[Text], truncation: bool) -> dict[str, list[list[int]]]:
        for text in texts:
            if not isinstance(text, Mapping) or not text.get("text_pair"):
                raise JaxptmError(f'{text!r} is no pair {{"text": ..., "text_pair": ...}} of texts.')
        return super()._encode(texts, truncation)


@dataclass(frozen=True)
class Piece:
    """A token, or a word of several: what is said of it, and where it stands in the text."""

    word: str
    scores: Float[np.ndarray, " K"]
    start: int
    end: int
    index: int
    continues: bool
    """Whether it is of the same word as the one before."""


class TokenClassification(Pipeline):
    """Labels of tokens, and entities made of them: `transformers.pipeline("token-classification")`."""

    task = "token-classification"

    def __call__(
        self,
        inputs: str | Sequence[str] | Sequence[Sequence[str]],
        *,
        aggregation_strategy: str = "none",
        ignore_labels: Sequence[str] = ("O",),
        stride: int | None = None,
        is_split_into_words: bool = False,
        delimiter: str = " ",
        batch_size: int = 16,
    ) -> Any:
        """What is found in each text.

        Args:
            inputs: a text or several; with `is_split_into_words` a list of words or several.
            aggregation_strategy: "none" for each token; or entities, of neighbours with one label: "simple" of tokens,
                or of words, which have the label of their "first" token, of that with the highest score ("max"), or the
                best by the "average" of their tokens.
            ignore_labels: what is left out.
            stride: read texts that are longer than the model in windows that share so many tokens, and of findings that
                overlap take the longer one; without it, what is behind the first window is not read.
            delimiter: put between words to make a text of them.
            batch_size: windows that run at once.

        Returns:
            For a text a list of {"entity", "score", "index", "word", "start", "end"}, or of entities {"entity_group",
            "score", "word", "start", "end"}; characters of the text from `start` up to `end`. For several texts a list
            of such lists.

        Raises:
            JaxptmError: an argument is out of range, or does not go together with another.
        """
        single = isinstance(inputs, str) or (is_split_into_words and all(isinstance(word, str) for word in inputs))
        given: list[Any] = [inputs] if single else list(inputs)
        strategies = ("none", "simple", "first", "average", "max")
        limit = window(self.model)
        if aggregation_strategy not in strategies:
            raise JaxptmError(
                f"aggregation_strategy is {aggregation_strategy!r}, expected one of {', '.join(strategies)}."
            )
        if stride is not None and aggregation_strategy == "none":
            raise JaxptmError("stride: windows are joined by their entities; choose an aggregation_strategy.")
        if stride is not None and not 0 <= stride < limit - self.model.tokenizer.num_special_tokens_to_add():
            raise JaxptmError(f"stride is {stride}, expected at least 0 and less than the model's window of {limit}.")
        if not given:
            return []
        encoded = self.model.tokenizer(
            given,
            truncation=True,
            max_length=limit,
            stride=stride or 0,
            return_overflowing_tokens=stride is not None,
            return_special_tokens_mask=True,
            return_offsets_mapping=True,
            is_split_into_words=is_split_into_words,
        )
        owners = encoded.pop("overflow_to_sample_mapping", list(range(len(given))))
        logits = run_rows(self.model, encoded, lambda out, length: out["logits"][:length], batch_size)
        texts = [delimiter.join(words) for words in given] if is_split_into_words else given
        found: list[list[list[dict[str, Any]]]] = [[] for _ in given]
        for at, owner in enumerate(owners):
            starts = _word_starts(given[owner], delimiter) if is_split_into_words else None
            pieces = list(self._pieces(texts[owner], encoded, at, softmax(logits[at], axis=-1), starts))
            found[owner].append(self._said(pieces, aggregation_strategy, ignore_labels))
        results = [windows[0] if len(windows) == 1 else _longest(windows) for windows in found]
        return results[0] if single else results

    def _pieces(
        self, text: str, encoded: Any, at: int, scores: np.ndarray, word_starts: Sequence[int] | None
    ) -> Iterator[Piece]:
        tokenizer, words = self.model.tokenizer, encoded.word_ids(at)
        marked = bool(getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None))
        rows = (encoded[name][at] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
        for index, (token, (start, end), special) in enumerate(zip(*rows, strict=True)):
            if special:
                continue
            if word_starts is not None:
                start, end = start + word_starts[words[index]], end + word_starts[words[index]]
            word = tokenizer.convert_ids_to_tokens(token)
            # WordPiece marks what continues a word; of others only white space tells.
            continues = len(word) != end - start if marked else start > 0 and " " not in text[start - 1 : start + 1]
            if token == tokenizer.unk_token_id:
                word, continues = text[start:end], False
            yield Piece(word, scores[index], start, end, index, continues)

    def _said(self, pieces: list[Piece], strategy: str, ignored: Sequence[str]) -> list[dict[str, Any]]:
        labels = self.model.labels
        if strategy in ("first", "average", "max"):
            pieces = [self._word(word, strategy) for word in _runs(pieces, lambda _, piece: piece.continues)]
        if strategy == "none":
            return [
                {
                    "entity": labels[piece.scores.argmax()],
                    "score": float(piece.scores.max()),
                    "index": piece.index,
                    "word": piece.word,
                    "start": piece.start,
                    "end": piece.end,
                }
                for piece in pieces
                if labels[piece.scores.argmax()] not in ignored
            ]

        def together(before: Piece, piece: Piece) -> bool:
            (_, last), (place, kind) = (_tag(labels[each.scores.argmax()]) for each in (before, piece))
            return kind == last and place != "B"

        entities = [
            {
                "entity_group": labels[run[0].scores.argmax()].split("-", 1)[-1],
                "score": float(np.mean([piece.scores.max() for piece in run])),
                "word": self.model.tokenizer.convert_tokens_to_string([piece.word for piece in run]),
                "start": run[0].start,
                "end": run[-1].end,
            }
            for run in _runs(pieces, together)
        ]
        return [entity for entity in entities if entity["entity_group"] not in ignored]

    def _word(self, tokens: list[Piece], strategy: str) -> Piece:
        match strategy:
            case "first":
                scores = tokens[0].scores
            case "max":
                scores = max(tokens, key=lambda token: float(token.scores.max())).scores
            case _:
                scores = np.mean([token.scores for token in tokens], axis=0)
        word = self.model.tokenizer.convert_tokens_to_string([token.word for token in tokens])
        return Piece(word, scores, tokens[0].start, tokens[-1].end, tokens[0].index, continues=False)

    def lines(self, given: Any, result: Any) -> Iterator[str]:
        yield str(given)
        for found in result:
            label = found.get("entity") or found["entity_group"]
            yield f"  {label}  {found['score']:.1%}  {found['word']}  [{found['start']}:{found['end']}]"


class ReplacedToken(Pipeline):
    """Which tokens do not belong where they stand: an ELECTRA discriminator (Clark et al. 2020, section 2)."""

    task = "replaced-token"

    def __call__(
        self, inputs: str | Sequence[str], *, threshold: float = 0.5, truncation: bool = False, batch_size: int = 16
    ) -> Any:
        """Judges each token of texts.

        Args:
            inputs: a text or several.
            threshold: the score from which on a token counts as replaced.
            truncation: cut texts that are longer than the model.
            batch_size: texts that run at once.

        Returns:
            For a text a list of {"replaced", "score", "index", "word", "start", "end"}, one a token: whether it is
            replaced, the probability of that, its place in the row, and its characters in the text. For several texts
            a list of such lists.

        Raises:
            JaxptmError: a text is longer than the model and not to be cut.
        """
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        limit = window(self.model) if truncation else None
        if not texts:
            return []
        encoded = self.model.tokenizer(
            texts,
            truncation=truncation,
            max_length=limit,
            return_special_tokens_mask=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        check_lengths(self.model, texts, encoded["input_ids"])
        logits = run_rows(self.model, encoded, lambda out, length: out["logits"][:length], batch_size)
        results = []
        for at, row in enumerate(logits):
            rows = (encoded[name][at] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
            results.append(
                [
                    {
                        "replaced": bool(score >= threshold),
                        "score": float(score),
                        "index": index,
                        "word": self.model.tokenizer.convert_ids_to_tokens(token),
                        "start": start,
                        "end": end,
                    }
                    for index, (score, token, (start, end), special) in enumerate(zip(expit(row), *rows, strict=False))
                    if not special
                ]
            )
        return results[0] if isinstance(inputs, str) else results

    def lines(self, given: Any, result: Any) -> Iterator[str]:
        yield str(given)
        for token in result:
            yield f"  {'*' if token['replaced'] else ' '} {token['score']:6.1%}  {token['word']}"


def _runs(pieces: Sequence[Piece], together: Any) -> Iterator[list[Piece]]:
    """Neighbours of which each goes together with the one before."""
    run: list[Piece] = []
    for piece in pieces:
        if run and not together(run[-1], piece):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _tag(label: str) -> tuple[str, str]:
    """Place (B or I) and type; a label of neither form goes on where it was."""
    return (label[0], label[2:]) if label.startswith(("B-", "I-")) else ("I", label)


def _word_starts(words: Sequence[str], delimiter: str) -> list[int]:
    lengths = [len(word) + len(delimiter) for word in words]
    return [sum(lengths[:at]) for at in range(len(words))]


def _longest(windows: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The entities of several windows; of two that overlap the longer, or if they are equally long the likelier."""
    kept: list[dict[str, Any]] = []
    for entity in sorted(chain.from_iterable(windows), key=lambda entity: entity["start"]):
        if not kept or not kept[-1]["start"] <= entity["start"] < kept[-1]["end"]:
            kept.append(entity)
        elif _weight(entity) > _weight(kept[-1]):
            kept[-1] = entity
    return kept


def _weight(entity: Mapping[str, Any]) -> tuple[int, float]:
    return entity["end"] - entity["start"], entity["score"]

"""Models of language: masks filled, and texts continued."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxptm.data.examples import Examples
from jaxptm.data.tokenizer import filler
from jaxptm.pipelines.base import LENGTH_STEP, Pipeline, check_batch_size, window
from jaxptm.pretrained import Model
from jaxptm.types import JaxptmError


class FillMask(Pipeline):
    """Fills the mask tokens of a text: `transformers.pipeline("fill-mask")`."""

    task = "masked-lm"
    bare = True

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        if model.tokenizer.mask_token_id is None:
            raise JaxptmError(f"{model.source}: the tokenizer has no mask token, so there is nothing to fill.")

    def __call__(
        self,
        inputs: str | Sequence[str],
        *,
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        batch_size: int = 16,
    ) -> list[Any]:
        """The likeliest tokens for each mask.

        Args:
            inputs: a text, or several, each with one or more mask tokens.
            top_k: how many tokens for each mask.
            targets: only these tokens are scored.
            tokenizer_kwargs: for the tokenizer, such as {"truncation": True} to cut texts that are too long.
            batch_size: texts that run at once.

        Returns:
            For a text with one mask a list of {"score", "token", "token_str", "sequence"}, best first; with several
            masks a list of such lists; for two texts or more a list of those.

        Raises:
            JaxptmError: a text without a mask token or longer than the model, or a target that is no single token.
        """
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        check_batch_size(batch_size)
        if top_k < 1:
            raise JaxptmError(f"top_k is {top_k}, expected at least 1.")
        chosen = self._target_ids([targets] if isinstance(targets, str) else targets)
        results = []
        for start in range(0, len(texts), batch_size):
            results += self._fill(texts[start : start + batch_size], top_k, chosen, dict(tokenizer_kwargs or {}))
        return results[0] if len(texts) == 1 else results

    def lines(self, given: Any, result: Any) -> Iterator[str]:
        yield str(given)
        for answers in [result] if isinstance(result[0], dict) else result:
            yield "  " + "   ".join(f"{answer['token_str']} {answer['score']:.1%}" for answer in answers)

    def _fill(
        self, texts: list[str], top_k: int, chosen: np.ndarray | None, tokenizer_kwargs: dict[str, Any]
    ) -> list[Any]:
        tokenizer, limit = self.model.tokenizer, self.model.max_length
        if tokenizer_kwargs.get("truncation"):
            tokenizer_kwargs = {"max_length": window(self.model), **tokenizer_kwargs}
        # Rows are filled up below, on the right, whatever the tokenizer would do.
        rows = tokenizer(texts, **{**tokenizer_kwargs, "padding": False, "verbose": False})
        encoded = rows["input_ids"]
        masks = [[at for at, token in enumerate(ids) if token == tokenizer.mask_token_id] for ids in encoded]
        for text, ids, positions in zip(texts, encoded, masks, strict=True):
            if not positions:
                raise JaxptmError(f"{text!r} holds no mask token: write {tokenizer.mask_token} where a word is wanted.")
            if len(ids) > limit:
                raise JaxptmError(f"{text[:60]!r}...: {len(ids)} tokens, the model takes {limit}; shorten the text.")
        length = min(limit, -(-max(map(len, encoded)) // LENGTH_STEP) * LENGTH_STEP)
        slots = max(map(len, masks))
        batch: dict[str, Any] = Examples.of(rows).batch(range(len(texts)), length, filler(tokenizer))
        batch["mlm_positions"] = [positions + [0] * (slots - len(positions)) for positions in masks]
        out = self.model(**batch)
        scores = np.asarray(jax.nn.softmax(out.logits, axis=-1))
        results = []
        for row, (ids, positions) in enumerate(zip(encoded, masks, strict=True)):
            answers = [
                self._best(scores[row, slot], ids, at, top_k, chosen, alone=len(positions) == 1)
                for slot, at in enumerate(positions)
            ]
            results.append(answers[0] if len(answers) == 1 else answers)
        return results

    def _best(
        self, scores: np.ndarray, ids: list[int], at: int, top_k: int, chosen: np.ndarray | None, alone: bool
    ) -> list[dict[str, Any]]:
        candidates = np.arange(len(scores)) if chosen is None else chosen
        best = candidates[np.argsort(-scores[candidates], kind="stable")[:top_k]]
        tokenizer = self.model.tokenizer
        return [
            {
                "score": float(scores[token]),
                "token": int(token),
                "token_str": tokenizer.decode([token]),
                "sequence": tokenizer.decode(
                    [each for each in (*ids[:at], int(token), *ids[at + 1 :]) if each != tokenizer.pad_token_id],
                    skip_special_tokens=alone,
                ),
            }
            for token in best
        ]

    def _target_ids(self, targets: Sequence[str] | None) -> np.ndarray | None:
        if targets is None:
            return None
        vocabulary = self.model.tokenizer.get_vocab()
        unknown = [target for target in targets if target not in vocabulary]
        if unknown or not targets:
            raise JaxptmError(
                f"targets: {', '.join(map(repr, unknown)) or 'none given'}: not single tokens of the vocabulary."
            )
        return np.array(list(dict.fromkeys(vocabulary[target] for target in targets)))


class TextGeneration(Pipeline):
    """Continues texts: `transformers.pipeline("text-generation")`."""

    task = "causal-lm"

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        filler(model.tokenizer)  # fails here where texts of different length could not be batched

    def __call__(
        self,
        inputs: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        do_sample: bool = True,
        temperature: float = 0.7,
        top_k: int | None = 50,
        top_p: float | None = None,
        num_return_sequences: int = 1,
        return_full_text: bool = True,
        batch_size: int = 16,
        seed: int = 0,
        first: int = 0,
    ) -> list[Any]:
        """Texts that begin with the given ones. The defaults are those of transformers, but for `seed`.

        Args:
            inputs: a text, or several.
            max_new_tokens: at most; default 256, or what the model's context has room for behind the text.
            do_sample: draw tokens (see `jaxptm.generation.filter_logits`) rather than take the likeliest.
            num_return_sequences: answers a text.
            return_full_text: whether an answer begins with the text it continues.
            batch_size: rows that run at once.
            seed: the same seed gives the same answers, however they are batched.
            first: number of the first text, for one who asks for some at a time.

        Returns:
            For a text a list of {"generated_text"}, one an answer; for a sequence of texts a list of such lists.

        Raises:
            JaxptmError: an empty text, one that leaves no room for new tokens, or settings out of range.
        """
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        check_batch_size(batch_size)
        if num_return_sequences < 1 or (num_return_sequences > 1 and not do_sample):
            raise JaxptmError(
                f"num_return_sequences is {num_return_sequences}: give at least 1, and more than 1 only with do_sample."
            )
        prompts = [self._encode(text) for text in texts for _ in range(num_return_sequences)]
        rooms = [
            min(256, self.model.max_length - len(prompt)) if max_new_tokens is None else max_new_tokens
            for prompt in prompts
        ]
        fill, ends = filler(self.model.tokenizer), self.model.declared_tokens("eos_token_id")
        settings: dict[str, Any] = {
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "eos_token_id": self.model.tokenizer.eos_token_id if ends is None else ends,
            "pad_token_id": fill,
            "seed": seed,
        }
        answers: list[dict[str, Any]] = []
        for start in range(0, len(prompts), batch_size):
            rows = prompts[start : start + batch_size]
            length = max(map(len, rows))
            ids = np.array([[fill] * (length - len(row)) + row for row in rows])
            mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows])
            out = self.model.generate(
                ids,
                mask,
                max_new_tokens=rooms[start : start + batch_size],
                first_row=first * num_return_sequences + start,
                **settings,
            )
            for at, row in enumerate(rows, start):
                text = texts[at // num_return_sequences]
                new = self._new_text(row, out[at - start, length:].tolist())
                answers.append({"generated_text": text + new if return_full_text else new})
        grouped = [answers[at : at + num_return_sequences] for at in range(0, len(answers), num_return_sequences)]
        return grouped[0] if isinstance(inputs, str) else grouped

    def lines(self, given: Any, result: Any) -> Iterator[str]:
        for answer in result:
            yield answer["generated_text"]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise JaxptmError(f"the text {text!r} is empty: give a beginning to continue.")
        if len(ids) >= self.model.max_length:
            raise JaxptmError(
                f"{text[:60]!r}...: {len(ids)} tokens, the model takes {self.model.max_length}, new ones "
                "included; shorten the text."
            )
        return ids

    def _new_text(self, prompt: list[int], new: list[int]) -> str:
        # By difference: what a token spells may depend on the one before it.
        tokenizer = self.model.tokenizer
        before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + new))
        return whole[len(before) :]

"""What word frequencies alone are worth on a run's held-out text: the baseline of its language model.

    python experiments/unigram_perplexity.py RUN

RUN is the directory of a run whose prepared text is still there. Frequencies are those of the run's training text, with
one added to each count; the cross entropy is over the held-out tokens, separators included. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from jaxptm.config import TextData, load_config
from jaxptm.data.corpus import Corpus
from jaxptm.directories import prepared_directory


def counts(corpus: Corpus) -> np.ndarray:
    """How often each id stands in this part of the corpus, int64 [V]."""
    total = np.zeros(corpus.vocab_size, np.int64)
    for first, last in corpus.ranges.tolist():
        start, end = corpus.sentence_start(corpus.document_start(np.array([first, last])))
        total += np.bincount(corpus.tokens(int(start), int(end)), minlength=corpus.vocab_size)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    config = load_config(parser.parse_args().run / "config.yaml")
    assert isinstance(config.data, TextData)
    train, held_out = Corpus.open(prepared_directory(config)).split(config.data.eval_fraction)
    known, asked = counts(train) + 1, counts(held_out)
    nats = float(-(asked * np.log(known / known.sum())).sum() / asked.sum())
    figures = {"held_out_tokens": int(asked.sum()), "unigram_nats": round(nats, 4), "unigram_perplexity": np.exp(nats)}
    print(json.dumps(figures | {"unigram_perplexity": round(float(np.exp(nats)), 1)}))


if __name__ == "__main__":
    main()

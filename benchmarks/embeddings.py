"""Texts a second to vectors, beside transformers and torch.

    python benchmarks/embeddings.py MODEL FILE ... [--texts N] [--rows B] [--repeats R]

MODEL is a directory of sentence-transformers, the texts are the first N lines of FILEs that hold any. Both sides
tokenise, run rows of similar length together, and make one vector of unit length of each text:

    jaxptm    pipeline("feature-extraction", MODEL)(texts, pooling=True)
    torch     `SentenceTransformer.encode` in transformers alone: longest first, a batch padded to its longest row,
              the mean of a row's tokens

They take turns, and medians of `--repeats` of each count, after one turn that compiles and is left out. Memory that is
freed stays with the process, for both, as in jaxptm's commands; `--give-back` leaves malloc as it comes. Prints JSON:
texts and tokens a second, the ratio of the times, and how far vectors are apart at the most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from jaxptm.allocation import keep_freed_memory

if "--give-back" not in sys.argv:
    keep_freed_memory()

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import track

import jaxptm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--give-back", action="store_true", help="freed memory to the system, which clears it again")
    arguments = parser.parse_args()
    rows = arguments.rows
    lines = (line.strip() for path in arguments.files for line in path.read_text(encoding="utf-8").splitlines())
    texts = [line for line in lines if line][: arguments.texts]
    if len(texts) < arguments.texts:
        parser.error(f"the files hold {len(texts)} texts of the {arguments.texts}; set --texts or name more files.")

    pipeline = jaxptm.pipeline("feature-extraction", arguments.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    theirs = transformers.AutoModel.from_pretrained(arguments.model).eval()
    limit = json.loads((Path(arguments.model) / "sentence_bert_config.json").read_text())["max_seq_length"]

    def ours() -> np.ndarray:
        return np.asarray(pipeline(texts, pooling=True, batch_size=rows))

    @torch.inference_mode()
    def peers() -> np.ndarray:
        vectors = np.zeros((len(texts), theirs.config.hidden_size), np.float32)
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))  # as encode does, before it tokenises
        for first in range(0, len(order), rows):
            chosen = order[first : first + rows]
            batch = tokenizer(
                [texts[at] for at in chosen], padding=True, truncation=True, max_length=limit, return_tensors="pt"
            )
            hidden, seen = theirs(**batch).last_hidden_state, batch["attention_mask"][..., None]
            pooled = (hidden * seen).sum(1) / seen.sum(1)
            vectors[chosen] = torch.nn.functional.normalize(pooled, dim=1).numpy()
        return vectors

    sides = {"jaxptm": ours, "torch": peers}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    vectors: dict[str, np.ndarray] = {}
    for _ in track(range(arguments.repeats + 1), "turns", console=Console(stderr=True)):
        for side, embed in sides.items():
            began = time.perf_counter()
            vectors[side] = embed()
            seconds[side].append(time.perf_counter() - began)
    taken = {side: values[1:] for side, values in seconds.items()}
    median = {side: statistics.median(values) for side, values in taken.items()}
    tokens = sum(map(len, tokenizer(texts, truncation=True, max_length=limit)["input_ids"]))
    figures = {
        "texts": len(texts),
        "tokens": tokens,
        "texts_per_second": {side: round(len(texts) / value, 1) for side, value in median.items()},
        "tokens_per_second": {side: round(tokens / value) for side, value in median.items()},
        "ratio": round(statistics.median(a / b for a, b in zip(taken["jaxptm"], taken["torch"], strict=True)), 3),
        "first_call_seconds": {side: round(values[0], 1) for side, values in seconds.items()},
        "largest_difference": float(np.abs(vectors["jaxptm"] - vectors["torch"]).max()),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

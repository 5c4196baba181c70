"""Speed of `jaxptm prepare` against the bare Rust tokenizer, on the same text and the same cores.

    python benchmarks/prepare.py --tokenizer VOCAB_OR_DIRECTORY FILE_OR_GLOB ... [--workers N] [--repeats R]

The bare tokenizer gets every document in memory already and its ids are thrown away, so that nothing but tokenisation
is timed; it uses all cores by its own threads. `prepare` reads, splits, tokenises and writes the shards. The two take
turns, and the best of `--repeats` of each counts. Seconds are wall time; `cpu` is the processor time of the process and
its children.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable

from jaxptm.config import TextData
from jaxptm.data.prepare import prepare
from jaxptm.data.sources import DOCUMENT_END, find_sources, read_blocks
from jaxptm.data.tokenizer import load_tokenizer


def timed(work: Callable[[], object]) -> dict[str, float]:
    cpu, wall = sum(os.times()[:4]), time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - wall, "cpu": sum(os.times()[:4]) - cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()

    backend = load_tokenizer(args.tokenizer).backend_tokenizer
    corpora = [
        [document for document in "".join(read_blocks(source, "text")).split(DOCUMENT_END) if document]
        for source in find_sources(args.files)
    ]
    megabytes = sum(len(document.encode()) for corpus in corpora for document in corpus) / 1e6

    def bare(encode: Callable[..., object]) -> None:
        for corpus in corpora:
            encode(corpus, add_special_tokens=False)

    def whole() -> None:
        with tempfile.TemporaryDirectory() as directory:
            prepare(TextData(files=args.files, tokenizer=args.tokenizer), directory, workers=args.workers)

    works: dict[str, Callable[[], object]] = {
        "encode_batch": lambda: bare(backend.encode_batch),
        "encode_batch_fast": lambda: bare(backend.encode_batch_fast),
        "prepare": whole,
    }
    best: dict[str, dict[str, float]] = {}
    for _ in range(args.repeats):
        for name, work in works.items():
            result = timed(work)
            if name not in best or result["seconds"] < best[name]["seconds"]:
                best[name] = result
            print(f"{name:20} {result['seconds']:7.2f} s  {result['cpu']:7.2f} s cpu", flush=True)
    rates = {name: round(megabytes / result["seconds"], 2) for name, result in best.items()}
    figures = {
        "megabytes": round(megabytes, 1),
        "cores": os.cpu_count(),
        "megabytes_per_second": rates,
        "cpu_seconds": {name: round(result["cpu"], 2) for name, result in best.items()},
        "prepare_over_encode_batch": round(rates["prepare"] / rates["encode_batch"], 2),
        "prepare_over_encode_batch_fast": round(rates["prepare"] / rates["encode_batch_fast"], 2),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

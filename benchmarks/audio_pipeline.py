"""Speed of the audio pipeline alone, in seconds of audio a second.

    python benchmarks/audio_pipeline.py SOURCE ... [--crop SECONDS] [--batch ROWS] [--batches N] [--workers W]

SOURCE is what `data.train` takes. Three things are timed, in turns, and the median of `--repeats` of each counts:

    prepare       all of SOURCE decoded to shards, as `jaxptm prepare` does it
    soundfile     the same files read by soundfile alone, by one process, with what it reads thrown away
    batches       N batches from the shards: cropped, normalised, padded and read ahead

The shards lie in a temporary directory and are read from the page cache. Files that are short of a crop count by what
they hold; padding does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import soundfile

from jaxptm.config import RATE, AudioData
from jaxptm.data.batching import batches
from jaxptm.data.prepare_audio import prepare_audio
from jaxptm.data.recordings import Recordings
from jaxptm.data.speech import SpeechBuckets, usable
from jaxptm.data.utterances import find_utterances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--crop", type=float, default=250_000 / RATE)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    data = AudioData(train=args.sources, max_seconds=args.crop)
    paths = [item.path for item in find_utterances(data.train, data) if item.row is None]

    rates: dict[str, list[float]] = {"prepare": [], "soundfile": [], "batches": []}
    with tempfile.TemporaryDirectory() as directory:
        for repeat in range(args.repeats):
            prepared = Path(directory) / str(repeat)
            began = time.perf_counter()
            prepare_audio(data, prepared, workers=args.workers)
            seconds = Recordings.open(prepared).seconds
            rates["prepare"].append(seconds / (time.perf_counter() - began))

            began = time.perf_counter()
            read = 0.0
            for path in paths:
                samples, rate = soundfile.read(path, dtype="float32")
                read += len(samples) / rate
            rates["soundfile"].append(read / (time.perf_counter() - began))

            speech = usable(Recordings.open(prepared), data, crop=True)
            source = SpeechBuckets(speech, args.batch, normalize=True, longest=round(args.crop * RATE), seed=repeat)
            began = time.perf_counter()
            heard = sum(int(batch["attention_mask"].sum()) for batch in batches(source, args.batch, 0, args.batches))
            rates["batches"].append(heard / RATE / (time.perf_counter() - began))
        size = sum(file.stat().st_size for file in prepared.rglob("*") if file.is_file())
    figures = {
        "hours": round(seconds / 3600, 3),
        "utterances": len(speech),
        "cores": os.cpu_count(),
        "shard_bytes_per_second_of_audio": round(size / seconds),
        "row_lengths": source.lengths,
        "padding": round(1 - source.token_share(), 4),
        "audio_seconds_per_second": {name: round(statistics.median(values)) for name, values in rates.items()},
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

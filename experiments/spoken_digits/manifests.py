"""Manifests of spoken digits: a held-out tenth, few labels, and one speaker left out.

    python experiments/spoken_digits/manifests.py RECORDINGS OUT

RECORDINGS holds `{digit}_{speaker}_{take}.wav` (github.com/Jakobovski/free-spoken-digit-dataset). OUT gets manifests of
`path<TAB>word` lines: `dev.tsv`, every tenth take of every digit and speaker; `train.tsv`, the others; `train_1.tsv`,
`train_5.tsv`, `train_10.tsv` and `train_50.tsv`, the first of those, so many a digit, speakers in turns;
`without_<speaker>.tsv` and `only_<speaker>.tsv`, all takes of the others and of one.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

WORDS = ("ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE")


def main() -> None:
    recordings, out = (Path(given).resolve() for given in sys.argv[1:3])
    out.mkdir(parents=True, exist_ok=True)
    takes = defaultdict(list)
    for path in recordings.glob("*.wav"):
        digit, speaker, take = path.stem.split("_")
        takes[digit, speaker].append((int(take), path))
    if not takes:
        sys.exit(f"{recordings}: holds no {{digit}}_{{speaker}}_{{take}}.wav")
    of_speaker: dict[str, list[Path]] = defaultdict(list)
    train: dict[str, list[list[Path]]] = defaultdict(list)
    dev: list[Path] = []
    for (digit, speaker), found in sorted(takes.items()):
        paths = [path for _, path in sorted(found)]
        of_speaker[speaker] += paths
        dev += paths[::10]
        train[digit].append([path for at, path in enumerate(paths) if at % 10])

    def write(name: str, paths: Iterable[Path]) -> None:
        lines = [f"{path}\t{WORDS[int(path.name[0])]}\n" for path in paths]
        (out / f"{name}.tsv").write_text("".join(lines))
        print(f"{name}.tsv: {len(lines)} clips")

    write("dev", dev)
    write("train", (path for groups in train.values() for group in groups for path in group))
    for labels in (1, 5, 10, 50):
        in_turns = {
            digit: [path for row in zip(*groups, strict=True) for path in row] for digit, groups in train.items()
        }
        write(f"train_{labels}", (path for paths in in_turns.values() for path in paths[:labels]))
    for left_out in of_speaker:
        write(f"only_{left_out}", of_speaker[left_out])
        write(f"without_{left_out}", (path for name, paths in of_speaker.items() if name != left_out for path in paths))


if __name__ == "__main__":
    main()

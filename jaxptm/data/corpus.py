"""A corpus on disk: text in, memory-mapped shards of token ids out.

A prepared directory holds

    tokenizer/                 what the text was tokenised with, as transformers saves it
    shards/<split>-<key>/      one for each source: tokens.npy, sentence_ends.npy, document_ends.npy, record.json
    manifest.json              written last: the shards of each split in order, and their counts

`tokens` are the ids of the whole source, with the separator token after each document. `sentence_ends` are offsets into
`tokens` (a document's last sentence includes the separator), `document_ends` are offsets into `sentence_ends`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt
from tokenizers import Tokenizer

from jaxptm.config import TextData
from jaxptm.data.sources import DOCUMENT_END, Source, find_sources, read_blocks, split_dataset
from jaxptm.data.tokenizer import Encoder, load_tokenizer, tokenizer_hash, train_wordpiece
from jaxptm.errors import JaxptmError

FORMAT = 1
"""Version of the layout and of the way text is cut; another version is prepared anew."""
BYTES_PER_WORKER = 2**24
"""Source bytes that make another process worth its start."""

Indices = Int[np.ndarray, "*shape"]
Progress = Callable[[float, str], None]
"""Called with the share done (0 to 1) and a line that says what was done last."""

_TITLES = ["Mr", "Ms", "Dr", "St", "Mt", "Lt", "vs", "No", "Jr", "Sr", "Mrs", "Rev", "Gen", "Col", "Capt", "Prof"]
_SENTENCE_END = re.compile(
    r"([.!?…]"
    # A full stop after an initial or a title ends nothing,
    r"(?<!\b[A-Z]\.)" + "".join(rf"(?<!\b{title}\.)" for title in _TITLES) + r"[\"'”’»)\]]*)"
    # and the next sentence starts with no small ASCII letter.
    r"[^\S\n]+(?=[\"'“‘«(\[¿¡]*[^\Wa-z_])"
)
_SENTENCE_END_CJK = re.compile(r"([。！？][」』”’）]*)")


def split_sentences(text: str) -> str:
    """Puts each sentence of `text` on its own line; lines that are there stay apart."""
    # Two patterns, each with the marks first: the engine skips ahead to those, and goes thirty times as fast.
    text = _SENTENCE_END.sub(r"\1\n", text)
    return _SENTENCE_END_CJK.sub(r"\1\n", text) if any(mark in text for mark in "。！？") else text


@dataclass(frozen=True)
class Shard:
    """One source's tokens, as its record.json tells."""

    name: str
    source: str
    stamp: list[int | str]
    text_field: str
    tokenizer: str
    documents: int
    sentences: int
    tokens: int
    bytes: int
    """Of UTF-8 text."""
    max_token: int
    files: dict[str, int]
    """Sizes in bytes."""
    format: int = FORMAT


@dataclass(frozen=True)
class Manifest:
    """What a prepared directory holds."""

    request: dict[str, Any]
    """The settings and the sources' stamps that it was prepared from."""
    tokenizer: str
    """`tokenizer_hash` of its tokenizer."""
    vocab_size: int
    separator: int
    """Id of the token after each document."""
    splits: dict[str, list[Shard]]
    format: int = FORMAT

    def total(self, count: str, split: str = "train") -> int:
        """Sum over shards of `documents`, `sentences`, `tokens` (separators included) or `bytes`."""
        return sum(getattr(shard, count) for shard in self.splits[split])

    def damage(self, directory: str | Path) -> str | None:
        """The first shard file that is missing or has another size than when it was written."""
        shards = (shard for shards in self.splits.values() for shard in shards)
        return next(filter(None, (_damage(Path(directory) / "shards" / shard.name, shard) for shard in shards)), None)

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """Raises JaxptmError where there is none, or one of another format."""
        path = Path(directory) / "manifest.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields["format"] != FORMAT:
                raise JaxptmError(
                    f"{path}: has format {fields['format']}, this jaxptm reads {FORMAT}: prepare it again."
                )
            shards = {split: [Shard(**shard) for shard in rows] for split, rows in fields.pop("splits").items()}
            return cls(**fields, splits=shards)
        except FileNotFoundError as error:
            raise JaxptmError(
                f"{directory}: holds no prepared corpus (no manifest.json): run `jaxptm prepare`."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JaxptmError(f"{path}: is damaged: remove it and run `jaxptm prepare` again.") from error


def prepare(
    data: TextData,
    directory: str | Path,
    host: int = 0,
    hosts: int = 1,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Manifest | None:
    """Tokenises the files of `data` into `directory`; what is there already and up to date is not done again.

    Host `host` of `hosts` does every `hosts`-th source. Sources are done in parallel by `workers` processes (default:
    as many as there are cores and work for them); a file is never split, so use several for speed. The processes are
    spawned, which re-imports the calling script: guard it with `if __name__ == "__main__":`, or set `workers=1`.

    Returns the manifest, or None where other hosts' shards are still missing: the last host to finish writes it.

    Raises:
        JaxptmError: bad or missing input, a full disk, or a vocabulary that host 0 has yet to train. Finished shards
            stay.
    """
    directory = Path(directory)
    report = progress or (lambda share, message: None)
    request = data.model_dump(include={"files", "eval_files", "text_field", "tokenizer", "vocab_size", "lowercase"})
    done = Manifest.load(directory) if (directory / "manifest.json").exists() else None
    try:
        sources = _sources(data)
    except JaxptmError:
        if done is not None and request.items() <= done.request.items():
            return done  # prepared elsewhere: the shards do without their sources
        raise
    request["tokenizer_stamp"] = _tokenizer_stamp(data.tokenizer)
    request["sources"] = {split: [[source.key, source.stamp] for source in sources[split]] for split in sources}
    if done is not None and done.request == request and not done.damage(directory):
        return done

    with _disk(directory):
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer = _tokenizer(data, directory, request, sources["train"], host, report)
        separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        if separator is None:
            raise JaxptmError(
                f"tokenizer {data.tokenizer!r} has neither a separator nor an end token to put after documents."
            )
        vocab_size = max(tokenizer.get_vocab().values()) + 1
        write = _ShardWriter(
            str(directory / "shards"),
            tokenizer.backend_tokenizer.to_str(),
            tokenizer_hash(tokenizer),
            separator,
            "uint16" if vocab_size <= 2**16 else "uint32",
            data.text_field,
        )
        tasks = [(split, piece) for split in sources for source in sources[split] for piece in split_dataset(source)]
        _write_shards(write, tasks[host::hosts], workers, report)
        records = [(split, write.finished(split, source)) for split, source in tasks]
        if any(shard is None for _, shard in records) or not (directory / "tokenizer").exists():
            return None
        splits = {split: [shard for name, shard in records if name == split and shard] for split in sources}
        manifest = Manifest(request, write.hash, vocab_size, separator, splits)
        for split in splits:
            if manifest.total("documents", split) == 0:
                names = ", ".join(source.name for source in sources[split])
                raise JaxptmError(f"the {split} corpus is empty: no document in {names}.")
        _write_json(directory / "manifest.json", asdict(manifest))
        return manifest


def _sources(data: TextData) -> dict[str, list[Source]]:
    sources = {"train": find_sources(data.files)}
    if data.eval_files is not None:
        sources["eval"] = find_sources(data.eval_files)
        train = {source.key for source in sources["train"]}
        shared = next((source.name for source in sources["eval"] if source.key in train), None)
        if shared is not None:
            raise JaxptmError(
                f"{shared}: is both in data.files and in data.eval_files: held-out text must not be trained on."
            )
    if not any(sources.values()):
        raise JaxptmError("data.files is empty: give at least one file, glob, directory or dataset.")
    return sources


def _tokenizer_stamp(name: str) -> list[list[Any]]:
    """Size and time of modification of a local tokenizer's files; nothing for the hub and `train`."""
    path = Path(name).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def _tokenizer(
    data: TextData, directory: Path, request: dict[str, Any], sources: Sequence[Source], host: int, report: Progress
) -> Any:
    """The tokenizer of `directory`, put there first by host 0 where it is missing or made from something else."""
    home = directory / "tokenizer"
    made_from = {key: request[key] for key in ("tokenizer", "tokenizer_stamp", "vocab_size", "lowercase")}
    if data.tokenizer == "train":
        made_from |= {"text_field": data.text_field, "sources": request["sources"]["train"]}
    if _read_json(home / "made_from.json") == made_from:
        return load_tokenizer(home)
    if data.tokenizer != "train":
        tokenizer = load_tokenizer(data.tokenizer, data.lowercase)
    elif host > 0:
        raise JaxptmError(
            f"{home}: holds no vocabulary trained on these files yet: with `tokenizer: train`, let host 0 prepare "
            "first, then start the other hosts on the same directory."
        )
    else:
        report(0.0, "learning the vocabulary")
        pieces = [piece for source in sources for piece in split_dataset(source)]
        blocks = (block for piece in pieces for block in read_blocks(piece, data.text_field))
        assert data.vocab_size is not None
        tokenizer = train_wordpiece(
            (block.replace(DOCUMENT_END, "\n") for block in blocks), data.vocab_size, data.lowercase
        )
        report(0.0, f"learned a vocabulary of {len(tokenizer)} entries ({data.vocab_size} asked)")
    if host == 0:
        fresh = directory / "tokenizer.tmp"
        shutil.rmtree(fresh, ignore_errors=True)
        tokenizer.save_pretrained(fresh)
        _write_json(fresh / "made_from.json", made_from)
        shutil.rmtree(home, ignore_errors=True)
        os.replace(fresh, home)
    return tokenizer


@dataclass(frozen=True)
class _ShardWriter:
    """Turns a source into a shard; crosses into worker processes."""

    directory: str
    backend: str
    hash: str
    separator: int
    dtype: str
    text_field: str

    def path(self, split: str, source: Source) -> Path:
        return Path(self.directory) / f"{split}-{hashlib.sha256(source.key.encode()).hexdigest()[:16]}"

    def finished(self, split: str, source: Source) -> Shard | None:
        """The record of the source's shard, if it is complete and would come out the same."""
        path = self.path(split, source)
        fields = _read_json(path / "record.json")
        try:
            shard = Shard(**fields)
        except TypeError:
            return None
        wanted = replace(
            shard, stamp=source.stamp, text_field=self.text_field, tokenizer=self.hash, format=FORMAT, name=path.name
        )
        return shard if shard == wanted and not _damage(path, shard) else None

    def __call__(self, split: str, source: Source, encoder: Encoder) -> Shard:
        path = self.path(split, source)
        fresh = path.with_name(f"{path.name}.tmp")
        stamp = source.stamp  # before reading: a file that changes meanwhile is done again
        with _disk(Path(self.directory)):
            try:
                shutil.rmtree(fresh, ignore_errors=True)
                fresh.mkdir(parents=True)
                counts = self._write_arrays(fresh, source, encoder)
                files = {file.name: file.stat().st_size for file in sorted(fresh.iterdir())}
                shard = Shard(path.name, source.key, stamp, self.text_field, self.hash, **counts, files=files)
                _write_json(fresh / "record.json", asdict(shard))
                shutil.rmtree(path, ignore_errors=True)
                os.replace(fresh, path)
            except BaseException:
                shutil.rmtree(fresh, ignore_errors=True)
                raise
        return shard

    def _write_arrays(self, path: Path, source: Source, encoder: Encoder) -> dict[str, int]:
        bytes_read = max_token = closed = 0  # `closed`: sentences up to the end of the last finished document
        # The end of the newest sentence waits: if the document ends there, the separator still belongs to it.
        waiting = np.zeros(0, np.int64)
        with (
            _NpyFile(path / "tokens.npy", self.dtype) as tokens,
            _NpyFile(path / "sentence_ends.npy", "int64") as sentence_ends,
            _NpyFile(path / "document_ends.npy", "int64") as document_ends,
        ):
            for block in read_blocks(source, self.text_field):
                bytes_read += len(block.encode())
                ids, ends, closes = encoder(split_sentences(block))
                full = np.diff(ends, prepend=0) > 0
                sentences = sentence_ends.length + len(waiting) + np.cumsum(full)
                marks = np.flatnonzero(closes)
                marks = marks[np.diff(sentences[marks], prepend=closed) > 0]  # documents without a token are none
                separators = ends[marks]
                waiting = np.concatenate([waiting - tokens.length, ends[full]])
                waiting += tokens.length + np.searchsorted(separators, waiting, "right")
                tokens.write(np.insert(ids, separators, self.separator))
                sentence_ends.write(waiting[:-1])
                waiting = waiting[-1:]
                document_ends.write(sentences[marks])
                closed = int(sentences[marks[-1]]) if len(marks) else closed
                max_token = max(max_token, int(ids.max(initial=0)))
            sentence_ends.write(waiting)
        counts = {"documents": document_ends.length, "sentences": sentence_ends.length, "tokens": tokens.length}
        return counts | {"bytes": bytes_read, "max_token": max(max_token, self.separator)}


class _NpyFile:
    """A one-dimensional .npy file that grows; its header gets the length when it is closed."""

    def __init__(self, path: Path, dtype: str):
        self._file = open(path, "wb")  # noqa: SIM115  (closed by __exit__)
        self._dtype = np.dtype(dtype)
        self.length = 0

    def __enter__(self) -> _NpyFile:
        self._header()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._file.seek(0)
            self._header()
        finally:
            self._file.close()

    def write(self, values: np.ndarray) -> None:
        self._file.write(values.astype(self._dtype).tobytes())
        self.length += len(values)

    def _header(self) -> None:
        # numpy leaves room in the header for the first axis to grow, so both headers are equally long.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _write_shards(write: _ShardWriter, tasks: list[tuple[str, Source]], workers: int | None, report: Progress) -> None:
    todo = [task for task in tasks if write.finished(*task) is None]
    total = max(1, sum(source.size for _, source in tasks))
    done = total - sum(source.size for _, source in todo)
    if len(tasks) > len(todo):
        report(done / total, f"{len(tasks) - len(todo)} of {len(tasks)} sources were done before")

    def finish(source: Source, shard: Shard) -> None:
        nonlocal done
        done += source.size
        report(done / total, f"{source.name}: {shard.documents:,} documents, {shard.tokens:,} tokens")

    if workers is None:
        worthwhile = math.ceil(sum(source.size for _, source in todo) / BYTES_PER_WORKER)
        workers = min(_cores(), len(todo), worthwhile)
    if workers <= 1:
        encoder = _encoder(write)
        for split, source in todo:
            finish(source, write(split, source, encoder))
        return
    # Spawned, because a fork after jax has started its threads can hang. The largest sources go first.
    todo = sorted(todo, key=lambda task: -task[1].size)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (write,))
    try:
        futures = {pool.submit(_work, split, source): source for split, source in todo}
        for future in as_completed(futures):
            finish(futures[future], future.result())
    except BrokenProcessPool as error:
        raise JaxptmError(
            "a process that prepares text died: out of memory, or the calling script lacks `if __name__ == "
            '"__main__":`. Finished shards are kept; run again, with workers=1 if it repeats.'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encoder(write: _ShardWriter) -> Encoder:
    return Encoder(Tokenizer.from_str(write.backend), DOCUMENT_END)


_worker: tuple[_ShardWriter, Encoder] | None = None
"""What a worker process keeps between sources: the encoder's table of words above all."""


def _start_worker(write: _ShardWriter) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = write, _encoder(write)


def _work(split: str, source: Source) -> Shard:
    assert _worker is not None
    write, encoder = _worker
    return write(split, source, encoder)


@contextmanager
def _disk(directory: Path) -> Iterator[None]:
    """Says plainly what the file system refuses."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise JaxptmError(
                f"{directory}: the disk is full. Finished shards are kept: free some space and run again, or set "
                "data.prepared to a directory on another disk."
            ) from error
        raise JaxptmError(f"{error.filename or directory}: {error.strerror or error}.") from error


def _write_json(path: Path, value: Any) -> None:
    fresh = path.with_name(f"{path.name}.tmp")
    fresh.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(fresh, path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _damage(path: Path, shard: Shard) -> str | None:
    """What is wrong with the shard's files, by their sizes."""
    for name, size in shard.files.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            return f"{path / name}: is missing"
        if found != size:
            return f"{path / name}: has {found} bytes, not {size}"
    return None


@dataclass(frozen=True)
class Corpus:
    """One split's shards (memory-mapped) seen as one stream of tokens, or a part of its documents.

    The stream's boundaries are held in memory: 8 bytes a sentence and a document.
    """

    shards: tuple[np.ndarray, ...]
    """Token ids (uint16 or uint32) of each shard."""
    shard_ends: tuple[int, ...]
    """Stream position where each shard ends."""
    sentence_ends: Int[np.ndarray, " sentences"]
    """Stream position after each sentence; a document's last sentence includes the separator."""
    document_ends: Int[np.ndarray, " documents"]
    """Number of the sentence after each document."""
    ranges: Int[np.ndarray, "R 2"]
    """First and last + 1 document of each contiguous range of this view; no range crosses a shard."""
    vocab_size: int
    separator: int

    @classmethod
    def open(cls, directory: str | Path, split: str = "train") -> Corpus:
        """Opens a prepared split.

        Raises:
            JaxptmError: nothing is prepared there, it has no such split, or a shard is damaged or holds ids beyond the
                vocabulary (which a model would turn into NaN).
        """
        manifest = Manifest.load(directory)
        if split not in manifest.splits:
            raise JaxptmError(f"{directory}: holds no {split!r} text, only: {', '.join(manifest.splits)}.")
        shards, sentence_ends, document_ends, ranges = [], [], [], []
        tokens = sentences = documents = 0
        for shard in manifest.splits[split]:
            if shard.documents == 0:
                continue
            arrays = _open_shard(Path(directory) / "shards" / shard.name, shard, manifest)
            shards.append(arrays[0])
            sentence_ends.append(arrays[1] + tokens)
            document_ends.append(arrays[2] + sentences)
            ranges.append((documents, documents + shard.documents))
            tokens, sentences, documents = tokens + shard.tokens, sentences + shard.sentences, ranges[-1][1]
        return cls(
            tuple(shards),
            tuple(np.cumsum([len(shard) for shard in shards]).tolist()),
            np.concatenate(sentence_ends),
            np.concatenate(document_ends),
            np.array(ranges, np.int64),
            manifest.vocab_size,
            manifest.separator,
        )

    @property
    def documents(self) -> Int[np.ndarray, " documents"]:
        """Numbers of this view's documents.

        Raises:
            JaxptmError: there are none.
        """
        if len(self.ranges) == 0:
            raise JaxptmError("there is no text in this part of the corpus (data.eval_fraction: 0 holds nothing out).")
        return np.concatenate([np.arange(first, last) for first, last in self.ranges])

    @property
    def token_count(self) -> int:
        """Tokens in this view, separators included."""
        first, last = (self.document_start(documents) for documents in self.ranges.T)
        return int(np.sum(self.sentence_start(last) - self.sentence_start(first)))

    def sentence_start(self, sentences: Indices) -> Indices:
        """Stream position where the sentences start."""
        return np.where(sentences > 0, self.sentence_ends[sentences - 1], 0)

    def document_start(self, documents: Indices) -> Indices:
        """Number of the documents' first sentence."""
        return np.where(documents > 0, self.document_ends[documents - 1], 0)

    def tokens(self, start: int, end: int) -> UInt[np.ndarray, " tokens"]:
        """Ids of the stream from `start` up to `end`, within one shard; a view of the file."""
        shard = bisect_right(self.shard_ends, start)
        offset = self.shard_ends[shard - 1] if shard else 0
        return self.shards[shard][start - offset : end - offset]

    def split(self, eval_fraction: float) -> tuple[Corpus, Corpus]:
        """Parts the documents in two views: train, and eval with the last `eval_fraction` of each shard.

        Shards too small for a document of their own are counted together. Where `eval_fraction` is not 0, at least two
        documents are held out, since a random next sentence needs another document to come from.

        Raises:
            JaxptmError: fewer than two documents are left for training.
        """
        if eval_fraction == 0:
            return self, replace(self, ranges=np.zeros((0, 2), np.int64))
        sizes = self.ranges[:, 1] - self.ranges[:, 0]
        held = np.diff(np.floor(np.cumsum(sizes) * eval_fraction + 1e-9).astype(np.int64), prepend=0)
        while held.sum() < min(2, sizes.sum()):
            held[np.argmax(sizes - held)] += 1
        held = np.minimum(held, sizes)
        if sizes.sum() - held.sum() < 2:
            raise JaxptmError(
                f"the corpus has {sizes.sum()} document(s), too few to hold {held.sum()} out: documents are parted by "
                "blank lines; give more text, or data.eval_files, or data.eval_fraction: 0."
            )
        border = self.ranges[:, 1] - held
        train = np.stack([self.ranges[:, 0], border], axis=1)
        heldout = np.stack([border, self.ranges[:, 1]], axis=1)
        return tuple(replace(self, ranges=part[part[:, 0] < part[:, 1]]) for part in (train, heldout))  # type: ignore[return-value]


def _open_shard(path: Path, shard: Shard, manifest: Manifest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    damage = _damage(path, shard)
    if damage is None:
        arrays = []
        for name in ("tokens", "sentence_ends", "document_ends"):
            try:
                # Plain arrays over the mapping: numpy's memmap class makes every small slice slow.
                arrays.append(np.asarray(np.load(path / f"{name}.npy", mmap_mode="r")))
            except ValueError:
                damage = f"{path / name}.npy: is no array file"
        if damage is None:
            tokens, sentence_ends, document_ends = arrays
            ordered = all(
                len(ends) == count and ends[0] > 0 and ends[-1] == last and np.all(ends[1:] > ends[:-1])
                for ends, count, last in (
                    (sentence_ends, shard.sentences, shard.tokens),
                    (document_ends, shard.documents, shard.sentences),
                )
            )
            if not ordered or len(tokens) != shard.tokens or shard.tokenizer != manifest.tokenizer:
                damage = f"{path}: its arrays do not fit together"
            elif shard.max_token >= manifest.vocab_size:
                damage = f"{path}: holds token {shard.max_token}, beyond the vocabulary of {manifest.vocab_size}"
    if damage is not None:
        raise JaxptmError(f"{damage}. Remove {path} and run `jaxptm prepare` again.")
    return tokens, sentence_ends, document_ends

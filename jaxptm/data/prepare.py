"""Text in, token shards out: the directory that `jaxptm.data.corpus` opens."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from jaxptm.config import TextData
from jaxptm.data.corpus import FORMAT, Manifest, Shard
from jaxptm.data.encoder import Encoder
from jaxptm.data.shards import (
    NpyFile,
    Progress,
    alone,
    check_share,
    content_digest,
    cores,
    damage_of,
    disk,
    file_sizes,
    fresh_shard,
    read_json,
    work_all,
    write_json,
)
from jaxptm.data.sources import DOCUMENT_END, Source, find_sources, read_blocks, split_dataset
from jaxptm.data.tokenizer import load_tokenizer, tokenizer_hash, train_bpe, train_wordpiece
from jaxptm.errors import JaxptmError

BYTES_PER_WORKER = 2**24
"""Source bytes that make another process worth its start."""

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
    as many as there are cores and work for them); a file is never split, so use several for speed.

    Returns the manifest, or None where other hosts' shards are still missing: the last host to finish writes it.

    Raises:
        JaxptmError: bad or missing input, a full disk, or a vocabulary that host 0 has yet to train. Finished shards
            stay.
    """
    directory = Path(directory)
    check_share(host, hosts, workers)
    report = progress or (lambda share, message: None)
    request = data.model_dump(
        include={"files", "eval_files", "text_field", "tokenizer", "tokenizer_model", "vocab_size", "lowercase"}
    )
    done = Manifest.load(directory) if (directory / "manifest.json").exists() else None
    try:
        sources = _sources(data)
    except JaxptmError:
        if done is not None and request.items() <= ({"tokenizer_model": "wordpiece"} | done.request).items():
            return done  # prepared elsewhere: the shards do without their sources
        raise
    request["tokenizer_stamp"] = _tokenizer_stamp(data.tokenizer)
    request["sources"] = {split: [[source.key, source.stamp] for source in sources[split]] for split in sources}
    if done is not None and done.request == request and not done.damage(directory):
        return done

    with disk(directory), alone(directory, host, report):
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
        write_json(directory / "manifest.json", asdict(manifest))
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
    names = ("tokenizer", "tokenizer_stamp", "tokenizer_model", "vocab_size", "lowercase")
    made_from = {name: request[name] for name in names}
    if data.tokenizer == "train":
        made_from |= {"text_field": data.text_field, "sources": request["sources"]["train"]}
    if read_json(home / "made_from.json") == made_from:
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
        texts = (block.replace(DOCUMENT_END, "\n") for block in blocks)
        tokenizer = (
            train_bpe(texts, data.vocab_size)
            if data.tokenizer_model == "bpe"
            else train_wordpiece(texts, data.vocab_size, data.lowercase)
        )
        report(0.0, f"learned a vocabulary of {len(tokenizer)} entries ({data.vocab_size} asked)")
    if host == 0:
        fresh = directory / "tokenizer.tmp"
        shutil.rmtree(fresh, ignore_errors=True)
        tokenizer.save_pretrained(fresh)
        write_json(fresh / "made_from.json", made_from)
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
        fields = read_json(path / "record.json")
        try:
            shard = Shard(**fields)
        except TypeError:
            return None
        wanted = replace(
            shard, stamp=source.stamp, text_field=self.text_field, tokenizer=self.hash, format=FORMAT, name=path.name
        )
        return shard if shard == wanted and not damage_of(path, shard.files) else None

    def start(self) -> Callable[[tuple[str, Source]], Shard]:
        """What a process does its sources with; the encoder gathers a table of words as it goes."""
        return partial(self._write, Encoder(Tokenizer.from_str(self.backend), DOCUMENT_END))

    def _write(self, encoder: Encoder, task: tuple[str, Source]) -> Shard:
        split, source = task
        path = self.path(split, source)
        stamp = source.stamp  # before reading: a file that changes meanwhile is done again
        with fresh_shard(path) as fresh:
            counts = self._write_arrays(fresh, source, encoder)
            sizes, digest = file_sizes(fresh), content_digest(fresh)
            shard = Shard(
                path.name, source.key, stamp, self.text_field, self.hash, **counts, files=sizes, digest=digest
            )
            write_json(fresh / "record.json", asdict(shard))
        return shard

    def _write_arrays(self, path: Path, source: Source, encoder: Encoder) -> dict[str, int]:
        bytes_read = max_token = closed = 0  # `closed`: sentences up to the end of the last finished document
        # The end of the newest sentence waits: if the document ends there, the separator still belongs to it.
        waiting = np.zeros(0, np.int64)
        with (
            NpyFile(path / "tokens.npy", self.dtype) as tokens,
            NpyFile(path / "sentence_ends.npy", "int64") as sentence_ends,
            NpyFile(path / "document_ends.npy", "int64") as document_ends,
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


def _write_shards(write: _ShardWriter, tasks: list[tuple[str, Source]], workers: int | None, report: Progress) -> None:
    todo = [task for task in tasks if write.finished(*task) is None]
    total = max(1, sum(source.size for _, source in tasks))
    done = total - sum(source.size for _, source in todo)
    if len(tasks) > len(todo):
        report(done / total, f"{len(tasks) - len(todo)} of {len(tasks)} sources were done before")

    def finish(task: tuple[str, Source], shard: Shard) -> None:
        nonlocal done
        source = task[1]
        done += source.size
        report(done / total, f"{source.name}: {shard.documents:,} documents, {shard.tokens:,} tokens")

    if workers is None:
        worthwhile = math.ceil(sum(source.size for _, source in todo) / BYTES_PER_WORKER)
        workers = min(cores(), len(todo), worthwhile)
    work_all(write.start, todo, [source.size for _, source in todo], finish, workers)

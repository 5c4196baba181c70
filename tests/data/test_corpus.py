from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from corpora import english, numbered_corpus, random_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from side_by_side import at_once

from jaxptm.config import TextData
from jaxptm.data import prepare as preparing
from jaxptm.data.corpus import Corpus, Manifest
from jaxptm.data.prepare import prepare, split_sentences
from jaxptm.data.shards import NpyFile
from jaxptm.data.tokenizer import load_tokenizer, tokenizer_hash, train_wordpiece
from jaxptm.errors import JaxptmError

DOCUMENTS = english(90, seed=7)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_wordpiece((line for document in DOCUMENTS for line in document), 250).save_pretrained(directory)
    return directory


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Three files of thirty documents."""
    directory = tmp_path / "text"
    directory.mkdir()
    for number in range(3):
        write_text(directory / f"{number}.txt", DOCUMENTS[number * 30 : number * 30 + 30])
    return directory


def write_text(path: Path, documents: list[list[str]]) -> Path:
    path.write_text("\n\n".join("\n".join(document) for document in documents), encoding="utf-8")
    return path


def shard_bytes(directory: Path) -> dict[str, bytes]:
    paths = sorted(path for path in (directory / "shards").rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def stream(corpus: Corpus) -> list[int]:
    return np.concatenate(corpus.shards).tolist()


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("He said “Go.” Then (he left.) She stayed…  “Why?” 3 weeks.", None),
        ("Mr. Smith met J. S. Bach and Dr. Who vs. Prof. X.", ["Mr. Smith met J. S. Bach and Dr. Who vs. Prof. X."]),
        ("It cost 3.50 in the U.S. dollar, e.g. here. yes", ["It cost 3.50 in the U.S. dollar, e.g. here. yes"]),
        ("Élan. Été! Ça va? Ñandú.", ["Élan.", "Été!", "Ça va?", "Ñandú."]),
        ("今日は。明日は！「何？」はい", ["今日は。", "明日は！", "「何？」", "はい"]),
        ("line one\nline two. Next\n", ["line one", "line two.", "Next", ""]),
    ],
)  # fmt: skip
def test_sentences(text: str, sentences: list[str] | None) -> None:
    if sentences is None:
        sentences = ["He said “Go.”", "Then (he left.)", "She stayed…", "“Why?”", "3 weeks."]
    assert split_sentences(text).split("\n") == sentences


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from(list('aB.!?…"”) \n\t\u00a01。「」é')), max_size=60))
def test_splitting_sentences_changes_white_space_only(text: str) -> None:
    split = split_sentences(text)
    assert "".join(split.split()) == "".join(text.split())
    assert lines(split_sentences(split)) == lines(split), "a sentence is not split again"


def lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def test_shards_hold_the_tokens_sentences_and_documents(files: Path, tokenizer: Path, tmp_path: Path) -> None:
    manifest = prepare(TextData(files=str(files), tokenizer=str(tokenizer)), tmp_path / "prepared")
    assert manifest is not None
    reference = load_tokenizer(tokenizer)
    tokens, sentence_ends, document_ends = [], [], []
    for document in DOCUMENTS:
        for line in document:
            for sentence in split_sentences(line).split("\n"):
                tokens += reference(sentence, add_special_tokens=False)["input_ids"]
                sentence_ends.append(len(tokens))
        tokens.append(reference.sep_token_id)
        sentence_ends[-1] += 1
        document_ends.append(len(sentence_ends))
    corpus = Corpus.open(tmp_path / "prepared")
    assert stream(corpus) == tokens
    assert corpus.shards[0].dtype == np.uint16
    assert corpus.sentence_ends.tolist() == sentence_ends
    assert corpus.document_ends.tolist() == document_ends
    assert corpus.shard_ends[-1] == corpus.token_count == len(tokens)
    assert corpus.ranges.tolist() == [[0, 30], [30, 60], [60, 90]]
    starts = [0, *corpus.shard_ends[:-1]]
    for start, end in zip(starts, corpus.shard_ends, strict=True):
        assert corpus.tokens(start, end).tolist() == tokens[start:end]
        assert corpus.tokens(start + 3, start + 9).tolist() == tokens[start + 3 : start + 9]
    assert manifest.vocab_size == corpus.vocab_size == len(reference)
    assert manifest.tokenizer == tokenizer_hash(reference)
    assert [manifest.total(count) for count in ("documents", "sentences", "tokens")] == [
        90,
        len(sentence_ends),
        len(tokens),
    ]
    assert tokenizer_hash(load_tokenizer(tmp_path / "prepared" / "tokenizer")) == manifest.tokenizer


@pytest.mark.parametrize("block", [1, 50, 2**20])
def test_neither_block_size_nor_format_nor_workers_change_the_tokens(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("jaxptm.data.sources.BLOCK", block)
    texts = ["\n".join(document) for document in DOCUMENTS]
    write_text(tmp_path / "a.txt", DOCUMENTS)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    corpora = []
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        prepare(TextData(files=str(tmp_path / name), tokenizer=str(tokenizer)), tmp_path / f"of-{name}")
        corpora.append(Corpus.open(tmp_path / f"of-{name}"))
    assert len(corpora[0].documents) == len(DOCUMENTS)
    for other in corpora[1:]:
        assert stream(other) == stream(corpora[0])
        assert other.sentence_ends.tolist() == corpora[0].sentence_ends.tolist()
        assert other.document_ends.tolist() == corpora[0].document_ends.tolist()


def test_worker_processes_write_the_same_shards(files: Path, tokenizer: Path, tmp_path: Path) -> None:
    data = TextData(files=str(files), tokenizer=str(tokenizer))
    prepare(data, tmp_path / "one", workers=1)
    told: list[tuple[float, str]] = []
    prepare(data, tmp_path / "two", workers=2, progress=lambda share, message: told.append((share, message)))
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()
    assert len(told) == 3
    assert all(before[0] < after[0] for before, after in pairwise(told))
    assert told[-1][0] == 1
    (files / "1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(JaxptmError, match=r"1\.txt: line 1: byte 3 .* is not UTF-8"):
        prepare(data, tmp_path / "two", workers=2)


def test_a_complete_directory_is_left_alone(
    files: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TextData(files=str(files), tokenizer=str(tokenizer))
    first = prepare(data, tmp_path / "prepared")
    monkeypatch.setattr(preparing, "load_tokenizer", lambda *args: pytest.fail("nothing is there to be done"))
    assert prepare(data, tmp_path / "prepared") == first == Manifest.load(tmp_path / "prepared")
    shutil.rmtree(files)
    assert prepare(data, tmp_path / "prepared") == first, "shards serve without their sources"
    with pytest.raises(JaxptmError, match=r"matches no file"):
        prepare(data.model_copy(update={"text_field": "body"}), tmp_path / "prepared")


def test_an_interrupted_preparation_goes_on_where_it_was(
    files: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TextData(files=str(files), tokenizer=str(tokenizer))
    directory = tmp_path / "prepared"
    manifest = prepare(data, directory)
    assert manifest is not None
    before = shard_bytes(directory)
    names = [shard.name for shard in manifest.splits["train"]]
    # A kill before the record was written leaves a shard under its temporary name and no manifest.
    (directory / "manifest.json").unlink()
    (directory / "shards" / names[1]).rename(directory / "shards" / f"{names[1]}.tmp")
    (directory / "shards" / f"{names[1]}.tmp" / "record.json").unlink()
    (directory / "shards" / names[2] / "tokens.npy").write_bytes(b"cut")
    done: list[str] = []
    write = preparing._ShardWriter._write_arrays
    monkeypatch.setattr(
        preparing._ShardWriter,
        "_write_arrays",
        lambda self, path, source, encoder: done.append(Path(source.name).name) or write(self, path, source, encoder),
    )
    assert prepare(data, directory) == manifest
    assert done == ["1.txt", "2.txt"]
    assert shard_bytes(directory) == before
    # The same for one file more, a changed file and another tokenizer.
    write_text(files / "3.txt", DOCUMENTS[:5])
    prepare(data, directory)
    assert done[2:] == ["3.txt"]
    write_text(files / "0.txt", DOCUMENTS[:6])
    changed = prepare(data, directory)
    assert done[3:] == ["0.txt"]
    assert changed is not None
    assert changed.total("documents") == 6 + 30 + 30 + 5
    fewer = prepare(data.model_copy(update={"files": str(files / "[12].txt")}), directory)
    assert fewer is not None
    assert (done[4:], fewer.total("documents")) == ([], 60)
    retrained = prepare(
        data.model_copy(update={"files": str(files / "[12].txt"), "tokenizer": "train", "vocab_size": 150}), directory
    )
    assert retrained is not None
    assert done[4:] == ["1.txt", "2.txt"]
    assert retrained.vocab_size == 150


def test_a_killed_process_loses_nothing(tokenizer: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        write_text(text / f"{number:02}.txt", DOCUMENTS * 4)
    data = TextData(files=str(text), tokenizer=str(tokenizer))
    script = "import sys; from jaxptm.config import TextData; from jaxptm.data.prepare import prepare; "
    script += f"prepare(TextData(files={str(text)!r}, tokenizer={str(tokenizer)!r}), sys.argv[1], workers=1)"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "killed")])
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("shards/*/record.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    prepare(data, tmp_path / "killed", workers=1)
    prepare(data, tmp_path / "whole", workers=1)
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "whole")


def test_two_processes_do_not_write_the_same_shards(files: Path, tokenizer: Path, tmp_path: Path) -> None:
    data = TextData(files=str(files), tokenizer=str(tokenizer))
    ours, theirs = at_once(lambda progress: prepare(data, tmp_path / "shared", workers=1, progress=progress))
    assert ours == theirs == prepare(data, tmp_path / "alone", workers=1)
    assert shard_bytes(tmp_path / "shared") == shard_bytes(tmp_path / "alone")


def test_hosts_share_the_work(files: Path, tokenizer: Path, tmp_path: Path) -> None:
    data = TextData(files=str(files), tokenizer=str(tokenizer))
    whole = prepare(data, tmp_path / "whole")
    assert prepare(data, tmp_path / "parts", host=1, hosts=2) is None
    assert len(shard_bytes(tmp_path / "parts")) == 4
    with pytest.raises(JaxptmError, match=r"holds no prepared corpus.*run `jaxptm prepare`"):
        Corpus.open(tmp_path / "parts")
    assert prepare(data, tmp_path / "parts", host=0, hosts=2) == whole
    assert shard_bytes(tmp_path / "parts") == shard_bytes(tmp_path / "whole")


def test_other_hosts_wait_for_the_vocabulary_of_host_0(files: Path, tmp_path: Path) -> None:
    data = TextData(files=str(files), tokenizer="train", vocab_size=200)
    with pytest.raises(JaxptmError, match=r"holds no vocabulary trained on these files yet.*let host 0 prepare first"):
        prepare(data, tmp_path / "parts", host=1, hosts=2)
    assert prepare(data, tmp_path / "parts", host=0, hosts=2) is None
    manifest = prepare(data, tmp_path / "parts", host=1, hosts=2)
    assert manifest == prepare(data, tmp_path / "whole")


def test_held_out_files_are_a_split_of_their_own_and_teach_the_vocabulary_nothing(files: Path, tmp_path: Path) -> None:
    held_out = write_text(tmp_path / "held-out.txt", [["Zyzzyva zyzzyva zyzzyva."]] * 9)
    data = TextData(files=str(files), eval_files=str(held_out), tokenizer="train", vocab_size=200)
    manifest = prepare(data, tmp_path / "prepared")
    assert manifest is not None
    assert [manifest.total("documents", split) for split in ("train", "eval")] == [90, 9]
    assert len(Corpus.open(tmp_path / "prepared", "eval").documents) == 9
    assert not any("z" in token for token in load_tokenizer(tmp_path / "prepared" / "tokenizer").get_vocab())
    with pytest.raises(JaxptmError, match=r"holds no 'test' text, only: train, eval"):
        Corpus.open(tmp_path / "prepared", "test")
    with pytest.raises(JaxptmError, match=r"0\.txt: is both in data.files and in data.eval_files"):
        prepare(data.model_copy(update={"eval_files": f"{files}/0.txt"}), tmp_path / "prepared")


def test_a_byte_level_vocabulary_is_trained_on_request(files: Path, tmp_path: Path) -> None:
    data = TextData(files=str(files), tokenizer="train", tokenizer_model="bpe", vocab_size=400)
    manifest = prepare(data, tmp_path / "prepared")
    assert manifest is not None
    tokenizer = load_tokenizer(tmp_path / "prepared" / "tokenizer")
    assert (len(tokenizer), manifest.vocab_size, manifest.separator) == (400, 400, tokenizer.sep_token_id)
    want: list[int] = []
    for document in DOCUMENTS:
        want += [*tokenizer(" ".join(document), add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
    corpus = Corpus.open(tmp_path / "prepared")
    assert stream(corpus) == want, "as if the lines of a document were one"
    assert len(corpus.document_ends) == len(DOCUMENTS)
    assert prepare(data, tmp_path / "prepared", workers=2) == manifest == prepare(data, tmp_path / "again", workers=2)
    wordpiece = prepare(data.model_copy(update={"tokenizer_model": "wordpiece"}), tmp_path / "prepared")
    assert wordpiece is not None
    assert load_tokenizer(tmp_path / "prepared" / "tokenizer").mask_token == "[MASK]"
    assert wordpiece.tokenizer != manifest.tokenizer


def test_the_end_of_text_parts_the_documents_of_gpt2(files: Path, shared_data: Path, tmp_path: Path) -> None:
    manifest = prepare(TextData(files=str(files), tokenizer=str(shared_data / "tokenizers" / "gpt2")), tmp_path / "out")
    assert manifest is not None
    assert manifest.separator == 50256
    corpus = Corpus.open(tmp_path / "out")
    assert [position for position, token in enumerate(stream(corpus)) if token == 50256] == [
        corpus.sentence_ends[last - 1] - 1 for last in corpus.document_ends
    ]


def test_a_directory_from_before_there_was_a_choice_of_model_keeps_its_shards(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TextData(files=str(files), tokenizer="train", vocab_size=200)
    directory = tmp_path / "prepared"
    manifest = prepare(data, directory)
    for file, keys in (("manifest.json", ["request"]), ("tokenizer/made_from.json", [])):
        content = fields = json.loads((directory / file).read_text())
        for key in keys:
            fields = fields[key]
        del fields["tokenizer_model"]
        (directory / file).write_text(json.dumps(content))
    monkeypatch.setattr(preparing._ShardWriter, "_write_arrays", lambda *args: pytest.fail("the shards are the same"))
    assert prepare(data, directory) == manifest == Manifest.load(directory)


def test_documents_without_words_are_none(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n\x01\n\nthe river\n\n\u200b\x02\n\x03\n\nof\n\x01\n stone \n\n\n")
    (tmp_path / "b.txt").write_text("\n \n")
    prepare(TextData(files=[str(tmp_path)], tokenizer=str(tokenizer)), tmp_path / "prepared")
    corpus = Corpus.open(tmp_path / "prepared")
    words = load_tokenizer(tokenizer).convert_tokens_to_ids(["the", "river", "[SEP]", "of", "stone", "[SEP]"])
    assert stream(corpus) == words
    assert corpus.sentence_ends.tolist() == [3, 4, 6]
    assert corpus.document_ends.tolist() == [1, 3]


def test_an_empty_corpus_is_an_error(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(JaxptmError, match=r"the train corpus is empty: no document in .*a\.txt"):
        prepare(TextData(files=f"{tmp_path}/a.txt", tokenizer=str(tokenizer)), tmp_path / "prepared")
    with pytest.raises(JaxptmError, match=r"data.files is empty"):
        prepare(TextData(files=[], tokenizer=str(tokenizer)), tmp_path / "prepared")
    with pytest.raises(JaxptmError, match=r"the text holds no words"):
        prepare(TextData(files=f"{tmp_path}/a.txt", tokenizer="train", vocab_size=100), tmp_path / "prepared")


def test_a_full_disk_keeps_finished_shards(
    files: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TextData(files=str(files), tokenizer=str(tokenizer))
    directory = tmp_path / "prepared"
    calls = []

    def write(self: NpyFile, values: np.ndarray) -> None:
        calls.append(len(values))
        if len(calls) == 10:  # in the second shard
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, values)

    whole = NpyFile.write
    with monkeypatch.context() as patch:
        patch.setattr(NpyFile, "write", write)
        with pytest.raises(JaxptmError, match=r"the disk is full. Finished shards are kept: free some space"):
            prepare(data, directory)
    assert len(list((directory / "shards").iterdir())) == 1
    kept = next((directory / "shards").glob("*/tokens.npy"))
    modified = kept.stat().st_mtime_ns
    prepare(data, directory)
    assert kept.stat().st_mtime_ns == modified
    prepare(data, tmp_path / "whole")
    assert shard_bytes(directory) == shard_bytes(tmp_path / "whole")


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(70_000)), "last"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    (tmp_path / "a.txt").write_text("last w0 w69999")
    prepare(TextData(files=f"{tmp_path}/a.txt", tokenizer=f"{tmp_path}/vocab.txt"), tmp_path / "prepared")
    corpus = Corpus.open(tmp_path / "prepared")
    assert corpus.shards[0].dtype == np.uint32
    assert stream(corpus) == [70_005, 5, 70_004, 3]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard: (shard / "tokens.npy").unlink(), "tokens.npy: is missing"),
        (lambda shard: cut(shard / "tokens.npy"), r"tokens.npy: has \d+ bytes, not \d+"),
        (lambda shard: garble(shard / "sentence_ends.npy"), "sentence_ends.npy: is no array file"),
        (lambda shard: np.save(shard / "document_ends.npy", np.arange(30)), "its arrays do not fit together"),
        (lambda shard: claim(shard.parent.parent, max_token=10**6), "holds token 1000000, beyond the vocabulary of"),
    ],
)
def test_damaged_shards_are_named(files: Path, tokenizer: Path, tmp_path: Path, damage, message: str) -> None:
    data = TextData(files=str(files), tokenizer=str(tokenizer))
    manifest = prepare(data, tmp_path / "prepared")
    assert manifest is not None
    damage(tmp_path / "prepared" / "shards" / manifest.splits["train"][0].name)
    with pytest.raises(JaxptmError, match=rf"{message}.* Remove .*{manifest.splits['train'][0].name} and run"):
        Corpus.open(tmp_path / "prepared")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def garble(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def claim(directory: Path, max_token: int) -> None:
    fields = json.loads((directory / "manifest.json").read_text())
    fields["splits"]["train"][0]["max_token"] = max_token
    (directory / "manifest.json").write_text(json.dumps(fields))


def test_a_shard_cut_short_is_prepared_again(files: Path, tokenizer: Path, tmp_path: Path) -> None:
    data = TextData(files=str(files), tokenizer=str(tokenizer))
    manifest = prepare(data, tmp_path / "prepared")
    assert manifest is not None
    before = shard_bytes(tmp_path / "prepared")
    cut(tmp_path / "prepared" / "shards" / manifest.splits["train"][2].name / "tokens.npy")
    assert prepare(data, tmp_path / "prepared") == manifest
    assert shard_bytes(tmp_path / "prepared") == before


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "splits": 3}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(JaxptmError, match=r"manifest.json: is damaged: remove it"):
        Manifest.load(tmp_path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(JaxptmError, match=r"has format 99, this jaxptm reads 1: prepare it again"):
        Manifest.load(tmp_path)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.floats(0.001, 0.6))
def test_splits_part_the_documents_of_every_shard(sizes: list[int], fraction: float) -> None:
    corpus = numbered_corpus([[[2, 3]] * size for size in sizes])
    total = sum(sizes)
    wanted = max(2, int(total * fraction + 1e-9))
    if total - wanted < 2:
        with pytest.raises(JaxptmError, match=r"too few to hold .* out.*eval_fraction: 0"):
            corpus.split(fraction)
        return
    train, held_out = corpus.split(fraction)
    assert sorted([*train.documents, *held_out.documents]) == list(range(total))
    assert len(held_out.documents) == wanted
    assert train.token_count + held_out.token_count == corpus.token_count == 6 * total
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    for shard in range(len(sizes)):
        documents = [view.documents[shard_of[view.documents] == shard] for view in (train, held_out)]
        assert len(documents[1]) <= np.ceil(sizes[shard] * fraction) + 2, "every shard gives about its share"
        if len(documents[0]) and len(documents[1]):
            assert documents[0].max() < documents[1].min(), "a shard's last documents are held out"
    for view in (train, held_out):
        assert all(len(set(shard_of[first:last])) == 1 for first, last in view.ranges)


def test_nothing_is_held_out_on_request() -> None:
    corpus = random_corpus()
    train, held_out = corpus.split(0)
    assert train is corpus
    assert len(held_out.ranges) == 0


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ({"host": 2, "hosts": 2}, "--host 2 --hosts 2: hosts are counted from 0"),
        ({"host": -1, "hosts": 2}, "--host -1 --hosts 2: hosts are counted from 0"),
        ({"host": 0, "hosts": 0}, "--host 0 --hosts 0: hosts are counted from 0"),
        ({"workers": 0}, "--workers 0: at least 1"),
    ],
)
def test_shares_that_are_none(share: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(JaxptmError, match=message):
        prepare(TextData(files="text.txt", tokenizer="vocab.txt"), tmp_path / "parts", **share)

"""Runs in a bucket: what is copied there and back, and what stands there, on a stand-in that keeps it in a folder."""

from __future__ import annotations

import importlib.util
import json
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from orbax.checkpoint._src.path import gcs_utils
from test_checkpoint import assert_same, blank, make_state, steps_on_disk
from test_training import config_of, die_at, weights, write_corpus

import jaxptm.recipe
from jaxptm import cli, storage
from jaxptm.checkpoint import Checkpoints
from jaxptm.config import TrainConfig, load_config
from jaxptm.directories import prepared_directory
from jaxptm.evaluation import evaluate
from jaxptm.metrics import read_metrics
from jaxptm.storage import Mirror, checkpoint_directory, is_remote, local_directory, read_text
from jaxptm.training import train
from jaxptm.types import JaxptmError

URL = "gs://bucket/runs/x"


class Bucket(LocalFileSystem):
    """Stands in for gcsfs: gs://bucket/path is a file under `root`. Its network may break."""

    protocol = ("gs", "gcs")
    root = ""
    broken = False

    def __init__(self, **_: Any) -> None:
        super().__init__(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        if cls.broken:
            raise ConnectionError("the network is down")
        path = str(path)
        return f"{cls.root}/{path.partition('://')[2]}" if "://" in path else path

    def glob(self, path: Any, **_: Any) -> list[str]:
        return [found.removeprefix(f"{self.root}/") for found in super().glob(path)]


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that gs:// stands for to fsspec, etils and tensorstore; the working directory is an empty one."""
    root = tmp_path / "cloud"
    monkeypatch.setattr(Bucket, "root", str(root))
    for name in Bucket.protocol:
        monkeypatch.setitem(_registry, name, Bucket)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)

    def kvstore(url: str) -> dict[str, str]:
        path = Bucket._strip_protocol(url)
        return {"driver": "file", "path": path if path.endswith("/_sharding") else f"{path}/"}

    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", kvstore)
    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.chdir(tmp_path)
    backend.fsspec_backend._get_filesystem.cache_clear()
    (root / "bucket").mkdir(parents=True)
    yield root
    backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryFileSystem:
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.chdir(tmp_path)
    return fsspec.filesystem("memory")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_urls_are_told_from_paths() -> None:
    assert is_remote(URL) and is_remote("s3://bucket/x")
    assert not any(map(is_remote, ("runs/x", "/runs/x", "C:\\runs", "gs:/x", "")))
    assert local_directory("runs/x") == Path("runs/x")
    assert checkpoint_directory("runs/x") == Path("runs/x/checkpoints")


def test_every_url_has_a_local_directory_of_its_own() -> None:
    urls = ["gs://a/b-c", "gs://a-b/c", "gs://a/b/c", "s3://a/b/c", "gs://a/b/C"]
    places = [local_directory(url) for url in urls]
    assert {place.parent for place in places} == {Path("runs/remote")}
    assert len(set(places)) == len(urls)
    assert places[0].name.startswith("a-b-c-")
    assert local_directory("gs://a/b/c/") == local_directory("gs://a/b/c")


def test_only_what_has_changed_is_pushed(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    write(local_directory("memory://runs/x") / "results.json", "of an earlier run")
    mirror = Mirror("memory://runs/x/")
    sent: list[str] = []
    plain = MemoryFileSystem.put_file
    monkeypatch.setattr(
        MemoryFileSystem, "put_file", lambda self, here, there: (sent.append(there), plain(self, here, there))
    )
    write(mirror.local / "metrics.jsonl", "one\n")
    write(mirror.local / "tensorboard/events", "1")
    mirror.push()
    assert sent == ["/runs/x/metrics.jsonl", "/runs/x/tensorboard/events"]
    mirror.push()
    with (mirror.local / "metrics.jsonl").open("a") as file:
        file.write("two\n")
    mirror.push()
    assert sent[2:] == ["/runs/x/metrics.jsonl"]
    assert memory.cat_file("/runs/x/metrics.jsonl") == b"one\ntwo\n"
    monkeypatch.setattr(storage, "is_main", lambda: False)
    write(mirror.local / "metrics.jsonl", "of another process")
    mirror.push()
    assert len(sent) == 3


def test_files_and_directories_are_pulled(memory: MemoryFileSystem) -> None:
    memory.pipe({"/runs/x/config.yaml": b"a: 1", "/runs/x/model/a": b"1", "/runs/x/model/b/c": b"2"})
    memory.pipe({"/runs/x/model-of-mine": b"", "/runs/x/config.yaml.old": b""})
    mirror = Mirror("memory://runs/x")
    assert mirror.pull("config.yaml").read_text() == "a: 1"
    model = mirror.pull("model")
    files = {path.relative_to(model).as_posix(): path.read_text() for path in model.rglob("*") if path.is_file()}
    assert files == {"a": "1", "b/c": "2"}
    memory.pipe_file("/runs/x/config.yaml", b"a: 2")
    assert mirror.pull("config.yaml").read_text() == "a: 2"
    assert not mirror.pull("metrics.jsonl", missing_ok=True).exists()
    with pytest.raises(JaxptmError, match=r"memory://runs/x/results\.json: there is no such file"):
        mirror.pull("results.json")
    memory.rm("/runs", recursive=True)
    mirror.push()  # what was pulled need not go back
    assert not memory.exists("/runs/x")


def test_files_are_read_where_they_are(memory: MemoryFileSystem, tmp_path: Path) -> None:
    memory.pipe_file("/runs/x/config.yaml", b"model: bert-tiny\n")
    assert read_text("memory://runs/x", "config.yaml") == "model: bert-tiny\n"
    assert read_text("memory://runs/x", "results.json") is None
    assert not local_directory("memory://runs/x").exists()  # a run of this machine may be writing there
    write(tmp_path / "y/config.yaml", "model: bert-mini\n")
    assert read_text(str(tmp_path / "y"), "config.yaml") == "model: bert-mini\n"
    assert read_text(str(tmp_path / "y"), "results.json") is None


def test_a_local_run_is_its_own_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_file_system", None)
    mirror = Mirror(str(tmp_path / "run"))
    write(mirror.local / "metrics.jsonl", "")
    mirror.push()
    mirror.try_push()
    assert mirror.local == tmp_path / "run"
    assert mirror.pull("config.yaml") == tmp_path / "run/config.yaml"


def test_a_push_that_fails_is_made_up_for(
    cloud: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = Mirror(URL)
    write(mirror.local / "metrics.jsonl", "one\n")
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "broken", True)
        with caplog.at_level(logging.WARNING):
            mirror.try_push()
        [record] = caplog.records
        assert record.getMessage().startswith(f"{URL}: cannot be used, check that the bucket exists, the network")
        assert "the network is down. The run goes on" in record.getMessage()
        with pytest.raises(JaxptmError, match="the network is down"):
            mirror.push()
    mirror.push()
    assert (cloud / "bucket/runs/x/metrics.jsonl").read_text() == "one\n"


@pytest.mark.parametrize("url", ["s3://bucket/x", "memory://x", "https://example.com/x", "gcs://bucket/x"])
def test_what_orbax_cannot_write_to_is_refused(home: Path, url: str) -> None:
    with pytest.raises(JaxptmError, match=f"out: {url} can hold no checkpoints.*name a gs:// URL, or a directory"):
        train(config(home, "refused", url))


def test_a_missing_driver_is_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JaxptmError, match=rf"^{URL}: needs a driver that is not installed: .*gcsfs"):
        train(config(home, "driverless", URL))
    with pytest.raises(JaxptmError, match=rf"^{URL}/checkpoints: needs a driver that is not installed: .*gcsfs"):
        Checkpoints(checkpoint_directory(URL), keep=1)


def test_token_shards_stay_on_disks(home: Path) -> None:
    assert prepared_directory(config(home, "shards", URL)).parent == Path("runs/remote/prepared")
    remote = config_of(home, "shards", data__prepared="gs://bucket/prepared")
    with pytest.raises(JaxptmError, match=r"data\.prepared: gs://bucket/prepared has to be a local directory"):
        prepared_directory(remote)


def test_checkpoints_stand_in_a_bucket(cloud: Path) -> None:
    for step, loss in {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}.items():
        with Checkpoints(checkpoint_directory(URL), keep=2) as checkpoints:
            checkpoints.save(make_state(step, seed=step), {"loss": loss}, {"corpus": "abc"})
    directory = cloud / "bucket/runs/x/checkpoints"
    assert steps_on_disk(directory) == [2, 3, 4]
    for step in (2, 3, 4):
        assert (directory / f"{step}/commit_success.txt").exists()
        assert not (directory / f"{step}/checksums.json").exists()
    with Checkpoints(checkpoint_directory(URL), keep=2) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (4, 2)
        found = checkpoints.restore(blank(make_state(0)))
        assert found is not None
        assert_same(found[0], make_state(4, seed=4))
        assert found[1] == {"corpus": "abc"}


def test_a_save_into_a_bucket_that_was_killed_is_passed_over_and_cleared(
    cloud: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = cloud / "bucket/runs/x/checkpoints"
    with Checkpoints(checkpoint_directory(URL), keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(make_state(step, seed=step), None, {})
    for step in (2, 3):
        (directory / f"{step}/commit_success.txt").unlink()
    with Checkpoints(checkpoint_directory(URL), keep=3) as checkpoints:
        assert checkpoints.latest_step == 1
        with caplog.at_level(logging.WARNING):
            found = checkpoints.restore(blank(make_state(0)))
        assert found is not None
        assert_same(found[0], make_state(1, seed=1))
        assert [record.getMessage() for record in caplog.records] == [
            f"{URL}/checkpoints/{step} was never finished and is passed over." for step in (2, 3)
        ]
        assert steps_on_disk(directory) == [1, 2, 3]
        checkpoints.save(make_state(2, seed=9), None, {})
        checkpoints.wait()
        assert steps_on_disk(directory) == [1, 2]
        found = checkpoints.restore(blank(make_state(0)))
        assert found is not None
        assert_same(found[0], make_state(2, seed=9))


def test_a_save_that_the_network_fails_leaves_the_earlier_ones(cloud: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LocalFileSystem._open

    def failing(self: Bucket, path: str, mode: str = "rb", **options: Any) -> Any:
        if path.endswith("/2/commit_success.txt"):
            raise ConnectionError("the network is down")
        return plain(self, path, mode, **options)

    directory = cloud / "bucket/runs/x/checkpoints"
    with Checkpoints(checkpoint_directory(URL), keep=3) as checkpoints:
        checkpoints.save(make_state(1, seed=1), {"loss": 1.0}, {})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "_open", failing)
            checkpoints.save(make_state(2), {"loss": 0.5}, {})
            message = rf"^{URL}/checkpoints: the checkpoint of step 2 could not be saved: the network is down\. Earlier"
            with pytest.raises(JaxptmError, match=message):
                checkpoints.wait()
        assert steps_on_disk(directory) == [1]
        assert (checkpoints.latest_step, checkpoints.best_step) == (1, 1)
        checkpoints.save(make_state(2), None, {})
        checkpoints.wait()
        assert (checkpoints.latest_step, checkpoints.best_step) == (2, 1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_corpus(home / "corpus.txt")
    return home


def config(home: Path, name: str, out: str, **changes: Any) -> TrainConfig:
    short = {"steps": 12, "batch_size": 8, "log_every": 3, "checkpoint_every": 3}
    local = config_of(home, name, train=short, model__num_hidden_layers=1, data__eval_fraction=0.0, **changes)
    return local.model_copy(update={"out": out})


def evaluated_model(url: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory whose model `evaluate` would measure."""
    opened: list[Path] = []

    def open_model(path: Path, *_: Any, **__: Any) -> None:
        opened.append(path)
        raise InterruptedError

    monkeypatch.setattr(jaxptm.recipe, "from_pretrained", open_model)
    with pytest.raises(InterruptedError):
        evaluate(url, config)
    return opened[0]


def test_a_run_in_a_bucket_goes_on_on_another_machine(
    home: Path, cloud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone, remote = config(home, "alone", str(home / "alone")), config(home, "remote", URL)
    train(alone)
    there, checkpoints = cloud / "bucket/runs/x", cloud / "bucket/runs/x/checkpoints"

    plain, failures = Mirror.push, iter([False, True, True])
    with monkeypatch.context() as patch:
        die_at(patch, 7, signal.SIGTERM)

        # The first push is the claim's; the next two fail, at the checkpoints of steps 3 and 6.
        def flaky(mirror: Mirror) -> None:
            if next(failures, False):
                raise JaxptmError("the network is down.")
            plain(mirror)

        patch.setattr(Mirror, "push", flaky)
        with caplog.at_level(logging.WARNING):
            assert train(remote) == {"finished": False, "step": 7}
    assert caplog.text.count("the network is down. The run goes on") == 2
    assert load_config(there / "config.yaml") == remote
    assert [line["step"] for line in read_metrics(there / "metrics.jsonl")] == [3, 6, 7]
    assert steps_on_disk(checkpoints) == [6, 7]
    assert sorted(path.name for path in (tmp_path / "runs/remote").iterdir()) == [local_directory(URL).name, "prepared"]

    other = tmp_path / "other machine"
    other.mkdir()
    monkeypatch.chdir(other)
    with pytest.raises(JaxptmError, match=rf"(?s)^{URL} belongs to a run with another config.*train.seed"):
        train(config(home, "remote", URL, train__seed=3))
    results = train(remote)
    assert results["finished"]
    assert json.loads((there / "results.json").read_text()) == results
    assert [line["step"] for line in read_metrics(there / "metrics.jsonl")] == [3, 6, 7, 9, 12]
    assert {path.name for path in there.iterdir()} == {
        "checkpoints", "config.yaml", "curves.png", "metrics.jsonl", "model", "results.json", "tensorboard", "tokenizer"
    }  # fmt: skip
    assert len(list((there / "tensorboard").iterdir())) == 2
    for name, tensor in weights(alone.out).items():
        np.testing.assert_array_equal(tensor, weights(there)[name], err_msg=name)

    # By its URL the run is a model as well, wherever one stands.
    cli.convert(URL, Path("converted"))
    assert Path("converted/model.safetensors").read_bytes() == (there / "model/model.safetensors").read_bytes()
    fetched = evaluated_model(URL, alone, monkeypatch)
    assert (fetched / "model.safetensors").read_bytes() == (there / "model/model.safetensors").read_bytes()

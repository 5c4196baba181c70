"""Runs of several processes on this machine, joined over loopback, with two fake devices each."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_training import STEPS, config_of, state_of, weights, write_corpus

from jaxptm.metrics import read_metrics
from jaxptm.training import train

TESTS = Path(__file__).parent
NO_DROPOUT = {"model__hidden_dropout_prob": 0.0, "model__attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("distributed")
    write_corpus(home / "corpus.txt")
    return home


def launch(config: Path, *overrides: list[str], patches: dict[int, str] | None = None) -> Any:
    """Runs one process an entry of `overrides`; those in `patches` execute a line of Python before.

    Returns:
        (exit status, standard error) of each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # those of conftest, two devices
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_NUM_CPU_DEVICES": "2"}
    running = []
    for index, own in enumerate(overrides):
        arguments = ["train", str(config), *own, f"--coordinator=127.0.0.1:{port}"]
        arguments += [f"--processes={len(overrides)}", f"--process={index}", "--timeout=30"]
        script = f"""
            import faulthandler, sys, pytest
            faulthandler.dump_traceback_later(200)  # should it hang, where
            sys.path.insert(0, {str(TESTS)!r})
            from signal import Signals
            from test_training import die_at
            from jaxptm import cli, run
            {(patches or {}).get(index, "")}
            sys.argv[1:] = {arguments!r}
            cli.main()
        """
        command = [sys.executable, "-c", textwrap.dedent(script)]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=240)[1] for process in running]
    except subprocess.TimeoutExpired:
        for process in running:
            process.kill()
        pytest.fail("\n\n".join(process.communicate()[1][-8000:] for process in running))
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, error) for process, error in zip(running, errors, strict=True)]


def die(step: int, kind: str) -> str:
    return f"die_at(pytest.MonkeyPatch(), {step}, Signals.{kind})"


def test_two_processes_killed_stopped_and_restarted_end_as_one_process_does(home: Path) -> None:
    alone = config_of(home, "alone", parallel__data=4, **NO_DROPOUT)
    assert train(alone)["finished"]
    # Each device holds half of the parameters, each process half of the rows.
    config_of(home, "pair", parallel={"fsdp": 2}, **NO_DROPOUT)
    path = home / "pair.yaml"

    (first, log), (second, _) = launch(path, [], [], patches={1: die(13, "SIGKILL")})
    assert second == -signal.SIGKILL
    assert first != 0, log
    saved = {int(step.name) for step in (home / "pair/checkpoints").iterdir() if step.name.isdigit()}
    assert saved and saved <= {5, 10}

    outcomes = launch(path, [], [], patches={1: die(17, "SIGTERM")})
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    newest = max(int(step.name) for step in (home / "pair/checkpoints").iterdir() if step.name.isdigit())
    assert 17 <= newest <= STEPS  # of the process that was told, both stopped and saved

    (first, log), (second, quiet) = launch(path, [], [])
    assert (first, second) == (0, 0), (log, quiet)
    assert f"step {STEPS}/{STEPS}" in log and "step" not in quiet.replace("time step", "")
    config = config_of(home, "pair", parallel={"fsdp": 2}, **NO_DROPOUT)
    for name, tensor in weights(config.out).items():
        np.testing.assert_allclose(tensor, weights(alone.out)[name], atol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state_of(config), state_of(alone))
    lines, expected = (read_metrics(Path(each.out) / "metrics.jsonl") for each in (config, alone))
    assert [line["step"] for line in lines if line["step"] % 6 == 0] == [6, 12, 18, 24]
    assert lines[-1]["eval/loss"] == pytest.approx(expected[-1]["eval/loss"], abs=1e-4)

    # An error that process 0 finds is told by all.
    outcomes = launch(path, ["optimizer.learning_rate=1e-3"], ["optimizer.learning_rate=1e-3"])
    for status, error in outcomes:
        assert status == 1 and "belongs to a run with another config" in error
        assert "optimizer.learning_rate: 0.002 there, 0.001 now" in error and "Traceback" not in error


def test_an_error_of_one_process_is_told_by_all(home: Path) -> None:
    config_of(home, "torn", parallel={})
    patch = "pytest.MonkeyPatch().setattr(run, 'load_tokenizer', lambda path: open('/nowhere'))"
    (first, heard), (second, said) = launch(home / "torn.yaml", [], [], patches={1: patch})
    assert (first, second) == (1, 1)
    assert f"error: process 1 on {socket.gethostname()}: FileNotFoundError" in heard and "/nowhere" in heard
    assert "No such file or directory: '/nowhere'" in said
    assert "Traceback" not in heard + said

    for status, error in launch(home / "torn.yaml", [], ["train.seed=5"]):
        assert status == 1 and "the processes were started with different configs" in error


def test_pmap_and_tensor_parallelism_across_processes(home: Path) -> None:
    short = {"train__steps": 3, "optimizer__warmup": 0, **NO_DROPOUT}
    alone = config_of(home, "short", parallel__data=1, **short)
    train(alone)
    for name, parallel in (("mapped", {"mode": "pmap"}), ("split", {"tensor": 2, "data": 2, "scan": True})):
        config = config_of(home, name, parallel=parallel, **short)
        outcomes = launch(home / f"{name}.yaml", [], [])
        assert [status for status, _ in outcomes] == [0, 0], outcomes
        for key, tensor in weights(config.out).items():
            np.testing.assert_allclose(tensor, weights(alone.out)[key], atol=1e-5, err_msg=key)

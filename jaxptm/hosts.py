"""Several processes that train together: how they find each other, how they agree, how they fail together.

The work between them is that of JAX's own runtime (`jax.distributed`). What it lacks is here: knowing which GPUs a task
of SLURM is to use, saying which process has not come, and passing one process's error on to the others.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxptm.errors import JaxptmError

TPU_PORT = 8476
"""Where the coordinator of a TPU slice listens."""
MESSAGE_BYTES = 4096
"""How much of an error other processes get to see."""


@dataclass(frozen=True)
class Peers:
    """The processes of a run, seen by one of them.

    Attributes:
        coordinator: host:port where process 0 listens.
        count: how many processes there are.
        index: which of them this one is.
        local_devices: which GPUs of the machine are this process's; None for all.
    """

    coordinator: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None


def find_peers(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Peers | None:
    """The peers that the arguments name or that the launcher's environment tells of; None for a process of its own.

    What is not given is looked up: srun and mpirun tell how many processes there are, all TPU slices and srun where
    process 0 is.

    Raises:
        JaxptmError: something is missing or contradicts itself.
    """
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    launched = _slurm(environ) or _open_mpi(environ)
    if launched is None and (coordinator, count, index) == (None, None, None):
        launched = _tpu(environ)
        if launched is None:
            return None
    local_devices = None
    if launched is not None:
        coordinator = coordinator or launched.coordinator
        count = launched.count if count is None else count
        index = launched.index if index is None else index
        local_devices = launched.local_devices
    given = {"--coordinator": coordinator, "--processes": count, "--process": index}
    missing = [flag for flag, value in given.items() if value in (None, "")]
    if missing:
        raise JaxptmError(
            f"{' and '.join(missing)} missing: several processes need --coordinator HOST:PORT (an address of process 0 "
            "with a free port), --processes N and --process I, the first two alike for all of them."
        )
    assert coordinator is not None and count is not None and index is not None
    if not re.fullmatch(r".+:\d+", coordinator) or not 0 < int(coordinator.rsplit(":", 1)[1]) < 65536:
        raise JaxptmError(f"--coordinator {coordinator}: write it as HOST:PORT, for example 10.0.0.1:8476.")
    if not 0 <= index < count:
        raise JaxptmError(f"--process {index}: the {count} processes (--processes) are numbered from 0 to {count - 1}.")
    return None if count == 1 else Peers(coordinator, count, index, local_devices)


def join(peers: Peers, timeout: float = 300) -> None:
    """Waits until all `peers` have come, and makes their devices one (`jax.distributed.initialize`).

    To be called before anything else touches a device.

    Args:
        timeout: seconds to wait.

    Raises:
        JaxptmError: some have not come in time, which are named; or they do not agree on how many they are.
    """
    _roll_call(peers, timeout)
    import jax

    jax.distributed.initialize(
        peers.coordinator,
        peers.count,
        peers.index,
        local_device_ids=peers.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(60, int(timeout)),
    )


def is_main() -> bool:
    """Whether this is process 0, which alone prints and writes what is written once."""
    import jax

    return jax.process_index() == 0


@contextmanager
def together() -> Iterator[None]:
    """All processes get through the block or all raise: those that did well name the one that did not.

    The block must not hold anything that waits for other processes.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    messages = exchange("" if error is None else f"{socket.gethostname()}: {error or type(error).__name__}")
    if error is not None:
        raise error
    failed = {message: index for index, message in enumerate(messages) if message}
    if failed:
        raise JaxptmError("\n".join(f"process {index} on {message}" for message, index in failed.items()))


def exchange(message: str) -> list[str]:
    """What every process passes here, by process."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [message]
    sent = np.zeros(MESSAGE_BYTES, np.uint8)
    text = message.encode()[:MESSAGE_BYTES]
    sent[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(sent)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def _slurm(environ: Mapping[str, str]) -> Peers | None:
    """One process a task of `srun`; batch scripts and interactive shells, which no srun started, are no tasks."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(name in environ for name in names):
        return None
    job, nodes, count, index, local = (environ[name] for name in names)
    # "node[03-07,9],other": the first name is the prefix and the first number in the brackets.
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    assert match is not None
    port = environ.get("JAX_COORDINATOR_PORT", str(61440 + int(job) % 4096))
    alone = int(environ.get("SLURM_STEP_NUM_NODES", "1")) == int(count)
    return Peers(
        f"{match[1]}{match[2] or ''}:{port}",
        int(count),
        int(index),
        None if alone else _own_device(int(local), environ),
    )


def _open_mpi(environ: Mapping[str, str]) -> Peers | None:
    """One process a rank of `mpirun`, which tells an address up to Open MPI 4."""
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    count, index, local, local_count = (
        int(environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
    )
    port = environ.get("JAX_COORDINATOR_PORT", str(TPU_PORT))
    match = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    host = "127.0.0.1" if local_count == count else (match[1] or match[2]) if match else ""
    devices = None if local_count == 1 else _own_device(local, environ)
    return Peers(f"{host}:{port}" if host else "", count, index, devices)


def _own_device(local_index: int, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPU of one of several processes on a machine, unless the launcher shows each of them its own."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return None if visible is not None and "," not in visible else (local_index,)


def _tpu(environ: Mapping[str, str]) -> Peers | None:
    """One process a TPU host, from GKE's variables or from the metadata server of Google's machines."""
    names = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    index = environ.get("TPU_WORKER_ID", "0")
    if names == [""] and "TPU_SKIP_MDS_QUERY" not in environ and _has_tpu(environ):
        with suppress(urllib.error.URLError, TimeoutError, OSError):  # a TPU elsewhere, such as Colab's, stands alone
            # "name:id:address" of each host, or its name.
            endpoints = _metadata("worker-network-endpoints", environ).split(",")
            names = [endpoint.split(":")[-1] for endpoint in endpoints]
            index = _metadata("agent-worker-number", environ)
    slices, number = (
        int(environ.get(f"MEGASCALE_{name}") or low) for name, low in (("NUM_SLICES", 1), ("SLICE_ID", 0))
    )
    host = environ.get("MEGASCALE_COORDINATOR_ADDRESS", names[0]).split(":")[0]
    count = len(names) * slices
    return Peers(f"{host}:{TPU_PORT}", count, int(index) + number * len(names)) if count > 1 else None


def _has_tpu(environ: Mapping[str, str]) -> bool:
    return Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists() or "GCE_METADATA_IP" in environ


def _metadata(name: str, environ: Mapping[str, str]) -> str:
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
        return answer.read().decode().strip()


def _roll_call(peers: Peers, timeout: float) -> None:
    """Process 0 waits for a word from each other one and answers them all: to go on, or what is wrong.

    JAX's own start would abort the process after its timeout without a name.
    """
    deadline = time.monotonic() + timeout
    host, _, port = peers.coordinator.rpartition(":")
    complaint = (
        _call(peers, int(port), deadline, timeout)
        if peers.index == 0
        else _answer(peers, host, int(port), deadline, timeout)
    )
    if complaint:
        raise JaxptmError(complaint)


def _call(peers: Peers, port: int, deadline: float, timeout: float) -> str:
    here: dict[int, str] = {0: socket.gethostname()}
    lines: list[socket.socket] = []
    complaint = ""
    try:
        both = socket.has_dualstack_ipv6()
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=peers.count
        )
    except OSError as error:
        raise JaxptmError(
            f"process 0 cannot listen on port {port} ({error.strerror}): choose another port in --coordinator "
            "(JAX_COORDINATOR_PORT under SLURM)."
        ) from error
    with server:
        while len(here) < peers.count and not complaint:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                line, _ = server.accept()
                line.settimeout(10)
                lines.append(line)
                word = json.loads(line.makefile("rb").readline(1000))
                index, count, name = int(word["process"]), int(word["of"]), str(word["host"])
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue  # someone connected and said nothing
                missing = [str(index) for index in range(peers.count) if index not in here]
                came = ", ".join(f"{index} on {name}" for index, name in sorted(here.items()))
                complaint = (
                    f"process {', '.join(missing)} of {peers.count} did not come within {timeout:.0f} s; "
                    f"here are {came}. Start the missing ones with the same --coordinator {peers.coordinator}, or raise --timeout."
                )
            except (OSError, ValueError, KeyError, TypeError):
                continue  # no process of ours
            else:
                if count != peers.count or not 0 < index < count:
                    complaint = (
                        f"process {index} of {count} on {name} does not belong to the {peers.count} processes that "
                        "process 0 waits for: start all with the same --processes."
                    )
                elif index in here:
                    complaint = (
                        f"two processes, on {here[index]} and on {name}, both say that they are process {index}."
                    )
                here[index] = name
        for line in lines:
            with suppress(OSError), line:
                line.sendall(json.dumps({"complaint": complaint}).encode() + b"\n")
    return complaint


def _answer(peers: Peers, host: str, port: int, deadline: float, timeout: float) -> str:
    word = json.dumps({"process": peers.index, "of": peers.count, "host": socket.gethostname()}).encode() + b"\n"
    reason: Any = "it never answered"
    while time.monotonic() < deadline + 5:  # process 0 may have begun to wait a little later
        try:
            with socket.create_connection((host.strip("[]"), port), timeout=5) as line:
                line.sendall(word)
                line.settimeout(max(1, deadline + 10 - time.monotonic()))
                reply = line.makefile("rb").readline(100_000)
            return json.loads(reply)["complaint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or "it gave no answer"
            time.sleep(0.2)
    return (
        f"process {peers.index}: process 0 was not to be reached at {peers.coordinator} within {timeout:.0f} s "
        f"({reason}): start it, check the address (--coordinator) and that its port is open to this machine."
    )

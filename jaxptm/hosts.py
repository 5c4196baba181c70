"""Several processes that train together: how they find each other, how they agree, how they fail together.

The work between them is that of JAX's own runtime (`jax.distributed`). What it lacks is here: knowing which GPUs a task
of SLURM is to use, saying which process has not come, and passing one process's error on to the others.
"""

from __future__ import annotations

import http.client
import os
import re
import selectors
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from jaxptm.errors import JaxptmError

TPU_PORT = 8482
"""Where the coordinator of a TPU slice listens, as in JAX: libtpu has 8476 for itself."""
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

    What is not given is looked up: srun, mpirun and TPU slices tell how many processes there are and which this one
    is, and all but some mpirun where process 0 is.

    Raises:
        JaxptmError: something is missing, malformed or contradicts itself.
    """
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS") or None
    # In this order: mpirun has srun start its daemons, and srun may speak MPICH's language.
    launched = _open_mpi(environ) or _slurm(environ) or _mpich(environ)
    on_tpu = "tpu" in (environ.get("JAX_PLATFORMS") or "tpu")
    if launched is None and on_tpu and None in (coordinator, count, index):
        launched = _tpu(environ)
    if launched is None and (coordinator, count, index) == (None, None, None):
        return None
    local_devices = None
    if launched is not None:
        coordinator = coordinator or launched.coordinator or None
        count = launched.count if count is None else count
        index = launched.index if index is None else index
        local_devices = launched.local_devices
    if coordinator is None or count is None or index is None:
        given = {"--coordinator": coordinator, "--processes": count, "--process": index}
        raise JaxptmError(
            f"{' and '.join(flag for flag, value in given.items() if value is None)} missing: several processes need "
            "--coordinator HOST:PORT (or JAX_COORDINATOR_ADDRESS; an address of process 0 with a free port), "
            "--processes N and --process I, the first two alike for all of them."
        )
    address = re.fullmatch(r"(?:\[[^\s\[\]]+\]|[^\s:\[\]/]+):([0-9]{1,5})", coordinator)
    if address is None or not 0 < int(address[1]) < 65536:
        raise JaxptmError(
            f"--coordinator {coordinator} (or JAX_COORDINATOR_ADDRESS): write it as HOST:PORT, for example "
            "10.0.0.1:8476 or [fd00::1]:8476."
        )
    if count < 1:
        raise JaxptmError(f"--processes {count}: a run has at least one process.")
    if not 0 <= index < count:
        raise JaxptmError(f"--process {index}: the processes are numbered from 0 to {count - 1} (--processes {count}).")
    return None if count == 1 else Peers(coordinator, count, index, local_devices)


def join(peers: Peers, timeout: float = 300) -> None:
    """Waits until all `peers` have come, and makes their devices one (`jax.distributed.initialize`).

    To be called before anything else touches a device.

    Args:
        timeout: seconds to wait, and later, up to 100, after which a silent process counts as dead and ends the others.

    Raises:
        JaxptmError: some have not come in time, which are named; or they do not agree on how many they are.
    """
    if not 0 < timeout < 1e6:
        raise JaxptmError(f"--timeout {timeout:g}: give the seconds to wait, more than 0 and less than a million.")
    _roll_call(peers, timeout)
    import jax

    jax.distributed.initialize(
        peers.coordinator,
        peers.count,
        peers.index,
        local_device_ids=peers.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(60, int(timeout)),
        heartbeat_timeout_seconds=max(10, min(100, int(timeout))),
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
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, JaxptmError) else f"{type(error).__name__}: {error}"
        with suppress(Exception):  # this process's own error is the one to tell, even where the others are gone
            exchange(f"{socket.gethostname()}: {reason}")
        raise
    failed = {message: index for index, message in enumerate(exchange("")) if message}
    if failed:
        raise JaxptmError("\n".join(f"process {index} on {message}" for message, index in failed.items()))


def exchange(message: str) -> list[str]:
    """What every process passes here, by process; of a long message its beginning."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [message]
    sent = np.zeros(MESSAGE_BYTES, np.uint8)
    text = message.encode(errors="replace")[:MESSAGE_BYTES]
    sent[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(sent)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def _open_mpi(environ: Mapping[str, str]) -> Peers | None:
    """One process a rank of `mpirun`, which tells an address of its own machine up to Open MPI 4."""
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    count, index, local, local_count = (
        _integer(environ, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
    )
    # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911" or "...;tcp6://[fe80::b9b,2620:10d::2]:43370"
    match = re.search(r"tcp://([^:]+):|tcp6://\[([^\]]+)\]", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    hosts = (match[1] or match[2]).split(",") if match else [""]
    # A link-local address means nothing on another machine.
    host = "127.0.0.1" if local_count == count else next((h for h in hosts if not h.startswith("fe80:")), hosts[0])
    port = _port(environ, zlib.crc32(environ.get("PMIX_NAMESPACE", "").encode()))  # the name of the job
    coordinator = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return Peers(coordinator if host else "", count, index, _own_devices(local, local_count == 1, environ))


def _slurm(environ: Mapping[str, str]) -> Peers | None:
    """One process a task of `srun`; batch scripts and interactive shells, which no srun started, are no tasks."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(environ.get(name) for name in names):
        return None
    job, count, index, local = (_integer(environ, name) for name in names if name != "SLURM_STEP_NODELIST")
    # The first of "node[03-07,9],other" is up to the first comma outside brackets, with the first number of each pair.
    first = re.match(r"(?:\[[^\]]*\]|[^,])+", environ["SLURM_STEP_NODELIST"])
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else ""
    # JAX's port, moved for the second and later sruns of a job, which may run beside the first.
    port = _port(environ, job + 64 * _integer(environ, "SLURM_STEP_ID", 0))
    one_a_node = _integer(environ, "SLURM_STEP_NUM_NODES", 1) == count
    return Peers(f"{host}:{port}", count, index, _own_devices(local, one_a_node, environ))


def _mpich(environ: Mapping[str, str]) -> Peers | None:
    """One process a rank of the `mpirun` of MPICH and Intel MPI, which tells no address."""
    if not environ.get("PMI_SIZE") or not environ.get("PMI_RANK"):
        return None
    count, index = (_integer(environ, name) for name in ("PMI_SIZE", "PMI_RANK"))
    local, local_count = (
        _integer(environ, f"MPI_{name}", low) for name, low in (("LOCALRANKID", 0), ("LOCALNRANKS", 1))
    )
    coordinator = f"127.0.0.1:{_port(environ, 0)}" if local_count == count else ""
    return Peers(coordinator, count, index, _own_devices(local, local_count == 1, environ))


def _own_devices(local_index: int, alone: bool, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPU of one of several processes on a machine, unless each is shown its own or told by JAX's variable."""
    visible = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    shown = any(name in environ and "," not in environ[name] for name in visible)
    return None if alone or shown or environ.get("JAX_LOCAL_DEVICE_IDS") else (local_index,)


def _tpu(environ: Mapping[str, str]) -> Peers | None:
    """One process a TPU host, from GKE's variables or from the metadata server of Google's machines."""
    facts = dict(environ)
    hosts = (environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or "").split(",")
    if hosts == [""] and "TPU_SKIP_MDS_QUERY" not in environ and _has_tpu(environ):
        # "name:id:address" of each host, or its name; nothing for a TPU elsewhere, such as Colab's, which stands alone.
        hosts = [host.split(":")[-1] for host in _metadata("worker-network-endpoints", environ).split(",")]
        if hosts != [""]:
            # Of several slices, lines such as "MEGASCALE_NUM_SLICES: '2'".
            told = re.findall(r"^\s*(MEGASCALE_\w+):\s*'?([^'\s]*)", _metadata("tpu-env", environ), re.MULTILINE)
            facts = {**dict(told), **environ, "TPU_WORKER_ID": _metadata("agent-worker-number", environ)}
    slices = _integer(facts, "MEGASCALE_NUM_SLICES", 1)
    count = len(hosts) * slices
    if count == 1:
        return None
    index = _integer(facts, "TPU_WORKER_ID", 0 if len(hosts) == 1 else None)
    if slices > 1:
        index += len(hosts) * _integer(facts, "MEGASCALE_SLICE_ID")
    host = (facts.get("MEGASCALE_COORDINATOR_ADDRESS", "") if slices > 1 else hosts[0]).split(":")[0]
    port = _integer(environ, "JAX_COORDINATOR_PORT", TPU_PORT)
    return Peers(f"{host}:{port}" if host else "", count, index)


def _has_tpu(environ: Mapping[str, str]) -> bool:
    devices = Path("/dev")
    return any((*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*"))) or "GCE_METADATA_IP" in environ


def _metadata(name: str, environ: Mapping[str, str]) -> str:
    """An attribute of this machine of Google's; empty where there is none, or no metadata server.

    A server that is there and fails is an error: one host that believes itself alone would train beside the others.
    """
    server = environ.get("GCE_METADATA_IP") or "metadata.google.internal"
    failure = ""
    for pause in (0.0, 0.5, 1.0, 2.0):
        time.sleep(pause)
        connection = http.client.HTTPConnection(server, timeout=5)  # never through a proxy
        try:
            connection.connect()
        except OSError:
            return ""
        try:
            path = f"/computeMetadata/v1/instance/attributes/{name}"
            connection.request("GET", path, headers={"Metadata-Flavor": "Google"})
            answer = connection.getresponse()
            text = answer.read().decode().strip()
            if answer.status < 500 and answer.status != 429:  # not overloaded or out of order
                return text if answer.status == 200 else ""
            failure = f"status {answer.status}"
        except (OSError, http.client.HTTPException) as error:
            failure = str(error) or type(error).__name__
        finally:
            connection.close()
    raise JaxptmError(
        f"the metadata server {server} does not tell {name} ({failure}), from which TPU hosts find each other: start "
        "again, or give --coordinator, --processes and --process (TPU_SKIP_MDS_QUERY=1 for one host alone)."
    )


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environ.get(name, "")
    if default is not None and not value:
        return default
    if not re.fullmatch(r"[0-9]{1,18}", value):
        raise JaxptmError(
            f"{name}={value} in the environment is no whole number: correct or unset it, or start the processes by the "
            "launcher that sets it."
        )
    return int(value)


def _port(environ: Mapping[str, str], job: int) -> int:
    """A port for each job, above those that systems hand out, so that several jobs may share a machine."""
    return _integer(environ, "JAX_COORDINATOR_PORT", 61440 + job % 4096)


def _roll_call(peers: Peers, timeout: float) -> None:
    """Process 0 waits for a word from each other one and answers them all: to go on, or what is wrong.

    JAX's own start would abort the process after its timeout without a name.
    """
    complaint = _call(peers, timeout) if peers.index == 0 else _answer(peers, timeout)
    if complaint:
        raise JaxptmError(complaint)


def _call(peers: Peers, timeout: float) -> str:
    """Process 0's part; its wait is the one that counts. Whoever hangs up, or died, counts as not having come."""
    deadline = time.monotonic() + timeout
    here = {0: socket.gethostname()}
    callers: dict[socket.socket, int] = {}
    complaint = ""
    with ExitStack() as lines, selectors.DefaultSelector() as selector:
        server = lines.enter_context(_listen(int(peers.coordinator.rpartition(":")[2]), peers.count))
        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ)
        while len(here) < peers.count and not complaint:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = ", ".join(str(index) for index in range(peers.count) if index not in here)
                came = ", ".join(f"{index} on {host}" for index, host in sorted(here.items()))
                complaint = (
                    f"process {missing} of {peers.count} did not come within {timeout:g} s, only {came}: start the "
                    f"missing ones with the same --coordinator {peers.coordinator}, or raise --timeout."
                )
                break
            for key, _ in selector.select(left):
                line, word = key.fileobj, key.data
                assert isinstance(line, socket.socket)
                if line is server:
                    with suppress(OSError):  # it has hung up again
                        line = lines.enter_context(server.accept()[0])
                        line.settimeout(5)
                        selector.register(line, selectors.EVENT_READ, bytearray())
                    continue
                heard = b""
                with suppress(OSError):
                    heard = line.recv(1000)
                word += heard
                if not heard or len(word) > 1000:  # gone, or no process of ours
                    selector.unregister(line)
                    line.close()
                    here.pop(callers.pop(line, -1), None)
                elif match := re.fullmatch(rb"jaxptm ([0-9]{1,9}) of ([0-9]{1,9}) on (.*)\n", word):
                    index, count, host = int(match[1]), int(match[2]), match[3].decode(errors="replace")
                    if count != peers.count:
                        complaint = (
                            f"process {index} of {count} on {host} does not belong to the {peers.count} processes that "
                            f"process 0 on {here[0]} waits for: start all with the same --processes, and every run "
                            "with a port of its own."
                        )
                    elif index in here:
                        complaint = (
                            f"two processes, on {here[index]} and on {host}, both say that they are process {index}: "
                            "give each its own --process, and every run a port of its own."
                        )
                    here[index] = host
                    callers[line] = index
        server.close()  # the port is for JAX now
        for line in callers:
            with suppress(OSError):
                line.sendall(f"jaxptm: {complaint}\n".encode())
    return complaint


def _listen(port: int, backlog: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=backlog)
    except OSError as error:
        raise JaxptmError(
            f"process 0 cannot listen on port {port} ({os.strerror(error.errno or 0)}): choose another port in "
            "--coordinator (or JAX_COORDINATOR_PORT), and start one process 0 only."
        ) from error


def _answer(peers: Peers, timeout: float) -> str:
    """The part of the others, which try until process 0 listens and then leave it to process 0 when to give up."""
    deadline = time.monotonic() + timeout
    host, _, port = peers.coordinator.rpartition(":")
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as line:
                line.sendall(f"jaxptm {peers.index} of {peers.count} on {socket.gethostname()}\n".encode())
                line.settimeout(timeout + 10)
                with line.makefile(encoding="utf-8", errors="replace", newline="\n") as lines:
                    reply = lines.readline(1_000_000)
            if match := re.fullmatch(r"jaxptm: (.*)\n", reply):
                return match[1]
            reason = "what listens there is no process 0 that starts" if reply else "it hung up"
        except (OSError, UnicodeError) as error:  # the latter for what can be no name
            reason = getattr(error, "strerror", None) or "it does not answer"
        if time.monotonic() > deadline:
            return (
                f"process {peers.index} on {socket.gethostname()} did not reach process 0 at {peers.coordinator} "
                f"within {timeout:g} s ({reason}): start it, check the address (--coordinator) and that its port is "
                "open to this machine."
            )
        time.sleep(0.2)

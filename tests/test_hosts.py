"""Processes of several hosts: how they find each other, wait for each other and fail together.

No second JAX is started: threads stand for processes, and a server on the loopback for Google's metadata.
"""

from __future__ import annotations

import http.server
import itertools
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import multihost_utils

from jaxptm import hosts
from jaxptm.errors import JaxptmError
from jaxptm.hosts import Peers, find_peers

HERE = socket.gethostname()


# --- flags ---


def test_a_process_of_its_own_has_no_peers() -> None:
    assert find_peers(environ={}) is None
    assert find_peers("10.0.0.1:8476", 1, 0, environ={}) is None


@pytest.mark.parametrize("coordinator", ["10.0.0.1:8476", "node-1.example.org:1", "[::1]:8476", "[fe80::1%eth0]:65535"])
def test_flags_alone(coordinator: str) -> None:
    assert find_peers(coordinator, 3, 2, environ={}) == Peers(coordinator, 3, 2, None)


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        (("a:1", None, None), "--processes and --process missing"),
        ((None, 2, 0), "--coordinator missing"),
        (("", 2, 0), "--coordinator missing"),
        (("a:1", None, 0), "--processes missing"),
        (("a:1", 2, None), "--process missing"),
        ((None, None, 0), "--coordinator and --processes missing"),
    ],
)
def test_missing_flags_are_named(flags: tuple[str | None, int | None, int | None], missing: str) -> None:
    with pytest.raises(JaxptmError, match=f"^{missing}: several processes need --coordinator HOST:PORT"):
        find_peers(*flags, environ={})


@pytest.mark.parametrize(
    ("count", "index", "message"),
    [
        (2, 2, r"--process 2: .* from 0 to 1 \(--processes 2\)"),
        (2, -1, "--process -1: .* from 0 to 1"),
        (0, 0, "--processes 0: .* at least one"),
        (-1, 0, "--processes -1: .* at least one"),
    ],
)
def test_contradictory_flags(count: int, index: int, message: str) -> None:
    with pytest.raises(JaxptmError, match=message):
        find_peers("a:1", count, index, environ={})


@pytest.mark.parametrize(
    "coordinator",
    [
        "a",
        "a:",
        ":1",
        "a:0",
        "a:65536",
        "a:x",
        "a:-1",
        "a:1:",
        "::1:8476",
        "[::1]",
        "[]:1",
        "http://a:1",
        "a b:1",
        "a:١",
    ],
)
def test_malformed_coordinators(coordinator: str) -> None:
    with pytest.raises(
        JaxptmError, match=re.escape(f"--coordinator {coordinator} (or JAX_COORDINATOR_ADDRESS): write")
    ):
        find_peers(coordinator, 2, 0, environ={})


def test_jaxs_variable_stands_for_the_flag() -> None:
    environ = {"JAX_COORDINATOR_ADDRESS": "a:1"}
    assert find_peers(None, 2, 1, environ) == Peers("a:1", 2, 1)
    assert find_peers("b:2", 2, 1, environ) == Peers("b:2", 2, 1)
    assert find_peers(None, 2, 1, slurm()) == Peers("node001:61541", 2, 1)
    assert find_peers(environ=slurm(PROCID="1") | environ) == Peers("a:1", 2, 1)
    with pytest.raises(JaxptmError, match=r"--processes and --process missing.*JAX_COORDINATOR_ADDRESS"):
        find_peers(environ=environ)
    assert find_peers(environ={"JAX_COORDINATOR_ADDRESS": ""}) is None


# --- SLURM ---


def slurm(nodes: str = "node[001-002]", tasks: int = 2, node_count: int = 2, **changed: str) -> dict[str, str]:
    """What srun tells a task of job 101, by default one task on each of two nodes."""
    told = {
        "JOB_ID": "101",
        "NTASKS": str(tasks),
        "STEP_ID": "0",
        "STEP_NODELIST": nodes,
        "STEP_NUM_NODES": str(node_count),
        "STEP_NUM_TASKS": str(tasks),
        "PROCID": "0",
        "LOCALID": "0",
    }
    return {f"SLURM_{name}": value for name, value in (told | changed).items()}


def test_one_task_a_node_has_all_its_gpus() -> None:
    environ = slurm(PROCID="1") | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    assert find_peers(environ=environ) == Peers("node001:61541", 2, 1, None)


def test_one_of_eight_tasks_on_a_node_has_one_gpu() -> None:
    environ = slurm(tasks=16, PROCID="11", LOCALID="3")
    expected = Peers("node001:61541", 16, 11, (3,))
    assert find_peers(environ=environ) == expected
    assert find_peers(environ=environ | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}) == expected


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
@pytest.mark.parametrize("value", ["3", "GPU-8932f937", ""])
def test_a_task_that_is_shown_one_gpu_takes_it(name: str, value: str) -> None:
    peers = find_peers(environ=slurm(tasks=16, PROCID="11", LOCALID="3") | {name: value})
    assert peers == Peers("node001:61541", 16, 11, None)


def test_jaxs_own_variable_names_the_gpus() -> None:
    peers = find_peers(environ=slurm(tasks=4, LOCALID="1") | {"JAX_LOCAL_DEVICE_IDS": "2,3"})
    assert peers is not None and peers.local_devices is None  # then jax.distributed reads the variable


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("a,b", "a"),
        ("node[03-07,9],other", "node03"),
        ("node[9,03-07]", "node9"),
        ("other,node[03-07,9]", "other"),
        ("gpu-a[1-2]-ib,x", "gpu-a1-ib"),
        ("rack[2-3]node[07-09,11]", "rack2node07"),
        ("n1.example.org,n2.example.org", "n1.example.org"),
    ],
)
def test_node_lists(nodes: str, first: str) -> None:
    assert find_peers(environ=slurm(nodes)) == Peers(f"{first}:61541", 2, 0)


@given(st.integers(0, 2**40), st.integers(0, 2**32))
def test_the_port_of_a_job_is_one_that_systems_do_not_hand_out(job: int, step: int) -> None:
    ports = []
    for id_ in (0, step):
        peers = find_peers(environ=slurm(JOB_ID=str(job), STEP_ID=str(id_)))
        assert peers is not None
        ports.append(int(peers.coordinator.rpartition(":")[2]))
    assert ports[0] == job % 2**12 + (65535 - 2**12 + 1)  # as in JAX
    assert 61000 < ports[1] < 65536
    assert ports[0] != ports[1] or step % 64 == 0


def test_the_port_may_be_told() -> None:
    environ = {"JAX_COORDINATOR_PORT": "1234"}
    assert find_peers(environ=slurm() | environ) == Peers("node001:1234", 2, 0)
    assert find_peers(environ=mpi() | environ) == Peers("127.0.0.1:1234", 2, 0, (0,))
    assert find_peers(environ=gke() | environ) == Peers("a:1234", 2, 0)


def test_only_the_coordinator_told_under_srun() -> None:
    environ = slurm(tasks=16, PROCID="11", LOCALID="3")
    assert find_peers("10.0.0.1:99", environ=environ) == Peers("10.0.0.1:99", 16, 11, (3,))


@pytest.mark.parametrize("absent", ["STEP_NODELIST", "STEP_NUM_TASKS", "PROCID", "LOCALID"])
def test_what_no_srun_started_is_alone(absent: str) -> None:
    environ = slurm()
    del environ[f"SLURM_{absent}"]
    assert find_peers(environ=environ) is None


def test_a_single_task_is_alone() -> None:
    assert find_peers(environ=slurm("node001", tasks=1, node_count=1)) is None


def test_flags_in_a_shell_that_srun_started() -> None:
    shell = slurm("node001", tasks=1, node_count=1)
    assert find_peers("a:1", 2, 1, environ=shell) == Peers("a:1", 2, 1)


@pytest.mark.parametrize("name", ["JOB_ID", "STEP_ID", "STEP_NUM_TASKS", "STEP_NUM_NODES", "PROCID", "LOCALID"])
@pytest.mark.parametrize("value", ["two", "-1", "1.5", "4(x2)"])
def test_malformed_numbers_are_named(name: str, value: str) -> None:
    with pytest.raises(JaxptmError, match=re.escape(f"SLURM_{name}={value} in the environment is no whole number")):
        find_peers(environ=slurm(**{name: value}))


def test_a_malformed_port_is_named() -> None:
    with pytest.raises(JaxptmError, match="JAX_COORDINATOR_PORT=eighty in the environment is no whole number"):
        find_peers(environ=slurm() | {"JAX_COORDINATOR_PORT": "eighty"})


# --- Open MPI ---


def mpi(count: int = 2, index: int = 0, local: int = 0, local_count: int = 2, uri: str | None = None) -> dict[str, str]:
    numbers = {"SIZE": count, "RANK": index, "LOCAL_RANK": local, "LOCAL_SIZE": local_count}
    environ = {f"OMPI_COMM_WORLD_{name}": str(number) for name, number in numbers.items()}
    return environ | ({} if uri is None else {"OMPI_MCA_orte_hnp_uri": uri})


@pytest.mark.parametrize(
    ("uri", "host"),
    [
        ("1531576320.0;tcp://10.96.0.1,10.148.0.1,10.108.0.1:34911", "10.96.0.1"),
        ("1531576320.0;tcp://10.96.0.1:34911", "10.96.0.1"),
        ("1314521088.0;tcp6://[2620:10d:c083:150e::3000:2]:43370", "[2620:10d:c083:150e::3000:2]"),
        # A link-local address is of no use to other machines, unless there is no other.
        ("1314521088.0;tcp6://[fe80::b9b:ac5d,2620:10d::2]:43370", "[2620:10d::2]"),
        ("1314521088.0;tcp6://[fe80::b9b:ac5d]:43370", "[fe80::b9b:ac5d]"),
    ],
)
def test_open_mpi_4_tells_an_address(uri: str, host: str) -> None:
    assert find_peers(environ=mpi(8, 6, 2, 4, uri)) == Peers(f"{host}:61440", 8, 6, (2,))
    assert find_peers(environ=mpi(2, 1, 0, 1, uri)) == Peers(f"{host}:61440", 2, 1, None)


def test_open_mpi_5_tells_none() -> None:
    assert find_peers(environ=mpi(4, 3, 3, 4)) == Peers("127.0.0.1:61440", 4, 3, (3,))
    with pytest.raises(JaxptmError, match=r"^--coordinator missing:"):
        find_peers(environ=mpi(8, 6, 2, 4))
    assert find_peers("a:1", environ=mpi(8, 6, 2, 4)) == Peers("a:1", 8, 6, (2,))
    assert find_peers(environ=mpi(1, 0, 0, 1)) is None


def test_mpiruns_beside_each_other_have_ports_of_their_own() -> None:
    spaces = ["prterun-node-1041@1", "prterun-node-1044@1"]
    found = [find_peers(environ=mpi() | {"PMIX_NAMESPACE": space}) for space in spaces]
    assert None not in found and found[0] != found[1]


def test_mpirun_within_slurm_is_mpiruns() -> None:
    # On the other nodes srun starts mpirun's daemons, one task each, and their children inherit its variables.
    daemon = slurm("node002", tasks=1, node_count=1)
    assert find_peers(environ=daemon | mpi(2, 1, 0, 1, "1.0;tcp://10.96.0.1:34911")) == Peers("10.96.0.1:61440", 2, 1)


def test_an_incomplete_mpirun_is_an_error() -> None:
    with pytest.raises(JaxptmError, match="OMPI_COMM_WORLD_RANK= in the environment is no whole number"):
        find_peers(environ={"OMPI_COMM_WORLD_SIZE": "2"})


# --- TPU ---


def gke(index: str = "0", names: str = "a,b", **slices: str) -> dict[str, str]:
    several = {f"MEGASCALE_{name}": value for name, value in slices.items()}
    return {"TPU_WORKER_HOSTNAMES": names, "TPU_WORKER_ID": index, **several}


def test_a_slice_of_several_hosts() -> None:
    assert find_peers(environ=gke("1")) == Peers("a:8482", 2, 1)
    assert find_peers(environ=gke("1") | {"TPU_PROCESS_ADDRESSES": "c:8476,d:8476,e:8476"}) == Peers("c:8482", 3, 1)
    assert find_peers(environ=gke(names="localhost")) is None
    assert find_peers(environ={"TPU_WORKER_HOSTNAMES": "localhost"}) is None


def test_a_slice_with_the_coordinator_told() -> None:
    assert find_peers("z:5", environ=gke("1")) == Peers("z:5", 2, 1)
    assert find_peers(environ=gke("1") | {"JAX_COORDINATOR_ADDRESS": "z:5"}) == Peers("z:5", 2, 1)
    assert find_peers("z:5", 4, 3, environ=gke("1")) == Peers("z:5", 4, 3)


def test_several_slices() -> None:
    environ = gke("1", NUM_SLICES="3", SLICE_ID="2", COORDINATOR_ADDRESS="job-0:8080")
    assert find_peers(environ=environ) == Peers("job-0:8482", 6, 5)
    single = gke(names="localhost", NUM_SLICES="3", SLICE_ID="2", COORDINATOR_ADDRESS="job-0")
    assert find_peers(environ=single) == Peers("job-0:8482", 3, 2)
    assert find_peers(environ=gke("1", NUM_SLICES="1", SLICE_ID="0")) == Peers("a:8482", 2, 1)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID= in the environment"),
        (gke("first"), "TPU_WORKER_ID=first in the environment"),
        (gke(NUM_SLICES="2", COORDINATOR_ADDRESS="a"), "MEGASCALE_SLICE_ID= in the environment"),
        (gke(NUM_SLICES="2", SLICE_ID="1"), "--coordinator missing"),
        (gke("2"), "--process 2: the processes are numbered from 0 to 1"),
    ],
)
def test_an_incomplete_slice_is_an_error(environ: dict[str, str], message: str) -> None:
    with pytest.raises(JaxptmError, match=message):
        find_peers(environ=environ)


@contextmanager
def metadata_server(answer: Callable[[str], tuple[int, str]]) -> Iterator[dict[str, str]]:
    """Serves `answer(attribute)`; yields the environment that points there."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            prefix = "/computeMetadata/v1/instance/attributes/"
            asked_well = self.headers["Metadata-Flavor"] == "Google" and self.path.startswith(prefix)
            status, text = answer(self.path.removeprefix(prefix)) if asked_well else (403, "")
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        server.shutdown()
        thread.join()


def attributes(**values: str) -> Callable[[str], tuple[int, str]]:
    known = {name.replace("_", "-"): value for name, value in values.items()}
    return lambda name: (200, known[name]) if name in known else (404, "<html>not found</html>")


@pytest.mark.parametrize(
    "endpoints", ["t1v-w-0:u:10.128.0.5,t1v-w-1:u:10.128.0.6,t1v-w-2:u:10.128.0.7", "10.128.0.5,10.128.0.6,10.128.0.7"]
)
def test_the_metadata_server_tells_the_hosts(endpoints: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # which knows nothing of this machine
    with metadata_server(attributes(worker_network_endpoints=endpoints, agent_worker_number="2\n")) as environ:
        assert find_peers(environ=environ) == Peers("10.128.0.5:8482", 3, 2)
        assert find_peers(environ=environ | {"TPU_SKIP_MDS_QUERY": "1"}) is None


def test_the_metadata_server_tells_the_slices() -> None:
    environment = (
        "ZONE: 'us-x'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9:80'"
    )
    told = attributes(worker_network_endpoints="10.1.0.1,10.1.0.2", agent_worker_number="1", tpu_env=environment)
    with metadata_server(told) as environ:
        assert find_peers(environ=environ) == Peers("10.0.0.9:8482", 4, 3)


@pytest.mark.parametrize("known", [{}, {"worker_network_endpoints": "w-0:u:10.128.0.5", "agent_worker_number": "0"}])
def test_a_single_host_of_google_is_alone(known: dict[str, str]) -> None:
    with metadata_server(attributes(**known)) as environ:
        assert find_peers(environ=environ) is None
    with metadata_server(lambda _: (403, "not in this container")) as environ:
        assert find_peers(environ=environ) is None


def test_a_tpu_without_metadata_server_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: seconds == 0 or pytest.fail("waits for what is not there"))
    assert find_peers(environ={"GCE_METADATA_IP": f"127.0.0.1:{free_port()}"}) is None
    assert find_peers(environ={"GCE_METADATA_IP": "metadata.invalid"}) is None


def test_a_metadata_server_in_trouble_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "time", type("Clock", (), {"sleep": staticmethod(lambda _: None)}))
    asked = itertools.count()
    told = attributes(worker_network_endpoints="10.1.0.1,10.1.0.2", agent_worker_number="1")
    with metadata_server(lambda name: told(name) if next(asked) % 2 else (503, "")) as environ:
        assert find_peers(environ=environ) == Peers("10.1.0.1:8482", 2, 1)
    # A host that took itself for the only one would train beside the others, into the same directory.
    with (
        metadata_server(lambda _: (503, "")) as environ,
        pytest.raises(JaxptmError, match=r"worker-network-endpoints \(status 503\).*give --coordinator"),
    ):
        find_peers(environ=environ)


# --- the roll call ---


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def start(port: int) -> Iterator[Callable[..., Future[str]]]:
    """Starts a process's roll call in a thread; its result is the complaint, empty where there is none."""

    def call(index: int, count: int, timeout: float, coordinator: str) -> str:
        try:
            hosts._roll_call(Peers(coordinator, count, index), timeout)
        except JaxptmError as error:
            return str(error)
        return ""

    def submit(index: int, count: int, timeout: float = 20, coordinator: str = f"127.0.0.1:{port}") -> Future[str]:
        return pool.submit(call, index, count, timeout, coordinator)

    with ThreadPoolExecutor(16) as pool:
        yield submit


def results(*calls: Future[str]) -> list[str]:
    return [call.result(60) for call in calls]


def connect(port: int) -> socket.socket:
    """A connection to process 0, which may not listen yet."""
    for _ in range(200):
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=20)
        except OSError:
            time.sleep(0.02)
    raise AssertionError("nobody listens")


def hung_up(line: socket.socket) -> bool:
    try:
        return line.recv(1000) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_all_come_in_any_order(order: tuple[int, ...], start: Callable[..., Future[str]], port: int) -> None:
    calls = []
    for index in order:
        calls.append(start(index, 4))
        time.sleep(0.05)
    assert results(*calls) == [""] * 4
    socket.create_server(("", port)).close()  # free at once, for JAX


@pytest.mark.parametrize("host", ["localhost", "[::1]", "127.0.0.1"])
def test_names_and_both_families(host: str, start: Callable[..., Future[str]], port: int) -> None:
    if host == "[::1]":
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("no IPv6 here")
    assert results(*(start(index, 2, coordinator=f"{host}:{port}") for index in range(2))) == ["", ""]
    if socket.has_dualstack_ipv6():  # as JAX listens
        socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True).close()


def test_all_hear_who_is_missing(start: Callable[..., Future[str]], port: int) -> None:
    complaint = (
        f"process 2, 4 of 5 did not come within 2 s, only 0 on {HERE}, 1 on {HERE}, 3 on {HERE}: start the missing "
        f"ones with the same --coordinator 127.0.0.1:{port}, or raise --timeout."
    )
    assert results(*(start(index, 5, timeout=2) for index in (0, 3, 1))) == [complaint] * 3
    socket.create_server(("", port)).close()


def test_all_hear_of_two_that_claim_one_index(start: Callable[..., Future[str]]) -> None:
    complaint = (
        f"two processes, on {HERE} and on {HERE}, both say that they are process 1: give each its own --process, and "
        "every run a port of its own."
    )
    assert results(*(start(index, 3) for index in (0, 1, 1))) == [complaint] * 3


def test_two_that_claim_index_0(start: Callable[..., Future[str]], port: int) -> None:
    main = start(0, 2)
    with connect(port) as line:
        line.sendall(b"jaxptm 0 of 2 on elsewhere\n")
        said = line.recv(1000).decode()
    assert said.startswith(f"jaxptm: two processes, on {HERE} and on elsewhere, both say that they are process 0:")
    assert results(main) == [said.removeprefix("jaxptm: ").strip()]


def test_all_hear_of_differing_counts(start: Callable[..., Future[str]], port: int) -> None:
    main = start(0, 3)
    connect(port).close()
    early = start(1, 3)
    time.sleep(0.5)
    complaint = (
        f"process 3 of 4 on {HERE} does not belong to the 3 processes that process 0 on {HERE} waits for: start all "
        "with the same --processes, and every run with a port of its own."
    )
    assert results(main, early, start(3, 4)) == [complaint] * 3


def test_process_0_decides_when_to_give_up(start: Callable[..., Future[str]], port: int) -> None:
    main = start(0, 3)
    connect(port).close()
    first = start(1, 3, timeout=0.1)  # to reach process 0; the last one may come later than that
    time.sleep(0.5)
    assert results(main, first, start(2, 3)) == ["", "", ""]


def test_a_process_that_starts_again_is_no_duplicate(start: Callable[..., Future[str]], port: int) -> None:
    main = start(0, 3)
    with connect(port) as line:
        line.sendall(b"jaxptm 1 of 3 on elsewhere\n")
        time.sleep(0.2)
    time.sleep(0.2)
    assert results(main, start(1, 3), start(2, 3)) == ["", "", ""]


def test_a_process_that_died_is_missing(start: Callable[..., Future[str]], port: int) -> None:
    main = start(0, 3, timeout=1)
    with connect(port) as line:
        line.sendall(b"jaxptm 1 of 3 on elsewhere\n")
        time.sleep(0.2)
    assert results(main)[0].startswith(f"process 1, 2 of 3 did not come within 1 s, only 0 on {HERE}:")


def test_a_word_may_come_in_parts(start: Callable[..., Future[str]], port: int) -> None:
    main = start(0, 2)
    with connect(port) as line:
        for part in (b"jaxptm 1", b" of 2 on far", b"away\n"):
            line.sendall(part)
            time.sleep(0.05)
        assert line.recv(1000) == b"jaxptm: \n"
    assert results(main) == [""]


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0",
        b"\0" * 5000,
        b"\xff\xfe\n" * 9,
        b'{"process": 1, "of": 3}\n',
        b"jaxptm -1 of 3 on a\n",
        b"jaxptm 1 of 3 on a",
        b"jaxptm 99999999999999999999 of 3 on a\n",
    ],
)
def test_strangers_do_not_disturb(noise: bytes, start: Callable[..., Future[str]], port: int) -> None:
    main = start(0, 3)
    lines = [connect(port) for _ in range(3)]  # that stay, and say nothing more
    for line in lines:
        line.sendall(noise)
    assert results(main, start(1, 3), start(2, 3)) == ["", "", ""]
    for line in lines:
        assert hung_up(line)
        line.close()
    socket.create_server(("", port)).close()


def test_strangers_do_not_prolong_the_wait(start: Callable[..., Future[str]], port: int) -> None:
    main = start(0, 2, timeout=1)
    for _ in range(10_000):
        if main.done():
            break
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except OSError:
            time.sleep(0.01)
    assert results(main)[0].startswith("process 1 of 2 did not come within 1 s")


def test_a_port_in_use(start: Callable[..., Future[str]], port: int) -> None:
    with socket.create_server(("", port)):
        said = results(start(0, 2))[0]
    assert said == (
        f"process 0 cannot listen on port {port} (Address already in use): choose another port in --coordinator (or "
        "JAX_COORDINATOR_PORT), and start one process 0 only."
    )


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("127.0.0.1", "Connection refused"),
        ("nowhere.invalid", r"[^)]+"),
        (f"{'a' * 64}.invalid", "it does not answer"),  # longer than a name may be
    ],
)
def test_an_unreachable_coordinator(host: str, reason: str, start: Callable[..., Future[str]], port: int) -> None:
    said = results(start(1, 2, timeout=0.5, coordinator=f"{host}:{port}"))[0]
    start_ = re.escape(f"process 1 on {HERE} did not reach process 0 at {host}:{port} within 0.5 s (")
    assert re.fullmatch(rf"{start_}{reason}\): start it, check the address .*", said)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (b"", "it hung up"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what listens there is no process 0 that starts"),
        (b"jaxptm 1 of 2 on here\n", "what listens there is no process 0 that starts"),  # its own echo
        (b"jaxptm: ", "what listens there is no process 0 that starts"),  # process 0 died as it wrote
        (b"\xff\0\n", "what listens there is no process 0 that starts"),
    ],
)
def test_a_coordinator_that_is_something_else(
    reply: bytes, reason: str, start: Callable[..., Future[str]], port: int
) -> None:
    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(0.02)
        call = start(1, 2, timeout=0.5)
        while not call.done():
            try:
                line, _ = server.accept()
            except TimeoutError:
                continue
            with line:
                line.settimeout(20)
                assert line.recv(1000) == f"jaxptm 1 of 2 on {HERE}\n".encode()
                line.sendall(reply)
    assert f" within 0.5 s ({reason}): " in results(call)[0]


def test_it_goes_on_when_what_listened_has_gone(start: Callable[..., Future[str]], port: int) -> None:
    with socket.create_server(("127.0.0.1", port)) as server:  # process 0 of a run before
        call = start(1, 2)
        with server.accept()[0]:
            pass
    assert results(start(0, 2), call) == ["", ""]


def test_joining_leaves_nothing_to_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[object] = []
    monkeypatch.setattr(hosts, "_roll_call", lambda peers, timeout: steps.append((peers, timeout)))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **named: steps.append((given, named)))
    peers = Peers("a:1", 4, 2, (2,))
    hosts.join(peers, 7)
    expected = {
        "local_device_ids": (2,),
        "cluster_detection_method": "deactivate",
        "initialization_timeout": 60,
        "heartbeat_timeout_seconds": 10,
    }
    assert steps == [(peers, 7), (("a:1", 4, 2), expected)]


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_wait_that_is_none(timeout: float) -> None:
    with pytest.raises(JaxptmError, match=f"--timeout {timeout:g}: give the seconds"):
        hosts.join(Peers("a:1", 2, 0), timeout)


# --- together ---


def test_one_process_is_together_with_itself() -> None:
    assert hosts.is_main()
    assert hosts.exchange("a\0") == ["a\0"]
    with hosts.together():
        pass
    error = KeyError("x")
    with pytest.raises(KeyError) as caught, hosts.together():
        raise error
    assert caught.value is error


def test_those_that_did_well_name_those_that_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "exchange", lambda mine: [mine, "b: no file", "", "c: no disk"])
    with pytest.raises(JaxptmError, match=r"\Aprocess 1 on b: no file\nprocess 3 on c: no disk\Z"), hosts.together():
        pass
    with pytest.raises(ZeroDivisionError), hosts.together():  # who failed says its own
        _ = 1 / 0
    monkeypatch.setattr(hosts, "exchange", lambda mine: [mine, ""])
    with hosts.together():
        pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (JaxptmError("key: not known."), "key: not known."),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError(), "ValueError: "),  # never an empty message, which would mean that all is well
        (FileNotFoundError(2, "No such file", "a"), "FileNotFoundError: [Errno 2] No such file: 'a'"),
    ],
)
def test_what_the_others_are_told(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(hosts, "exchange", lambda mine: told.append(mine) or [mine, ""])
    with pytest.raises(type(error)), hosts.together():
        raise error
    assert told == [f"{HERE}: {message}"]


def test_an_error_outlives_the_loss_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: str) -> list[str]:
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(hosts, "exchange", lost)
    with pytest.raises(FileNotFoundError), hosts.together():
        raise FileNotFoundError("mine")
    with pytest.raises(jax.errors.JaxRuntimeError), hosts.together():  # here it is the only news
        pass


@pytest.mark.parametrize(
    ("message", "received"),
    [
        ("", ""),
        ("größer – 大", "größer – 大"),
        ("é" * 4000, "é" * (hosts.MESSAGE_BYTES // 2)),
        ("a" + "é" * 4000, "a" + "é" * (hosts.MESSAGE_BYTES // 2 - 1)),  # no half letters
        ("a path \udcff", "a path ?"),  # a file name that is no UTF-8
    ],
)
def test_messages_survive_the_exchange(message: str, received: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = np.zeros(hosts.MESSAGE_BYTES, np.uint8)
    other[:2] = list(b"ok")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: np.stack([mine, other]))
    assert hosts.exchange(message) == [received, "ok"]


def test_ranks_of_mpich_are_processes() -> None:
    alone = {"PMI_SIZE": "4", "PMI_RANK": "2", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "4"}
    assert find_peers(environ=alone) == Peers("127.0.0.1:61440", 4, 2, (2,))
    spread = {"PMI_SIZE": "4", "PMI_RANK": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
    assert find_peers("10.0.0.1:99", environ=spread) == Peers("10.0.0.1:99", 4, 2, None)
    with pytest.raises(JaxptmError, match="--coordinator missing"):
        find_peers(environ=spread)

"""Set up before anything imports jax: eight CPU devices, no network, shapes and types checked at every call."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little. Without LLVM's optimisations a compilation takes half the time, and without
# MLIR under each fusion half of that.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # most of the time is XLA's: what is compiled once serves all tests
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxptm-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: torch's threads would wait for each other, spinning
    os.environ["OMP_NUM_THREADS"] = "1"

from jaxtyping import install_import_hook

# Every annotation of jaxptm is enforced while the tests run, and costs nothing outside them.
install_import_hook("jaxptm", "strict_types.typechecked")

import jax
import pytest

# Broadcasting between ranks hides errors: [B] against [B, L] must be written out.
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real corpora, tasks and vocabularies beside the repository; without them the tests that ask are skipped."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is absent")
    return SHARED_DATA


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds whatever a reader of the documentation has; see `tests/reader.py`."""
    from reader import furnish

    home = tmp_path_factory.mktemp("reader")
    furnish(home)
    return home

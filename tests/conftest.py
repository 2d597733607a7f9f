"""Tests run on the CPU, seen as two devices, with data sets and compiled code in a folder of their own."""
import os
import sys
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"  # all before JAX is first imported
os.environ["OMP_NUM_THREADS"] = "1"  # else the trees of two processes wait for each other
# else the key of compiled code holds the path of the cache, which is another one in each file
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"
# Most of the time goes into compiling: a third of it without optimisation and, up to jax 0.11, without
# the emitters of fusions in MLIR (a later one does not know this option of the back end and ignores it).
XLA_FLAGS = (" --xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
             " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
             " --xla_cpu_parallel_codegen_split_count=1")  # two processes keep both cores busy
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + XLA_FLAGS
sys.path.insert(0, str(Path(__file__).parent.parent))


LONG = ("fm", "gan", "calodream", "vae", "vqgan", "latent_fm", "diffusion", "iaf", "export", "layers",
        "benchmarks", "errors", "weights", "channels", "kill", "judge", "data", "common")


def pytest_collection_modifyitems(items):
    """Long files first, so that the two processes end together."""
    names = [f"test_{name}" for name in LONG]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    os.environ["ZDC_CACHE"] = str(folder)  # os.environ, so that the commands that tests start see it as well
    import common  # after the flags above
    common.prepare_jax()
    return folder


@pytest.fixture(scope="module")
def small_detectors(tmp_path_factory):
    """Small detectors for the rest of a file."""
    import tiny
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink_detectors(patch, tmp_path_factory.mktemp("data"))
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_code():
    """Lets go of what a file compiled: executables take memory maps, and a process crashes that has used up
    the 65 530 that Linux allows."""
    import jax  # after the flags above
    yield
    jax.clear_caches()

"""Few threads, since the models are tiny, the same hypothesis examples in every run, and GPU tests that stand alone."""

import gc
import os

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

os.environ.pop("COLUMNS", None)  # of pytest-xdist's workers; a console is as wide as each test says
if "PYTEST_XDIST_WORKER" in os.environ:  # in each of them torch.compile would start as many processes as cores
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
torch.set_num_threads(1)  # two would wait for each other longer than they work
transformers.logging.set_verbosity_error()
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def leaves_the_gpu_as_it_was():
    """After a test on a GPU its memory is free for other processes, and waiting for the device is allowed again.

    Nothing mends a process whose kernel went out of bounds or whose capture broke off: all its later tests would fail.
    It ends here, the test counts as failed, and pytest-xdist has a new process run the others.
    """
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.set_sync_debug_mode("default")
        torch.rand(1, device="cuda").item()  # a broken capture spoils the random numbers
        torch.cuda.empty_cache()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise


@pytest.fixture
def collected():
    """A function that collects garbage: what only a cycle keeps alive is gone after it."""

    def collect():
        for _ in range(3):
            gc.collect()

    return collect

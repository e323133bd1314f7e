"""Few threads, since the models are tiny, and the same hypothesis examples in every run."""

import gc
import os

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

os.environ.pop("COLUMNS", None)  # of pytest-xdist's workers; a console is as wide as each test says
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


@pytest.fixture
def collected():
    """A function that collects garbage: what only a cycle keeps alive is gone after it."""

    def collect():
        for _ in range(3):
            gc.collect()

    return collect

"""Tests that need a CUDA device; ``pytest tests/gpu`` on a machine that has one."""

from collections.abc import Iterator

import pytest
import torch

from megatron_spear.config.schema import PolicySection
from megatron_spear.policy import parallel
from megatron_spear.policy.parallel import ParallelContext


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def ctx() -> Iterator[ParallelContext]:
    """One rank on the GPU."""
    yield parallel.initialize(PolicySection(), seed=0)
    parallel.destroy()

"""Tests against real rollout servers; ``pytest tests/engines`` where their environments are built.

They are no part of tools/test.sh: a server takes up to two minutes to start.
"""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "engines":
            item.add_marker(pytest.mark.real_engine)

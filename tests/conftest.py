"""The longest files run first: a worker that ended with one would leave the other idle. What tests keep
of studies is theirs, outside the repository and the user's own cache."""

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="valor-tests-")
os.environ["VALOR_CACHE"] = _CACHE.name
FIRST = [
    "test_commands",
    "test_train",
    "test_entities",
    "test_papermill",
    "test_two_processes",
    "test_preference",
    "test_at_size",
    "test_resume",
    "test_graph",
    "test_convert",
    "test_experts",
]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))

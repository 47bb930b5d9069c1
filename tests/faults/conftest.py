"""The job that the faults come upon."""

import pytest

from tests.faults.task import Task


@pytest.fixture(scope="session")
def task(tiny, tmp_path_factory):
    return Task(tiny, tmp_path_factory.mktemp("faults"))

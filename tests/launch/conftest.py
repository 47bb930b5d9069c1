import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.pretend import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    for pid in world.world.glob("worker-*/latent_delib/runs/job/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass

"""Shared by every test: the project root on sys.path, one torch thread, the place of the shared real EEG, and slow tests asked for by name."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")          # the suite runs on 2 cores, often beside child processes


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long sweeps too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long sweep, runs with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long sweep: run with --slow"))


@pytest.fixture
def shared():
    """Folder of real EEG and the Modal stand-in, which is not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("real EEG folder ../shared is absent")
    return SHARED

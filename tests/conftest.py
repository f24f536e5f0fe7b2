"""Hermes reads its home when it is imported: before that, give the tests one that is not the user's.

A shell's home too: a test that ends a login shell must leave none of the user's locks behind (with pyenv's, each later
login waits for a minute), and none depends on what the user's profile does.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Before numpy is imported. With matrices as small as those of the tests' models, OpenBLAS' threads mostly wait for one
# another, and keep the cores busy with it.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from tiny_llama import write_llama

from hermes_atropos.hermes.profile import use_training_profile

pytest.register_assert_rewrite("support")
_shell_home = os.environ["HOME"] = tempfile.mkdtemp(prefix="hermes-atropos-tests-")
use_training_profile()
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait, for another process or for time to pass."""
    return (os.cpu_count() or 1) + 1


def pytest_unconfigure() -> None:
    shutil.rmtree(_shell_home, ignore_errors=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama."""
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of the same shape."""
    return write_llama(tmp_path_factory.mktemp("other"), seed=1)

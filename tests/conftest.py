"""One thread a process (pytest runs two), seeds, and a cache of tokenizers and token stores shared by the whole run."""

from __future__ import annotations

import getpass
import os
import tempfile

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch is imported, here and in the subprocesses of tests
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network
# what torch's compiler made for an earlier run of the suite is used again: its own default place, not a session's cache
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
)
for _name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
    os.environ.pop(_name, None)

import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton, which reads it then

sys.path.insert(0, str(Path(__file__).parent))  # for update_rows
_OWN_CACHE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """One cache folder for the session: made by the first process, inherited by the workers of xdist."""
    torch.set_num_threads(1)
    if not hasattr(config, "workerinput"):
        config.stash[_OWN_CACHE] = os.environ["FEWBITS_CACHE"] = tempfile.mkdtemp(prefix="fewbits-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Whoever made the cache removes it."""
    if folder := config.stash.get(_OWN_CACHE, None):
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") or "gpu" in Path(item.path).parent.parts:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _same_every_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts from the same random state, whatever ran before it in this process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32, "a test or the code changed torch's default dtype"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of three small text files, enough for tiny trainings."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        lines = (f"{number} times {i} is {number * i}; the sum is {number + i}.\n" for i in range(400))
        (folder / f"table{number}.txt").write_text("".join(lines), encoding="utf-8")
    return folder

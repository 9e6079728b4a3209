"""What tests share: golden numbers (in the folder SEGADAPT_REFERENCE, or the copies here) and both backends."""
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def reference_dir() -> Path:
    return Path(os.environ.get("SEGADAPT_REFERENCE") or Path(__file__).parent / "reference")


def load_reference(name: str):
    """(scalars and key lists, arrays) of one pair of golden files."""
    return json.loads((reference_dir() / f"{name}.json").read_text()), np.load(reference_dir() / f"{name}.npz")


def fill(keys, seed: int, prefix: str = "") -> dict:
    """The reference's deterministic float64 weights (reference/weights.py) for a list of [key, shape]."""
    sys.path.insert(0, str(reference_dir()))
    try:
        import weights
    finally:
        sys.path.pop(0)
    return weights.fill_state_dict(keys, seed, as_torch=True, prefix=prefix)


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Path:
    """A tiny rendered pair of domains, to be read only."""
    from scripts import render

    return render(tmp_path_factory.mktemp("rendered") / "pair")


@pytest.fixture
def folder(tmp_path):
    """For snapshots of some hundred MB, which are not kept."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def in_this_process(monkeypatch):
    """For script.main() here: PyTorch's operators and one thread, which give the bits of the scripts' subprocesses."""
    import torch

    from lib import ops

    monkeypatch.setenv("SEGADAPT_OPS", "reference")
    before, threads = ops.use("reference"), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    ops.use(before)


@pytest.fixture(params=["reference", "compiled"])
def backend(request):
    """Runs a test with both implementations of the operators."""
    from lib import ops  # torch: only where a test needs it
    from lib.ops.build import load

    if request.param == "compiled" and load("cpu"):
        pytest.skip(f"not compiled: {load('cpu')}")
    before = ops.use(request.param)
    yield request.param
    ops.use(before)


@pytest.fixture
def compiled():
    """Skips a test where csrc/ is not compiled."""
    from lib.ops.build import load

    if load("cpu"):
        pytest.skip(f"not compiled: {load('cpu')}")

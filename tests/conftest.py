"""What tests share: golden numbers (in the folder SEGADAPT_REFERENCE, or the copies here) and both backends."""
import ctypes
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

# One thread for networks of a few parameters: to share out their work takes longer than to do it, and many times as
# long where other processes run. all_cores is for the others; they sleep while they wait. Read when torch is loaded.
CORES = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def reference_dir() -> Path:
    return Path(os.environ.get("SEGADAPT_REFERENCE") or Path(__file__).parent / "reference")


def load_reference(name: str):
    """(scalars and key lists, arrays) of one pair of golden files; without them the test module is skipped."""
    files = [reference_dir() / f"{name}.{suffix}" for suffix in ("json", "npz")]
    for file in files:
        if not file.exists():
            pytest.skip(f"{file} does not exist", allow_module_level=True)
    return json.loads(files[0].read_text()), np.load(files[1])


def cases(pattern: str, names) -> list[re.Match]:
    """The names that match ``pattern`` as a whole, in their order."""
    return [match for match in (re.fullmatch(pattern, name) for name in names) if match]


def skipped(case: str, reason: str):
    """A parameter of pytest for a case that is in the files and cannot be run."""
    return pytest.param(case, marks=pytest.mark.skip(reason=f"{case}: {reason}"))


def scaled(data, name: str):
    """float64 tensor of an array that is stored as integers, name_x64 being 64 times its value."""
    import torch

    match, = cases(rf"{re.escape(name)}_x(\d+)", data.files)
    return torch.from_numpy(data[match.string]).double() / int(match[1])


def every(data, name: str) -> tuple[str, tuple[slice, int]]:
    """(the array that holds every n-th channel or pixel of ``name``, or all of it; what it holds of a [N, C, ..])."""
    for match in cases(rf"{re.escape(name)}(_every_(\d+)\w\w_(channel|pixel))?", data.files):
        n = slice(None, None, int(match[2] or 1))
        return match.string, (slice(None), slice(None), n, n) if match[3] == "pixel" else (slice(None), n)
    raise KeyError(name)


def fill(keys, seed: int, prefix: str = "", checksums=None) -> dict:
    """The reference's deterministic float64 weights (weights.py of the set) for a list of [key, shape].

    checksums: {key: [sum, L2 norm]} of some of them, to be checked.
    """
    sys.path.insert(0, str(reference_dir()))
    try:
        import weights
    finally:
        sys.path.pop(0)
    state = weights.fill_state_dict(keys, seed, as_torch=True, prefix=prefix)
    for key, (total, norm) in (checksums or {}).items():
        assert weights.checksum(state[key]) == pytest.approx((total, norm), rel=1e-9, abs=1e-9 * norm), key
    return state


def with_weights(net, state: dict):
    """A network of the meta device, whose own weights nobody drew, with copies of these."""
    net.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    return net


@pytest.fixture
def all_cores():
    """For tests whose arithmetic takes the time, or is about threads; OMP_NUM_THREADS counts where it is set."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def freed_memory_is_kept():
    """For modules that train large networks: glibc would map and clear the gradients of each pass anew, which takes
    longer than the arithmetic. Afterwards the memory goes back to the system.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        yield
        return
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
    yield
    libc.mallopt(mmap_max, 65536)
    libc.mallopt(trim_threshold, 128 << 10)
    libc.malloc_trim(0)


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
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(deterministic)
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


class CudaKernels:
    """The kernels of csrc/cuda, on a GPU or emulated for CPU tensors (tests/cuda_emulation)."""

    def __init__(self, emulated: bool, monkeypatch):
        self.emulated, self.monkeypatch = emulated, monkeypatch

    def to(self, x):
        """A CPU tensor on the device whose kernels are tested (anything else as it is)."""
        import torch

        return x.clone() if self.emulated and torch.is_tensor(x) else x.cuda() if torch.is_tensor(x) else x

    def run(self, function):
        """function(to) with the CUDA kernels, to being what moves its tensors; its tensors, on the CPU."""
        import torch

        from lib.ops import build

        with self.monkeypatch.context() as patch:
            if self.emulated:
                patch.setattr(build, "kernels", lambda: torch.ops.segadapt_emulated)
            return [x.cpu() if torch.is_tensor(x) else x for x in function(self.to)]


@pytest.fixture(params=["emulated", "cuda"])
def cuda(request, monkeypatch):
    """Runs a test with the CUDA kernels where there is a GPU, and emulated where g++ is."""
    import cuda_emulation
    import torch

    if request.param == "emulated":
        if cuda_emulation.reason_against():
            pytest.skip(cuda_emulation.reason_against())
        cuda_emulation.load()
    elif not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return CudaKernels(request.param == "emulated", monkeypatch)

"""Runs csrc/cuda/*.cu without a GPU, so that what they compute is tested on every x86-64 machine with g++.

build() compiles the sources as they stand with g++ against include/ (CUDA's language) and scheduler.cpp (its threads);
only launches, kernel<<<grid, block>>>(...), extern __shared__ and the registration are rewritten. load() registers the
kernels as torch.ops.segadapt_emulated.*, for CPU tensors. It says nothing of speed, of memory order between blocks, of
the GPU's own exp and sqrt in float64, or of cuBLAS: products are the CPU's.
"""
from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lib.ops import build as ops_build

HERE = Path(__file__).parent
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
LAUNCH = re.compile(r"\b([A-Za-z_]\w*(?:<[^<>;(){}]*>)?)\s*<<<(.*?)>>>\(", re.S)
SHARED = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")


def reason_against() -> str:
    """Why it cannot run here, or ""."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "CUDA is emulated on x86-64 Linux only"
    return "" if shutil.which("g++") else "needs g++"


def translate(source: str, name: str) -> str:
    """The .cu file as C++; line numbers stay."""
    source = LAUNCH.sub(lambda m: f'::emulated::launch("{m[1]}", [=](auto... arguments) {{ {m[1]}(arguments...); }}, '
                                  f"{m[2]})(", source)
    source = SHARED.sub(r"\1* \2 = static_cast<\1*>(::emulated::shared_memory);", source)
    source = source.replace("TORCH_LIBRARY_IMPL(segadapt, CUDA, m)", "TORCH_LIBRARY_IMPL(segadapt_emulated, CPU, m)")
    return f'#include "emulation.h"\n#line 1 "{name}"\n{source}'


def build(sanitizer: str = "") -> Path:
    """Compiles unless the cached library is current; its path. sanitizer: "", "address,undefined" or "thread"."""
    sources = sorted(ops_build.CSRC.glob("cuda/*.cu"))
    torch_root = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-mfma", "-w"]
    # The kernels alone: PyTorch's headers are full of what the sanitizer for undefined behaviour calls errors.
    flags += [f"-fsanitize={sanitizer}", "-fno-sanitize=vptr", "-g1"] if sanitizer else []
    include = [f"-I{p}" for p in (HERE / "include", ops_build.CSRC, torch_root / "include",
                                  torch_root / "include/torch/csrc/api/include")]
    key = hashlib.sha256(f"{torch.__version__} {flags} {ops_build._version('g++')}".encode())
    for path in sorted([*HERE.rglob("*"), *ops_build.CSRC.rglob("*")]):
        if path.is_file() and path.suffix in (".h", ".cu", ".cpp", ".py") and path.parent.name != "cpu":
            key.update(path.read_bytes())
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "segadapt")
    library = root / f"segadapt-emulated-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder = root / f"emulated-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        inputs = [HERE / "scheduler.cpp"]
        for source in sources:
            inputs.append(folder / f"{source.stem}.cpp")
            inputs[-1].write_text(translate(source.read_text(), str(source)))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
            list(pool.map(lambda i: run("g++", *flags_for(i, flags), *include, "-c", i, "-o", folder / f"{i.stem}.o"),
                          inputs))
        run("g++", "-shared", *flags, *(folder / f"{i.stem}.o" for i in inputs), "-o", folder / "all.so",
            f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10")
        os.replace(folder / "all.so", library)
    finally:
        shutil.rmtree(folder)
    return library


def flags_for(source: Path, flags: list[str]) -> list[str]:
    """The scheduler stays out of the thread sanitizer's sight."""
    if source.name != "scheduler.cpp" or "-fsanitize=thread" not in flags:
        return flags
    return [*(f for f in flags if f != "-fsanitize=thread"), "-DSEGADAPT_THREAD_SANITIZER"]


def run(*command) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


@functools.cache
def load() -> ctypes.CDLL:
    """Declares torch.ops.segadapt_emulated with the schemas of lib.ops and loads its kernels; once per process."""
    for name, operator in ops_build.operators.items():
        torch.library.define(f"segadapt_emulated::{name}", operator.schema[len(name):])
    library = build(os.environ.get("SEGADAPT_SANITIZER", ""))
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


def set_order(order: str, seed: int = 0) -> None:
    load().segadapt_emulation_order(ORDERS[order], seed)

"""Declaring operators, and building and loading the compiled kernels of csrc/.

An operator is declared with its schema and its PyTorch reference, which is its default kernel; loading the compiled
library only overrides the reference on the CPU or on CUDA. Copy this for a new one:

    @operator("scaled_sum(Tensor x, float scale) -> Tensor")
    def _scaled_sum(x, scale):
        return x.sum() * scale                          # the reference, for every device

    @_scaled_sum.register_fake
    def _(x, scale):
        return x.new_empty(())                          # shape and dtype alone, for torch.compile and opcheck

    _scaled_sum(x, 2.0)                                 # compiled where there is a kernel, unless use("reference")
    _scaled_sum.reference(x, 2.0)                       # the reference

and in csrc/cpu/*.cpp (or csrc/cuda/*.cu, with CUDA for CPU), without a schema:

    TORCH_LIBRARY_IMPL(segadapt, CPU, m) { m.impl("scaled_sum", segadapt::scaled_sum); }

csrc/cpu and csrc/cuda become one library each, so that CUDA sources that fail to build cost no CPU kernel. The mode and
the loaded libraries are the only state.
"""
from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from lib.errors import UserError

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CUDA_ARCHITECTURES = ("75", "80", "86", "89", "90")  # and PTX of the last
DIGEST_BYTES = 32
operators: dict[str, Operator] = {}  # all that are declared
_state = {"mode": os.environ.get("SEGADAPT_OPS", "auto")}


# ---- declaring and choosing ----------------------------------------------------------------------------------------

class Operator:
    """torch.ops.segadapt.<name> and its PyTorch reference; calling it runs what use() asks for."""

    def __init__(self, schema: str, reference: Callable):
        self.name, self.schema, self.reference = schema.partition("(")[0], schema, reference
        torch.library.define(f"segadapt::{self.name}", schema[len(self.name):])
        torch.library.impl(f"segadapt::{self.name}", "default", reference)
        functools.update_wrapper(self, reference)
        operators[self.name] = self

    def __call__(self, *args):
        library = kernels()
        return self.reference(*args) if library is None else getattr(library, self.name)(*args)

    def register_fake(self, fake: Callable) -> Callable:
        return torch.library.register_fake(f"segadapt::{self.name}", fake)


def operator(schema: str) -> Callable[[Callable], Operator]:
    """Declares segadapt::<schema> with the decorated function as its default kernel (see the module's docstring)."""
    return functools.partial(Operator, schema)


def use(mode: str) -> str:
    """Sets this process's implementation: "auto" (compiled where it builds), "compiled" (or UserError), "reference".

    "auto" means SEGADAPT_OPS where that is set. Returns the mode before.
    """
    if mode not in ("auto", "compiled", "reference"):
        raise UserError(f"ops must be auto, compiled or reference, not {mode!r} (check --ops or SEGADAPT_OPS)")
    before = _state["mode"]
    _state["mode"] = os.environ.get("SEGADAPT_OPS", "auto") if mode == "auto" else mode
    if _state["mode"] == "compiled":
        require_compiled()
    return before


def backend() -> str:
    """"compiled" or "reference": what CPU tensors get. Builds if necessary."""
    return "compiled" if kernels() is not None and not load("cpu") else "reference"


def require_compiled() -> None:
    """UserError that says why unless the compiled library is loaded."""
    reason = load("cpu")
    if reason:
        raise UserError(f"the compiled operators are not available: {reason}")


def kernels():
    """The operators with every kernel loaded that there is, or None where the references are wanted."""
    if _state["mode"] == "reference":
        return None
    if _state["mode"] == "compiled":
        require_compiled()
    _load_all()
    return torch.ops.segadapt


@functools.cache
def _load_all() -> None:
    """Loads what this machine can use; one warning for each library that it should have and has not."""
    reason = load("cpu")
    if reason:
        warnings.warn(f"no compiled operators, using the PyTorch reference (same results, slower): {reason}",
                      stacklevel=4)
    if torch.cuda.is_available() and shutil.which("nvcc"):
        reason = load("cuda")
        if reason:
            warnings.warn(f"no CUDA kernels, using the PyTorch reference on the GPU (slower): {reason}", stacklevel=4)


@functools.cache
def load(device: str) -> str:
    """Builds csrc/<device> if necessary and loads it, once per process: "" or, in one line, the reason why not."""
    try:
        library = build(device)
        try:
            torch.ops.load_library(library)
        except OSError:  # made for another system
            library.unlink(missing_ok=True)
            torch.ops.load_library(build(device))
    except (UserError, OSError) as error:
        return " ".join(str(error).split())
    return ""


# ---- building ------------------------------------------------------------------------------------------------------

def build(device: str = "cpu") -> Path:
    """Compiles csrc/<device> unless the cached library is current; its path. Safe in several processes at once.

    device: "cpu", or "cuda" (needs nvcc and a PyTorch with CUDA). Raises UserError when something is missing or fails.
    """
    suffix = {"cpu": "cpp", "cuda": "cu"}[device]
    sources = sorted((CSRC / device).glob(f"*.{suffix}"))
    if not sources:
        raise UserError(f"no csrc/{device} folder beside lib/")
    if device == "cuda" and torch.version.cuda is None:
        raise UserError("this PyTorch is built without CUDA: the CUDA sources can be compiled but not linked")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "segadapt")
    library = root / f"segadapt-{device}-{_key(device)}.so"
    if _is_whole(library):
        return library
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system even when its holder is killed
            if not _is_whole(library):
                _compile(device, sources, library)
    except OSError as error:
        raise UserError(f"cannot write to {root}: {error}; set TORCH_EXTENSIONS_DIR") from error
    return library


def _compile(device: str, sources: list[Path], library: Path) -> None:
    from torch.utils import cpp_extension  # slow to import, needed here only

    if not _compiler():
        raise UserError("no C++ compiler found (install g++ or clang++, or set CXX)")
    with _path_with(Path(sys.executable).parent):
        if not cpp_extension.is_ninja_available():
            raise UserError("ninja not found (pip install ninja)")
        if device == "cuda" and not os.environ.get("CUDA_HOME"):
            cpp_extension.CUDA_HOME = str(cuda_root())
        start = time.monotonic()
        print(f"lib.ops: compiling csrc/{device} (once, a minute or two) ... ", end="", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            try:
                cpp_extension.load("segadapt", [str(s) for s in sources], extra_cflags=[*_flags(), "-fopenmp"],
                                   extra_cuda_cflags=["-O3"], extra_ldflags=["-fopenmp"],
                                   extra_include_paths=[str(CSRC)], build_directory=folder,
                                   with_cuda=device == "cuda", is_python_module=False)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                # load() has compiled and failed to load, or did not compile.
                print("failed", file=sys.stderr)
                log = library.with_name("failed.log")
                log.write_text(str(error))
                first = re.search(r"^.*\b(?:error|Error)\b.*$", str(error).partition("\n")[2], re.M)
                raise UserError(f"compiling csrc/{device} failed ({first[0].strip() if first else error}); "
                                f"everything: {log}") from error
            built, = Path(folder).glob("*.so")  # PyTorch numbers what one process builds: segadapt_v1.so
            with open(built, "ab") as file:
                file.write(hashlib.sha256(built.read_bytes()).digest())
            os.replace(built, library)
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)


def _is_whole(library: Path) -> bool:
    """Whether the file ends with the digest of what precedes it: opening a truncated library kills the process."""
    if not library.exists():
        return False
    data = library.read_bytes()
    return hashlib.sha256(data[:-DIGEST_BYTES]).digest() == data[-DIGEST_BYTES:]


def _key(device: str) -> str:
    """Differs wherever the compiled library might: several machines may share one cache folder."""
    parts = [torch.__version__, str(torch.version.cuda), *_flags(), _cpu(), " ".join(platform.libc_ver()),
             _version(_compiler())]
    if device == "cuda":
        parts += [_version(shutil.which("nvcc")), os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
                  *(str(torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count()))]
    key = hashlib.sha256("\n".join(parts).encode())
    other = {"cpu": "cuda", "cuda": "cpu"}[device]
    for path in sorted(p for p in CSRC.rglob("*") if p.is_file() and other not in p.relative_to(CSRC).parts):
        key.update(str(path.relative_to(CSRC)).encode() + path.read_bytes())
    return key.hexdigest()[:16]


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "c++") or (None if os.environ.get("CXX") else shutil.which("g++"))


def _version(compiler: str | None) -> str:
    if not compiler:
        return "none"
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def _flags() -> list[str]:
    arch = os.environ.get("SEGADAPT_ARCH", "native")
    return ["-O3", "-fno-math-errno", "-ffp-contract=off",
            f"-mcpu={arch}" if platform.machine() in ("aarch64", "arm64") else f"-march={arch}"]


def _cpu() -> str:
    """What -march=native depends on."""
    with contextlib.suppress(OSError):
        found = re.search(r"^(flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.M)
        return found[0] if found else ""
    return platform.processor()


@contextlib.contextmanager
def _path_with(folder: Path):
    """ninja is installed beside the interpreter, which need not be on the PATH."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{before}{os.pathsep}{folder}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


# ---- CUDA without a GPU --------------------------------------------------------------------------------------------

def compile_cuda(folder: Path) -> list[Path]:
    """Compiles each csrc/cuda/*.cu for every supported architecture into object files in folder, without linking.

    Needs nvcc alone: neither a GPU nor a PyTorch with CUDA. Raises UserError with the compiler's message.
    """
    from torch.utils import cpp_extension

    root = cuda_root()
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
    targets.append("-gencode=arch=compute_{0},code=compute_{0}".format(CUDA_ARCHITECTURES[-1]))
    # Headers that CMake writes exist only in a PyTorch with CUDA; this one holds nothing but build options.
    macros = folder / "c10/cuda/impl/cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True, exist_ok=True)
    macros.write_text("#pragma once\n")
    include = [f"-I{p}" for p in (CSRC, *cpp_extension.include_paths(), folder)]
    objects = []
    for source in sorted(CSRC.glob("cuda/*.cu")):
        objects.append(folder / f"{source.stem}.o")
        command = [str(root / "bin/nvcc"), "-c", str(source), "-o", str(objects[-1]), "-O3", "-std=c++20",
                   "--threads=0", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC", *targets, *include]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{source.name} does not compile:\n{done.stderr.strip()}")
    return objects


def cuda_root() -> Path:
    """CUDA_HOME, or the toolkit that nvcc itself names: nvcc on the PATH may be a wrapper far from its toolkit."""
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"])
    nvcc = shutil.which("nvcc")
    if not nvcc:
        raise UserError("nvcc not found: install the CUDA toolkit or set CUDA_HOME")
    dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.M)
    if not top:
        raise UserError(f"{nvcc} does not name its toolkit: set CUDA_HOME")
    return Path(top[1].strip()).resolve()

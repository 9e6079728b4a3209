"""Custom operators: cycle association and class-balanced pseudo-labels, compiled when csrc/ builds, PyTorch otherwise.

Every public function picks the compiled operator where one exists for the tensor's device and the PyTorch reference (also the
tests' oracle) elsewhere, with the same results. csrc/ is compiled on first use, cached by content, and optional:

    python -m lib.ops --build [--cuda]     builds ahead (and checks that the CUDA sources compile for every architecture)
    use("auto" | "compiled" | "reference") what a script's --ops does; the environment variable SEGADAPT_OPS sets the default
    SEGADAPT_ARCH=x86-64-v3                replaces the default -march=native (-mcpu=native on arm64)
    TORCH_EXTENSIONS_DIR                   where the compiled library is kept (default ~/.cache/segadapt)

The mode and the loaded library are the module's only state.
"""
from __future__ import annotations

import argparse
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
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.errors import UserError

CSRC = Path(__file__).resolve().parent.parent / "csrc"
CUDA_ARCHITECTURES = ("75", "80", "86", "89", "90")  # and PTX of the last
_state = {"mode": os.environ.get("SEGADAPT_OPS", "auto")}


# ---- building and choosing ----------------------------------------------------------------------------------------------

def use(mode: str) -> None:
    """Choose the implementation for this process: "auto" (compiled where it builds), "compiled" (or UserError), "reference"."""
    if mode not in ("auto", "compiled", "reference"):
        raise UserError(f"ops must be auto, compiled or reference, not {mode!r} (check --ops or SEGADAPT_OPS)")
    _state["mode"] = mode
    if mode == "compiled":
        require_compiled()


def backend() -> str:
    """ "compiled" or "reference": what CPU tensors get (and CUDA tensors where torch has CUDA). Builds when necessary."""
    return "compiled" if _kernel("mutual_argmax", torch.device("cpu")) else "reference"


def require_compiled() -> None:
    """UserError that says why unless the compiled library is loaded."""
    reason = _load()
    if reason:
        raise UserError(f"the compiled operators are not available: {reason}")


def _kernel(name: str, device: torch.device):
    """torch.ops.segadapt.<name> when it is compiled for the device, else None."""
    if _state["mode"] == "reference":
        return None
    reason = _load()
    if reason:
        if _state["mode"] == "compiled":
            require_compiled()
        _warn_once(reason)
        return None
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(f"segadapt::{name}", key):
        return None
    return getattr(torch.ops.segadapt, name)


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"compiled operators not available, using the PyTorch reference (same results, slower): {reason}", stacklevel=3)


@functools.cache
def _load() -> str:
    """Build if necessary and load, once per process: "" or the reason why not."""
    if not (CSRC / "ops.cpp").exists():
        return "no csrc/ folder beside lib/"
    cuda = torch.cuda.is_available() and shutil.which("nvcc") is not None
    try:
        torch.ops.load_library(build(cuda))
    except UserError as error:
        return str(error)
    for register in _after_load:
        register()
    return ""


_after_load = []  # functions that register fake kernels and autograd formulas; they need the loaded schemas


def build(cuda: bool = False) -> Path:
    """Compile csrc/ unless the cached library is current; its path. Safe when several processes call it at once.

    cuda: also csrc/cuda/*.cu (needs nvcc and a PyTorch with CUDA). Raises UserError when something is missing or fails.
    """
    from torch.utils import cpp_extension  # slow to import, needed here only

    sources = [CSRC / "ops.cpp", *sorted(CSRC.glob("cpu/*.cpp")), *(sorted(CSRC.glob("cuda/*.cu")) if cuda else [])]
    flags = ["-O3", "-fno-math-errno", "-ffp-contract=off", *_arch_flags()]
    key = hashlib.sha256("\n".join([torch.__version__, str(torch.version.cuda), *flags, _cpu(), str(cuda)]).encode())
    for path in sorted(p for p in CSRC.rglob("*") if p.is_file() and (cuda or "cuda" not in p.parts)):
        key.update(str(path.relative_to(CSRC)).encode() + path.read_bytes())
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "segadapt")
    library = root / f"segadapt-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    if cuda and torch.version.cuda is None:
        raise UserError("this PyTorch is built without CUDA: the CUDA sources can be compiled but not linked")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {root}: {error}; set TORCH_EXTENSIONS_DIR") from error
    with open(root / "lock", "w") as lock, _path_with(Path(sys.executable).parent):
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system even when its holder is killed
        if library.exists():
            return library
        if not shutil.which(cpp_extension.get_cxx_compiler()):
            raise UserError("no C++ compiler found (install g++ or clang++, or set CXX)")
        if not cpp_extension.is_ninja_available():
            raise UserError("ninja not found (pip install ninja)")
        if cuda and not os.environ.get("CUDA_HOME"):
            cpp_extension.CUDA_HOME = str(cuda_root())
        start = time.monotonic()
        print("lib.ops: compiling csrc/ (once, a minute or two) ... ", end="", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            try:
                cpp_extension.load("segadapt", [str(s) for s in sources], extra_cflags=[*flags, "-fopenmp"],
                                   extra_cuda_cflags=["-O3"], extra_ldflags=["-fopenmp"],
                                   extra_include_paths=[str(CSRC)],
                                   build_directory=folder, with_cuda=cuda, is_python_module=False)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                print("failed", file=sys.stderr)
                (root / "failed.log").write_text(str(error))
                first = re.search(r"^.*\b(?:error|Error)\b.*$", str(error).partition("\n")[2], re.M)
                raise UserError(f"compiling csrc/ failed ({first[0].strip() if first else error}); "
                                f"everything: {root / 'failed.log'}") from error
            os.replace(Path(folder) / "segadapt.so", library)
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return library


def compile_cuda(folder: Path) -> list[Path]:
    """Compile each csrc/cuda/*.cu for every supported architecture into object files in folder, without linking.

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


def _arch_flags() -> list[str]:
    arch = os.environ.get("SEGADAPT_ARCH", "native")
    return [f"-mcpu={arch}" if platform.machine() in ("aarch64", "arm64") else f"-march={arch}"]


def _cpu() -> str:
    """What -march=native depends on: one cache folder may serve several machines."""
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


# ---- cycle association --------------------------------------------------------------------------------------------------

def mutual_argmax(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Placeholder while the kernel is being written."""
    raise NotImplementedError


# ---- pseudo-labels ------------------------------------------------------------------------------------------------------

def upsample_argmax(logits: Tensor, size: tuple[int, int] | None = None, align_corners: bool = True) -> Tensor:
    """Label map of bilinearly upsampled logits, without writing the upsampled logits.

    logits: [C, h, w] or [N, C, h, w], C <= 255, any floating dtype (half and bfloat16 are interpolated in float32).
    size: (height, width) of the label map; None keeps the logits' size.
    Returns uint8 [H, W] or [N, H, W] on the same device, equal to F.interpolate(logits, size, mode="bilinear",
    align_corners=align_corners).argmax(-3); ties go to the lowest class. The compiled CPU operator interpolates in
    ATen's own order of operations, so not even the last bit differs; where ATen uses another order (H + W <= 128,
    channels-last logits, CUDA), a class may win over another one that is equal to within rounding.
    Raises ValueError for wrong shapes and, where it costs no synchronisation (CPU), for logits that are not finite.
    """
    batch, size = _as_batch(logits, size)
    kernel = _kernel("upsample_argmax", logits.device)
    label = kernel(batch, size, align_corners) if kernel else _upsample_argmax_reference(batch, size, align_corners)
    return label if logits.dim() == 4 else label[0]


def _upsample_argmax_reference(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    label = torch.empty((len(logits), *size), dtype=torch.uint8, device=logits.device)
    for n in range(len(logits)):  # one at a time: the upsampled logits are large
        label[n] = _upsample(logits[n], size, align_corners).argmax(0)
    return label


def _as_batch(logits: Tensor, size: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int]]:
    if logits.dim() not in (3, 4) or not logits.is_floating_point():
        raise ValueError("logits: expected floating [C, h, w] or [N, C, h, w], "
                         f"got {logits.dtype} {tuple(logits.shape)}")
    batch = logits.detach() if logits.dim() == 4 else logits.detach()[None]
    if not 1 <= batch.shape[1] <= 255:
        raise ValueError(f"logits: 1 to 255 classes, got {batch.shape[1]}")
    size = tuple(batch.shape[2:]) if size is None else tuple(size)
    if len(size) != 2 or min(*size, *batch.shape[2:]) < 1:
        raise ValueError(f"logits of shape {tuple(logits.shape)} cannot become a map of size {size}")
    return batch, size


def _upsample(image: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """[C, h, w] -> [C, H, W], float32 or float64; ValueError when a CPU tensor is not finite."""
    image = image if image.dtype == torch.float64 else image.float()
    if image.device.type == "cpu" and not image.isfinite().all():
        raise ValueError("logits hold NaN or infinite values")
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None].contiguous(), size, mode="bilinear", align_corners=align_corners)[0]


@_after_load.append
def _register_pseudo_label() -> None:
    @torch.library.register_fake("segadapt::upsample_argmax")
    def _(logits, size, align_corners):
        return logits.new_empty((logits.shape[0], *size), dtype=torch.uint8)


# ---- command line -------------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.ops", description="Build the custom operators ahead of their first use.")
    parser.add_argument("--build", action="store_true", required=True, help="compile csrc/ and load it")
    parser.add_argument("--cuda", action="store_true", help="the CUDA sources too: compiled for every architecture "
                        f"({', '.join('sm_' + a for a in CUDA_ARCHITECTURES)}, PTX); linked where PyTorch has CUDA")
    args = parser.parse_args(argv)
    try:
        link = args.cuda and torch.version.cuda is not None
        if link:
            names = [f"{a[0]}.{a[1:]}" for a in CUDA_ARCHITECTURES]
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(names) + "+PTX")
        elif args.cuda:
            with tempfile.TemporaryDirectory() as folder:
                objects = compile_cuda(Path(folder))
            print(f"CUDA: {len(objects)} source files compile; not linked, because this PyTorch has no CUDA")
        library = build(cuda=link)
        torch.ops.load_library(library)
        print(f"built and loaded: {library}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

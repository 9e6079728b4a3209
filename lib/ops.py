"""Custom operators: cycle association and class-balanced pseudo-labels, compiled when csrc/ builds, PyTorch otherwise.

Every public function picks the compiled operator where one exists for the tensor's device and the PyTorch reference
(also the tests' oracle) elsewhere, with the same results. csrc/ is compiled on first use, cached by content, optional:

    python -m lib.ops --build [--cuda]     builds ahead (and checks that the CUDA sources compile everywhere)
    use("auto" | "compiled" | "reference") what a script's --ops does; SEGADAPT_OPS in the environment sets the default
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
import math
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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.errors import UserError

CSRC = Path(__file__).resolve().parent.parent / "csrc"
CUDA_ARCHITECTURES = ("75", "80", "86", "89", "90")  # and PTX of the last
_state = {"mode": os.environ.get("SEGADAPT_OPS", "auto")}


# ---- building and choosing -----------------------------------------------------------------------------------------

def use(mode: str) -> None:
    """This process's implementation: "auto" (compiled where it builds), "compiled" (or UserError), "reference"."""
    if mode not in ("auto", "compiled", "reference"):
        raise UserError(f"ops must be auto, compiled or reference, not {mode!r} (check --ops or SEGADAPT_OPS)")
    _state["mode"] = os.environ.get("SEGADAPT_OPS", "auto") if mode == "auto" else mode
    if mode == "compiled":
        require_compiled()


def backend() -> str:
    """ "compiled" or "reference": what CPU tensors get (and CUDA tensors where torch has CUDA). Builds if necessary."""
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
    warnings.warn(f"no compiled operators, using the PyTorch reference (same results, slower): {reason}", stacklevel=3)


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


# ---- cycle association ---------------------------------------------------------------------------------------------

class CycleAssociation(NamedTuple):
    """What cycle_association_loss returns; see there."""

    loss: Tensor      # scalar
    kept: Tensor      # scalar int64
    selected: Tensor  # [B, H1, W1] bool
    forward: Tensor   # [B, N1] int64
    back: Tensor      # [B, N1] int64


_PANEL_BYTES = 4 << 20   # of one row panel of a similarity matrix: it stays in the cache
_EPS = 1e-10             # the paper's code, inside logarithms


def mutual_argmax(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each row of a the row of b with the largest cosine similarity, and the reverse, without the N1 x N2 matrix.

    a: [N1, C], b: [N2, C], one floating dtype, N1, N2 > 0; half and bfloat16 are taken to float32.
    Returns (row_index [N1] int64, row_value [N1], col_index [N2] int64, col_value [N2]). No gradient.

    Exact: the maximum of the float64 dot products of the normalised vectors x / |x| (rounded to the input's dtype;
    |x| summed in float64), ties to the lowest index, whatever the tiles, the threads and the device. A zero vector
    has similarity 0 to everything. Raises ValueError for wrong shapes or dtypes and for NaN or infinite values.
    """
    a, b = (x.detach().to(_full_type(x)) for x in (a, b))
    _check_rows(a, b)
    kernel = _kernel("mutual_argmax", a.device)
    if kernel:
        return kernel(a, b)
    a, b = _normalised(a), _normalised(b)
    return *_exact_argmax(a, b), *_exact_argmax(b, a)


def spatial_aggregate(x: Tensor, metric: str = "cos", alpha: float = 0.5) -> Tensor:
    """(1 - alpha) x + alpha A x with A the attention of each image's pixels to each other (Kang et al., section 3.3).

    x: [B, C, H, W] features (cos) or class probabilities (kl). Returns the same shape; half and bfloat16 give float32.
    cos: A = softmax of each row of the cosine similarities over the row's standard deviation (unbiased, + 1e-10,
    constant in the backward pass). kl: A_jk = softmax_k of -KL(x_j || x_k). Differentiable once; no N x N matrix.
    Raises ValueError for wrong shapes or metrics and for values that are not finite.
    """
    _check_maps(x, metric)
    return _SpatialAggregate.apply(x.to(_full_type(x)), metric, float(alpha))


@torch.compiler.disable
def cycle_association_loss(x_s: Tensor, x_t: Tensor, y_s: Tensor, *, metric: str = "cos", alpha: float = 0.5,
                           ignore_index: int = 255) -> CycleAssociation:
    """Pixel-level cycle association of image pairs (Kang et al., NeurIPS 2020, section 3.2 and 3.3).

    x_s: [B, C, H1, W1], x_t: [B, C, H2, W2], floating: features (metric "cos") or class probabilities ("kl"); image b
    of x_s is paired with image b of x_t. y_s: [B, H1, W1] integer labels of that resolution. alpha > 0 aggregates x_t.

    Per pair, with contrast-normalised similarities S12 (source to target) and S21: j*(i) = argmax_j S12_ij,
    i*(i) = argmax_k S21_j*k; pixel i is kept when y_i = y_i* is not ignore_index. The loss is the mean over all kept
    pixels of the batch of -log(softmax(S12)_ij* softmax(S21)_j*i*). Standard deviations and indices carry no gradient.
    Returns (loss: scalar in float32 or the inputs' float64; kept: int64 scalar; selected: bool [B, H1, W1], the kept
    pixels; forward: int64 [B, N1], j*; back: int64 [B, N1], i*). Nothing kept: loss 0, attached to the graph. Zero
    vectors have similarity 0 and no gradient; rows constant to rounding have a uniform softmax and no gradient.

    The gradient is computed along with the loss, since that needs the same panels: memory beyond the inputs and their
    gradients is one copy of x_t[b] and a few panels. Differentiable once. Under autocast it runs in float32.
    Raises ValueError for wrong shapes, dtypes or metrics and for values that are not finite.
    """
    _check_maps(x_s, metric)
    _check_maps(x_t, metric)
    if len(x_s) != len(x_t) or x_s.shape[1] != x_t.shape[1] or y_s.shape != (len(x_s), *x_s.shape[2:]):
        raise ValueError(f"x_s {tuple(x_s.shape)}, x_t {tuple(x_t.shape)} and y_s {tuple(y_s.shape)}: expected "
                         "[B, C, H1, W1], [B, C, H2, W2] and [B, H1, W1]")
    if y_s.is_floating_point():
        raise ValueError(f"y_s: expected integer labels, got {y_s.dtype}")
    if _full_type(x_s) != _full_type(x_t) or x_s.device != x_t.device:
        raise ValueError("x_s and x_t differ in dtype or device")
    return CycleAssociation(*_CycleAssociation.apply(x_s, x_t, y_s, metric, float(alpha), ignore_index))


class _SpatialAggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, metric, alpha):
        ctx.save_for_backward(x)
        ctx.metric, ctx.alpha = metric, alpha
        out = torch.empty_like(x)
        with torch.autocast(x.device.type, enabled=False):
            for image, result in zip(x, out, strict=True):
                _aggregate(_rows(image), _rows(result), metric, alpha)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        out = torch.empty_like(x)
        with torch.autocast(x.device.type, enabled=False):
            for image, d_image, result in zip(x, grad.to(x.dtype), out, strict=True):
                _aggregate_backward(_rows(d_image), _rows(image), _rows(result), ctx.metric, ctx.alpha)
        return out, None, None


class _CycleAssociation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_s, x_t, y_s, *settings):
        found, ctx.gradients = _associate(x_s, x_t, y_s, *settings, any(ctx.needs_input_grad))
        ctx.mark_non_differentiable(*found[1:])
        ctx.save_for_backward(x_s, x_t, y_s)
        ctx.settings = settings
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        # The forward pass has left the gradients, to be scaled in place and given away: a copy would be the peak of the
        # memory. Who goes backward a second time (retain_graph) waits for them to be computed again.
        inputs = ctx.saved_tensors
        grad_s, grad_t = ctx.gradients or _associate(*inputs, *ctx.settings, True)[1]
        ctx.gradients = None
        return (grad_s.mul_(grad).to(inputs[0].dtype) if ctx.needs_input_grad[0] else None,
                grad_t.mul_(grad).to(inputs[1].dtype) if ctx.needs_input_grad[1] else None, None, None, None, None)


def _associate(x_s: Tensor, x_t: Tensor, y_s: Tensor, metric: str, alpha: float, ignore_index: int, need_grad: bool):
    """The batch: (loss, kept, selected, j*, i*) and, if needed, the loss's gradients for x_s and x_t."""
    dtype = _full_type(x_s)
    grad_s, grad_t = torch.zeros_like(x_s, dtype=dtype) if need_grad else None, torch.empty_like(x_t, dtype=dtype)
    loss, kept, maps = 0.0, 0, []
    with torch.autocast(x_s.device.type, enabled=False):
        for b in range(len(x_s)):
            d_a = _rows(grad_s[b]) if need_grad else None
            part, count, *found = _associate_pair(_rows(x_s[b].to(dtype)), _rows(x_t[b].to(dtype)), y_s[b].flatten(),
                                                  metric, alpha, ignore_index, d_a, _rows(grad_t[b]))
            loss, kept = loss + part, kept + count
            maps.append(found)
    selected, forward, back = (torch.stack(m) for m in zip(*maps, strict=True))
    share = 1.0 / kept.clamp_min(1).double()
    loss = (loss * share).to(dtype)
    gradients = (grad_s.mul_(share.to(dtype)), grad_t.mul_(share.to(dtype))) if need_grad else None
    return (loss, kept, selected.view_as(y_s), forward, back), gradients


def _associate_pair(a: Tensor, v: Tensor, label: Tensor, metric: str, alpha: float, ignore_index: int,
                    d_a: Tensor | None, d_v: Tensor):
    """One pair: a [N1, C], v [N2, C], label [N1] -> sum of the losses, kept, selected [N1], j* [N1], i* [N1].

    Unless d_a is None it becomes the gradient of the loss sum for a, and d_v the one for v. d_v [N2, C], which lies
    without gaps, is overwritten anyway: until then its memory holds the aggregated target, row by row.
    """
    z = d_v if d_v.is_contiguous() else d_v.t().view(-1).view(d_v.shape)
    _aggregate(v, z, metric, alpha)
    if metric == "cos":
        forward, _, back_of, _ = mutual_argmax(a, z)
        a_scale, z_scale = _inverse_norm(a), _inverse_norm(z)
        z.mul_(z_scale[:, None])
        right_z, right_a = z, a
    else:
        a_scale = z_scale = None
        right_z, right_a = (z + _EPS).log(), (a + _EPS).log()
        forward, back_of = _product_argmax(a, right_z), _product_argmax(z, right_a)
    back = back_of[forward]
    selected = (label == label[back]) & (label != ignore_index)
    rows = selected.nonzero()[:, 0]
    times = torch.bincount(forward[rows], minlength=len(z))
    cols = times.nonzero()[:, 0]
    if d_a is None:
        grads_12 = grads_21 = (None, None)
    else:
        d_z = torch.zeros(z.shape, dtype=z.dtype, device=z.device)
        # cos: one gradient for the normalised a, one for z. kl: p and log p are separate operands.
        d_right_z, d_right_a = (d_z, d_a) if metric == "cos" else (torch.zeros_like(d_z), torch.zeros_like(d_a))
        grads_12, grads_21 = (d_a, d_right_z), (d_z, d_right_a)
    ones = torch.ones(len(a), dtype=a.dtype, device=a.device)
    loss = _chosen(a, a_scale, right_z, None, rows, forward, ones, *grads_12)
    loss = loss + _chosen(z, None, right_a, a_scale, cols, back_of, times.to(z.dtype), *grads_21)
    if d_a is not None:
        if metric == "cos":
            _normalise_backward_(d_a, a, a_scale, a_scale)
            _normalise_backward_(d_z, z, torch.ones_like(z_scale), z_scale)
        else:
            d_a.addcdiv_(d_right_a, a + _EPS)
            d_z.addcdiv_(d_right_z, z + _EPS)
        _aggregate_backward(d_z, v, d_v, metric, alpha)
    return loss, selected.sum(), selected, forward, back


def _chosen(left, left_scale, right, right_scale, rows, index, weight, d_left, d_right) -> Tensor:
    """sum over i in rows of weight_i * -log softmax_j(l_i r_j / sigma_i) at j = index_i; scaled l [N1, C], r [N2, C].

    Adds the gradients for the scaled l and r to d_left and d_right (None: no gradient): with P the softmax and
    w = weight / sigma, dS_ij = w_i (P_ij - [j = index_i]).
    """
    loss = torch.zeros((), dtype=torch.float64, device=left.device)
    for at, buffer in _panels(len(rows), len(right), left):
        r = rows[at]
        l_rows = left.index_select(0, r)
        if left_scale is not None:
            l_rows.mul_(left_scale[r, None])
        p = torch.mm(l_rows, right.t(), out=buffer)
        inverse = _contrast_softmax_(p, right_scale, True)
        target = index[r][:, None]
        chosen = p.gather(1, target)
        loss -= (weight[r].double() * chosen[:, 0].double().log()).sum()
        if d_left is not None:
            w = (weight[r] * inverse)[:, None]
            p.scatter_(1, target, chosen - 1)
            d_right.addmm_(p.t(), l_rows * w)
            if right_scale is not None:
                p.mul_(right_scale)
            d_left.index_add_(0, r, torch.mm(p, right).mul_(w))
    return loss


def _aggregate(v: Tensor, out: Tensor, metric: str, alpha: float) -> None:
    """out = (1 - alpha) v + alpha A v for v, out [N, C]."""
    if alpha == 0:
        out.copy_(v)
        return
    scale = _inverse_norm(v) if metric == "cos" else None
    right = v if metric == "cos" else (v + _EPS).log()
    for at, buffer in _panels(len(v), len(v), v):
        left = v[at] if scale is None else v[at] * scale[at, None]
        p = torch.mm(left, right.t(), out=buffer)
        _contrast_softmax_(p, scale, metric == "cos")
        out[at] = torch.addmm(v[at], p, v, beta=1 - alpha, alpha=alpha)


def _aggregate_backward(d_out: Tensor, v: Tensor, d_v: Tensor, metric: str, alpha: float) -> None:
    """d_v = the gradient of _aggregate for d_out; all [N, C]. The panels are computed again.

    With dA = d_out v^T: dS = alpha A o (dA - rowsum(A o dA)) / sigma, and S = v^ v^^T (cos) or v log(v)^T (kl).
    """
    if alpha == 0:
        d_v.copy_(d_out)
        return
    torch.mul(d_out, 1 - alpha, out=d_v)
    n, cos = len(v), metric == "cos"
    scale = _inverse_norm(v) if cos else None
    right = v if cos else (v + _EPS).log()
    d_right = d_v if cos else torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    col_sum = torch.zeros(n, dtype=v.dtype, device=v.device)
    for at, p, m in _panels(n, n, v, 2):
        left = v[at] if scale is None else v[at] * scale[at, None]
        torch.mm(left, right.t(), out=p)
        inverse = _contrast_softmax_(p, scale, cos)
        torch.mm(d_out[at], v.t(), out=m)
        _softmax_grad_(m, p, inverse * alpha if scale is None else inverse * alpha * scale[at], scale, col_sum)
        d_v.addmm_(p.t(), d_out[at], alpha=alpha)
        d_right.addmm_(m.t(), v[at])
        d_v[at] += torch.mm(m, right)
    if not cos:
        d_v.addcdiv_(d_right, v + _EPS)
        return
    # v^ = v/|v| takes <G, v> v/|v|^2 from its gradient G. d_v also holds what went past v^; that part's product with v
    # is (1 - alpha) <d_out, v> + alpha colsum(A o dA).
    for at in _slices(n, v.shape[1], v):
        rows = v[at]
        radial = ((d_v[at] - (1 - alpha) * d_out[at]) * rows).sum(1) - alpha * col_sum[at]
        d_v[at] -= (radial * scale[at] ** 2)[:, None] * rows


def _normalise_backward_(grad: Tensor, x: Tensor, to_unit: Tensor, scale: Tensor) -> None:
    """grad [N, C] for x^ = x * to_unit becomes the one for the vectors behind x^: scale (g - <g, x^> x^)."""
    for at in _slices(*x.shape, x):
        unit = x[at] * to_unit[at, None]
        g = grad[at]
        grad[at] = (g - (g * unit).sum(1, keepdim=True) * unit) * scale[at, None]


def _contrast_softmax_(s: Tensor, col_scale: Tensor | None, contrast: bool) -> Tensor:
    """See csrc/ops.cpp."""
    kernel = _kernel("contrast_softmax_", s.device)
    if kernel:
        return kernel(s, col_scale, contrast)
    if col_scale is not None:
        s.mul_(col_scale)
    if contrast:
        sigma = s.std(1) if s.shape[1] > 1 else torch.zeros_like(s[:, 0])
        noise = 8 * torch.finfo(s.dtype).eps * torch.linalg.vector_norm(s, torch.inf, dim=1)
        inverse = torch.where(sigma > noise, 1 / (sigma + _EPS), 0)
        s.mul_(inverse[:, None])
    else:
        inverse = torch.ones_like(s[:, 0])
    torch.softmax(s, 1, out=s)
    return inverse


def _softmax_grad_(m: Tensor, p: Tensor, row_scale: Tensor, col_scale: Tensor | None, col_sum: Tensor) -> None:
    """See csrc/ops.cpp."""
    kernel = _kernel("softmax_grad_", m.device)
    if kernel:
        kernel(m, p, row_scale, col_scale, col_sum)
        return
    m.mul_(p)
    col_sum += m.sum(0)
    m.addcmul_(p, m.sum(1, keepdim=True), value=-1).mul_(row_scale[:, None])
    if col_scale is not None:
        m.mul_(col_scale)


def _product_argmax(x: Tensor, y: Tensor) -> Tensor:
    """For each row of x the row of y with the largest dot product, as exact as mutual_argmax; int64 [N1]."""
    kernel = _kernel("product_argmax", x.device)
    return kernel(x, y) if kernel else _exact_argmax(x, y)[0]


def _exact_argmax(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Index [N1] and value [N1] of each row of x's largest float64 dot product with a row of y; the first of ties."""
    if not (x.sum().isfinite() and y.sum().isfinite()):
        raise ValueError("mutual_argmax: a or b holds NaN or infinite values")
    distinct, which = torch.unique(y, dim=0, return_inverse=True)
    first = torch.full((len(distinct),), len(y), device=y.device)
    first.scatter_reduce_(0, which, torch.arange(len(y), device=y.device), "amin")
    first = first.sort().values  # the first of each set of equal rows, in order: ties need no more than these
    y = y[first].double()
    index, value = [], []
    longest = y.square().sum(1).max().sqrt()
    for at in _slices(len(x), len(y), y):
        rows = x[at].double()
        s = rows @ y.t()
        rounding = 2 * (x.shape[1] + 16) * torch.finfo(torch.float64).eps * longest * rows.square().sum(1).sqrt()
        i, j = (s >= (s.max(1).values - rounding)[:, None]).nonzero(as_tuple=True)  # a matrix product sums in any order
        exact = torch.cat([_ordered_dot(rows[p], y[q]) for p, q in zip(i.split(4096), j.split(4096), strict=True)])
        best = torch.full_like(s[:, 0], -torch.inf).scatter_reduce_(0, i, exact, "amax")
        lowest = torch.where(exact == best[i], j, len(y))
        index.append(first[torch.full_like(best, len(y), dtype=torch.int64).scatter_reduce_(0, i, lowest, "amin")])
        value.append(best.to(x.dtype))
    return torch.cat(index), torch.cat(value)


def _ordered_dot(x: Tensor, y: Tensor) -> Tensor:
    """Row-wise dot products of float64 [P, C] in csrc/cpu/argmax.h's order: 16 sums over k mod 16, then halving."""
    products = F.pad(x * y, (0, -x.shape[1] % 16)).unflatten(1, (-1, 16))
    total = products[:, 0].clone()
    for k in range(1, products.shape[1]):
        total += products[:, k]
    while total.shape[1] > 1:
        total = total[:, : total.shape[1] // 2] + total[:, total.shape[1] // 2:]
    return total[:, 0]


def _norm(x: Tensor) -> Tensor:
    """|x| of the rows of x [N, C], summed in float64 in one fixed order, in x's dtype."""
    return torch.cat([_ordered_dot(x[at].double(), x[at].double()) for at in _slices(*x.shape, x)]).sqrt().to(x.dtype)


def _normalised(x: Tensor) -> Tensor:
    norm = _norm(x)
    return x / torch.where(norm > 0, norm, 1)[:, None]


def _inverse_norm(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1)
    return torch.where(norm > 0, 1 / norm, 0)


def _rows(image: Tensor) -> Tensor:
    """[C, H, W] -> a view [H * W, C]."""
    return image.flatten(1).t()


def _slices(n: int, width: int, like: Tensor):
    """Slices of n rows of this width that hold about _PANEL_BYTES, as even as possible."""
    count = max(1, -(-n * width * like.element_size() // _PANEL_BYTES))
    rows = -(-n // count)
    return [slice(i, min(i + rows, n)) for i in range(0, n, max(rows, 1))]


def _panels(n: int, width: int, like: Tensor, buffers: int = 1):
    """(slice, buffer [rows, width], ...) for each panel of an n x width matrix; the buffers are used again."""
    slices = _slices(n, width, like)
    rows = slices[0].stop if slices else 0
    memory = [torch.empty(rows, width, dtype=like.dtype, device=like.device) for _ in range(buffers)]
    for at in slices:
        yield at, *(m[: at.stop - at.start] for m in memory)


def _full_type(x: Tensor) -> torch.dtype:
    """What is computed in: float32 for half precision."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _check_rows(a: Tensor, b: Tensor) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"expected [N1, C] and [N2, C] with rows, got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != b.dtype or a.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected two tensors of one floating dtype, got {a.dtype} and {b.dtype}")


def _check_maps(x: Tensor, metric: str) -> None:
    if metric not in ("cos", "kl"):
        raise ValueError(f"metric must be cos or kl, not {metric!r}")
    if x.dim() != 4 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"expected floating [B, C, H, W] without empty sides, got {x.dtype} {tuple(x.shape)}")
    if not x.detach().sum(dtype=torch.float64).isfinite():
        raise ValueError("the features or probabilities hold NaN or infinite values")
    if metric == "kl" and x.detach().min() < 0:
        raise ValueError("metric kl needs probabilities, and there are negative values")


@_after_load.append
def _register_cycle_association() -> None:
    @torch.library.register_fake("segadapt::mutual_argmax")
    def _(a, b):
        return (a.new_empty(a.shape[0], dtype=torch.int64), a.new_empty(a.shape[0]),
                b.new_empty(b.shape[0], dtype=torch.int64), b.new_empty(b.shape[0]))

    @torch.library.register_fake("segadapt::product_argmax")
    def _(x, y):
        return x.new_empty(x.shape[0], dtype=torch.int64)

    @torch.library.register_fake("segadapt::contrast_softmax_")
    def _(s, col_scale, contrast):
        return s.new_empty(s.shape[0])

    @torch.library.register_fake("segadapt::softmax_grad_")
    def _(m, p, row_scale, col_scale, col_sum):
        return None


# ---- pseudo-labels -------------------------------------------------------------------------------------------------

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


class Thresholds(NamedTuple):
    """What select_threshold returns; see there."""

    value: Tensor     # [C] float32
    selected: Tensor  # [C] int64
    bins: Tensor      # [C] int64


_BIN_BITS = 12                         # a coarse bin holds 2^12 neighbouring floats
_BINS = 0x40000000 >> _BIN_BITS        # bins for [0, 2): the bits of 2.0f are 0x40000000
_INVALID, _PIXELS = _BINS, _BINS + 1   # columns: confidences that are NaN or not below 2; all pixels of the class


def new_histogram(num_classes: int, device: torch.device | str = "cpu", *, fine: bool = False) -> Tensor:
    """Empty counts for confidence_histogram_ (2 MB a class) or, with fine, for refine_histogram_ (32 KB a class).

    int64 [C, 2^18 + 2] or [C, 2^12]. Histograms of several processes merge by addition (all_reduce).
    """
    return torch.zeros(num_classes, 1 << _BIN_BITS if fine else _BINS + 2, dtype=torch.int64, device=device)


def confidence_histogram_(hist: Tensor, logits: Tensor, size: tuple[int, int] | None = None, *,
                          align_corners: bool = True, flipped: Tensor | None = None, prior: Tensor | None = None,
                          probabilities: bool = False, ds_rate: int = 1, value: str = "conf") -> tuple[Tensor, Tensor]:
    """Count the confidences of a batch of images, for the thresholds of CBST (Zou et al., ECCV 2018, algorithm 2).

    hist: from new_histogram, added to in place.
    logits: [C, h, w] or [N, C, h, w], any floating dtype (arithmetic is float32), upsampled bilinearly to size =
        (height, width) and softmaxed; with probabilities they are used as they are (after upsampling).
    flipped: the same for the images mirrored left to right; the mean of both is taken, mirrored back.
    prior: float32 [C, H, W] at the output size; the product is not renormalised.
    ds_rate: every ds_rate-th pixel of a class counts, in raster order, starting anew in each image and class.
    value: "conf" counts a pixel's largest probability for the class predicted there; "prob" counts, for each class, its
        own probability at every ds_rate-th pixel of the image.
    Returns label [H, W] or [N, H, W] uint8, the first class of the largest probability, and confidence float32, that
    probability. Neither the upsampled logits nor the probabilities are written.

    Compiled and reference results are equal to the last bit for probabilities given at full size. For logits, exp may
    differ in its last place between them (and between CPU and CUDA), but not between the passes of one implementation.
    Raises ValueError for wrong shapes or dtypes and, on the CPU, for NaN or infinity; on CUDA select_threshold does.
    """
    return _count(hist, None, logits, size, align_corners, flipped, prior, probabilities, ds_rate, value)


def refine_histogram_(fine: Tensor, bins: Tensor, logits: Tensor, size: tuple[int, int] | None = None, *,
                      align_corners: bool = True, flipped: Tensor | None = None, prior: Tensor | None = None,
                      probabilities: bool = False, ds_rate: int = 1, value: str = "conf") -> tuple[Tensor, Tensor]:
    """The second pass to exact thresholds: count the confidences inside one coarse bin per class, float by float.

    fine: from new_histogram(..., fine=True), added to in place; bins: from select_threshold after the first pass.
    Everything else, results included, as in confidence_histogram_, and with the same values.
    """
    return _count(fine, bins, logits, size, align_corners, flipped, prior, probabilities, ds_rate, value)


def refine_kept_(fine: Tensor, bins: Tensor, label: Tensor, confidence: Tensor, *, ds_rate: int = 1) -> None:
    """refine_histogram_ for images whose label and confidence were kept (5 bytes a pixel): no second forward pass.

    label: uint8 [H, W] or [N, H, W] and confidence: float32, as confidence_histogram_ returned them for value = "conf".
    """
    if label.shape != confidence.shape or label.dim() not in (2, 3):
        raise ValueError("label and confidence: expected the same [H, W] or [N, H, W], "
                         f"got {tuple(label.shape)} and {tuple(confidence.shape)}")
    if label.dim() == 2:
        label, confidence = label[None], confidence[None]
    _check_histogram(fine, bins, len(fine), ds_rate)
    kernel = _kernel("count_confidences_", label.device) or _count_confidences_reference
    kernel(fine, bins, label, confidence, ds_rate)


def predicted_pixels(hist: Tensor) -> Tensor:
    """[C] int64: all pixels predicted as each class, not subsampled (for rare classes and patch mining)."""
    return hist[:, _PIXELS].clone()


def select_threshold(hist: Tensor, portion: float, *, fine: Tensor | None = None, pooled: bool = False) -> Thresholds:
    """Per class the k-th largest of its n counted confidences, k = floor(n * portion); 1 where k = 0.

    hist: after confidence_histogram_ over all images; fine: after refine_histogram_ over the same images.
    pooled: one threshold from the confidences of all classes (--kc-policy global).
    value: with fine exactly the float that sorting would give. Without, the lower edge of its coarse bin, which is at
        most 2^-11 of the value below it. A threshold of 0 (from a prior of 0) becomes 1 as in the original.
    selected: k per class (pooled: of all classes together); bins: the coarse bin that holds the k-th largest, or -1.
    Raises ValueError for a portion outside 0..1 and for counted confidences that are NaN or not below 2.
    """
    if not 0 <= portion <= 1:
        raise ValueError(f"portion must be between 0 and 1, not {portion}")
    invalid = int(hist[:, _INVALID].sum())
    if invalid:
        raise ValueError(f"{invalid} confidences are NaN or not below 2: the network's output is not finite, "
                         "or not probabilities")
    classes = len(hist)
    rows = hist.sum(0, keepdim=True) if pooled else hist
    fine_rows = None if fine is None else fine.sum(0, keepdim=True) if pooled else fine
    value, selected, bins = [], [], []
    for c, row in enumerate(rows[:, :_BINS]):
        k = math.floor(int(row.sum()) * portion)
        coarse, rank = _kth_largest(row, k) if k else (-1, 0)
        bits = max(coarse, 0) << _BIN_BITS
        if fine_rows is not None and k:
            inside = int(fine_rows[c].sum())
            if inside != int(row[coarse]):
                warnings.warn(f"class {c}: the second pass counted {inside} confidences in a bin that held "
                              f"{int(row[coarse])} in the first; is the forward pass deterministic?", stacklevel=2)
            if inside:
                bits += _kth_largest(fine_rows[c], min(rank, inside))[0]
        value.append(bits)
        selected.append(k)
        bins.append(coarse)
    value = torch.tensor(value, dtype=torch.int32).view(torch.float32)
    value = torch.where(value > 0, value, 1.0).expand(classes)
    selected, bins = (torch.tensor(x).expand(classes) for x in (selected, bins))
    return Thresholds(*(x.contiguous().to(hist.device) for x in (value, selected, bins)))


def pseudo_label(logits: Tensor, thresholds: Tensor, size: tuple[int, int] | None = None, *, align_corners: bool = True,
                 flipped: Tensor | None = None, prior: Tensor | None = None, probabilities: bool = False) -> Tensor:
    """CBST's labels (Zou et al., ECCV 2018): argmax_c p_c / thresholds_c, 255 where that maximum is below 1.

    thresholds: [C] float32, positive. Everything else as in confidence_histogram_.
    Returns uint8 [H, W] or [N, H, W]; quotients are IEEE divisions in float32, ties go to the lowest class. Neither the
    upsampled logits nor the probabilities are written.
    Raises ValueError for wrong shapes or dtypes and, on the CPU, for NaN or infinity (on CUDA such pixels are 255).
    """
    batch, size, flipped, prior = _checked(logits, size, flipped, prior)
    thresholds = torch.as_tensor(thresholds, dtype=torch.float32, device=batch.device)
    if thresholds.shape != batch.shape[1:2] or not bool((thresholds > 0).all()):
        raise ValueError(f"thresholds: expected {batch.shape[1]} positive numbers, got {thresholds.tolist()}")
    kernel = _kernel("pseudo_label", batch.device) or _pseudo_label_reference
    label = kernel(batch, thresholds, flipped, prior, size, align_corners, probabilities)
    return label if logits.dim() == 4 else label[0]


def _count(hist, bins, logits, size, align_corners, flipped, prior, probabilities, ds_rate, value):
    batch, size, flipped, prior = _checked(logits, size, flipped, prior)
    _check_histogram(hist, bins, batch.shape[1], ds_rate)
    if value not in ("conf", "prob"):
        raise ValueError(f"value must be 'conf' or 'prob', not {value!r}")
    kernel = _kernel("confidence_histogram_", batch.device) or _confidence_histogram_reference
    label, confidence = kernel(hist, bins, batch, flipped, prior, size, align_corners, probabilities, ds_rate,
                               value == "prob")
    return (label, confidence) if logits.dim() == 4 else (label[0], confidence[0])


def _check_histogram(hist, bins, classes, ds_rate):
    width = _BINS + 2 if bins is None else 1 << _BIN_BITS
    if hist.dtype != torch.int64 or hist.shape != (classes, width) or not hist.is_contiguous():
        raise ValueError(f"histogram: expected contiguous int64 {(classes, width)} (see new_histogram), "
                         f"got {hist.dtype} {tuple(hist.shape)}")
    if bins is not None and (bins.dtype != torch.int64 or bins.shape != (classes,)):
        raise ValueError(f"bins: expected int64 [{classes}] from select_threshold, got {tuple(bins.shape)}")
    if ds_rate < 1:
        raise ValueError(f"ds_rate must be at least 1, not {ds_rate}")


def _checked(logits, size, flipped, prior):
    batch, size = _as_batch(logits, size)
    if flipped is not None:
        if flipped.shape != logits.shape or flipped.dtype != logits.dtype or flipped.device != logits.device:
            raise ValueError(f"flipped: expected {logits.dtype} {tuple(logits.shape)} like the logits, "
                             f"got {flipped.dtype} {tuple(flipped.shape)}")
        flipped = flipped.detach().reshape(batch.shape)
    if prior is not None and (prior.dtype != torch.float32 or prior.shape != (batch.shape[1], *size)):
        raise ValueError(f"prior: expected float32 {(batch.shape[1], *size)}, got {prior.dtype} {tuple(prior.shape)}")
    return batch, size, flipped, prior


def _kth_largest(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest (k >= 1) of the counted values, and which of that bin's largest it is."""
    reached = counts.flip(0).cumsum(0)
    from_top = int(torch.searchsorted(reached, k))
    index = len(counts) - 1 - from_top
    return index, k - int(reached[from_top] - counts[index])


def _probabilities(logits, flipped, prior, size, align_corners, probabilities) -> Tensor:
    """One image, [C, h, w] -> [C, H, W] float32."""
    p = _upsample(logits.float(), size, align_corners)
    if not probabilities:
        p = p.softmax(0)
    if flipped is not None:
        p = (p + _probabilities(flipped, None, None, size, align_corners, probabilities).flip(-1)) * 0.5
    return p if prior is None else p * prior


def _confidence_histogram_reference(hist, bins, logits, flipped, prior, size, align_corners, probabilities, ds_rate,
                                    own):
    label = torch.empty((len(logits), *size), dtype=torch.uint8, device=logits.device)
    confidence = torch.empty((len(logits), *size), dtype=torch.float32, device=logits.device)
    for n in range(len(logits)):
        mirrored = None if flipped is None else flipped[n]
        p = _probabilities(logits[n], mirrored, prior, size, align_corners, probabilities)
        confidence[n], predicted = p.max(0)
        label[n] = predicted
        if own:
            for c in range(len(hist)):
                _add_confidences(hist, bins, c, p[c].flatten()[::ds_rate])
            if bins is None:
                hist[:, _PIXELS] += torch.bincount(predicted.flatten(), minlength=len(hist))
    if not own:
        _count_confidences_reference(hist, bins, label, confidence, ds_rate)
    return label, confidence


def _count_confidences_reference(hist, bins, label, confidence, ds_rate):
    for n in range(len(label)):
        for c in range(len(hist)):
            values = confidence[n][label[n] == c]
            _add_confidences(hist, bins, c, values[::ds_rate])
            if bins is None:
                hist[c, _PIXELS] += len(values)


def _add_confidences(hist, bins, c, values):
    bits = values.contiguous().view(torch.int32)
    bits = bits.where(values > 0, 0).where(~values.isnan(), _INVALID << _BIN_BITS).long()
    bucket = (bits >> _BIN_BITS).clamp(max=_INVALID)
    if bins is None:
        hist[c] += torch.bincount(bucket, minlength=_BINS + 2)
    else:
        inside = bits[bucket == bins[c]] & ((1 << _BIN_BITS) - 1)
        hist[c] += torch.bincount(inside, minlength=1 << _BIN_BITS)


def _pseudo_label_reference(logits, thresholds, flipped, prior, size, align_corners, probabilities):
    label = torch.empty((len(logits), *size), dtype=torch.uint8, device=logits.device)
    for n in range(len(logits)):
        mirrored = None if flipped is None else flipped[n]
        p = _probabilities(logits[n], mirrored, prior, size, align_corners, probabilities)
        ratio, predicted = (p / thresholds[:, None, None]).max(0)
        label[n] = predicted.where(ratio >= 1, 255)
    return label


@_after_load.append
def _register_pseudo_label() -> None:
    @torch.library.register_fake("segadapt::upsample_argmax")
    def _(logits, size, align_corners):
        return logits.new_empty((logits.shape[0], *size), dtype=torch.uint8)

    @torch.library.register_fake("segadapt::confidence_histogram_")
    def _(hist, bins, logits, flipped, prior, size, align_corners, probabilities, ds_rate, own):
        shape = (logits.shape[0], *size)
        return logits.new_empty(shape, dtype=torch.uint8), logits.new_empty(shape, dtype=torch.float32)

    @torch.library.register_fake("segadapt::count_confidences_")
    def _(hist, bins, label, confidence, ds_rate):
        return None

    @torch.library.register_fake("segadapt::pseudo_label")
    def _(logits, thresholds, flipped, prior, size, align_corners, probabilities):
        return logits.new_empty((logits.shape[0], *size), dtype=torch.uint8)


# ---- command line --------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.ops", description="Build the custom operators ahead of use.")
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

"""Tables of the custom operators: time, share of the bound, peak memory, exactness. Not collected by pytest.

    python tests/bench_ops.py [--device cuda] [--images FOLDER] [--only WORD ...] [--quick] [--threads 1]

--images adds a row of real features: two pictures of the folder (.jpg, .png) through a ResNet-50 with random weights.
The second table, of the pseudo-labels, is bench_pseudo_label.py's; --only leaves it out.
Each line runs in a process of its own. Time: median of the repetitions after one warm-up, in milliseconds of processor
time (CPU with one thread; else of wall-clock time). Peak memory: growth of the process (CPU) or of the allocator (CUDA)
from the inputs' allocation to the end, less the gradients that were asked for. Bound: the float32 matrix products that
cannot be avoided, or reading the input once. Mismatches: indices whose float64 value is below the float64 maximum.
"-": the figure does not apply.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import ops  # noqa: E402
from lib.ops.association import _normalised  # noqa: E402


class Row(NamedTuple):
    operator: str
    size: str
    method: str
    make: Callable                      # device -> inputs
    call: Callable                      # inputs -> anything
    gradients: int = 0                  # bytes of the gradients in the result, which are no working memory
    mismatches: Callable | None = None  # (inputs, result) -> int
    repeats: int = 3


# ---- cycle association ---------------------------------------------------------------------------------------------

def features(n: int, c: int, device: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-negative vectors around 40 shared centres, as a network's features are; [n, c] and class labels [n]."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, c, generator=torch.Generator().manual_seed(99)).relu()
    which = torch.randint(40, (n,), generator=g)
    return (0.3 * centres[which] + torch.randn(n, c, generator=g)).relu().to(device), (which % 19).to(device)


def vectors(n1: int, n2: int, c: int, kind: str = "random"):
    def make(device):
        g = torch.Generator().manual_seed(3)
        result = []
        for seed, n in ((1, n1), (2, n2)):
            x, _ = features(n, c, device, seed)
            if kind == "clustered":     # far more near-ties than float32 can tell apart
                centres = features(7, c, device, 4)[0]
                x = centres[torch.randint(7, (n,), generator=g)] + 1e-4 * torch.randn(n, c, generator=g).to(device)
            elif kind == "duplicated":
                x = x[torch.randint(n // 4, (n,), generator=g)]
            result.append(x)
        return result
    return make


def pictures(folder: Path):
    """Features [N1, 2048] and [N2, 2048] at stride 8 of two pictures of different sizes."""
    def make(device):
        import numpy as np
        from PIL import Image

        from lib.models.deeplab import DilatedResNet
        torch.manual_seed(0)
        net = DilatedResNet("resnet50").to(device).train()  # the picture's own statistics stand in for trained ones
        paths = sorted(p for p in folder.iterdir() if p.suffix in (".jpg", ".png"))
        result = []
        for path, size in ((paths[0], (640, 480)), (paths[-1], (576, 432))):  # width, height
            image = np.array(Image.open(path).convert("RGB").resize(size), np.float32) / 127.5 - 1
            with torch.no_grad():
                _, layer4 = net.features(torch.from_numpy(image).permute(2, 0, 1)[None].to(device))
            result.append(layer4[0].flatten(1).t().contiguous())
        return result
    return make


def direct_argmax(a, b):
    s = F.normalize(a, dim=1) @ F.normalize(b, dim=1).t()
    rows, cols = s.max(1), s.max(0)
    return rows.indices, rows.values, cols.indices, cols.values


def tiled_argmax(a, b, rows: int = 256):
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    index, value = [], []
    col_value, col_index = torch.full_like(b[:, 0], -torch.inf), torch.zeros(len(b), dtype=torch.int64, device=b.device)
    for i in range(0, len(a), rows):
        s = a[i:i + rows] @ b.t()
        best, at = s.max(0)
        better = best > col_value
        col_value, col_index = torch.where(better, best, col_value), torch.where(better, at + i, col_index)
        best, at = s.max(1)
        index.append(at), value.append(best)
    return torch.cat(index), torch.cat(value), col_index, col_value


def faiss_argmax(a, b):
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    a, b = F.normalize(a, dim=1).numpy(), F.normalize(b, dim=1).numpy()
    found = []
    for x, y in ((a, b), (b, a)):
        index = faiss.IndexFlatIP(y.shape[1])
        index.add(y)
        value, at = index.search(x, 1)
        found += [torch.from_numpy(at[:, 0]), torch.from_numpy(value[:, 0])]
    return found


def argmax_mismatches(inputs, result) -> int:
    a, b = (_normalised(x).double() for x in inputs)
    count, best = 0, a.new_full((len(b),), -torch.inf)
    for i in range(0, len(a), 512):
        s = a[i:i + 512] @ b.t()
        count += int((s.gather(1, result[0][i:i + 512, None])[:, 0] < s.max(1).values - 1e-14).sum())
        best = torch.maximum(best, s.max(0).values)
    return count + int(((a[result[2]] * b).sum(1) < best - 1e-14).sum())


def pairs(metric: str, n: int, c: int):
    def make(device):
        side = int(n ** 0.5)
        result = []
        for seed in (1, 2):
            x, y = features(n, c, device, seed)
            x = (2 * x).softmax(1) if metric == "kl" else x
            result.append(x.t().reshape(1, c, -1, side).contiguous().requires_grad_())
            result.append(y.reshape(1, -1, side))
        x_s, y_s, x_t, _ = result
        return x_s, x_t, y_s
    return make


def direct_loss(x_s, x_t, y_s, metric: str, alpha: float = 0.5):
    """The straightforward form: N x N matrices and autograd."""
    def contrast(s):
        return (s - s.mean(1, keepdim=True).detach()) / (s.std(1, keepdim=True).detach() + 1e-10)

    def kl(p, q):
        return p @ (q + 1e-10).log().t() - (p * (p + 1e-10).log()).sum(1, keepdim=True)

    a, v, y = x_s[0].flatten(1).t(), x_t[0].flatten(1).t(), y_s.flatten()
    s = contrast(F.normalize(v, dim=1) @ F.normalize(v, dim=1).t()) if metric == "cos" else kl(v, v)
    z = (1 - alpha) * v + alpha * s.softmax(1) @ v
    if metric == "cos":
        s12 = F.normalize(a, dim=1) @ F.normalize(z, dim=1).t()
        s21 = s12.t()
    else:
        s12, s21 = kl(a, z), kl(z, a)
    p, q = contrast(s12).softmax(1), contrast(s21).softmax(1)
    j, k = p.argmax(1), q.argmax(1)
    rows = ((y == y[k[j]]) & (y != 255)).nonzero()[:, 0]
    return -(p[rows, j[rows]] * q[j[rows], k[j[rows]]]).log().clamp_min(-100).mean()


def backward(loss: Callable, metric: str):
    return lambda x_s, x_t, y: torch.autograd.grad(loss(x_s, x_t, y, metric), (x_s, x_t))


def compiled_by_torch(function: Callable):
    return lambda *args: torch.compile(function)(*args)  # here, since torch.compile takes seconds to import


def products(count: int):
    """As many N x N x C float32 products, in tiles that are used again."""
    def call(x_s, x_t, _):
        a, b = x_s.detach()[0].flatten(1).t().contiguous(), x_t.detach()[0].flatten(1).t().contiguous()
        out = a.new_empty(512, len(b))
        for _ in range(count):
            for i in range(0, len(a), 512):
                torch.mm(a[i:i + 512], b.t(), out=out[:len(a[i:i + 512])])
    return call


def association_rows(device: str, images: Path | None) -> list[Row]:
    rows = []
    for c in (256, 2048):
        size = f"N = 8192, C = {c}"
        make = vectors(8192, 8192, c)
        methods = {"direct": direct_argmax, "tiled": tiled_argmax, "compiled": ops.mutual_argmax}
        if device == "cpu":
            methods["faiss"] = faiss_argmax
        rows.append(Row("mutual_argmax", size, "bound: GEMM", make, lambda a, b: a @ b.t()))
        if c == 256:  # about a minute of compilation
            methods["torch.compile"] = compiled_by_torch(direct_argmax)
        rows += [Row("mutual_argmax", size, m, make, f, 0, argmax_mismatches) for m, f in methods.items()]
    exact = [(f"{kind}, N = 8464 and 6889, C = {c}", vectors(8464, 6889, c, kind))
             for kind, c in (("random", 256), ("random", 2048), ("clustered", 256), ("duplicated", 256))]
    if images:
        exact.append(("two pictures, N = 4941 and 4015, C = 2048", pictures(images)))
    for size, make in exact:
        rows += [Row("mutual_argmax", size, m, make, f, 0, argmax_mismatches, 1)
                 for m, f in (("direct", direct_argmax), ("compiled", ops.mutual_argmax))]
    for metric, n, c in (("kl", 4096, 19), ("kl", 8464, 19), ("cos", 8464, 256), ("cos", 8464, 2048)):
        name, size, make = f"association {metric}", f"N = {n}, C = {c}", pairs(metric, n, c)
        gradients, repeats = 2 * n * c * 4, 1 if c == 2048 else 3

        def ours(x_s, x_t, y, metric):
            return ops.cycle_association_loss(x_s, x_t, y, metric=metric).loss

        rows.append(Row(name, size, "bound: 9 GEMMs", make, products(9), 0, None, repeats))
        rows.append(Row(name, size, "direct", make, backward(direct_loss, metric), gradients, None, repeats))
        if (metric, n) == ("kl", 4096):
            compiled = compiled_by_torch(direct_loss)
            rows.append(Row(name, size, "torch.compile", make, backward(compiled, metric), gradients, None, repeats))
        rows.append(Row(name, size, "tiled", make, backward(ours, metric), gradients, None, repeats))
        rows.append(Row(name, size, "compiled", make, backward(ours, metric), gradients, None, repeats))
    return rows


# ---- the table -----------------------------------------------------------------------------------------------------

def measure(row: Row, device: str, threads: int, quick: bool) -> dict:
    """Run one row in this process."""
    torch.set_num_threads(threads)
    ops.use("compiled" if row.method == "compiled" else "reference")
    cuda = device == "cuda"
    inputs = row.make(device)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else reset_peak()
    clock = time.perf_counter if cuda or threads > 1 else time.process_time
    times = []
    for repeat in range(1 + (1 if quick else row.repeats)):
        start = clock()
        result = row.call(*inputs)
        if cuda:
            torch.cuda.synchronize()
        times.append(clock() - start)
        if repeat == 0 and times[0] > 8 and row.method != "torch.compile":  # the warm-up hardly matters
            break
    peak = (torch.cuda.max_memory_allocated() if cuda else peak_bytes()) - before
    wrong = row.mismatches(inputs, result) if row.mismatches else None
    mb = None if row.method == "torch.compile" else (peak - row.gradients) / 2**20  # the compiler's memory is in it
    return {"ms": 1e3 * statistics.median(times[1:] or times), "mb": mb, "wrong": wrong}


def reset_peak() -> int:
    with contextlib.suppress(OSError, AttributeError):  # Linux: forget what making the inputs took
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=Path, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="one repetition")
    parser.add_argument("--only", nargs="+", default=[], help="rows that contain all of these words")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    rows = association_rows(args.device, args.images)
    if args.row is not None:
        print(json.dumps(measure(rows[args.row], args.device, args.threads, args.quick)))
        return 0
    ops.use("compiled")  # built once, before the processes start
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{name}, {args.threads} thread(s), PyTorch {torch.__version__}\n")
    print("| operator | size | method | ms | of the bound | against direct | working memory, MB | mismatches |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    done = {}
    for index, row in enumerate(rows):
        if not all(w in f"{row.operator} {row.size} {row.method}" for w in args.only):
            continue
        options = ["--row", str(index), "--device", args.device, "--threads", str(args.threads)]
        options += ["--quick"] * args.quick + (["--images", str(args.images)] if args.images else [])
        run = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True)
        cells = [row.operator, row.size, row.method]
        if run.returncode:
            reason = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"exit code {run.returncode}"
            print("| " + " | ".join([*cells, f"({reason})", "-", "-", "-", "-"]) + " |", flush=True)
            continue
        got = json.loads(run.stdout.splitlines()[-1])
        mine = done.setdefault((row.operator, row.size), {})
        mine["bound" if row.method.startswith("bound") else row.method] = got["ms"]
        cells += [f"{got['ms']:.1f}", f"{mine['bound'] / got['ms']:.2f}" if "bound" in mine else "-",
                  f"{mine['direct'] / got['ms']:.1f} x" if "direct" in mine else "-",
                  "-" if got["mb"] is None else f"{got['mb']:.0f}", "-" if got["wrong"] is None else str(got["wrong"])]
        print("| " + " | ".join(cells) + " |", flush=True)
    if not args.only:
        print("\nClass-balanced pseudo-labels, milliseconds:\n", flush=True)
        options = ["--device", args.device, "--repeats", "2" if args.quick else "10"]
        return subprocess.run([sys.executable, Path(__file__).with_name("bench_pseudo_label.py"), *options]).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())

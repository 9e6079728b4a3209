"""Time and memory of evaluation and re-ranking, against the plain way. Not collected by pytest.

    python tests/bench_reid.py [--threads 1] [--sizes small market msmt17] [--only evaluation re-ranking]

Synthetic features of 2,048 numbers, non-negative and of length 1 as a ResNet-50's are, around identities and a common
mean. The plain way: the matrix of distances by NumPy, argsort, a loop over queries (evaluation); dense matrices of all
images against all (re-ranking). "product": the float32 matrix product alone, the bound of all of them; "+ argsort":
followed by torch.argsort of its rows, the least that any way with sorted lists does. Each line is a process of its own.
Time is processor time with one thread, else wall-clock time; memory is the peak beyond what the features take (Linux).
A way that needs more than half of the machine's free memory is not run. Ratios: to ours, in one run.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import metrics_reid, ops  # noqa: E402

SIZES = {"small": (1000, 5000, 200, 6), "market": (3368, 19732, 750, 6), "msmt17": (11659, 82161, 3060, 15)}
CHANNELS = 2048
K1, K2, LAMBDA = 20, 6, 0.3


def make(size: str):
    """(features [Q + N, 2048] float32, Q, names of the queries [2, Q], names of the gallery [2, N])."""
    queries, gallery, identities, cameras = SIZES[size]
    g = torch.Generator().manual_seed(0)
    basis = torch.randn(64, CHANNELS, generator=g) / 8
    centres, mean = torch.randn(identities, 64, generator=g), torch.rand(CHANNELS, generator=g) / 2
    identity = torch.randint(identities, (queries + gallery,), generator=g)
    names = torch.stack([identity, torch.randint(cameras, identity.shape, generator=g)]).numpy()
    features = torch.empty(queries + gallery, CHANNELS)
    for rows in torch.arange(queries + gallery).split(1024):
        code = 0.7 * centres[identity[rows]] + torch.randn(len(rows), 64, generator=g)
        noise = 0.3 * torch.randn(len(rows), CHANNELS, generator=g)
        features[rows] = F.normalize((mean + code @ basis + noise).relu())
    return features, queries, names[:, :queries], names[:, queries:]


# ---- evaluation ----------------------------------------------------------------------------------------------------

def product(features, queries, query, gallery):
    for rows in features[:queries].split(512):
        for columns in features[queries:].split(2048):
            rows @ columns.t()


def product_argsort(features, queries, query, gallery):
    for rows in features[:queries].split(512):
        (rows @ features[queries:].t()).argsort(1)


def plain_scores(distance: np.ndarray, query, gallery) -> list[float]:
    """rank-1, trapezoidal mAP, mean of precisions: argsort, then query by query."""
    order, first, trapezoid, precision = np.argsort(distance, 1), [], [], []
    for i in range(len(distance)):
        same = gallery[0, order[i]] == query[0, i]
        hit = same[~(same & (gallery[1, order[i]] == query[1, i]))]
        place = np.flatnonzero(hit)
        if not len(place):
            continue
        at, count = place + 1, np.arange(1, len(place) + 1)
        before = np.where(place > 0, (count - 1) / np.maximum(place, 1), 1)
        first.append(place[0] == 0)
        trapezoid.append(np.mean((before + count / at) / 2))
        precision.append(np.mean(count / at))
    return [float(np.mean(x)) for x in (first, trapezoid, precision)]


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    d = a @ b.T
    d *= -2
    d += (a * a).sum(1)[:, None]
    d += (b * b).sum(1)
    return np.maximum(d, 1e-8, out=d)


def plain(features, queries, query, gallery):
    x = features.numpy()
    return plain_scores(squared_distances(x[:queries], x[queries:]), query, gallery)


def exact(features, queries, query, gallery):
    """The plain way in float64, which ours must equal to the last bit (in blocks, so that it fits)."""
    matches, own = metrics_reid.match_lists(*query, *gallery)
    parts = []
    for begin in range(0, queries, 256):
        at = slice(begin, min(begin + 256, queries))
        d = ops.distances(features[at], features[queries:])
        parts.append(ops.row_rank_counts(d, matches.of(at), own.of(at)))
    return summary(metrics_reid.scores(matches, ops.Ranks(*map(torch.cat, zip(*parts, strict=True)))))


def ours(features, queries, query, gallery):
    matches, own = metrics_reid.match_lists(*query, *gallery)
    return summary(metrics_reid.scores(matches, ops.rank_counts(features[:queries], features[queries:], matches, own)))


def summary(scores: metrics_reid.Scores) -> list[float]:
    return [float(scores.cmc[0]), scores.mean_ap("trapezoid"), scores.mean_ap("precision")]


# ---- re-ranking ----------------------------------------------------------------------------------------------------

def plain_rerank(features, queries, query, gallery):
    """The equations of metrics_reid.reranked in dense matrices and loops."""
    x = features.numpy()
    d = squared_distances(x, x)
    d = (d / d.max(0)).T
    order = np.argsort(d, 1)
    v = np.zeros_like(d)

    def reciprocal(i: int, k: int) -> np.ndarray:
        forward = order[i, :k + 1]
        return forward[(order[forward, :k + 1] == i).any(1)]

    for i in range(len(x)):
        r = expanded = reciprocal(i, K1)
        for c in r:
            half = reciprocal(c, round(K1 / 2))
            if len(np.intersect1d(half, r)) > 2 / 3 * len(half):
                expanded = np.append(expanded, half)
        expanded = np.unique(expanded)
        weight = np.exp(-d[i, expanded])
        v[i, expanded] = weight / weight.sum()
    v = np.stack([v[order[i, :K2]].mean(0) for i in range(len(x))])
    holders = [np.flatnonzero(v[:, j]) for j in range(len(x))]
    final = np.empty((queries, len(x)), np.float32)
    for i in range(queries):
        m = np.zeros(len(x), np.float32)
        for j in np.flatnonzero(v[i]):
            m[holders[j]] += np.minimum(v[i, j], v[holders[j], j])
        final[i] = (1 - LAMBDA) * (1 - m / (2 - m)) + LAMBDA * d[i]
    return plain_scores(final[:, queries:], query, gallery)


def our_rerank(features, queries, query, gallery):
    matches, own = metrics_reid.match_lists(*query, *gallery)
    return summary(metrics_reid.reranked_scores(features, queries, matches, own, k1=K1, k2=K2, lambda_=LAMBDA)[0])


def product_of_all(features, queries, query, gallery):
    for rows in features.split(512):
        for columns in features.split(2048):
            rows @ columns.t()


# name -> (function, bytes it needs for Q queries and N gallery images)
WAYS = {
    "evaluation": {
        "product": (product, lambda q, n: 0),
        "product + argsort": (product_argsort, lambda q, n: 512 * n * 12),
        "plain, NumPy": (plain, lambda q, n: q * n * (4 + 8)),
        "plain, float64": (exact, lambda q, n: 256 * n * 24),
        "ours": (ours, lambda q, n: 0)},
    "re-ranking": {
        "product": (product_of_all, lambda q, n: 0),
        "plain, NumPy": (plain_rerank, lambda q, n: (q + n) ** 2 * (4 * 3 + 8)),
        "ours": (our_rerank, lambda q, n: 0)}}


def measure(task: str, way: str, size: str, threads: int) -> dict:
    torch.set_num_threads(threads)
    inputs = make(size)
    ops.pair_distances(inputs[0][:1], inputs[0][:1], torch.tensor([0]), torch.tensor([0]))  # loads the kernels
    clock = time.process_time if threads == 1 else time.perf_counter
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = memory("VmRSS"), clock()
    scores = WAYS[task][way][0](*inputs)
    return {"seconds": clock() - start, "mb": memory("VmHWM") - before, "scores": scores}


def memory(key: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--sizes", nargs="*", choices=list(SIZES), default=list(SIZES))
    p.add_argument("--only", nargs="*", choices=list(WAYS), default=list(WAYS))
    p.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # task, way, size: in a process of its own
    args = p.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.threads)))
        return
    print(f"{torch.__version__}, {args.threads} thread(s), {CHANNELS} numbers a feature")
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "OPENBLAS_NUM_THREADS": str(args.threads),
                   "MKL_NUM_THREADS": str(args.threads)}
    for task in args.only:
        for size in args.sizes:
            queries, gallery = SIZES[size][:2]
            print(f"\n{task}, {queries:,} x {gallery:,}\n{'':20}{'seconds':>10}{'MB':>8}{'x ours':>8}  "
                  "rank-1, mAP trapezoid, mAP precision", flush=True)
            lines = {}
            for way, (_, needs) in WAYS[task].items():
                free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
                if needs(queries, gallery) > free / 2:
                    lines[way] = f"not run: needs {needs(queries, gallery) / 2**30:.0f} GB"
                    continue
                done = subprocess.run([sys.executable, __file__, "--threads", str(args.threads), "--one", task, way,
                                       size], env=environment, capture_output=True, text=True)
                lines[way] = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else \
                    f"failed: {(done.stderr.splitlines() or ['killed'])[-1]}"
            reference = lines["ours"]
            for way, line in lines.items():
                if isinstance(line, str) or isinstance(reference, str):
                    print(f"{way:20}{line}")
                    continue
                scores = ", ".join(f"{v:.17g}" for v in line["scores"] or ())
                print(f"{way:20}{line['seconds']:10.2f}{line['mb']:8.0f}"
                      f"{line['seconds'] / reference['seconds']:8.2f}  {scores}", flush=True)


if __name__ == "__main__":
    main()

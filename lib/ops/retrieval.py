"""Nearest neighbours for re-identification without a matrix of all distances: ranks, nearest lists, single distances.

The distance everywhere is the release's: d = max(|x|^2 + |y|^2 - 2 x y, 1e-8), squared Euclidean, in float64 and with
sums in one fixed order, so that every implementation gives the same ranks and lists, whatever its tiles and threads.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.ops.association import _full_type, _ordered_dot, _slices
from lib.ops.build import operator

_FLOOR = 1e-8
_PANEL_BYTES = 64 << 20  # of distances, or of gathered rows, at a time


class Lists(NamedTuple):
    """A list of gallery items for each query i, in ascending order: item[start[i]:start[i + 1]]."""

    start: Tensor  # [Q + 1] int64
    item: Tensor   # [P] int64

    @classmethod
    def from_pairs(cls, query: np.ndarray, item: np.ndarray, queries: int) -> Lists:
        """query, item: integers [P], sorted by query and then item."""
        start = np.searchsorted(query, np.arange(queries + 1))
        return cls(torch.from_numpy(start.astype(np.int64)), torch.from_numpy(np.asarray(item, np.int64)))

    @classmethod
    def empty(cls, queries: int) -> Lists:
        return cls(torch.zeros(queries + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))

    def of(self, queries: slice) -> Lists:
        """The lists of some queries."""
        start = self.start[queries.start:queries.stop + 1]
        return Lists(start - start[0], self.item[int(start[0]):int(start[-1])])


class Ranks(NamedTuple):
    """For each item of some Lists, how many gallery items lie where, seen from its query; [P] int64 each."""

    nearer: Tensor   # at a smaller distance
    equal: Tensor    # at the same distance, itself included
    earlier: Tensor  # of those, how many stand before it in the gallery


def rank_counts(query: Tensor, gallery: Tensor, listed: Lists, left_out: Lists | None = None) -> Ranks:
    """Ranks of the listed gallery items among all that are not left out, without a matrix of distances.

    query: [Q, C], gallery: [N, C], one floating dtype (half and bfloat16 are taken to float32). listed: the items whose
    ranks are wanted; left_out: items of each query that do not count, none of them listed.

    Exact: as if all distances were computed in float64 as the module describes and compared. Time is that of the
    float32 product; memory beyond the inputs does not grow with Q x N.
    Raises ValueError for wrong shapes, dtypes or lists and for values that are not finite.
    """
    query, gallery, (listed, left_out) = _checked(query, gallery, listed, left_out)
    with _float32_products(query.device):
        return Ranks(*_rank_counts(query, gallery, *listed, *left_out))


def topk_pairs(x: Tensor, y: Tensor, k: int, left_out: Lists | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest rows of y for each row of x, and how far the farthest is, without a matrix of distances.

    x: [N1, C], y: [N2, C], as in rank_counts. left_out: rows of y that do not count, for each row of x.
    Returns index [N1, k] int64 and distance [N1, k] float64, in ascending order, ties to the lowest index, -1 and inf
    where there are fewer; and farthest [N1] float64, the largest distance (-inf where nothing is left). Exact, and
    raises, as rank_counts.
    """
    x, y, (left_out,) = _checked(x, y, left_out)
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    with _float32_products(x.device):
        return _topk_pairs(x, y, k, *left_out)


def pair_distances(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Distances of x[i] to y[j], float64 [P], for i, j int64 [P], in the module's fixed order of sums."""
    x, y, _ = _checked(x, y)
    for name, index, n in (("i", i, len(x)), ("j", j, len(y))):
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < n:
            raise ValueError(f"pair_distances: {name} leaves 0 .. {n - 1}")
    return _pair_distances(x, y, i, j)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """All distances [N1, N2] as a float64 matrix product gives them: sums in any order, last bits may differ."""
    left = x.double()
    xx, result = left.square().sum(1, keepdim=True), torch.empty(len(x), len(y), dtype=torch.float64, device=x.device)
    for at in _slices(len(y), x.shape[1], left):
        right = y[at].double()
        result[:, at] = torch.addmm(xx + right.square().sum(1), left, right.t(), alpha=-2)
    return result.clamp_min_(_FLOOR)


def row_rank_counts(distance: Tensor, listed: Lists, left_out: Lists) -> Ranks:
    """rank_counts of a given matrix of distances [Q, N], as it is (it may not hold NaN)."""
    listed, left_out = (Lists(*(t.to(distance.device) for t in given)) for given in (listed, left_out))
    nearer, equal, earlier = (torch.zeros_like(listed.item) for _ in range(3))
    position = torch.arange(distance.shape[1], device=distance.device)
    starts, left_starts = listed.start.tolist(), left_out.start.tolist()
    for i, row in enumerate(distance):
        mine = slice(starts[i], starts[i + 1])
        item = listed.item[mine]
        if not len(item):
            continue
        row = row.clone()
        row[left_out.item[left_starts[i]:left_starts[i + 1]]] = torch.inf
        own = row[item, None]
        same = row == own
        nearer[mine] = (row < own).sum(1)
        equal[mine] = same.sum(1)
        earlier[mine] = (same & (position < item[:, None])).sum(1)
    return Ranks(nearer, equal, earlier)


# ---- references ----------------------------------------------------------------------------------------------------

@operator("rank_counts(Tensor query, Tensor gallery, Tensor start, Tensor item, Tensor left_start, Tensor left_item) "
          "-> (Tensor nearer, Tensor equal, Tensor earlier)")
def _rank_counts(query, gallery, start, item, left_start, left_item):
    listed, left_out, parts = Lists(start, item), Lists(left_start, left_item), []
    for at, d, margin in _distance_panels(query, gallery):
        mine = listed.of(at)
        row = torch.repeat_interleave(torch.arange(len(d), device=d.device), mine.start.diff())
        own = _pair_distances.reference(query[at], gallery, row, mine.item)
        for r, value in enumerate(own.split(mine.start.diff().tolist())):
            close = ((d[r] - value[:, None]).abs() <= margin[r]).any(0).nonzero()[:, 0]
            d[r, close] = _pair_distances.reference(query[at], gallery, torch.full_like(close, r), close)
        parts.append(row_rank_counts(d, mine, left_out.of(at)))
    if not parts:
        return tuple(torch.zeros_like(item) for _ in range(3))
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


@_rank_counts.register_fake
def _(query, gallery, start, item, left_start, left_item):
    return tuple(torch.empty_like(item) for _ in range(3))


@operator("topk_pairs(Tensor x, Tensor y, int k, Tensor left_start, Tensor left_item) "
          "-> (Tensor index, Tensor distance, Tensor farthest)")
def _topk_pairs(x, y, k, left_start, left_item):
    left_out = Lists(left_start, left_item)
    index = torch.full((len(x), k), -1, device=x.device)
    distance = torch.full((len(x), k), torch.inf, dtype=torch.float64, device=x.device)
    farthest = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
    for at, d, margin in _distance_panels(x, y):
        left = left_out.of(at)
        row = torch.repeat_interleave(torch.arange(len(d), device=d.device), left.start.diff())
        d[row, left.item] = torch.nan  # never among the candidates
        last = d.nan_to_num(torch.inf).kthvalue(min(k, len(y)), 1).values
        i, j = (d <= (last + margin)[:, None]).nonzero(as_tuple=True)
        exact = _pair_distances.reference(x[at], y, i, j)
        order = exact.argsort(stable=True)       # then by row: both sorts keep the order of j among equals
        order = order[i[order].argsort(stable=True)]
        i, j, exact = i[order], j[order], exact[order]
        place = torch.arange(len(i), device=i.device) - torch.searchsorted(i, i)
        kept = place < k
        index[at].index_put_((i[kept], place[kept]), j[kept])
        distance[at].index_put_((i[kept], place[kept]), exact[kept])
        i, j = (d >= (d.nan_to_num(-torch.inf).amax(1) - margin)[:, None]).nonzero(as_tuple=True)
        farthest[at].scatter_reduce_(0, i, _pair_distances.reference(x[at], y, i, j), "amax")
    return index, distance, farthest


@_topk_pairs.register_fake
def _(x, y, k, left_start, left_item):
    shape = (x.shape[0], k)
    return (x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.float64),
            x.new_empty(shape[0], dtype=torch.float64))


@operator("pair_distances(Tensor x, Tensor y, Tensor i, Tensor j) -> Tensor distance")
def _pair_distances(x, y, i, j):
    count, parts = max(1, _PANEL_BYTES // (8 * x.shape[1])), []
    for rows, cols in zip(i.split(count), j.split(count), strict=True):
        a, b = x[rows].double(), y[cols].double()
        parts.append((_ordered_dot(a, a) + _ordered_dot(b, b) - 2 * _ordered_dot(a, b)).clamp_min(_FLOOR))
    return torch.cat(parts) if parts else x.new_empty(0, dtype=torch.float64)


@_pair_distances.register_fake
def _(x, y, i, j):
    return x.new_empty(i.shape[0], dtype=torch.float64)


def _distance_panels(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their distances [R, N2], how far another order of sums may move a distance [R])."""
    unit = 8 * (x.shape[1] + 16) * torch.finfo(torch.float64).eps
    longest = max((float(y[at].double().square().sum(1).max()) for at in _slices(*y.shape, y)), default=0.0)
    rows = max(1, _PANEL_BYTES // (8 * max(len(y), 1)))
    for begin in range(0, len(x), rows):
        at = slice(begin, min(begin + rows, len(x)))
        yield at, distances(x[at], y), unit * (x[at].double().square().sum(1) + longest)


@contextlib.contextmanager
def _float32_products(device: torch.device) -> Iterator[None]:
    """Full float32, whatever torch.set_float32_matmul_precision allows elsewhere: the bound of the tiles needs it."""
    settings = torch.backends.cuda.matmul if device.type == "cuda" else getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(settings, "fp32_precision"):  # before PyTorch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _checked(x: Tensor, y: Tensor, *lists: Lists | None) -> tuple[Tensor, Tensor, list[Lists]]:
    same = x is y
    x, y = (t.detach().to(_full_type(t)) for t in (x, y))
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or not x.shape[1]:
        raise ValueError(f"expected [N1, C] and [N2, C], got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.dtype != y.dtype or x.dtype not in (torch.float32, torch.float64) or x.device != y.device:
        raise ValueError(f"expected one floating dtype and one device, got {x.dtype} on {x.device} and {y.dtype} on "
                         f"{y.device}")
    for name, t in (("the first features", x), ("the second features", y)):
        if len(t) and not all(bool(t[at].sum(dtype=torch.float64).isfinite()) for at in _slices(*t.shape, t)):
            raise ValueError(f"{name} hold NaN or infinite values")
    checked = []
    for given in lists:
        start, item = given or Lists.empty(len(x))
        if start.shape != (len(x) + 1,) or start[0] != 0 or start[-1] != len(item) or bool((start.diff() < 0).any()):
            raise ValueError(f"lists: start must hold {len(x) + 1} places that rise from 0 to {len(item)}")
        if len(item) and not 0 <= int(item.min()) <= int(item.max()) < len(y):
            raise ValueError(f"lists: items leave 0 .. {len(y) - 1}")
        checked.append(Lists(start.to(x.device), item.to(x.device)))
    return x, x if same else y, checked

"""Scores of person re-identification: CMC, two kinds of average precision, and k-reciprocal re-ranking.

Everything follows from counts: for each query and each of its true matches, how many gallery images lie nearer and how
many equally far. lib.ops.rank_counts takes them in tiles, so that no matrix of queries x gallery is ever stored.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from lib import ops
from lib.ops import Lists, Ranks

JUNK = -1  # the identity of bad detections, which are no part of the gallery


class Scores(NamedTuple):
    """What ``scores`` returns. Per query, NaN (or 0) where it has no match."""

    cmc: np.ndarray           # [max_rank], cmc[k - 1]: share of queries with a match among the k nearest
    trapezoid: np.ndarray     # [Q] area under the precision-recall curve: MATLAB evaluation, ECN, CamStyle
    precision: np.ndarray     # [Q] mean of the precisions at the matches: torchreid, fast-reid, open-reid today
    first: np.ndarray         # [Q] int64, place of the first match, from 0; -1 without one
    unmatched: np.ndarray     # indices of the queries without a match

    def mean_ap(self, which: str = "trapezoid") -> float:
        """mAP over the queries that count."""
        return float(np.nanmean(getattr(self, which)))


def match_lists(query_ids: np.ndarray, query_cams: np.ndarray, gallery_ids: np.ndarray,
                gallery_cams: np.ndarray) -> tuple[Lists, Lists]:
    """(matches, left out): per query the gallery's images of its identity from other cameras, and from its own.

    All arguments: integers, [Q] or [N]. Raises ValueError where the gallery holds junk: drop it first.
    """
    if (np.asarray(gallery_ids) == JUNK).any():
        raise ValueError(f"the gallery holds junk (identity {JUNK}), which every protocol drops first")
    order = np.argsort(gallery_ids, kind="stable")  # so that the lists ascend
    ordered = np.asarray(gallery_ids)[order]
    begin, end = np.searchsorted(ordered, query_ids, "left"), np.searchsorted(ordered, query_ids, "right")
    query = np.repeat(np.arange(len(query_ids)), end - begin)
    item = order[np.arange(len(query)) - np.repeat(np.cumsum(end - begin) - end, end - begin)]
    own = np.asarray(gallery_cams)[item] == np.asarray(query_cams)[query]
    return tuple(Lists.from_pairs(query[chosen], item[chosen], len(query_ids)) for chosen in (~own, own))


def scores(matches: Lists, ranks: Ranks, *, ties: str = "group", unmatched: str = "skip",
           max_rank: int = 20) -> Scores:
    """CMC and both average precisions from the counts of lib.ops.rank_counts.

    With h matches up to and including a match, and n images: precision h / n. The mean of precisions takes the images
    one by one, equal distances in the gallery's order, and so does CMC. The trapezoidal AP adds, at every match, its
    recall times the mean of the precisions there and one image before (1 before the first image).

    ties: "group": the trapezoidal AP takes equal distances as one point of the curve (ECN, by scikit-learn);
        "items": one by one (the MATLAB evaluation of Market-1501).
    unmatched: a query without a match is left out of the means ("skip"), or counts as 0 in them ("zero", MATLAB).
    """
    if ties not in ("group", "items") or unmatched not in ("skip", "zero"):
        raise ValueError(f"ties={ties!r}, unmatched={unmatched!r}: expected group or items, skip or zero")
    start = matches.start.cpu().numpy()
    nearer, equal, earlier = (x.cpu().numpy() for x in ranks)
    count = np.diff(start)
    query = np.repeat(np.arange(len(count)), count)
    place = nearer + earlier
    order = np.lexsort((place, query))
    nearer, equal, place = nearer[order], equal[order], place[order]
    hits = np.arange(len(query)) - start[query]  # matches before this one

    precision = (hits + 1) / (place + 1)
    if ties == "items":
        before = np.divide(hits, place, out=np.ones(len(place)), where=place > 0)
        area = (before + precision) / 2
    else:  # every match of a group contributes the same trapezoid
        new = np.ones(len(query), bool)
        new[1:] = (query[1:] != query[:-1]) | (nearer[1:] != nearer[:-1])
        group = np.cumsum(new) - 1
        size, hits_before = np.bincount(group)[group] if len(group) else group, hits[new][group]
        before = np.divide(hits_before, nearer, out=np.ones(len(place)), where=nearer > 0)
        area = (before + (hits_before + size) / (nearer + equal)) / 2

    empty = count == 0
    absent = np.nan if unmatched == "skip" else 0.0
    first = np.full(len(count), -1)
    first[~empty] = place[start[:-1][~empty]]
    trapezoid, mean = (np.where(empty, absent, np.bincount(query, x, len(count)) / np.maximum(count, 1))
                       for x in (area, precision))
    used = first if unmatched == "zero" else first[~empty]
    found = np.bincount(used[(used >= 0) & (used < max_rank)], minlength=max_rank)
    cmc = np.cumsum(found) / len(used) if len(used) else np.full(max_rank, np.nan)
    return Scores(cmc, trapezoid, mean, first, np.flatnonzero(empty))


# ---- re-ranking ----------------------------------------------------------------------------------------------------

def reranked(features: Tensor, queries: int, *, k1: int = 20, k2: int = 6, lambda_: float = 0.3, power: int = 1,
             rows: int = 128) -> Iterator[tuple[slice, Tensor]]:
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017): blocks (queries, their new distances [rows, N] float64).

    features: [Q + N, C], the queries first. Distances are squared Euclidean; power=2 squares them again (torchreid).
    Stored are the k1 + 1 nearest of every image and sparse rows of weights, never a (Q + N) x (Q + N) matrix.

    (1) d_ij: distance over the largest of its row i.  (2) R(i): those of the k1 + 1 nearest of i (itself included) that
    have i among theirs.  (3) R*(i): R(i), and R(c), taken with round(k1 / 2) + 1 nearest, of every c in R(i) that has
    more than two thirds of it inside R(i).  (4) V_ij = exp(-d_ij) over R*(i), normalised, then the mean of the rows of
    the k2 nearest of i.  (5) Jaccard distance 1 - m / (2 - m), m = sum_k min(V_ik, V_jk).
    (6) (1 - lambda) Jaccard + lambda d.
    """
    total = len(features)
    if not 0 < queries < total:
        raise ValueError(f"{queries} queries of {total} images: expected some queries and some gallery")
    nearest, distance, farthest = ops.topk_pairs(features, features, min(k1 + 1, total))
    largest = (farthest ** power).cpu().numpy()
    near = nearest.cpu().numpy()
    weights = _weights(features, near, (distance ** power).cpu().numpy() / largest[:, None], largest, k1, power)
    if k2 > 1:
        k2 = min(k2, near.shape[1])
        mean = scipy.sparse.csr_array((np.full(total * k2, 1 / k2), near[:, :k2].ravel(),
                                       np.arange(0, total * k2 + 1, k2)), shape=(total, total))
        weights = mean @ weights
    by_image = weights[queries:].tocsc()  # for each image the gallery's rows that give it weight
    query, gallery = features[:queries], features[queries:]
    for begin in range(0, queries, rows):
        at = slice(begin, min(begin + rows, queries))
        jaccard = np.stack([_jaccard(weights[[i]], by_image) for i in range(at.start, at.stop)])
        d = ops.distances(query[at], gallery) ** power
        d /= torch.from_numpy(largest[at, None]).to(d.device)
        yield at, d.mul_(lambda_).add_(torch.from_numpy(jaccard).to(d.device), alpha=1 - lambda_)


def reranked_scores(features: Tensor, queries: int, matches: Lists, left_out: Lists, *, show: Sequence[int] = (),
                    k: int = 10, ties: str = "group", unmatched: str = "skip",
                    **settings) -> tuple[Scores, dict[int, list[int]]]:
    """(scores after re-ranking, the k nearest of the queries in ``show``); **settings: see ``reranked``."""
    parts, nearest = [], {}
    for at, distance in reranked(features, queries, **settings):
        parts.append(ops.row_rank_counts(distance, matches.of(at), left_out.of(at)))
        for i in set(show) & set(range(at.start, at.stop)):
            row = distance[i - at.start]
            row[left_out.of(slice(i, i + 1)).item] = torch.inf
            order = row.argsort(stable=True)[:k]
            nearest[i] = torch.where(row[order] < torch.inf, order, -1).tolist()
    ranks = Ranks(*(torch.cat(x) for x in zip(*parts, strict=True)))
    return scores(matches, ranks, ties=ties, unmatched=unmatched), nearest


def _weights(features: Tensor, near: np.ndarray, d: np.ndarray, largest: np.ndarray, k1: int,
             power: int) -> scipy.sparse.csr_array:
    """V of steps (2) to (4): sparse [total, total]. near, d: [total, k1 + 1], the nearest and their d."""
    total = len(near)
    half = round(k1 / 2) + 1
    listed = np.sort(_keys(near))
    halves = np.sort(_keys(near[:, :half]))
    mutual = _contains(listed, near * total + np.arange(total)[:, None])             # [total, k1 + 1]: in R(i)
    mutual_half = _contains(halves, near[:, :half] * total + np.arange(total)[:, None])
    in_r = np.sort(_keys(near)[mutual.ravel()])
    sets = []
    for at in np.array_split(np.arange(total), max(1, total // 4096)):
        row, column = np.nonzero(mutual[at])
        i, c = at[row], near[at[row], column]
        keys, real = i[:, None] * total + near[c, :half], mutual_half[c]             # R(c): [pairs, half]
        inside = (_contains(in_r, keys) & real).sum(1)
        sets.append(np.unique(np.concatenate([i * total + c, keys[(inside > 2 / 3 * real.sum(1))[:, None] & real]])))
    pairs = np.concatenate(sets)
    i, j = pairs // total, pairs % total
    known = np.argsort(_keys(near), kind="stable")
    place = np.minimum(np.searchsorted(listed, pairs), len(listed) - 1)
    value = d.ravel()[known[place]]
    unknown = listed[place] != pairs                                                 # from R(c), not listed at i
    left, right = (torch.from_numpy(x[unknown]).to(features.device) for x in (i, j))
    value[unknown] = (ops.pair_distances(features, features, left, right) ** power).cpu().numpy() / largest[i[unknown]]
    value = np.exp(-value)
    start = np.searchsorted(i, np.arange(total + 1))
    value /= np.bincount(i, value, total)[i]
    return scipy.sparse.csr_array((value, j, start), shape=(total, total))


def _keys(near: np.ndarray) -> np.ndarray:
    """Pairs (i, j in row i) as one integer each, flat."""
    return (np.arange(len(near))[:, None] * len(near) + near).ravel()


def _contains(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[place] == values


def _jaccard(row: scipy.sparse.csr_array, by_image: scipy.sparse.csc_array) -> np.ndarray:
    """Step (5) for one query, row [1, total], against the gallery, by_image [N, total]."""
    begin, end = by_image.indptr[row.indices], by_image.indptr[row.indices + 1]
    count = end - begin
    place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - end, count)
    shared = np.minimum(np.repeat(row.data, count), by_image.data[place])
    m = np.bincount(by_image.indices[place], shared, by_image.shape[0])
    return 1 - m / (2 - m)

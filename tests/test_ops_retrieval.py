"""Ranks and nearest lists: exact whatever the tiles, threads and ties, as if all distances had been compared."""
import numpy as np
import pytest
import torch
from vectors import vectors

from lib import ops
from lib.ops import retrieval
from lib.ops.build import kernels

pytestmark = pytest.mark.usefixtures("all_cores")
SIZES = [(1, 1, 1), (530, 20, 3), (9, 1100, 33), (7, 70, 530)]  # each with an edge of the tiles: 512 x 512 x 512
KINDS = ["random", "clustered", "duplicates", "ties", "ranges", "tiny"]


def all_distances(x, y):
    i, j = torch.arange(len(x)).repeat_interleave(len(y)), torch.arange(len(y)).repeat(len(x))
    return retrieval._pair_distances.reference(x, y, i, j).view(len(x), len(y))


def some_lists(queries: int, items: int):
    """Up to about twenty items a query in each of two disjoint lists; some lists are empty."""
    rng = np.random.default_rng(0)
    which = rng.integers(0, 3, (queries, items)) * (rng.random((queries, items)) < min(1, 40 / items))
    return [ops.Lists.from_pairs(*np.nonzero(which == n), queries) for n in (1, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_exact(backend, kind):
    for dtype in (torch.float32, torch.float64):
        for n1, n2, c in SIZES:
            x, y = vectors(kind, n1, c, 1, dtype), vectors(kind, n2, c, 2, dtype)
            listed, left_out = some_lists(n1, n2)
            d = all_distances(x, y)
            for got, want in zip(ops.rank_counts(x, y, listed, left_out),
                                 ops.row_rank_counts(d, listed, left_out), strict=True):
                assert torch.equal(got, want), (dtype, n1, n2, c)

            k, row = min(5, n2) + 1, torch.arange(n1).repeat_interleave(left_out.start.diff())
            index, distance, farthest = ops.topk_pairs(x, y, k, left_out)
            d[row, left_out.item] = torch.inf
            ordered = torch.sort(d, dim=1, stable=True)
            assert torch.equal(distance[:, :n2], ordered.values[:, :k])
            assert torch.equal(index[:, :n2], torch.where(distance[:, :n2] < torch.inf, ordered.indices[:, :k], -1))
            assert (distance[:, n2:] == torch.inf).all() and (index[:, n2:] == -1).all()
            d[row, left_out.item] = -torch.inf
            assert torch.equal(farthest, d.amax(1))


def test_all_alike(backend):
    """A collapsed network: every image the same point."""
    x = torch.ones(3, 64)
    y = torch.ones(1100, 64)
    listed = ops.Lists.from_pairs(np.array([0, 0, 2]), np.array([0, 1099, 7]), 3)
    nearer, equal, earlier = ops.rank_counts(x, y, listed)
    assert nearer.tolist() == [0, 0, 0] and equal.tolist() == [1100] * 3 and earlier.tolist() == [0, 1099, 7]
    index, distance, farthest = ops.topk_pairs(x, y, 3)
    assert index.tolist() == [[0, 1, 2]] * 3
    assert (distance == 1e-8).all() and (farthest == 1e-8).all()


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicates", "ties"])
def test_threads_do_not_matter(compiled, kind):
    x, y = vectors(kind, 130, 40, 1), vectors(kind, 600, 40, 2)
    listed, left_out = some_lists(130, 600)
    ops.use("reference")
    expected = [*ops.rank_counts(x, y, listed, left_out), *ops.topk_pairs(x[:100], y, 21)]
    ops.use("compiled")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for got, want in zip([*ops.rank_counts(x, y, listed, left_out), *ops.topk_pairs(x[:100], y, 21)], expected,
                                 strict=True):
                assert torch.equal(got, want)
    finally:
        torch.set_num_threads(before)
        ops.use("auto")


def test_a_lower_precision_of_products_elsewhere_changes_nothing(compiled):
    x, y = vectors("random", 60, 600, 1), vectors("clustered", 300, 600, 2)
    listed, left_out = some_lists(60, 300)
    want = [*ops.rank_counts(x, y, listed, left_out), *ops.topk_pairs(x, y, 5)]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        got = [*ops.rank_counts(x, y, listed, left_out), *ops.topk_pairs(x, y, 5)]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(map(torch.equal, got, want))


def test_the_same_from_strided_half_and_one_tensor(backend):
    x = vectors("random", 70, 40, 1)
    want = ops.topk_pairs(x, x.clone(), 4)
    for got in (ops.topk_pairs(x, x, 4), ops.topk_pairs(x.t().contiguous().t(), x, 4)):
        assert all(map(torch.equal, got, want))
    assert want[0][:, 0].tolist() == list(range(70))  # itself
    half = x.half()
    assert torch.equal(ops.topk_pairs(half, half, 4)[1], ops.topk_pairs(half.float(), half.float(), 4)[1])
    i, j = torch.tensor([0, 69, 3]), torch.tensor([69, 0, 3])
    got = ops.pair_distances(x, x, i, j)
    assert torch.equal(got, all_distances(x, x)[i, j]) and got[2] == 1e-8


def test_distances_do_not_depend_on_the_slices(monkeypatch):
    x, y = vectors("random", 50, 40, 1), vectors("random", 90, 40, 2)
    want = all_distances(x, y)
    torch.testing.assert_close(ops.distances(x, y), want, rtol=1e-13, atol=1e-12)
    monkeypatch.setattr(retrieval, "_slices", lambda n, *_: [slice(i, min(i + 7, n)) for i in range(0, n, 7)])
    torch.testing.assert_close(ops.distances(x, y), want, rtol=1e-13, atol=1e-12)


def test_memory_does_not_grow_with_the_matrix(compiled):
    """20,000 x 20,000 distances are 1.6 GB in float32; the peak of the process may rise by far less."""
    import resource

    x = vectors("random", 20000, 4, 1)
    listed = ops.Lists.from_pairs(np.arange(20000), np.arange(20000)[::-1].copy(), 20000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ops.rank_counts(x, x, listed)
    ops.topk_pairs(x, x, 2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KB


def test_bad_input(backend):
    x, y = vectors("random", 4, 5, 1), vectors("random", 6, 5, 2)
    lists = ops.Lists.from_pairs(np.array([0, 3]), np.array([5, 0]), 4)
    spoilt = y.clone()
    spoilt[3, 2] = torch.nan
    for call, message in (
            (lambda: ops.rank_counts(x, spoilt, lists), "NaN or infinite"),
            (lambda: ops.topk_pairs(spoilt, x, 2), "NaN or infinite"),
            (lambda: ops.rank_counts(x, y[:, :4], lists), r"\[N1, C\]"),
            (lambda: ops.rank_counts(x.double(), y, lists), "one floating dtype"),
            (lambda: ops.rank_counts(x.long(), y.long(), lists), "one floating dtype"),
            (lambda: ops.rank_counts(x, y[:5], lists), "items leave 0 .. 4"),
            (lambda: ops.rank_counts(x[:3], y, lists), "start must hold 4"),
            (lambda: ops.rank_counts(x, y, ops.Lists(lists.start.flip(0), lists.item)), "rise from 0 to 2"),
            (lambda: ops.topk_pairs(x, y, 0), "k must be at least 1"),
            (lambda: ops.pair_distances(x, y, torch.tensor([0]), torch.tensor([6])), "j leaves 0 .. 5")):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("name", ["rank_counts", "topk_pairs", "pair_distances"])
def test_opcheck(compiled, name):
    x, y = vectors("random", 20, 8, 1), vectors("random", 30, 8, 2)
    lists = [t for pair in some_lists(20, 30) for t in pair]
    arguments = {"rank_counts": (x, y, *lists), "topk_pairs": (x, y, 3, *lists[2:]),
                 "pair_distances": (x, y, torch.tensor([0, 19]), torch.tensor([29, 0]))}[name]
    torch.library.opcheck(getattr(kernels(), name), arguments)


# ---- CUDA against the CPU ----

@pytest.mark.parametrize("kind", KINDS)
def test_cuda_gives_the_same(compiled, cuda, kind):
    for dtype, (n1, n2, c) in zip((torch.float32, torch.float64) * 2, [(1, 1, 1), (12, 90, 3), (9, 130, 33),
                                                                       (5, 40, 530)], strict=True):
        x, y = vectors(kind, n1, c, 1, dtype), vectors(kind, n2, c, 2, dtype)
        lists = some_lists(n1, n2)
        i, j = torch.arange(n1), torch.arange(n1) % n2

        def results(to, x=x, y=y, lists=lists, i=i, j=j):
            on = [ops.Lists(*map(to, given)) for given in lists]
            return [*ops.rank_counts(to(x), to(y), *on), *ops.topk_pairs(to(x), to(y), 4, on[1]),
                    ops.pair_distances(to(x), to(y), to(i), to(j))]

        for got, want in zip(cuda.run(results), results(lambda t: t), strict=True):
            assert torch.equal(got, want), (dtype, n1, n2, c)


def test_cuda_across_tiles(compiled, cuda):
    """More rows and columns than a tile of 1,024 x 4,096 has."""
    x, y = vectors("duplicates", 1030, 2, 1), vectors("duplicates", 4100, 2, 2)
    rows = ops.Lists.from_pairs(np.array([0, 1029, 1029]), np.array([4099, 0, 4098]), 1030)
    for a, b, listed in ((x, y[:40], None), (x[1022:], y, rows.of(slice(1022, 1030)))):
        def results(to, a=a, b=b, listed=listed):
            ranks = [] if listed is None else ops.rank_counts(to(a), to(b), ops.Lists(*map(to, listed)))
            return [*ranks, *ops.topk_pairs(to(a), to(b), 3)]

        assert all(map(torch.equal, cuda.run(results), results(lambda t: t)))


def test_cuda_refuses_what_is_not_finite(cuda):
    x = vectors("random", 4, 5, 1)
    x[1, 2] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        cuda.run(lambda to: ops.topk_pairs(to(x), to(x), 2))

"""Cycle association: exact indices, the tiled loss against the direct form, gradients, hostile inputs."""
import contextlib
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from vectors import vectors

from lib import ops
from lib.ops.association import _attention_grad_, _contrast_softmax_, _ordered_dot, _product_argmax, _softmax_grad_
from train_pixel_assoc import association

pytestmark = pytest.mark.usefixtures("all_cores")
KINDS = ["random", "clustered", "duplicates", "ties", "ranges"]


def unit(x):
    norm = x.double().square().sum(1).sqrt().to(x.dtype)[:, None]
    return (x / torch.where(norm > 0, norm, 1)).double()


def check_exact(a, b, index, value):
    """The float64 dot product at index is the maximum, and no lower index has a vector that ties with it exactly."""
    a, b = unit(a), unit(b)
    s = a @ b.t()
    at_index = s.gather(1, index[:, None])[:, 0]
    assert (at_index >= s.max(1).values - 1e-14).all()
    torch.testing.assert_close(value.double(), at_index, rtol=1e-6, atol=1e-7)
    i, j = (s > at_index[:, None] - 1e-14).nonzero(as_tuple=True)
    i, j = i[j < index[i]], j[j < index[i]]  # summed in the operator's documented order, these must be smaller
    assert (_ordered_dot(a[i], b[j]) < _ordered_dot(a[i], b[index[i]])).all()


SIZES = [(1, 1, 1), (1, 15, 19), (15, 1, 256), (441, 300, 19), (300, 441, 256), (130, 77, 2048)]
# Every size with every kind or dtype, every kind with every dtype.
CASES = [(size, KINDS[(i + k) % len(KINDS)], (torch.float32, torch.float64)[(i + k) % 2])
         for i, size in enumerate(SIZES) for k in (0, 1, 3)]


@pytest.mark.parametrize("size,kind,dtype", CASES, ids=str)
def test_mutual_argmax(backend, size, kind, dtype):
    n1, n2, c = size
    a, b = vectors(kind, n1, c, 1, dtype), vectors(kind, n2, c, 2, dtype)
    row_index, row_value, col_index, col_value = ops.mutual_argmax(a, b)
    check_exact(a, b, row_index, row_value)
    check_exact(b, a, col_index, col_value)


def test_the_papers_size(compiled):
    """92 x 92 pixels against 92 x 90, with duplicates: exact indices; the loss on probabilities and its gradients."""
    a, b = vectors("random", 8464, 19, 1), vectors("duplicates", 8280, 19, 2)
    found = ops.mutual_argmax(a, b)
    for x, y, index in ((a, b, found[0]), (b, a, found[2])):
        for rows in torch.arange(len(x)).split(1024):
            s = unit(x[rows]) @ unit(y).t()
            assert (s.gather(1, index[rows, None])[:, 0] >= s.max(1).values - 1e-14).all()
    x_s, x_t = (x.softmax(1).t().reshape(1, 19, 92, -1) for x in (a, b))
    y_s = torch.randint(19, (1, 92, 92), generator=torch.Generator().manual_seed(0))
    results = {}
    for mode in ("compiled", "reference"):
        ops.use(mode)
        inputs = [x.clone().requires_grad_() for x in (x_s, x_t)]
        loss, kept, _, forward, _ = ops.cycle_association_loss(*inputs, y_s, metric="kl")
        results[mode] = loss.detach(), kept, forward, *torch.autograd.grad(loss, inputs)
    ops.use("auto")
    assert torch.equal(results["compiled"][2], results["reference"][2]) and results["compiled"][1] > 0
    for got, want in zip(results["compiled"], results["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("kind", ["clustered", "duplicates", "ties"])
def test_tiles_and_threads_do_not_matter(compiled, kind):
    """Several tiles in both directions; the same bits from the reference, from one thread and from two."""
    a, b = vectors(kind, 1100, 32, 1), vectors(kind, 2100, 32, 2)
    ops.use("reference")
    expected = ops.mutual_argmax(a, b)
    ops.use("auto")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in range(2):
                for got, want in zip(ops.mutual_argmax(a, b), expected, strict=True):
                    assert torch.equal(got, want)
    finally:
        torch.set_num_threads(before)


def test_argmax_of_strided_and_half_inputs(backend):
    a, b = vectors("random", 32, 50, 1), vectors("random", 32, 41, 2)
    expected = ops.mutual_argmax(a.t().contiguous(), b.t().contiguous())
    for got, want in zip(ops.mutual_argmax(a.t(), b.t()), expected, strict=True):
        assert torch.equal(got, want)
    a, b = a.t().bfloat16(), b.t().bfloat16()
    assert torch.equal(ops.mutual_argmax(a, b)[0], ops.mutual_argmax(a.float(), b.float())[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_an_error(backend, bad):
    a = vectors("random", 5, 4, 1)
    with pytest.raises(ValueError, match="NaN"):
        ops.mutual_argmax(a, torch.where(a == a[2, 2], bad, a))
    x = torch.rand(1, 4, 2, 3)
    x[0, 1, 1, 1] = bad
    with pytest.raises(ValueError, match="NaN"):
        ops.cycle_association_loss(torch.rand(1, 4, 2, 3), x, torch.zeros(1, 2, 3, dtype=torch.long))


def test_wrong_arguments():
    x, y = torch.rand(2, 4, 3, 3), torch.zeros(2, 3, 3, dtype=torch.long)
    for call in (lambda: ops.mutual_argmax(x[0], x[0]), lambda: ops.mutual_argmax(torch.rand(0, 3), torch.rand(2, 3)),
                 lambda: ops.mutual_argmax(torch.rand(2, 3), torch.rand(2, 3).double()),
                 lambda: ops.cycle_association_loss(x, x[:1], y), lambda: ops.cycle_association_loss(x, x, y[:, :2]),
                 lambda: ops.cycle_association_loss(x, x, y.float()), lambda: ops.spatial_aggregate(x, "cosine"),
                 lambda: ops.cycle_association_loss(-x, x, y, metric="kl"), lambda: ops.spatial_aggregate(x[0])):
        with pytest.raises(ValueError):
            call()


# ---- the loss ----

def maps(metric, shape_s, shape_t, dtype=torch.float64, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x_s, x_t = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in (shape_s, shape_t))
    if metric == "kl":
        x_s, x_t = (2 * x_s).softmax(1), (2 * x_t).softmax(1)
    y = torch.randint(classes, (shape_s[0], *shape_s[2:]), generator=g)
    y[:, 0, : shape_s[3] // 3] = 255
    return x_s.to(dtype).requires_grad_(), x_t.to(dtype).requires_grad_(), y


@pytest.mark.parametrize("metric", ["cos", "kl"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shapes", [((2, 19, 6, 7), (2, 19, 5, 9)), ((1, 256, 9, 5), (1, 256, 9, 5))], ids=str)
def test_loss_and_gradients_equal_the_direct_form(backend, metric, alpha, shapes, monkeypatch):
    monkeypatch.setattr("lib.ops.association._panel_bytes", lambda: 4096)  # several panels
    x_s, x_t, y = maps(metric, *shapes)
    want = association(x_s, x_t, y, metric=metric, alpha=alpha)  # the paper's formulas with N x N matrices
    grads = torch.autograd.grad(want.loss, (x_s, x_t))
    got = ops.cycle_association_loss(x_s, x_t, y, metric=metric, alpha=alpha)
    assert got.kept > 0
    for g, w in zip(got[1:], want[1:], strict=True):
        assert torch.equal(g, w)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-10, atol=0)
    for g, w in zip(torch.autograd.grad(got.loss, (x_s, x_t)), grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10 * w.abs().max().item())


@pytest.mark.parametrize("metric", ["cos", "kl"])
def test_float32_is_as_good_as_the_direct_form(backend, metric):
    x_s, x_t, y = maps(metric, (2, 19, 21, 21), (2, 19, 15, 30))
    want = torch.autograd.grad(association(x_s, x_t, y, metric=metric, alpha=0.5).loss, (x_s, x_t))
    narrow = [x.detach().float().requires_grad_() for x in (x_s, x_t)]
    got = torch.autograd.grad(ops.cycle_association_loss(*narrow, y, metric=metric).loss, narrow)
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() < 1e-5 * w.norm()


@pytest.mark.parametrize("metric", ["cos", "kl"])
def test_gradcheck(backend, metric):
    """The published gradient treats standard deviations as constants, so that numbers can only confirm kl's aggregation
    here; for the rest test_loss_and_gradients_equal_the_direct_form compares with autograd, which detaches them too."""
    x = maps("kl", (1, 4, 3, 3), (1, 4, 3, 3))[0]
    if metric == "kl":
        assert torch.autograd.gradcheck(lambda v: ops.spatial_aggregate(v, "kl", 0.5), (x,), atol=1e-7)
        return
    # cos: with sigma held constant, the softmax of v^ v^^T / sigma.
    sigma = F.normalize(_flat(x), dim=1).detach() @ F.normalize(_flat(x), dim=1).detach().t()
    sigma = sigma.std(1, keepdim=True) + 1e-10

    def frozen(v):
        unit_v = F.normalize(_flat(v), dim=1)
        return (0.5 * _flat(v) + 0.5 * (unit_v @ unit_v.t() / sigma).softmax(1) @ _flat(v)).t().reshape(v.shape)

    assert torch.autograd.gradcheck(frozen, (x,))
    weight = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    got, = torch.autograd.grad((ops.spatial_aggregate(x, "cos", 0.5) * weight).sum(), x)
    want, = torch.autograd.grad((frozen(x) * weight).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", ["cos", "kl"])
def test_a_second_backward_pass_gives_the_same_gradients(backend, metric):
    """The first one gives the buffers away that the forward pass has filled."""
    x_s, x_t, y = maps(metric, (2, 4, 3, 4), (2, 4, 4, 4), classes=2)
    loss = ops.cycle_association_loss(x_s, x_t, y, metric=metric).loss
    first = torch.autograd.grad(loss, (x_s, x_t), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(2 * loss, (x_s, x_t))
    assert all(map(torch.equal, first, kept)) and first[0].abs().max() > 0
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


def _flat(x):
    return x[0].flatten(1).t()


@pytest.mark.parametrize("metric", ["cos", "kl"])
def test_numerical_gradient_of_the_loss(backend, metric):
    """Central differences of the loss with standard deviations and indices frozen at the point of expansion."""
    x_s, x_t, y = maps(metric, (1, 4, 3, 4), (1, 4, 4, 4), classes=2)
    got = ops.cycle_association_loss(x_s, x_t, y, metric=metric, alpha=0.0)
    g = torch.autograd.grad(got.loss, (x_s, x_t))
    j, i_back, rows = got.forward[0], got.back[0], got.selected.flatten(1)[0].nonzero()[:, 0]

    def scores(a, z):
        if metric == "cos":
            s = F.normalize(a, dim=1) @ F.normalize(z, dim=1).t()
            return s, s.t()
        return a @ (z + 1e-10).log().t(), z @ (a + 1e-10).log().t()

    with torch.no_grad():
        s, t = scores(_flat(x_s), _flat(x_t))
        kl = metric == "kl"
        own = [(p * (p + 1e-10).log()).sum(1, keepdim=True) if kl else 0 for p in (_flat(x_s), _flat(x_t))]
        sigma, tau = ((m - o).std(1, keepdim=True) for m, o in zip((s, t), own, strict=True))

    def frozen(a, z):
        s, t = scores(_flat(a), _flat(z))
        p, q = (s / sigma).log_softmax(1), (t / tau).log_softmax(1)
        return -(p[rows, j[rows]] + q[j[rows], i_back[rows]]).mean()

    assert torch.autograd.gradcheck(frozen, (x_s, x_t), atol=1e-6)
    for got_grad, want in zip(g, torch.autograd.grad(frozen(x_s, x_t), (x_s, x_t)), strict=True):
        torch.testing.assert_close(got_grad, want, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("metric", ["cos", "kl"])
def test_nothing_kept_is_an_attached_zero(backend, metric):
    x_s, x_t, y = maps(metric, (1, 4, 3, 3), (1, 4, 3, 3))
    got = ops.cycle_association_loss(x_s, x_t, torch.full_like(y, 255), metric=metric)
    assert got.loss.item() == 0 and got.kept.item() == 0 and not got.selected.any()
    (got.loss * 0.1 + x_s.sum()).backward()
    assert torch.equal(x_s.grad, torch.ones_like(x_s)) and not x_t.grad.any()


@pytest.mark.parametrize("metric", ["cos", "kl"])
def test_degenerate_maps(backend, metric):
    """One pixel, constant images (sigma = 0), zero vectors, one class: finite losses and gradients."""
    for shape_s, shape_t in (((1, 3, 1, 1), (1, 3, 1, 1)), ((1, 3, 2, 2), (1, 3, 1, 1)), ((1, 1, 2, 3), (1, 1, 3, 2))):
        x_s, x_t, y = maps(metric, shape_s, shape_t, torch.float32, classes=1)
        got = ops.cycle_association_loss(x_s, x_t, torch.zeros_like(y), metric=metric)
        got.loss.backward()
        assert got.loss.isfinite() and x_s.grad.isfinite().all() and x_t.grad.isfinite().all()
    x = torch.full((1, 4, 3, 3), 0.25, requires_grad=True)
    got = ops.cycle_association_loss(x, x, torch.zeros(1, 3, 3, dtype=torch.long), metric=metric)
    got.loss.backward()
    assert got.loss.item() == pytest.approx(2 * torch.log(torch.tensor(9.0)).item(), rel=1e-5)  # both softmaxes uniform
    assert x.grad.abs().max() < 1e-4 and not got.forward.any()
    x_s, x_t, y = maps("cos", (1, 4, 3, 3), (1, 4, 3, 3), torch.float32)
    zeroed = x_t.detach().clone()
    zeroed[..., 1] = 0
    zeroed.requires_grad_()
    if metric == "cos":
        got = ops.cycle_association_loss(x_s, zeroed, torch.zeros_like(y), alpha=0.0)
        got.loss.backward()
        assert zeroed.grad.isfinite().all() and not zeroed.grad[..., 1].any()


def test_layouts_autocast_and_no_grad(backend):
    x_s, x_t, y = maps("cos", (2, 8, 6, 5), (2, 8, 6, 5), torch.float32)
    want = ops.cycle_association_loss(x_s, x_t, y)
    strided = [x.detach().to(memory_format=torch.channels_last).requires_grad_() for x in (x_s, x_t)]
    got = ops.cycle_association_loss(*strided, y.to(torch.uint8))
    assert torch.equal(got.forward, want.forward) and torch.equal(got.selected, want.selected)
    torch.testing.assert_close(got.loss, want.loss)
    for x, like in zip(torch.autograd.grad(got.loss, strided), torch.autograd.grad(want.loss, (x_s, x_t)), strict=True):
        torch.testing.assert_close(x, like, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(ops.cycle_association_loss(x_s, x_t, y).loss, want.loss.detach())
    narrow = [x.detach().bfloat16() for x in (x_s, x_t)]
    wide = ops.cycle_association_loss(*(x.float() for x in narrow), y)
    with torch.autocast("cpu", torch.bfloat16):
        half = ops.cycle_association_loss(*(x.requires_grad_() for x in narrow), y)
        mixed = ops.spatial_aggregate(x_t)
    assert half.loss.dtype == torch.float32 and torch.equal(half.loss, wide.loss)
    assert torch.equal(mixed, ops.spatial_aggregate(x_t))
    half.loss.backward()
    assert narrow[0].grad.dtype == torch.bfloat16 and narrow[0].grad.any()


def test_batch_is_the_mean_over_all_kept_pixels(backend):
    x_s, x_t, y = maps("cos", (3, 8, 5, 5), (3, 8, 4, 6))
    parts = [ops.cycle_association_loss(x_s[b:b + 1], x_t[b:b + 1], y[b:b + 1]) for b in range(3)]
    whole = ops.cycle_association_loss(x_s, x_t, y)
    kept = sum(p.kept for p in parts)
    assert whole.kept == kept and all(torch.equal(whole.forward[b], p.forward[0]) for b, p in enumerate(parts))
    torch.testing.assert_close(whole.loss, sum(p.loss * p.kept for p in parts) / kept)


def test_repeated_runs_give_the_same_bits(backend):
    for metric in ("cos", "kl"):
        results = []
        for _ in range(2):
            x_s, x_t, y = maps(metric, (1, 19, 21, 21), (1, 19, 15, 20), torch.float32)
            got = ops.cycle_association_loss(x_s, x_t, y, metric=metric)
            got.loss.backward()
            results.append((got.loss.detach(), x_s.grad, x_t.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- the operators below the loss ----

def panels(shape, dtype, contrast, scaled, to=lambda x: x):
    """The operators on panels, on random values, one row constant: 1 / t, softmax, its gradient; a symmetric S's."""
    g = torch.Generator().manual_seed(3)
    s, m = (torch.randn(shape, generator=g, dtype=dtype).mul_(30) for _ in range(2))
    scale = to(torch.rand(shape[1], generator=g, dtype=dtype)) if scaled else None
    s[0] = 2.0
    p, grad = to(s.clone()), to(m.clone())
    inverse = _contrast_softmax_(p, scale, contrast)
    _softmax_grad_(grad, p, inverse.clamp(max=10.0))
    block = [to(x / 30) for x in (s, m, m.roll(1, 1))]
    rows, cols = (to(torch.rand(5, n, generator=g, dtype=dtype)) for n in shape)
    return inverse, p, grad, *_attention_grad_(*block, rows, cols), *block


def assert_close(results, expected, dtype):
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-13}
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


PANELS = [((1, 1), torch.float64, True, True), ((3, 15), torch.float32, False, True),
          ((7, 16), torch.float32, True, False), ((33, 441), torch.float64, False, False),
          ((130, 441), torch.float32, True, True)]


@pytest.mark.parametrize("shape,dtype,contrast,scaled", PANELS, ids=str)
def test_panel_kernels_equal_their_reference(compiled, shape, dtype, contrast, scaled):
    got = panels(shape, dtype, contrast, scaled)
    before = ops.use("reference")
    want = panels(shape, dtype, contrast, scaled)
    ops.use(before)
    assert_close(got, want, dtype)


def test_a_block_holds_the_gradients_of_both_halves(backend):
    """Rows 0 to 4, columns 5 to 11 of S = v^ v^^T, against autograd through softmax_j(S_ij / t_i)."""
    g = torch.Generator().manual_seed(5)
    v, d = (torch.randn(12, 3, generator=g, dtype=torch.float64) for _ in range(2))
    inverse = 10 * torch.rand(12, generator=g, dtype=torch.float64)
    scale = 1 / v.norm(dim=1)
    unit_v = v * scale[:, None]
    s = (unit_v @ unit_v.t()).requires_grad_()
    a = (s * inverse[:, None]).softmax(1)
    d_a = d @ v.t()
    d_s, = torch.autograd.grad((a * d_a).sum(), s)
    s, a = s.detach(), a.detach()
    stats = torch.stack([inverse, s.diagonal(), a.diagonal(), (a * d_a).sum(1), scale])
    i, j = slice(0, 5), slice(5, 12)
    block = [x.contiguous() for x in (s[i, j] / scale[j], d_a[i, j], d_a[j, i].t())]
    row_sum, col_sum = _attention_grad_(*block, stats[:, i].contiguous(), stats[:, j].contiguous())
    torch.testing.assert_close(block[0], scale[i, None] * scale[j] * (d_s[i, j] + d_s[j, i].t()))
    torch.testing.assert_close(block[1], a[i, j])
    torch.testing.assert_close(block[2], a[j, i].t())
    torch.testing.assert_close(row_sum, (a * d_a)[j, i].sum(0))
    torch.testing.assert_close(col_sum, (a * d_a)[i, j].sum(0))


def test_opcheck(compiled):
    a, b, rows, cols = torch.randn(5, 3), torch.randn(4, 3), torch.rand(5), torch.rand(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(torch.ops.segadapt.mutual_argmax.default, (a, b))
        torch.library.opcheck(torch.ops.segadapt.product_argmax.default, (a, b))
        torch.library.opcheck(torch.ops.segadapt.contrast_softmax_.default, (a.clone(), None, True))
        torch.library.opcheck(torch.ops.segadapt.contrast_softmax_.default, (a.clone(), cols, False))
        torch.library.opcheck(torch.ops.segadapt.softmax_grad_.default, (a.clone(), a.softmax(1), rows))
        block = [a.clone() for _ in range(3)]
        torch.library.opcheck(torch.ops.segadapt.attention_grad_.default, (*block, torch.rand(5, 5), torch.rand(5, 3)))


# ---- inputs that have failed ----

def test_constant_rows_have_no_contrast(backend):
    """The mean of a long constant row is rounded: what deviates from it is no deviation."""
    value = torch.rand(64, 1, generator=torch.Generator().manual_seed(0))
    s = value.repeat(1, 8464).contiguous()
    assert not _contrast_softmax_(s, None, True).any()
    torch.testing.assert_close(s, torch.full_like(s, 1 / 8464))
    nearly = value.repeat(1, 100) * (1 + 4e-7 * torch.rand(64, 100))  # a few units, as products of equal rows
    assert not _contrast_softmax_(nearly.contiguous(), None, True).any()
    other = value.repeat(1, 100) * (1 + 1e-4 * torch.rand(64, 100))
    assert (_contrast_softmax_(other.contiguous(), None, True) > 0).all()


@pytest.mark.parametrize("metric", ["cos", "kl"])
def test_a_constant_map_has_no_gradient(compiled, metric):
    x = torch.full((1, 19, 92, 92), 1 / 19).requires_grad_()
    ops.cycle_association_loss(x, x, torch.zeros(1, 92, 92, dtype=torch.long), metric=metric).loss.backward()
    assert x.grad.abs().max() < 1e-6


def huge():
    g = torch.Generator().manual_seed(1)
    return 1e37 * torch.rand(40, 19, generator=g), 1e20 * torch.randn(30, 19, generator=g)


def test_products_that_leave_float32(backend):
    x, y = huge()
    y[:20] *= 1e-40  # and, beside the large rows, some that a common scale would lose
    want = (x.double() @ y.double().t()).argmax(1)
    assert torch.equal(_product_argmax(x, y), want)
    x_s, x_t = (z.t().reshape(1, 19, 5, -1).abs() for z in (x, x))
    found = ops.cycle_association_loss(x_s, x_t, torch.zeros(1, 5, 8, dtype=torch.long), metric="kl", alpha=0.0)
    assert found.forward.min() >= 0


def test_lengths_that_the_dtype_does_not_hold_are_an_error(backend):
    with pytest.raises(ValueError, match="overflowing"):
        ops.mutual_argmax(torch.full((3, 19), 3e38), torch.ones(2, 19))


def test_subnormal_vectors(backend):
    a, b = (vectors("random", n, 19, n) * 1e-39 for n in (60, 50))
    row_index, row_value, col_index, col_value = ops.mutual_argmax(a, b)
    check_exact(a, b, row_index, row_value)
    check_exact(b, a, col_index, col_value)


def test_panels_without_rows(backend):
    empty = torch.empty(0, 7)
    assert _contrast_softmax_(empty, None, True).shape == (0,)
    _softmax_grad_(empty, empty, torch.empty(0))
    row_sum, col_sum = _attention_grad_(empty, empty, empty, torch.empty(5, 0), torch.ones(5, 7))
    assert row_sum.shape == (0,) and torch.equal(col_sum, torch.zeros(7))


def test_products_of_lower_precision_do_not_change_an_index(backend):
    """Who allows bfloat16 products for speed allows them here, too: the kernels notice."""
    a, b = (torch.nn.functional.normalize(vectors("random", n, 4, n)) for n in (300, 400))
    want = ops.mutual_argmax(a, b)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        got = ops.mutual_argmax(a, b)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(map(torch.equal, got, want))


# ---- CUDA against the CPU ----

CUDA_CASES = [((1, 15, 19), "random", torch.float32), ((441, 77, 19), "duplicates", torch.float32),
              ((77, 300, 19), "ties", torch.float32), ((65, 41, 300), "ranges", torch.float32),
              ((70, 90, 33), "clustered", torch.float64), ((15, 1, 256), "random", torch.float64)]


@pytest.mark.parametrize("size,kind,dtype", CUDA_CASES, ids=str)
def test_cuda_gives_the_same_indices_and_values(compiled, cuda, size, kind, dtype):
    n1, n2, c = size
    a, b = vectors(kind, n1, c, 1, dtype), vectors(kind, n2, c, 2, dtype)
    want = *ops.mutual_argmax(a, b), _product_argmax(a, b)
    got = cuda.run(lambda to: (*ops.mutual_argmax(to(a), to(b)), _product_argmax(to(a), to(b))))
    assert all(map(torch.equal, got, want))


def test_cuda_does_not_depend_on_the_order_of_threads(compiled, cuda):
    if not cuda.emulated:
        pytest.skip("a GPU chooses its own")
    import cuda_emulation

    a, b = vectors("duplicates", 90, 19, 1), vectors("random", 70, 19, 2)
    results = []
    for order in cuda_emulation.ORDERS:
        cuda_emulation.set_order(order, seed=7)
        results.append(cuda.run(lambda to: (*ops.mutual_argmax(to(a), to(b)),
                                            *panels((33, 441), torch.float32, True, True, to))))
    cuda_emulation.set_order("forward")
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape,dtype,contrast,scaled", PANELS, ids=str)
def test_cuda_panel_kernels(compiled, cuda, shape, dtype, contrast, scaled):
    want = panels(shape, dtype, contrast, scaled)
    assert_close(cuda.run(lambda to: panels(shape, dtype, contrast, scaled, to)), want, dtype)


@pytest.mark.parametrize("metric,dtype", [("cos", torch.float32), ("kl", torch.float64), ("kl", torch.float32)])
def test_cuda_loss_and_gradients(compiled, cuda, metric, dtype):
    x_s, x_t, y = maps(metric, (2, 19, 6, 9), (2, 19, 5, 11), dtype)

    def run(to=lambda x: x):
        inputs = [to(x.detach()).requires_grad_() for x in (x_s, x_t)]
        found = ops.cycle_association_loss(*inputs, to(y), metric=metric)
        return found.forward, found.back, found.selected, found.loss.detach(), *torch.autograd.grad(found.loss, inputs)

    want, got = run(), cuda.run(run)
    assert all(map(torch.equal, got[:3], want[:3]))
    for g, w in zip(got[3:], want[3:], strict=True):
        assert (g - w).norm() <= (1e-5 if dtype == torch.float32 else 1e-12) * w.norm()


def test_cuda_and_what_has_failed(compiled, cuda):
    """The inputs above once more; a constant map and repeated rows, which must not be scored pair by pair."""
    x, y = huge()
    y[:20] *= 1e-40
    small = [vectors("random", n, 19, n) * 1e-39 for n in (60, 50)]
    same = torch.ones(300, 19)
    rows = torch.rand(3, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 20000).contiguous()
    empty = torch.empty(0, 7)

    def run(to=lambda x: x):
        _softmax_grad_(to(empty), to(empty), to(torch.empty(0)))
        _attention_grad_(*(to(empty) for _ in range(3)), to(torch.empty(5, 0)), to(torch.ones(5, 7)))
        return (_product_argmax(to(x), to(y)), *ops.mutual_argmax(*map(to, small)),
                *ops.mutual_argmax(to(same), to(same)), _contrast_softmax_(to(rows), None, True))

    got = cuda.run(run)
    assert all(map(torch.equal, got, run())) and not got[-1].any()
    times = []
    for x in (same, vectors("random", 300, 19, 1)):
        start = time.process_time()
        cuda.run(lambda to, x=x: ops.mutual_argmax(to(x), to(x)))
        times.append(time.process_time() - start)
    assert times[0] < 5 * times[1]  # scored pair by pair, equal rows take hundreds of times as long
    with pytest.raises(ValueError, match="overflowing"):
        cuda.run(lambda to: ops.mutual_argmax(to(torch.full((3, 19), 3e38)), to(torch.ones(2, 19))))


# ---- candidates in half ----

def one_ulp_apart(n, c):
    """Copies of one vector, each but the first with another component moved to the next float."""
    x = vectors("random", 1, c, 0).repeat(n, 1)
    i = torch.arange(1, n)
    x[i, i % c] = torch.nextafter(x[i, i % c], torch.tensor(float("inf")))
    return x


HALF_CASES = {
    **{kind: (vectors(kind, n1, c, 1), vectors(kind, n2, c, 2))
       for kind, (n1, n2, c) in {"random": (130, 300, 64), "clustered": (141, 777, 64), "duplicates": (70, 90, 100),
                                 "ties": (200, 110, 300), "ranges": (65, 41, 300)}.items()},
    "clustered columns": (vectors("clustered", 777, 64, 1), vectors("clustered", 141, 64, 2)),
    "subnormal": (vectors("random", 60, 65, 1) * 1e-39, vectors("random", 50, 65, 2) * 1e-39),
    "small components": (vectors("ranges", 80, 64, 1).t().contiguous(), vectors("ranges", 80, 64, 2).t().contiguous()),
    "huge": (vectors("random", 60, 65, 1) * 1e37, vectors("random", 50, 65, 2) * 1e37),
    "one ulp apart": (vectors("random", 40, 64, 1), one_ulp_apart(50, 64)),
    "too many one ulp apart": (one_ulp_apart(100, 64), one_ulp_apart(90, 64)),
}


@pytest.mark.parametrize("case", HALF_CASES)
def test_cuda_candidates_in_half_give_the_same_indices(compiled, cuda, case):
    a, b = HALF_CASES[case]
    want = ops.mutual_argmax(a, b)
    assert all(map(torch.equal, cuda.run(lambda to: ops.mutual_argmax(to(a), to(b))), want))


@contextlib.contextmanager
def products(rule):
    """The emulated kernels' matrix products are rule(x, y), rounded to their dtype; yields (dtype, rows) of each."""
    asked = []

    def mm(x, y, *, out):
        asked.append((x.dtype, len(x)))
        return out.copy_(rule(x, y))

    with warnings.catch_warnings(), torch.library._scoped_library("aten", "IMPL") as library:
        warnings.simplefilter("ignore")  # that this is an override
        library.impl("mm.out", mm, "CPU")
        yield asked


def in_float32(x, y):
    return x.float() @ y.float()


def argmax_with(cuda, rule, a, b):
    """What the emulated kernels find with such products, whether it is right, and the products."""
    if not cuda.emulated:
        pytest.skip("a GPU multiplies as it does")
    want = ops.mutual_argmax(a, b)
    with products(rule) as asked:
        got = cuda.run(lambda to: ops.mutual_argmax(to(a), to(b)))
    return all(map(torch.equal, got, want)), asked


def test_only_crowded_vectors_take_float32(compiled, cuda):
    """Copies of a vector that differ in a unit are too many candidates; what is far from them is not concerned."""
    crowd, others = one_ulp_apart(100, 64), vectors("random", 150, 64, 3)
    a = torch.cat([others[:90], crowd[:3]])
    b = torch.cat([crowd, others + 0.1 * vectors("random", 150, 64, 4)])
    for x, y in ((a, b), (b, a)):
        right, asked = argmax_with(cuda, in_float32, x, y)
        assert right and asked == [(torch.float16, len(x)), (torch.float32, 3)]


def one_sided(case):
    """A vector, and two of which the first is better by little; but their products in half differ by 7 and more (of
    8,100) the other way, as components lie just below the middle between neighbours in half, or just above."""
    e = 1e-5 if case == "of the vector" else 5e-5
    below, above = (8 + 2 ** -8) * (1 - e), (8 + 2 ** -8) * (1 + e)
    if case == "of the vector":
        rows = [[below] * 62 + [above] * 62, [11.25] * 62 + [0] * 62 + [0.12], [0] * 62 + [11.25] * 62 + [0.104]]
    else:
        rows = [[below if case == "of all" else 8] * 125, [below] * 125, [above] * 125]
    rows = [[*row, (8100 - sum(v * v for v in row)) ** 0.5, 0][:126] for row in rows]  # a length of 90
    rows = torch.tensor(rows, dtype=torch.float64).div(90).float()
    return rows[:1], rows[1:]


@pytest.mark.parametrize("case", ["of all", "of the vector", "of the others"])
def test_rounding_to_half_that_errs_on_one_side(compiled, cuda, case):
    a, b = one_sided(case)
    assert ops.mutual_argmax(a, b)[0] == 0
    as_half = ((90 * b).half().float() @ (90 * a[0]).half().float()).half()
    assert as_half[1] - as_half[0] > 6
    right, asked = argmax_with(cuda, in_float32, a, b)
    assert right and asked == [(torch.float16, 1)]


def of_length_90(n, c, seed):
    """Vectors of integers whose length is 90: times 90, unit vectors that half holds to a float's rounding."""
    g = torch.Generator().manual_seed(seed)
    x = torch.zeros(n, c)
    for row in x:
        places = torch.randperm(c, generator=g)
        row[places[:40]] = torch.randint(5, 14, (40,), generator=g) * (1.0 - 2 * torch.randint(2, (40,), generator=g))
        left = 8100 - int(row.square().sum())
        for place in places[40:]:  # squares that add up to what is missing
            row[place] = int(left ** 0.5)
            left -= int(row[place]) ** 2
    assert (x.square().sum(1) == 8100).all()
    return x


def cut(units):
    """Products as a tensor core might give them that cuts so many units of 2^-23 from each term, at worst."""
    return lambda x, y: in_float32(x, y) - units * x.shape[1] * 2 ** -23 * 8100 if x.dtype == torch.half else x @ y


def test_the_error_that_half_may_have(compiled, cuda):
    """At worst as expected, it costs nothing; more is noticed, and float32 decides."""
    a, b = of_length_90(60, 4096, 1), of_length_90(70, 4096, 2)
    b[:60] = a  # products of 8,100 and less
    right, asked = argmax_with(cuda, cut(1), a, b)
    assert right and [dtype for dtype, _ in asked] == [torch.half]
    right, asked = argmax_with(cuda, cut(3), a, b)
    assert right and asked[1:] == [(torch.float32, 60)]


def test_half_products_of_lower_precision_do_not_change_an_index(compiled, cuda):
    """A library that adds up in half, as it may be told to, or that keeps 8 bits of each factor."""
    a, b = vectors("random", 60, 256, 1), vectors("random", 70, 256, 2)
    b[:40] = a[:40] + 0.05 * b[:40]

    def in_half(x, y):
        return sum((x[:, k:k + 1] * y[k:k + 1] for k in range(x.shape[1])), torch.zeros(1, dtype=x.dtype))

    def in_bfloat16(x, y):
        return x.bfloat16().float() @ y.bfloat16().float()

    for rule in (in_half, in_bfloat16):
        right, asked = argmax_with(cuda, lambda x, y, rule=rule: rule(x, y) if x.dtype == torch.half else x @ y, a, b)
        assert right and [dtype for dtype, _ in asked] == [torch.half, torch.float32]


def test_the_loss_may_take_tf32_and_its_indices_do_not(compiled, cuda):
    """Its own products are as precise as PyTorch is told to make them."""
    x_s, x_t, y = maps("cos", (1, 64, 9, 11), (1, 64, 8, 12), torch.float32)

    def run(to=lambda x: x):
        found = ops.cycle_association_loss(to(x_s.detach()), to(x_t.detach()), to(y), alpha=0.0)
        return found.forward, found.back, found.loss

    def in_tf32(x, y):
        if x.dtype != torch.float32:
            return in_float32(x, y)
        x, y = (((z.contiguous().view(torch.int32) + 0x1000) & ~0x1fff).view(torch.float32) for z in (x, y))
        return x @ y

    if not cuda.emulated:
        pytest.skip("a GPU multiplies as it does")
    want = run()
    with products(in_tf32):
        got = cuda.run(run)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert 1e-7 < (got[2] / want[2] - 1).abs() < 1e-3

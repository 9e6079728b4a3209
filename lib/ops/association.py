"""Pixel-level cycle association (Kang et al., NeurIPS 2020), without N x N matrices."""
from __future__ import annotations

import contextlib
import functools
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.ops.build import operator


class CycleAssociation(NamedTuple):
    """What cycle_association_loss returns; see there."""

    loss: Tensor      # scalar
    kept: Tensor      # scalar int64
    selected: Tensor  # [B, H1, W1] bool
    forward: Tensor   # [B, N1] int64
    back: Tensor      # [B, N1] int64


_GPU_PANEL_BYTES = 64 << 20  # of one row panel of a similarity matrix: a GPU wants few launches and many values in each
_EPS = 1e-10             # the paper's code, inside logarithms


def mutual_argmax(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each row of a the row of b with the largest cosine similarity, and the reverse, without the N1 x N2 matrix.

    a: [N1, C], b: [N2, C], one floating dtype, N1, N2 > 0; half and bfloat16 are taken to float32.
    Returns (row_index [N1] int64, row_value [N1], col_index [N2] int64, col_value [N2]). No gradient.

    Exact: the maximum of the float64 dot products of the normalised vectors x / |x| (rounded to the input's dtype;
    |x| summed in float64), ties to the lowest index, whatever the tiles, the threads and the device. A zero vector
    has similarity 0 to everything. Raises ValueError for wrong shapes or dtypes, for NaN or infinite values and for
    vectors whose length the dtype does not hold.
    """
    a, b = (x.detach().to(_full_type(x)) for x in (a, b))
    _check_rows(a, b)
    return _mutual_argmax(a, b)


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
        out = torch.empty_like(x)
        with torch.autocast(x.device.type, enabled=False):
            ctx.attention = [_aggregate(_rows(image), _rows(result), metric, alpha)
                             for image, result in zip(x, out, strict=True)]
        ctx.save_for_backward(x, out)
        ctx.metric, ctx.alpha = metric, alpha
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, out = ctx.saved_tensors
        grad, d_x = grad.to(x.dtype), torch.empty_like(x)
        with torch.autocast(x.device.type, enabled=False):
            for b, attention in enumerate(ctx.attention):
                along = (grad[b] * out[b]).sum(0).flatten()
                _aggregate_backward(_rows(grad[b]), along, _rows(x[b]), _rows(d_x[b]), ctx.metric, ctx.alpha, attention)
        return d_x, None, None


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
    attention = _aggregate(v, z, metric, alpha)
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
        along = torch.zeros_like(d_z[:, 0])  # <d_z, z> for cos, which looks at z's direction alone; kl needs none
        _aggregate_backward(d_z, along, v, d_v, metric, alpha, attention)
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
        p = _product(l_rows, right.t(), buffer)
        inverse = _contrast_softmax_(p, right_scale, True)
        target = index[r][:, None]
        chosen = p.gather(1, target)
        loss -= (weight[r].double() * chosen[:, 0].double().log()).sum()
        if d_left is not None:
            w = (weight[r] * inverse)[:, None]
            p.scatter_(1, target, chosen - 1)
            _add_product_(d_right, p.t(), l_rows * w)
            if right_scale is not None:
                p.mul_(right_scale)
            d_left.index_add_(0, r, _product(p, right).mul_(w))
    return loss


def _aggregate(v: Tensor, out: Tensor, metric: str, alpha: float) -> Tensor | None:
    """out = (1 - alpha) v + alpha A v for v, out [N, C].

    For cos, returns what gives A's rows again without their sums: 1/t, S_ii and A_ii, [3, N]. For kl, None.
    """
    if alpha == 0:
        out.copy_(v)
        return None
    cos = metric == "cos"
    scale = _inverse_norm(v) if cos else None
    right = v if cos else (v + _EPS).log()
    attention = v.new_empty(3, len(v)) if cos else None
    for at, buffer in _panels(len(v), len(v), v):
        left = v[at] * scale[at, None] if cos else v[at]
        p = _product(left, right.t(), buffer)
        if cos:
            attention[1, at] = p[:, at].diagonal() * scale[at]
        inverse = _contrast_softmax_(p, scale, cos)
        if cos:
            attention[0, at], attention[2, at] = inverse, p[:, at].diagonal()
        out[at] = _product(p, v).mul_(alpha).add_(v[at], alpha=1 - alpha)
    return attention


def _aggregate_backward(d_out: Tensor, along: Tensor, v: Tensor, d_v: Tensor, metric: str, alpha: float,
                        attention: Tensor | None) -> None:
    """d_v = the gradient of out = _aggregate(v) for d_out; all [N, C]. attention: what that returned.

    along [N]: <d_out, out> of each row. The panels are computed again. With dA = d_out v^T:
    dS = alpha A o (dA - rowsum(A o dA)) / t, and S = v^ v^^T (cos) or v log(v)^T (kl).
    """
    if alpha == 0:
        d_v.copy_(d_out)
        return
    torch.mul(d_out, 1 - alpha, out=d_v)
    if metric == "cos":
        _add_cos_gradient_(d_out, along, v, d_v, alpha, attention)
    else:
        _add_kl_gradient_(d_out, v, d_v, alpha)


def _add_kl_gradient_(d_out: Tensor, v: Tensor, d_v: Tensor, alpha: float) -> None:
    """The part of _aggregate_backward that goes through A, in row panels."""
    log, d_log = (v + _EPS).log(), torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    for at, p, m in _panels(len(v), len(v), v, 2):
        p = _product(v[at], log.t(), p)
        inverse = _contrast_softmax_(p, None, False)
        m = _product(d_out[at], v.t(), m)
        _softmax_grad_(m, p, inverse * alpha)
        _add_product_(d_v, p.t(), d_out[at], alpha)
        _add_product_(d_log, m.t(), v[at])
        d_v[at] += _product(m, log)
    d_v.addcdiv_(d_log, v + _EPS)


def _add_cos_gradient_(d_out: Tensor, along: Tensor, v: Tensor, d_v: Tensor, alpha: float, attention: Tensor) -> None:
    """The part of _aggregate_backward that goes through A, in row panels of S's upper half.

    S is symmetric: one product gives it for both halves, and dS_ij + dS_ji is multiplied by v at once, which makes 7
    products for two values where whole rows take 10. Row sums of A o dA are <d_out, A v>, known from out.
    """
    n, scale = len(v), _inverse_norm(v)
    direct = torch.cat([(d_out[at] * v[at]).sum(1) for at in _slices(*v.shape, v)]) * (1 - alpha)  # past A
    stats = torch.cat([attention, torch.stack([(along - direct) / alpha, scale])])
    col_sum = torch.zeros_like(direct)  # of A o dA
    for at, *buffers in _panels(n, n, v, 3):
        # Columns from the panel's own first row on; its first columns hold a block of the diagonal, both halves of it.
        right, below = slice(at.start, n), slice(at.stop, n)
        size = at.stop - at.start, n - at.start
        s, x, y = (m.view(-1)[: size[0] * size[1]].view(size) for m in buffers)
        s = _product(v[at] * scale[at, None], v[right].t(), s)
        x, y = _product(d_out[at], v[right].t(), x), _product(v[at], d_out[right].t(), y)
        sum_of_rows, sum_of_cols = _attention_grad_(s, x, y, stats[:, at].contiguous(), stats[:, right].contiguous())
        _add_product_(d_v[at], s, v[right], alpha)
        _add_product_(d_v[at], y, d_out[right], alpha)
        _add_product_(d_v[below], s[:, size[0]:].t(), v[at], alpha)
        _add_product_(d_v[below], x[:, size[0]:].t(), d_out[at], alpha)
        col_sum[at] += sum_of_rows
        col_sum[below] += sum_of_cols[size[0]:]
    # v^ = v/|v| takes <G, v> v/|v|^2 from its gradient G. d_v also holds what went past v^; that part's product with v
    # is (1 - alpha) <d_out, v> + alpha colsum(A o dA).
    for at in _slices(*v.shape, v):
        rows = v[at]
        radial = (d_v[at] * rows).sum(1) - direct[at] - alpha * col_sum[at]
        d_v[at] -= (radial * scale[at] ** 2)[:, None] * rows


def _normalise_backward_(grad: Tensor, x: Tensor, to_unit: Tensor, scale: Tensor) -> None:
    """grad [N, C] for x^ = x * to_unit becomes the one for the vectors behind x^: scale (g - <g, x^> x^)."""
    for at in _slices(*x.shape, x):
        unit = x[at] * to_unit[at, None]
        g = grad[at]
        grad[at] = (g - (g * unit).sum(1, keepdim=True) * unit) * scale[at, None]


# ---- operators -----------------------------------------------------------------------------------------------------

@operator("mutual_argmax(Tensor a, Tensor b)"
          " -> (Tensor row_index, Tensor row_value, Tensor col_index, Tensor col_value)")
def _mutual_argmax(a, b):
    """See mutual_argmax; float32 or float64."""
    a, b = _normalised(a), _normalised(b)
    return *_exact_argmax(a, b), *_exact_argmax(b, a)


@_mutual_argmax.register_fake
def _(a, b):
    return (a.new_empty(a.shape[0], dtype=torch.int64), a.new_empty(a.shape[0]),
            b.new_empty(b.shape[0], dtype=torch.int64), b.new_empty(b.shape[0]))


@operator("product_argmax(Tensor x, Tensor y) -> Tensor index")
def _product_argmax(x, y):
    """For each row of x the row of y with the largest dot product, as exact as mutual_argmax; int64 [N1]."""
    return _exact_argmax(x, y)[0]


@_product_argmax.register_fake
def _(x, y):
    return x.new_empty(x.shape[0], dtype=torch.int64)


@operator("contrast_softmax_(Tensor(a!) s, Tensor? col_scale, bool contrast) -> Tensor inverse")
def _contrast_softmax_(s, col_scale, contrast):
    """A panel s [R, N], contiguous, becomes its rows' softmax: s_ij <- softmax_j(s_ij c_j / t_i).

    col_scale: c [N], or ones. t_i: with contrast the unbiased standard deviation of row i + 1e-10 (contrast
    normalisation; its shift cancels), else 1. Returns 1 / t [R]; 0 where the row is constant to rounding, so that its
    softmax is uniform and its gradient zero.
    """
    if col_scale is not None:
        s.mul_(col_scale)
    if contrast:
        top, bottom = s.amax(1), s.amin(1)
        constant = top - bottom <= 8 * torch.finfo(s.dtype).eps * torch.maximum(top, -bottom)
        inverse = torch.where(constant, 0, 1 / (_deviation(s) + _EPS))
        s.mul_(inverse[:, None])
    else:
        inverse = torch.ones_like(s[:, 0])
    torch.softmax(s, 1, out=s)
    return inverse


def _deviation(s: Tensor) -> Tensor:
    """Unbiased standard deviation of the rows of s; 0 for a single column."""
    return s.std(1) if len(s) and s.shape[1] > 1 else torch.zeros_like(s[:, 0])


@_contrast_softmax_.register_fake
def _(s, col_scale, contrast):
    return s.new_empty(s.shape[0])


@operator("softmax_grad_(Tensor(a!) m, Tensor p, Tensor row_scale) -> ()")
def _softmax_grad_(m, p, row_scale):
    """m = dL/dP [R, N] becomes the gradient before the softmax P: m_ij <- P_ij (m_ij - sum_k P_ik m_ik) r_i."""
    m.mul_(p)
    m.addcmul_(p, m.sum(1, keepdim=True), value=-1).mul_(row_scale[:, None])


@_softmax_grad_.register_fake
def _(m, p, row_scale):
    return None


@operator("attention_grad_(Tensor(a!) s, Tensor(b!) x, Tensor(c!) y, Tensor rows, Tensor cols)"
          " -> (Tensor row_sum, Tensor col_sum)")
def _attention_grad_(s, x, y, rows, cols):
    """Back through the softmax A of a symmetric S, for a block of S and the block that mirrors it at once.

    s, x, y: [R, N], contiguous: S_ij / c_j, dL/dA_ij and dL/dA_ji. rows [5, R], cols [5, N]: for each vector 1/t,
    S_ii, A_ii, m = sum_k A_ik dL/dA_ik, and c = 1/|v|. With A_ij = A_ii exp((S_ij - S_ii)/t_i), as S_ii is the largest:
    s_ij <- c_i c_j (A_ij (x_ij - m_i)/t_i + A_ji (y_ij - m_j)/t_j), x_ij <- A_ij, y_ij <- A_ji.
    Returns sum_j A_ji y_ij [R] and sum_i A_ij x_ij [N]. Bits depend on the number of threads, not on the run.
    """
    r_inverse, r_top, r_peak, r_mean, r_scale = rows[:, :, None]
    c_inverse, c_top, c_peak, c_mean, c_scale = cols[:, None, :]
    s.mul_(c_scale)
    a = ((s - r_top) * r_inverse).clamp_max_(0).exp_().mul_(r_peak)
    b = ((s - c_top) * c_inverse).clamp_max_(0).exp_().mul_(c_peak)
    row_sum, col_sum = (b * y).sum(1), (a * x).sum(0)
    torch.mul(a * (x - r_mean) * r_inverse + b * (y - c_mean) * c_inverse, r_scale * c_scale, out=s)
    x.copy_(a)
    y.copy_(b)
    return row_sum, col_sum


@_attention_grad_.register_fake
def _(s, x, y, rows, cols):
    return s.new_empty(s.shape[0]), s.new_empty(s.shape[1])


def _exact_argmax(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Index [N1] and value [N1] of each row of x's largest float64 dot product with a row of y; the first of ties."""
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("product_argmax: x or y holds NaN or infinite values")
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
    square = torch.cat([_ordered_dot(x[at].double(), x[at].double()) for at in _slices(*x.shape, x)])
    # On the CPU PyTorch's own root, which is MKL's, errs in the last place.
    root = square.sqrt() if x.is_cuda else torch.from_numpy(np.sqrt(square.numpy()))
    return root.to(x.dtype)


def _normalised(x: Tensor) -> Tensor:
    norm = _norm(x)
    if not norm.isfinite().all():
        raise ValueError("mutual_argmax: a or b holds NaN, infinite or overflowing values")
    return x / torch.where(norm > 0, norm, 1)[:, None]


def _inverse_norm(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1)
    return torch.where(norm > 0, 1 / norm, 0)


def _rows(image: Tensor) -> Tensor:
    """[C, H, W] -> a view [H * W, C]."""
    return image.flatten(1).t()


@functools.cache
def _panel_bytes() -> int:
    """Of one row panel on a processor: a quarter of its last cache, since a few are read and written in turn."""
    cache = 0
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not every system says
        cache = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    return min(max(cache // 4, 4 << 20), 8 << 20)


@functools.cache
def _onednn_is_faster() -> bool:
    """Whether PyTorch's matrix products, which are MKL's, leave half of the processor unused.

    On processors other than Intel's, MKL takes kernels for AVX2; oneDNN, the other library in PyTorch, takes AVX-512.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    with contextlib.suppress(OSError):
        vendor = re.search(r"^vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text(), re.M)
        return vendor is not None and vendor[1] != "GenuineIntel" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return False


def _takes_onednn(x: Tensor, y: Tensor) -> bool:
    """For x @ y. Small products are as fast either way, and MKL writes them where they are wanted."""
    return x.dtype == torch.float32 and not x.is_cuda and min(*x.shape, y.shape[1]) >= 64 and _onednn_is_faster()


def _product(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """x @ y, in out or in new memory."""
    if _takes_onednn(x, y):  # which has fast kernels for matrices without gaps alone
        x, y = (m if m.is_contiguous() or m.t().is_contiguous() else m.contiguous() for m in (x, y))
        return torch.ops.mkldnn._linear_pointwise(x, y.t(), None, "none", [], "")
    return torch.mm(x, y, out=out)


def _add_product_(total: Tensor, x: Tensor, y: Tensor, factor: float = 1) -> None:
    """total += factor x @ y."""
    if not _takes_onednn(x, y):
        total.addmm_(x, y, alpha=factor)
        return
    if total.stride(0) == 1:  # a view of [C, N]: rows are written, not columns
        total, x, y = total.t(), y.t(), x.t()
        for at in _slices(total.shape[1], len(total), total):
            total[:, at].add_(_product(x, y[:, at]), alpha=factor)
    else:
        for at in _slices(*total.shape, total):
            total[at].add_(_product(x[at], y), alpha=factor)


def _slices(n: int, width: int, like: Tensor):
    """Slices of n rows of this width that hold about the bytes of a panel on like's device, as even as possible.

    They start at multiples of 16 rows: a matrix product whose rows start inside a register took up to a fifth longer.
    """
    budget = _panel_bytes() if like.device.type == "cpu" else _GPU_PANEL_BYTES
    count = max(1, -(-n * width * like.element_size() // budget))
    rows = -(-n // count // 16) * 16
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
    if a.device != b.device or a.dtype != b.dtype or a.dtype not in (torch.float32, torch.float64):
        raise ValueError("expected two tensors of one floating dtype on one device, "
                         f"got {a.dtype} on {a.device} and {b.dtype} on {b.device}")


def _check_maps(x: Tensor, metric: str) -> None:
    if metric not in ("cos", "kl"):
        raise ValueError(f"metric must be cos or kl, not {metric!r}")
    if x.dim() != 4 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"expected floating [B, C, H, W] without empty sides, got {x.dtype} {tuple(x.shape)}")
    if not x.detach().sum(dtype=torch.float64).isfinite():
        raise ValueError("the features or probabilities hold NaN or infinite values")
    if metric == "kl" and x.detach().min() < 0:
        raise ValueError("metric kl needs probabilities, and there are negative values")

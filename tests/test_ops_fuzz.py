"""Random arguments for all operators, a minute long: reference, CPU and CUDA kernels agree and nothing crashes.

    python -m pytest -m slow tests/test_ops_fuzz.py
    SEGADAPT_FUZZ_SECONDS=600 SEGADAPT_FUZZ_SEED=1 python -m pytest -m slow tests/test_ops_fuzz.py
"""
import os
import random
import time

import pytest
import torch

from lib import ops
from lib.ops.association import _attention_grad_, _contrast_softmax_, _product_argmax, _softmax_grad_

SECONDS = float(os.environ.get("SEGADAPT_FUZZ_SECONDS", 20))  # for each operator
SEED = int(os.environ.get("SEGADAPT_FUZZ_SEED", 0))
VALUES = ["normal", "huge", "tiny", "denormal", "constant", "duplicated", "integers", "mixed", "nan", "inf", "-inf"]


def values(choose: random.Random, shape, dtype=torch.float32, kinds=VALUES):
    """A random tensor of this shape, in a random layout and of a random kind of values."""
    g = torch.Generator().manual_seed(choose.randrange(2**31))
    kind = choose.choice(kinds)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    if kind in ("huge", "tiny", "denormal"):
        x *= {"huge": 1e30, "tiny": 1e-30, "denormal": 1e-39}[kind]
    elif kind == "constant":
        x = torch.full(shape, choose.choice([0.0, 1.0, -3.7, 1 / 3]), dtype=torch.float64)
    elif kind == "duplicated":
        x = x[torch.randint(max(1, shape[0] // 4), (shape[0],), generator=g)] if shape[0] else x
    elif kind == "integers":
        x = x.round()
    elif kind == "mixed":
        x *= 10.0 ** torch.randint(-20, 20, shape, generator=g)
    x = x.to(dtype)
    if kind in ("nan", "inf", "-inf") and x.numel():
        x.view(-1)[choose.randrange(x.numel())] = float(kind)
    if choose.random() < 0.3 and x.dim() > 1:  # not contiguous
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


def outcome(function):
    """Its results, or ValueError."""
    try:
        return function()
    except ValueError:
        return ValueError


def outcomes(cuda, function):
    """function(to) by the reference, the CPU's kernels and CUDA's."""
    before = ops.use("reference")
    try:
        reference = outcome(lambda: function(lambda x: x))
    finally:
        ops.use(before)
    return reference, outcome(lambda: function(lambda x: x)), outcome(lambda: cuda.run(function))


def cases():
    stop, n = time.monotonic() + SECONDS, 0
    while time.monotonic() < stop or n < 10:
        yield random.Random(f"{SEED}:{n}")
        n += 1


@pytest.mark.slow
def test_argmax(compiled, cuda):
    for choose in cases():
        n1, n2, c = (choose.choice([1, 2, 15, 16, 17, 33, 70]) for _ in range(3))
        dtype = choose.choice([torch.float32, torch.float64])
        a, b = values(choose, (n1, c), dtype), values(choose, (n2, c), dtype)

        def run(to, a=a, b=b):
            return [*ops.mutual_argmax(to(a), to(b)), _product_argmax(to(a), to(b))]

        reference, cpu, gpu = outcomes(cuda, run)
        assert (reference is ValueError) == (cpu is ValueError) == (gpu is ValueError), (a, b)
        if reference is not ValueError:
            assert all(map(torch.equal, reference, cpu)) and all(map(torch.equal, cpu, gpu)), (a, b)


@pytest.mark.slow
def test_panels(compiled, cuda):
    for choose in cases():
        shape = choose.choice([0, 1, 3, 65, 130]), choose.choice([1, 2, 16, 31, 300])
        finite = [kind for kind in VALUES if kind in ("normal", "constant", "duplicated", "integers")]
        s, m = (values(choose, shape, kinds=finite).contiguous() for _ in range(2))
        contrast, scale = choose.random() < 0.5, torch.rand(shape[1]) if choose.random() < 0.5 else None

        rows, cols = (torch.rand(5, n) for n in shape)

        def run(to, s=s, m=m, scale=scale, contrast=contrast, rows=rows, cols=cols):
            p, grad, block = to(s.clone()), to(m.clone()), [to(x.clone()) for x in (s, m, m)]
            scale = None if scale is None else to(scale)
            inverse = _contrast_softmax_(p, scale, contrast)
            _softmax_grad_(grad, p, inverse.clamp(max=10))
            return [inverse, p, grad, *_attention_grad_(*block, to(rows), to(cols)), *block]

        reference, *others = outcomes(cuda, run)
        for other in others:
            for got, want in zip(other, reference, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_label_maps_and_pseudo_labels(compiled, cuda):
    for choose in cases():
        classes = choose.choice([1, 2, 3, 19, 20, 21, 40])
        small = choose.randint(1, 9), choose.randint(1, 40)
        size = choose.choice([small, (choose.randint(1, 30), choose.randint(1, 70))])
        shape = (choose.randint(0, 2), classes, *small)
        dtype = choose.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
        moderate = ["normal", "tiny", "constant", "duplicated", "integers", "nan", "inf", "-inf"]
        logits = values(choose, shape, dtype, moderate)
        if not logits.isfinite().all():  # a smaller map need not read every pixel, and then may not notice
            size = tuple(map(max, size, small))
        kwargs = {"align_corners": choose.random() < 0.5, "probabilities": choose.random() < 0.3}
        if choose.random() < 0.3:
            kwargs["flipped"] = values(choose, shape, dtype, moderate[:5])
        if choose.random() < 0.3:
            kwargs["prior"] = torch.rand(classes, *size)
        t = torch.rand(classes) * 10.0 ** -choose.choice([0, 0, 0, 3, 30]) + 1e-44
        rate, value = choose.choice([1, 4, 7]), choose.choice(["conf", "prob"])

        def run(to, logits=logits, size=size, kwargs=kwargs, t=t, rate=rate, value=value, classes=classes):
            moved = {k: to(v) if torch.is_tensor(v) else v for k, v in kwargs.items()}
            hist = to(ops.new_histogram(classes))
            maps = ops.confidence_histogram_(hist, to(logits), size, ds_rate=rate, value=value, **moved)
            bins = ops.select_threshold(hist, 0.2).bins
            fine = to(ops.new_histogram(classes, fine=True))
            ops.refine_histogram_(fine, bins, to(logits), size, ds_rate=rate, value=value, return_maps=False, **moved)
            assert torch.equal(fine.sum(1), hist.gather(1, bins.clamp_min(0)[:, None])[:, 0].where(bins >= 0, 0))
            if value == "conf":
                counted = to(ops.new_histogram(classes, fine=True))
                ops.refine_from_maps_(counted, bins, *maps, ds_rate=rate)
                assert torch.equal(counted, fine)
            label = ops.pseudo_label(to(logits), to(t), size, **moved)
            assert torch.equal(ops.pseudo_label(to(logits), to(t), size, maps=maps, **moved), label)
            return [label, *maps, hist, fine]

        reference, cpu, gpu = outcomes(cuda, run)
        assert (reference is ValueError) == (cpu is ValueError) == (gpu is ValueError), (logits, kwargs)
        if reference is ValueError:
            continue
        assert all(map(torch.equal, cpu, gpu)), (logits, kwargs, t)
        torch.testing.assert_close(cpu[2], reference[2], rtol=1e-5, atol=1e-6)  # differences of interpolated values
        assert cpu[3][:, -1].sum() == reference[3][:, -1].sum()  # all pixels; classes may win by rounding
        if logits.isfinite().all():
            maps = [ops.upsample_argmax(logits, size, kwargs["align_corners"]),
                    *cuda.run(lambda to, logits=logits, size=size, kwargs=kwargs:
                              [ops.upsample_argmax(to(logits), size, kwargs["align_corners"])])]
            assert torch.equal(*maps)

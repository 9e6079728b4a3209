"""Association loss against the numbers of the released code (float64)."""
import numpy as np
import pytest
import torch
from conftest import load_reference

from lib import ops

INFO, DATA = load_reference("plca")
CASES = [f"{metric}_{rest}" for metric in ("cos", "kl") for rest in ("spagg0", "spagg1", "spagg1_other_size")]


def inputs(metric: str, other: str):
    if metric == "cos":
        return tuple(torch.from_numpy(DATA[f"asso_{name}_x64"] / 64.0) for name in ("x1", f"x2{other}"))
    return tuple(torch.from_numpy(DATA[f"asso_{name}_logits_x16"] / 16.0).softmax(1) for name in ("p1", f"p2{other}"))


@pytest.fixture(params=["compiled", "reference"], autouse=True)
def mode(request):
    if request.param == "compiled" and ops.backend() != "compiled":
        pytest.skip("no compiled operators")
    ops.use(request.param)
    yield
    ops.use("auto")


@pytest.mark.parametrize("case", CASES)
def test_association(case):
    metric, other = case.split("_")[0], "_other_size" if "other" in case else ""
    x1, x2 = (x.requires_grad_() for x in inputs(metric, other))
    gt = torch.from_numpy(DATA["asso_gt1"]).long()
    alpha = INFO["association"]["spagg_alpha"] if "spagg1" in case else 0.0
    expected = INFO["association"]["cases"][case]
    got = ops.cycle_association_loss(x1, x2, gt, metric=metric, alpha=alpha)
    assert got.loss.item() == pytest.approx(expected["association"], rel=1e-9)
    assert np.array_equal(got.forward.numpy(), DATA[f"asso_{case}_forward_index"])
    assert np.array_equal(got.back.numpy(), DATA[f"asso_{case}_backward_index"])
    assert np.array_equal(got.selected.numpy(), DATA[f"asso_{case}_select_mask"].astype(bool))
    assert got.kept.item() == DATA[f"asso_{case}_select_mask"].sum()
    got.loss.backward()
    for x, name in ((x1, "grad_x1"), (x2, "grad_x2")):
        want = DATA[f"asso_{case}_{name}"]
        np.testing.assert_allclose(x.grad.numpy(), want, rtol=1e-9, atol=1e-9 * np.abs(want).max())
    if alpha:
        mixed = ops.spatial_aggregate(x2.detach(), metric, alpha)
        np.testing.assert_allclose(mixed.numpy(), DATA[f"asso_{case}_mixed_x2"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", ["cos", "kl"])
def test_nothing_consistent(metric):
    x1, x2 = (x.requires_grad_() for x in inputs(metric, ""))
    gt = torch.from_numpy(DATA[f"asso_{metric}_nothing_consistent_gt1"]).long()
    got = ops.cycle_association_loss(x1, x2, gt, metric=metric, alpha=0.5)
    got.loss.backward()
    assert got.loss.item() == 0 and got.kept.item() == 0
    assert not x1.grad.any() and not x2.grad.any()

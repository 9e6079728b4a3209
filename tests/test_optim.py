"""lib/optim.py against plain loops of the formulas, in float64."""
import copy

import pytest
import torch
from torch import nn

from lib.models.deeplab import build, set_bn_affine
from lib.optim import ReleasedAdam, ReleasedSGD, deeplab_sgd, set_poly_lr


def parameters(dtype=torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((4, 3, 3, 3), (7,), ())]


def gradients(params, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-15), (torch.float32, 1e-6)])
def test_released_sgd_applied_once_is_torch_sgd(dtype, tolerance):
    ours, theirs = parameters(dtype), parameters(dtype)
    settings = dict(lr=0.05, momentum=0.9, weight_decay=5e-4)
    released, plain = ReleasedSGD(ours, **settings), torch.optim.SGD(theirs, **settings)
    for step in range(6):
        for params, optimizer in ((ours, released), (theirs, plain)):
            gradients(params, step)
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_released_sgd_repeats_the_update_from_one_gradient():
    params, wd, lr, momentum = parameters(), 0.01, 0.05, 0.9
    values = [p.detach().clone() for p in params]
    buffers = [torch.zeros_like(v) for v in values]
    optimizer = ReleasedSGD([dict(params=params[:2], repeats=3), dict(params=params[2:])], lr, momentum, wd)
    for step in range(4):
        gradients(params, step)
        before = [p.grad.clone() for p in params]
        optimizer.step()
        for i, repeats in enumerate((3, 3, 1)):
            g = before[i].clone()
            for _ in range(repeats):
                g = g + wd * values[i]
                buffers[i] = momentum * buffers[i] + g
                values[i] = values[i] - lr * buffers[i]
            torch.testing.assert_close(params[i].detach(), values[i], rtol=1e-14, atol=1e-15)
            assert torch.equal(params[i].grad, before[i]), "gradients stay as they were"


def test_released_sgd_leaves_parameters_without_gradient_alone():
    params = parameters()
    before = copy.deepcopy(params)
    optimizer = ReleasedSGD(params, 0.1, 0.9, 0.1)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1]) and params[1] not in optimizer.state


def test_released_adam_is_the_formula_of_pytorch_0_4():
    params, lr, betas, eps = parameters(), 1e-2, (0.9, 0.99), 1e-3  # a large eps shows where it stands
    values = [p.detach().clone() for p in params]
    m, v = ([torch.zeros_like(x) for x in values] for _ in range(2))
    optimizer = ReleasedAdam(params, lr=lr, betas=betas, eps=eps)
    for step in range(1, 6):
        gradients(params, step)
        optimizer.step()
        for i, p in enumerate(params):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * p.grad
            v[i] = betas[1] * v[i] + (1 - betas[1]) * p.grad ** 2
            rate = lr * (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step)
            values[i] = values[i] - rate * m[i] / (v[i].sqrt() + eps)
            torch.testing.assert_close(p.detach(), values[i], rtol=1e-12, atol=1e-14)
        assert all(group["eps"] == eps for group in optimizer.param_groups), "what a checkpoint stores does not drift"


@pytest.mark.parametrize("make", [lambda p: ReleasedSGD([dict(params=p, repeats=3)], 0.05, 0.9, 0.01),
                                  lambda p: ReleasedAdam(p, lr=1e-2)])
def test_an_optimiser_read_back_goes_on_exactly(make):
    straight, resumed = parameters(), parameters()
    optimizer = make(straight)
    for step in range(3):
        gradients(straight, step)
        optimizer.step()
        if step == 1:
            state, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in straight]
    optimizer = make(resumed)
    optimizer.load_state_dict(state)
    with torch.no_grad():
        for p, value in zip(resumed, values, strict=True):
            p.copy_(value)
    gradients(resumed, 2)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def settings_of(net, flavour: str) -> dict[str, tuple[int, float]]:
    """Parameter name -> (repeats, lr_mult)."""
    optimizer = deeplab_sgd(net, flavour, 1.0, 0.9, 0.0)
    groups = {id(p): (g["repeats"], g["lr_mult"]) for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(groups), "no parameter stands in two groups"
    names = {name: groups.pop(id(p), None) for name, p in net.named_parameters()}
    assert not groups
    return names


@pytest.mark.parametrize("model", ["DeeplabMulti", "Deeplab"])
def test_deeplab_sgd_counts_the_modules_around_a_parameter(model):
    names = settings_of(build(model, 3, "resnet18"), "released")
    assert names["conv1.weight"] == (1, 1.0)
    assert names["layer1.0.conv1.weight"] == names["layer4.1.conv2.weight"] == (3, 1.0)
    assert names["layer2.0.downsample.0.weight"] == (4, 1.0)
    heads = {v for k, v in names.items() if k.startswith(("layer5", "layer6"))}
    assert heads == {(1, 10.0)}
    assert names["bn1.weight"] is names["layer1.0.bn1.bias"] is None, "frozen"


def test_deeplab_sgd_once_and_with_batch_norm_that_trains():
    net = build("Deeplab", 3, "resnet18")
    set_bn_affine(net, True)
    released, once = settings_of(net, "released"), settings_of(net, "once")
    assert released["bn1.weight"] == (1, 1.0) and released["layer1.0.bn1.weight"] == (3, 1.0)
    assert released["layer2.0.downsample.1.bias"] == (4, 1.0)
    assert {v for k, v in once.items() if not k.startswith("layer5")} == {(1, 1.0)}
    assert {v for k, v in once.items() if k.startswith("layer5")} == {(1, 10.0)}


def test_deeplab_sgd_applies_vgg_once():
    with torch.device("meta"):
        names = settings_of(build("DeeplabVGG", 3), "released")
    assert {v for k, v in names.items() if k.startswith("features")} == {(1, 1.0)}
    assert {v for k, v in names.items() if k.startswith("classifier")} == {(1, 10.0)}


def test_poly_schedule():
    optimizer = torch.optim.SGD([dict(params=parameters()[:1], lr_mult=10.0), dict(params=parameters()[1:])], lr=9.0)
    for iteration, expected in ((0, 2.5e-4), (125, 2.5e-4 * 0.5 ** 0.9), (249, 2.5e-4 * 0.004 ** 0.9)):
        assert set_poly_lr(optimizer, 2.5e-4, iteration, 250, 0.9) == pytest.approx(expected, rel=1e-12)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([10 * expected, expected], rel=1e-12)

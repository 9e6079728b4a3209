"""Networks of adaptsegnet_models.*, and the iterations of adaptsegnet_steps.* with the script's own functions."""
import numpy as np
import pytest
import torch
from conftest import fill, load_reference
from torch.nn import functional as F

import train_adaptsegnet as script
from lib.models.deeplab import Deeplab, DeeplabMulti, DeeplabVGG
from lib.models.discriminator import FCDiscriminator
from lib.optim import ReleasedAdam, deeplab_sgd, set_poly_lr
from lib.runtime import Run

NETWORKS = {"deeplab_multi": DeeplabMulti, "deeplab_single": Deeplab, "deeplab_vgg": DeeplabVGG,
            "discriminator": FCDiscriminator}


@pytest.fixture(scope="module")
def models():
    return load_reference("adaptsegnet_models")


def build(info, name, dtype=torch.float64):
    net = NETWORKS[name](info["num_classes"]).to(dtype)
    keys = info["models"][name]["keys"]
    assert [[k, list(v.shape)] for k, v in net.state_dict().items()] == keys
    net.load_state_dict(fill(keys, info["seed"]))
    return net


def relative_error(ours, golden):
    ours = np.asarray(ours.detach() if torch.is_tensor(ours) else ours, dtype=np.float64)
    return np.abs(ours - golden).max() / np.abs(golden).max()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", ["deeplab_multi", "deeplab_single", "deeplab_vgg"])
def test_network(models, name, dtype, tolerance):
    info, data = models
    net = build(info, name, dtype)
    frozen = {k for k, p in net.named_parameters() if not p.requires_grad}
    assert frozen == set(info["models"][name]["requires_grad_false"])
    x = torch.from_numpy(data["input"]).to(dtype)
    for mode in ("eval", "train"):
        if f"{name}_{mode}_out1" not in data and f"{name}_{mode}_out" not in data:
            continue  # the VGG network has no train-mode output of its own
        net.train(mode == "train")
        with torch.no_grad():
            outputs = net(x)
        outputs = {"1": outputs[0], "2": outputs[1]} if isinstance(outputs, tuple) else {"": outputs}
        for suffix, output in outputs.items():
            assert relative_error(output, data[f"{name}_{mode}_out{suffix}"]) <= tolerance
    state = net.state_dict()
    for layer in info["models"][name].get("train_bn_layers", []):
        assert state[f"{layer}.num_batches_tracked"] == info["models"][name]["num_batches_tracked_after_train"]
        for statistic in ("running_mean", "running_var"):
            assert relative_error(state[f"{layer}.{statistic}"],
                                  data[f"{name}_after_train__{layer}.{statistic}"]) <= tolerance


def test_discriminator(models):
    info, data = models
    net = build(info, "discriminator")
    logits = torch.from_numpy(data["discriminator_logits_x16"]).double() / 16
    assert relative_error(net(F.softmax(logits, 1)), data["discriminator_out"]) <= 1e-9
    level2 = torch.from_numpy(data["deeplab_multi_eval_out2"])
    up = F.interpolate(level2, data["input"].shape[2:], mode="bilinear", align_corners=True)
    assert relative_error(net(F.softmax(up, 1)), data["discriminator_out_on_multi_eval_out2"]) <= 1e-9


VARIANTS = ["a_multi_vanilla", "b_single_ls", "c_iter_size_2", "d_batch_2"]


def iterate(info, data, variant, semantics):
    """Three iterations as train() performs them -> (losses of each, the trained modules, their state before)."""
    settings = info["variants"][variant]
    args = script.parse_args(["--multi-level", *settings["arguments"]])
    run = Run(torch.device("cpu"), 0, 1, "off")
    modules = {"G": DeeplabMulti(info["num_classes"]), "D1": FCDiscriminator(info["num_classes"]),
               "D2": FCDiscriminator(info["num_classes"])}
    before = {}
    for name, module in modules.items():
        keys = [[k, list(v.shape)] for k, v in module.state_dict().items()]
        module.double().load_state_dict(fill(keys, info["seed"], info["prefixes"][name]))
        before[name] = {k: v.clone() for k, v in module.state_dict().items()}
    net, d1, d2 = modules.values()
    net.train()
    levels = [script.Level(1, d1, args.lambda_seg, args.lambda_adv_target1),
              script.Level(2, d2, 1.0, args.lambda_adv_target2)]
    optimizer = deeplab_sgd(net, {"torch_0.4": "released", "unique": "once"}[semantics], args.learning_rate,
                            args.momentum, args.weight_decay)
    adam = ReleasedAdam if semantics == "torch_0.4" else torch.optim.Adam
    optimizers_d = [adam(d.parameters(), lr=args.learning_rate_D, betas=(0.9, 0.99)) for d in (d1, d2)]
    losses = []
    number = 0
    for i in range(3):
        set_poly_lr(optimizer, args.learning_rate, i, info["num_steps"], args.power)
        optimizer.zero_grad()
        for o in optimizers_d:
            set_poly_lr(o, args.learning_rate_D, i, info["num_steps"], args.power)
            o.zero_grad()
        sums = {}
        for _ in range(args.iter_size):
            batch = slice(number, number + args.batch_size)
            number += args.batch_size
            images = [torch.from_numpy(data[f"{d}_images"][batch]).double() for d in ("src", "tgt")]
            labels = torch.from_numpy(data["src_labels"][batch]).long()
            for key, loss in script.adapt_backward(
                    net, levels, images[0], labels, images[1], gan=args.gan, adapt=args.adapt,
                    iter_size=args.iter_size, ignore=args.ignore_label, run=run).items():
                sums[key] = sums.get(key, 0.0) + loss.item() / args.iter_size
        for o in (optimizer, *optimizers_d):
            o.step()
        losses.append(sums)
    return losses, modules, before


@pytest.mark.parametrize("semantics", ["torch_0.4", "unique"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_iterations(variant, semantics):
    info, data = load_reference("adaptsegnet_steps")
    losses, modules, before = iterate(info, data, variant, semantics)
    golden = info["variants"][variant]["results"][semantics]
    for ours, theirs in zip(losses, golden["iterations"], strict=True):
        for key, name in (("loss_seg1", "loss_seg1"), ("loss_seg2", "loss_seg2"), ("loss_adv1", "loss_adv_target1"),
                          ("loss_adv2", "loss_adv_target2"), ("loss_D1", "loss_D1"), ("loss_D2", "loss_D2")):
            assert ours[key] == pytest.approx(theirs[name], rel=1e-9, abs=0), (key, ours)
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            if key not in golden[f"after_{name}"]:
                continue
            norms = golden[f"after_{name}"][key]
            assert value.norm().item() == pytest.approx(norms["l2"], rel=1e-9, abs=1e-12), key
            # sums cancel: on the scale of the tensor
            assert value.sum().item() == pytest.approx(norms["sum"], rel=1e-9, abs=1e-9 * value.abs().sum().item())
            delta = (value - before[name][key]).norm().item()
            assert delta == pytest.approx(norms["delta_l2"], rel=1e-9, abs=1e-12), key
    assert modules["G"].state_dict()["bn1.num_batches_tracked"] == golden["num_batches_tracked"]

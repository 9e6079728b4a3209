"""Networks of adaptsegnet_models.* in float64 and float32; iterations of adaptsegnet_steps.* with the script's own functions."""
import numpy as np
import pytest
import torch
from conftest import fill, load_reference
from torch.nn import functional as F

from lib.models.deeplab import Deeplab, DeeplabMulti, DeeplabVGG
from lib.models.discriminator import FCDiscriminator

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

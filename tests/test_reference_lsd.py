"""Networks and iterations of lsd.*, with the script's own functions, in float64 at full width."""
import ctypes
import sys

import numpy as np
import pytest
import torch
from conftest import fill, load_reference

import train_gan_da as script
from lib.datasets.transforms import PIXELS
from lib.models.fcn8s import FCN8s
from lib.runtime import Run

MEAN = torch.tensor(PIXELS["caffe"].mean, dtype=torch.float64).view(3, 1, 1)
ARGS = script.parse_args([])
SETTINGS = dict(optimizer=ARGS.optimizer, lr=ARGS.learning_rate, lr_g=ARGS.lr_g, lr_d=ARGS.lr_d,
                beta1=ARGS.beta1, beta1_gan=ARGS.beta1_gan, momentum=ARGS.momentum, weight_decay=ARGS.weight_decay)


@pytest.fixture(scope="module")
def reference():
    """(json, arrays, weights of the three networks): filling them takes seconds."""
    if sys.platform == "linux":
        # Gigabytes of weights, gradients and moments per iteration: glibc would map and clear each anew, which takes
        # longer than the arithmetic. M_MMAP_MAX and M_TRIM_THRESHOLD make it keep what was freed.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)
            libc.mallopt(-1, 2**31 - 1)
    info, data = load_reference("lsd")
    yield info, data, {name: fill(model["keys"], info["seed"]) for name, model in info["models"].items()}


def networks(reference, names=("fcn8s", "netG", "netD")) -> list[torch.nn.Module]:
    info, _, weights = reference
    made = []
    for name in names:
        with torch.device("meta"):
            net = FCN8s(19, dropout=0.0) if name == "fcn8s" else script.Discriminator(19) if name == "netD" else \
                script.Generator((4096, 512, 256))
        assert [[k, list(v.shape)] for k, v in net.state_dict().items()] == info["models"][name]["keys"]
        made.append(net.double().to_empty(device="cpu"))
        made[-1].load_state_dict(weights[name])
    return made


def images(data, case: str) -> list[torch.Tensor]:
    prefix = "" if case == "square" else f"{case}_"
    return [torch.from_numpy(data[f"{prefix}{domain}_images_bgr"]).double() - MEAN for domain in ("src", "tgt")]


def relative_error(ours: torch.Tensor, golden: np.ndarray) -> float:
    assert ours.shape == golden.shape
    return np.abs(ours.detach().numpy() - golden).max() / np.abs(golden).max()


def test_networks(reference):
    """Outputs of all three in eval mode, on the first source image."""
    _, data, _ = reference
    net, gen, dis = (module.eval() for module in networks(reference))
    x = images(data, "square")[0]
    with torch.no_grad():
        *embedding, logits = net(x, return_features=True)
        fake = gen(embedding, x.shape[2:])
        out = {"score_every_2nd_pixel": logits[:, :, ::2, ::2], "fc7_every_64th_channel": embedding[0][:, ::64],
               "pool4_every_32nd_channel": embedding[1][:, ::32], "pool3_every_32nd_channel": embedding[2][:, ::32],
               "netG_out": fake}
        out["netD_fake_s"], out["netD_fake_c"] = dis(fake)
        out["netD_real_s"], out["netD_real_c"] = dis(script.unit(x, "caffe"))
    for name, value in out.items():
        assert relative_error(value, data[f"eval_{name}"]) <= 1e-9, name
    trained = {p for group in script.make_optimizers(net, (), **SETTINGS)[net].param_groups for p in group["params"]}
    assert {k for k, p in net.named_parameters() if p not in trained} == \
        set(reference[0]["models"]["fcn8s"]["parameters_not_in_optimiser"])


# --- one iteration ------------------------------------------------------------------------------------------------

# in the order in which update() computes them
TERMS = {"loss_domain": ["lossD_src_real_s", "lossD_src_fake_s", "lossD_tgt_real", "lossD_tgt_fake", "lossG_src_adv_s",
                         "lossG_tgt_adv_s", "lossF_src_adv_s", "lossF_tgt_adv_s"],
         "loss_label": ["lossD_src_real_c", "lossG_src_adv_c", "lossF_src_adv_c"],
         "loss_l1": ["lossG_src_mse", "lossG_tgt_mse"], "loss_seg": ["lossC"]}


def iterate(reference, monkeypatch, case: str, order: str, label_for_d: str) -> None:
    """One iteration as train() performs it, compared with the golden one at each step."""
    info, data, weights = reference
    suffix = "_straight_labels" if case == "rect" and label_for_d == "straight" else ""
    golden = info["training"][case][f"{'released_order' if order == 'released' else order}{suffix}"]
    prefix = "" if case == "square" else f"{case}_"
    modules = dict(zip("FGD", networks(reference), strict=True))
    net, gen, dis = modules.values()
    optimizers = script.make_optimizers(net, (gen, dis), **SETTINGS)
    names = {module: name for name, module in modules.items()}
    own = {"F": "fcn8s", "G": "netG", "D": "netD"}
    drawings, terms = [], {name: [] for name in TERMS}

    def step(module: torch.nn.Module) -> None:
        letter = names[module]
        grads = {f"{letter}.{k}": p.grad for k, p in module.named_parameters()}
        for key in (k for k in golden["gradient_at_step"] if k.startswith(f"{letter}.")):
            expected = golden["gradient_at_step"][key]
            assert grads[key].norm().item() == pytest.approx(expected["l2"], rel=1e-8, abs=0), key
            # sums cancel: on the scale of the tensor
            assert grads[key].sum().item() == pytest.approx(
                expected["sum"], rel=1e-8, abs=1e-9 * grads[key].abs().sum().item()), key
        optimizers[module].step()
        module.zero_grad()
        after = module.state_dict()
        for key in (k for k in golden["after"] if k.startswith(f"{letter}.")):
            value, expected = after[key[2:]], golden["after"][key]
            assert value.norm().item() == pytest.approx(expected["l2"], rel=1e-10, abs=0), key
            assert value.sum().item() == pytest.approx(expected["sum"], rel=1e-9, abs=1e-9 * value.abs().sum().item())
            delta = (value - weights[own[letter]][key[2:]]).norm().item()
            assert delta == pytest.approx(expected["delta_l2"], rel=1e-8, abs=1e-15), key

    def recorded(name: str):
        original = getattr(script, name)

        def call(*arguments):
            value = original(*arguments)
            terms[name].append(value.item())
            return value
        return call

    for name in TERMS:
        monkeypatch.setattr(script, name, recorded(name))
    gen.register_forward_hook(lambda *_: drawings.append(_[2].detach().clone()))
    flat = torch.from_numpy(data[f"{prefix}flat_label_for_D" if case == "rect" else "square_flat_label_for_D"]).long()
    label = torch.from_numpy(data[f"{prefix}src_labels"]).long()
    size = script.Discriminator.patches(label.shape[1:])
    straight = script.label_for_d(label, size)
    if case == "square":
        assert torch.equal(straight, flat)
    else:
        assert torch.equal(straight, torch.from_numpy(data["rect_straight_label_for_D"]).long())
        assert not torch.equal(straight, flat)
    if label_for_d == "flat":
        monkeypatch.setattr(script, "label_for_d", lambda *_: flat)

    x_s, x_t = images(data, case)
    losses = script.update(
        net, gen, dis, x_s, label, x_t, script.Objective(ARGS.l1_weight, ARGS.adv_weight, ARGS.c_weight, "sum", -1),
        pixels="caffe", run=Run(torch.device("cpu"), 0, 1, "off"), step=step, order=order)
    for ours, theirs in (("loss_D", "lossD"), ("loss_G", "lossG"), ("loss_F", "lossF")):
        assert losses[ours].item() == pytest.approx(golden[theirs], rel=1e-10, abs=0), theirs
    assert relative_error(drawings[0], data[f"{case}_train_netG_src"]) <= 1e-9
    if order == "recomputed":
        return  # its parts are not in the golden file
    for name, values in terms.items():
        expected = [golden[key] for key in TERMS[name]]
        # shared scores: a term may be computed for more than one loss
        assert len(values) >= len(expected), name
        for value in expected:
            assert any(v == pytest.approx(value, rel=1e-10, abs=0) for v in values), (name, value, values)
        for value in values:
            assert any(value == pytest.approx(v, rel=1e-10, abs=0) for v in expected), (name, value, expected)


@pytest.mark.parametrize("case, order, label_for_d", [
    ("square", "recomputed", "straight"), ("square", "gradients_before_steps", "straight"),
    ("rect", "gradients_before_steps", "straight"), ("rect", "released", "flat")])
def test_iteration(reference, monkeypatch, case, order, label_for_d):
    iterate(reference, monkeypatch, case, order, label_for_d)

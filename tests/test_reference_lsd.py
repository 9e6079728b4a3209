"""Networks and iterations of lsd.*, with the script's own functions, in float64 at full width.

Which shapes of images, batches and orders of updates there are is what the files say.
"""
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import cases, every, fill, load_reference
from torch import nn

import train_gan_da as script
from lib.datasets.transforms import PIXELS, to_unit
from lib.models.fcn8s import FCN8s
from lib.runtime import Run

pytestmark = pytest.mark.usefixtures("all_cores")
INFO, DATA = load_reference("lsd")
MEAN = torch.tensor(PIXELS["caffe"].mean, dtype=torch.float64).view(3, 1, 1)
ARGS = script.parse_args([])
IGNORE = -1


class Networks(NamedTuple):
    """F with C, G and D, their first weights under the reference's names, and their optimisers."""

    modules: dict[str, nn.Module]
    weights: dict[str, dict[str, torch.Tensor]]
    optimizers: dict[nn.Module, torch.optim.Optimizer]

    def restart(self) -> None:
        """In place: a new set of weights, gradients and moments would be gigabytes to map and clear."""
        for name, module in self.modules.items():
            module.load_state_dict(self.weights[name])
            module.zero_grad()
        for optimizer in self.optimizers.values():
            for state in optimizer.state.values():
                for value in state.values():  # Adam's count of steps and its moments
                    value.zero_()


@pytest.fixture(scope="module")
def networks(freed_memory_is_kept) -> Iterator[Networks]:
    with torch.device("meta"):
        net = FCN8s(INFO["num_classes"], dropout=0.0)
        modules = {"fcn8s": net, "netG": script.Generator(net.channels),
                   "netD": script.Discriminator(INFO["num_classes"])}
    weights = {}
    for name, module in modules.items():
        model = INFO["models"][name]
        assert [[key, list(value.shape)] for key, value in module.state_dict().items()] == model["keys"]
        module.double().to_empty(device="cpu")
        weights[name] = fill(model["keys"], INFO["seed"], checksums=model["weight_checksums"])
    net, gen, dis = modules.values()
    optimizers = script.make_optimizers(
        net, (gen, dis), optimizer=ARGS.optimizer, lr=ARGS.learning_rate, lr_g=ARGS.lr_g, lr_d=ARGS.lr_d,
        beta1=ARGS.beta1, beta1_gan=ARGS.beta1_gan, momentum=ARGS.momentum, weight_decay=ARGS.weight_decay)
    found = Networks(modules, weights, optimizers)
    yield found
    for gigabytes in found:
        gigabytes.clear()


def array(case: str, name: str) -> np.ndarray:
    """Images and labels of a case: its own, else those without a prefix."""
    return DATA[f"{case}_{name}"] if f"{case}_{name}" in DATA.files else DATA[name]


def images(case: str) -> list[torch.Tensor]:
    return [torch.from_numpy(array(case, f"{domain}_images_bgr")).double() - MEAN for domain in ("src", "tgt")]


def relative_error(ours: torch.Tensor, golden: np.ndarray) -> float:
    assert ours.shape == golden.shape
    return np.abs(ours.detach().numpy() - golden).max() / np.abs(golden).max()


def test_networks(networks):
    """Outputs of all three in eval mode, on the first source image."""
    networks.restart()
    net, gen, dis = (module.eval() for module in networks.modules.values())
    x = images("")[0][:1]
    out = {}
    with torch.no_grad():
        *embedding, out["score"] = net(x, return_features=True)
        out["fc7"], out["pool4"], out["pool3"] = embedding
        out["netG_out"] = fake = gen(embedding, x.shape[2:])
        out["netD_fake_s"], out["netD_fake_c"] = dis(fake)
        out["netD_real_s"], out["netD_real_c"] = dis(to_unit(x, "caffe"))
    for name, value in out.items():
        golden, part = every(DATA, f"eval_{name}")
        assert relative_error(value[part], DATA[golden]) <= 1e-9, name
    trained = {p for group in networks.optimizers[net].param_groups for p in group["params"]}
    assert {key for key, p in net.named_parameters() if p not in trained} == \
        set(INFO["models"]["fcn8s"]["parameters_not_in_optimiser"])


# --- one iteration ------------------------------------------------------------------------------------------------

ORDERS = {"released_order": "released", "gradients_before_steps": "gradients_before_steps", "recomputed": "recomputed"}
# The terms by the function that computes them. The files hold sums over the pixels of the batch (L1: means).
TERMS = {"loss_domain": ["lossD_src_real_s", "lossD_src_fake_s", "lossD_tgt_real", "lossD_tgt_fake", "lossG_src_adv_s",
                         "lossG_tgt_adv_s", "lossF_src_adv_s", "lossF_tgt_adv_s"],
         "loss_label": ["lossD_src_real_c", "lossG_src_adv_c", "lossF_src_adv_c"],
         "loss_l1": ["lossG_src_mse", "lossG_tgt_mse"], "loss_seg": ["lossC"]}


def iteration_cases() -> list:
    """(case, its golden numbers' name)"""
    params = []
    for case, results in INFO["training"].items():
        for name in results:
            known = cases(rf"({'|'.join(ORDERS)})(_straight_labels)?", [name])
            marks = [] if known else [pytest.mark.skip(reason=f"{name}: an order of updates that no option offers")]
            params.append(pytest.param(case, name, marks=marks, id=f"{case}-{name}"))
    return params


def iterate(net, gen, dis, x_s, y_s, x_t, apply_gradients, order: str) -> dict[str, torch.Tensor]:
    """One iteration of the script with the release's weights; the losses. apply_gradients(module) is its step."""
    nets = script.Networks(net, gen, dis, Run(torch.device("cpu"), 0, 1, "off"))
    objective = script.Objective(ARGS.l1_weight, ARGS.adv_weight, ARGS.c_weight, "sum", IGNORE)
    return script.step(nets, x_s, y_s, x_t, objective, pixels="caffe", order=order, apply=apply_gradients)


@pytest.mark.parametrize("case, name", iteration_cases())
def test_iteration(networks, monkeypatch, case, name):
    """As train() performs it, compared with the golden one at each step."""
    golden = INFO["training"][case][name]
    order = ORDERS[name.removesuffix("_straight_labels")]
    networks.restart()
    net, gen, dis = (module.train() for module in networks.modules.values())
    letters = dict(zip(networks.modules.values(), "FGD", strict=True))
    own = dict(zip(networks.modules.values(), networks.weights.values(), strict=True))

    def apply_gradients(module: nn.Module) -> None:
        prefix = f"{letters[module]}."
        gradients = {prefix + key: p.grad for key, p in module.named_parameters()}
        for key in (key for key in golden["gradient_at_step"] if key.startswith(prefix)):
            expected, gradient = golden["gradient_at_step"][key], gradients[key]
            assert gradient.norm().item() == pytest.approx(expected["l2"], rel=1e-8, abs=0), key
            # sums cancel: on the scale of the tensor
            assert gradient.sum().item() == pytest.approx(
                expected["sum"], rel=1e-8, abs=1e-9 * gradient.abs().sum().item()), key
        networks.optimizers[module].step()
        module.zero_grad()
        after = module.state_dict()
        for key in (key for key in golden["after"] if key.startswith(prefix)):
            value, expected = after[key.removeprefix(prefix)], golden["after"][key]
            assert value.norm().item() == pytest.approx(expected["l2"], rel=1e-10, abs=0), key
            assert value.sum().item() == pytest.approx(expected["sum"], rel=1e-9, abs=1e-9 * value.abs().sum().item())
            delta = (value - own[module][key.removeprefix(prefix)]).norm().item()
            assert delta == pytest.approx(expected["delta_l2"], rel=1e-8, abs=1e-15), key

    terms = {function: [] for function in TERMS}

    def recorded(function: str):
        original = getattr(script, function)

        def call(*arguments):
            value = original(*arguments)
            terms[function].append(value.item())
            return value
        return call

    for function in TERMS:
        monkeypatch.setattr(script, function, recorded(function))

    x_s, x_t = images(case)
    label = torch.from_numpy(array(case, "src_labels")).long()
    straight = script.label_for_d(label, script.Discriminator.patches(label.shape[1:]))
    if f"{case}_straight_label_for_D" in DATA.files:
        assert torch.equal(straight, torch.from_numpy(DATA[f"{case}_straight_label_for_D"]).long())
    if not name.endswith("_straight_labels") and f"{case}_flat_label_for_D" in DATA.files:
        # the release's label map for D is mixed up unless images are square; ours is not, so it is given that one
        flat = torch.from_numpy(DATA[f"{case}_flat_label_for_D"]).long()
        if label.shape[1] == label.shape[2]:
            assert torch.equal(straight, flat)
        monkeypatch.setattr(script, "label_for_d", lambda *_: flat)

    drawings = []
    hook = gen.register_forward_hook(lambda module, inputs, image: drawings.append(image.detach().clone()))
    try:
        losses = iterate(net, gen, dis, x_s, label, x_t, apply_gradients, order)
    finally:
        hook.remove()
    for ours, theirs in (("loss_D", "lossD"), ("loss_G", "lossG"), ("loss_F", "lossF")):
        assert losses[ours].item() == pytest.approx(golden[theirs], rel=1e-10, abs=0), theirs
    if f"{case}_train_netG_src" in DATA.files:
        assert relative_error(drawings[0], DATA[f"{case}_train_netG_src"]) <= 1e-9
    for function, names in TERMS.items():
        expected = [golden[key] for key in names if key in golden]  # "recomputed" has none
        # ours are divided by the batch already, but for L1; the scores are shared: a term may serve several losses
        values = [value * (1 if function == "loss_l1" else len(label)) for value in terms[function]]
        for term in expected:
            assert any(value == pytest.approx(term, rel=1e-10, abs=0) for value in values), (function, term, values)
        for value in values if expected else ():
            assert any(value == pytest.approx(term, rel=1e-10, abs=0) for term in expected), (function, value, expected)

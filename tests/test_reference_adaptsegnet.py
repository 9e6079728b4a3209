"""Networks of adaptsegnet_models.*, and the iterations of adaptsegnet_steps.* with the script's own functions.

Which networks, layers, variants and settings there are is what the files say.
"""
import re

import numpy as np
import pytest
import torch
from conftest import cases, fill, load_reference, scaled, skipped, with_weights
from torch.nn import functional as F

import train_adaptsegnet as script
from lib import checkpoint
from lib.errors import UserError
from lib.models.deeplab import build
from lib.optim import ReleasedAdam, deeplab_sgd, set_poly_lr
from lib.runtime import Run

pytestmark = pytest.mark.usefixtures("all_cores")
MODELS, ARRAYS = load_reference("adaptsegnet_models")
STEPS, IMAGES = load_reference("adaptsegnet_steps")


# --- networks ---------------------------------------------------------------------------------------------------------


def is_discriminator(keys) -> bool:
    return {"conv4.weight", "classifier.weight"} <= {key for key, _ in keys}


def new_network(keys) -> torch.nn.Module:
    """The network of ours that these keys and shapes describe, on the meta device. Raises UserError for any other."""
    with torch.device("meta"):
        shapes = {key: torch.empty(shape) for key, shape in keys}
        if is_discriminator(keys):
            net = script.FCDiscriminator(shapes["conv1.weight"].shape[1], ndf=shapes["conv1.weight"].shape[0])
        else:
            found = checkpoint.recognise(shapes)
            net = build(found["model"], found["num_classes"], found["arch"])
    assert [[key, list(value.shape)] for key, value in net.state_dict().items()] == keys
    return net


@pytest.fixture(scope="module")
def filled(freed_memory_is_kept):
    """filled(keys, seed, prefix, checksums): the reference's weights, to be read only; filling takes seconds."""
    done = {}

    def get(keys, *settings) -> dict[str, torch.Tensor]:
        name = repr((keys, settings))
        if name not in done:
            done[name] = fill(keys, *settings)
        return done[name]

    yield get
    done.clear()


@pytest.fixture
def filled_network(filled):
    """filled_network(name, dtype): a network of the files with its weights."""
    def get(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
        model = MODELS["models"][name]
        state = filled(model["keys"], MODELS["seed"], "", model.get("weight_checksums"))
        return with_weights(new_network(model["keys"]), state).to(dtype)

    return get


def relative_error(ours, golden):
    ours = np.asarray(ours.detach() if torch.is_tensor(ours) else ours, dtype=np.float64)
    assert ours.shape == golden.shape
    return np.abs(ours - golden).max() / np.abs(golden).max()


def network_cases(discriminators: bool) -> list:
    """Names of the networks, or of the discriminators, whose outputs the files hold."""
    names = []
    for name, model in MODELS["models"].items():
        output = rf"{re.escape(name)}_out" if discriminators else rf"{re.escape(name)}_(eval|train)_out\d*"
        if is_discriminator(model["keys"]) != discriminators or not cases(output, ARRAYS.files):
            continue
        try:
            new_network(model["keys"])
            names.append(name)
        except UserError as error:
            names.append(skipped(name, str(error)))
    return names


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("name", network_cases(discriminators=False))
def test_network(filled_network, name, dtype, tolerance):
    model = MODELS["models"][name]
    net = filled_network(name, dtype)
    frozen = {key for key, p in net.named_parameters() if not p.requires_grad}
    assert frozen == set(model["requires_grad_false"])
    x = torch.from_numpy(ARRAYS["input"]).to(dtype)
    compared = cases(rf"{re.escape(name)}_(eval|train)_out(\d*)", ARRAYS.files)
    for mode in dict.fromkeys(match[1] for match in compared):
        net.train(mode == "train")
        with torch.no_grad():
            outputs = net(x)
        outputs = {"1": outputs[0], "2": outputs[1]} if isinstance(outputs, tuple) else {"": outputs}
        golden = {match[2]: ARRAYS[match.string] for match in compared if match[1] == mode}
        for number, values in golden.items():
            assert relative_error(outputs[number], values) <= tolerance
    state = net.state_dict()
    for match in cases(rf"{re.escape(name)}_after_train__(.+)\.(running_mean|running_var)", ARRAYS.files):
        layer, statistic = match.groups()
        assert state[f"{layer}.num_batches_tracked"] == model["num_batches_tracked_after_train"]
        assert relative_error(state[f"{layer}.{statistic}"], ARRAYS[match.string]) <= tolerance


@pytest.mark.parametrize("name", network_cases(discriminators=True))
def test_discriminator(filled_network, name):
    net = filled_network(name)
    assert relative_error(net(F.softmax(scaled(ARRAYS, f"{name}_logits"), 1)), ARRAYS[f"{name}_out"]) <= 1e-9
    for match in cases(rf"{re.escape(name)}_out_on_(.+)", ARRAYS.files):
        of, = (key for key in ARRAYS.files if key.endswith(match[1]) and key != match.string)
        up = F.interpolate(torch.from_numpy(ARRAYS[of]), ARRAYS["input"].shape[2:], mode="bilinear", align_corners=True)
        assert relative_error(net(F.softmax(up, 1)), ARRAYS[match.string]) <= 1e-9


# --- iterations -------------------------------------------------------------------------------------------------------

# the optimisers of PyTorch 0.4, for which the release was written, and today's on a list without repetitions
OPTIMIZERS = {"torch_0.4": ("released", ReleasedAdam), "unique": ("once", torch.optim.Adam)}
# golden name: ours
LOSSES = {"loss_seg1": "loss_seg1", "loss_seg2": "loss_seg2", "loss_adv_target1": "loss_adv1",
          "loss_adv_target2": "loss_adv2", "loss_D1": "loss_D1", "loss_D2": "loss_D2"}


def iteration_cases() -> list:
    params = []
    for variant, settings in STEPS["variants"].items():
        for semantics, golden in settings["results"].items():
            reason = None
            if semantics not in OPTIMIZERS:
                reason = f"optimisers '{semantics}' are none of {', '.join(OPTIMIZERS)}"
            elif not {"after_G", "after_D1", "after_D2"} <= golden.keys():
                reason = "not a run with two discriminators"
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            params.append(pytest.param(variant, semantics, marks=marks, id=f"{variant}-{semantics}"))
    return params


def parsed_arguments(variant: str):
    """The script's arguments: the release's defaults as the file gives them, then those of the variant."""
    defaults = STEPS["hyper_parameters_default"]

    def number(pattern: str, key: str) -> str:
        return re.search(pattern, defaults[key])[1]

    flags = {"--num-steps": STEPS["num_steps"], "--learning-rate": defaults["lr_G"],
             "--learning-rate-D": defaults["lr_D"], "--lambda-seg": defaults["lambda_seg"],
             "--lambda-adv-target1": defaults["lambda_adv_target1"],
             "--lambda-adv-target2": defaults["lambda_adv_target2"], "--gan": defaults["gan"],
             "--ignore-label": defaults["ignore_label"], "--momentum": number(r"momentum ([\d.]+)", "optimizer_G"),
             "--weight-decay": number(r"weight decay ([\d.e-]+)", "optimizer_G"),
             "--power": number(r"\*\* ?([\d.]+)", "schedule")}
    arguments = [str(word) for flag in flags.items() for word in flag]
    return script.parse_args(["--multi-level", *arguments, *STEPS["variants"][variant]["arguments"]])


def new_module(name: str) -> torch.nn.Module:
    """G, D1 or D2 on the meta device."""
    with torch.device("meta"):
        return build("DeeplabMulti", STEPS["num_classes"]) if name == "G" else script.FCDiscriminator(
            STEPS["num_classes"])


def accumulate(net, levels, x_s, y_s, x_t, args) -> dict[str, torch.Tensor]:
    """One pass of the script: gradients into the modules; the losses."""
    return script.step(net, levels, x_s, y_s, x_t, gan=args.gan, adapt=args.adapt, iter_size=args.iter_size,
                       ignore=args.ignore_label, run=Run(torch.device("cpu"), 0, 1, "off"))


def test_learning_rates_and_repetitions():
    """Which parameters train, how often the release lists each, and which get ten times the rate."""
    net = new_module("G")
    names = {id(p): name for name, p in net.named_parameters()}
    groups = deeplab_sgd(net, "released", lr=1.0, momentum=0.9, weight_decay=0.0).param_groups
    for number, multiple in (("0", 1), ("1", 10)):
        assert STEPS["parameter_groups"][f"group{number}_multiplicity"] == {
            names[id(p)]: group["repeats"] for group in groups if group["lr_mult"] == multiple for p in group["params"]}


@pytest.mark.parametrize("variant, semantics", iteration_cases())
def test_iterations(filled, variant, semantics):
    """As train() performs them."""
    settings = STEPS["variants"][variant]
    golden = settings["results"][semantics]
    args = parsed_arguments(variant)
    assert (args.batch_size, args.iter_size) == (settings["batch_size"], settings["iter_size"])
    assert STEPS["hyper_parameters_default"]["source_label"] == script.SOURCE
    assert STEPS["hyper_parameters_default"]["target_label"] == script.TARGET
    modules = {name: new_module(name) for name in ("G", "D1", "D2")}
    start = {name: filled([[key, list(value.shape)] for key, value in module.state_dict().items()], STEPS["seed"],
                          STEPS["prefixes"][name]) for name, module in modules.items()}
    for name, module in modules.items():
        with_weights(module, start[name])
    net, d1, d2 = modules.values()
    net.train()
    levels = [script.Level(1, d1, args.lambda_seg, args.lambda_adv_target1),
              script.Level(2, d2, 1.0, args.lambda_adv_target2)]
    sgd, adam = OPTIMIZERS[semantics]
    betas = re.search(r"betas \(([\d.]+), ([\d.]+)\)", STEPS["hyper_parameters_default"]["optimizer_D"]).groups()
    optimizer = deeplab_sgd(net, sgd, args.learning_rate, args.momentum, args.weight_decay)
    optimizers_d = [adam(d.parameters(), lr=args.learning_rate_D, betas=tuple(map(float, betas))) for d in (d1, d2)]

    number = 0  # of the next image
    for i, expected in enumerate(golden["iterations"]):
        set_poly_lr(optimizer, args.learning_rate, i, args.num_steps, args.power)
        optimizer.zero_grad()
        for o in optimizers_d:
            set_poly_lr(o, args.learning_rate_D, i, args.num_steps, args.power)
            o.zero_grad()
        rates = {group["lr_mult"]: group["lr"] for group in optimizer.param_groups}
        assert (rates[1], rates[10], optimizers_d[0].param_groups[0]["lr"]) == pytest.approx(
            [expected[key] for key in ("lr_backbone", "lr_heads", "lr_D")], rel=1e-12)
        losses = dict.fromkeys(LOSSES.values(), 0.0)
        for _ in range(args.iter_size):
            batch = slice(number, number + args.batch_size)
            number += args.batch_size
            x_s, x_t = (torch.from_numpy(IMAGES[f"{domain}_images"][batch]).double() for domain in ("src", "tgt"))
            y_s = torch.from_numpy(IMAGES["src_labels"][batch]).long()
            for key, loss in accumulate(net, levels, x_s, y_s, x_t, args).items():
                losses[key] += loss.item() / args.iter_size
        for o in (optimizer, *optimizers_d):
            o.step()
        for theirs, ours in LOSSES.items():
            assert losses[ours] == pytest.approx(expected[theirs], rel=1e-9, abs=0), (i, ours)

    for name, module in modules.items():
        state = module.state_dict()
        for key, norms in golden[f"after_{name}"].items():
            value = state[key]
            assert value.norm().item() == pytest.approx(norms["l2"], rel=1e-9, abs=1e-12), key
            # sums cancel: on the scale of the tensor
            assert value.sum().item() == pytest.approx(norms["sum"], rel=1e-9, abs=1e-9 * value.abs().sum().item())
            delta = (value - start[name][key]).norm().item()
            assert delta == pytest.approx(norms["delta_l2"], rel=1e-9, abs=1e-12), key
    assert {int(v) for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")} == {
        golden["num_batches_tracked"]}

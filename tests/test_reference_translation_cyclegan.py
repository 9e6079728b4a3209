"""CycleGAN and SPGAN of translation.*, with the script's own functions, in float64; settings are the files'."""
import re

import numpy as np
import pytest
import torch
from conftest import fill, load_reference

import train_spgan as script
from lib.models.cyclegan import BLOCKS, ResnetGenerator, build_generator, from_release
from lib.runtime import Run

pytestmark = pytest.mark.usefixtures("all_cores")
INFO, DATA = load_reference("translation")
RUN = Run(torch.device("cpu"), 0, 1, "off")
ARGS = script.parse_args(["--method", "spgan"])  # SPGAN's settings are not in the file
# our losses under the release's names
SPGAN_NAMES = {"G_A": "b_gen_loss", "G_B": "a_gen_loss", "cycle_A": "a_rec_loss", "cycle_B": "b_rec_loss",
               "idt_A": "idt_loss_b", "idt_B": "idt_loss_a", "contrastive": "m_loss_G", "G": "g_loss", "M": "m_loss_M",
               "D_A": "b_d_loss", "D_B": "a_d_loss"}


def close(ours: torch.Tensor | float, golden, rel: float = 1e-9) -> bool:
    """A scalar, or a checksum (sum, L2), whose sum is judged against sqrt(number of entries) * L2, or an array."""
    golden = np.asarray(golden)
    if isinstance(ours, torch.Tensor) and ours.numel() > 1 or golden.shape:
        ours = ours.detach().numpy()
        if golden.shape == (2,) and ours.shape != (2,):
            l2 = np.sqrt((ours ** 2).sum())
            return abs(l2 - golden[1]) <= rel * golden[1] and \
                abs(ours.sum() - golden[0]) <= rel * np.sqrt(ours.size) * golden[1]
        return ours.shape == golden.shape and np.abs(ours - golden).max() <= rel * np.abs(golden).max()
    return abs(torch.as_tensor(ours).item() - golden) <= rel * abs(golden)


def filled(net: torch.nn.Module, keys, prefix: str, names: dict[str, str] | None = None) -> torch.nn.Module:
    """net in float64 with the reference's weights; names: the reference's -> ours, where they differ."""
    weights = fill(keys, INFO["seed"], prefix)
    for name, checksum in {**INFO["cyclegan"]["weight_checksums"], **INFO["spgan"]["weight_checksums"]}.items():
        if name.startswith(prefix) and prefix and name.removeprefix(prefix) in weights:
            assert close(weights[name.removeprefix(prefix)], checksum, 1e-12)
    net.double().load_state_dict({(names or {}).get(k, k): v for k, v in weights.items()})
    return net


def own_names(kind: str) -> dict[str, str]:
    """The names (ls.N) of SPGAN's generator "G", discriminator "D" or SiaNet "Me" -> ours."""
    keys = [k for k, _ in INFO["spgan"][f"keys_{kind}"]]
    if kind == "G":
        numbered = from_release({k: torch.tensor(n) for n, k in enumerate(keys)})
        return {keys[int(n)]: k for k, n in numbered.items()}
    places = {"D": {"0": "model.0", "2": "model.2", "3": "model.5", "4": "model.8", "5": "model.11"},
              "Me": {"0": "conv1", "3": "conv2", "4": "conv3"}}[kind]
    return {k: k if k.startswith("fc") else f"{places[k.split('.')[1]]}.{k.rpartition('.')[2]}" for k in keys}


def spgan_network(kind: str, net: torch.nn.Module, prefix: str) -> tuple[torch.nn.Module, dict[str, str]]:
    """(the filled network, {its own name: the reference's}); ``net`` may be wider than the reference's."""
    names, shapes = own_names(kind), {k: list(v.shape) for k, v in net.state_dict().items()}
    assert sorted(names.values()) == sorted(shapes)
    filled(net, [[k, shapes[names[k]]] for k, _ in INFO["spgan"][f"keys_{kind}"]], prefix, names)
    return net, {own: prefix + k for k, own in names.items()}


def stored(name: str) -> tuple[np.ndarray, int] | None:
    """An array and the step of its pixels, from "name__s2" or "name"."""
    for key in DATA.files:
        if match := re.fullmatch(re.escape(name) + r"(?:__s(\d+))?", key):
            return DATA[key], int(match[1] or 1)
    return None


def cyclegan_networks(options: dict) -> tuple[script.Networks, dict[torch.nn.Module, str]]:
    blocks = BLOCKS[options["netG"]]
    nets = script.build("cyclegan", options["ngf"], options["ndf"], blocks, options["n_layers_D"])
    info = INFO["cyclegan"]
    prefixes = {nets.g_ab: "netG_A.", nets.g_ba: "netG_B.", nets.d_b: "netD_A.", nets.d_a: "netD_B."}
    for net, prefix in prefixes.items():
        keys = info["keys_D"] if "D" in prefix else info[f"keys_G_{options['netG']}"]
        assert [[k, list(v.shape)] for k, v in net.state_dict().items()] == keys
        filled(net, keys, prefix)
    return nets, prefixes


def spgan_networks() -> tuple[script.Networks, dict[str, torch.nn.Parameter]]:
    """(networks, parameters under the reference's names)."""
    info = INFO["spgan"]
    dims = info["dims"]
    nets = script.build("spgan", dims["Ga"], dims["Da"], spgan_blocks())
    nets = nets._replace(sia=script.SiaNet(dims["Me"]))
    parameters = {}
    for kind, prefix, net in (("G", "Ga.", nets.g_ba), ("G", "Gb.", nets.g_ab), ("D", "Da.", nets.d_a),
                              ("D", "Db.", nets.d_b), ("Me", "Me.", nets.sia)):
        _, names = spgan_network(kind, net, prefix)
        parameters |= {names[k]: p for k, p in net.named_parameters()}
    return nets, parameters


def image(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).double() / 255 * 2 - 1


def images(i: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(image(DATA[f"images_{d}"][i * batch:(i + 1) * batch]) for d in "ab")


def spgan_images(i: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(image(DATA[f"spgan_{d}_half"][i * batch:(i + 1) * batch].repeat(2, 2).repeat(2, 3)) for d in "ab")


class Draws:
    """Stands for the pool's generator."""

    def __init__(self, uniform, indices):
        self.uniform, self.indices = list(uniform), list(indices)

    def random(self) -> float:
        return self.uniform.pop(0)

    def integers(self, n: int) -> int:
        return self.indices.pop(0)


class Updates:
    """The three optimisers, with the gradients of the first iteration kept as they were at their step."""

    def __init__(self, nets: script.Networks, lr: float, beta1: float):
        groups = {"G": (nets.g_ab, nets.g_ba), "D": (nets.d_a, nets.d_b), "M": (nets.sia,)}
        self.optimizers = {name: torch.optim.Adam([p for net in group for p in net.parameters()], lr=lr,
                                                  betas=(beta1, 0.999))
                           for name, group in groups.items() if all(group)}
        self.gradients: dict[torch.nn.Parameter, torch.Tensor] = {}

    def backward(self, name: str, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, name: str) -> None:
        optimizer = self.optimizers[name]
        for p in optimizer.param_groups[0]["params"]:
            self.gradients.setdefault(p, p.grad.clone())
        optimizer.step()
        optimizer.zero_grad()


def check_after(parameters: dict, before: dict, golden: dict, zero_gradient) -> None:
    assert set(golden) | set(zero_gradient) == set(parameters)
    for name, (total, l2, delta) in golden.items():
        p = parameters[name].detach()
        assert close(p, (total, l2), 1e-6), name
        assert (p - before[name]).norm().item() == pytest.approx(delta, rel=1e-6), name


def check_gradients(updates: Updates, parameters: dict, golden: dict, zero_gradient=()) -> None:
    assert golden
    for name, checksum in golden.items():
        assert close(updates.gradients[parameters[name]], checksum), name
    for name in zero_gradient:
        largest = max(g.abs().max() for g in updates.gradients.values())
        assert updates.gradients[parameters[name]].abs().max() <= 1e-9 * largest, name


# --- networks and losses alone ----------------------------------------------------------------------------------------


def test_forward():
    info = INFO["cyclegan"]
    x_a, x_b = images(0, INFO["batch"])
    for name, checksum in info["forward"].items():
        if name.startswith("D_"):
            continue
        net_g = name.partition("_G_A")[0]
        nets, _ = cyclegan_networks({**info["options"], "netG": net_g})
        with torch.no_grad():
            assert close(nets.g_ab(x_a), checksum), name
    with torch.no_grad():
        score = nets.d_b(x_a)
    assert close(score, info["forward"]["D_A_on_real_A"]) and close(score, stored("cyclegan_D_A_on_real_A")[0])
    for mode, golden in info["gan_loss_on_D_A_on_real_A"].items():
        for truth, value in golden.items():
            assert close(script.loss_gan(score, truth == "true", mode), value), (mode, truth)


def test_first_images():
    """Translations and reconstructions of the first images, with the variants' networks."""
    info, arrays = INFO["cyclegan"], 0
    for variant in info["variants"].values():
        golden = variant.get("first_images_checksums")
        if golden is None:
            continue
        nets, _ = cyclegan_networks({**info["options"], **variant["options"]})
        x_a, x_b = images(0, INFO["batch"])
        with torch.no_grad():
            ours = {"fake_B": nets.g_ab(x_a), "fake_A": nets.g_ba(x_b)}
            ours |= {"idt_A": nets.g_ab(x_b), "idt_B": nets.g_ba(x_a)}
            ours |= {"rec_A": nets.g_ba(ours["fake_B"]), "rec_B": nets.g_ab(ours["fake_A"])}
        for name, checksum in golden.items():
            assert close(ours[name], checksum), name
            if found := stored(f"cyclegan_{name}"):
                array, step = found
                arrays += close(ours[name][:, :, ::step, ::step], array)
    assert arrays == sum(stored(f"cyclegan_{name}") is not None for name in ours)


@pytest.mark.parametrize("name", [n for n in INFO["full_width"] if n.startswith(("cyclegan", "spgan"))])
def test_full_width(name):
    info = INFO["full_width"][name]
    spgan = name.startswith("spgan")
    prefix = f"full.{name}."
    if "discriminator" in name:
        net = script.PatchDiscriminator(spgan=spgan)
    else:
        blocks = BLOCKS[name.removeprefix("cyclegan_")] if not spgan else spgan_blocks()
        net = ResnetGenerator(blocks=blocks, bias=not spgan)
    if spgan:
        spgan_network("D" if "discriminator" in name else "G", net, prefix)
    else:
        filled(net, [[k, list(v.shape)] for k, v in net.state_dict().items()], prefix)
    assert sum(p.numel() for p in net.parameters()) == info["parameters"]
    side = INFO["full_width"]["spgan_generator"]["outputs"][0]["shape"][-1]
    x = image(DATA["images_a"][:1, :, :side, :side])
    with torch.no_grad():
        out = net(x)
    for golden in info["outputs"]:
        assert list(out.shape) == golden["shape"] and close(out, golden["checksum"])
        assert close(out.flatten()[:3], golden["first"])


def spgan_blocks() -> int:
    return len({k.split(".")[1] for k, _ in INFO["spgan"]["keys_G"] if ".ls.3." in k})


def test_size_rule():
    """Output sides for sides that are no multiple of 4, and the smallest side that D takes."""
    rule = INFO["size_rule"]
    net, d = ResnetGenerator(2, 1), script.PatchDiscriminator(2)
    with torch.no_grad():
        for side, out in rule["cyclegan_generator"].items():
            assert net(torch.rand(1, 3, int(side), int(side))).shape[2:] == (out, out)
        for side, out in rule["discriminator_cyclegan"].items():
            assert d(torch.rand(1, 3, int(side), int(side))).shape[2:] == (out, out)
        smallest = rule["discriminator_cyclegan_smallest_side"]
        d(torch.rand(1, 3, smallest, smallest))
        with pytest.raises((ValueError, RuntimeError)):
            d(torch.rand(1, 3, smallest - 1, smallest - 1))


def test_released_files_of_generators():
    """Every dialect of a generator's file is recognised and gives the same translation."""
    info = INFO["cyclegan"]
    nets, _ = cyclegan_networks({**info["options"], **next(iter(info["variants"].values()))["options"]})
    weights = nets.g_ab.float().state_dict()
    old, last = dict(weights), list(weights)[-2]
    for key in list(weights):
        if key.endswith("weight") and key != last:
            stem, number = re.fullmatch(r"(.*?)(\d+)\.weight", key).groups()
            norm = f"{stem}{int(number) + 1}."
            old |= {f"{norm}running_mean": torch.zeros(4), f"{norm}running_var": torch.ones(4),
                    f"{norm}num_batches_tracked": torch.tensor(3)}
    old = {f"module.{k}": v for k, v in old.items()}
    spgan = ResnetGenerator(INFO["spgan"]["dims"]["Gb"], spgan_blocks(), bias=False)
    _, names = spgan_network("G", spgan, "Gb.")
    released = {names[k].removeprefix("Gb."): v for k, v in spgan.state_dict().items()}
    for net, file in ((nets.g_ab, weights), (nets.g_ab, old), (spgan, released)):
        read = build_generator(from_release(file)).state_dict()
        assert all(torch.equal(v.float(), read[k]) for k, v in net.state_dict().items())


# --- iterations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", INFO["cyclegan"]["variants"])
def test_cyclegan_iterations(variant):
    golden = INFO["cyclegan"]["variants"][variant]
    options = {**INFO["cyclegan"]["options"], **golden["options"]}
    nets, prefixes = cyclegan_networks(options)
    parameters = {prefix + k: p for net, prefix in prefixes.items() for k, p in net.named_parameters()}
    before = {k: p.detach().clone() for k, p in parameters.items()}
    draws = Draws([], [])
    pools = [script.ImagePool(options["pool_size"], draws, RUN) for _ in range(2)]
    updates = Updates(nets, options["lr"], options["beta1"])
    w = script.Weights(options["lambda_A"], options["lambda_B"], options["lambda_identity"])
    for i, iteration in enumerate(golden["iterations"]):
        for u, index in iteration.get("pool_draws", ()):
            draws.uniform.append(u)
            draws.indices += [] if index is None else [index]
        x_a, x_b = images(i, INFO["batch"])
        losses = script.step(nets, *pools, x_a, x_b, w, RUN, updates, gan_mode=options["gan_mode"])
        assert not draws.uniform and not draws.indices
        assert set(losses) == {k for k, v in iteration["losses"].items() if v}
        for name, value in losses.items():
            assert close(value, iteration["losses"][name], 1e-6 if i else 1e-9), (i, name)
        if i == 0 and "first_gradients_G" in golden:
            gradients = {**golden["first_gradients_G"], **golden["first_gradients_D"]}
            check_gradients(updates, parameters, gradients, golden["zero_gradient_parameters"])
            assert set(gradients) | set(golden["zero_gradient_parameters"]) == set(parameters)
            for letter in "GD":
                names = golden[f"first_gradients_{letter}"]
                norm = torch.stack([updates.gradients[parameters[n]].norm() for n in names]).norm()
                assert close(norm, golden[f"gradient_norm_{letter}"])
    check_after(parameters, before, golden["after"], golden["zero_gradient_parameters"])


def masks(start: int = 0):
    stored = iter(torch.from_numpy(DATA["spgan_dropout_masks"]).double()[start:])
    return lambda: next(stored)


def spgan_step(nets, pools, updates, i: int, epoch: int, keep) -> dict[str, torch.Tensor]:
    """As the script calls it: SPGAN's flags give the weights and the schedule."""
    x_a, x_b = spgan_images(i, INFO["spgan"]["batch"])
    w = script.Weights(*(getattr(ARGS, name) for name in script.Weights._fields))
    return script.step(nets, *pools, x_a, x_b, w, RUN, updates, **script.spgan_schedule(epoch, i), keep=keep)


def test_spgan_iterations():
    info = INFO["spgan"]
    nets, parameters = spgan_networks()
    before = {k: p.detach().clone() for k, p in parameters.items()}
    first = info["first_forward"]
    with torch.no_grad():
        x_a, x_b = spgan_images(0, info["batch"])
        ab, ba = nets.g_ab(x_a), nets.g_ba(x_b)
        assert close(ab, first["b_fake"]) and close(ba, first["a_fake"])
        array, step = stored("spgan_b_fake")
        assert close(ab[:, :, ::step, ::step], array)
        score = nets.d_a(ba)
        assert close(score, first["Da_on_a_fake"]) and list(score.shape) == first["Da_output_shape"]
        keep = masks()
        for x, name in ((x_a, "a_real"), (ab, "b_fake"), (x_b, "b_real"), (ba, "a_fake")):
            assert close(nets.sia(x, keep()), DATA[f"spgan_embedding_{name}"]), name
    pools = [script.ImagePool(ARGS.pool_size, None, RUN, whole_batches=True) for _ in range(2)]
    updates, keep = Updates(nets, ARGS.lr, ARGS.beta1), masks()
    w = script.Weights()
    scale = {"cycle_A": w.lambda_A, "cycle_B": w.lambda_B, "idt_A": w.lambda_B * w.lambda_identity,
             "idt_B": w.lambda_A * w.lambda_identity, "contrastive": ARGS.lambda_contrastive}
    for n, iteration in enumerate(info["iterations"]):
        losses = spgan_step(nets, pools, updates, iteration["i"], info["epoch"], keep)
        assert ("G" in losses) == iteration["updates_G"]
        if "G" in losses:
            losses["contrastive"] = losses.pop("contrastive_A") + losses.pop("contrastive_B")
        golden = {**iteration.get("G_step", {}), **iteration["M_and_D_step"]}
        assert {SPGAN_NAMES[k] for k in losses} == set(SPGAN_NAMES.values()) & set(golden)
        for name, value in losses.items():
            assert close(value / scale.get(name, 1.0), golden[SPGAN_NAMES[name]], 1e-6 if n else 1e-9), (n, name)
        if n == 0:
            check_gradients(updates, parameters, info["first_gradients"], info["zero_gradient_parameters"])
            for prefix, norm in info["gradient_norms_first_step"].items():
                grads = [updates.gradients[p].norm() for k, p in parameters.items() if k.startswith(f"{prefix}.")]
                assert close(torch.stack(grads).norm(), norm), prefix
    check_after(parameters, before, info["after"], info["zero_gradient_parameters"])


@pytest.mark.parametrize("epoch", INFO["spgan"]["first_iteration_by_epoch"])
def test_spgan_schedule(epoch):
    """SiaNet trains from the 2nd epoch on; its loss counts for G from the 3rd."""
    golden = INFO["spgan"]["first_iteration_by_epoch"][epoch]
    nets, parameters = spgan_networks()
    before = {k: p.detach().clone() for k, p in parameters.items()}
    pools = [script.ImagePool(ARGS.pool_size, None, RUN, whole_batches=True) for _ in range(2)]
    # the release evaluates SiaNet in G's step in every epoch, ours where it counts
    keep = masks() if script.spgan_schedule(int(epoch), 0)["contrastive"] else masks(4)
    losses = spgan_step(nets, pools, Updates(nets, ARGS.lr, ARGS.beta1), 0, int(epoch), keep)
    assert close(losses["G"], golden["g_loss"])
    assert ("M" in losses) == golden["Me_moves"]
    for key in (k for k in golden if k[:3] in ("Ga_", "Gb_", "Da_", "Db_", "Me_") and k != "Me_moves"):
        name = key.replace("_", ".", 1)
        check_after({name: parameters[name]}, before, {name: golden[key]}, ())


def test_contrastive_loss():
    info = INFO["spgan"]["contrastive_alone"]
    x2 = torch.from_numpy(DATA["contrastive_x2"])
    x1 = torch.from_numpy(DATA["contrastive_x1"]).requires_grad_()
    d = torch.nn.functional.pairwise_distance(x1, x2)
    assert close(d, info["distances"])
    for label, positive in (("label0", True), ("label1", False)):
        loss = script.loss_con(x1, x2, positive)
        assert close(loss, info[label])
        assert close(torch.autograd.grad(loss, x1)[0], DATA[f"contrastive_grad_x1_{label}"])


# --- pools and schedule -----------------------------------------------------------------------------------------------


def test_image_pool():
    info = INFO["image_pool"]
    draws = Draws(info["uniform_draws"], info["index_draws"])
    pool = script.ImagePool(info["pool_size"], draws, RUN)
    for query in info["queries"]:
        out = pool.query(torch.tensor(query["in"]).view(-1, 1, 1, 1))
        assert out.flatten().tolist() == query["out"]
    assert [int(x) for x in pool.held] == info["pool_after"]
    assert draws.uniform == [] and draws.indices == info["unused_index_draws"]
    assert info["first_50_of_a_pool_of_50"]
    full = script.ImagePool(50, Draws([], []), RUN)
    assert all(torch.equal(full.query(x), x) for x in torch.rand(50, 1, 3, 2, 2))


def test_item_pool():
    info = INFO["spgan"]["item_pool"]
    pool = script.ImagePool(info["max_num"], Draws(info["uniform_draws"], info["index_draws"]), RUN, whole_batches=True)
    batches = {q["in"]: torch.rand(3, 3, 2, 2) for q in info["queries"]}
    for query in info["queries"]:
        assert torch.equal(pool.query(batches[query["in"]]), batches[query["out"]])
    assert not pool.rng.uniform and not pool.rng.indices


def test_learning_rate():
    for setting, golden in INFO["cyclegan"]["lr_multiplier_per_epoch"].items():
        values = dict(part.split("=") for part in setting.split(","))
        for epoch, factor in golden.items():
            ours = script.lr_factor(int(epoch), int(values["n_epochs"]), int(values["n_epochs_decay"]))
            assert ours == pytest.approx(factor, rel=1e-9, abs=1e-12)

"""Networks, memory, training, files and draws of reid.*, with the script's own functions, in float64."""
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill, load_reference
from PIL import Image
from torch import nn

import train_ecn as script
from lib.datasets import persons
from lib.models import reid
from lib.runtime import Run

pytestmark = pytest.mark.usefixtures("all_cores")
ONE = Run(torch.device("cpu"), 0, 1, "off")
INFO, DATA = load_reference("reid")
HYPER = INFO["hyper_parameters"]


@functools.cache
def _filled(keys: str) -> dict:
    return fill(json.loads(keys), INFO["seed"])


def weights(keys) -> dict:
    """The reference's weights of a network; filling takes seconds."""
    return _filled(json.dumps(keys))


def network(keys, layout) -> nn.Module:
    """The reference's network with its weights; depth and sizes are those of the keys."""
    shapes = {key: shape for key, shape in keys}
    arch = "resnet50" if any(key.endswith("layer1.0.conv3.weight") for key in shapes) else "resnet18"
    head, classifier = ("feat.weight", "classifier.weight") if layout is reid.IDNet else \
        ("model.fc.0.weight", "classifier.0.weight")
    with torch.device("meta"):
        net = layout(shapes[classifier][0], arch, shapes[head][0], dropout=0.0)
    assert [[k, list(v.shape)] for k, v in net.state_dict().items()] == keys
    net = net.double().to_empty(device="cpu")
    net.load_state_dict(weights(keys))
    return net


def images(name: str) -> torch.Tensor:
    return torch.from_numpy(DATA[f"{name}_x32"]).double() / 32


def golden(name: str) -> tuple[np.ndarray, int]:
    """(array, k): an array stored whole, or every k-th of its columns."""
    for key in DATA.files:
        if key == name:
            return DATA[key], 1
        if key.startswith(f"{name}_every_") and key.endswith("th"):
            return DATA[key], int(key.removeprefix(f"{name}_every_").removesuffix("th"))
    raise KeyError(name)


def require_equal(ours: torch.Tensor, name: str, tolerance: float = 1e-10) -> None:
    array, every = golden(name)
    ours = ours.detach().numpy()[..., ::every]
    assert ours.shape == array.shape
    assert np.abs(ours - array).max() <= tolerance * np.abs(array).max(), name


def require_checksum(ours: torch.Tensor, expected, tolerance: float = 1e-10) -> None:
    assert ours.norm().item() == pytest.approx(expected[1], rel=tolerance, abs=1e-12)
    assert ours.sum().item() == pytest.approx(expected[0], rel=tolerance, abs=tolerance * ours.abs().sum().item())


def require_after(net: nn.Module, keys, after: dict, tolerance: float = 1e-8) -> None:
    """Every tensor after training, and how far it moved."""
    start, state = weights(keys), net.state_dict()
    assert {k for k in state if not k.endswith("num_batches_tracked")} == after.keys()
    for key, expected in after.items():
        require_checksum(state[key], (expected["sum"], expected["l2"]), tolerance)
        moved = (state[key] - start[key]).norm().item()
        assert moved == pytest.approx(expected["delta_l2"], rel=tolerance, abs=1e-13), key


def random_memory(rows: int, columns: int) -> torch.Tensor:
    return nn.functional.normalize(fill([["em", [rows, columns]]], INFO["seed"])["em"])


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", INFO["networks"])
def test_network(arch):
    expected, x = INFO["networks"][arch], images("net_input")
    net = network(expected["keys"], reid.IDNet).eval()
    outputs = {"eval_logits": net(x), "eval_tgt_feat": net(x, "target"), "eval_pool5": reid.retrieval_features(net, x)}
    assert torch.equal(outputs["eval_tgt_feat"], reid.retrieval_features(net, x, "fc"))
    reid.freeze(net)
    reid.set_train_mode(net, "ecn")
    assert [k for k, p in net.named_parameters() if not p.requires_grad] == expected["requires_grad_false"]
    norms = {k: m for k, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert [k for k, m in norms.items() if not m.training] == expected["batch_norm_in_eval_mode_during_training"]
    assert [k for k, m in norms.items() if m.training and not m.weight.requires_grad] == \
        expected["batch_norm_frozen_scale_but_training_statistics"]
    outputs["train_logits"] = net(x)
    for key, value in expected["running_statistics_after_one_train_pass"].items():
        require_checksum(net.state_dict()[key], value)
    net.load_state_dict(weights(expected["keys"]))
    outputs["train_tgt_feat"] = net(x, "target")
    for name, value in outputs.items():
        require_equal(value, f"{arch}_{name}")
        require_checksum(value, expected["checksums"][name])


def test_network_of_spgan():
    expected, x = INFO["spgan_reid"], images("net_input")
    net = network(expected["keys"], reid.SPGANNet).eval()
    with torch.no_grad():
        require_equal(net(x), "spgan_eval_logits")
        require_equal(reid.retrieval_features(net, x), "spgan_pool5")
        require_equal(reid.retrieval_features(net, x, mirrored=True), "spgan_pool5_plus_flip")


def test_local_max_pooling():
    maps, square = (torch.from_numpy(DATA[name]).double() / 32 for name in ("lmp_map_x32", "lmp_caffe_map_x32"))
    parts = [int(key.removeprefix("lmp_max_")) for key in DATA.files if key.startswith("lmp_max_")]
    assert parts
    for p in parts:
        require_equal(reid.local_max_pool(maps, p), f"lmp_max_{p}", 0)
    name, = (key for key in DATA.files if key.startswith("lmp_caffe_kernel"))
    height, stride = (int(n) for n in re.fullmatch(r"lmp_caffe_kernel(\d+)x\d+_stride(\d+)", name).groups())
    require_equal(reid.local_max_pool(square, (square.shape[2] - height) // stride + 1), name, 0)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", INFO["memory"]["chains"])
def test_memory(chain):
    """Losses, gradients and the memory after each of several batches, some of which hold an image twice."""
    info = INFO["memory"]
    expected, k = info["chains"][chain], info["chains"][chain]["knn"]
    memory = script.ExemplarMemory(info["n"], info["d"]).double()
    if expected["initial"] != "zeros":
        memory.em.copy_(random_memory(info["n"], info["d"]))
        require_checksum(memory.em, info["initial_random_checksum"])
    for n, epoch in enumerate(info["epochs"]):
        f = torch.from_numpy(DATA[f"mem_{chain}_features"][n]).requires_grad_()
        index = torch.from_numpy(DATA["mem_indices"][n]).long()
        near = script.knn_of_epoch(epoch, k, HYPER["first_epoch_with_neighbours"])
        assert bool(near) == expected["neighbourhood_term"][n]
        z = memory.logits(f, info["beta"])
        if f"mem_{chain}_logits" in DATA.files:
            assert np.allclose(z.detach().numpy() * info["beta"], DATA[f"mem_{chain}_logits"][n], rtol=0, atol=1e-12)
            assert np.allclose(script.neighbours(z.detach(), index, k).numpy() * k,
                               DATA[f"mem_{chain}_weights_x{k}"][n], rtol=0, atol=1e-12)
        loss = script.loss_neighbourhood(z, index, near) if near else script.loss_exemplar(z, index)
        loss.backward()
        memory.update(f.detach(), index, info["alpha_per_epoch"] * epoch)
        assert loss.item() == pytest.approx(expected["loss"][n], rel=1e-10)
        assert np.allclose(f.grad.numpy(), DATA[f"mem_{chain}_grad"][n], rtol=0, atol=1e-11)
        require_checksum(memory.em, expected["memory_checksum"][n])
        if f"mem_{chain}_memory" in DATA.files:
            assert np.allclose(memory.em.numpy(), DATA[f"mem_{chain}_memory"][n], rtol=0, atol=1e-12)
    assert np.allclose(memory.em.numpy(), DATA[f"mem_{chain}_memory_last"], rtol=0, atol=1e-12)


# --- training ---------------------------------------------------------------------------------------------------------


class Masks(nn.Module):
    """Dropout with given masks [call, sample, feature]: the source's and the target's pass in turn, kept values x 2."""

    def __init__(self, *masks: np.ndarray):
        super().__init__()
        self.masks, self.calls = [torch.from_numpy(m).double() * 2 for m in masks], 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        iteration, which = divmod(self.calls, len(self.masks))
        self.calls += 1
        return x * self.masks[which][iteration]


def require_groups(optimizer, expected, lr: float) -> None:
    assert len(optimizer.param_groups) == len(expected)
    for group, (tensors, momentum, decay, nesterov, multiple) in zip(optimizer.param_groups, expected, strict=True):
        assert (len(group["params"]), group["momentum"], group["weight_decay"], group["nesterov"]) == \
            (tensors, momentum, decay, nesterov)
        assert group["base_lr"] == pytest.approx(multiple * lr)


def rates(optimizer, epoch: int) -> list[float]:
    script.set_step_lr(optimizer, epoch // HYPER["lr_drop_every"])
    return [group["lr"] for group in optimizer.param_groups]


def optimizer_of(net: nn.Module, lr: float, lr_trunk: float) -> torch.optim.Optimizer:
    return script.make_optimizer(net, lr, lr_trunk, HYPER["momentum"], HYPER["weight_decay"])


@pytest.mark.parametrize("case", INFO["training"]["results"])
def test_ecn_training(case):
    """Three iterations: rates, losses, logits, the memory, and every tensor in the end."""
    info, expected = INFO["training"], INFO["training"]["results"][case]
    arch, _, name = case.partition("_")
    variant, keys, batch = info["variants"][name], INFO["networks"][arch]["keys"], info["batch"]
    net = network(keys, reid.IDNet)
    reid.freeze(net)
    reid.set_train_mode(net, "ecn")
    if variant["masks"]:
        net.dropout = Masks(DATA[f"drop_{arch}_src"], DATA[f"drop_{arch}_tgt"])
    memory = script.ExemplarMemory(info["n_t"], net.features).double()
    if variant["memory"] != "zeros":
        memory.em.copy_(random_memory(info["n_t"], net.features))
    lr = variant["lr"][arch]
    optimizer = optimizer_of(net, lr, 0.1 * lr)
    require_groups(optimizer, expected["parameter_groups_[tensors,momentum,decay,nesterov,lr_mult]"], lr)
    x_s, x_t, logits = images("src_images"), images("tgt_images"), []
    y_s, index_t = (torch.from_numpy(DATA[k]).long() for k in ("src_labels", "tgt_indices"))
    net.register_forward_hook(lambda _, given, out: logits.append(out.detach()) if len(given) == 1 else None)
    for n, (epoch, wanted) in enumerate(zip(variant["epochs"], expected["iterations"], strict=True)):
        at, tolerance = slice(n * batch, (n + 1) * batch), 1e-8 if n else 1e-10
        assert rates(optimizer, epoch) == pytest.approx(wanted["lr"], rel=1e-12)
        alpha = HYPER["inv_alpha"] * epoch
        assert alpha == pytest.approx(wanted["alpha"])
        optimizer.zero_grad()
        losses = script.step(
            net, x_s[at], y_s[at], ONE, memory=memory, x_t=x_t[at], index_t=index_t[at], alpha=alpha,
            beta=HYPER["temperature_beta"], lmd=info["lambda"],
            k=script.knn_of_epoch(epoch, HYPER["knn"], HYPER["first_epoch_with_neighbours"]))
        optimizer.step()
        assert losses["loss_src"].item() == pytest.approx(wanted["source_loss"], rel=tolerance)
        assert losses["loss_tgt"].item() == pytest.approx(wanted["target_loss"], rel=tolerance)
    require_equal(torch.stack(logits), f"train_{case}_logits", 1e-8)
    require_equal(memory.em, f"train_{case}_memory", 1e-8)
    require_checksum(memory.em, expected["memory_after"], 1e-8)
    require_after(net, keys, expected["after"])


@pytest.mark.parametrize("case", INFO["ide_baseline"]["results"])
def test_ide_and_camstyle_training(case):
    info, expected = INFO["ide_baseline"], INFO["ide_baseline"]["results"][case]
    arch, batch = case.partition("_")[0], INFO["training"]["batch"]
    styled = case.endswith("_camstyle")
    net = network(info["keys"][arch], reid.IDNet)
    reid.set_train_mode(net, "train")
    lr = expected["iterations"][0]["lr"][1] / 0.1 ** (expected["iterations"][0]["epoch"] // HYPER["lr_drop_every"])
    optimizer = optimizer_of(net, lr, 0.1 * lr)
    require_groups(optimizer, expected["parameter_groups_[tensors,momentum,decay,nesterov,lr_mult]"], lr)
    x_s, x_t, y_s = images("src_images"), images("tgt_images"), torch.from_numpy(DATA["src_labels"]).long()
    for n, wanted in enumerate(expected["iterations"]):
        at, part = slice(n * batch, (n + 1) * batch), slice(n * (batch // 2), (n + 1) * (batch // 2))
        assert rates(optimizer, wanted["epoch"]) == pytest.approx(wanted["lr"], rel=1e-12)
        optimizer.zero_grad()
        losses = script.step(net, x_s[at], y_s[at], ONE, x_style=x_t[part] if styled else None,
                             y_style=y_s[part] if styled else None)
        optimizer.step()
        tolerance = 1e-8 if n else 1e-10
        assert sum(losses.values()).item() == pytest.approx(wanted["loss"], rel=tolerance)
        if styled:
            assert losses["loss_style"].item() == pytest.approx(wanted["style_loss_in_it"], rel=tolerance)
    require_after(net, info["keys"][arch], expected["after"])


def test_training_of_spgan():
    expected, batch = INFO["spgan_reid"], INFO["training"]["batch"]
    preset = script.PRESETS["spgan"]
    net = network(expected["keys"], preset["layout"])
    reid.set_train_mode(net, preset["bn"])
    optimizer = optimizer_of(net, preset["learning_rate"], preset["lr_trunk"])
    assert {group["base_lr"] for group in optimizer.param_groups} == set(expected["learning_rates"])
    x_s, y_s = images("src_images"), torch.from_numpy(DATA["src_labels"]).long()
    for n, wanted in enumerate(expected["losses"]):
        at = slice(n * batch, (n + 1) * batch)
        optimizer.zero_grad()
        loss = script.step(net, x_s[at], y_s[at], ONE)["loss_src"].item()
        optimizer.step()
        assert loss == pytest.approx(wanted, rel=1e-8 if n else 1e-10)
    require_after(net, expected["keys"], expected["after"])


def test_defaults_are_the_released_settings():
    args = script.parse_args([])
    ours = (args.inv_beta, args.knn, args.inv_alpha, args.lmd, args.learning_rate, args.lr_trunk, args.momentum,
            args.weight_decay, args.epochs, args.epochs_decay, args.batch_size, args.neighbour_epoch)
    theirs = [HYPER[key] for key in ("temperature_beta", "knn", "inv_alpha", "lambda", "lr_new", "lr_base", "momentum",
                                     "weight_decay", "epochs", "lr_drop_every", "batch_per_domain",
                                     "first_epoch_with_neighbours")]
    assert ours == pytest.approx(theirs)


# --- files and draws --------------------------------------------------------------------------------------------------


def lay(root: Path, files) -> None:
    """Empty files: listing opens none."""
    for folder, names in files.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            (root / folder / name).touch()


@pytest.mark.parametrize("case", INFO["listing"])
def test_listing(tmp_path, case):
    expected = INFO["listing"][case]
    source, target = case.split("->")
    lay(tmp_path, expected["files"])

    def rows(people):
        return [[p.path.name, p.identity, p.camera] for p in people]

    s, t = (persons.open_persons(tmp_path, name) for name in (source, target))
    assert rows(s.train) == expected["source_train"] and len(s.identities) == expected["num_train_ids"]
    assert rows(t.train) == expected["target_train"]
    assert rows(t.query) == expected["query"] and rows(t.gallery) == expected["gallery"]
    # the release takes the number of cameras from a table of three names, this from the files
    assert len(t.cameras) <= expected["target_num_cam"]


@pytest.mark.parametrize("case", [key for key, value in INFO["camera_style"].items() if isinstance(value, list)])
def test_camera_styles(tmp_path, case):
    """The file that is opened for a drawn camera, in both forms of names."""
    draws, cameras = INFO["camera_style"][case], INFO["camera_style"]["num_cam"]
    root, folder = tmp_path / case, f"{case}/{persons.FOLDERS['train']}"
    short = any(f"fake_{d['drawn'] + 1}.jpg" in d["path"] for d in draws)
    seen = max(cameras, *(1 + max(d["camera"], d["drawn"]) for d in draws))
    # one more image of each camera, so that the set has all of them
    names = {d["file"] for d in draws} | {f"9999_c{c + 1}s1_000000_00.jpg" for c in range(seen)}
    lay(tmp_path, {folder: names, f"{case}/{persons.STYLES}": [
        f"{name[:-4]}_fake_{c + 1}.jpg" if short else f"{name[:-4]}_fake_{own + 1}to{c + 1}.jpg"
        for name in names for own in [int(name.partition("_c")[2].split("s")[0].split("_")[0]) - 1]
        for c in range(seen) if c != own]})
    people = persons.open_persons(tmp_path, case, ["train"])
    styles = persons.CameraStyles(people)
    assert styles.cameras == list(range(seen))
    by_name = {p.path.name: p for p in people.train}
    for draw in draws:
        assert by_name[draw["file"]].camera == draw["camera"]
        assert styles.path(by_name[draw["file"]], draw["drawn"]) == tmp_path / draw["path"]
    assert root.is_dir()


class Draws:
    """A random generator that gives recorded draws, and checks what is asked of it."""

    def __init__(self, draws):
        self.draws = list(draws)

    def uniform(self, low, high):
        kind, *bounds, _, value = self.draws.pop(0)
        assert (kind, *bounds) == ("uniform", low, high)
        return value

    def integers(self, low, high, endpoint):
        kind, *bounds, _, value = self.draws.pop(0)
        assert (kind, *bounds) == ("randint", low, high) and endpoint
        return value


def test_random_erasing():
    for case in INFO["random_erasing"]:
        size, draws = case["size_hw"], Draws(case["draws"])
        x = persons.erase(torch.zeros(3, *size, dtype=torch.float64), case["probability"], draws)
        expected = torch.zeros_like(x)
        if case["fill"] is not None:
            top, left, bottom, right = case["box_top_left_bottom_right"]
            expected[:, top:bottom, left:right] = torch.tensor(case["fill"], dtype=torch.float64)[:, None, None]
        assert not draws.draws
        assert torch.allclose(x, expected, rtol=0, atol=1e-7)  # some cases were recorded in float32
    never = Draws([["uniform", 0, 1, None, 0.0001]])
    assert (persons.erasing_box((64, 32), 0.0, never) is not None) == \
        INFO["random_erasing_probability0_draw0.0001_erases"]


def test_random_sized_rect_crop():
    drawn = [key for key in DATA.files if key.startswith("crop_out_")]
    assert drawn
    for n, case in enumerate(INFO["random_sized_rect_crop"]):
        box = case["box_left_top_right_bottom"]
        draws = Draws(case["draws"])
        assert persons.crop_box(tuple(case["size_wh"]), draws) == (None if box is None else tuple(box))
        assert not draws.draws
        if f"crop_out_{n}" in drawn:
            image = Image.fromarray(DATA["crop_image"])
            out = persons.random_sized_rect_crop(image, tuple(case["resize_wh"]), Draws(case["draws"]))
            assert np.array_equal(np.asarray(out), DATA[f"crop_out_{n}"])

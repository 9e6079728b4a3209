"""Pixel-level cycle association against the numbers of the released code (float64)."""
import numpy as np
import pytest
import torch
from conftest import fill, load_reference

import train_pixel_assoc as script
from lib import checkpoint, ops, predict
from lib.metrics import confusion_matrix
from lib.models.deeplab import aggregated_probabilities, build
from lib.optim import deeplab_sgd, set_poly_lr
from lib.runtime import Run

INFO, DATA = load_reference("plca")
CASES = [f"{metric}_{rest}" for metric in ("cos", "kl") for rest in ("spagg0", "spagg1", "spagg1_other_size")]


def inputs(metric: str, other: str):
    if metric == "cos":
        return tuple(torch.from_numpy(DATA[f"asso_{name}_x64"] / 64.0) for name in ("x1", f"x2{other}"))
    return tuple(torch.from_numpy(DATA[f"asso_{name}_logits_x16"] / 16.0).softmax(1) for name in ("p1", f"p2{other}"))


@pytest.mark.parametrize("case", CASES)
def test_association(case, backend):
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
def test_nothing_consistent(metric, backend):
    x1, x2 = (x.requires_grad_() for x in inputs(metric, ""))
    gt = torch.from_numpy(DATA[f"asso_{metric}_nothing_consistent_gt1"]).long()
    got = ops.cycle_association_loss(x1, x2, gt, metric=metric, alpha=0.5)
    got.loss.backward()
    assert got.loss.item() == 0 and got.kept.item() == 0
    assert not x1.grad.any() and not x2.grad.any()


@pytest.mark.parametrize("threshold", [0, 2, 10])
def test_lsr(threshold):
    logits = torch.from_numpy(DATA["lsr_logits_x64"] / 64.0).requires_grad_()
    loss = script.loss_lsr(logits, threshold)
    assert loss.item() == pytest.approx(INFO["lsr"][f"thres_{float(threshold)}"], rel=1e-9)
    loss.backward()
    close(logits.grad, DATA[f"lsr_grad_thres_{threshold}"])


def test_lovasz():
    logits = torch.from_numpy(DATA["lovasz_logits_x64"] / 64.0).requires_grad_()
    labels = torch.from_numpy(DATA["lovasz_labels"]).long()
    prob = logits.softmax(1)
    prob.retain_grad()
    loss = script.loss_lovasz(prob, labels)
    assert loss.item() == pytest.approx(INFO["lovasz"]["present_ignore255"], rel=1e-9)
    loss.backward()
    close(prob.grad, DATA["lovasz_grad_probabilities"])
    close(logits.grad, DATA["lovasz_grad_logits"])


def test_lovasz_with_few_labels():
    """The release fails with one labelled pixel and returns an empty tensor with none."""
    prob = torch.from_numpy(DATA["lovasz_logits_x64"] / 64.0).softmax(1).requires_grad_()
    labels = torch.full((2, 10, 12), 255)
    loss = script.loss_lovasz(prob, labels)
    loss.backward()
    assert loss == 0 and not prob.grad.any()
    labels[1, 2, 3] = 4
    assert script.loss_lovasz(prob, labels).item() == pytest.approx(1 - prob[1, 4, 2, 3].item(), rel=1e-12)


@pytest.fixture(scope="module")
def weights():
    return fill(INFO["network"]["keys"], INFO["network"]["seed"])


def network(weights):
    net = build("DeeplabPixelAssoc", INFO["network"]["num_classes"]).double()
    net.load_state_dict(weights)
    return net


def test_network(weights):
    net = network(weights).eval()
    assert [[k, list(v.shape)] for k, v in net.state_dict().items()] == INFO["network"]["keys"]
    assert all(p.requires_grad for p in net.parameters())
    x = torch.from_numpy(DATA["net_input"]).double()
    with torch.no_grad():
        layer3, layer4 = net.backbone.features(x)
        features, logits = net(x, return_features=True)
    close(logits, DATA["net_eval_out"])
    close(layer4[:, ::64], DATA["net_eval_feat_every_64th_channel"])
    close(layer3[:, ::64], DATA["net_eval_aux_feat_every_64th_channel"])
    assert torch.equal(features, layer4)


@pytest.mark.parametrize("kind", ["aggregated", "plain"])
def test_scores(weights, kind, backend):
    net = network(weights).eval()
    x, gt = torch.from_numpy(DATA["net_input"]).double(), DATA["test_gt"]
    with torch.no_grad():
        close(aggregated_probabilities(net, x) if kind == "aggregated" else net(x), DATA[f"test_{kind}_scores"])
    run, confusion = Run(torch.device("cpu"), 0, 1, "off"), np.zeros((19, 19), np.int64)
    for image, truth, want in zip(x, gt, DATA[f"test_{kind}_prediction"], strict=True):
        label = predict.predict(net, [image], truth.shape[::-1], run, align_corners=False,
                                aggregate=0.5 if kind == "aggregated" else 0.0)
        assert np.array_equal(label.numpy(), want)
        confusion += confusion_matrix(truth, label.numpy(), 19, 255)
    assert np.array_equal(confusion, DATA[f"test_{kind}_confusion"])


def test_training(weights, backend):
    """Two steps of two passes; the Lovasz weight counts as often as there are passes, as in the release."""
    training = INFO["training"]
    settings = training["settings"]
    net, passes, batch = network(weights).train(), settings["iter_size"], settings["batch"]
    optimizer = deeplab_sgd(net, "once", settings["base_lr"], settings["momentum"], settings["weight_decay"],
                            settings["lr_mult_classifier"])
    terms = script.Weights(settings["lov_w"] * passes, settings["asso_w"], settings["lsr_w"], settings["lsr_thres"],
                           settings["spagg_alpha"])
    images = {name: torch.from_numpy(DATA[f"train_{name}"]) for name in ("src_images", "tgt_images", "src_labels")}
    run = Run(torch.device("cpu"), 0, 1, "off")
    names = {"loss_ce": "cross_entropy_alone", "loss_lovasz": "lovasz_alone", "loss_asso_feat": "association",
             "loss_asso_cls": "association_cls", "loss_lsr_s": "lsr_S", "loss_lsr_t": "lsr_T"}
    for i, iteration in enumerate(training["iterations"]):
        set_poly_lr(optimizer, settings["base_lr"], i, settings["poly_max_epochs"] * settings["iters_per_epoch"],
                    settings["power"])
        for group, rate in zip(optimizer.param_groups, iteration["learning_rates"], strict=False):
            assert group["lr"] == pytest.approx(rate, rel=1e-12)
        optimizer.zero_grad()
        for s, expected in enumerate(iteration["sub_iterations"]):
            part = slice((i * passes + s) * batch, (i * passes + s + 1) * batch)
            total, values = script.objective(net, images["src_images"][part].double(),
                                             images["src_labels"][part].long(), images["tgt_images"][part].double(),
                                             terms, run)
            assert total.item() == pytest.approx(expected["total"], rel=1e-9)
            for ours, theirs in names.items():
                assert values[ours].item() == pytest.approx(expected[theirs], rel=1e-9), (i, s, ours)
            (total / passes).backward()
        optimizer.step()
    after = net.state_dict()
    for name, expected in training["after"].items():
        got = after[name]
        assert got.sum().item() == pytest.approx(expected["sum"], rel=1e-9), name
        assert got.norm().item() == pytest.approx(expected["l2"], rel=1e-9), name
        assert (got - weights[name]).norm().item() == pytest.approx(expected["delta_l2"], rel=1e-9), name
    assert after["backbone.bn1.num_batches_tracked"] == training["num_batches_tracked"]


@pytest.mark.parametrize("classes", [19, 16])
def test_released_files_come_in_our_order(tmp_path, weights, classes):
    head = {k: v[:classes].float() for k, v in weights.items() if k.startswith("classifier")}
    for container in ("weights", "model_state_dict"):
        torch.save({container: {**{k: v for k, v in weights.items() if "layer" not in k}, **head}}, tmp_path / "f.pth")
        ours, meta = checkpoint.read_weights(tmp_path / "f.pth")
        for name in ("sky", "road", "bicycle", "rider", "wall"):
            place = meta["classes"].index(name)
            theirs = checkpoint.PIXEL_ASSOC_CLASSES.index(name)
            for key, value in head.items():
                assert torch.equal(ours[key][place], value[theirs])
        assert len(meta["classes"]) == classes and meta["classes"][0] == "road" and meta["align_corners"] is False
        assert ("train" in meta["classes"]) == (classes == 19)


def close(got, want) -> None:
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-9, atol=1e-9 * np.abs(want).max())

"""Pixel-level cycle association against the numbers of the released code (plca.*, float64).

Which cases, sizes, classes and settings there are is what the files say.
"""
import numpy as np
import pytest
import torch
from conftest import cases, every, fill, load_reference, scaled, with_weights

import train_pixel_assoc as script
from lib import checkpoint, ops
from lib.metrics import confusion_matrix
from lib.models.deeplab import build
from lib.optim import deeplab_sgd, set_poly_lr
from lib.predict import aggregated_probabilities, predict
from lib.runtime import Run

pytestmark = pytest.mark.usefixtures("all_cores")
INFO, DATA = load_reference("plca")
CPU = Run(torch.device("cpu"), 0, 1, "off")
IGNORE = 255


def close(got, want) -> None:
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


# --- association ------------------------------------------------------------------------------------------------------

ASSOCIATION = INFO["association"]
CASE = r"(cos|kl)_spagg\d(?:\.\d+)?(.*)"
NOTHING = r"(cos|kl)_nothing_consistent(.*)"


def association_cases(pattern: str) -> list:
    """[(case, *groups of ``pattern``)] of the association cases whose names match it in full."""
    return [(match.string, *match.groups()) for match in cases(pattern, ASSOCIATION["cases"])]


def unknown_cases() -> list:
    known = {case for pattern in (CASE, NOTHING) for case, *_ in association_cases(pattern)}
    return [pytest.param(case, None, None, marks=pytest.mark.skip(reason=f"{case}: no known kind of association"))
            for case in ASSOCIATION["cases"] if case not in known]


def alpha_of(case: str) -> float:
    """The share of aggregation, 0 for none: that of the case where it has one of its own, else that of the file."""
    own = cases(r".*_(?:spagg(?=\d\.)|alpha)(\d(?:\.\d+)?).*", [case])
    if "_spagg0" in case and not own:
        return 0.0
    return ASSOCIATION["cases"][case].get("spagg_alpha", float(own[0][1]) if own else ASSOCIATION["spagg_alpha"])


def inputs(metric: str, variant: str) -> list[torch.Tensor]:
    """Source and target; either may have a map of its own for a variant ("_other_size")."""
    found = []
    for name in ("x1", "x2") if metric == "cos" else ("p1", "p2"):
        names = (f"asso_{name}{v}" + "_logits" * (metric == "kl") for v in (variant, ""))
        stored, *_ = (n for n in names if cases(rf"{n}_x\d+", DATA.files))
        found.append(scaled(DATA, stored) if metric == "cos" else scaled(DATA, stored).softmax(1))
    return [x.requires_grad_() for x in found]


def labels(name: str) -> torch.Tensor:
    return torch.from_numpy(DATA[name]).long()


def compare_with_golden(loss_asso, case: str, metric: str, variant: str) -> None:
    x1, x2 = inputs(metric, variant)
    gt = labels(f"asso_gt1{variant}" if f"asso_gt1{variant}" in DATA else "asso_gt1")
    expected = ASSOCIATION["cases"][case]
    got = loss_asso(x1, x2, gt, metric=metric, alpha=alpha_of(case), ignore_index=IGNORE)
    assert got.loss.item() == pytest.approx(expected["association"], rel=1e-9)
    assert np.array_equal(got.forward.numpy(), DATA[f"asso_{case}_forward_index"])
    assert np.array_equal(got.back.numpy(), DATA[f"asso_{case}_backward_index"])
    assert np.array_equal(got.selected.numpy(), DATA[f"asso_{case}_select_mask"].astype(bool))
    assert got.kept.item() == DATA[f"asso_{case}_select_mask"].sum()
    assert got.kept.item() / (gt != IGNORE).sum().item() == pytest.approx(expected["pos_ratio"], rel=1e-12)
    assert got.forward[0].unique().numel() / gt[0].numel() == pytest.approx(expected["cover_ratio"], rel=1e-12)
    got.loss.backward()
    close(x1.grad, DATA[f"asso_{case}_grad_x1"])
    close(x2.grad, DATA[f"asso_{case}_grad_x2"])


KNOWN = pytest.mark.parametrize("case, metric, variant", association_cases(CASE))


@pytest.mark.parametrize("case, metric, variant", [*association_cases(CASE), *unknown_cases()])
def test_association(backend, case, metric, variant):
    compare_with_golden(ops.cycle_association_loss, case, metric, variant)
    if f"asso_{case}_mixed_x2" in DATA:
        mixed = ops.spatial_aggregate(inputs(metric, variant)[1].detach(), metric, alpha_of(case))
        np.testing.assert_allclose(mixed.numpy(), DATA[f"asso_{case}_mixed_x2"], rtol=1e-9, atol=1e-12)


@KNOWN
def test_association_as_the_script_writes_it(case, metric, variant):
    compare_with_golden(script.association, case, metric, variant)


@KNOWN
def test_equations_of_the_association(case, metric, variant):
    """(1) to (4) on the first pair, as far as the files hold their values."""
    a, v = (x.detach()[0].flatten(1).T for x in inputs(metric, variant))
    if alpha_of(case):
        mixed = script.aggregate(v, alpha_of(case), metric)
        if f"asso_{case}_mixed_x2" in DATA:
            close(mixed.T, DATA[f"asso_{case}_mixed_x2"][0].reshape(mixed.T.shape))
        if f"asso_{case}_agg_matrix_sample0" in DATA:
            attention = torch.from_numpy(DATA[f"asso_{case}_agg_matrix_sample0"])
            close(mixed, ((1 - alpha_of(case)) * v + alpha_of(case) * attention @ v).numpy())
        v = mixed
    raw = {"12": script.similarity(a, v, metric), "21": script.similarity(v, a, metric)}
    score = {way: script.contrast(s).softmax(1) for way, s in raw.items()}
    for way in raw:
        for kind, ours in (("raw", raw[way]), ("score", score[way])):
            if f"asso_{case}_{kind}_{way}_sample0" in DATA:
                close(ours, DATA[f"asso_{case}_{kind}_{way}_sample0"])
    j, back = score["12"].argmax(1), score["21"].argmax(1)
    assert np.array_equal(back.numpy(), DATA[f"asso_{case}_reassociate_index"][0])
    end = score["12"].gather(1, j[:, None])[:, 0] * score["21"][j].gather(1, back[j][:, None])[:, 0]
    close(end, DATA[f"asso_{case}_similarity"][0].ravel())


@pytest.mark.parametrize("loss_asso", [ops.cycle_association_loss, script.association], ids=["fused", "direct"])
@pytest.mark.parametrize("case, metric, variant", association_cases(NOTHING))
def test_nothing_consistent(case, metric, variant, loss_asso, backend):
    x1, x2 = inputs(metric, variant)
    gt = labels(f"asso_{case}_gt1")
    assert (gt != IGNORE).sum() == ASSOCIATION["cases"][case]["labelled_pixels_left"]
    got = loss_asso(x1, x2, gt, metric=metric, alpha=alpha_of(case), ignore_index=IGNORE)
    got.loss.backward()
    assert got.loss.item() == ASSOCIATION["cases"][case]["association"] == 0 and got.kept.item() == 0
    assert not x1.grad.any() and not x2.grad.any()


# --- other losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("match", cases(r"thres_([\d.]+)", INFO["lsr"]), ids=lambda match: match.string)
def test_lsr(match):
    threshold = float(match[1])
    logits = scaled(DATA, "lsr_logits").requires_grad_()
    loss = script.loss_lsr(logits, threshold)
    assert loss.item() == pytest.approx(INFO["lsr"][match.string], rel=1e-9)
    loss.backward()
    gradient, = (m.string for m in cases(r"lsr_grad_thres_([\d.]+)", DATA.files) if float(m[1]) == threshold)
    close(logits.grad, DATA[gradient])


def test_lovasz():
    logits = scaled(DATA, "lovasz_logits").requires_grad_()
    prob = logits.softmax(1)
    prob.retain_grad()
    loss = script.loss_lovasz(prob, labels("lovasz_labels"), IGNORE)
    assert loss.item() == pytest.approx(INFO["lovasz"][f"present_ignore{IGNORE}"], rel=1e-9)
    loss.backward()
    close(prob.grad, DATA["lovasz_grad_probabilities"])
    close(logits.grad, DATA["lovasz_grad_logits"])


def test_lovasz_with_few_labels():
    """The release fails with one labelled pixel and returns an empty tensor with none."""
    prob = scaled(DATA, "lovasz_logits").softmax(1).requires_grad_()
    label = torch.full_like(labels("lovasz_labels"), IGNORE)
    loss = script.loss_lovasz(prob, label, IGNORE)
    loss.backward()
    assert loss == 0 and not prob.grad.any()
    for c in range(prob.shape[1]):
        label[-1, 0, 1] = c
        assert script.loss_lovasz(prob, label, IGNORE).item() == pytest.approx(1 - prob[-1, c, 0, 1].item(), rel=1e-12)


# --- network and scores -----------------------------------------------------------------------------------------------

NETWORK = INFO["network"]


@pytest.fixture(scope="module")
def weights(freed_memory_is_kept):
    found = fill(NETWORK["keys"], NETWORK["seed"], checksums=NETWORK["weight_checksums"])
    yield found
    found.clear()


def network(weights) -> torch.nn.Module:
    found = checkpoint.recognise(weights)
    with torch.device("meta"):
        net = build(found["model"], NETWORK["num_classes"], found["arch"])
    return with_weights(net, weights)


@pytest.fixture(scope="module")
def net(weights):
    """In eval mode, to be read only."""
    return network(weights).eval()


def test_network(net):
    assert [[key, list(value.shape)] for key, value in net.state_dict().items()] == NETWORK["keys"]
    assert [key for key, p in net.named_parameters() if not p.requires_grad] == NETWORK["requires_grad_false"]
    x = torch.from_numpy(DATA["net_input"]).double()
    with torch.no_grad():
        _, layer3, layer4 = net.backbone.stages(x)
        features, logits = net(x, return_features=True)
    for name, value in (("out", logits), ("feat", layer4), ("aux_feat", layer3)):
        golden, part = every(DATA, f"net_eval_{name}")
        close(value[part], DATA[golden])
    assert torch.equal(features, layer4)


@pytest.fixture(scope="module")
def alpha_at_test(net) -> float:
    """The share of aggregation at test time: the files give the one of the loss and of training, the README 0.5."""
    golden, x = DATA["test_aggregated_scores"], torch.from_numpy(DATA["net_input"]).double()

    def error(alpha: float) -> float:
        with torch.no_grad():
            return np.abs(aggregated_probabilities(net, x, alpha).numpy() - golden).max()

    return min({0.5, ASSOCIATION["spagg_alpha"], INFO["training"]["settings"]["spagg_alpha"]}, key=error)


@pytest.mark.parametrize("kind", [match[1] for match in cases(r"test_(aggregated|plain)_scores", DATA.files)])
def test_scores(net, kind, backend, alpha_at_test):
    x, gt, classes = torch.from_numpy(DATA["net_input"]).double(), DATA["test_gt"], NETWORK["num_classes"]
    aggregated = kind == "aggregated"
    with torch.no_grad():
        close(aggregated_probabilities(net, x, alpha_at_test) if aggregated else net(x), DATA[f"test_{kind}_scores"])
    confusion = np.zeros((classes, classes), np.int64)
    for image, truth, want in zip(x, gt, DATA[f"test_{kind}_prediction"], strict=True):
        label = predict(net, [image], truth.shape[::-1], CPU, align_corners=False,
                                aggregate=alpha_at_test if aggregated else 0.0)
        assert np.array_equal(label.numpy(), want)
        confusion += confusion_matrix(truth, label.numpy(), classes, IGNORE)
    assert np.array_equal(confusion, DATA[f"test_{kind}_confusion"])


# --- training ---------------------------------------------------------------------------------------------------------

# golden name: ours
TERMS = {"cross_entropy_alone": "loss_ce", "lovasz_alone": "loss_lovasz", "association": "loss_asso_feat",
         "association_cls": "loss_asso_cls", "lsr_S": "loss_lsr_s", "lsr_T": "loss_lsr_t"}


def accumulate(net, x_s, y_s, x_t, settings) -> tuple[float, dict[str, torch.Tensor]]:
    """One pass of the script: gradients into the network; (the total, its terms).

    The Lovasz weight counts as often as there are passes, as in the release.
    """
    weights = script.Weights(settings["lov_w"] * settings["iter_size"], settings["asso_w"], settings["lsr_w"],
                             settings["lsr_thres"], settings["spagg_alpha"] if settings["apply_spagg"] else 0.0)
    total, values = script.objective(net, x_s, y_s, x_t, weights, CPU)
    (total / settings["iter_size"]).backward()
    return total.item(), values


def test_training(weights):
    """With the kernels where they are compiled; that both implementations agree is asserted above."""
    training = INFO["training"]
    settings = training["settings"]
    net, batch = network(weights).train(), settings["batch"]
    optimizer = deeplab_sgd(net, "once", settings["base_lr"], settings["momentum"], settings["weight_decay"],
                            settings["lr_mult_classifier"])
    first = 0  # image of the next pass
    for i, iteration in enumerate(training["iterations"]):
        set_poly_lr(optimizer, settings["base_lr"], i, settings["poly_max_epochs"] * settings["iters_per_epoch"],
                    settings["power"])
        rates = [group["lr"] for group in optimizer.param_groups]
        assert sorted({*rates}) == pytest.approx(sorted({*iteration["learning_rates"]}), rel=1e-12)
        optimizer.zero_grad()
        for s, expected in enumerate(iteration["sub_iterations"]):
            part = slice(first, first + batch)
            first += batch
            x_s, x_t = (torch.from_numpy(DATA[f"train_{domain}_images"][part]).double() for domain in ("src", "tgt"))
            total, values = accumulate(net, x_s, labels("train_src_labels")[part], x_t, settings)
            assert total == pytest.approx(expected["total"], rel=1e-9)
            for theirs, ours in TERMS.items():
                assert values[ours].item() == pytest.approx(expected[theirs], rel=1e-9), (i, s, ours)
        optimizer.step()
    after = net.state_dict()
    for name, expected in training["after"].items():
        got = after[name]
        assert got.sum().item() == pytest.approx(expected["sum"], rel=1e-9, abs=1e-9 * got.abs().sum().item()), name
        assert got.norm().item() == pytest.approx(expected["l2"], rel=1e-9), name
        assert (got - weights[name]).norm().item() == pytest.approx(expected["delta_l2"], rel=1e-9), name
    assert {int(v) for k, v in after.items() if k.endswith("num_batches_tracked")} == {training["num_batches_tracked"]}

"""The released code's results (reference/cbst.*): selection with both implementations, losses, network, schedules.

Which settings, classes and cases there are is what the files say.
"""
import json
import re

import numpy as np
import pytest
import torch
from conftest import cases, fill, load_reference, scaled, skipped

import train_cbst as script
from lib import checkpoint, ops
from lib.datasets.description import load_description
from lib.datasets.labels import label_table, written_values
from lib.models.deeplab import build
from lib.optim import deeplab_sgd
from lib.runtime import Run

INFO, DATA = load_reference("cbst")
CLASSES = INFO["num_classes"]
DEFAULTS = INFO["defaults"]
P = torch.from_numpy(DATA["probabilities"]).permute(0, 3, 1, 2).contiguous()  # [N, C, H, W]
IGNORE = 255


def select(portion, extra_zeros=None, pooled=False, **options):
    """Both passes over all images; extra_zeros: confidences 0 that the original puts into each class's list."""
    hist, fine = ops.new_histogram(CLASSES), ops.new_histogram(CLASSES, fine=True)
    label, _ = ops.confidence_histogram_(hist, P, probabilities=True, **options)
    if extra_zeros is not None:
        hist[:, 0] += extra_zeros
    bins = ops.select_threshold(hist, portion, pooled=pooled).bins
    ops.refine_histogram_(fine, bins, P, probabilities=True, **options)
    if extra_zeros is not None:
        fine[:, 0] += extra_zeros * (bins == 0)
    return label, hist, ops.select_threshold(hist, portion, fine=fine, pooled=pooled)


def counts(hist: torch.Tensor) -> torch.Tensor:
    """Confidences collected for each class."""
    return hist[:, :-1].sum(1)


def settings(case: str) -> tuple[int, float]:
    """(ds_rate, portion) of KCVALUE_dsRATE_portPORTION."""
    ds_rate, portion = re.fullmatch(r".+_ds(\d+)_port([\d.]+)", case).groups()
    return int(ds_rate), float(portion)


def selections(value: str) -> list:
    return [match[1] for match in cases(rf"({value}_ds\d+_port[\d.]+)__cls_thresh", DATA.files)]


def other_selections() -> list:
    return [skipped(match[1], "neither by confidence (conf) nor by own probability (prob)") for match in
            cases(r"((?!conf_|prob_).+_ds\d+_port[\d.]+)__cls_thresh", DATA.files)]


@pytest.mark.parametrize("case", [*selections("conf"), *other_selections()])
def test_selection_by_confidence(backend, case):
    ds_rate, portion = settings(case)
    label, hist, found = select(portion, ds_rate=ds_rate)
    assert np.array_equal(label, DATA["prediction_trainid"])
    assert ops.predicted_pixels(hist).tolist() == INFO["predicted_pixels_per_class"]
    if f"collected_counts_per_class_ds{ds_rate}" in INFO:
        assert counts(hist).tolist() == INFO[f"collected_counts_per_class_ds{ds_rate}"]
    assert np.array_equal(found.value.numpy().view(np.int32), DATA[f"{case}__cls_thresh"].view(np.int32))
    assert np.array_equal(found.selected, DATA[f"{case}__cls_sel_size"])
    trainid = ops.pseudo_label(P, found.value, probabilities=True)
    assert np.array_equal(trainid, DATA[f"{case}__cbst_trainid"])


@pytest.mark.parametrize("match", cases(r"confidences_class(\d+)_ds(\d+)", DATA.files), ids=lambda match: match.string)
def test_confidences_of_a_class(backend, match):
    """Their number, and the threshold of every portion of the files."""
    c, ds_rate = map(int, match.groups())
    values = np.sort(DATA[match.string])[::-1]
    for portion in {settings(case)[1] for case in selections("conf")}:
        _, hist, found = select(portion, ds_rate=ds_rate)
        assert counts(hist)[c] == len(values)
        k = int(len(values) * portion)
        assert found.value[c] == (values[k - 1] if k else 1)


@pytest.mark.parametrize("case", selections("prob"))
def test_selection_by_own_probability(backend, case):
    """The release leaves these thresholds at 1; ours are what the option describes: only its labels for 1 compare."""
    ds_rate, portion = settings(case)
    released = torch.from_numpy(DATA[f"{case}__cls_thresh"])
    assert np.array_equal(ops.pseudo_label(P, released, probabilities=True), DATA[f"{case}__cbst_trainid"])
    found = select(portion, ds_rate=ds_rate, value="prob")[2].value
    for c in range(CLASSES):
        values = np.concatenate([image[c].flatten()[::ds_rate] for image in P.numpy()])
        k = int(np.floor(len(values) * portion))
        expected = np.sort(values)[::-1][k - 1] if k else 0
        assert found[c] == (expected if expected > 0 else 1)


def original_ds_rate(label: torch.Tensor, listed: int) -> int:
    """The files tell how many confidences the original lists (a 0 a class and another among them), no rate."""
    pixels = torch.stack([image.flatten().long().bincount(minlength=CLASSES) for image in label])
    return next(rate for rate in range(1, int(pixels.max()) + 1)
                if ((pixels + rate - 1) // rate).sum() + CLASSES + 1 == listed)


@pytest.mark.parametrize("match", cases(r"original_cbst_prior(\d+)_(cb|global)_port([\d.]+)__thresh", DATA.files),
                         ids=lambda match: match.string.removesuffix("__thresh"))
def test_selection_of_the_original_with_a_spatial_prior(backend, match):
    with_prior, policy, portion = match.groups()
    scalars = INFO["original_cbst"][f"prior{with_prior}"][policy][f"port{portion}"]
    prior = torch.from_numpy(DATA["original_cbst_prior_array"]).float() / 64 if int(with_prior) else None
    zeros = torch.ones(CLASSES, dtype=torch.int64)
    if policy == "global":
        zeros[0] = 2  # the pooled list starts with a further 0
    predicted = DATA[f"original_cbst_prior{with_prior}_prediction"]
    ds_rate = original_ds_rate(torch.from_numpy(predicted), scalars["pooled_length"])
    label, hist, found = select(float(portion), zeros, policy == "global", ds_rate=ds_rate, prior=prior)
    assert np.array_equal(label, predicted)
    listed = counts(hist)
    if policy == "global":
        assert listed.sum() == scalars["pooled_length"]
    else:
        assert listed.masked_fill(listed == 1, 0).tolist() == scalars["cls_size"]  # an absent class is listed as 0
    thresholds = DATA[match.string]
    assert np.array_equal(found.value, np.where(thresholds == 0, 1, thresholds))  # as the original does before dividing
    assert np.array_equal(ops.pseudo_label(P, found.value, prior=prior, probabilities=True),
                          DATA[match.string.removesuffix("thresh") + "trainid"])


@pytest.mark.parametrize("case", selections("conf"))
def test_rare_classes(backend, case):
    """Rarest first; classes with the same number of pixels may stand in any order."""
    ds_rate, portion = settings(case)
    pixels = ops.predicted_pixels(select(portion, ds_rate=ds_rate)[1])
    rare, mine = script.rare_classes(pixels, DEFAULTS["rare_cls_num"], DEFAULTS["mine_port"])
    golden = DATA[f"{case}__rare_id"].tolist()
    assert len(set(rare)) == len(golden) and sorted(pixels[rare].tolist()) == sorted(pixels[golden].tolist())
    golden = DATA[f"{case}__mine_id"].tolist()
    assert set(mine) == set(golden) and pixels[mine].tolist() == pixels[golden].tolist()


@pytest.fixture(scope="module")
def labels_of_the_release(tmp_path_factory):
    """Its label ids as a data set."""
    written, read = INFO["trainid_to_labelid"], INFO["labelid_to_trainid"]
    ids = [sorted((v for v in range(256) if read[v] == c), key=lambda v, c=c: v != written[c]) for c in range(CLASSES)]
    path = tmp_path_factory.mktemp("labels") / "released.json"
    path.write_text(json.dumps({
        "name": "released", "root": ".", "images": "images/{n}.png", "labels": "labels/{n}.png",
        "sets": {"train": "all", "val": "all"}, "size": list(P.shape[:1:-1]), "encoding": "ids",
        "classes": [{"name": f"class {c}", "color": [0, 0, c], "ids": ids[c]} for c in range(CLASSES)],
        "void": sorted({*range(256)}.difference(*ids)), "ignore": IGNORE}))
    return load_description(path)


@pytest.mark.parametrize("case", selections("conf"))
def test_label_ids(labels_of_the_release, case):
    d = labels_of_the_release
    assert label_table(d, d.classes).tolist() == INFO["labelid_to_trainid"]
    ids, unlabelled = written_values(d)
    assert ids == INFO["trainid_to_labelid"]
    table = np.full(256, unlabelled, np.uint8)
    table[:CLASSES] = ids
    if f"{case}__cbst_labelid" in DATA:
        assert np.array_equal(table[DATA[f"{case}__cbst_trainid"]], DATA[f"{case}__cbst_labelid"])


@pytest.mark.parametrize("match", cases(r"(conf_ds\d+_port[\d.]+)__lrent([\d.]+)_trainid", DATA.files),
                         ids=lambda match: match.string.removesuffix("_trainid"))
def test_soft_labels(match):
    """The stored ones are float32 arithmetic; the selection compares where 1 and Z can be told apart in that."""
    case, alpha = match.groups()
    thresholds = torch.from_numpy(DATA[f"{case}__cls_thresh"]).double()
    p = P.double().transpose(0, 1)  # [C, N, H, W]
    y, selected = script.soft_label(p, thresholds, float(alpha))
    ratio = p / thresholds[:, None, None, None]
    z = (ratio ** (1 / float(alpha))).sum(0)
    clear = (z.log().abs() >= 1e-5).numpy()
    label = ratio.argmax(0).where(selected, IGNORE).numpy()
    golden = DATA[match.string]
    assert np.array_equal(label[clear], golden[clear])
    check = INFO["lrent_closed_form_check"].get(f"{case}_alpha{alpha}")
    if check is not None:
        assert (~clear).sum() == check["pixels_with_abs_log_Z_below_1e-5"]
        assert (label != golden).sum() <= check["pixels_that_differ"]
    torch.testing.assert_close(y, ratio ** (1 / float(alpha)) / z, rtol=1e-9, atol=0)
    if f"{case}__lrent{alpha}_soft" in DATA:
        golden = DATA[f"{case}__lrent{alpha}_soft"]  # float32 [images, H, W, C], of the first images
        ours = y[:, :len(golden)].permute(1, 2, 3, 0).numpy()
        np.testing.assert_allclose(ours, golden, rtol=2e-6, atol=np.finfo(np.float32).tiny)


# --- schedules --------------------------------------------------------------------------------------------------------


def test_portions_of_the_rounds():
    flags = {"epochs_per_round": "--epr", "randseed": "--random-seed"}  # the others have the flags' names
    given = [word for name, value in DEFAULTS.items()
             for word in (flags.get(name, f"--{name.replace('_', '-')}"), str(value))]
    args = script.parse_args(["--restore-from", "x", *given])
    golden = INFO["schedules"]["crst_tgt_src_portion_per_round"]
    assert golden == [[script.portion(args.init_tgt_port, args.tgt_port_step, args.max_tgt_port, r),
                       script.portion(args.init_src_port, args.src_port_step, args.max_src_port, r)]
                      for r in range(len(golden))]


@pytest.mark.parametrize("policy", [policy if policy in ("r", "c") else skipped(policy, "no such sampling policy")
                                    for policy, rounds in INFO["source_sample"].items() if isinstance(rounds, list)])
def test_source_sample(policy):
    """Policy r takes another seed each round, c the same."""
    images = int(re.search(r"choice\((\d+)", INFO["source_sample"]["note"])[1])
    for r, golden in enumerate(INFO["source_sample"][policy]):
        seed = golden["seed"] - (r + 1 if policy == "r" else 0)
        ours = script.source_sample(images, golden["portion"], seed, r, policy)
        assert ours == golden["indices"] and len(ours) == golden["count"]


# --- losses -----------------------------------------------------------------------------------------------------------


class Same(torch.nn.Module):
    """A network whose output is its parameter."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, x):
        return self.logits


def gradients(net, label, on_target, mr_weight_kld: float) -> dict[str, torch.Tensor]:
    """One pass of the script: gradients into the network; the losses."""
    return script.step(net, torch.zeros(len(label), 3, *label.shape[-2:]), label, on_target,
                                         mr_weight_kld=mr_weight_kld, run=Run(torch.device("cpu"), 0, 1, "off"))


def reg_labels(kind: str) -> torch.Tensor:
    return torch.from_numpy(DATA["reg_labels"]).long() if kind == "hard" else \
        torch.from_numpy(DATA["reg_soft_labels"]).double()


def loss_cases() -> list:
    """(kind, case) of the regularised losses; where nothing is labelled the release gives "nan", see below."""
    found = []
    for kind, values in INFO["reg_loss"].items():
        for case, golden in values.items():
            if golden == "nan":
                continue
            known = kind in ("hard", "soft") and {"reg_weights", "mr_weight_kld", "value"} <= golden.keys()
            marks = [] if known else [pytest.mark.skip(reason=f"{kind} {case}: a loss of another kind")]
            found.append(pytest.param(kind, case, marks=marks, id=f"{kind}-{case}"))
    return found


@pytest.mark.parametrize("kind, case", loss_cases())
def test_losses_and_their_gradients(kind, case):
    golden = INFO["reg_loss"][kind][case]
    net, label = Same(scaled(DATA, "reg_logits")), reg_labels(kind)
    weight = torch.tensor(golden["reg_weights"], dtype=torch.float64)
    log_p = torch.log_softmax(net.logits, 1)
    pixels = script.labelled_pixels(label)
    regularised = (pixels * (weight != 0)[:, None, None]).sum()
    value = script.loss_seg(log_p, label, pixels.sum()) \
        + golden["mr_weight_kld"] * script.loss_kld(log_p, label, weight, regularised)
    value.backward()
    assert value.item() == pytest.approx(golden["value"], rel=1e-9, abs=0)
    gradient = DATA[f"reg_{kind}_{case}_grad"]
    assert np.abs(net.logits.grad.numpy() - gradient).max() <= 1e-9 * np.abs(gradient).max()
    if {*golden["reg_weights"]} <= {0, 1}:  # what a training step does: the weight acts once
        net.zero_grad()
        losses = gradients(net, label, weight, golden["mr_weight_kld"])
        total = losses["loss_seg"] + golden["mr_weight_kld"] * losses.get("loss_kld", 0.0)
        assert total.item() == pytest.approx(golden["value"], rel=1e-9, abs=0)
        assert np.abs(net.logits.grad.numpy() - gradient).max() <= 1e-9 * np.abs(gradient).max()


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_batch_without_labels(kind):
    """The release gives nan; ours 0 and no gradient."""
    net, label = Same(scaled(DATA, "reg_logits")), reg_labels(kind)
    label = torch.full_like(label, IGNORE if kind == "hard" else 0)
    losses = gradients(net, label, torch.ones(len(label)), 0.1)
    assert losses["loss_seg"] == losses["loss_kld"] == 0 and not net.logits.grad.any()


# --- network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)], ids=["float64", "float32"])
def test_network_and_its_optimiser(dtype, tolerance):
    golden = INFO["network"]
    weights = fill(golden["keys"], golden["seed"], checksums=golden["weight_checksums"])
    found = checkpoint.recognise(weights)
    net = build(found["model"], golden["num_classes"], found["arch"], aspp="full").to(dtype).eval()
    assert [[key, list(value.shape)] for key, value in net.state_dict().items()] == golden["keys"]
    net.load_state_dict(weights)
    with torch.no_grad():
        out = net(torch.from_numpy(DATA["net_input"]).to(dtype)).double().numpy()
    assert np.abs(out - DATA["net_eval_out"]).max() <= tolerance * np.abs(DATA["net_eval_out"]).max()
    names = {id(p): name for name, p in net.named_parameters()}
    groups = deeplab_sgd(net, "released", DEFAULTS["learning_rate"], DEFAULTS["momentum"],
                         DEFAULTS["weight_decay"]).param_groups
    for number, multiple in (("0", 1), ("1", 10)):
        assert golden[f"group{number}_multiplicity"] == {
            names[id(p)]: group["repeats"] for group in groups if group["lr_mult"] == multiple for p in group["params"]}

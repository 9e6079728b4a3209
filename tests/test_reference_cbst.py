"""The released code's results (reference/cbst.*): selection with both implementations, losses, network, schedules."""
import conftest
import numpy as np
import pytest
import torch

import train_cbst as script
from lib import ops
from lib.datasets.description import load_description
from lib.datasets.labels import written_values
from lib.models.deeplab import Deeplab
from lib.ops.pseudo_label import _probabilities
from lib.runtime import Run

INFO, DATA = conftest.load_reference("cbst")
P = torch.from_numpy(DATA["probabilities"]).permute(0, 3, 1, 2).contiguous()  # [4, 19, 40, 64]
CASES = [(ds_rate, portion) for ds_rate in (4, 1) for portion in (0.2, 0.5)]


def select(portion, extra_zeros=None, pooled=False, **options):
    """Both passes over all images; extra_zeros: confidences 0 that the original puts into each class's list."""
    hist, fine = ops.new_histogram(19), ops.new_histogram(19, fine=True)
    label, _ = ops.confidence_histogram_(hist, P, probabilities=True, **options)
    if extra_zeros is not None:
        hist[:, 0] += extra_zeros
    bins = ops.select_threshold(hist, portion, pooled=pooled).bins
    ops.refine_histogram_(fine, bins, P, probabilities=True, **options)
    if extra_zeros is not None:
        fine[:, 0] += extra_zeros * (bins == 0)
    return label, hist, ops.select_threshold(hist, portion, fine=fine, pooled=pooled)


@pytest.mark.parametrize("ds_rate,portion", CASES)
def test_selection_by_confidence(backend, ds_rate, portion):
    case = f"conf_ds{ds_rate}_port{portion}__"
    label, hist, found = select(portion, ds_rate=ds_rate)
    assert np.array_equal(label, DATA["prediction_trainid"])
    assert ops.predicted_pixels(hist).tolist() == INFO["predicted_pixels_per_class"]
    if ds_rate == 4:
        assert hist[:, :-1].sum(1).tolist() == INFO["collected_counts_per_class_ds4"]
    assert np.array_equal(found.value.numpy().view(np.int32), DATA[case + "cls_thresh"].view(np.int32))
    assert np.array_equal(found.selected, DATA[case + "cls_sel_size"])

    pixels = ops.predicted_pixels(hist)
    order = pixels.argsort(stable=True)
    assert sorted(order[:3].tolist()) == sorted(DATA[case + "rare_id"].tolist())
    share = pixels.double() / pixels.sum()
    assert order[share[order] < INFO["defaults"]["mine_port"]].tolist() == DATA[case + "mine_id"].tolist()

    trainid = ops.pseudo_label(P, found.value, probabilities=True)
    assert np.array_equal(trainid, DATA[case + "cbst_trainid"])


@pytest.mark.parametrize("ds_rate,portion", CASES)
def test_selection_by_own_probability(backend, ds_rate, portion):
    """The release leaves these thresholds at 1; ours are what the option describes: only its labels for 1 compare."""
    released = torch.from_numpy(DATA[f"prob_ds{ds_rate}_port{portion}__cls_thresh"])
    assert np.array_equal(ops.pseudo_label(P, released, probabilities=True),
                          DATA[f"prob_ds{ds_rate}_port{portion}__cbst_trainid"])
    found = select(portion, ds_rate=ds_rate, value="prob")[2].value
    for c in range(19):
        values = np.concatenate([image[c].flatten()[::ds_rate] for image in P.numpy()])
        expected = np.sort(values)[::-1][int(np.floor(len(values) * portion)) - 1]
        assert found[c] == (expected if expected > 0 else 1)


@pytest.mark.parametrize("portion", [0.2, 0.5])
@pytest.mark.parametrize("policy", ["cb", "global"])
@pytest.mark.parametrize("with_prior", [0, 1])
def test_selection_of_the_original_with_a_spatial_prior(backend, with_prior, policy, portion):
    case = f"original_cbst_prior{with_prior}_"
    prior = torch.from_numpy(DATA["original_cbst_prior_array"]).float() / 64 if with_prior else None
    zeros = torch.ones(19, dtype=torch.int64)
    if policy == "global":
        zeros[0] = 2  # the pooled list starts with a further 0
    label, hist, found = select(portion, zeros, policy == "global", ds_rate=4, prior=prior)
    assert np.array_equal(label, DATA[case + "prediction"])
    counts = hist[:, :-1].sum(1)
    scalars = INFO["original_cbst"][f"prior{with_prior}"][policy][f"port{portion}"]
    if policy == "global":
        assert counts.sum() == scalars["pooled_length"]
    else:
        assert counts.masked_fill(counts == 1, 0).tolist() == scalars["cls_size"]  # an absent class is listed as 0
    thresholds = DATA[case + f"{policy}_port{portion}__thresh"]
    assert np.array_equal(found.value, np.where(thresholds == 0, 1, thresholds))  # as the original does before dividing
    assert np.array_equal(ops.pseudo_label(P, found.value, prior=prior, probabilities=True),
                          DATA[case + f"{policy}_port{portion}__trainid"])


@pytest.mark.parametrize("ds_rate,portion", CASES)
def test_rare_classes_and_label_ids(backend, ds_rate, portion):
    case = f"conf_ds{ds_rate}_port{portion}__"
    _, hist, found = select(portion, ds_rate=ds_rate)
    settings = INFO["defaults"]
    rare, mine = script.rare_classes(ops.predicted_pixels(hist), settings["rare_cls_num"], settings["mine_port"])
    assert sorted(rare) == sorted(DATA[case + "rare_id"].tolist()) and mine == DATA[case + "mine_id"].tolist()
    ids, unlabelled = written_values(load_description("cityscapes"))
    assert ids == INFO["trainid_to_labelid"] and unlabelled == 0
    to_ids = np.array([*ids, *[unlabelled] * (256 - len(ids))], np.uint8)
    label = ops.pseudo_label(P, found.value, probabilities=True)
    golden = DATA[case + "cbst_labelid"] if case + "cbst_labelid" in DATA else to_ids[DATA[case + "cbst_trainid"]]
    assert np.array_equal(to_ids[label.numpy()], golden)


@pytest.mark.parametrize("ds_rate,portion", CASES)
def test_soft_labels(ds_rate, portion):
    """The stored ones are float32 arithmetic; the selection compares where 1 and Z can be told apart in that."""
    case = f"conf_ds{ds_rate}_port{portion}__"
    thresholds = torch.from_numpy(DATA[case + "cls_thresh"]).double()
    everything = P.double().permute(1, 0, 2, 3)  # [C, N, H, W]
    y, selected = script.soft_label(everything, thresholds, 0.25)
    log_z = ((everything / thresholds[:, None, None, None]) ** 4).sum(0).log()
    clear = (log_z.abs() >= 1e-5).numpy()
    label = (everything / thresholds[:, None, None, None]).argmax(0).where(selected, 255).numpy()
    golden = DATA[case + "lrent0.25_trainid"]
    assert np.array_equal(label[clear], golden[clear]) and clear.mean() > 0.9
    assert (label != golden).sum() <= INFO["lrent_closed_form_check"][case[:-2] + "_alpha0.25"]["pixels_that_differ"]
    if case + "lrent0.25_soft" in DATA:
        golden = DATA[case + "lrent0.25_soft"]  # float32 [2, H, W, C]
        formula = {}
        for dtype in (np.float32, np.float64):
            power = (DATA["probabilities"][:2].astype(dtype) / thresholds.numpy().astype(dtype)) ** 4.0
            formula[dtype] = power / power.sum(-1, keepdims=True)
        assert np.array_equal(formula[np.float32], golden)  # to the last bit, in NumPy's order of operations
        ours = y[:, :2].permute(1, 2, 3, 0).numpy()
        np.testing.assert_allclose(ours, formula[np.float64], rtol=1e-9, atol=0)


def test_schedules_and_source_sample():
    settings = INFO["defaults"]
    args = script.parse_args(["--restore-from", "x"])
    released = {"epochs_per_round": "epr", "randseed": "random_seed"}  # the others have the flags' names
    for name, value in settings.items():
        assert getattr(args, released.get(name, name)) == value, name
    portions = [[script.portion(args.init_tgt_port, args.tgt_port_step, args.max_tgt_port, r),
                 script.portion(args.init_src_port, args.src_port_step, args.max_src_port, r)]
                for r in range(len(INFO["schedules"]["crst_tgt_src_portion_per_round"]))]
    assert portions == INFO["schedules"]["crst_tgt_src_portion_per_round"]
    for policy in "rc":
        for r, golden in enumerate(INFO["source_sample"][policy]):
            ours = script.source_sample(200, golden["portion"], settings["randseed"], r, policy)
            assert ours == golden["indices"] and len(ours) == golden["count"]


class Same(torch.nn.Module):
    """A network whose output is its parameter."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, x):
        return self.logits


@pytest.mark.parametrize("case", [c for c in INFO["reg_loss"]["hard"] if c != "all_ignored"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_losses_and_their_gradients(kind, case):
    golden = INFO["reg_loss"][kind][case]
    net = Same(torch.from_numpy(DATA["reg_logits_x64"]).double() / 64)
    label = torch.from_numpy(DATA["reg_labels"]).long() if kind == "hard" else \
        torch.from_numpy(DATA["reg_soft_labels"]).double()
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
    if case in ("weights_none", "kld0.1_unit_weights"):  # what a training step does: the weight acts once
        net.zero_grad()
        losses = script.self_training_backward(
            net, torch.zeros(3, 3, *label.shape[-2:]), label, weight, mr_weight_kld=golden["mr_weight_kld"],
            run=Run(torch.device("cpu"), 0, 1, "off"))
        total = losses["loss_seg"] + golden["mr_weight_kld"] * losses.get("loss_kld", 0.0)
        assert total.item() == pytest.approx(golden["value"], rel=1e-9, abs=0)
        assert np.abs(net.logits.grad.numpy() - gradient).max() <= 1e-9 * np.abs(gradient).max()


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_batch_without_labels(kind):
    """The release gives nan; ours 0 and no gradient."""
    assert INFO["reg_loss"]["hard"]["all_ignored"] == "nan"
    net = Same(torch.from_numpy(DATA["reg_logits_x64"]).double() / 64)
    label = torch.full((3, 5, 6), 255) if kind == "hard" else torch.zeros(3, 19, 5, 6, dtype=torch.float64)
    losses = script.self_training_backward(net, torch.zeros(3, 3, 5, 6), label, torch.ones(3), mr_weight_kld=0.1,
                                           run=Run(torch.device("cpu"), 0, 1, "off"))
    assert losses["loss_seg"] == losses["loss_kld"] == 0 and not net.logits.grad.any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_network_and_its_optimiser(dtype, tolerance):
    golden = INFO["network"]
    net = Deeplab(golden["num_classes"], aspp="full").to(dtype).eval()
    assert [[k, list(v.shape)] for k, v in net.state_dict().items()] == golden["keys"]
    net.load_state_dict(conftest.fill(golden["keys"], golden["seed"]))
    for key, (total, norm) in golden["weight_checksums"].items():
        value = net.state_dict()[key].double()
        assert (value.sum().item(), value.norm().item()) == pytest.approx((total, norm), rel=1e-5)
    with torch.no_grad():
        out = net(torch.from_numpy(DATA["net_input"]).to(dtype)).double().numpy()
    assert np.abs(out - DATA["net_eval_out"]).max() <= tolerance * np.abs(DATA["net_eval_out"]).max()
    names = {id(p): name for name, p in net.named_parameters()}
    groups = script.deeplab_sgd(net, "released", 5e-5, 0.9, 5e-4).param_groups
    for multiplicity, heads in ((golden["group0_multiplicity"], False), (golden["group1_multiplicity"], True)):
        assert multiplicity == {names[id(p)]: g["repeats"] for g in groups if (g["lr_mult"] == 10) == heads
                                for p in g["params"]}


def test_probabilities_at_some_pixels_are_those_of_the_operators():
    """What LRENT's training sees of an image, and what labelled it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 19, 9, 13, generator=generator)
    prior = torch.rand(19, 40, 64, generator=generator)
    expected = _probabilities(logits[0], logits[1], prior, (40, 64), True, False)
    rows, cols = np.array([0, 7, 8, 39]), np.arange(64)[::-3]
    ours = script.probabilities_at(logits, (40, 64), rows, cols, prior)
    torch.testing.assert_close(ours, expected[:, rows][:, :, cols.copy()], rtol=1e-5, atol=1e-7)
    once = script.probabilities_at(logits[:1], (40, 64), rows, cols)
    torch.testing.assert_close(once, _probabilities(logits[0], None, None, (40, 64), True, False)
                               [:, rows][:, :, cols.copy()], rtol=1e-5, atol=1e-7)

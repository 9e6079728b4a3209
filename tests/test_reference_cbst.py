"""Selection of pseudo-labels against the released code's results (reference/cbst.*), with both implementations."""
import conftest
import numpy as np
import pytest
import torch

from lib import ops

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

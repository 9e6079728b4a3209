"""The evaluators' golden numbers: CMC, both average precisions, re-ranking (reference/reid.*)."""
import functools
import re

import numpy as np
import pytest
import torch
from conftest import fill, load_reference

from lib import metrics_reid, ops
from lib.models.reid import IDNet, retrieval_features

TOLERANCE = dict(rtol=1e-12, atol=1e-12)


@functools.cache
def golden():
    return load_reference("reid")


def scaled(data, stem: str) -> torch.Tensor:
    """float64 of the integer array ``stem``_x<n>, which is to be divided by n."""
    for name in data.files:
        if match := re.fullmatch(re.escape(stem) + r"_x(\d+)", name):
            return torch.from_numpy(data[name] / float(match[1]))
    return torch.from_numpy(data[stem].astype(np.float64))


class Case:
    """Features and names of one case, and scores of them."""

    def __init__(self, stem: str):
        _, data = golden()
        self.query, self.gallery = scaled(data, f"{stem}_query"), scaled(data, f"{stem}_gallery")
        self.query_names, self.gallery_names = (data[f"{stem}_{part}_id_cam"].astype(np.int64).T
                                                for part in ("query", "gallery"))
        self.real = self.gallery_names[0] != metrics_reid.JUNK

    def scores(self, gallery=None, names=None, left_out=None, **settings) -> metrics_reid.Scores:
        """Of the gallery without junk, or of another one."""
        gallery = self.gallery[torch.from_numpy(self.real)] if gallery is None else gallery
        names = self.gallery_names[:, self.real] if names is None else names
        matches, own = metrics_reid.match_lists(*self.query_names, *names)
        return metrics_reid.scores(matches, ops.rank_counts(self.query, gallery, matches, left_out or own), **settings)


def case_list() -> list[str]:
    return list(golden()[0].get("evaluator", {}))


def per_query(values) -> list[float]:
    return [np.nan if v is None else v for v in values]


@pytest.mark.parametrize("name", case_list())
def test_distances(name):
    _, data = golden()
    case = Case(f"ev_{name}")
    want = data[f"ev_{name}_distance"]
    np.testing.assert_allclose(ops.distances(case.query, case.gallery), want, **TOLERANCE)
    i, j = (torch.from_numpy(x.ravel()) for x in np.indices(want.shape))
    pairs = ops.pair_distances(case.query, case.gallery, i, j)
    np.testing.assert_allclose(pairs.reshape(want.shape), want, **TOLERANCE)


@pytest.mark.parametrize("name", case_list())
def test_scores(name, backend):
    """ECN's and torchreid's scores, gallery order among equals, and with the gallery turned round."""
    info, case = golden()[0]["evaluator"][name], Case(f"ev_{name}")
    names = case.gallery_names[:, case.real]
    orders = {"order_stable": (None, None),
              "order_reversed": (case.gallery[torch.from_numpy(case.real)].flip(0), names[:, ::-1])}
    assert "order_stable" in info
    for order in orders.keys() & info.keys():
        want, got = info[order], case.scores(*orders[order], max_rank=len(info[order]["ecn_cmc_first_20"]))
        assert got.unmatched.tolist() == info["queries_without_any_match"]
        np.testing.assert_allclose(got.cmc, want["ecn_cmc_first_20"], **TOLERANCE)
        short = want["torchreid_cmc_first_20"]
        np.testing.assert_allclose(got.cmc[:len(short)], short, **TOLERANCE)
        np.testing.assert_allclose(got.trapezoid, per_query(want["ecn_AP_per_query"]), **TOLERANCE)
        np.testing.assert_allclose(got.precision, per_query(want["torchreid_AP_per_query"]), **TOLERANCE)
        assert got.mean_ap("trapezoid") == pytest.approx(want["ecn_mAP_trapezoid"], rel=1e-12)
        assert got.mean_ap("precision") == pytest.approx(want["torchreid_mAP"], rel=1e-12)


@pytest.mark.parametrize("name", case_list())
def test_matlab(name):
    """Item by item, and queries without a match count as 0."""
    info = golden()[0]["evaluator"][name].get("market1501_own_lines")
    if info is None:
        pytest.skip("no scores after the MATLAB evaluation")
    length = len(info["cmc_first_20_over_all_queries"])
    got = Case(f"ev_{name}").scores(ties="items", unmatched="zero", max_rank=length)
    np.testing.assert_allclose(got.trapezoid, info["AP_per_query"], **TOLERANCE)
    assert got.mean_ap() == pytest.approx(info["mAP_over_all_queries"], rel=1e-12)
    np.testing.assert_allclose(got.cmc, info["cmc_first_20_over_all_queries"], **TOLERANCE)


@pytest.mark.parametrize("name", case_list())
def test_junk_counts_where_it_is_not_dropped(name):
    """The trap: junk kept as if it were distractors."""
    info, case = golden()[0]["evaluator"][name], Case(f"ev_{name}")
    if "wrong_if_junk_is_kept" not in info:
        pytest.skip("no scores with junk")
    names = case.gallery_names.copy()
    names[0, ~case.real] = max(names[0].max(), case.query_names[0].max()) + 1
    got = case.scores(case.gallery, names)
    assert got.mean_ap() == pytest.approx(info["wrong_if_junk_is_kept"]["ecn_mAP_trapezoid"], rel=1e-12)
    assert got.cmc[0] == pytest.approx(info["wrong_if_junk_is_kept"]["rank1"], rel=1e-12)
    if not case.real.all():
        with pytest.raises(ValueError, match="junk"):
            case.scores(case.gallery, case.gallery_names)


@pytest.mark.parametrize("name", case_list())
def test_open_reid(name):
    info, case = golden()[0]["evaluator"][name], Case(f"ev_{name}")
    if "open_reid_cmc_first_20" not in info:
        pytest.skip("no scores of open-reid")
    curves = info["open_reid_cmc_first_20"]
    got = case.scores()
    assert got.mean_ap("precision") == pytest.approx(info["open_reid_mAP_with_this_sklearn"], rel=1e-12)
    np.testing.assert_allclose(got.cmc[:len(curves["market1501"])], curves["market1501"], **TOLERANCE)
    if "separate_camera_set" in curves:  # everything from the query's camera is left out, other people too
        pairs = np.nonzero(case.query_names[1][:, None] == case.gallery_names[1, case.real])
        got = case.scores(left_out=ops.Lists.from_pairs(*pairs, len(case.query)))
        np.testing.assert_allclose(got.cmc[:len(curves["separate_camera_set"])], curves["separate_camera_set"],
                                   **TOLERANCE)


def test_end_to_end():
    """From images to scores with the small network: the first images are queries, the others the gallery."""
    info, data = golden()
    if "evaluator_end_to_end" not in info:
        pytest.skip("no such numbers")
    want, name = info["evaluator_end_to_end"], "resnet18"
    if f"{name}, pool5" not in want["note"]:
        pytest.skip(f"another network: {want['note']}")
    about = info["networks"][name]
    net = IDNet(about["num_classes"], name, about["features"]).double().eval()
    net.load_state_dict(fill(about["keys"], info["seed"]))
    with torch.inference_mode():
        features = retrieval_features(net, scaled(data, "src_images"))
    queries = len(want["query_id"])
    query, gallery = features[:queries], features[queries:queries + len(want["gallery_id"])]
    np.testing.assert_allclose(ops.distances(query, gallery), data["end_to_end_distance"], rtol=0, atol=1e-10)
    matches, own = metrics_reid.match_lists(*(np.array(want[k]) for k in (
        "query_id", "query_cam", "gallery_id", "gallery_cam")))
    got = metrics_reid.scores(matches, ops.rank_counts(query, gallery, matches, own), max_rank=len(
        want["cmc_first_20"]))
    assert got.mean_ap() == pytest.approx(want["mAP_trapezoid"], rel=1e-12)
    np.testing.assert_allclose(got.cmc, want["cmc_first_20"], **TOLERANCE)


# ---- re-ranking ----------------------------------------------------------------------------------------------------

def rerank_cases() -> list[str]:
    return list(golden()[0].get("reranking", {}).get("cases", {}))


@pytest.mark.parametrize("release", ["", "torchreid_"])
@pytest.mark.parametrize("name", rerank_cases())
def test_reranking(name, release, backend):
    info, data = golden()
    settings = re.fullmatch(r"k1_(\d+)_k2_(\d+)_lambda_([\d.]+)", name)
    if settings is None or f"rr_{release}{name}" not in data.files:
        pytest.skip(f"{release}{name}: no settings in the name, or no such array")
    want, scores, case = data[f"rr_{release}{name}"], info["reranking"]["cases"][name], Case("rr")
    blocks = metrics_reid.reranked(torch.cat([case.query, case.gallery]), len(case.query), k1=int(settings[1]),
                                   k2=int(settings[2]), lambda_=float(settings[3]), power=2 if release else 1, rows=5)
    got = torch.cat([block for _, block in blocks])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
    if scores["scores_from_distances_rounded_to_10_decimals_stable_order"]:
        got = torch.from_numpy(np.round(got.numpy(), 10))
    assert case.real.all(), "the released functions re-rank all of it"
    matches, own = metrics_reid.match_lists(*case.query_names, *case.gallery_names)
    curve = scores[f"{release}cmc_first_20"]
    got = metrics_reid.scores(matches, ops.row_rank_counts(got, matches, own), max_rank=len(curve))
    assert got.mean_ap() == pytest.approx(scores[f"{release}mAP_trapezoid"], rel=1e-12)
    np.testing.assert_allclose(got.cmc, curve, **TOLERANCE)


def test_before_reranking():
    info = golden()[0]
    if "without" not in info.get("reranking", {}):
        pytest.skip("no such numbers")
    want, got = info["reranking"]["without"], Case("rr").scores()
    assert got.mean_ap() == pytest.approx(want["mAP_trapezoid"], rel=1e-12)
    np.testing.assert_allclose(got.cmc, want["cmc_first_20"], **TOLERANCE)

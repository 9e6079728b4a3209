"""Shares of the classes by height, and the warnings that follow from them."""
import json

import numpy as np
import pytest

from lib.layout import BANDS, Layout, falling_coverage, layout_warnings

CLASSES = ["sky", "road", "living"]


def layout(*labels: np.ndarray) -> Layout:
    found = Layout(len(CLASSES))
    for label in labels:
        found.add(label)
    return found


def street(living_rows: slice = slice(0, 0), living_columns: slice = slice(None)) -> np.ndarray:
    """Sky over road, with 'living' in a rectangle."""
    label = np.zeros((4 * BANDS, 100), np.uint8)
    label[2 * BANDS:] = 1
    label[living_rows, living_columns] = 2
    return label


SOURCE = layout(street(slice(28, 32), slice(0, 5)), street(slice(28, 32), slice(50, 60)))


def test_bands_and_shares():
    assert SOURCE.bands.shape == (BANDS, 3)
    assert SOURCE.bands.sum(1) == pytest.approx(np.ones(BANDS))
    assert SOURCE.bands[0] == pytest.approx([1, 0, 0])
    assert SOURCE.bands[BANDS - 1] == pytest.approx([0, 1, 0])
    assert SOURCE.shares[2] == pytest.approx((20 + 40) / (2 * 6400))


def test_bands_of_another_size_are_the_same():
    assert layout(street().repeat(3, 0)[:, :50]).bands == pytest.approx(layout(street()).bands)


def test_pixels_of_no_class_do_not_count():
    label = street()
    label[:BANDS] = 255
    assert layout(label).bands[0].tolist() == [0, 0, 0]
    assert layout(label).shares == pytest.approx([1 / 3, 2 / 3, 0])


def test_distance():
    assert layout(street()).distance(layout(street())) == 0
    assert layout(street()).distance(layout(1 - street())) == 1


def test_no_warning_where_the_target_is_laid_out_like_the_source():
    assert layout_warnings(SOURCE, layout(street(slice(28, 32), slice(0, 20))), CLASSES) == {}


def test_a_band_of_one_class_is_named():
    warnings = layout_warnings(SOURCE, layout(street(slice(40, 44))), CLASSES)
    assert warnings == {"living": "'living' fills 100 % of the target's pixels at 66 % of the height; in the source's "
                                  "labels at most 8 % at any height"}


def test_a_class_common_in_the_source_and_gone_is_named():
    warnings = layout_warnings(SOURCE, layout(np.ones((64, 100), np.uint8)), CLASSES)
    assert warnings["sky"] == "'sky' is predicted on 0 % of the target's pixels; it has 50 % of the source's"


@pytest.mark.parametrize(("last", "warned"), [(0.2, True), (0.35, False)])
def test_a_coverage_that_falls_by_more_than_half_is_named(tmp_path, last, warned):
    lines = [{"iteration": i, "loss": 1.0, "cover_cls": 0.6 if i < 5 else last} for i in range(10)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"iteration": 9}]))
    found = falling_coverage(tmp_path / "log.jsonl")
    assert found.keys() == ({"cover_cls"} if warned else set())
    if warned:
        assert "from 0.60 to 0.20" in found["cover_cls"]


def test_no_log_no_warning(tmp_path):
    assert falling_coverage(tmp_path / "log.jsonl") == {}

"""The released evaluation's numbers, to the last bit: through the functions, and through the script on PNG files."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, load_reference, reference_dir
from PIL import Image

from lib.errors import UserError
from lib.metrics import confusion_matrix, mean_iou, per_class_iou


@pytest.fixture(scope="module")
def golden():
    return load_reference("iou")


def train_ids(label: np.ndarray, info: dict) -> np.ndarray:
    """Class indices of a label-id map; values without an entry fall out of the released score, as ignore does."""
    table = np.full(256, 255)
    for value, index in info["label_to_train_mapping"]:
        if value >= 0:
            table[value] = index
    return table[label]


def equal_pairs(data) -> list[int]:
    """The pairs that the released evaluation counts: those of one size."""
    count = sum(key.startswith("gt_labelid_") for key in data.files)
    return [n for n in range(count) if data[f"gt_labelid_{n}"].shape == data[f"prediction_trainid_{n}"].shape]


def expected(info: dict, which: str) -> list[float]:
    return [float(v) for v in info[which]["iou_per_class"]]  # float("nan") too


def test_confusion_and_iou(golden):
    info, data = golden
    classes = len(info["class_names"])
    total, used = np.zeros((classes, classes), np.int64), equal_pairs(data)
    for n in used:
        confusion_matrix(train_ids(data[f"gt_labelid_{n}"], info), data[f"prediction_trainid_{n}"], classes, out=total)
    assert len(used) == info["released"]["pairs_used"]
    np.testing.assert_array_equal(total, data["confusion_rows_gt_columns_prediction"])
    np.testing.assert_array_equal(per_class_iou(total), expected(info, "released"))
    np.testing.assert_array_equal(per_class_iou(total), expected(info, "official"))
    assert mean_iou(total) == info["official"]["miou"]
    assert mean_iou(total) == pytest.approx(info["released"]["miou_nanmean"], rel=1e-15)  # it adds in NumPy's order
    assert np.count_nonzero(~np.isnan(per_class_iou(total))) == info["released"]["classes_counted"]


def test_prediction_255_is_refused(golden):
    """The released evaluation counts it in a wrong cell, or fails."""
    info, data = golden
    truth, guess = train_ids(data["gt_labelid_0"], info), data["prediction_trainid_0"].copy()
    guess[0, 0] = 255
    with pytest.raises(UserError, match="255"):
        confusion_matrix(truth, guess, len(info["class_names"]))


@pytest.fixture
def files(golden, tmp_path):
    """A description of the PNG files as a data set, and their folders; returns the script's arguments."""
    info, data = golden
    ids = info["labelid_of_trainid"]
    classes = [{"name": name, "color": [0, 0, c], "ids": [ids[c]]} for c, name in enumerate(info["class_names"])]
    (tmp_path / "iou.json").write_text(json.dumps({
        "name": "iou", "root": ".", "images": "images/pred_{n}.png", "labels": "labels/gt_{n}.png",
        "sets": {"train": "all", "val": "all"}, "size": [56, 40], "encoding": "ids", "classes": classes,
        "void": [v for v in range(256) if v not in ids]}))
    for folder, kind in (("labels", "gt"), ("pred", "pred")):
        (tmp_path / folder).mkdir()
        for n in equal_pairs(data):
            shutil.copy(reference_dir() / "iou_png" / f"{kind}_{n}.png", tmp_path / folder)
    return tmp_path, [tmp_path / "labels", tmp_path / "pred", "--data", tmp_path / "iou.json"]


def run(arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "compute_iou.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_script_on_the_png_files(golden, files):
    info, data = golden
    folder, arguments = files
    done = run([*arguments, "--json", folder / "scores.json"])
    assert done.returncode == 0, done.stderr
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["confusion"] == data["confusion_rows_gt_columns_prediction"].tolist()
    iou = [np.nan if v is None else v for v in scores["iou"].values()]
    np.testing.assert_array_equal(iou, expected(info, "released"))
    assert scores["miou"] == info["official"]["miou"]
    lines = [f"===>{name}:\t{round(v * 100, 2)}" for name, v in zip(info["class_names"], iou, strict=True)]
    lines.append(f"===> mIoU: {round(info['released']['miou_nanmean'] * 100, 2)}")
    assert done.stdout.splitlines()[:len(lines) + 1] == [f"Num classes {len(iou)}", *lines]


def test_the_script_names_the_prediction_with_255(files):
    folder, arguments = files
    path = folder / "pred" / "pred_0.png"
    guess = np.array(Image.open(path))
    guess[0, 0] = 255
    Image.fromarray(guess).save(path)
    done = run(arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert any("pred_0.png" in line and line.endswith(": 255") for line in done.stderr.splitlines())

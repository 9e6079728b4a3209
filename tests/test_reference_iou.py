"""The released evaluation's numbers, to the last bit: through the functions, and through the script on PNG files."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, cases, load_reference, reference_dir
from PIL import Image

from lib.errors import UserError
from lib.metrics import confusion_matrix, mean_iou, per_class_iou

INFO, DATA = load_reference("iou")
# numbers of the pairs that the released evaluation counts: those of one size
PAIRS = [match[1] for match in cases(r"gt_labelid_(.+)", DATA.files)
         if DATA[match.string].shape == DATA[f"prediction_trainid_{match[1]}"].shape]
CLASSES = len(INFO["class_names"])
CONFUSION = DATA["confusion_rows_gt_columns_prediction"]
IGNORE = 255


def train_ids(label: np.ndarray) -> np.ndarray:
    """Class indices of a label-id map. In the release values without an entry stay, and count from C on as ignored."""
    table = np.arange(256)
    for value, index in INFO["label_to_train_mapping"]:
        if value >= 0:
            table[value] = index
    return np.where(table >= CLASSES, IGNORE, table)[label]


def expected(which: str) -> list[float]:
    return [float(v) for v in INFO[which]["iou_per_class"]]  # float("nan") too


def test_confusion_and_iou():
    total = np.zeros((CLASSES, CLASSES), np.int64)
    for n in PAIRS:
        truth, guess = train_ids(DATA[f"gt_labelid_{n}"]), DATA[f"prediction_trainid_{n}"]
        confusion_matrix(truth, guess, CLASSES, IGNORE, out=total)
    released, official = INFO["released"], INFO["official"]
    assert len(PAIRS) == released["pairs_used"]
    np.testing.assert_array_equal(total, CONFUSION)
    np.testing.assert_array_equal(per_class_iou(total), expected("released"))
    np.testing.assert_array_equal(per_class_iou(total), expected("official"))
    assert mean_iou(total) == official["miou"]
    assert mean_iou(total) == pytest.approx(released["miou_nanmean"], rel=1e-15)  # it adds in NumPy's order
    assert np.count_nonzero(~np.isnan(per_class_iou(total))) == released["classes_counted"]


@pytest.mark.parametrize("value", [IGNORE, CLASSES])
def test_a_prediction_that_is_no_class_is_refused(value):
    """The released evaluation counts it in a wrong cell, or fails."""
    for n in PAIRS:
        truth, guess = train_ids(DATA[f"gt_labelid_{n}"]), DATA[f"prediction_trainid_{n}"].copy()
        guess[tuple(np.argwhere(truth != IGNORE)[0])] = value
        with pytest.raises(UserError, match=str(value)):
            confusion_matrix(truth, guess, CLASSES, IGNORE)


@pytest.fixture
def files(tmp_path):
    """A description of the PNG files as a data set, and their folders; returns the script's arguments."""
    ids = [[value for value, index in INFO["label_to_train_mapping"] if index == c] for c in range(CLASSES)]
    classes = [{"name": name, "color": [0, 0, c], "ids": ids[c]} for c, name in enumerate(INFO["class_names"])]
    height, width = DATA[f"gt_labelid_{PAIRS[0]}"].shape
    (tmp_path / "iou.json").write_text(json.dumps({
        "name": "iou", "root": ".", "images": "images/pred_{n}.png", "labels": "labels/gt_{n}.png",
        "sets": {"train": "all", "val": "all"}, "size": [width, height], "encoding": "ids", "classes": classes,
        "void": sorted({*range(256)}.difference(*ids))}))
    for folder, kind in (("labels", "gt"), ("pred", "pred")):
        (tmp_path / folder).mkdir()
        for n in PAIRS:
            shutil.copy(reference_dir() / "iou_png" / f"{kind}_{n}.png", tmp_path / folder)
    return tmp_path, [tmp_path / "labels", tmp_path / "pred", "--data", tmp_path / "iou.json"]


def run(arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "compute_iou.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_script_on_the_png_files(files):
    folder, arguments = files
    done = run([*arguments, "--json", folder / "scores.json"])
    assert done.returncode == 0, done.stderr
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["confusion"] == CONFUSION.tolist()
    iou = [np.nan if v is None else v for v in scores["iou"].values()]
    np.testing.assert_array_equal(iou, expected("released"))
    assert scores["miou"] == INFO["released"]["miou_nanmean"]
    lines = [f"===>{name}:\t{round(v * 100, 2)}" for name, v in zip(INFO["class_names"], iou, strict=True)]
    lines.append(f"===> mIoU: {round(INFO['released']['miou_nanmean'] * 100, 2)}")
    assert done.stdout.splitlines()[:len(lines) + 1] == [f"Num classes {len(iou)}", *lines]


def test_the_script_names_the_prediction_that_is_no_class(files):
    folder, arguments = files
    path = folder / "pred" / f"pred_{PAIRS[-1]}.png"
    guess = np.array(Image.open(path))
    guess[0, 0] = IGNORE
    Image.fromarray(guess).save(path)
    done = run(arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert any(path.name in line and line.endswith(f": {IGNORE}") for line in done.stderr.splitlines())

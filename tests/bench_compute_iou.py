"""CPU time of scoring one pair of label maps: this project, the original way, the official tool where it is installed.

    python tests/bench_compute_iou.py                                   synthetic street maps, 2048 x 1024
    python tests/bench_compute_iou.py --labels CITYSCAPES/gtFine/train  real ones (predictions: the truth, disturbed)

All ways read the same PNG files in one run, in turn; the table shows the least over the repeats. The IoU of all ways
is asserted to be equal to the last bit. The official tool is that of `pip install cityscapesscripts`, with its compiled
part or without.
"""
import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compute_iou import score_pair  # noqa: E402
from lib.datasets.description import load_description  # noqa: E402
from lib.datasets.labels import label_table, label_values, read_indices  # noqa: E402
from lib.metrics import fold_rows, joint_histogram, per_class_iou  # noqa: E402

DATA = load_description("cityscapes")
TABLE = label_table(DATA, DATA.classes)
NUM_CLASSES = len(DATA.classes)
IDS = np.array([ids[0] for ids in DATA.ids], np.uint8)


def street_map(rng: np.random.Generator) -> np.ndarray:
    """uint8 [1024, 2048] label ids: bands and overlapping shapes, with runs about as long as in Cityscapes."""
    image = Image.new("L", (2048, 1024), 23)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 200, 2048, 600), 11)
    draw.polygon([(700, 500), (1300, 500), (2048, 1024), (0, 1024)], 7)
    for _ in range(120):
        x, y, r = rng.integers(0, 2048), rng.normal(500, 150), rng.gamma(2, 20)
        angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
        outline = np.stack([x + r * np.cos(angles), y + 1.5 * r * np.sin(angles)], 1) + rng.normal(0, r / 5, (12, 2))
        draw.polygon([tuple(point) for point in outline], int(rng.integers(0, 34)))
    return np.array(image)


def disturb(label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H, W] class indices: a prediction with shifted edges and wrong patches."""
    guess = np.where((TABLE[label] >= 0) & (TABLE[label] < NUM_CLASSES), TABLE[label], 2).astype(np.uint8)
    guess = np.roll(guess, (2, 3), (0, 1))
    for _ in range(40):
        y, x = rng.integers(0, label.shape[0]), rng.integers(0, label.shape[1])
        guess[y:y + 60, x:x + 90] = rng.integers(0, NUM_CLASSES)
    return guess


def original_way(label: Path, prediction: Path) -> np.ndarray:
    """The released evaluation's arithmetic: a pass for each label id, a check of sizes, a histogram of every pixel."""
    guess, values = np.array(Image.open(prediction)), np.array(Image.open(label))
    truth = values.copy()
    for value in range(-1, 34):
        truth[values == value] = TABLE[value] if value >= 0 else 255
    truth = truth.astype(np.int64)
    if len(truth.flatten()) != len(guess.flatten()):
        return np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)  # such a pair is skipped
    truth, guess = truth.flatten(), guess.flatten()
    counted = (truth >= 0) & (truth < NUM_CLASSES)
    codes = NUM_CLASSES * truth[counted].astype(int) + guess[counted]
    return np.bincount(codes, minlength=NUM_CLASSES ** 2).reshape(NUM_CLASSES, NUM_CLASSES)


def official_way():
    """(name, function of two files -> confusion matrix) of cityscapesscripts; None when it is not installed."""
    try:
        from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as tool
    except ImportError:
        return None
    tool.args.evalInstLevelScore = tool.args.evalPixelAccuracy = False
    def evaluate(label: Path, prediction: Path) -> np.ndarray:
        matrix = tool.generateMatrix(tool.args)
        tool.evaluatePair(str(prediction.with_suffix(".ids.png")), str(label), matrix, None, {}, tool.args)
        ignored = [k for k in range(len(matrix)) if k not in IDS]  # the tool leaves rows of void truth out of its IoU
        matrix[ignored] = 0
        assert not matrix[:, ignored].any()
        return matrix[np.ix_(IDS, IDS)].astype(np.int64)

    return f"official tool, {'Cython' if tool.CSUPPORT else 'Python'}", evaluate


def original_iou(confusion: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.diag(confusion) / (confusion.sum(1) + confusion.sum(0) - np.diag(confusion))


def start_up() -> float:
    """Seconds of CPU until compute_iou.py has printed its help; the least of 5."""
    times = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, str(ROOT / "compute_iou.py"), "--help"], stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(times)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, help="folder with *_gtFine_labelIds.png, in any depth")
    parser.add_argument("--pairs", type=int, default=4, help="label maps used (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        pairs, runs = [], []
        real = sorted(args.labels.rglob("*_gtFine_labelIds.png"))[:args.pairs] if args.labels else []
        for n in range(len(real) or args.pairs):
            label, prediction = real[n] if real else Path(folder) / f"{n}_gt.png", Path(folder) / f"{n}.png"
            if not real:
                Image.fromarray(street_map(rng)).save(label)
            values = read_indices(label)
            guess = disturb(values, rng)
            Image.fromarray(guess).save(prediction)
            Image.fromarray(IDS[guess]).save(prediction.with_suffix(".ids.png"))
            a, b = values.ravel(), guess.ravel()
            runs.append(a.size / (1 + np.count_nonzero((a[1:] != a[:-1]) | (b[1:] != b[:-1]))))
            pairs.append((label, prediction))

        def ours(label: Path, prediction: Path) -> np.ndarray:
            return score_pair((label, prediction), partial(label_values, d=DATA), TABLE, NUM_CLASSES,
                              np.arange(256) < NUM_CLASSES)[0][:, :NUM_CLASSES]

        decoded = {pair: (read_indices(pair[0]), read_indices(pair[1])) for pair in pairs}
        ways = {"this project": ours, "the original way": original_way}
        if official := official_way():
            ways[official[0]] = official[1]
        ways["(decoding alone)"] = lambda label, prediction: (read_indices(label), read_indices(prediction))
        ways["(counting alone)"] = lambda *pair: fold_rows(joint_histogram(*decoded[pair]), TABLE, NUM_CLASSES)
        times, ious = {name: [] for name in ways}, {}
        for _ in range(args.repeats):
            for name, way in ways.items():
                start = time.process_time()
                results = [way(*pair) for pair in pairs]
                times[name].append((time.process_time() - start) / len(pairs))
                if not name.startswith("("):
                    ious[name] = original_iou(sum(results))
        counted = per_class_iou(sum(ours(*pair) for pair in pairs))
        for name, iou in ious.items():
            assert np.array_equal(iou, counted, equal_nan=True), f"IoU of {name} differs"

    height, width = values.shape
    print(f"{processor()}; Python {platform.python_version()}, NumPy {np.__version__}, Pillow {PIL.__version__}")
    print(f"{len(pairs)} {'real' if real else 'synthetic'} pairs, {width} x {height}, {np.mean(runs):.0f} pixels a run")
    print(f"start-up {start_up():.2f} s CPU; IoU of all ways equal to the last bit\n")
    print("| | CPU ms a pair | times ours |\n|---|---|---|")
    for name in ways:
        print(f"| {name} | {1000 * min(times[name]):.1f} | {min(times[name]) / min(times['this project']):.2f} |")


if __name__ == "__main__":
    main()

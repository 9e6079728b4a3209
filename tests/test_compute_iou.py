"""Scoring saved predictions: the arithmetic, every accepted layout, and a refusal for every unsound file."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from lib.datasets.description import Domain, load_description
from lib.errors import UserError
from lib.metrics import confusion_matrix, iou_dict, iou_table, mean_iou, per_class_iou, restrict

SCRIPT = ROOT / "compute_iou.py"
CITYSCAPES = load_description("cityscapes")
IDS = np.array([ids[0] for ids in CITYSCAPES.ids], np.uint8)
NAMES = ("frankfurt_000000_000294", "frankfurt_000000_000576", "munster_000003_000019")


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def refused(*arguments) -> str:
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    return done.stderr


def save(values, path: Path, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if palette:
        image.putpalette(CITYSCAPES.palette.tobytes())
    image.save(path)


def label_file(root: Path, name: str, set_: str = "val") -> Path:
    return root / "gtFine" / set_ / name.split("_")[0] / f"{name}_gtFine_labelIds.png"


def blobs(rng: np.random.Generator, values, shape=(30, 40)) -> np.ndarray:
    return np.kron(rng.choice(values, (shape[0] // 5, shape[1] // 10)), np.ones((5, 10), np.uint8))


@pytest.fixture
def pairs(tmp_path):
    """Three labels in tmp_path/gtFine/val, their predictions in tmp_path/pred; returns the confusion matrix."""
    rng, total = np.random.default_rng(0), np.zeros((19, 19), np.int64)
    for n, name in enumerate(NAMES):
        truth = blobs(rng, 19)
        guess = np.where(rng.random(truth.shape) < .3, rng.integers(0, 19, truth.shape), truth)
        void = rng.random(truth.shape) < .1
        save(np.where(void, rng.choice([0, 4, 255], truth.shape), IDS[truth]), label_file(tmp_path, name))
        save(guess, tmp_path / "pred" / f"{name}_leftImg8bit.png", palette=n == 1)
        save(np.zeros((4, 4, 3)), tmp_path / "pred" / f"{name}_leftImg8bit_color.png")
        np.add.at(total, (truth[~void], guess[~void]), 1)
    save(truth, tmp_path / "pred" / "of_another_set_leftImg8bit.png")
    return total


def iou_by_hand(confusion, classes=None) -> list[float]:
    """TP / (TP + FP + FN), pixel counts taken one class at a time; truth outside `classes` dropped."""
    classes = range(len(confusion)) if classes is None else classes
    scores = []
    for c in classes:
        hit = confusion[c, c]
        missed = sum(confusion[c, k] for k in range(len(confusion)) if k != c)
        wrong = sum(confusion[k, c] for k in classes if k != c)
        scores.append(hit / (hit + missed + wrong) if hit + missed + wrong else np.nan)
    return scores


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 3), (7, 9), (300, 500)])
@pytest.mark.parametrize("noise", [0, .05, 1])
def test_confusion_counts_every_pixel(shape, noise):
    rng = np.random.default_rng(1)
    truth = np.sort(rng.integers(0, 8, shape), 1)
    truth[truth == 7] = 255
    guess = np.where(rng.random(shape) < noise, rng.integers(0, 7, shape), np.roll(np.minimum(truth, 6), 2, 0))
    expected = np.zeros((7, 7), np.int64)
    np.add.at(expected, (truth[truth < 255], guess[truth < 255]), 1)
    found = confusion_matrix(truth, guess.astype(np.uint8), 7)
    assert found.dtype == np.int64 and (found == expected).all()
    total = np.ones((7, 7), np.int64)
    assert confusion_matrix(truth.T, guess.T, 7, out=total) is total and (total == expected + 1).all()


def test_confusion_refuses_what_it_cannot_count():
    truth = np.zeros((4, 6), int)
    with pytest.raises(UserError, match="6 x 4 and 5 x 4"):
        confusion_matrix(truth, truth[:, :5], 3)
    for value, message in ((3, "prediction holds 3"), (255, "prediction holds 255"), (-1, "outside 0..255")):
        guess = truth.copy()
        guess[0, 0] = value
        with pytest.raises(UserError, match=message):
            confusion_matrix(np.full_like(truth, 255), guess, 3)  # ignored pixels do not hide it
    with pytest.raises(UserError, match="the truth holds 3,"):
        confusion_matrix(truth + 3, truth, 3)


def test_absent_classes_are_left_out_of_the_mean():
    confusion = np.array([[3, 1, 0, 0], [0, 2, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    iou = per_class_iou(confusion)
    assert iou[:3].tolist() == [3 / 4, 2 / 5, 0] and np.isnan(iou[3])  # 2 is only predicted, 3 does not occur
    assert mean_iou(confusion) == pytest.approx(np.mean(iou[:3]), rel=1e-15)
    assert np.isnan(mean_iou(np.zeros((4, 4), np.int64)))
    saved = json.loads(json.dumps(iou_dict("abcd", confusion), allow_nan=False))
    assert saved["iou"] == {"a": .75, "b": .4, "c": 0, "d": None} and saved["confusion"] == confusion.tolist()


def test_the_mean_is_added_from_the_first_class_to_the_last():
    """As the official Cityscapes tool adds it, to the last bit; np.nanmean, math.fsum and Python 3.12's sum differ."""
    rng, differs = np.random.default_rng(0), 0
    for _ in range(200):
        confusion = rng.integers(0, 1000, (19, 19))
        score_sum, valid_scores = 0.0, 0
        for score in per_class_iou(confusion).tolist():
            score_sum += score
            valid_scores += 1
        assert mean_iou(confusion) == score_sum / valid_scores
        differs += np.nanmean(per_class_iou(confusion)) != score_sum / valid_scores
    assert differs


def test_tables_show_one_run_in_full_or_several_side_by_side():
    confusion = np.array([[3, 1], [0, 4]])
    lines = iou_table(["road", "car"], {"IoU": confusion}).splitlines()
    assert lines[0].split() == ["in", "%", "IoU", "recall", "precision", "share"]
    assert lines[1].split() == ["road", "75.00", "75.00", "100.00", "50.00"]
    assert lines[-1].split() == ["mean", "77.50"]
    lines = iou_table(["road", "car"], {"source only": confusion, "adapted": np.diag([1, 0])}).splitlines()
    assert re.split("  +", lines[0].strip()) == ["source only", "adapted"]
    assert lines[1].split() == ["road", "75.00", "100.00"] and lines[2].split() == ["car", "80.00", "nan"]
    assert len({len(line) for line in lines}) == 1


def test_a_score_over_some_classes_ignores_the_truth_of_others_but_not_their_predictions():
    confusion = np.random.default_rng(0).integers(1, 99, (5, 5))
    keep = [3, 0, 4]
    assert per_class_iou(restrict(confusion, keep)).tolist() == iou_by_hand(confusion, keep)
    assert per_class_iou(restrict(confusion, range(5))).tolist() == iou_by_hand(confusion)
    only = np.zeros((3, 3), int)
    only[0] = 6, 0, 2  # truth 0 predicted as the unlisted class 2: missed
    only[2] = 5, 0, 9  # truth 2 is unlisted: its prediction as 0 is no error
    assert per_class_iou(restrict(only, [0, 1]))[0] == 6 / 8


@pytest.mark.parametrize("gt_dir", ["", "gtFine", "gtFine/val"])
@pytest.mark.parametrize("folders", [False, True])
def test_predictions_are_found_flat_or_in_city_folders(tmp_path, pairs, gt_dir, folders):
    save(np.zeros((8, 8)), label_file(tmp_path, NAMES[0], "train"))  # another set, not to be scored
    if folders:
        for name in NAMES:
            city = tmp_path / "pred" / name.split("_")[0]
            city.mkdir(exist_ok=True)
            (tmp_path / "pred" / f"{name}_leftImg8bit.png").rename(city / f"{name}_leftImg8bit.png")
    done = run(tmp_path / gt_dir, tmp_path / "pred", "--json", tmp_path / "scores.json")
    assert done.returncode == 0 and done.stderr == ""
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["confusion"] == pairs.tolist() and scores["images"] == 3
    assert list(scores["iou"].values()) == iou_by_hand(pairs)
    lines = done.stdout.splitlines()
    assert lines[0] == "Num classes 19"
    assert lines[1:20] == [f"===>{name}:\t{round(iou * 100, 2)}"
                           for name, iou in zip(CITYSCAPES.classes, iou_by_hand(pairs), strict=True)]
    assert lines[20] == f"===> mIoU: {round(np.mean(iou_by_hand(pairs)) * 100, 2)}"
    assert lines[-1] == "3 images"


def test_one_city_is_scored_alone(tmp_path, pairs):
    done = run(tmp_path / "gtFine/val/frankfurt", tmp_path / "pred")
    assert done.stdout.endswith("2 images\n")


@pytest.mark.parametrize("classes", ["13", "16", "bus,road"])
def test_scores_over_a_subset(tmp_path, pairs, classes):
    done = run(tmp_path / "gtFine", tmp_path / "pred", "--classes", classes, "--json", tmp_path / "s.json")
    names = CITYSCAPES.subsets.get(classes, ("bus", "road"))
    keep = [CITYSCAPES.classes.index(name) for name in names]
    scores = json.loads((tmp_path / "s.json").read_text())
    assert done.stdout.startswith(f"Num classes {len(keep)}\n===>{names[0]}:")
    assert scores["iou"] == dict(zip(names, iou_by_hand(pairs, keep), strict=True))
    assert scores["confusion_columns"][:len(keep)] == list(names) and len(scores["confusion_columns"]) == 19


def test_predictions_may_number_fewer_classes(tmp_path, pairs):
    keep = [CITYSCAPES.classes.index(name) for name in CITYSCAPES.subsets["16"]]
    confusion = np.zeros((19, 19), np.int64)
    for name in NAMES:
        truth, path = np.array(Image.open(label_file(tmp_path, name))), tmp_path / "pred" / f"{name}_leftImg8bit.png"
        guess = np.array(Image.open(path)) % 16
        save(guess, path)
        labelled = np.isin(truth, IDS)
        np.add.at(confusion, (np.searchsorted(IDS, truth[labelled]), np.array(keep)[guess[labelled]]), 1)
    run(tmp_path, tmp_path / "pred", "--predicted", "16", "--json", tmp_path / "s.json")
    scores = json.loads((tmp_path / "s.json").read_text())
    assert list(scores["iou"]) == list(CITYSCAPES.subsets["16"])
    assert list(scores["iou"].values()) == iou_by_hand(confusion, keep)
    done = run(tmp_path, tmp_path / "pred", "--predicted", "16", "--classes", "13")
    assert done.stdout.startswith("Num classes 13\n")
    save(np.full_like(guess, 16), path)
    assert "predictions outside 0..15" in refused(tmp_path, tmp_path / "pred", "--predicted", "16")


def test_predictions_may_hold_label_ids(tmp_path, pairs):
    folder, scores = tmp_path / "pred", tmp_path / "s.json"
    for name in NAMES:
        path = folder / f"{name}_leftImg8bit.png"
        save(IDS[np.array(Image.open(path))], path)
    done = run(tmp_path, folder, "--label-ids", "--json", scores)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(scores.read_text())["iou"].values()) == iou_by_hand(pairs)
    message = refused(tmp_path, folder)
    assert "predictions outside 0..18" in message and "(label ids? Then give --label-ids)" in message
    save(np.full((30, 40), 34), folder / f"{NAMES[0]}_leftImg8bit.png")  # no value of Cityscapes
    assert "predictions with unknown label ids" in refused(tmp_path, folder, "--label-ids")
    assert "not allowed with" in refused(tmp_path, folder, "--label-ids", "--predicted", "16")


def test_void_predictions_are_wrong_as_in_the_official_tool(tmp_path, pairs):
    void = np.random.default_rng(1).random((30, 40)) < .2
    expected = np.zeros((19, 20), np.int64)
    for name in NAMES:
        truth, path = np.array(Image.open(label_file(tmp_path, name))), tmp_path / "pred" / f"{name}_leftImg8bit.png"
        guess = np.where(void, 19, np.array(Image.open(path)))
        save(np.append(IDS, 0)[guess], path)
        known = np.isin(truth, IDS)
        np.add.at(expected, (np.searchsorted(IDS, truth[known]), guess[known]), 1)
    done = run(tmp_path, tmp_path / "pred", "--label-ids", "--json", tmp_path / "s.json")
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["confusion"] == expected.tolist() and scores["confusion_columns"][-1] == "void"
    hits = expected.diagonal()
    assert list(scores["iou"].values()) == (hits / (expected.sum(1) + expected.sum(0)[:19] - hits)).tolist()
    assert "===> mIoU: " in done.stdout


def test_label_ids_that_could_be_class_indices_are_recognised(tmp_path, pairs):
    """Road, building and pole alone have ids up to 17: all are class indices too, but wrong ones."""
    for name in NAMES:
        ids = IDS[blobs(np.random.default_rng(len(name)), [0, 2, 5])]
        save(ids, label_file(tmp_path, name))
        save(ids, tmp_path / "pred" / f"{name}_leftImg8bit.png")
    message = refused(tmp_path, tmp_path / "pred")
    assert "the predictions look like label ids" in message
    assert "--label-ids" in message and "--predicted 19" in message
    assert "===> mIoU: 100.0\n" in run(tmp_path, tmp_path / "pred", "--label-ids").stdout
    assert "===> mIoU: 0.0\n" in run(tmp_path, tmp_path / "pred", "--predicted", "19").stdout


@pytest.mark.parametrize("values, classes", [
    ([7], [0, 2, 7]), ([7], [0, 2]), ([7, 8, 11, 12, 13, 17], [0, 0, 0, 0, 2, 7, 8]), (range(19), [0, 0, 2, 7, 8])])
def test_a_network_that_learnt_nothing_is_scored(tmp_path, pairs, values, classes):
    """Some of its pixels are right by chance, and more if they were label ids: road is 7, as traffic sign's index."""
    rng = np.random.default_rng(2)
    for name in NAMES:
        truth = blobs(rng, classes, (200, 300))
        save(IDS[truth], label_file(tmp_path, name))
        save(blobs(rng, list(values), (200, 300)), tmp_path / "pred" / f"{name}_leftImg8bit.png")
    done = run(tmp_path, tmp_path / "pred")
    assert done.returncode == 0 and "===> mIoU: " in done.stdout, done.stderr


def test_label_ids_of_colours_are_refused(tmp_path):
    (tmp_path / "rgb.json").write_text(json.dumps({
        "name": "rgb", "root": ".", "images": "i/{n}.png", "labels": "labels/{n}.png", "size": [4, 4],
        "sets": {"train": "a", "val": "a"}, "encoding": "rgb", "classes": [{"name": "x", "color": [0, 0, 1]}]}))
    save(np.full((4, 4, 3), (0, 0, 1)), tmp_path / "labels/1.png")
    message = refused(tmp_path, tmp_path, "--data", tmp_path / "rgb.json", "--label-ids")
    assert "the labels of 'rgb' are colours" in message


def test_processes_change_nothing(tmp_path, pairs):
    one, two = (run(tmp_path, tmp_path / "pred", "--workers", n) for n in (1, 2))
    assert one.returncode == 0 and one.stdout == two.stdout
    (tmp_path / "pred" / f"{NAMES[0]}_leftImg8bit.png").unlink()
    one, two = (refused(tmp_path, tmp_path / "pred", "--workers", n) for n in (1, 2))
    assert one == two


def test_the_original_devkit_folder(tmp_path, pairs):
    kit = tmp_path / "devkit"
    kit.mkdir()
    train_id = {int(i): c for c, i in enumerate(IDS)}
    info = {"label": CITYSCAPES.classes, "label2train": [[i, train_id.get(i, 255)] for i in range(-1, 34)]}
    (kit / "info.json").write_text(json.dumps(info))
    names = NAMES[:2]
    (kit / "label.txt").write_text("".join(f"{n.split('_')[0]}/{n}_gtFine_labelIds.png\n" for n in names))
    (kit / "val.txt").write_text("".join(f"{n.split('_')[0]}/{n}_leftImg8bit.png\n" for n in names))
    listed = run(tmp_path / "gtFine/val", tmp_path / "pred", "--list", kit / "val.txt")
    done = run(tmp_path / "gtFine/val", tmp_path / "pred", "--devkit_dir", kit)
    assert done.returncode == 0 and done.stdout == listed.stdout and done.stdout.endswith("2 images\n")
    message = refused(tmp_path, tmp_path / "pred", "--devkit_dir", kit, "--data", "gta5")
    assert "--devkit_dir takes the place" in message and message.count("\n") == 1
    again = run(tmp_path / "gtFine/val", tmp_path / "pred", "--devkit_dir", kit, "--predicted", "19")
    assert again.stdout == done.stdout
    for index in (100000, -1, 19):
        (kit / "info.json").write_text(json.dumps({**info, "label2train": [[7, index]]}))
        message = refused(tmp_path / "gtFine/val", tmp_path / "pred", "--devkit_dir", kit)
        assert f"'label2train' has the class {index}, but 'label' names the classes 0..18" in message
    (kit / "val.txt").write_text("one\n")
    (kit / "info.json").write_text(json.dumps(info))
    arguments = tmp_path / "gtFine/val", tmp_path / "pred", "--devkit_dir", kit
    assert "label.txt has 2 lines and val.txt 1" in refused(*arguments)
    (kit / "info.json").write_text("{}")
    assert "info.json" in refused(*arguments)


def test_a_set_that_is_a_list(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/dusk_test.txt").write_text("b.jpg\nc.jpg\n")
    for name in "abc":
        label = blobs(rng, 12)
        save(label, tmp_path / "labels" / f"{name}.png")
        if name != "a":
            save(label % 11, tmp_path / "pred" / f"{name}.png")
    for folder in (tmp_path, tmp_path / "labels"):
        done = run(folder, tmp_path / "pred", "--data", "camvid")
        assert "===> mIoU: 100.0\n" in done.stdout and done.stdout.endswith("2 images\n")
    (tmp_path / "lists/day_test.txt").write_text("a.jpg\nd.jpg\n")
    message = refused(tmp_path, tmp_path / "pred", "--data", "camvid", "--set", "day_test")
    assert "1 of 2 images have no label" in message and "d.jpg" in message


@pytest.mark.parametrize("data, known", [("camvid", "day_test, day_train, dusk_test, dusk_train"), ("gta5", "train")])
def test_a_list_does_not_make_a_set(tmp_path, data, known):
    """Where folders tell no sets apart, a name with a list is one of the description's, or one that has a list."""
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/day_test.txt").write_text("a.jpg\n")
    mine = tmp_path / "mine.txt"
    mine.write_text("a.jpg\n" if data == "camvid" else "a.png\n")
    for folder in ("labels", "pred", "images"):
        save(np.zeros((4, 4)), tmp_path / folder / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "images/a.jpg")
    for name in known.split(", "):
        assert len(Domain.open(data, tmp_path, name, mine).list_images()) == 1
    with pytest.raises(UserError, match=f"'{data}' has no set 'nosuchset' .it has: {known}.$"):
        Domain.open(data, tmp_path, "nosuchset", mine).list_images()
    if data == "camvid":
        arguments = (tmp_path, tmp_path / "pred", "--data", data, "--list", mine, "--set")
        assert run(*arguments, "day_test").stdout.endswith("1 images\n")
        assert f"has no set 'nosuchset' (it has: {known})" in refused(*arguments, "nosuchset")


def test_labels_must_not_share_a_prediction(tmp_path):
    for drive in ("10", "11"):
        save(np.zeros((4, 4)), tmp_path / f"gtFine/val/{drive}/0001_label.png")
    save(np.zeros((4, 4)), tmp_path / "pred/0001_image.png")
    assert "0001_image.png would be the prediction for" in refused(tmp_path, tmp_path / "pred", "--data", "idd_lite")
    for drive in ("10", "11"):
        save(np.zeros((4, 4)), tmp_path / f"pred/{drive}/0001_image.png")
    assert "===>drivable:\t100.0\n" in run(tmp_path, tmp_path / "pred", "--data", "idd_lite").stdout


def test_every_problem_is_listed_and_nothing_scored(tmp_path, pairs):
    names = [f"zurich_{n:06}_000019" for n in range(20)]
    for name in names:  # twelve without a prediction, and eight unsound ones
        save(np.full((6, 8), 7), label_file(tmp_path, name))
    prediction = {name: tmp_path / "pred" / f"{name}_leftImg8bit.png" for name in names}
    save(np.zeros((8, 6)), prediction[names[0]])
    save(np.full((6, 8), 255), prediction[names[1]])
    save(np.full((6, 8), 19), prediction[names[2]])
    save(np.zeros((6, 8, 3)), prediction[names[3]])
    save(np.random.default_rng(0).integers(0, 19, (60, 80)), prediction[names[4]])
    prediction[names[4]].write_bytes(prediction[names[4]].read_bytes()[:500])
    for name in names[5:8]:
        save(np.zeros((6, 8)), prediction[name])
    save(np.full((6, 8), 200), label_file(tmp_path, names[5]))
    save(np.full((6, 8, 3), 7), label_file(tmp_path, names[6]))
    label_file(tmp_path, names[7]).write_text("not an image")
    message = refused(tmp_path / "gtFine", tmp_path / "pred", "--json", tmp_path / "s.json")
    assert not (tmp_path / "s.json").exists()
    assert "nothing was scored: 20 problems in 23 images" in message
    assert "12 missing predictions:" in message and "... and 2 more" in message
    assert message.count(names[8]) == 1 and names[19] not in message
    for name, said in ((names[0], "6 x 8 and 8 x 6"), (names[1], ": 255"), (names[2], ": 19"), (names[3], "RGB"),
                       (names[4], "truncated"), (names[5], ": 200"), (names[6], "RGB"), (names[7], "not an image")):
        line, = (line for line in message.splitlines() if name in line)
        assert said in line
    assert "2 predictions outside 0..18:" in message and "4 files that cannot be used:" in message


def test_mistakes_on_the_command_line_are_named(tmp_path, pairs):
    good = (tmp_path / "gtFine", tmp_path / "pred")
    assert "no such folder" in refused(tmp_path / "nowhere", tmp_path / "pred")
    assert "no such folder" in refused(tmp_path / "gtFine", tmp_path / "nowhere")
    assert "no label of the set 'train' of 'gta5'" in refused(*good, "--data", "gta5")
    assert "no label of the set 'test'" in refused(*good, "--set", "test")
    assert "--set train has no meaning" in refused(tmp_path / "gtFine/val", tmp_path / "pred", "--set", "train")
    assert "there is no 'tram'; the choice is 16, 13, 19, or names" in refused(*good, "--classes", "road,tram")
    assert "no classes '': there is no ''; the choice is" in refused(*good, "--classes", "")
    assert len(refused(*good, "--classes", "x" * 5000)) < 2000
    assert "one is given twice" in refused(*good, "--classes", "road,road")
    assert "no data set 'kitti'" in refused(*good, "--data", "kitti")
    assert "--workers" in refused(*good, "--workers", "0")
    assert "--workers 100000: at most 64 processes" in refused(*good, "--workers", "100000")
    assert "gone.txt: no such file" in refused(*good, "--list", tmp_path / "gone.txt")
    (tmp_path / "empty.txt").write_text("\n")
    assert "the list is empty" in refused(*good, "--list", tmp_path / "empty.txt")


@pytest.mark.parametrize("set_", ["val/../val", "/", ".", "..", "x" * 5000, "*", "{set}", "[val]"])
def test_sets_that_are_no_folder(tmp_path, pairs, set_):
    message = refused(tmp_path, tmp_path / "pred", "--set", set_)
    assert "no label of the set" in message and len(message) < 1500


def test_labels_that_a_description_places_by_an_absolute_path(tmp_path, pairs):
    """As train_cbst.py writes it for its pseudo-labels."""
    entries = json.loads((ROOT / "lib/datasets/cityscapes.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**entries, "labels": f"{tmp_path}/{entries['labels']}"}))
    plain = run(tmp_path / "gtFine", tmp_path / "pred").stdout
    assert run(tmp_path / "gtFine", tmp_path / "pred", "--data", tmp_path / "mine.json").stdout == plain


@pytest.mark.parametrize("line, said", [
    ("x" * 5000, "x..."), ("/", " /"), (".", " ."), ("..", " .."), ("\0", "\0"), ("../../a.png", " ../../a.png")])
def test_list_lines_that_name_no_image(tmp_path, pairs, line, said):
    (tmp_path / "list.txt").write_text(f"frankfurt/{NAMES[0]}_leftImg8bit.png\n{line}\n")
    message = refused(tmp_path / "gtFine", tmp_path / "pred", "--list", tmp_path / "list.txt")
    assert "1 of 2 images have no label" in message and message.endswith(f"{said}\n") and len(message) < 2000


def test_lists_with_a_byte_order_mark_with_repeated_lines_and_of_another_encoding(tmp_path, pairs):
    (tmp_path / "list.txt").write_text(f"{NAMES[0]}_leftImg8bit.png\n", encoding="utf-8-sig")
    assert run(tmp_path, tmp_path / "pred", "--list", tmp_path / "list.txt").stdout.endswith("1 images\n")
    (tmp_path / "list.txt").write_text(f"{NAMES[0]}_leftImg8bit.png\n" * 2)
    message = refused(tmp_path, tmp_path / "pred", "--list", tmp_path / "list.txt")
    assert f"1 images are listed more than once: {NAMES[0]}" in message
    (tmp_path / "list.txt").write_bytes(b"\xff\xfea\0")
    assert "not a UTF-8 text file" in refused(tmp_path, tmp_path / "pred", "--list", tmp_path / "list.txt")


@pytest.mark.parametrize("name, said", [
    ("", "it is a folder"), ("nowhere/s.json", "No such file or directory"), ("x" * 300, "File name too long"),
    ("pred/s.json/s.json", "No such file or directory")])
def test_where_scores_cannot_be_written(tmp_path, pairs, name, said):
    """Before anything is scored: one of the predictions is missing, and nothing says so."""
    (tmp_path / "pred" / f"{NAMES[0]}_leftImg8bit.png").unlink()
    message = refused(tmp_path, tmp_path / "pred", "--json", tmp_path / name)
    assert said in message and "Choose another --json" in message and message.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
def test_a_full_disk_and_a_reader_that_leaves(tmp_path, pairs):
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(tmp_path / "pred")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "compute_iou.py: the scores cannot be written: No space left on device\n"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 2 and done.stderr.endswith("Broken pipe\n") and done.stderr.count("\n") == 1


def test_it_starts_without_torch_and_at_once(tmp_path, pairs):
    code = ("import sys, compute_iou\n"
            f"compute_iou.main([{str(tmp_path)!r}, {str(tmp_path / 'pred')!r}])\n"
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    times = []
    for _ in range(3):  # processor time, least of three: other work on the machine does not count
        before = os.times()
        assert run(tmp_path, tmp_path / "pred").returncode == 0
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < .4

"""Mistakes in the data of train_adaptsegnet.py: one message before training starts, which file it is and what to do."""
import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scripts import execute, message, render, training

import lib.flags
import train_adaptsegnet as script
from lib import runtime
from lib.errors import UserError

SCRIPT = "train_adaptsegnet.py"
IMAGE, LABEL = "gta5/images/00002.png", "gta5/labels/00002.png"
TARGET = "cityscapes/leftImg8bit/train/northgate/northgate_000001_000019_leftImg8bit.png"
TRUTH = "cityscapes/gtFine/val/lakeside/lakeside_000001_000019_gtFine_labelIds.png"


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    return render(tmp_path_factory.mktemp("bad") / "pair")


@pytest.fixture
def pair(rendered, tmp_path, in_this_process, monkeypatch) -> Path:
    """A pair to spoil; training must not begin."""
    def no_network(*_):
        raise AssertionError("the run went on")

    monkeypatch.setattr(script, "build", no_network)
    return shutil.copytree(rendered, tmp_path / "pair")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 9 // 10])


def resize(path: Path) -> None:
    Image.open(path).resize((30, 20)).save(path)


def unknown_value(path: Path) -> None:
    label = np.asarray(Image.open(path)).copy()
    label[:2, :2] = 99
    Image.fromarray(label).save(path)


def listed(pair: Path, text: str) -> str:
    (pair / "list.txt").write_text(text)
    return str(pair / "list.txt")


def described(pair: Path, **changes) -> str:
    entries = {**json.loads((ROOT / "lib/datasets/gta5.json").read_text()), **changes}
    (pair / "mine.json").write_text(json.dumps(entries))
    return str(pair / "mine.json")


def one_class(pair: Path) -> list[str]:
    classes = [{"name": "road", "color": [0, 0, 0], "ids": [7]}]
    return ["--source", described(pair, classes=classes, void=[i for i in range(256) if i != 7], subsets={})]


def floats(path: Path) -> None:
    Image.fromarray(np.zeros((48, 64), np.float32)).save(path, format="TIFF")


def bomb(path: Path) -> None:
    """100 kB that decompress to 144 MB."""
    Image.fromarray(np.zeros((12000, 12000), bool)).save(path)


def all_void(pair: Path) -> None:
    for path in (pair / "gta5/labels").iterdir():
        Image.new("L", (64, 48), 0).save(path)


def no_truth(pair: Path) -> list[str]:
    shutil.rmtree(pair / "cityscapes/gtFine/val")
    return ["--val-set", "val"]


def misspelt_map(pair: Path) -> list[str]:
    entries = json.loads((ROOT / "lib/datasets/demo.json").read_text())
    (pair / "target.json").write_text(json.dumps({**entries, "maps": {"gta5": {"vegetatoin": "terrain"}}}))
    return ["--target", str(pair / "target.json")]


def list_lines(line: str, words: str = "1 of 2 images do not exist") -> tuple:
    return lambda p: ["--data-list", listed(p, f"00001.png\n{line}\n")], [f"list.txt: {words}"]


def json_file(text: str, words: str) -> tuple:
    return lambda p: ["--source", listed(p, text)], [f"list.txt: {words}"]


# name: (what is done to the pair, giving more flags or None; what the message says)
CASES = {
    "missing source folder": (lambda p: ["--data-dir", str(p / "nowhere")],
                              ["nowhere: no such folder", "should hold the data set 'gta5'"]),
    "missing target folder": (lambda p: ["--data-dir-target", str(p / "nowhere")],
                              ["nowhere: no such folder", "should hold the data set 'demo'"]),
    "missing label": (lambda p: (p / LABEL).unlink(), [f"{IMAGE}: its label", f"{LABEL} does not exist"]),
    "missing validation label": (lambda p: (p / TRUTH).unlink(), [TRUTH, "does not exist"]),
    "size mismatch": (lambda p: resize(p / TRUTH), ["is 64x48, but its label", TRUTH, "is 30x20"]),
    "unknown label value": (lambda p: unknown_value(p / LABEL), [f"{LABEL}: unknown label values 99", "'gta5'"]),
    "truncated image": (lambda p: truncate(p / IMAGE), [f"{IMAGE}: the image is broken or truncated"]),
    "truncated label": (lambda p: truncate(p / LABEL), [f"{LABEL}: the image is broken or truncated"]),
    "truncated target": (lambda p: truncate(p / TARGET), [f"{TARGET}: the image is broken or truncated"]),
    "not an image": (lambda p: (p / IMAGE).write_text("x"), [f"{IMAGE}: not an image that can be read"]),
    "empty list": (lambda p: ["--data-list", listed(p, "\n")], ["list.txt: the list is empty", "one image a line"]),
    "missing list": (lambda p: ["--data-list-target", str(p / "no.txt")], ["no.txt: no such file"]),
    "list of nothing": (lambda p: ["--data-list", listed(p, "00009.png\n")], ["1 of 1 images do not exist", "00009"]),
    "no image": (lambda p: shutil.rmtree(p / "gta5/images"), ["gta5: no image of the set", "images/*.png"]),
    "overlap": (lambda p: ["--set", "val"], ["2 images belong to both the training set", "choose another --set"]),
    "one class": (one_class, ["fewer than two classes", "'demo' has road", "'gta5' has road"]),
    "no such class count": (lambda p: ["--num-classes", "5"], ["no choice of 5 classes; it has 14"]),
    "no such data set": (lambda p: ["--source", "gta"], ["no data set 'gta'", "gta5", "path of a .json"]),
    "broken description": (lambda p: ["--source", listed(p, "{")], ["list.txt: not JSON", "line 1"]),
    "wrong description": (lambda p: ["--source", described(p, size=[1])], ["mine.json: 'size' must be"]),
    "image of floats": (lambda p: floats(p / IMAGE), [f"{IMAGE}: its samples are floating-point numbers"]),
    "target of floats": (lambda p: floats(p / TARGET), [f"{TARGET}: its samples are floating-point numbers"]),
    "label of floats": (lambda p: floats(p / LABEL), [f"{LABEL}: one 8-bit class value a pixel is expected"]),
    "bomb as image": (lambda p: bomb(p / IMAGE), [f"{IMAGE}: 12000x12000 are more than 128 million pixels"]),
    "bomb as label": (lambda p: bomb(p / LABEL), [f"{LABEL}: 12000x12000 are more than 128 million pixels"]),
    "bomb as truth": (lambda p: bomb(p / TRUTH), [f"{TRUTH}: 12000x12000 are more than 128 million pixels"]),
    "labels all void": (all_void, ["none of the 5 labels that were read", "has a pixel of any class of this run"]),
    "ignored class": (lambda p: ["--ignore-label", "3"], ["label to ignore, 3, is the index of the class 'wall'"]),
    "no label of a validation set": (no_truth, ["2 bad files", "does not exist"]),
    "misspelt class in maps": (misspelt_map, ["names vegetatoin, no class of 'gta5'"]),
    "misspelt class, all files": (lambda p: [*misspelt_map(p), "--check-data"], ["names vegetatoin, no class"]),
    "line of 5000 letters": list_lines("x" * 5000),
    "line of a slash": list_lines("/"),
    "line of a point": list_lines("."),
    "line of two points": list_lines(".."),
    "line of a null": list_lines("\0"),
    "line of a folder": list_lines("images"),
    "line out of the root": (lambda p: ["--data-list", listed(p, "../../cityscapes/gtFine/val/lakeside/"
                                                                 "lakeside_000001_000019_gtFine_labelIds.png")],
                             ["has no label: it does not match the pattern"]),
    "list that is a folder": (lambda p: ["--data-list", str(p)], ["cannot be read: Is a directory"]),
    "list that is a picture": (lambda p: ["--data-list", str(p / IMAGE)], ["00002.png: not a UTF-8 text file"]),
    "list of a long name": (lambda p: ["--data-list", "x" * 5000], ["cannot be read: File name too long"]),
    "root of a long name": (lambda p: ["--data-dir", "x" * 5000], ["no such folder"]),
    "root that is a file": (lambda p: ["--data-dir", str(p / IMAGE)], ["00002.png: no such folder"]),
    "set of a long name": (lambda p: ["--set", "x" * 5000], ["no image of the set"]),
    "set out of the root": (lambda p: ["--set", "../../../gta5"], ["no image of the set"]),
    "brackets of 100000": json_file("[" * 100_000, "not usable: its brackets are nested too deeply"),
    "number of 6000 digits": json_file('{"name": ' + "9" * 6000 + "}", ""),
    "no object": json_file("[]", "a description is one JSON object"),
    "key twice removed": json_file("{}", "the key 'name' is missing"),
    "name out of its folder": (lambda p: ["--source", described(p, name="../gta5")], ["'name' becomes part of file"]),
    "brace in a pattern": (lambda p: ["--source", described(p, images="images/}{stem}.png")], ["a placeholder is"]),
    "null in a pattern": (lambda p: ["--source", described(p, root="\0")], ["a character that no path can"]),
    "size of nothing": (lambda p: ["--source", described(p, size=[0, 5])], ["mine.json: 'size' must be"]),
    "data set of a long name": (lambda p: ["--source", "x" * 5000], ["no data set", "give one of camvid"]),
    "data set that is a folder": (lambda p: ["--source", str(p)], ["no data set", "give one of camvid"]),
    "missing weights": (lambda p: ["--restore-from", str(p / "no.pth")], ["no.pth does not exist"]),
    "too small for D": (lambda p: ["--adapt", "feature"], ["at least 256x256", "--input-size"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_message_before_training(pair, tmp_path, case):
    spoil, facts = CASES[case]
    more = spoil(pair)
    flags = more if isinstance(more, list) else []
    with pytest.raises(UserError) as caught:
        script.main(training(pair, tmp_path / "run", *flags))
    for fact in facts:
        assert fact in str(caught.value), str(caught.value)
    assert len(str(caught.value)) < 3000
    assert not (tmp_path / "run").exists(), "nothing was written"


# (flag, text it refuses): a type of lib/flags.py each, and nan, which compares as false with everything
NUMBERS = [("--batch-size", "0"), ("--num-steps", "1e3"), ("--num-workers", "-1"), ("--ignore-label", "256"),
           ("--learning-rate", "-1"), ("--learning-rate", "nan"), ("--lambda-seg", "inf"), ("--momentum", "1"),
           ("--input-size", "96"), ("--input-size", "0,48")]


@pytest.mark.parametrize(("flag", "text"), NUMBERS)
def test_a_number_that_makes_no_sense(flag, text, capsys):
    with pytest.raises(SystemExit) as caught:
        script.parse_args([flag, text])
    assert caught.value.code == 2
    assert f"argument {flag}: expected " in (said := capsys.readouterr().err) and f"not '{text}'" in said


@pytest.mark.parametrize(("kind", "text"), [("share", "1.1"), ("positive", "0"), ("scales", "0.9,0"), ("scales", "")])
def test_other_flag_types(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"not {text!r}"):
        getattr(lib.flags, kind)(text)
    assert (lib.flags.share("1"), lib.flags.positive("0.5"), lib.flags.scales("0.9,1")) == (1, 0.5, (0.9, 1))


def test_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match="GPU 99 was asked for, but PyTorch sees"):
        runtime.start(cpu=False, gpu=99, amp="off", seed=0, deterministic=False)


def test_weights_of_another_network(rendered, tmp_path):
    """The one check that needs the network; a real run: exit code 2, one message, no traceback."""
    torch.save({"conv1.weight": torch.ones(64, 3, 7, 7), "other": torch.ones(1)}, tmp_path / "w.pth")
    done = execute(SCRIPT, *training(rendered, tmp_path / "run", "--restore-from", str(tmp_path / "w.pth")), code=2)
    text = message(done, SCRIPT)
    assert "w.pth fits only" in text and "another --model or --arch" in text and text.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_check_data(rendered, pair, tmp_path, capsys):
    """Good data passes, without a network; every bad file is listed; all of it on the command line too."""
    with pytest.raises(SystemExit) as left:
        script.main(training(pair, tmp_path / "run", "--check-data"))
    assert left.value.code == 0
    assert "fine" in capsys.readouterr().out and not (tmp_path / "run").exists()
    truncate(pair / IMAGE)
    unknown_value(pair / "gta5/labels/00004.png")
    done = execute(SCRIPT, *training(pair, tmp_path / "run", "--check-data"), code=2)
    text = message(done, SCRIPT)
    for fact in ("gta5 (", "2 bad files:", IMAGE, "00004.png: unknown label values 99"):
        assert fact in text
    assert text.count("\n") == 3


def test_a_bad_file_behind_the_checked_sample(rendered, tmp_path):
    """A start reads some 50 files; another that is broken stops the run with its name, from a loader process too."""
    pair = shutil.copytree(rendered, tmp_path / "pair")
    for number in range(6, 110):
        for kind in ("images", "labels"):
            shutil.copy(pair / f"gta5/{kind}/00001.png", pair / f"gta5/{kind}/{number:05}.png")
    checked = set(np.linspace(0, 108, 50).astype(int) + 1)
    for number in set(range(1, 110)) - checked:
        truncate(pair / f"gta5/images/{number:05}.png")
    done = execute(SCRIPT, *training(pair, tmp_path / "run", "--source-only", "--num-steps", "30", "--num-workers", "1",
                                     "--save-pred-every", "999"), code=2, seconds=120)
    text = message(done, SCRIPT)
    assert "the image is broken or truncated" in text and text.count("\n") == 1

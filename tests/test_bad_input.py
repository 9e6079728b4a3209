"""Everything a user can get wrong: one message that names it and exit code 2, no traceback, no hang, nothing accepted.

A row is (script, what is done to the inputs, what the message says). The first function gives further flags; they come
after those of a run that is sound, whose inputs it may spoil.
"""
import argparse
import importlib
import json
import os
import shutil
import signal
import struct
import zlib
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT
from interrupted import TinyNet
from PIL import Image
from scripts import HEIGHT, WIDTH, execute, message, render, training

import lib.flags
import train_adaptsegnet as script
from lib import checkpoint, runtime
from lib.datasets.description import load_description
from lib.demo.persons import render_persons
from lib.errors import UserError
from lib.models.cyclegan import ResnetGenerator
from lib.models.deeplab import build
from lib.models.reid import IDNet
from lib.models.translation import MunitGenerator

SCRIPT = "train_adaptsegnet.py"
SECONDS = 20  # until a row counts as hanging
CLASSES = load_description("demo").classes
META = {"model": "Deeplab", "arch": "resnet18", "aspp": "full", "stride_on": "1x1", "pixels": "imagenet",
        "task": "demo", "classes": list(CLASSES), "size": [WIDTH, HEIGHT], "align_corners": True}
IMAGE, LABEL = "gta5/images/00002.png", "gta5/labels/00002.png"
TARGET = "cityscapes/leftImg8bit/train/northgate/northgate_000001_000019_leftImg8bit.png"
TRUTH = "cityscapes/gtFine/val/lakeside/lakeside_000001_000019_gtFine_labelIds.png"


class Shared:
    """Inputs that are sound, to be read only; made when they are asked for."""

    def __init__(self, root: Path):
        self.root = root

    @cached_property
    def pair(self) -> Path:
        return render(self.root / "pair")

    @cached_property
    def people(self) -> Path:
        return render_persons(self.root / "people", seed=1, people=3, cameras=2, images=2)

    @cached_property
    def segmenter(self) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return build("Deeplab", len(CLASSES), "resnet18", "full").state_dict()

    @cached_property
    def segmenter_file(self) -> str:
        net = build("Deeplab", len(CLASSES), "resnet18", "full")
        net.load_state_dict(self.segmenter)
        checkpoint.save_weights(net, self.root / "segmenter.pth", META)
        return str(self.root / "segmenter.pth")

    @cached_property
    def tiny_file(self) -> str:
        checkpoint.save_weights(TinyNet(len(CLASSES)), self.root / "tiny.pth", META)
        return str(self.root / "tiny.pth")

    @cached_property
    def person_file(self) -> str:
        torch.save({"state_dict": IDNet(3, "resnet18", 8).state_dict()}, self.root / "person.pth.tar")
        return str(self.root / "person.pth.tar")

    @cached_property
    def translator_file(self) -> str:
        for domain in "AB":
            checkpoint.save_weights(ResnetGenerator(4, 6), self.root / f"latest_net_G_{domain}.pth", {})
        return str(self.root / "latest_net_G_A.pth")


class Place:
    """Where one row spoils its own copies."""

    def __init__(self, root: Path, shared: Shared):
        self.root, self.shared, self.run = root, shared, root / "run"

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @cached_property
    def pair(self) -> Path:
        return shutil.copytree(self.shared.pair, self.root / "pair")

    @cached_property
    def people(self) -> Path:
        return shutil.copytree(self.shared.people, self.root / "people")

    @cached_property
    def photos(self) -> Path:
        (self.root / "photos").mkdir()
        for n in range(2):
            self.picture(f"photos/{n}.png")
        return self.root / "photos"

    @cached_property
    def maps(self) -> Path:
        """Predictions for the validation set, all of class 0."""
        (self.root / "maps").mkdir()
        for path in (self.pair / "cityscapes/leftImg8bit/val").rglob("*.png"):
            Image.new("L", (WIDTH, HEIGHT)).save(self.root / "maps" / path.name)
        return self.root / "maps"

    def picture(self, name: str, size: tuple[int, int] = (72, 64)) -> str:
        noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
        Image.fromarray(noise).save(self.root / name)
        return str(self.root / name)

    def text(self, name: str, content: str | bytes) -> str:
        (self.root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(self.root / name)

    def saved(self, value: object, name: str = "w.pth", meta: dict | None = None) -> str:
        if meta is not None:
            value = dict_with_meta(value, meta)
        torch.save(value, self.root / name)
        return str(self.root / name)

    def folder(self, name: str) -> str:
        (self.root / name).mkdir(parents=True, exist_ok=True)
        return str(self.root / name)

    def description(self, data: str = "gta5", **changes) -> str:
        entries = {**json.loads((ROOT / f"lib/datasets/{data}.json").read_text()), **changes}
        return self.text("mine.json", json.dumps(entries))


def dict_with_meta(weights: dict, meta: dict):
    """A state dict that says something of its network."""
    from collections import OrderedDict

    state = OrderedDict(weights)
    state.segadapt = meta
    return state


# --- runs that are sound ----------------------------------------------------------------------------------------------


def segmentation(p: Place) -> list[str]:
    return training(p.pair, p.run)


def multi_level(p: Place) -> list[str]:
    return [*segmentation(p), "--multi-level"]


def pixel_assoc(p: Place) -> list[str]:
    return [*training(p.pair, p.run), "--iter-size", "1", "--batch-size", "1"]


def gan(p: Place) -> list[str]:
    return [*training(p.pair, p.run), "--width", "0.03125", "--padding", "same"]


def cbst(p: Place) -> list[str]:
    return ["--target", "demo", "--data-dir", str(p.pair / "gta5"), "--data-dir-target", str(p.pair / "cityscapes"),
            "--restore-from", p.shared.tiny_file, "--crop-size", f"{WIDTH},{HEIGHT}", "--num-rounds", "2", "--epr", "1",
            "--ds-rate", "2", "--num-workers", "0", "--log-every", "1", "--save-num-images", "0", "--cpu",
            "--ops", "reference", "--collapse", "1", "--snapshot-dir", str(p.run)]


def translation(p: Place) -> list[str]:
    return ["--source", "gta5", "--data-dir", str(p.pair / "gta5"), "--target", "demo", "--data-dir-target",
            str(p.pair / "cityscapes"), "--num-workers", "0", "--log-every", "1", "--save-num-images", "1", "--cpu",
            "--ops", "reference", "--snapshot-dir", str(p.run)]


def munit(p: Place) -> list[str]:
    return [*translation(p), "--max-iter", "1", "--gen-dim", "4", "--dis-dim", "4", "--n-res", "1", "--mlp-dim", "8",
            "--vgg-w", "0", "--new-size", "64", "--crop-image-height", "64", "--crop-image-width", "64"]


def spgan(p: Place) -> list[str]:
    return [*translation(p), "--load_size", "80,72", "--crop_size", "64", "--ngf", "2", "--ndf", "2", "--netG",
            "resnet_6blocks", "--n_epochs", "1", "--n_epochs_decay", "0"]


def ecn(p: Place) -> list[str]:
    return ["-s", "plaza", "-t", "campus", "--data-dir", str(p.people), "--logs-dir", str(p.run), "-a", "resnet18",
            "--features", "16", "--height", "32", "--width", "16", "-b", "4", "-j", "0", "--restore-from", "none",
            "--cpu", "--ops", "reference", "--num-steps", "1"]


def translating(p: Place) -> list[str]:
    return ["--checkpoint", p.shared.translator_file, "--images", str(p.photos), "--out", str(p / "out"), "--cpu"]


def evaluation(p: Place) -> list[str]:
    return ["--restore-from", p.shared.segmenter_file, "--data-dir", str(p.pair / "cityscapes"), "--save",
            str(p / "out"), "--cpu", "--num-workers", "0", "--ops", "reference"]


def evaluation_of_pictures(p: Place) -> list[str]:
    return ["--restore-from", p.shared.segmenter_file, "--images", str(p.photos), "--save", str(p / "out"), "--cpu",
            "--num-workers", "0", "--ops", "reference"]


def evaluation_reid(p: Place) -> list[str]:
    return ["--restore-from", p.shared.person_file, "--data-dir", str(p.people), "-t", "campus", "--height", "32",
            "--width", "16", "-j", "0", "--cpu", "--ops", "reference"]


def iou(p: Place) -> list[str]:
    return [str(p.pair / "cityscapes"), str(p.maps), "--data", "demo"]


def nothing(p: Place) -> list[str]:
    return []


SCRIPTS = {segmentation: "train_adaptsegnet", multi_level: "train_adaptsegnet", pixel_assoc: "train_pixel_assoc",
           gan: "train_gan_da", cbst: "train_cbst", munit: "train_munit", spgan: "train_spgan", ecn: "train_ecn",
           translating: "translate", evaluation: "evaluate", evaluation_of_pictures: "evaluate",
           evaluation_reid: "evaluate_reid", iou: "compute_iou"}


# --- ways to spoil something ------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def resize(path: Path) -> None:
    Image.open(path).resize((30, 20)).save(path)


def put(path: Path, array: np.ndarray) -> None:
    """An image of another kind in the place of a file; TIFF where PNG cannot hold it."""
    Image.fromarray(array).save(path, "TIFF" if array.dtype == np.float32 else "PNG")


def fill_values(path: Path, value: int, part: slice = slice(None)) -> None:
    label = np.asarray(Image.open(path)).copy()
    label[part, part] = value
    Image.fromarray(label).save(path)


def void_labels(p: Place) -> None:
    for path in (p.pair / "gta5/labels").iterdir():
        fill_values(path, 0)


def bomb(path: Path) -> None:
    """A PNG that says 60000 x 60000 pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))


def no_truth(p: Place) -> list[str]:
    shutil.rmtree(p.pair / "cityscapes/gtFine/val")
    return ["--val-set", "val"]


def one_class(p: Place) -> list[str]:
    classes = [{"name": "road", "color": [0, 0, 0], "ids": [7]}]
    return ["--source", p.description(classes=classes, void=[i for i in range(256) if i != 7], subsets={})]


def misspelt_class(p: Place) -> list[str]:
    return ["--target", p.description("demo", maps={"gta5": {"treee": "vegetation"}})]


def source(**changes) -> Callable[[Place], list[str]]:
    return lambda p: ["--source", p.description(**changes)]


def listed(text: str | bytes) -> Callable[[Place], list[str]]:
    return lambda p: ["--data-list", p.text("list.txt", text)]


def flags(*texts: str) -> Callable[[Place], list[str]]:
    return lambda p: list(texts)


def restored(change: Callable[[dict], object], meta: dict | None = None,
             flag: str = "--restore-from") -> Callable[[Place], list[str]]:
    """Weights of the Deeplab of this run, changed; meta: what the file says of them."""
    return lambda p: [flag, p.saved(change(dict(p.shared.segmenter)), meta=meta)]


def said(flag: str = "--restore-from", **meta) -> Callable[[Place], list[str]]:
    return restored(lambda w: w, {**META, **meta}, flag)


def without(*prefixes: str) -> Callable[[dict], dict]:
    return lambda w: {k: v for k, v in w.items() if not k.startswith(prefixes)}


def spoilt_resume(change: Callable[[dict], object]) -> Callable[[Place], list[str]]:
    def spoil(p: Place) -> list[str]:
        state = checkpoint.load(p.run / "resume.pth")
        changed = change(state)
        torch.save(state if changed is None else changed, p.run / "resume.pth")
        return ["--resume"]
    return spoil


def lacking(key: str) -> Callable[[Place], list[str]]:
    return spoilt_resume(lambda state: {k: v for k, v in state.items() if k != key})


def spoilt_log(text: bytes) -> Callable[[Place], list[str]]:
    def spoil(p: Place) -> list[str]:
        with open(p.run / "log.jsonl", "ab") as file:
            file.write(text)
        return ["--resume"]
    return spoil


def features(**changes) -> Callable[[Place], list[str]]:
    """What evaluate_reid.py --save-features writes, changed; None leaves an array out."""
    def make(p: Place) -> list[str]:
        arrays = {"root": "x"}
        for part in ("query", "gallery"):
            arrays |= {f"{part}_features": np.eye(4, dtype=np.float32), f"{part}_ids": np.arange(4),
                       f"{part}_cams": np.full(4, part == "query", int),
                       f"{part}_files": np.array([f"{part}{n}.jpg" for n in range(4)])}
        arrays = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
        np.savez(p / "features.npz", **arrays)
        return ["--features", str(p / "features.npz"), "--cpu"]
    return make


class Row(NamedTuple):
    command: Callable[[Place], list[str]]           # a sound run
    spoil: Callable[[Place], "list[str] | None"]    # spoils its inputs, gives more flags
    facts: tuple[str, ...]                          # in the message
    kind: str = ""                                  # "tiny": with TinyNet; "resumed": after a run of two steps with it


ROWS: dict[str, Row] = {}


def rows(prefix: str, command: Callable, table: dict[str, tuple], kind: str = "") -> None:
    for name, (spoil, *facts) in table.items():
        assert f"{prefix}: {name}" not in ROWS
        ROWS[f"{prefix}: {name}"] = Row(command, spoil, tuple(facts), kind)


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


# --- data sets --------------------------------------------------------------------------------------------------------

rows("data", segmentation, {
    "missing source folder": (lambda p: ["--data-dir", str(p / "nowhere")], "nowhere: no such folder",
                              "should hold the data set 'gta5'"),
    "missing target folder": (lambda p: ["--data-dir-target", str(p / "nowhere")], "nowhere: no such folder",
                              "should hold the data set 'demo'"),
    "folder is a file": (lambda p: ["--data-dir", p.text("file", "x")], "file: no such folder"),
    "folder of 5000 letters": (flags("--data-dir", "x" * 5000), "no such folder"),
    "missing label": (lambda p: (p.pair / LABEL).unlink(), f"{IMAGE}: its label", f"{LABEL} does not exist"),
    "missing validation label": (lambda p: (p.pair / TRUTH).unlink(), TRUTH, "does not exist"),
    "size mismatch": (lambda p: resize(p.pair / TRUTH), "is 64x48, but its label", TRUTH, "is 30x20"),
    "unknown label value": (lambda p: fill_values(p.pair / LABEL, 99, slice(2)), f"{LABEL}: unknown label values 99",
                            "'gta5'"),
    "label of colours": (lambda p: put(p.pair / LABEL, np.zeros((HEIGHT, WIDTH, 3), np.uint8)), LABEL, "RGB"),
    "labels that are all void": (void_labels, "labels", "has a pixel of any class"),
    "truncated image": (lambda p: truncate(p.pair / IMAGE), f"{IMAGE}: the image is broken or truncated"),
    "truncated label": (lambda p: truncate(p.pair / LABEL), f"{LABEL}: not an image that can be read"),
    "truncated target": (lambda p: truncate(p.pair / TARGET), f"{TARGET}: the image is broken or truncated"),
    "empty image": (lambda p: (p.pair / IMAGE).write_bytes(b""), f"{IMAGE}: not an image that can be read"),
    "not an image": (lambda p: (p.pair / IMAGE).write_text("x"), f"{IMAGE}: not an image that can be read"),
    "image is a folder": (lambda p: ((p.pair / IMAGE).unlink(), (p.pair / IMAGE).mkdir()), IMAGE),
    "image of floats": (lambda p: put(p.pair / IMAGE, np.ones((HEIGHT, WIDTH), np.float32)), IMAGE, "floating-point"),
    "image of 3.6 thousand million pixels": (lambda p: bomb(p.pair / IMAGE), IMAGE, "million pixels"),
    "target of floats": (lambda p: put(p.pair / TARGET, np.ones((HEIGHT, WIDTH), np.float32)), TARGET,
                         "floating-point"),
    "label of floats": (lambda p: put(p.pair / LABEL, np.ones((HEIGHT, WIDTH), np.float32)), LABEL,
                        "8-bit class value"),
    "label of 3.6 thousand million pixels": (lambda p: bomb(p.pair / LABEL), LABEL, "million pixels"),
    "truth of 3.6 thousand million pixels": (lambda p: bomb(p.pair / TRUTH), TRUTH, "million pixels"),
    "no label of the validation set": (no_truth, "2 bad files", "does not exist"),
    "set of 5000 letters": (flags("--set", "x" * 5000), "no image of the set"),
    "set out of the root": (flags("--set", "../../../gta5"), "no image of the set"),
    "no image": (lambda p: shutil.rmtree(p.pair / "gta5/images"), "gta5: no image of the set", "images/*.png"),
    "no such set": (flags("--set", "trainx"), "no image of the set 'trainx'"),
    "set with a slash": (flags("--val-set", "../x"), "'../x'"),
    "overlap": (flags("--set", "val"), "2 images belong to both the training set", "choose another --set"),
    "no such class count": (flags("--num-classes", "5"), "no choice of 5 classes; it has 14"),
    "ignore label that is a class": (flags("--ignore-label", "3"), "the label to ignore, 3, is the index of the class"),
    "too small for D": (flags("--adapt", "feature"), "at least 256x256", "--input-size"),
    "too small for D's output": (flags("--input-size", "1,1"), "at least 32x32", "--input-size"),
})
rows("list", segmentation, {
    "empty": (listed("\n"), "list.txt: the list is empty", "one image a line"),
    "missing": (lambda p: ["--data-list-target", str(p / "no.txt")], "no.txt: no such file"),
    "a folder": (lambda p: ["--data-list", p.folder("list")], "list", "cannot be read"),
    "of nothing": (listed("00009.png\n"), "1 of 1 images do not exist", "00009"),
    "lines of 5000 letters": (listed("x" * 5000), "1 of 1 images do not exist"),
    "a slash": (listed("/\n"), "images do not exist"),
    "two dots": (listed("..\n"), "images do not exist"),
    "a folder's name": (listed("images\n"), "images do not exist"),
    "a picture": (lambda p: ["--data-list", str(p.pair / IMAGE)], "00002.png: not a UTF-8 text file"),
    "out of the root": (listed("../../" + TRUTH + "\n"), "has no label: it does not match the pattern"),
    "a dot": (listed(".\n"), "images do not exist"),
    "null characters": (listed(b"a\0b.png\n"), "images do not exist"),
    "not UTF-8": (listed(b"\xff\xfe\x00x"), "list.txt: not a UTF-8 text file"),
    "name of 300 letters": (lambda p: ["--data-list", str(p / ("l" * 300))], "cannot be read"),
})
rows("description", segmentation, {
    "unknown": (flags("--source", "gta"), "no data set 'gta'", "gta5", "path of a .json"),
    "of 5000 letters": (flags("--source", "g" * 5000), "no data set 'ggg"),
    "not JSON": (lambda p: ["--source", p.text("mine.json", "{")], "mine.json: not JSON", "line 1"),
    "not UTF-8": (lambda p: ["--source", p.text("mine.json", b"{\xff}")], "mine.json: not a UTF-8 text file"),
    "a list": (lambda p: ["--source", p.text("mine.json", "[]")], "mine.json", "one JSON object"),
    "a text": (lambda p: ["--source", p.text("mine.json", '"x"')], "mine.json", "one JSON object"),
    "nested 100,000 deep": (lambda p: ["--source", p.text("mine.json", "[" * 100000)], "mine.json: not"),
    "a number of 6,000 digits": (lambda p: ["--source", p.text("mine.json", '{"size": ' + "9" * 6000 + "}")],
                                 "mine.json: not usable"),
    "without a key": (lambda p: ["--source", p.text("mine.json", '{"name": "x"}')], "the key 'root' is missing"),
    "an unknown key": (source(colour=1), "unknown key 'colour'"),
    "a size of one number": (source(size=[1]), "mine.json: 'size' must be"),
    "a size of 10^6": (source(size=[10**6, 10**6]), "mine.json: 'size' must be"),
    "a name that leaves its folder": (source(name="../x"), "'name' becomes part of file names"),
    "an empty name": (source(name=""), "'name'"),
    "no classes": (source(classes=[]), "'classes' must list"),
    "classes of another kind": (source(classes=[1, 2]), "class 0 has no 'name'"),
    "a label value of 256": (source(classes=[{"name": "a", "color": [0, 0, 0], "ids": [256]}], void=[]),
                             "integer 0..255, not 256"),
    "one class": (one_class, "fewer than two classes", "'demo' has road", "'gta5' has road"),
    "a misspelt class in maps": (misspelt_class, "'maps' of the data set", "treee", "no class of 'gta5'"),
    "maps to no class": (lambda p: ["--target", p.description("demo", maps={"gta5": {"road": "raod"}})],
                         "'road' becomes 'raod', no class here"),
    "unknown encoding": (source(encoding="png"), "unknown 'encoding' 'png'"),
    "no placeholder": (source(images="images/1.png"), "'images' must hold a placeholder"),
    "a null character": (source(root="\0"), "a character that no path can"),
    "a folder": (lambda p: ["--source", p.folder("set")], "no data set"),
    "a size of nothing": (source(size=[0, 5]), "'size' must be"),
    "broken braces": (source(images="images/{stem.png"), "'images': a placeholder is a name in braces"),
    "sets of another kind": (source(sets=["train"]), "'sets' must name the sets"),
    "ignore that is a class": (source(ignore=3), "'ignore' must be a value"),
})
for name, command in (("cbst", cbst), ("pixel_assoc", pixel_assoc), ("gan_da", gan)):
    rows(f"{name} data", command, {
        "missing label": (lambda p: (p.pair / LABEL).unlink(), f"{IMAGE}: its label", f"{LABEL} does not exist"),
        "truncated image": (lambda p: truncate(p.pair / IMAGE), f"{IMAGE}: the image is broken or truncated"),
        "labels that are all void": (void_labels, "labels", "has a pixel of any class"),
        "misspelt class": (misspelt_class, "'maps' of the data set", "treee"),
        "missing folder": (lambda p: ["--data-dir-target", str(p / "nowhere")], "nowhere: no such folder"),
    })

# --- flags ------------------------------------------------------------------------------------------------------------

# a type of lib/flags.py each, and nan, which compares as false with everything
for flag, text in (("--batch-size", "0"), ("--batch-size", "1000000"), ("--num-steps", "1e3"), ("--num-workers", "-1"),
                   ("--num-workers", "5000"), ("--ignore-label", "256"), ("--learning-rate", "-1"),
                   ("--learning-rate", "nan"), ("--lambda-seg", "inf"), ("--momentum", "1"), ("--input-size", "96"),
                   ("--input-size", "0,48"), ("--input-size", "1000000,1000000"), ("--input-size", "\u0663,\u0663x"),
                   ("--random-seed", str(2**64)), ("--random-seed", "-1"), ("--save-num-images", "1000000"),
                   ("--log-every", "0"), ("--save-pred-every", "-5"), ("--gpu", "-1"), ("--num-classes", "x"),
                   ("--iter-size", "9" * 5000)):
    rows("flag", segmentation, {f"{flag} {text[:20]}": (flags(flag, text), f"argument {flag}", "expected ")})
rows("flags", segmentation, {
    "1 x 1 pixels": (flags("--source-only", "--input-size", "1,1"), "at least 17x17"),
    "unknown": (flags("--learningrate", "1"), "unrecognized arguments: --learningrate"),
    "unknown architecture": (flags("--arch", "resnet34"), "--arch", "invalid choice: 'resnet34'", "mobilenet_v2"),
    "ends after the decay": (flags("--num-steps-stop", "3"), "--num-steps-stop must be 1..2"),
    "feature adaptation of two levels": (flags("--adapt", "feature", "--multi-level"), "--adapt feature"),
})
for name, command, pairs in (
        ("cbst", cbst, [("--init-tgt-port", "1.1"), ("--eval-scale", "1e5"), ("--test-scales", "1e-9"),
                        ("--test-scales", "0.9,x"), ("--crop-size", "1000000,1000000"), ("--random-seed", str(2**32)),
                        ("--num-rounds", "0"), ("--num-rounds", "1000000000"), ("--ds-rate", "0"),
                        ("--mr-weight-kld", "nan"), ("--subset", "0")]),
        ("pixel_assoc", pixel_assoc, [("--crop-size", "1000000,1000000"), ("--alpha", "2"), ("--resize-short", "0,5"),
                                      ("--test-size", "1,1000000")]),
        ("gan_da", gan, [("--width", "1e6"), ("--width", "0"), ("--dropout", "1"), ("--crop-size", "1000000,1000000"),
                         ("--batchSize", "1000000")]),
        ("munit", munit, [("--gen-dim", "1000000"), ("--n-res", "100000"), ("--batch-size", "1000000"),
                          ("--crop-image-height", "1000000"), ("--new-size", "1000000000"), ("--style-dim", "0"),
                          ("--num-scales", "1000"), ("--gamma", "0"), ("--mlp-dim", "1000000000")]),
        ("spgan", spgan, [("--ngf", "1000000"), ("--ndf", "0"), ("--load_size", "1000000"), ("--pool_size", "-1"),
                          ("--crop_size", "x"), ("--n_layers_D", "1000"), ("--batch-size", "1000000"),
                          ("--lambda_A", "nan")]),
        ("ecn", ecn, [("--height", "1000000"), ("--width", "0"), ("--features", "1000000000"), ("-j", "5000"),
                      ("-b", "1000000"), ("--lmd", "2"), ("--inv-beta", "0"), ("--re", "-1")]),
        ("translate", translating, [("--width", "1000000"), ("--short-side", "0"), ("--tile", "-1"), ("--seed", "x"),
                                    ("--num-style", "1000000")]),
        ("evaluate", evaluation, [("--size", "1000000,1000000"), ("--scales", "1e-9"), ("--scales", ""),
                                  ("--scales", "1e5"), ("--num-workers", "5000"), ("--aggregate", "2")]),
        ("evaluate_reid", evaluation_reid, [("--height", "1000000"), ("-b", "1000000"), ("-j", "5000"), ("--k1", "0"),
                                            ("--lambda", "nan")]),
        ("compute_iou", iou, [("--workers", "0")])):
    for flag, text in pairs:
        rows(f"{name} flag", command, {f"{flag} {text}": (flags(flag, text), f"argument {flag.split('=')[0]}"
                                                          if flag.startswith("--") else f"argument {flag}")})

# --- weights ----------------------------------------------------------------------------------------------------------

PARTIAL = {"conv1.weight": torch.ones(64, 3, 7, 7), "other": torch.ones(1)}
WEIGHTS = {
    "missing": (lambda p: ["--restore-from", str(p / "no.pth")], "no.pth does not exist"),
    "a folder": (lambda p: ["--restore-from", p.folder("w")], "w is a folder"),
    "a web page": (lambda p: ["--restore-from", p.text("w.pth", "<html>")], "w.pth is not a checkpoint"),
    "an empty file": (lambda p: ["--restore-from", p.text("w.pth", "")], "w.pth cannot be read"),
    "half a file": (lambda p: (shutil.copy(p.shared.segmenter_file, p / "w.pth"), truncate(p / "w.pth"),
                               ["--restore-from", str(p / "w.pth")])[2], "w.pth cannot be read"),
    "Python objects": (lambda p: ["--restore-from", p.saved({"x": argparse.Namespace()})], "could run code"),
    "a list": (lambda p: ["--restore-from", p.saved([1, 2])], "holds no state dict"),
    "no tensors": (lambda p: ["--restore-from", p.saved({"a": 1})], "holds no state dict"),
    "integer keys": (lambda p: ["--restore-from", p.saved({0: torch.ones(1)})], "w.pth", "numbers instead of names"),
    "another network": (lambda p: ["--restore-from", p.saved(PARTIAL)], "w.pth fits only", "--arch"),
    "AlexNet": (lambda p: ["--restore-from", p.saved({
        "features.0.weight": torch.ones(64, 3, 11, 11), "features.0.bias": torch.ones(64),
        "classifier.1.weight": torch.ones(8, 8), "classifier.6.weight": torch.ones(2, 8)})], "w.pth"),
    "odd keys beside a classifier": (lambda p: ["--restore-from", p.saved({
        "classifier.6.weight": torch.ones(2, 2), "featuresx.weight": torch.ones(1)})], "w.pth"),
    "NaN": (restored(lambda w: {**w, "layer1.0.conv1.weight": w["layer1.0.conv1.weight"] * float("nan")}),
            "w.pth holds NaN", "layer1.0.conv1.weight"),
}
rows("weights", segmentation, WEIGHTS)
rows("weights pixel_assoc", pixel_assoc, {key: WEIGHTS[key] for key in ("missing", "integer keys", "another network",
                                                                        "AlexNet")})
rows("weights gan_da", gan, {key: WEIGHTS[key] for key in ("missing", "integer keys", "another network", "AlexNet",
                                                           "odd keys beside a classifier")})
rows("weights cbst", cbst, {
    **{key: WEIGHTS[key] for key in ("missing", "integer keys", "odd keys beside a classifier", "NaN")},
    "another network": (WEIGHTS["another network"][0], "no segmentation network is recognised"),
    "a scalar head": (restored(lambda w: {**w, "layer5.conv2d_list.0.weight": torch.tensor(1.0)}), "recognised"),
    "no class": (restored(lambda w: {**w, "layer5.conv2d_list.0.weight": torch.ones(0, 512, 3, 3)}), "w.pth"),
    "unknown pixels": (said(pixels="rgb"), "pixels = 'rgb'"),
    "unknown aspp": (said(aspp="half"), "aspp = 'half'"),
    "classes of another count": (said(classes=["road"]), "w.pth names 1 classes, but its head has 14"),
    "other classes": (said(classes=[f"c{n}" for n in range(14)]), "tells 14 classes apart"),
    "metadata of another kind": (said(stride_on=3), "stride_on = 3"),
})
rows("weights evaluate", evaluation, {
    **{key: WEIGHTS[key] for key in ("missing", "half a file", "Python objects", "integer keys", "NaN")},
    "a scalar head": (restored(lambda w: {**w, "layer5.conv2d_list.0.weight": torch.tensor(1.0)}), "recognised"),
    "half of a network": (restored(without("layer4", "layer3")), "w.pth"),
    "without a bias": (restored(without("layer5.conv2d_list.3.bias")), "w.pth does not fill the network"),
    "a size of text": (said(size="large"), "size = 'large'"),
    "a size of 10^9": (said(size=[10**9, 10**9]), "size = "),
    "an unknown task": (said(task="moon"), "no data set 'moon'"),
    "a task of another kind": (said(task=["demo"]), "task = "),
    "a class twice": (said(classes=["road"] * 14), "w.pth", "classes"),
    "an unknown model": (said(model="UNet"), "UNet"),
    "a model of another kind": (said(model=["UNet"]), "UNet"),
    "an architecture of another kind": (said(arch={}), "arch = {}"),
    "a width of text": (said(model="FCN8s", width="wide"), "width = 'wide'"),
    "other statistics": (said(bn_stats="source"), "bn_stats = 'source'"),
    "a share above 1": (said(aggregate=3), "aggregate = 3"),
})
rows("weights translate", translating, {
    "missing": (lambda p: ["--checkpoint", str(p / "no.pth")], "no.pth does not exist"),
    "a list": (lambda p: ["--checkpoint", p.saved([1])], "holds no networks"),
    "an empty dict": (lambda p: ["--checkpoint", p.saved({})], "w.pth holds no generator"),
    "integer keys": (lambda p: ["--checkpoint", p.saved({0: torch.ones(1)})], "w.pth"),
    "a segmenter": (lambda p: ["--checkpoint", p.shared.segmenter_file], "segmenter.pth", "generator"),
    "half of MUNIT": (lambda p: ["--checkpoint", p.saved({"a": {"x": torch.ones(1)}, "b": {}})], "w.pth"),
    "a layer less": (lambda p: ["--checkpoint", p.saved({k: v for k, v in ResnetGenerator(4, 6).state_dict().items()
                                                         if not k.startswith("model.10.")})], "w.pth"),
    "a scale of text": (lambda p: ["--checkpoint", p.saved(ResnetGenerator(4, 6).state_dict(), meta={"scale": "big"})],
                        "w.pth", "scale"),
    "one direction": (lambda p: ["--checkpoint", p.saved(ResnetGenerator(4, 6).state_dict()), "--a2b", "0"],
                      "w.pth is one direction only"),
    "the other direction is missing": (lambda p: ["--checkpoint", p.saved(
        ResnetGenerator(4, 6).state_dict(), "latest_net_G_A.pth"), "--a2b", "0"], "latest_net_G_B.pth does not exist"),
    "a MUNIT size of text": (lambda p: ["--checkpoint", p.saved({
        d: dict_with_meta(MunitGenerator(dim=4, n_res=1, mlp_dim=8).state_dict(), {"new_size": "x"})
        for d in "ab"})], "w.pth", "new_size"),
})
for name, command in (("evaluate_reid", evaluation_reid), ("ecn", ecn)):
    rows(f"weights {name}", command, {
        "missing": WEIGHTS["missing"],
        "integer keys": WEIGHTS["integer keys"],
        "another network": (lambda p: ["--restore-from", p.saved({"a.weight": torch.ones(2, 2)})], "w.pth"),
    })
rows("weights evaluate_reid", evaluation_reid, {
    "a scalar classifier": (lambda p: ["--restore-from", p.saved({
        **IDNet(3, "resnet18", 8).state_dict(), "classifier.weight": torch.tensor(1.0)})], "w.pth"),
})

# --- going on, and files to write -------------------------------------------------------------------------------------

rows("resume", multi_level, {
    "no file": (lambda p: (p.run / "resume.pth").write_bytes(b"") and None or ["--resume"], "resume.pth"),
    "weights": (spoilt_resume(lambda s: s["net"]), "resume.pth is no resume file of this script"),
    "a list": (spoilt_resume(lambda s: [1]), "resume.pth is no resume file"),
    "a list of arguments": (spoilt_resume(lambda s: s.update(arguments=[1])), "resume.pth is no resume file"),
    "no random state": (lacking("rng"), "resume.pth does not hold a whole run", "rng"),
    "no iteration": (lacking("iteration"), "resume.pth does not hold a whole run"),
    "iteration of text": (spoilt_resume(lambda s: s.update(iteration="x")), "resume.pth does not hold a whole run"),
    "iteration below 0": (spoilt_resume(lambda s: s.update(iteration=-3)), "resume.pth"),
    "no tensor": (spoilt_resume(lambda s: s["net"].__delitem__("conv1.weight")), "resume.pth does not hold",
                  "conv1.weight"),
    "no discriminator": (spoilt_resume(lambda s: s["others"].__delitem__(-1)), "resume.pth does not hold"),
    "no optimiser": (spoilt_resume(lambda s: s.update(optimizers=[])), "resume.pth does not hold"),
    "validation of text": (spoilt_resume(lambda s: s.update(validation="x")), "resume.pth"),
    "validation that lacks something": (spoilt_resume(lambda s: s.update(validation={"best": None})), "resume.pth"),
    "another run": (flags("--resume", "--learning-rate", "1"), "another run", "--learning-rate was 0.00025, is 1.0"),
    "a broken log": (spoilt_log(b"{\n"), "log.jsonl, line", "not a line of a run's log"),
    "a log without iteration": (spoilt_log(b"{}\n"), "log.jsonl, line", "not a line"),
    "a log of lists": (spoilt_log(b"[1]\n"), "log.jsonl, line", "not a line"),
    "a log of text as iteration": (spoilt_log(b'{"iteration": "x"}\n'), "log.jsonl, line", "not a line"),
    "a log that is not UTF-8": (spoilt_log(b"\xff\n"), "log.jsonl: the log cannot be read"),
    "an earlier run": (flags(), "run holds an earlier run", "--resume", "--snapshot-dir", "--overwrite"),
}, kind="resumed")
rows("resume others", spgan, {
    "no extra state": (flags("--resume", "--max-gradient", "nan"), "argument --max-gradient"),
    "a broken file": (lambda p: (p.run.mkdir(), (p.run / "resume.pth").write_bytes(b"PK"))[0] or ["--resume"],
                      "resume.pth cannot be read"),
})
rows("resume gan_da", gan, {
    "missing": (lambda p: ["--resume", str(p / "no.pth")], "no.pth: no such file"),
    "weights": (lambda p: ["--resume", p.shared.tiny_file], "is no resume file"),
})
rows("resume ecn", ecn, {
    "weights": (lambda p: ["--resume", p.shared.tiny_file], "tiny.pth"),
    "missing": (lambda p: ["--resume", str(p / "no.tar")], "no.tar"),
})
for name, command in (("adaptsegnet", segmentation), ("cbst", cbst), ("pixel_assoc", pixel_assoc), ("gan_da", gan)):
    rows(f"output {name}", command, {
        "a file as folder": (lambda p: (p.run.write_text("x"), None)[1], "run"),
        "a folder of 300 letters": (lambda p: ["--snapshot-dir", str(p / ("s" * 300))], "sss"),
    }, kind="tiny")
rows("output", segmentation, {
    "pictures that are a file": (lambda p: (p.run.mkdir(), p.text("run/pictures", "x"), ["--save-num-images", "1"])[2],
                                 "pictures"),
    "a log that is a folder": (lambda p: p.folder("run/log.jsonl") and None, "log.jsonl"),
    "a best.pth that is a folder": (lambda p: p.folder("run/best.pth") and None, "best.pth"),
    "an infinite loss": (flags("--learning-rate", "1e38", "--num-steps", "4"), "iteration", "learning-rate"),
    "TensorBoard's folder is a file": (lambda p: ["--tensorboard", "--log-dir", p.text("file", "x")], "file"),
}, kind="tiny")
rows("output gan_da", gan, {
    "reconstructions that are a file": (
        lambda p: (p.run.mkdir(), p.text("run/reconstructions", "x"), ["--save-num-images", "1"])[2],
        "reconstructions"),
})
rows("output cbst", cbst, {
    "braces in the folder": (lambda p: ["--snapshot-dir", str(p / "{stem}")], "{stem}", "brace"),
    "a prior of text": (lambda p: ["--spatial-prior", p.text("prior.npz", "x")], "prior.npz"),
    "a prior of letters": (lambda p: (np.savez(p / "prior.npz", prior_array=np.array(["a"])),
                                      ["--spatial-prior", str(p / "prior.npz")])[1], "prior.npz"),
    "a prior of another size": (lambda p: (np.savez(p / "prior.npz", prior_array=np.ones((14, 4, 4), np.float32)),
                                           ["--spatial-prior", str(p / "prior.npz")])[1], "prior.npz is 4x4"),
    "a missing prior": (lambda p: ["--spatial-prior", str(p / "no.npz")], "no.npz"),
    "crops of a pixel": (flags("--is-training", "--crop-size", "1,1"), "at least 17x17"),
    "no start": (lambda p: ["--restore-from", ""], "--restore-from FILE is needed"),
    "more images than there are": (flags("--subset", "99"), "--subset 99: the target has 4 images"),
    "a network that sees one class": (flags("--collapse", "0.0001"), "has collapsed", "--collapse"),
}, kind="tiny")
rows("sizes", pixel_assoc, {
    "2 x 2": (flags("--input-size", "2,2", "--input-size-target", "2,2"), "--input-size"),
    "one of two": (flags("--input-size-target", "64,48", "--input-size", "1,1"), "--input-size"),
    "minimum above maximum": (flags("--resize-short", "9,5"), "--resize-short takes the minimum"),
    "ends after the decay": (flags("--num-steps-stop", "3"), "after the decay reaches 0"),
}, kind="tiny")
rows("sizes gan_da", gan, {
    "1 x 1 for DeepLab": (flags("--base", "deeplab", "--input-size", "1,1"), "at least 17x17"),
    "graphs of another order": (flags("--order", "released", "--low-memory"), "--order released"),
})

# --- translation ------------------------------------------------------------------------------------------------------

for name, command in (("munit", munit), ("spgan", spgan)):
    rows(f"{name} data", command, {
        "no such data set": (flags("--source", "gta"), "no data set 'gta'"),
        "truncated image": (lambda p: truncate(p.pair / IMAGE), f"{IMAGE}: the image is broken or truncated"),
        "missing folder": (lambda p: ["--data-dir", str(p / "nowhere")], "nowhere: no such folder"),
        "two kinds of data": (lambda p: ["--data-root", str(p.photos)], "one kind of data only"),
        "both domains alike": (lambda p: ["--target", "gta5", "--data-dir-target", str(p.pair / "gta5")],
                               "in both domains"),
        "image of floats": (lambda p: put(p.pair / IMAGE, np.ones((HEIGHT, WIDTH), np.float32)), IMAGE,
                            "floating-point"),
        "segmenter without a weight": (lambda p: ["--segmenter", p.shared.segmenter_file], "--segmenter"),
    })
rows("munit", munit, {
    "crop of 50": (flags("--crop-image-height", "50"), "--crop-image-height 50"),
    "crop larger than the picture": (flags("--new-size", "70", "--crop-image-width", "128"), "smaller than the crop"),
    "configuration missing": (lambda p: ["--config", str(p / "no.yaml")], "no.yaml: cannot be read"),
    "configuration not YAML": (lambda p: ["--config", p.text("c.yaml", "a: [")], "c.yaml: cannot be read"),
    "configuration of a list": (lambda p: ["--config", p.text("c.yaml", "- a")], "KEY: VALUE"),
    "unknown key": (lambda p: ["--config", p.text("c.yaml", "colour: 1")], "1 key not known here: colour"),
    "value of another kind": (lambda p: ["--config", p.text("c.yaml", "batch_size: many")], "--batch-size", "many"),
    "weights of another network": (lambda p: ["--restore-from", p.saved({"a": {}, "b": {}}, "gen_00000001.pt")],
                                   "gen_00000001.pt"),
    "weights of a segmenter": (lambda p: ["--restore-from", p.shared.segmenter_file], "segmenter.pth"),
})
rows("spgan", spgan, {
    "crop of 30": (flags("--crop_size", "30"), "--crop_size 30,30"),
    "crop larger than the picture": (flags("--load_size", "60", "--crop_size", "64"), "smaller than the crop"),
    "no epochs": (flags("--n_epochs", "0"), "--epoch_count 1: there are 0 epochs"),
    "weights of nothing": (flags("--continue_train", "--epoch", "7"), "7_net_"),
    "no such re-ID set": (lambda p: ["--cameras", "plaza", "--data-dir", str(p / "nowhere")], "plaza"),
})
rows("translate", translating, {
    "no picture": (lambda p: ["--images", p.folder("none")], "none: no picture"),
    "missing folder": (lambda p: ["--images", str(p / "nowhere")], "nowhere: no such folder"),
    "truncated picture": (lambda p: truncate(p.photos / "1.png"), "1.png: the image is broken or truncated"),
    "the originals' folder": (lambda p: ["--out", str(p.photos)], "is the folder of the originals"),
    "two of one name": (lambda p: (p.photos, p.picture("photos/1.jpg"))[1] and None, "would be written as 1.png"),
    "out is a file": (lambda p: ["--out", p.text("file", "x")], "file"),
    "styles of CycleGAN": (flags("--num-style", "3"), "has no styles"),
    "pictures and a data set": (flags("--source", "gta5"), "give one of --images, --source and --cameras"),
    "the record of nothing": (lambda p: (p.folder("out"), p.text("out/translate.json", "["))[0] and None,
                              "translate.json"),
    "a record of another kind": (lambda p: (p.folder("out"), p.text("out/translate.json", "[1]"))[0] and None,
                                 "translate.json"),
    "a judge that is none": (lambda p: ["--judge", p.saved({"a": torch.ones(1)})], "w.pth", "recognised"),
    "a list of nothing": (lambda p: ["--data-list", p.text("list.txt", "9.png")], "1 of 1 images do not exist"),
    "a picture of 1 x 3000": (lambda p: (p.photos, p.picture("photos/thin.png", (1, 3000)))[1] and None, "thin.png"),
})

# --- re-identification ------------------------------------------------------------------------------------------------

QUERY = "campus/query"
for name, command in (("ecn", ecn), ("evaluate_reid", evaluation_reid)):
    rows(f"{name} data", command, {
        "no such set": (flags("-t", "mars"), "no data set mars"),
        "a name without identity": (lambda p: p.picture(f"people/{QUERY}/x.jpg") if p.people else None, "x.jpg"),
        "truncated image": (lambda p: truncate(sorted((p.people / QUERY).iterdir())[0]), "broken or truncated"),
        "not an image": (lambda p: sorted((p.people / QUERY).iterdir())[0].write_text("x") and None,
                         "not an image that can be read"),
    })
rows("ecn", ecn, {
    "no training images": (lambda p: shutil.rmtree(p.people / "plaza/bounding_box_train"), "bounding_box_train"),
    "no camera styles": (flags("--camstyle-dir", "nowhere"), "no camera styles"),
    "no style images": (flags("--no-camstyle", "--camstyle", "2", "--camstyle-dir", "nowhere"), "no style images"),
    "a batch of one": (flags("-b", "1"), "at least 2 images"),
    "alpha above 1": (flags("--inv-alpha", "9", "--num-steps", "900"), "--inv-alpha 9"),
    "a preset of another method": (flags("--preset", "spgan"), "--preset spgan"),
})
rows("evaluate_reid", evaluation_reid, {
    "no queries": (lambda p: shutil.rmtree(p.people / QUERY), "query"),
    "json into nowhere": (lambda p: ["--json", str(p / "nowhere/s.json")], "its folder does not exist"),
    "json that is a folder": (lambda p: ["--json", p.folder("s.json")], "s.json"),
    "json of 300 letters": (lambda p: ["--json", str(p / ("j" * 300))], "jjj"),
    "features into a folder": (lambda p: ["--save-features", p.folder("f.npz")], "f.npz"),
    "panels into a file": (lambda p: ["--save-ranks", "1", "--save", p.text("file", "x")], "file"),
})
rows("features", nothing, {
    "neither": (flags("--cpu"), "one of the arguments --restore-from/--resume --features is required"),
    "missing": (lambda p: ["--features", str(p / "no.npz"), "--cpu"], "no.npz"),
    "text": (lambda p: ["--features", p.text("f.npz", "x"), "--cpu"], "f.npz: not a file that --save-features wrote"),
    "without ids": (features(query_ids=None), "there is no array query_ids"),
    "whole numbers": (features(query_features=np.eye(4, dtype=int)), "expected floats"),
    "NaN": (features(gallery_features=np.full((4, 4), np.nan, np.float32)), "NaN"),
    "two widths": (features(query_features=np.ones((4, 3), np.float32)), "queries have 3 numbers each, the gallery 4"),
    "ids of text": (features(query_ids=np.array(list("abcd"))), "query"),
    "a count less": (features(gallery_cams=np.zeros(3, int)), "3 cams"),
    "no match": (features(gallery_ids=np.arange(4) + 9), "no query has a match"),
    "a table of ids": (features(query_ids=np.zeros((4, 1), int)), "query"),
})
SCRIPTS[nothing] = "evaluate_reid"

# --- scores -----------------------------------------------------------------------------------------------------------

rows("evaluate", evaluation, {
    "no such data set": (flags("--data", "moon"), "no data set 'moon'"),
    "a class count": (flags("--num-classes", "3"), "--num-classes 3:"),
    "another model": (flags("--model", "DeeplabVGG"), "--model"),
    "a missing label": (lambda p: (p.pair / TRUTH).unlink(), "1 of 2 images", TRUTH),
    "a label of another size": (lambda p: resize(p.pair / TRUTH), TRUTH, "is 30x20"),
    "json that is a folder": (lambda p: ["--json", p.folder("s.json")], "s.json: it is a folder"),
    "json into nowhere": (lambda p: ["--json", str(p / "nowhere/s.json")], "cannot write"),
    "json of 300 letters": (lambda p: ["--json", str(p / ("j" * 300))], "cannot write"),
    "save into a file": (lambda p: ["--save", p.text("file", "x")], "--save", "file"),
    "labelIds that is a file": (lambda p: (p.folder("out"), p.text("out/labelIds", "x"), ["--label-ids"])[2],
                                "labelIds"),
    "statistics of no set": (flags("--bn-stats", "target", "--bn-set", "moon"), "'moon'"),
    "no BN": (lambda p: ["--images", str(p.photos)], "--images takes the place"),
    "aspp of a network of one": (flags("--size", "1"), "argument --size"),
})
rows("evaluate pictures", evaluation_of_pictures, {
    "no picture": (lambda p: ["--images", p.folder("none")], "none: no picture"),
    "truncated": (lambda p: truncate(p.photos / "1.png"), "1.png: the image is broken or truncated"),
    "scores of nothing": (lambda p: ["--json", str(p / "s.json")], "--json: there are no labels"),
    "two of one name": (lambda p: (p.photos, p.picture("photos/1.jpg"))[1] and None, "have the same name"),
    "a picture of 1 x 3000": (lambda p: (p.photos, p.picture("photos/thin.png", (1, 3000)))[1] and None, "thin.png"),
    "a picture of 3000 x 1": (lambda p: (p.photos, p.picture("photos/thin.png", (3000, 1)))[1] and None, "thin.png"),
    "a picture of text": (lambda p: (p.photos, p.text("photos/a.png", "x"))[1] and None, "a.png: not an image"),
    "too many pixels": (lambda p: bomb(p.photos / "0.png"), "0.png", "million pixels"),
})


def devkit(info: str, label: str = "a\n", val: str = "a.png\n") -> Callable[[Place], list[str]]:
    def make(p: Place) -> list[str]:
        p.folder("kit")
        for name, text in (("info.json", info), ("label.txt", label), ("val.txt", val)):
            p.text(f"kit/{name}", text)
        return ["--data", "cityscapes", "--devkit_dir", str(p / "kit")]
    return make


rows("compute_iou", iou, {
    "no folder": (lambda p: ["--data", "demo", "--list", str(p / "no.txt")], "no.txt: no such file"),
    "100000 processes": (flags("--workers", "100000"), "--workers 100000: at most"),
    "no such data set": (flags("--data", "moon"), "no data set 'moon'"),
    "no classes": (flags("--classes", ""), "no classes ''"),
    "unknown class": (flags("--classes", "road,moon"), "no classes 'road,moon'", "'moon'"),
    "a class twice": (flags("--classes", "road,road"), "one is given twice"),
    "json that is a folder": (lambda p: ["--json", p.folder("s.json")], "s.json: it is a folder"),
    "json into nowhere": (lambda p: ["--json", str(p / "nowhere/s.json")], "cannot write"),
    "missing prediction": (lambda p: next(p.maps.iterdir()).unlink(), "1 missing predictions"),
    "truncated prediction": (lambda p: truncate(next(p.maps.iterdir())), "files that cannot be used"),
    "a prediction of another size": (lambda p: resize(next(p.maps.iterdir())), "predictions of another size"),
    "a prediction of colours": (lambda p: put(next(p.maps.iterdir()), np.zeros((HEIGHT, WIDTH, 3), np.uint8)),
                                "files that cannot be used", "RGB"),
    "a prediction outside the classes": (lambda p: fill_values(next(p.maps.iterdir()), 200),
                                         "predictions outside 0..13"),
    "an unknown label": (lambda p: fill_values(p.pair / TRUTH, 99), "99"),
    "a broken label": (lambda p: truncate(p.pair / TRUTH), "files that cannot be used"),
    "a list of 5000 letters": (lambda p: ["--list", p.text("l.txt", "x" * 5000)], "have no label"),
    "a list of slashes": (lambda p: ["--list", p.text("l.txt", "/\n.\n")], "have no label"),
    "no such set": (flags("--set", "moon"), "no label of the set 'moon'"),
    "devkit missing": (lambda p: ["--data", "cityscapes", "--devkit_dir", str(p / "kit")], "info.json: no such file"),
    "devkit without keys": (devkit("{}"), "must hold 'label' and 'label2train'"),
    "devkit of a list": (devkit("[]"), "must hold 'label'"),
    "devkit index of 100000": (devkit('{"label": ["a"], "label2train": [[0, 100000]]}'), "100000"),
    "devkit of infinity": (devkit('{"label": ["a"], "label2train": [[0, Infinity]]}'), "info.json"),
    "devkit of unequal lists": (devkit('{"label": ["a"], "label2train": [[0, 0]]}', "a\nb\n"), "label.txt has 2 lines"),
    "devkit and a set": (lambda p: ["--devkit_dir", p.folder("kit"), "--set", "val"], "--devkit_dir takes the place"),
})
if not is_root():  # root writes everywhere
    def read_only(p: Place, *more: str) -> list[str]:
        (p / "locked").mkdir(mode=0o500)
        return [*more, str(p / "locked/x")]

    rows("read-only", evaluation, {"json": (partial(read_only, "--json"), "cannot write")})


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Shared:
    return Shared(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="session")
def ended(shared, tmp_path_factory) -> Place:
    """Where a run of multi_level has ended, with TinyNet."""
    place = Place(tmp_path_factory.mktemp("ended"), shared)
    with pytest.MonkeyPatch.context() as patch:
        use_tiny(patch, script)
        assert script.main(multi_level(place)) == 0
    return place


class TwoLevels(TinyNet):
    head_names = ("layer5",)

    def forward(self, x, return_features=False):
        logits = super().forward(x)
        return logits, logits


def use_tiny(monkeypatch, module) -> None:
    """Networks of a few parameters in the place of a script's."""
    if hasattr(module, "build") and module.__name__ != "train_gan_da":
        monkeypatch.setattr(module, "build", lambda model, classes, *_, **named: (
            TwoLevels if model == "DeeplabMulti" else TinyNet)(classes))
    monkeypatch.setattr(checkpoint, "build", lambda model, classes, *_, **named: TinyNet(classes))
    monkeypatch.setattr(checkpoint, "recognise", lambda weights: {"model": "Deeplab", "arch": "resnet18",
                                                                  "num_classes": len(CLASSES)})


@pytest.fixture
def time_limit():
    """A hang becomes an error."""
    def stop(*_):
        raise TimeoutError(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_there_are_enough_rows():
    assert len(ROWS) >= 150 and {row.command for row in ROWS.values()} == set(SCRIPTS)


def no_process(*_):
    raise AssertionError("a process was to be started")


@pytest.mark.parametrize("name", ROWS)
def test_one_message(name, tmp_path, shared, in_this_process, monkeypatch, capsys, time_limit, request):
    row = ROWS[name]
    module = importlib.import_module(SCRIPTS[row.command])
    place = Place(tmp_path, shared)
    if row.kind:
        use_tiny(monkeypatch, module)
    if row.kind == "resumed":
        ended = request.getfixturevalue("ended")
        vars(place)["pair"] = ended.pair  # a resumed run reads the same data
        shutil.copytree(ended.run, place.run)
    argv = row.command(place)
    more = row.spoil(place)
    argv += more if isinstance(more, list) else []
    monkeypatch.chdir(tmp_path)  # what a run writes by default
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", no_process)
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py"])
    with pytest.raises(SystemExit) as left:
        runtime.cli(lambda _: module.main(argv))
    said = capsys.readouterr().err.rpartition(": error: ")[2]  # without argparse's usage
    assert left.value.code == 2, f"accepted: exit code {left.value.code}\n{said}"
    for fact in row.facts:
        assert fact in said, said
    assert len(said) < 4000, "a message, not a book"
    if name.startswith(("data", "list", "description", "flag")):
        assert not place.run.exists(), "nothing was written"
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.parametrize(("kind", "text"), [("share", "1.1"), ("positive", "0"), ("scales", "0.9,0"), ("scales", "")])
def test_other_flag_types(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"not {text!r}"):
        getattr(lib.flags, kind)(text)
    assert (lib.flags.share("1"), lib.flags.positive("0.5"), lib.flags.scales("0.9,1")) == (1, 0.5, (0.9, 1))


def test_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match="GPU 99 was asked for, but PyTorch sees"):
        runtime.start(cpu=False, gpu=99, amp="off", seed=0, deterministic=False)


def test_the_command_line(shared, tmp_path):
    """A real run: exit code 2, one line, no traceback, and nothing is written."""
    torch.save(PARTIAL, tmp_path / "w.pth")
    done = execute(SCRIPT, *training(shared.pair, tmp_path / "run", "--restore-from", str(tmp_path / "w.pth")), code=2)
    text = message(done, SCRIPT)
    assert "w.pth fits only" in text and "another --model or --arch" in text and text.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_check_data(shared, tmp_path, in_this_process, capsys):
    """Good data passes, without a network; every bad file is listed; all of it on the command line too."""
    pair = Place(tmp_path, shared).pair
    with pytest.raises(SystemExit) as left:
        runtime.cli(lambda _: script.main(training(pair, tmp_path / "run", "--check-data")))
    assert left.value.code in (0, None)
    assert "fine" in capsys.readouterr().out and not (tmp_path / "run").exists()
    truncate(pair / IMAGE)
    fill_values(pair / "gta5/labels/00004.png", 99, slice(2))
    done = execute(SCRIPT, *training(pair, tmp_path / "run", "--check-data"), code=2)
    text = message(done, SCRIPT)
    for fact in ("gta5 (", "2 bad files:", IMAGE, "00004.png: unknown label values 99"):
        assert fact in text
    assert text.count("\n") == 3


def test_a_bad_file_behind_the_checked_sample(shared, tmp_path):
    """A start reads some 50 files; another that is broken stops the run with its name, from a loader process too."""
    pair = shutil.copytree(shared.pair, tmp_path / "pair")
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

"""What every training script does alike: it runs alone, stops and goes on, refuses nonsense, and runs in two processes.

A new trainer is one entry of TRAINERS. The networks are those of interrupted.py, or narrowed by flags.
"""
import importlib
import json
import re
import shutil
import signal
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import processes
import pytest
import torch
from interrupted import TinyNet
from scripts import (
    ENVIRONMENT,
    HEIGHT,
    ROOT,
    WIDTH,
    assert_same_tree,
    execute_alone,
    in_two_processes,
    interrupted,
    logged,
    torchrun,
    training,
    tree,
    with_voids,
)

from lib import checkpoint
from lib.datasets.description import load_description
from lib.demo.persons import render_persons
from lib.models.deeplab import build


class Inputs:
    """Data sets and weights, to be read only; made when they are asked for."""

    def __init__(self, root: Path, pair: Path):
        self.root, self.pair = root, pair

    @cached_property
    def uneven(self) -> Path:
        """The pair with source labels that hold different shares of void."""
        return with_voids(self.pair, self.root / "uneven")

    @cached_property
    def people(self) -> Path:
        """12 training images of 3 people in each domain."""
        return render_persons(self.root / "people", seed=1, people=3, cameras=2, images=2)

    def start(self, name: str) -> str:
        """Weights for train_cbst.py, of TinyNet or of the real network."""
        classes = list(load_description("demo").classes)
        file = self.root / f"{name}.pth"
        if not file.exists():
            torch.manual_seed(1)
            net = TinyNet(len(classes)) if name == "tiny" else build("Deeplab", len(classes), "resnet18", "full")
            for module in net.modules():
                if isinstance(module, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(module.weight)  # more than one class wins
            checkpoint.save_weights(net, file, {
                "model": "Deeplab", "arch": "resnet18", "aspp": "full", "stride_on": "1x1", "pixels": "imagenet",
                "task": "demo", "classes": classes, "size": [WIDTH, HEIGHT], "align_corners": True})
        return str(file)


SIX = ["--num-steps", "6", "--save-pred-every", "2", "--random-mirror", "--random-scale"]


def segmentation(i: Inputs, folder: Path) -> list[str]:
    return training(i.pair, folder, *SIX)


def pixel_assoc(i: Inputs, folder: Path) -> list[str]:
    return training(i.pair, folder, *SIX[:4], "--batch-size", "1", "--iter-size", "1")


def gan(i: Inputs, folder: Path) -> list[str]:
    return training(i.pair, folder, *SIX, "--width", "0.03125", "--padding", "same", "--lr", "1e-3", "--lr-epochs", "1")


def cbst(i: Inputs, folder: Path) -> list[str]:
    """Three rounds, the last of which only scores, of three steps."""
    return ["--target", "demo", "--data-dir", str(i.pair / "gta5"), "--data-dir-target", str(i.pair / "cityscapes"),
            "--restore-from", i.start("tiny"), "--crop-size", f"{WIDTH},{HEIGHT}", "--num-rounds", "3", "--epr", "1",
            "--init-src-port", "0.4", "--max-src-port", "1", "--src-port-step", "0.2", "--ds-rate", "2",
            "--num-workers", "0", "--log-every", "1", "--save-num-images", "0", "--cpu", "--ops", "reference",
            "--learning-rate", "1e-3", "--save-pred-every", "2", "--snapshot-dir", str(folder)]


def translation(i: Inputs, folder: Path) -> list[str]:
    return ["--source", "gta5", "--data-dir", str(i.pair / "gta5"), "--target", "demo", "--data-dir-target",
            str(i.pair / "cityscapes"), "--num-workers", "0", "--log-every", "1", "--save-num-images", "1", "--cpu",
            "--ops", "reference", "--snapshot-dir", str(folder)]


def munit(i: Inputs, folder: Path) -> list[str]:
    return [*translation(i, folder), "--max-iter", "6", "--save-pred-every", "2", "--eval-every", "3", "--step-size",
            "4", "--gen-dim", "4", "--dis-dim", "4", "--n-res", "1", "--mlp-dim", "8", "--vgg-w", "0", "--new-size",
            "64", "--crop-image-height", "64", "--crop-image-width", "64"]


def spgan(i: Inputs, folder: Path) -> list[str]:
    return [*translation(i, folder), "--method", "spgan", "--load_size", "80,72", "--crop_size", "64", "--ngf", "2",
            "--ndf", "2", "--netG", "resnet_6blocks", "--batch-size", "1", "--n_epochs", "1", "--n_epochs_decay", "1",
            "--lr_policy", "constant", "--pool_size", "2", "--save-pred-every", "2"]


def ecn(i: Inputs, folder: Path) -> list[str]:
    return ["-s", "plaza", "-t", "campus", "--data-dir", str(i.people), "--logs-dir", str(folder), "-a", "resnet18",
            "--features", "16", "--height", "32", "--width", "16", "-b", "4", "-j", "0", "--restore-from", "none",
            "--cpu", "--ops", "reference", "--print-freq", "1", "--num-steps", "6", "--lr", "0.01",
            "--neighbour-epoch", "1", "--save-pred-every", "2"]


class Trainer(NamedTuple):
    """arguments: of a run of six iterations that saves itself after every second. alike: flags (from Inputs) with
    which two processes compute what one does with twice the batch, to the relative tolerance; None where the script's
    own tests compare more than losses. rounded: logged values that an argmax decides, and so rounding; their sums over
    processes have tests of their own.
    """

    arguments: Callable[[Inputs, Path], list[str]]
    alike: Callable[[Inputs], list[str]] | None
    tolerance: float = 1e-4
    rounded: frozenset = frozenset()
    whole: Callable[[Inputs], list[str]] = lambda i: []  # flags for networks that were not shrunk
    moments: tuple[str, ...] = ("step:2", "write resume.pth:2", "log:5")


def uneven(i: Inputs) -> list[str]:
    return ["--data-dir", str(i.uneven / "gta5"), "--num-steps", "3"]


ASSOCIATED = frozenset(f"{term}_{of}" for term in ("loss_asso", "kept", "cover") for of in ("feat", "cls"))
TRAINERS = {
    "train_adaptsegnet": Trainer(
        segmentation, lambda i: [*uneven(i), "--multi-level", "--freeze-bn"], 1e-5,
        moments=("step:2", "write best.pth:1", "rename resume.pth:1", "log:5", "write GTA5_4.pth:1",
                 "write resume.pth:2", "rename resume.pth:2")),
    "train_pixel_assoc": Trainer(
        pixel_assoc, lambda i: [*uneven(i), "--lambda-lovasz", "0", "--lambda-asso", "0", "--freeze-bn"], 1e-5,
        rounded=ASSOCIATED),
    "train_gan_da": Trainer(
        gan, lambda i: [*uneven(i), "--dropout", "0", "--reduction", "mean", "--optimizer", "SGD"], 1e-4),
    "train_cbst": Trainer(
        cbst, None,
        whole=lambda i: ["--restore-from", i.start("real"), "--learning-rate", "1e-6"],
        moments=("score:2", "count:4", "refine:3", "label:3", "rename report.json:1", "step:3", "write weights.pth:1",
                 "rename 0:1", "rename resume.pth:5", "label:6", "step:6")),
    "train_munit": Trainer(munit, lambda i: ["--max-iter", "2"], 1e-3),
    "train_spgan": Trainer(spgan, None),
    "train_ecn": Trainer(ecn, None),
}
each_trainer = pytest.mark.parametrize("name", TRAINERS)


@pytest.fixture(scope="module")
def inputs(pair, tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    yield Inputs(root, pair)
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """name -> everything that a run of that trainer wrote which nothing disturbed."""
    done = {}

    def get(name: str) -> dict[str, object]:
        if name not in done:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            interrupted(name, *TRAINERS[name].arguments(inputs, folder))
            done[name] = tree(folder)
            shutil.rmtree(folder)
        return done[name]

    return get


def saved_iteration(folder: Path) -> int:
    return checkpoint.load(folder / "resume.pth")["iteration"] if (folder / "resume.pth").exists() else 0


@each_trainer
def test_script_and_lib_alone_in_an_empty_folder(name, inputs, folder):
    trainer = TRAINERS[name]
    out = execute_alone(f"{name}.py", folder, *trainer.arguments(inputs, Path("out")), *trainer.whole(inputs),
                        "--ops", "auto")
    assert re.search(r"kernels +reference", out) and saved_iteration(folder / "elsewhere/out")


# --- stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, moment", [(name, moment) for name, t in TRAINERS.items() for moment in t.moments])
def test_sigkill_and_resume_end_as_if_nothing_had_happened(name, moment, inputs, undisturbed, folder):
    arguments = TRAINERS[name].arguments(inputs, folder)
    interrupted(name, *arguments, at=moment, code=-signal.SIGKILL)
    exists, saved = (folder / "resume.pth").exists(), saved_iteration(folder)
    assert saved < 6
    out = interrupted(name, *arguments, "--resume")
    assert (f"resumed at iteration {saved}" if saved else "starting at the beginning") in out or name == "train_cbst"
    assert exists or "starting at the beginning" in out
    assert_same_tree(folder, undisturbed(name))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@each_trainer
def test_a_signal_saves_and_leaves(name, number, inputs, undisturbed, folder):
    """Sent to all processes of the run, loaders included."""
    arguments = [*TRAINERS[name].arguments(inputs, folder), "--num-workers", "1"]
    out = interrupted(name, *arguments, at="step:3", by=number.name, code=128 + number)
    assert f"stopped at iteration 3; --resume goes on from {folder / 'resume.pth'}" in out and "Traceback" not in out
    assert saved_iteration(folder) == 3
    assert "Traceback" not in interrupted(name, *arguments, "--resume")
    assert_same_tree(folder, undisturbed(name))


@each_trainer
def test_what_resume_refuses(name, inputs, undisturbed, folder):
    """At its end a run has nothing left to do; another run neither goes on from its files nor writes over them."""
    arguments = TRAINERS[name].arguments(inputs, folder)
    interrupted(name, *arguments)
    interrupted(name, *arguments, "--resume")
    assert_same_tree(folder, undisturbed(name))
    out = interrupted(name, *arguments, "--resume", "--random-seed", "7", code=2)
    assert "--random-seed was " in out and "is 7" in out and "Traceback" not in out
    assert "holds an earlier run: go on with it (--resume)" in interrupted(name, *arguments, code=2)
    assert_same_tree(folder, undisturbed(name))


@each_trainer
def test_a_loss_that_is_not_finite_stops_the_run(name, inputs, folder):
    out = interrupted(name, *TRAINERS[name].arguments(inputs, folder), at="nan:3", code=2)
    assert "interrupted.py: iteration 3: " in out and " is nan for the images " in out and "Traceback" not in out
    assert "Last good checkpoint: " in out and saved_iteration(folder) == 2


# --- flags ------------------------------------------------------------------------------------------------------------


NONSENSE = {"--random-seed": "-1", "--save-pred-every": "0", "--log-every": "0", "--batch-size": "0", "--amp": "half",
            "--ops": "gpu", "--gpu": "-1", "--num-workers": "-1"}


@each_trainer
def test_flags_that_make_no_sense(name, inputs, folder, capsys):
    script, arguments = importlib.import_module(name), TRAINERS[name].arguments(inputs, folder)
    script.parse_args(arguments)
    for flag, value in NONSENSE.items():
        with pytest.raises(SystemExit) as caught:
            script.parse_args([*arguments, flag, value])
        assert caught.value.code == 2 and flag in capsys.readouterr().err


@each_trainer
def test_every_argument_is_stored(name, inputs, folder):
    """resume.pth can tell any two runs apart."""
    args = vars(importlib.import_module(name).parse_args(TRAINERS[name].arguments(inputs, folder)))
    assert json.loads(json.dumps(args)).keys() == args.keys()


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, trainer in TRAINERS.items() if trainer.alike])
def test_two_processes_compute_what_one_does_with_the_whole_batch(name, inputs, folder):
    trainer = TRAINERS[name]
    flags = trainer.alike(inputs)
    arguments = trainer.arguments(inputs, folder / "two")
    args = importlib.import_module(name).parse_args([*arguments, *flags])
    done = processes.run([str(ROOT / f"{name}.py"), *trainer.arguments(inputs, folder / "one"), *flags, "--batch-size",
                          str(2 * args.batch_size)], ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    if name == "train_adaptsegnet":  # as users start it
        out = torchrun(f"{name}.py", *arguments, *flags).stdout
    else:
        out = in_two_processes(f"{name}.py", *arguments, *flags)
    assert out.count("device ") == 1
    ours, theirs = (logged(folder / d, "lr") for d in ("two", "one"))  # no scores: an argmax decides them
    assert ours and [line.keys() for line in ours] == [line.keys() for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in a.keys() - trainer.rounded:
            assert a[key] == pytest.approx(b[key], rel=trainer.tolerance), (a["iteration"], key)
    names = [{p.relative_to(d) for p in d.rglob("*")} for d in (folder / "one", folder / "two")]
    assert names[0] == names[1]

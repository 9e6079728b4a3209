"""train_pixel_assoc.py as its user runs it: every variant, what it writes, associations, mistakes."""
import argparse
import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interrupted import TinyNet
from PIL import Image
from scripts import execute, logged, message, training

import train_pixel_assoc as script
from lib import checkpoint, predict
from lib.models.deeplab import build
from lib.runtime import Run
from lib.visual import draw_associations

SCRIPT = "train_pixel_assoc.py"
ONE = Run(torch.device("cpu"), 0, 1, "off")


def arguments(pair: Path, folder: Path, *more: str) -> list[str]:
    return training(pair, folder, "--batch-size", "1", "--iter-size", "1", *more)


SOURCE = ["loss_ce", "loss_lovasz"]
BOTH = [*SOURCE, *(f"{term}_{of}" for of in ("feat", "cls") for term in ("loss_asso", "kept", "cover")), "loss_lsr_s",
        "loss_lsr_t"]
VARIANTS = {
    "both domains": ([], BOTH),
    "source only": (["--source-only"], SOURCE),
    "crops, two pairs, two passes": (["--resize-short", "50,60", "--crop-size", "56,40", "--batch-size", "2",
                                      "--iter-size", "2", "--test-size", "64,48"], BOTH),
    "bf16": (["--amp", "bf16"], BOTH),
    "other choices": (["--lambda-lovasz", "0", "--lambda-lsr", "0.1", "--lsr-threshold", "0", "--alpha", "0.2",
                       "--no-aggregate", "--bn-stats", "target", "--pixels", "imagenet", "--deterministic",
                       "--no-random-mirror", "--num-workers", "1", "--lr-mult-classifier", "10"],
                      [k for k in BOTH if k != "loss_lovasz"]),
    "different sizes": (["--input-size-target", "80,56"], BOTH),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_steps(pair, folder, variant):
    flags, losses = VARIANTS[variant]
    given = arguments(pair, folder)
    if "--crop-size" in flags:  # the fixed sizes would take its place
        for flag in ("--input-size", "--input-size-target"):
            del given[given.index(flag):given.index(flag) + 2]
    done = execute(SCRIPT, *given, *flags)
    lines = logged(folder, "loss_ce")
    assert [line["iteration"] for line in lines] == [1, 2]
    assert all(line.keys() == {"iteration", "lr", *losses} for line in lines), lines
    assert all(0 <= line[key] <= 1 for line in lines for key in losses if key.startswith(("kept", "cover")))
    weights, meta = checkpoint.read_weights(folder / "GTA5_2.pth")
    known = checkpoint.recognise(weights)
    assert (known["model"], known["arch"], meta["align_corners"]) == ("DeeplabPixelAssoc", "resnet18", False)
    assert {p.name for p in folder.iterdir()} == {"GTA5_2.pth", "best.pth", "log.jsonl", "resume.pth"}
    assert "target mIoU: last" in done.stdout


def test_epochs_count_the_target_set(pair, folder):
    """4 target images in steps of 2: 2 steps an epoch."""
    given = arguments(pair, folder, "--batch-size", "2", "--epochs", "2", "--epochs-stop", "1", "--source-only")
    del given[given.index("--num-steps"):given.index("--num-steps") + 2]
    done = execute(SCRIPT, *given)
    assert "0 to 2 of 4, 2 an epoch" in done.stdout and len(logged(folder, "loss_ce")) == 2
    assert logged(folder, "lr")[1]["lr"] == pytest.approx(2.5e-4 * 0.75 ** 0.9)
    assert "raise --num-steps or --epochs" in message(execute(SCRIPT, *given, "--epochs-stop", "3", code=2), SCRIPT)


def test_pictures_of_associations(pair, folder):
    execute(SCRIPT, *arguments(pair, folder, "--save-num-images", "2"))
    with Image.open(folder / "pictures/2_associations.png") as image:
        assert image.size == (2 * 64 + 4, 2 * 48 + 4)
    assert 0 <= logged(folder, "right_associations")[0]["right_associations"] <= 1


class Still:
    """A domain of one image that is what it is given."""

    def __init__(self, image: Image.Image, label: np.ndarray):
        self.image, self.label = image, label

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        return self.image, self.label


@pytest.mark.parametrize("shift, share", [(0, 1.0), (1, 0.0), (None, math.nan)])
def test_the_share_of_right_associations(shift, share, tmp_path):
    """On the same image every pixel finds itself: right with the same labels, wrong with others, nan without."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    net = build("DeeplabPixelAssoc", 3, "resnet18").eval()
    image = Image.fromarray(rng.integers(0, 256, (48, 64, 3)).astype(np.uint8))
    label = rng.integers(0, 3, (6, 8)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    other = np.full_like(label, 255) if shift is None else (label + shift) % 3
    palette = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)
    data = SimpleNamespace(source=Still(image, label), validation=Still(image, other), palette=palette)
    path = tmp_path / "associations.png"
    found = predict.right_associations(net, data, [(64, 48), (64, 48)], "imagenet", 0.0, 2, path, ONE)
    assert found == pytest.approx(share, nan_ok=True)
    drawn = np.asarray(Image.open(path)).reshape(-1, 3)
    assert all((drawn == colour).all(1).sum() > 64 for colour in palette), "lines in the colours of the classes"


def test_lines_of_associations():
    """From the middle of a cell to that of another; a wrong one ends in a cross."""
    black = Image.new("RGB", (80, 40))
    sheets = [np.asarray(draw_associations(
        [black, black], [(4, 8), (2, 4)], np.array([0]), np.array([6]), np.array([[9, 250, 9]], np.uint8),
        np.array([wrong]))) for wrong in (False, True)]
    assert sheets[0].shape == (40, 164, 3)
    places = np.argwhere((sheets[0] == (9, 250, 9)).all(2))
    assert places[0].tolist() == [5, 5] and places[-1].tolist() == [30, 84 + 50]  # y, x: cells 0 of 4x8, 6 of 2x4
    cross = np.argwhere((sheets[1] != sheets[0]).any(2))
    assert len(cross) > 8 and np.abs(cross - (30, 84 + 50)).max() <= 4


def test_cover_is_the_share_of_target_pixels():
    assert script.coverage(torch.arange(10)[None], 10) == 1
    assert script.coverage(torch.zeros(1, 5, dtype=torch.long), 10).item() == pytest.approx(0.1)


class Joined(Run):
    """One of two processes, here two threads: sums wait for the other."""

    def __init__(self, rank: int, barrier: threading.Barrier, shared: list):
        super().__init__(torch.device("cpu"), rank, 2, "off")
        object.__setattr__(self, "meeting", (barrier, shared))

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        barrier, shared = self.meeting
        shared[self.rank] = value.detach().clone()
        barrier.wait()
        total = shared[0] + shared[1]
        barrier.wait()
        return total


def test_the_associations_of_two_processes_are_those_of_one():
    """In float64, where rounding decides no argmax: the terms and, averaged, the gradients; label counts differ."""
    torch.manual_seed(0)
    net = build("DeeplabPixelAssoc", 3, "resnet18").double().eval()
    x_s, x_t = torch.randn(2, 2, 3, 48, 64, dtype=torch.float64)
    y = torch.randint(3, (2, 6, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    y[1, :, 24:] = 255
    weights = script.Weights(lovasz=0.0)

    def gradient(module: torch.nn.Module) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in module.parameters()])

    def half(rank: int):
        part, own = slice(rank, rank + 1), copy.deepcopy(net)
        values = script.step(own, x_s[part], y[part], x_t[part], weights, Joined(rank, barrier, shared), iter_size=1)
        return values, gradient(own)

    barrier, shared = threading.Barrier(2), [None, None]
    with ThreadPoolExecutor(2) as threads:
        halves = list(threads.map(half, range(2)))
    whole = script.step(net, x_s, y, x_t, weights, ONE, iter_size=1)
    for key, value in whole.items():
        assert ((halves[0][0][key] + halves[1][0][key]) / 2).item() == pytest.approx(value.item(), rel=1e-9), key
    assert whole["kept_feat"] > 0 and whole["kept_cls"] > 0
    torch.testing.assert_close((halves[0][1] + halves[1][1]) / 2, gradient(net), rtol=1e-7, atol=1e-10)


def test_a_source_batch_without_labels():
    """Every term on labels is 0, nothing crashes, gradients stay finite."""
    torch.manual_seed(0)
    net = build("DeeplabPixelAssoc", 4, "resnet18").train()
    x = torch.randn(1, 3, 48, 64)
    values = script.step(net, x, torch.full((1, 48, 64), 255), x, script.Weights(), ONE, iter_size=1)
    assert all(values[key] == 0 for key in ("loss_ce", "loss_lovasz", "loss_asso_feat", "loss_asso_cls", "kept_feat"))
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_initial_weights_of_any_network(pair, folder):
    """Backbones of AdaptSegNet's files fit; a head of another layout is renamed, and the report says so."""
    folder.mkdir(parents=True)
    torch.save(build("Deeplab", 14, "resnet18").state_dict(), folder.parent / "w.pth")
    done = execute(SCRIPT, *arguments(pair, folder, "--restore-from", str(folder.parent / "w.pth"), "--source-only"))
    assert "100.0 % of the backbone" in done.stdout and "classifier.0.convs.0.0" in done.stdout
    assert "main head: layer5.conv2d_list.0, ... as classifier.0.convs.0.0" in done.stdout
    assert "not in the file" not in done.stdout


def test_fp16_scales_its_losses(pair, folder, in_this_process, monkeypatch):
    """In this process, with a network of a few parameters: fp16 convolutions crawl on a CPU."""
    factors, original = [], script.step

    def step(*given, scale, **named):
        factors.append(scale(torch.ones(())).item())
        return original(*given, scale=scale, **named)

    monkeypatch.setattr(script, "build", lambda model, classes, *_, **named: TinyNet(classes))
    monkeypatch.setattr(script, "step", step)
    assert script.main(arguments(pair, folder, "--amp", "fp16", "--no-aggregate")) == 0
    assert factors[0] == 2 ** 16 and len(logged(folder, "loss_asso_cls")) == 2


# --- mistakes -----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(pair, folder):
    done = execute(SCRIPT, *arguments(pair, folder, "--num-steps", "9", "--source-only", "--save-pred-every", "1",
                                      "--learning-rate", "1e5", "--eval-every", "9"), code=2)
    text = message(done, SCRIPT)
    assert "loss_ce is " in text and f"Last good checkpoint: {folder / 'resume.pth'}" in text


@pytest.mark.parametrize("flags, words", [
    (["--data-dir", "nowhere"], "nowhere"),
    (["--restore-from", "nowhere.pth"], "nowhere.pth does not exist"),
    (["--val-set", "train"], "belong to both"),
    (["--num-classes", "99"], "99"),
    (["--num-steps-stop", "5"], "raise --num-steps"),
])
def test_a_message_before_training(pair, folder, flags, words):
    assert words in message(execute(SCRIPT, *arguments(pair, folder, *flags), code=2), SCRIPT)
    assert not folder.exists()


@pytest.mark.parametrize("flags", [["--alpha", "2"], ["--resize-short", "9,8"], ["--input-size", "64,48"],
                                   ["--epochs", "0"], ["--random-seed", "-1"], ["--crop-size", "0,1"]])
def test_flags_that_make_no_sense(flags, capsys):
    with pytest.raises(SystemExit) as error:
        script.parse_args(flags)
    assert error.value.code == 2 and flags[0] in capsys.readouterr().err


SIZES = ["--input-size", "64,48", "--input-size-target", "64,48"]


@pytest.mark.parametrize("flags, words", [
    *((["--num-steps", "9", flag, "1"], f"{flag} has no effect with a number of steps") for flag in (
        "--epochs", "--epochs-stop")),
    (["--demo", "--epochs-stop", "1"], "--epochs-stop has no effect with a number of steps"),
    (["--num-steps-stop", "9", "--epochs-stop", "1"], "--epochs-stop has no effect with --num-steps-stop"),
    (["--demo", "--epochs", "5", "--num-steps-stop", "9"], "needs --epochs-stop"),
])
def test_flags_that_contradict_each_other(flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        script.parse_args(flags)
    assert error.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("beside, more", [
    *((["--source-only"], more) for more in (
        ["--lambda-asso", "1"], ["--lambda-lsr", "1"], ["--lsr-threshold", "1"], ["--association", "direct"])),
    *((beside, [flag, "60,60"]) for flag in ("--crop-size", "--resize-short") for beside in (SIZES, ["--demo"]))])
def test_flags_without_effect_are_named(beside, more, capsys):
    script.parse_args([*beside, *more])
    assert f"{more[0]} has no effect with" in capsys.readouterr().out


@pytest.mark.parametrize("flags, lengths", [
    ([], [(400, None, None, None), (300, None, None, None)]),
    (["--num-steps-stop", "350"], [(400, 350, None, None), (300, 300, None, None)]),
    (["--epochs", "8", "--epochs-stop", "7"], [(None, None, 8, 7), (None, None, 6, 6)]),
    (["--epochs", "1"], [(None, None, 1, None), (None, None, 1, None)]),
])
def test_lengths_of_the_two_runs_of_the_demo(flags, lengths, monkeypatch):
    """num_steps, num_steps_stop, epochs, epochs_stop."""
    def changed(train, args, source_only, adapted, report):
        runs.extend(argparse.Namespace(**{**vars(args), **changes}) for changes in (source_only, adapted))

    runs = []
    monkeypatch.setattr(script, "train_and_compare", changed)
    script.demo(script.parse_args(["--demo", *flags]))
    assert [(run.num_steps, run.num_steps_stop, run.epochs, run.epochs_stop) for run in runs] == lengths


def test_help_of_the_rate_and_the_size(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--lr-mult-classifier times" in text and "(default: a random short side and a crop)" in text


def test_the_demo_adapts_the_source_only_network(pair, folder, monkeypatch, in_this_process, capsys):
    rendered = []
    monkeypatch.setattr(script, "render_demo", lambda root, seed: rendered.append((str(root), seed)))
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert script.main(["--demo", "--random-seed", "7", *arguments(pair, Path("out"), "--num-steps", "2")]) == 0
    out = capsys.readouterr().out
    assert rendered == [("data/demo/7", 7)] and "source, target BN" in out
    first, _, second = out.partition("--- adapted")
    assert "none, random weights" in first and "tensors loaded (100.0 % of the backbone)" in second
    assert (folder / "out/adapted/GTA5_1.pth").exists() and (folder / "result/demo/pixel_assoc.png").exists()

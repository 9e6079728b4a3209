"""train_adaptsegnet.py as its user runs it: every variant, what it writes, and every way it can be stopped."""
import shutil
import signal
import time

import processes
import pytest
import torch
from interrupted import TinyNet
from PIL import Image
from scripts import (
    ENVIRONMENT,
    ROOT,
    execute,
    logged,
    message,
    same,
    training,
)

import train_adaptsegnet as script
from lib import checkpoint
from lib.datasets.folder import open_pair
from lib.errors import UserError
from lib.models.deeplab import build
from lib.runtime import Run
from train_adaptsegnet import FCDiscriminator

SCRIPT = "train_adaptsegnet.py"


# --- variants -----------------------------------------------------------------------------------------------------

TWO_LEVELS = ["loss_seg1", "loss_seg2", "loss_adv1", "loss_adv2", "loss_D1", "loss_D2"]
ONE_LEVEL = ["loss_seg2", "loss_adv2", "loss_D2"]
VARIANTS = {
    "single level": ([], ONE_LEVEL),
    "two levels": (["--multi-level"], TWO_LEVELS),
    "LS-GAN": (["--gan", "LS", "--multi-level", "--sgd", "once"], TWO_LEVELS),
    "feature": (["--adapt", "feature", "--input-size", "256,256", "--input-size-target", "256,256"], ONE_LEVEL),
    "source only": (["--source-only"], ["loss_seg2"]),
    "iter-size, batch, augmentation": (["--iter-size", "2", "--batch-size", "2", "--random-scale", "--random-mirror"],
                                       ONE_LEVEL),
    "bf16": (["--multi-level", "--amp", "bf16"], TWO_LEVELS),
    "other choices": (["--aspp", "full", "--bn-affine", "frozen", "--freeze-bn", "--bn-stats", "target", "--pixels",
                       "imagenet", "--deterministic", "--ignore-label", "30", "--num-workers", "1"], ONE_LEVEL),
    "VGG": (["--model", "DeeplabVGG", "--source-only"], ["loss_seg2"]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_steps(pair, folder, variant):
    flags, losses = VARIANTS[variant]
    done = execute(SCRIPT, *training(pair, folder, *flags))
    lines = logged(folder, losses[0])
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        assert list(line) == ["iteration", *losses, "lr"]
        assert all(0 < line[k] < 20 for k in losses)
    assert lines[0]["lr"] == 2.5e-4 and lines[1]["lr"] == pytest.approx(2.5e-4 * 0.5 ** 0.9, rel=1e-12)
    scores, = logged(folder, "mIoU")
    assert scores.keys() - {"warnings"} == {"iteration", "mIoU", "best_mIoU", "layout_distance"}
    numbers = {key[-1] for key in losses if key.startswith("loss_D")}
    written = {"GTA5_2.pth", *(f"GTA5_2_D{n}.pth" for n in numbers), "best.pth", "resume.pth", "log.jsonl"}
    assert {p.name for p in folder.iterdir()} == written
    assert "target mIoU: last" in done.stdout
    assert not done.stderr.strip() or "Warning" in done.stderr


def test_what_a_run_writes_and_prints(pair, folder):
    done = execute(SCRIPT, *training(pair, folder, "--multi-level", "--num-steps", "3", "--save-pred-every", "2",
                                     "--eval-every", "1", "--save-num-images", "2", "--log-every", "2"))
    assert {p.name for p in folder.iterdir()} == {
        "best.pth", "resume.pth", "log.jsonl", "pictures",
        *(f"GTA5_{i}{suffix}.pth" for i in (2, 3) for suffix in ("", "_D1", "_D2"))}
    pictures = sorted((folder / "pictures").iterdir())
    assert [p.name for p in pictures] == ["1.png", "2.png", "3.png"]
    assert Image.open(pictures[0]).width > 3 * 64  # image, truth, prediction
    assert [line["iteration"] for line in logged(folder, "loss_seg1")] == [2, 3]
    scores = logged(folder, "mIoU")
    assert [line["iteration"] for line in scores] == [1, 2, 3]
    best = max(scores, key=lambda line: line["mIoU"])
    assert scores[-1]["best_mIoU"] == best["mIoU"]

    weights, meta = checkpoint.read_weights(folder / "GTA5_3.pth")
    assert meta["iteration"] == 3 and meta["pixels"] == "caffe" and len(meta["classes"]) == 14
    build("DeeplabMulti", 14, "resnet18").load_state_dict(weights)
    for number in (1, 2):
        FCDiscriminator(14).load_state_dict(torch.load(folder / f"GTA5_3_D{number}.pth"))
    assert checkpoint.read_weights(folder / "best.pth")[1]["mIoU"] == best["mIoU"]

    for fact in ("device      cpu, 1 thread", "precision   float32", "kernels     reference", "none, random weights",
                 "DeeplabMulti resnet18, 14 classes", "weights train, statistics update", "5 images of gta5",
                 "4 images of demo", "2 images of demo", "1 pairs a step = 1 x 1 processes x 1 passes",
                 "iter =        2/       3, loss_seg1 = ", "it/s", "min left", "GiB",
                 f"last {scores[-1]['mIoU']:.2f}, best {best['mIoU']:.2f} (iteration {best['iteration']}"):
        assert fact in done.stdout, fact


def with_small_networks(monkeypatch, **changes) -> None:
    """script.main() gets the network of interrupted.py, a small discriminator and the functions in ``changes``."""
    monkeypatch.setattr(script, "build", lambda model, classes, *_: TinyNet(classes))
    monkeypatch.setattr(script, "FCDiscriminator", lambda channels: FCDiscriminator(channels, ndf=4))
    for name, value in changes.items():
        monkeypatch.setattr(script, name, value)


def test_source_only_reads_no_target_image(pair, folder, in_this_process, monkeypatch):
    """But those of the validation set. Every start reads some of them to check them, so they vanish after that."""
    copy = shutil.copytree(pair, folder.parent / "pair")

    def open_and_remove(*arguments, **named):
        data = open_pair(*arguments, **named)
        shutil.rmtree(copy / "cityscapes/leftImg8bit/train")
        return data

    with_small_networks(monkeypatch, open_pair=open_and_remove)
    assert script.main(training(copy, folder, "--source-only")) == 0
    assert len(logged(folder, "loss_seg2")) == 2 and not list((copy / "cityscapes/leftImg8bit").glob("train"))
    with pytest.raises(UserError, match="no image of the set 'train'"):
        script.main(training(copy, folder, "--source-only"))


def test_initial_weights_bring_their_conventions(pair, folder):
    """torchvision's: pixels and strides follow, BN is frozen, heads start anew; the checkpoint remembers."""
    torch.manual_seed(0)
    state = build("Deeplab", 3, "resnet18").state_dict()
    state = {k: v for k, v in state.items() if not k.startswith("layer5")}
    folder.mkdir(parents=True)
    torch.save({**state, "fc.weight": torch.zeros(2, 2)}, folder / "resnet18.pth")
    done = execute(SCRIPT, *training(pair, folder, "--restore-from", str(folder / "resnet18.pth")))
    for fact in ("100.0 % of the backbone); not in the file: layer5", "pixels      imagenet", "weights frozen"):
        assert fact in done.stdout, fact
    weights, meta = checkpoint.read_weights(folder / "GTA5_2.pth")
    assert meta["pixels"] == "imagenet" and meta["stride_on"] == "3x3"
    assert torch.equal(weights["bn1.weight"], state["bn1.weight"])
    assert not torch.equal(weights["conv1.weight"], state["conv1.weight"])


@pytest.mark.parametrize("multi", [False, True])
def test_a_source_batch_without_labels(multi):
    """Loss 0, no gradient from it, no crash."""
    torch.manual_seed(0)
    net = build("DeeplabMulti" if multi else "Deeplab", 4, "resnet18").train()
    levels = [script.Level(2, FCDiscriminator(4), 1.0, 0.001)]
    if multi:
        levels.insert(0, script.Level(1, FCDiscriminator(4), 0.1, 0.0002))
    x = torch.randn(1, 3, 48, 64)
    nothing = torch.full((1, 48, 64), 255)
    options = dict(gan="Vanilla", adapt="output", iter_size=1, ignore=255, run=Run(torch.device("cpu"), 0, 1, "off"))
    losses = script.step(net, levels, x, nothing, None, **options)
    assert all(loss == 0 for loss in losses.values()) and len(losses) == len(levels)
    assert all(p.grad is None or (p.grad == 0).all() for p in net.parameters())
    losses = script.step(net, levels, x, nothing, x, **options)
    assert all(torch.isfinite(loss) for loss in losses.values()) and losses["loss_D2"] > 0
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


# --- stopping and going on ----------------------------------------------------------------------------------------


def test_the_real_network_resumes_exactly(pair, folder):
    """Killed inside a checkpoint write, the script itself, all of its 124 MB."""
    straight, killed = folder / "straight", folder / "killed"
    steps = ["--num-steps", "3", "--multi-level", "--random-mirror", "--eval-every", "3"]
    execute(SCRIPT, *training(pair, straight, *steps))
    arguments = training(pair, killed, *steps)
    started = processes.Started([str(ROOT / SCRIPT), *arguments, "--save-pred-every", "1"], ENVIRONMENT)
    process = started.process
    while not (killed / "resume.pth").exists() or not list(killed.glob(".new-*.pth")):
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 1 <= checkpoint.load(killed / "resume.pth")["iteration"] < 3
    execute(SCRIPT, *arguments, "--resume")
    assert logged(killed) == logged(straight)
    states = [checkpoint.load(d / "resume.pth") for d in (straight, killed)]
    assert all(same(states[0][k], states[1][k]) for k in ("net", "others", "optimizers"))


def test_a_loss_that_is_not_finite_stops_the_run(pair, folder):
    done = execute(SCRIPT, *training(pair, folder, "--num-steps", "9", "--source-only", "--save-pred-every", "1",
                                     "--learning-rate", "1e7", "--eval-every", "9"), code=2)
    text = message(done, SCRIPT)
    stopped = int(text.split("iteration ")[1].split(":")[0])
    assert 2 <= stopped <= 4 and "loss_seg2 is " in text and "--learning-rate" in text
    assert f"Last good checkpoint: {folder / 'resume.pth'}" in text
    assert checkpoint.load(folder / "resume.pth")["iteration"] == stopped - 1
    assert any(f"images {p.stem}." in text for p in (pair / "gta5/images").iterdir())


def test_weights_that_are_not_finite_stop_the_run(pair, folder):
    flags = training(pair, folder, "--source-only", "--save-pred-every", "1", "--learning-rate", "1e38")
    done = execute(SCRIPT, *flags, code=2)
    assert "iteration 1: the norm of the weights is " in message(done, SCRIPT)
    assert not list(folder.glob("*.pth")), "no snapshot of them"


def test_fp16_scales_its_losses(pair, folder, in_this_process, monkeypatch):
    """In this process, with a network of a few parameters: fp16 convolutions crawl on a CPU."""
    factors = []
    original = script.step

    def step(*arguments, scale, **named):
        factors.append(scale(torch.ones(())).item())
        return original(*arguments, scale=scale, **named)

    with_small_networks(monkeypatch, step=step)
    assert script.main(training(pair, folder, "--amp", "fp16", "--input-size", "32,32")) == 0
    assert factors[0] == 2 ** 16 and len(logged(folder, "loss_adv2")) == 2
    scaler = checkpoint.load(folder / "resume.pth")["scaler"]
    assert scaler["_growth_tracker"] in (0, 1, 2) and scaler["scale"] <= 2 ** 16


# --- several processes --------------------------------------------------------------------------------------------


def test_flags_of_the_release_are_accepted():
    flags = (
        "--model DeepLab --target cityscapes --batch-size 1 --iter-size 1 --num-workers 4 --data-dir a --data-list b "
        "--ignore-label 255 --input-size 1280,720 --data-dir-target c --data-list-target d "
        "--input-size-target 1024,512 --is-training --learning-rate 1e-4 --learning-rate-D 1e-4 "
        "--lambda-seg 0.1 --lambda-adv-target1 0.0002 "
        "--lambda-adv-target2 0.001 --momentum 0.9 --not-restore-last --num-classes 19 --num-steps 250000 "
        "--num-steps-stop 150000 --power 0.9 --random-mirror --random-scale --random-seed 1234 --restore-from f "
        "--save-num-images 2 --save-pred-every 5000 --snapshot-dir g --weight-decay 0.0005 --cpu --tensorboard "
        "--log-dir h --set train --gan LS")
    args = script.parse_args(flags.split())
    assert args.input_size == (1280, 720) and args.learning_rate_D == 1e-4 and args.model == "Deeplab"


DEFAULTS = {
    (): ("Deeplab", 0.0, 0.0, 0.001), ("--gan", "LS"): ("Deeplab", 0.0, 0.0, 0.01),
    ("--multi-level",): ("DeeplabMulti", 0.1, 0.0002, 0.001),
    ("--model", "DeeplabMulti", "--gan", "LS"): ("DeeplabMulti", 0.1, 0.0002, 0.001),
    ("--model", "DeeplabVGG"): ("DeeplabVGG", 0.0, 0.0, 0.001),
    ("--multi-level", "--lambda-seg", "0", "--lambda-adv-target1", "0.5"): ("DeeplabMulti", 0.0, 0.5, 0.001),
}


@pytest.mark.parametrize("flags", DEFAULTS)
def test_weights_of_the_losses(flags):
    args = script.parse_args(flags)
    assert (args.model, args.lambda_seg, args.lambda_adv_target1, args.lambda_adv_target2) == DEFAULTS[flags]
    assert args.num_steps_stop == 150000 and script.parse_args(["--num-steps", "9"]).num_steps_stop == 9


@pytest.mark.parametrize("flags", [["--input-size", "0,5"], ["--input-size", "12"], ["--num-steps-stop", "300000"],
                                   ["--batch-size", "0"], ["--multi-level", "--adapt", "feature"], ["--gan", "ls"],
                                   ["--random-seed", "-1"], ["--ignore-label", "300"]])
def test_flags_that_make_no_sense(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        script.parse_args(flags)
    assert caught.value.code == 2 and flags[0] in capsys.readouterr().err


VGG = ["--model", "DeeplabVGG"]


@pytest.mark.parametrize("flags, words", [
    ([*VGG, "--multi-level"], "--multi-level needs --model DeeplabMulti"),
    (["--model", "Deeplab", "--multi-level", "--adapt", "feature"], "--multi-level needs --model DeeplabMulti"),
    ([*VGG, "--bn-stats", "target"], "--bn-stats has no effect with --model DeeplabVGG"),
])
def test_flags_that_contradict_each_other(flags, words, capsys):
    with pytest.raises(SystemExit) as caught:
        script.parse_args(flags)
    assert caught.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    *(([*VGG, *more], f"{more[0]} has no effect with --model DeeplabVGG") for more in (
        ["--arch", "resnet18"], ["--bn-affine", "train"], ["--is-training"])),
    ([*VGG, "--freeze-bn"], "has no effect with --model DeeplabVGG"),
    *((["--source-only", *more], f"{more[0]} has no effect with --source-only") for more in (
        ["--gan", "LS"], ["--adapt", "feature"], ["--lambda-adv-target2", "1"], ["--learning-rate-D", "1"])),
    (["--source-only", "--multi-level", "--lambda-adv-target1", "1"], "--lambda-adv-target1 has no effect"),
    (["--lambda-seg", "0.1"], "--lambda-seg has no effect without --multi-level"),
    (["--lambda-adv-target1", "1", "--demo"], "--lambda-adv-target1 has no effect without --multi-level"),
])
def test_flags_without_effect_are_named(flags, words, capsys):
    script.parse_args(flags)
    assert words in capsys.readouterr().out


def test_what_is_not_refused():
    assert script.parse_args([*VGG, "--demo"]).bn_stats == "running"
    assert script.parse_args(["--source-only", "--multi-level", "--lambda-seg", "0.2"]).lambda_seg == 0.2
    assert script.parse_args([]).is_training and not script.parse_args(["--freeze-bn"]).is_training


def test_the_demo_renders_its_pair_for_source_only_too(pair, folder, in_this_process, monkeypatch):
    rendered = []
    with_small_networks(monkeypatch, render_demo=lambda root, seed: rendered.append((str(root), seed)))
    assert script.main(["--demo", "--random-seed", "7", *training(pair, folder, "--source-only")]) == 0
    assert rendered == [("data/demo/7", 7)] and len(logged(folder, "loss_seg2")) == 2

"""train_spgan.py as users run it: resuming, several processes, one-colour pictures, the flags of CycleGAN's release."""
import json
import os
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import execute, logged, message, render, same

import train_spgan as script
from lib import checkpoint
from lib.datasets.description import load_description, select_classes
from lib.datasets.unpaired import Pictures, Preprocess, from_symmetric, is_uniform, to_symmetric
from lib.errors import UserError
from lib.models.cyclegan import build_generator, from_release
from lib.models.deeplab import build
from lib.models.segmenter import load_segmenter
from lib.runtime import Run

SMALL = ["--ngf", "2", "--ndf", "2", "--netG", "resnet_6blocks", "--n_epochs", "2", "--n_epochs_decay", "1",
         "--num-workers", "0", "--cpu", "--log-every", "1", "--save-num-images", "1"]
SIZES = ["--load_size", "80,72", "--crop_size", "64"]


def picture(rng: np.random.Generator, size=(96, 72), red: int = 1) -> Image.Image:
    array = rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)
    array[..., 0] //= red
    return Image.fromarray(array).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for n, domain in enumerate(("trainA", "trainB")):
        (tmp_path / "data" / domain).mkdir(parents=True)
        for i in range(4):
            picture(rng, red=1 + 3 * n).save(tmp_path / "data" / domain / f"{i}.png")
    return tmp_path / "data"


def flags(root, folder, *more: str) -> list[str]:
    sizes = [] if "--preprocess" in more else SIZES
    return ["--dataroot", str(root), "--snapshot-dir", str(folder), *SMALL, *sizes, *more]


@pytest.mark.parametrize("method", ["cyclegan", "spgan"])
def test_resume(root, tmp_path, monkeypatch, method):
    """Stopped in an iteration without a step of G and with a full pool, the run goes on bit for bit."""
    more = ["--method", method, "--pool_size", "2", "--batch-size", "1", "--n_epochs_decay", "1"]
    more += ["--lr_policy", "constant"] if method == "spgan" else []
    assert script.main(flags(root, tmp_path / "whole", *more)) == 0
    step, calls = script.step, []

    def stopping(*args, **named):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **named)

    monkeypatch.setattr(script, "step", stopping)
    parts = flags(root, tmp_path / "parts", *more)
    assert script.main(parts) == 128 + signal.SIGTERM
    assert len(logged(tmp_path / "parts")) == 8 and len(calls) == 8
    assert script.main([*parts, "--continue_train"]) == 0
    assert len(calls) == 12
    states = [checkpoint.load(tmp_path / run / "resume.pth") for run in ("whole", "parts")]
    assert states[0]["extra"]["pool_a"]["held"] and states[0]["iteration"] == 12
    for key in states[0].keys() - {"arguments"}:
        assert same(states[0][key], states[1][key]), key
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    assert names == {p.name for p in (tmp_path / "parts").iterdir()}
    assert {f"{n}_net_{net}.pth" for n in ("latest", 3) for net in ("G_A", "G_B", "D_A", "D_B")} <= names
    with pytest.raises(UserError, match="another run than the one saved: --lambda_A was 10.0, is 3.0"):
        script.main([*parts, "--resume", "--lambda_A", "3"])


def test_mixed_precision(root, tmp_path):
    script.main(flags(root, tmp_path / "amp", "--amp", "bf16", "--n_epochs", "1", "--n_epochs_decay", "0"))
    script.main(flags(root, tmp_path / "off", "--n_epochs", "1", "--n_epochs_decay", "0"))
    for a, b in zip(logged(tmp_path / "amp", "G"), logged(tmp_path / "off", "G"), strict=True):
        assert a["G"] == pytest.approx(b["G"], rel=0.05)


# --- what spoils generators: pictures of one colour ------------------------------------------------------------------


def test_one_colour_crops_are_drawn_again(tmp_path):
    """The left three quarters of the image are white."""
    image = Image.new("RGB", (400, 72), "white")
    image.paste(picture(np.random.default_rng(1), (100, 72)), (300, 0))
    image.save(tmp_path / "white.png")
    domain = Pictures([tmp_path / "white.png"], Preprocess("crop", (64, 64), (64, 64)), 0)
    uniform = [is_uniform(from_symmetric(domain[(0, draw)].image)) for draw in range(50)]
    assert sum(uniform) <= 1  # 0.7 of all places are white, and 20 are tried


def test_a_step_with_huge_gradients_is_not_made(root, tmp_path, monkeypatch, capsys):
    """A uniform image that gets through all the same changes no weight of G and leaves Adam's moments as they were.
    How large its gradient is depends on how a constant is rounded; here it is what it has been at its worst."""
    step, calls = script.step, []

    def with_white(nets, pool_a, pool_b, x_a, x_b, *args, **named):
        calls.append([p.detach().clone() for p in nets.g_ab.parameters()])
        if len(calls) != 2:
            return step(nets, pool_a, pool_b, x_a, x_b, *args, **named)
        weight = next(nets.g_ab.parameters()).requires_grad_()
        spoilt = weight.register_hook(lambda gradient: torch.full_like(gradient, 1e9))
        losses = step(nets, pool_a, pool_b, torch.ones_like(x_a), x_b, *args, **named)
        spoilt.remove()
        return losses

    monkeypatch.setattr(script, "step", with_white)
    assert script.main(flags(root, tmp_path / "run", "--netG", "resnet_9blocks", "--max-gradient", "1e4")) == 0
    assert all(map(torch.equal, calls[1], calls[2])) and not all(map(torch.equal, calls[0], calls[1]))
    said = capsys.readouterr().out
    assert "iteration 2, " in said and "the gradient of G has the norm" in said and "trainA" in said


# --- data and flags --------------------------------------------------------------------------------------------------


def test_flags_of_the_release(root, tmp_path):
    """Its command line; the file it writes is read again, by --continue_train too where there is nothing else."""
    args = script.parse_args(["--dataroot", "d", "--name", "maps", "--model", "cycle_gan", "--gpu_ids", "-1",
                              "--checkpoints_dir", "c"])
    assert (args.method, args.cpu, args.snapshot_dir, args.pool_size) == ("cyclegan", True, "c/maps", 50)
    assert (args.load_size, args.crop_size, args.n_epochs, args.n_epochs_decay, args.batch_size) == \
        ((286, 286), (256, 256), 100, 100, 1)
    args = script.parse_args(["--dataroot", "d", "--method", "spgan"])
    assert (args.load_size, args.crop_size, args.n_epochs, args.batch_size, args.lambda_contrastive) == \
        ((144, 286), (128, 256), 20, 8, 2)
    folder = tmp_path / "run"
    script.main(flags(root, folder, "--n_epochs", "1", "--n_epochs_decay", "0"))
    saved = checkpoint.load(folder / "1_net_G_B.pth")
    assert saved.segadapt["method"] == "cyclegan"
    assert len(build_generator(from_release(saved)).model) == 25
    (folder / "resume.pth").unlink()
    script.main(flags(root, folder, "--continue_train", "--epoch_count", "2", "--epoch", "1", "--n_epochs", "1",
                      "--n_epochs_decay", "1", "--lr", "0"))
    assert same(dict(checkpoint.load(folder / "2_net_G_B.pth")), dict(saved))


def test_lists_and_directions(root, tmp_path):
    """Folders with lists, and B to A."""
    (tmp_path / "list.txt").write_text("3.png\n1.png\n")
    args = script.parse_args(["--data-folder-train-a", str(root / "trainA"), "--data-folder-train-b",
                              str(root / "trainB"), "--data-list-train-a", str(tmp_path / "list.txt"), "--direction",
                              "BtoA", *SMALL, *SIZES])
    data = script.open_data(args, None)
    assert [p.name for p in data.train_b.images] == ["3.png", "1.png"]
    assert len(data.train_a) == 4 and data.train_a.name.endswith("trainB")


def test_semantic_loss(pair, tmp_path):
    """The labels of a described source come with its crops, and a run with them trains."""
    classes = select_classes(load_description("demo"), load_description("gta5"))
    checkpoint.save_weights(build("Deeplab", len(classes), "resnet18"), tmp_path / "f.pth",
                            {"task": "demo", "classes": list(classes), "pixels": "imagenet"})
    argv = ["--source", "gta5", "--data-dir", str(pair / "gta5"), "--target", "demo", "--data-dir-target",
            str(pair / "cityscapes"), "--snapshot-dir", str(tmp_path / "run"), *SMALL, "--preprocess",
            "scale_width", "--load_size", "96", "--n_epochs", "1", "--n_epochs_decay", "0", "--segmenter",
            str(tmp_path / "f.pth")]
    args = script.parse_args([*argv, "--lambda-semantic", "1", "--labelled"])
    data = script.open_data(args, load_segmenter(tmp_path / "f.pth"))
    sample = data.train_a[(0, 1)]
    assert sample.label.shape == sample.image.shape[1:] and sample.label.unique().numel() > 2
    assert script.main([*argv, "--lambda-semantic", "1", "--labelled"]) == 0
    (loss,) = {line["semantic_A"] + line["semantic_B"] for line in logged(tmp_path / "run", "semantic_A")[:1]}
    assert 2 < loss < 12  # two cross-entropies of an untrained network


def test_pixels():
    """round((x + 1) * 127.5) undoes v / 127.5 - 1 for every value."""
    image = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    assert np.array_equal(np.asarray(from_symmetric(to_symmetric(image))), np.asarray(image))


@pytest.mark.parametrize(("preprocess", "size", "out"), [
    ("resize_and_crop", (96, 72), (64, 64)), ("scale_width_and_crop", (200, 170), (64, 64)),
    ("none", (97, 74), (96, 72)), ("scale_width", (200, 160), (80, 64)), ("crop", (96, 72), (64, 64))])
def test_preprocess(preprocess, size, out):
    transform = Preprocess(preprocess, (80, 80), (64, 64))
    image = picture(np.random.default_rng(0), size)
    label = np.asarray(image)[..., 0].copy()
    x, y = transform(image, label, np.random.default_rng(2))
    assert tuple(x.shape[1:]) == out[::-1] == tuple(y.shape)
    assert np.corrcoef(x[0].flatten(), y.flatten())[0, 1] > 0.9  # cut and mirrored alike


def picture_at(path, size=(96, 72)) -> None:
    path.parent.mkdir(exist_ok=True)
    picture(np.random.default_rng(0), size).save(path)


# name: (what is done to the folder, giving more flags or None; what the message says)
CASES = {
    "one picture": (lambda r: shutil.rmtree(r / "trainA") or picture_at(r / "trainA/0.png"), "holds one picture"),
    "unreadable": (lambda r: (r / "trainB/2.png").write_text("x"), "2.png: not an image that can be read"),
    "too small": (lambda r: ["--preprocess", "crop", "--crop_size", "96,72"] if Image.new("RGB", (90, 40)).save(
        r / "trainB/1.png") is None else [], "1.png: it is 90x40 after resizing, smaller than the crop of 96x72"),
    "tiny": (lambda r: ["--preprocess", "none"] if Image.new("RGB", (90, 40)).save(r / "trainB/1.png") is None else [],
             "1.png: at 88x40, the size of training, it is smaller than 64x64"),
    "sizes": (lambda r: picture_at(r / "trainB/5.png", (80, 80)) or ["--preprocess", "none", "--batch_size", "2"],
              "trainB has pictures of 2 sizes, which make no batch of 2"),
    "no folder": (lambda r: (r / "trainB").rename(r / "other"), "no folder trainB"),
    "crop": (lambda r: ["--crop_size", "60"], "multiples of 4, at least 64"),
    "same": (lambda r: (shutil.rmtree(r / "trainB"), (r / "trainB").symlink_to(r / "trainA"))[2:],
             "4 pictures are in both domains"),
    "no segmenter": (lambda r: ["--lambda_semantic", "1", "--segmenter", "nothing.pth"], "nothing.pth does not exist"),
}


@pytest.mark.parametrize("argv", [["--n_layers_D", "2"], ["--lambda_contrastive", "1"], ["--lambda_semantic", "1"],
                                  ["--labelled"], ["--epoch_count", "201"], ["--crop_size", "0"],
                                  ["--method", "spgan", "--model", "cycle_gan"], ["--demo", "--cameras", "market"]])
def test_flags_that_would_not_act(argv):
    with pytest.raises(SystemExit):
        script.parse_args(["--dataroot", "d", *argv])


@pytest.mark.parametrize(("beside", "idle"), [
    ("", "--margin 1"), ("", "--epoch 5"), ("", "--ops reference"),
    ("--method spgan", "--init_gain 1"), ("--gpu_ids 0", "--gpu 1"), ("--demo", "--name x"),
    ("--demo", "--checkpoints_dir x"), ("--snapshot-dir x", "--name x"),
    ("--demo", "--load_size 80"), ("--preprocess crop", "--load_size 80"), ("--preprocess none", "--load_size 80"),
    ("--preprocess none", "--crop_size 80"), ("--preprocess scale_width", "--crop_size 80"),
    *(("--cameras market", idle) for idle in (
        "--data-root d", "--source gta5", "--target gta5", "--data-folder-train-a d", "--data-list-test-b d",
        "--data-list d", "--data-dir-target d", "--set d", "--direction BtoA")),
    ("--cameras market --resume", "--epoch 5")])
def test_flags_without_effect_are_named(beside, idle, capsys):
    script.parse_args([*beside.split(), *idle.split()])
    assert f"{idle.split()[0]} has no effect with" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "expected"), [
    ("--cpu --gpu_ids 0", dict(cpu=True)), ("--gpu_ids 1", dict(cpu=False, gpu=1)),
    ("--method spgan --n_epochs_decay 20", dict(lr_policy="linear")),
    ("--method spgan --n_epochs_decay 20 --lr_policy constant", dict(lr_policy="constant")),
    ("--method spgan", dict(lr_policy="constant", n_epochs_decay=0)), ("--save-pred-every 7", dict(eval_every=None)),
    ("--save-pred-every 7 --eval-every 3", dict(eval_every=3))])
def test_flags_beside_each_other(argv, expected):
    args = vars(script.parse_args(argv.split()))
    assert {name: args[name] for name in expected} == expected


def test_numbered_weights_do_not_depend_on_snapshots(root, tmp_path, capsys):
    """Of four iterations each, epochs 2 and 3 (the last) leave weights; no kernels are built."""
    assert script.main(flags(root, tmp_path / "run", "--save-pred-every", "5", "--save_epoch_freq", "2",
                             "--preprocess", "none")) == 0
    names = {p.name for p in (tmp_path / "run").glob("*_net_G_A.pth")}
    assert names == {f"{label}_net_G_A.pth" for label in ("latest", 2, 3)}
    assert checkpoint.load(tmp_path / "run/2_net_G_A.pth").segadapt["iteration"] == 8
    assert {p.name for p in (tmp_path / "run/pictures").iterdir()} == {"8.png", "12.png"}
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["pictures", "none"] in said and ["kernels", "reference"] in said


@pytest.mark.parametrize("case", CASES)
def test_bad_input(root, tmp_path, case):
    spoil, fact = CASES[case]
    more = spoil(root)
    more = more if isinstance(more, list) else []
    with pytest.raises(UserError) as caught:
        script.main(flags(root, tmp_path / "run", *more))
    assert fact in str(caught.value), str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_network(root, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for suffix in ("G_A", "G_B", "D_A", "D_B"):
        torch.save({"conv1.weight": torch.ones(3)}, folder / f"latest_net_{suffix}.pth")
    done = execute("train_spgan.py", *flags(root, folder, "--continue_train"), code=2)
    assert "latest_net_G_A.pth holds no ResNet generator" in message(done, "train_spgan.py")


@pytest.mark.parametrize("kind", ["grey", "palette", "rgba", "16 bits"])
def test_kinds_of_pictures(tmp_path, kind):
    """Every one is read as RGB over the full range."""
    image = picture(np.random.default_rng(0))
    if kind == "16 bits":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(tmp_path / "0.png")
    else:
        image.convert({"grey": "L", "palette": "P", "rgba": "RGBA"}[kind]).save(tmp_path / "0.png")
    x = Pictures([tmp_path / "0.png"], Preprocess("none", (64, 64), (64, 64), mirror=False), 0)[0].image
    expected = to_symmetric((image.convert("L") if kind in ("grey", "16 bits") else image).convert("RGB"))
    assert (x - expected).abs().max() < (0.5 if kind == "palette" else 0.02)


# --- camera pairs ----------------------------------------------------------------------------------------------------


def test_cameras(tmp_path, monkeypatch):
    """A translator for each pair of cameras; finished pairs are not trained again, an interrupted one goes on."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data/market/bounding_box_train"
    folder.mkdir(parents=True)
    for person in range(2):
        for camera in (1, 2, 4):
            picture(rng, (64, 128)).save(folder / f"{person + 1:04}_c{camera}s1_000451_03.jpg")
    trained = []
    step = script.step
    monkeypatch.setattr(script, "step", lambda *a, **k: trained.append(1) or step(*a, **k))
    argv = ["--cameras", "market", "--data-dir", str(tmp_path / "data"), "--snapshot-dir", str(tmp_path / "run"),
            *SMALL, *SIZES, "--n_epochs", "1", "--n_epochs_decay", "0"]
    assert script.main([*argv, "--check-data"]) == 0 and not (tmp_path / "run").exists()
    assert script.main(argv) == 0
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["1to2", "1to4", "2to4"] and len(trained) == 6
    assert script.main(argv) == 0 and len(trained) == 6
    assert script.main([*argv, "--overwrite"]) == 0 and len(trained) == 12
    broken = folder / "0002_c4s1_000451_03.jpg"
    broken.write_text("x")
    for more in ([], ["--check-data"]):  # the third camera's pictures are read before the first pair is trained
        with pytest.raises(UserError, match=f"{broken.name}: not an image"):
            script.main([*argv, "--overwrite", *more])
    assert len(trained) == 12
    with pytest.raises(UserError, match="plaza"):
        script.main(["--cameras", "plaza", "--data-dir", str(tmp_path / "nowhere")])
    args = script.parse_args(["--cameras", "market", "--data-dir", "data"])
    assert (args.n_epochs, args.n_epochs_decay, args.batch_size, args.lambda_identity) == (30, 20, 1, 0.5)


def test_demo(tmp_path, monkeypatch, in_this_process, capsys):
    """Everything it writes lies in the run's folder: two seeds may run side by side."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "render_demo", lambda root, seed: render(root))
    monkeypatch.setattr(script, "compare_translations", partial(script.compare_translations, steps=1))
    small = [*SMALL, *SIZES, "--preprocess", "resize_and_crop", "--n_epochs", "1", "--n_epochs_decay", "0"]
    assert script.main(["--demo", "--method", "spgan", *small]) == 0
    table = capsys.readouterr().out
    for column in ("original", "original, target BN", "mean, deviation", "spgan", "spgan, target BN"):
        assert column in table
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "snapshots"]
    folder = tmp_path / "snapshots/demo_spgan/1234/demo"
    assert len(list((folder / "spgan").iterdir())) == len(list((folder / "matched").iterdir())) == 5


def test_pool_of_several_processes():
    """What gather gives is what the pool holds; the process keeps its own rows."""
    class Two(Run):
        def gather(self, value):
            return torch.cat([value, value + 100])

    pool = script.ImagePool(8, np.random.default_rng(0), Two(torch.device("cpu"), 1, 2, "off"))
    out = pool.query(torch.arange(2.0).view(2, 1, 1, 1))
    assert out.flatten().tolist() == [100, 101] and len(pool.held) == 4
    json.dumps(pool.rng.bit_generator.state)

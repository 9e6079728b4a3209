"""train_cbst.py as its user runs it: every variant, what it writes, every way it can be stopped, and bad input."""
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from interrupted import TinyNet, shrink
from PIL import Image
from scipy.ndimage import gaussian_filter
from scripts import (
    HEIGHT,
    WIDTH,
    assert_same_tree,
    execute,
    in_two_processes,
    interrupted,
    logged,
    message,
    render,
    tree,
)

import train_adaptsegnet
import train_cbst as script
from lib import checkpoint
from lib.datasets.description import Domain, load_description
from lib.datasets.folder import ImageFolder
from lib.datasets.labels import read_indices, written_values
from lib.datasets.prior import balanced_prior, spatial_prior
from lib.errors import UserError
from lib.models.deeplab import build
from lib.models.fcn8s import FCN8s

SCRIPT = "train_cbst.py"
CLASSES = list(load_description("demo").classes)
META = {"model": "Deeplab", "arch": "resnet18", "aspp": "full", "stride_on": "1x1", "pixels": "imagenet",
        "task": "demo", "classes": CLASSES, "size": [WIDTH, HEIGHT], "align_corners": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """pair/, start.pth (the real network), tiny.pth (that of interrupted.py)."""
    root = tmp_path_factory.mktemp("cbst")
    render(root / "pair")
    torch.manual_seed(0)
    net = build("Deeplab", len(CLASSES), "resnet18", "full")
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)  # more than one class wins
    checkpoint.save_weights(net, root / "start.pth", META)
    checkpoint.save_weights(tiny(), root / "tiny.pth", META)
    yield root
    shutil.rmtree(root)


def tiny(scale: float = 8.0) -> TinyNet:
    torch.manual_seed(1)
    net = TinyNet(len(CLASSES))
    net.layer5.weight.data *= scale
    return net


def rounds(place: Path, folder: Path, *more: str, start: str = "tiny.pth") -> list[str]:
    """Arguments for three rounds (the last only scores) of three steps on the rendered pair."""
    return ["--target", "demo", "--data-dir", str(place / "pair/gta5"), "--data-dir-target",
            str(place / "pair/cityscapes"), "--restore-from", str(place / start), "--crop-size", f"{WIDTH},{HEIGHT}",
            "--num-rounds", "3", "--epr", "1", "--init-src-port", "0.4", "--max-src-port", "1", "--src-port-step",
            "0.2", "--ds-rate", "2", "--num-workers", "0", "--log-every", "1", "--save-num-images", "0", "--cpu",
            "--ops", "reference", "--learning-rate", "1e-3", "--save", str(folder), *more]


@pytest.fixture
def in_process(in_this_process, monkeypatch):
    """script.main() runs in this process, with the network of interrupted.py."""
    for owner, name in ((script, "build"), (checkpoint, "build"), (checkpoint, "recognise")):
        if hasattr(owner, name):  # to be put back: shrink() changes them for good
            monkeypatch.setattr(owner, name, getattr(owner, name))
    shrink(script)


def report(folder: Path, number: int) -> dict:
    return json.loads((folder / str(number) / "report.json").read_text())


# --- variants ---------------------------------------------------------------------------------------------------------

VARIANTS = {
    "ST": ["--kc-policy", "global"], "CBST": [], "own probability": ["--kc-value", "prob"],
    "CBST-SP": ["--spatial-prior", "build"], "MRKLD": ["--mr-weight-kld", "0.1"],
    "LRENT": ["--lr-weight-ent", "0.25"], "everything": ["--lr-weight-ent", "0.25", "--mr-weight-kld", "0.1",
                                                         "--spatial-prior", "build", "--test-flipping"],
    "bf16": ["--amp", "bf16"], "workers": ["--num-workers", "1"],
    "others": ["--is-training", "--bn-stats", "target", "--bn-affine", "train", "--sgd", "once", "--deterministic",
               "--save-color", "--input-size", "48,32", "--input-size-target", "80,60", "--crop-size", "70,40"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(place, folder, in_process, variant):
    flags = VARIANTS[variant]
    assert script.main(rounds(place, folder, *flags)) == 0
    lines = logged(folder)
    losses = ["loss_seg", *["loss_kld"] * ("--mr-weight-kld" in flags)]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6] and [line["round"] for line in lines] == [
        0, 0, 0, 1, 1, 1]
    for line in lines:
        assert list(line) == ["iteration", "round", *losses, "lr"] and all(0 < line[k] < 50 for k in losses)
    for number, labelled in ((0, 0.2), (1, 0.25)):
        found = report(folder, number)
        assert found["target_portion"] == labelled and 0.15 < found["labelled_share"] <= 1
        if variant == "ST":  # with one threshold what is labelled is the portion, up to ties and rounding
            assert found["labelled_share"] == pytest.approx(labelled, abs=0.02)
        values = set(found["thresholds"].values())
        assert len(values) == 1 if variant == "ST" else len(values) > 2
    assert set(report(folder, 2)) == {"round", "mIoU", "iou"}
    before, after = (checkpoint.load(f) for f in (place / "tiny.pth", folder / "1/weights.pth"))
    assert not torch.equal(before["conv1.weight"], after["conv1.weight"])
    still = torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])
    assert still == (variant != "others") and torch.equal(before["bn1.weight"], after["bn1.weight"]) == still


FLAGS = {  # each changes the weights that a run ends with
    "--epr": "2", "--ds-rate": "1", "--init-tgt-port": "0.5", "--tgt-port-step": "0.2", "--max-tgt-port": "0.1",
    "--init-src-port": "0.8", "--src-port-step": "0.4", "--max-src-port": "0.2", "--src-sampling-policy": "c",
    "--mine-port": "0.2", "--kc-policy": "global", "--kc-value": "prob", "--spatial-prior": "build",
    "--mr-weight-kld": "0.1", "--lr-weight-ent": "0.5", "--no-random-scale": "", "--no-random-mirror": "",
    "--eval-scale": "1.0", "--test-flipping": "", "--is-training": "", "--bn-stats": "target", "--bn-affine": "train",
    "--batch-size": "1", "--learning-rate": "1e-4", "--momentum": "0.5", "--weight-decay": "0.1", "--power": "0.9",
    "--sgd": "once", "--random-seed": "4", "--pixels": "caffe", "--input-size": "32,24", "--crop-size": "40,30",
    "--input-size-target": "32,24", "--subset": "3", "--amp": "bf16", "--mine-chance": "0",
}


def test_every_flag_acts(place, folder, in_process, capsys):
    def final(*flags: str) -> torch.Tensor:
        number = 3 if flags and "port-step" in flags[0] else 2
        shutil.rmtree(folder, ignore_errors=True)
        always = ["--collapse", "1", "--test-scales", "1.0", *["--mine-port", "0.1"] * ("--mine-port" not in flags)]
        assert script.main(rounds(place, folder, *always, "--num-rounds", str(number), *flags)) == 0
        return torch.cat([v.flatten() for v in checkpoint.load(folder / f"{number - 2}/weights.pth").values()])

    plain, again, later = final(), final(), final("--tgt-port-step", "0.05")
    assert torch.equal(plain, again), "a run repeats"
    for flag, value in FLAGS.items():
        assert not torch.equal(later if "port-step" in flag else plain, final(flag, *[value] * bool(value))), flag
    scores = []
    for flags in ([], ["--test-scales", "0.7,1.0"], ["--no-score-flipping"]):
        final(*flags)
        scores.append(report(folder, 0)["mIoU"])
    assert len(set(scores)) == 3
    frequency = final("--spatial-prior", "build")
    assert not torch.equal(frequency, final("--spatial-prior", "build", "--prior-norm", "class"))
    final("--rare-cls-num", "5")
    assert len(report(folder, 0)["rare"]) == 5


def test_what_a_run_writes_and_prints(place, folder):
    """The script itself. Any other script can train on its labels."""
    done = execute(SCRIPT, *rounds(place, folder, "--save-num-images", "2", "--save-color", "--num-rounds", "2",
                                   "--learning-rate", "1e-6", start="start.pth"))
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    images = [f"leftImg8bit/train/{city}/{city}_{n:06}_000019_leftImg8bit.png" for n, city in
              enumerate(("millbrook", "northgate", "riverton", "millbrook"))]
    assert names == {"best.pth", "log.jsonl", "resume.pth", "rounds.jsonl", "1/report.json", *(
        f"0/{name}" for name in ("report.json", "weights.pth", "pictures.png", "pseudo_labels.json", "train.txt",
                                 "source.txt", *(f"pseudo_labels{c}/{i}" for c in ("", "_color") for i in images)))}
    found = report(folder, 0)
    assert list(found["thresholds"]) == CLASSES and found["source_images"] == 2 and len(found["rare"]) == 3
    demo = load_description("demo")
    values, counts = np.unique([read_indices(folder / "0/pseudo_labels" / i) for i in images], return_counts=True)
    assert values[0] == 0 and set(values.tolist()) <= {0, *(ids[0] for ids in demo.ids)}
    written = {demo.classes[[i[0] for i in demo.ids].index(v)]: n for v, n in
               zip(values.tolist()[1:], counts.tolist()[1:], strict=True)}
    assert written == {k: v for k, v in found["labelled"].items() if v}
    assert found["labelled_share"] == counts[1:].sum() / counts.sum()
    assert sum(found["predicted"].values()) == counts.sum() == 4 * WIDTH * HEIGHT
    image = Image.open(folder / "0/pseudo_labels" / images[0])
    assert image.mode == "L" and image.size == (WIDTH, HEIGHT)
    assert Image.open(folder / "0/pictures.png").width > 3 * 256  # image, pseudo-label, truth
    assert len((folder / "rounds.jsonl").read_text().splitlines()) == 2

    meta = checkpoint.read_weights(folder / "0/weights.pth")[1]
    assert meta["aspp"] == "full" and meta["pixels"] == "imagenet" and meta["classes"] == CLASSES
    for fact in ("kernels     reference", "108 tensors loaded", "Deeplab resnet18, 14 classes, ASPP full",
                 "weights frozen, statistics frozen", "5 images of gta5, 2 in round 0", "4 images of demo to label",
                 "one per class (conf)", "hard labels", "threshold  predicted %  labelled %    IoU",
                 "iter =        1/       3, round = 0 loss_seg = ", f"last {report(folder, 1)['mIoU']:.2f}"):
        assert fact in done.stdout, fact

    labels = folder / "0/pseudo_labels.json"
    again = ImageFolder(Domain.open(labels), CLASSES, None, task=demo)
    assert len(again) == 4 and (again.truth(1) == 255).any() and (again.truth(1) < 14).any()
    with pytest.raises(SystemExit) as left:
        train_adaptsegnet.main(["--check-data", "--cpu", "--source", str(labels), "--target", "demo",
                                "--data-dir-target", str(place / "pair/cityscapes"), "--source-only", "--ops",
                                "reference"])
    assert left.value.code == 0


@pytest.mark.parametrize("name, unlabelled", [("cityscapes", 0), ("camvid", 11), ("demo", 0), ("synthia", 0),
                                              ("idd_lite", 255), ("gta5", 0)])
def test_values_of_label_files(name, unlabelled):
    """Unlabelled is no class, and the data set's own description ignores it."""
    d = load_description(name)
    ids, void = written_values(d)
    assert void == unlabelled and void not in ids and void in d.void and len(set(ids)) == len(d.classes)


def test_spatial_prior():
    """How often each class covers each pixel, smoothed; a constant map stays constant; saved and read again."""
    labels = [np.full((30, 40), c, np.uint8) for c in (0, 0, 1, 255)]
    labels[2][:, :20] = 2
    prior = spatial_prior(iter(labels), 4, (60, 80))
    assert prior.shape == (4, 60, 80) and prior.dtype == np.float32
    np.testing.assert_allclose(prior[0], 0.5, rtol=1e-6)
    left = np.zeros((60, 80))
    left[:, :40] = 0.25
    np.testing.assert_allclose(prior[2], gaussian_filter(left, 60 * 70 / 6 / 1024, truncate=3), atol=1e-6)
    assert not prior[3].any() and prior.sum(0) == pytest.approx(0.75, rel=1e-5)
    balanced = balanced_prior(torch.from_numpy(prior))
    sums = balanced.double().sum((1, 2))
    assert sums[0].item() == pytest.approx(sums[2].item(), rel=1e-4) and sums[3] == 0 and balanced.max() == 1
    torch.testing.assert_close(balanced[2] / balanced[2].max(), torch.from_numpy(prior[2] / prior[2].max()))


# --- stopping and going on --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    interrupted(SCRIPT, *rounds(place, folder))
    return tree(folder)


@pytest.mark.parametrize("when", ["rename report.json:1", "write weights.pth:1", "rename 0:1"])
def test_a_folder_with_a_round_s_name_is_a_whole_round(place, folder, uninterrupted, when):
    """Killed at any moment; tests/test_trainers.py goes on from there."""
    interrupted(SCRIPT, *rounds(place, folder), at=when, code=-signal.SIGKILL)
    for number in range(3):
        if (folder / str(number)).exists():
            assert {p.relative_to(folder).as_posix() for p in (folder / str(number)).rglob("*") if p.is_file()} == {
                name for name in uninterrupted if name.startswith(f"{number}/")}


def test_a_signal_while_labelling_saves_and_leaves(place, folder, uninterrupted):
    """After the image it is at."""
    arguments = rounds(place, folder, "--num-workers", "1", "--save-pred-every", "100")
    text = interrupted(SCRIPT, *arguments, at="count:2", by="SIGTERM", code=128 + signal.SIGTERM)
    assert "--resume goes on from" in text and "Traceback" not in text
    assert checkpoint.load(folder / "0.partial/progress.pth")["position"] == 2
    interrupted(SCRIPT, *arguments, "--resume")
    assert_same_tree(folder, uninterrupted)


def test_resume_with_more_rounds(place, folder, in_process, uninterrupted):
    assert script.main(rounds(place, folder, "--num-rounds", "2")) == 0
    assert script.main([*rounds(place, folder), "--resume"]) == 0
    assert_same_tree(folder, uninterrupted)


def test_two_processes_are_one(place, folder):
    """Thresholds, labels and scores to the last bit, with an odd number of images; the training on them to rounding.

    The labels of the next round are decided by thresholds, on which that rounding may tell.
    """
    one, two = folder / "one", folder / "two"
    flags = ["--subset", "3", "--test-flipping", "--save-pred-every", "1"]
    interrupted(SCRIPT, *rounds(place, one, *flags, "--batch-size", "2", "--spatial-prior", "build"))
    in_two_processes("tests/interrupted.py", "train_cbst", "never:0", "SIGKILL",
                     *rounds(place, two, *flags, "--batch-size", "1", "--spatial-prior", "build"))
    assert report(one, 0) == report(two, 0) and report(one, 0)["labelled_share"] > 0.1
    labels = [p.relative_to(one) for p in (one / "0/pseudo_labels").rglob("*.png")]
    assert len(labels) == 3 and all((one / p).read_bytes() == (two / p).read_bytes() for p in labels)
    ours, theirs = logged(two), logged(one)
    assert [line["iteration"] for line in ours] == [line["iteration"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        if a["round"] == 0:
            assert a == pytest.approx(b, rel=1e-4)
    weights = [checkpoint.load(d / "0/weights.pth") for d in (one, two)]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-5, msg=key)
    assert {p.relative_to(one) for p in one.rglob("*")} == {p.relative_to(two) for p in two.rglob("*")}


def test_without_a_cache_logits_are_computed_again(place, folder, in_process):
    for name, flag in (("kept", []), ("again", ["--cache-mb", "0"])):
        assert script.main(rounds(place, folder / name, "--test-flipping", *flag)) == 0
    assert_same_tree(folder / "again", tree(folder / "kept"))


def test_without_a_validation_set(place, folder, in_process):
    pair = shutil.copytree(place / "pair", folder.parent / "pair")
    shutil.rmtree(pair / "cityscapes/leftImg8bit/val")
    target = ["--data-dir-target", str(pair / "cityscapes")]
    assert script.main(rounds(place, folder, *target, "--save-num-images", "1")) == 0
    assert report(folder, 2) == {"round": 2} and "mIoU" not in report(folder, 1)
    assert not (folder / "best.pth").exists() and (folder / "rounds.jsonl").exists()


def test_the_demo(place, tmp_path, in_process, monkeypatch, capsys):
    """A start is trained on the rendered source, rounds follow, tables and pictures compare the two."""
    rendered = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "render_demo", lambda root, seed: rendered.append((str(root), seed)))
    monkeypatch.setattr(script, "DEMO_START_STEPS", 3)
    flags = ["--demo", "--data-dir", str(place / "pair/gta5"), "--data-dir-target", str(place / "pair/cityscapes"),
             "--input-size", "64,48", "--input-size-target", "64,48", "--crop-size", "64,48", "--cpu", "--num-rounds",
             "2", "--collapse", "1", "--seed", "5"]
    assert script.main(flags) == 0
    start = tmp_path / "snapshots/demo_cbst/5/start.pth"
    before = start.read_bytes()
    assert {key: checkpoint.read_weights(start)[1][key] for key in ("arch", "pixels")} == {
        "arch": "resnet18", "pixels": "caffe"}
    assert rendered == [("data/demo/5", 5)] and (tmp_path / "result/demo_cbst/report.png").exists()
    assert re.search(r"source only +source, target BN +adapted", capsys.readouterr().out)
    assert script.main([*flags, "--resume"]) == 0 and start.read_bytes() == before


@pytest.mark.parametrize("flags, pixels", [([], "imagenet"), (["--pixels", "caffe"], "caffe")])
def test_the_demo_keeps_what_a_checkpoint_says(place, flags, pixels):
    args = script.parse_args(["--demo", "--restore-from", str(place / "start.pth"), *flags])
    assert script.open_network(args, CLASSES)[1]["pixels"] == pixels


def test_fp16_scales_its_losses(place, folder, in_process, monkeypatch):
    factors = []
    original = script.step

    def step(*arguments, scale, **named):
        factors.append(scale(torch.ones(())).item())
        return original(*arguments, scale=scale, **named)

    monkeypatch.setattr(script, "step", step)
    assert script.main(rounds(place, folder, "--amp", "fp16", "--num-rounds", "2")) == 0
    assert factors[0] == 2 ** 16 and checkpoint.load(folder / "resume.pth")["scaler"]["scale"] <= 2 ** 16


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_class_without_predictions_is_fine(place, folder, in_process):
    net = tiny()
    net.layer5.bias.data[3] = -1e4
    checkpoint.save_weights(net, place / "lacks.pth", META)
    assert script.main(rounds(place, folder, start="lacks.pth")) == 0
    found = report(folder, 0)
    assert found["predicted"]["wall"] == found["labelled"]["wall"] == found["selected"]["wall"] == 0
    assert found["thresholds"]["wall"] == 1 and "wall" in found["mine"] and max(found["labelled"].values()) > 0


def test_all_pixels_of_one_class(place, folder):
    """One message, exit code 2, no traceback; and where a later round collapses, the last good checkpoint."""
    net = build("Deeplab", len(CLASSES), "resnet18", "full")
    net.layer5.conv2d_list[0].bias.data[2] = 1e3
    checkpoint.save_weights(net, place / "one.pth", META)
    text = message(execute(SCRIPT, *rounds(place, folder, start="one.pth"), code=2), SCRIPT)
    assert "round 0: the network to start from has collapsed: 100.0 % of the pixels are 'building'" in text
    assert text.count("\n") == 1 and not (folder / "0").exists()


def test_collapse_after_a_round_names_the_last_good_checkpoint(place, folder, in_process, monkeypatch):
    flags = rounds(place, folder, "--sgd", "once")
    with pytest.raises(UserError) as caught:
        script.main([*flags, "--collapse", "0.2"])
    assert re.search(r"round 0: the network to start from has collapsed: .* --bn-stats target", str(caught.value))
    shutil.rmtree(folder)
    step = script.step

    def spoiling(net, *args, **named):
        net.layer5.bias.data[0] = 1e3
        return step(net, *args, **named)

    monkeypatch.setattr(script, "step", spoiling)
    with pytest.raises(UserError) as caught:
        script.main(flags)
    text = str(caught.value)
    assert "round 1: the network trained in round 0 has collapsed" in text
    assert f"Last good checkpoint: {place / 'tiny.pth'}" in text and "lower --learning-rate" in text


def spoilt(place: Path, bias: float) -> str:
    net, file = tiny(), place / f"{bias}.pth"
    net.layer5.bias.data[0] = bias
    checkpoint.save_weights(net, file, META)
    return str(file)


def prior_of(place: Path, shape: tuple[int, ...], value: float = 0.5) -> str:
    np.savez(place / "prior.npz", prior_array=np.full(shape, value, np.float32))
    return str(place / "prior.npz")


CASES = {
    "overlapping lists": (lambda p: ["--set", "val"], ["2 images belong to both the training set", "choose another"]),
    "prior of other classes": (lambda p: ["--spatial-prior", prior_of(p, (13, HEIGHT, WIDTH))],
                               ["prior_array is 13 x 48 x 64; it should be 14 x height x width"]),
    "prior of another size": (lambda p: ["--spatial-prior", prior_of(p, (14, 24, 32))],
                              ["prior.npz is 32x24, but the target's images are 64x48", "--spatial-prior build"]),
    "prior of wrong values": (lambda p: ["--spatial-prior", prior_of(p, (14, HEIGHT, WIDTH), 2)], ["values 0..1"]),
    "no prior": (lambda p: ["--spatial-prior", str(p / "none.npz")], ["no prior can be read from it", "or 'build'"]),
    "a prior that is text": (lambda p: ["--spatial-prior", str(p / "pair/demo.json")], ["no prior can be read"]),
    "missing start": (lambda p: ["--restore-from", str(p / "no.pth")], ["no.pth does not exist"]),
    "other classes": (lambda p: ["--target", "cityscapes", "--data-dir-target", str(p / "pair/cityscapes")],
                      ["tells 14 classes apart, not the 19 of this run"]),
    "subset too large": (lambda p: ["--subset", "9"], ["--subset 9: the target has 4 images"]),
    "weights that are not finite": (lambda p: ["--restore-from", spoilt(p, float("nan"))],
                                    ["nan.pth holds NaN or infinite values, in layer5.bias first"]),
    "missing set": (lambda p: ["--val-set", "none"], ["no image of the set 'none'"]),
    "missing folder": (lambda p: ["--data-dir", str(p / "nowhere")], ["nowhere: no such folder"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_message_before_anything_is_done(place, folder, in_process, case):
    spoil, facts = CASES[case]
    with pytest.raises(UserError) as caught:
        script.main(rounds(place, folder, *spoil(place)))
    for fact in facts:
        assert fact in str(caught.value), str(caught.value)
    assert not list(folder.glob("*"))


def test_a_network_whose_output_is_not_finite(place, folder, in_process):
    """All of its weights are finite, but not the logits' sum with a bias close to the largest float."""
    net = tiny()
    net.layer5.weight.data[0], net.layer5.bias.data[0] = 3e38, 3e38
    checkpoint.save_weights(net, place / "large.pth", META)
    with pytest.raises(UserError, match="round 0: .*logits hold NaN or infinite values"):
        script.main(rounds(place, folder, start="large.pth"))


def test_overlap_when_told_so(place, folder, in_process):
    assert script.main(rounds(place, folder, "--set", "val", "--allow-overlap", "--num-rounds", "1")) == 0


def test_a_subset_is_drawn_and_listed(place, folder, in_process):
    assert script.main(rounds(place, folder / "a", "--subset", "3", "--seed", "7", "--num-rounds", "2")) == 0
    lines = (folder / "a/subset.txt").read_text().splitlines()
    assert len(lines) == 3 and sorted(lines) == lines
    listed = ["--data-list-target", str(folder / "a/subset.txt"), "--seed", "7", "--num-rounds", "2"]
    assert script.main(rounds(place, folder / "b", *listed)) == 0
    assert report(folder / "a", 0) == report(folder / "b", 0)


def test_defaults_are_those_of_the_release():
    released = dict(
        mine_port=1e-3, rare_cls_num=3, mine_chance=0.8, ds_rate=4, init_tgt_port=0.2, max_tgt_port=0.5,
        tgt_port_step=0.05, init_src_port=0.03, max_src_port=0.06, src_port_step=0.0025, num_rounds=4, epr=2,
        learning_rate=5e-5, power=0.0, momentum=0.9, weight_decay=5e-4, batch_size=2, random_seed=3)
    args = vars(script.parse_args(["--restore-from", "x"]))
    assert {name: args[name] for name in released} == released


@pytest.mark.parametrize("flags", [["--num-rounds", "0"], ["--init-tgt-port", "1.2"], ["--mine-chance", "-1"],
                                   ["--test-scales", "a"], ["--eval-scale", "0"], ["--kc-policy", "x"],
                                   ["--subset", "0"], ["--lr-weight-ent", "-1"]])
def test_flags_that_make_no_sense(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        script.parse_args(["--restore-from", "x", *flags])
    assert caught.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--prior-norm", "class"], "--prior-norm has no effect without --spatial-prior"),
    (["--model", "DeeplabPixelAssoc", "--aspp", "released"], "sums all four rates")])
def test_flags_without_effect(flags, words, capsys):
    with pytest.raises(SystemExit) as caught:
        script.parse_args(["--restore-from", "x", *flags])
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_a_pixel_association_network_sums_all_rates(place, folder):
    net = build("DeeplabPixelAssoc", len(CLASSES), "resnet18", "full")
    checkpoint.save_weights(net, place / "asso.pth", {**META, "model": "DeeplabPixelAssoc"})
    with pytest.raises(UserError, match="--aspp released: .* sums all four rates"):
        script.main(rounds(place, folder, "--aspp", "released", start="asso.pth"))
    assert not folder.exists()


def test_help_says_what_the_flags_do_here(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("images a process and backward pass (default: 2)", "(default: their files' size)",
                  "between saves of what --resume needs (default: 500)"):
        assert words in text


def test_a_start_of_another_kind_of_network(place, folder):
    net = FCN8s(14, width=0.03125)
    checkpoint.save_weights(net, place / "fcn.pth", {"model": "FCN8s", "width": 0.03125})
    text = message(execute(SCRIPT, *rounds(place, folder, start="fcn.pth"), code=2), SCRIPT)
    assert "fcn.pth is a FCN8s; self-training is for" in text and "DeeplabVGG" in text
    assert text.count("\n") == 1 and not folder.exists()


def test_a_start_is_needed(capsys):
    with pytest.raises(SystemExit) as caught:
        script.parse_args([])
    assert caught.value.code == 2 and "train_adaptsegnet.py --source-only" in capsys.readouterr().err



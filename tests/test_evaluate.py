"""evaluate.py as its user runs it: what it writes, that scores agree with compute_iou.py, and bad input."""
import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import execute, message, render

import evaluate as script
from lib import checkpoint, ops
from lib.datasets.description import load_description
from lib.errors import UserError
from lib.models.deeplab import build
from lib.models.fcn8s import FCN8s
from train_adaptsegnet import FCDiscriminator

DEMO = load_description("demo")


def weights(path: Path, classes: int, model: str = "DeeplabMulti", meta: dict | None = None) -> Path:
    """A checkpoint of random weights: plain as the release's with meta None, else as the trainer's."""
    torch.manual_seed(0)
    net = build(model, classes, "resnet18")
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)  # more than one class wins
    if meta is None:
        torch.save(net.state_dict(), path)
    else:
        checkpoint.save_weights(net, path, meta)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """pair/, trained.pth (14 classes, with its memory) and released.pth (19, keys only)."""
    root = tmp_path_factory.mktemp("evaluate")
    render(root / "pair", n_source=1, n_target=2, n_val=3)
    weights(root / "trained.pth", 14, meta={
        "model": "DeeplabMulti", "arch": "resnet18", "aspp": "full", "stride_on": "1x1", "pixels": "imagenet",
        "task": "demo", "classes": list(DEMO.classes), "size": [64, 48], "align_corners": True})
    weights(root / "released.pth", 19, "Deeplab")
    yield root
    shutil.rmtree(root)


def arguments(place: Path, *more: str, file: str = "trained.pth") -> list[str]:
    return ["--restore-from", str(place / file), "--cpu", "--num-workers", "0", "--ops", "reference", *more]


def evaluate(place: Path, *more: str, file: str = "trained.pth") -> str:
    """Run main() in ``place``, in this process; what it printed."""
    printed, before, mode = io.StringIO(), os.getcwd(), ops.use("reference")
    os.chdir(place)
    try:
        with contextlib.redirect_stdout(printed):
            script.main(arguments(place, *more, file=file))
    finally:
        os.chdir(before)
        ops.use(mode)
    return printed.getvalue()


def refusal(place: Path, *more: str, file: str = "trained.pth") -> str:
    with pytest.raises(UserError) as caught:
        evaluate(place, *more, file=file)
    return str(caught.value)


def on_demo(place: Path) -> list[str]:
    return ["--data-dir", str(place / "pair/cityscapes")]


def printed_mean(text: str) -> str:
    return re.search(r"^mean +([\d.]+)", text, re.MULTILINE)[1]


def stems(folder: Path) -> list[str]:
    return [p.name.removesuffix(".png") for p in sorted((folder / "leftImg8bit/val").rglob("*.png"))]


def test_maps_scores_and_everything_beside_them(place, tmp_path):
    flags = arguments(place, *on_demo(place), "--save", "out", "--json", "scores.json", "--label-ids", "--overlay",
                      "--panels")
    done = execute("evaluate.py", *flags, cwd=place)
    out, names = place / "out", stems(place / "pair/cityscapes")
    endings = (".png", "_color.png", "_overlay.png", "_panel.png")
    assert {p.name for p in out.iterdir()} == {"labelIds", *(n + e for n in names for e in endings)}
    for name in names:
        label = Image.open(out / f"{name}.png")
        values = np.asarray(label)
        assert label.mode == "L" and label.size == (64, 48) and values.max() < 14
        colours = np.asarray(Image.open(out / f"{name}_color.png").convert("RGB"))
        assert np.array_equal(colours, DEMO.palette[values])
        ids = np.asarray(Image.open(out / f"labelIds/{name}.png"))
        assert np.array_equal(ids, np.array([i[0] for i in DEMO.ids], np.uint8)[values])
        assert Image.open(out / f"{name}_overlay.png").size == (64, 48)
        assert Image.open(out / f"{name}_panel.png").width > 3 * 64  # image, truth, prediction
    assert len(np.unique(values)) > 1
    for fact in ("DeeplabMulti resnet18, 14 classes, ASPP full", "pixels     imagenet", "(64, 48), labelled"):
        assert fact in done.stdout, done.stdout
    scored = execute("compute_iou.py", str(place / "pair/cityscapes/gtFine/val"), str(out), "--data", "demo",
                     "--json", str(tmp_path / "theirs.json"))
    ours, theirs = (json.loads(p.read_text()) for p in (place / "scores.json", tmp_path / "theirs.json"))
    shared = ours.keys() & theirs.keys()
    assert {"mIoU", "confusion"} & shared, (ours.keys(), theirs.keys())
    assert all(ours[k] == theirs[k] for k in shared)
    assert printed_mean(done.stdout) in scored.stdout


def test_a_file_of_the_release_on_any_pictures(place):
    """Keys only, 19 classes: network and classes are recognised. Pictures keep their sizes and proportions."""
    sizes = {"odd": (37, 53), "wide": (120, 31), "sub/small": (9, 7)}
    for n, (name, size) in enumerate(sizes.items()):
        path = place / f"pictures/{name}.{('png', 'jpg', 'bmp')[n]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    (place / "pictures/notes.txt").touch()
    printed = evaluate(place, "--images", "pictures", "--size", "64,48", "--panels", file="released.pth")
    out = place / "result/pictures"
    for name, size in sizes.items():
        for ending in (".png", "_color.png"):
            assert Image.open(out / (Path(name).name + ending)).size == size
    assert "Deeplab resnet18, 19 classes, ASPP released" in printed and "pixels     caffe" in printed
    assert "no labels" in printed and "mean" not in printed
    assert "of pictures at (64, 48), no labels" in printed
    assert "no labels to score against" in refusal(place, "--images", "pictures", "--json", "x.json")
    Image.new("RGB", (9, 9)).save(place / "pictures/sub/wide.png")
    evaluate(place, "--images", "pictures", "--size", "64,48", file="released.pth")  # names repeat: folders are kept
    assert Image.open(out / "sub/wide.png").size == (9, 9) and Image.open(out / "wide.png").size != (9, 9)
    Image.new("RGB", (9, 9)).save(place / "pictures/sub/wide.jpg")
    text = refusal(place, "--images", "pictures")
    assert "sub/wide.png" in text and "sub/wide.jpg" in text and "same name" in text


def test_a_checkpoint_of_crst(place):
    """Its keys are those of Deeplab; all four rates are summed, and pixels are RGB with mean and deviation."""
    state = torch.load(weights(place / "crst.pth", 19, "Deeplab"))
    path = place / "one/picture.png"
    path.parent.mkdir(exist_ok=True)
    pixels = np.kron(np.random.default_rng(5).integers(0, 256, (3, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    assert "1 of one at a height of 512 pixels, no labels" in evaluate(
        place, "--images", "one", "--save", "none", "--aspp", "full", file="crst.pth")
    printed = evaluate(place, "--images", "one", "--size", "64,48", "--save", "crst", "--aspp", "full", "--pixels",
                       "imagenet", file="crst.pth")
    assert "Deeplab resnet18, 19 classes, ASPP full" in printed and "pixels     imagenet" in printed
    net = build("Deeplab", 19, "resnet18", "full").eval()
    net.load_state_dict(state)
    x = (pixels / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    with torch.no_grad():
        features = net.stages(torch.from_numpy(x).float().permute(2, 0, 1)[None])[2]
        logits = sum(conv(features) for conv in net.layer5.conv2d_list)
    label = torch.nn.functional.interpolate(logits, (48, 64), mode="bilinear", align_corners=True).argmax(1)[0].numpy()
    ours = np.asarray(Image.open(place / "crst/picture.png"))
    assert (ours == label).mean() > 0.999 and len(np.unique(label)) > 2
    for flags in (["--pixels", "imagenet"], ["--aspp", "full"]):  # each of the two matters
        evaluate(place, "--images", "one", "--size", "64,48", "--save", "other", *flags, file="crst.pth")
        assert (np.asarray(Image.open(place / "other/picture.png")) != label).mean() > 0.01


@pytest.fixture(scope="module")
def plain(place):
    """(the maps, the printed mean) without any option."""
    printed = evaluate(place, *on_demo(place), "--save", "plain")
    return maps(place / "plain"), printed_mean(printed)


def maps(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob("*_leftImg8bit.png"))])


OPTIONS = {  # at least this share of the pixels stays, and at most that share
    "flip": (["--flip"], 0.2, 0.999),
    "scales": (["--scales", "0.75,1.0,1.25"], 0.2, 0.999),
    "batch norm": (["--bn-stats", "target"], 0.0, 0.999),
    "bf16": (["--amp", "bf16"], 0.95, 1.0),
    "other size": (["--size", "96,64"], 0.2, 0.999),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_act(place, plain, option):
    flags, least, most = OPTIONS[option]
    printed = evaluate(place, *on_demo(place), "--save", option, *flags)
    same = (maps(place / option) == plain[0]).mean()
    assert least <= same <= most
    if option == "batch norm":
        assert "re-estimated on 2 images" in printed


def test_the_resume_file_and_no_output(place, plain):
    """What a run goes on from can be evaluated as well."""
    state = torch.load(place / "trained.pth")
    torch.save({"iteration": 3, "net": state, "optimizers": []}, place / "resume.pth")
    before = set(place.iterdir())
    printed = evaluate(place, *on_demo(place), "--save", "none", file="resume.pth")
    assert set(place.iterdir()) == before and printed_mean(printed) == plain[1]


# --- bad input ----------------------------------------------------------------------------------------------------


def spoil_picture(place):
    (place / "spoilt").mkdir()
    Image.effect_noise((99, 99), 50).convert("RGB").save(place / "spoilt/whole.png")
    (place / "spoilt/half.png").write_bytes((place / "spoilt/whole.png").read_bytes()[:5000])
    return ["--images", "spoilt", "--num-workers", "1"], ["spoilt/half.png", "truncated"]


def discriminator(place):
    torch.save(FCDiscriminator(14).state_dict(), place / "D.pth")
    return ["--restore-from", "D.pth"], ["no segmentation network is recognised"]


def half_a_file(place):
    (place / "half.pth").write_bytes((place / "trained.pth").read_bytes()[:10 ** 6])
    return ["--restore-from", "half.pth"], ["half.pth cannot be read", "is it complete"]


def half_a_network(place):
    state = torch.load(place / "trained.pth")
    torch.save({k: v for k, v in state.items() if not k.startswith("layer5")}, place / "less.pth")
    return ["--restore-from", "less.pth"], ["less.pth does not fill the network", "layer5"]


def associations_of_an_fcn(place):
    checkpoint.save_weights(FCN8s(14, width=0.03125), place / "fcn.pth", {"width": 0.03125})
    return ["--restore-from", "fcn.pth", "--aggregate"], ["--arch, --aspp and --aggregate are of DeepLab networks"]


def arch_of_a_vgg(place):
    torch.save(build("DeeplabVGG", 14, "vgg16").state_dict(), place / "vgg.pth")
    return ["--restore-from", "vgg.pth", "--arch", "resnet18"], ["--arch resnet18: ", "DeeplabVGG"]


def fcn_called_deeplab(place):
    checkpoint.save_weights(FCN8s(14, width=0.03125), place / "fcn.pth", {"width": 0.03125})
    return ["--restore-from", "fcn.pth", "--model", "Deeplab"], ["Deeplab on vgg16 is not a network that is used here"]


def weights_of_nan(place):
    state = torch.load(place / "trained.pth")
    state["conv1.weight"][0] = torch.nan
    torch.save(state, place / "nan.pth")
    return [*on_demo(place), "--restore-from", "nan.pth"], [
        "holds NaN or infinite values, in conv1.weight first", "choose an older one"]


def label_without_image_size(place):
    copy = shutil.copytree(place / "pair/cityscapes", place / "sizes")
    path = next((copy / "gtFine/val").rglob("*.png"))
    Image.open(path).resize((30, 20)).save(path)
    return ["--data-dir", "sizes"], ["is 64x48, but its label", path.name, "30x20"]


def label_missing(place):
    copy = shutil.copytree(place / "pair/cityscapes", place / "missing")
    path = sorted((copy / "gtFine/val").rglob("*.png"))[1]
    path.unlink()
    return ["--data-dir", "missing"], ["2 of 3 images of demo", path.name]


BAD = {
    "no checkpoint": lambda place: (["--restore-from", "nowhere.pth"], ["nowhere.pth does not exist"]),
    "a discriminator": discriminator,
    "a truncated checkpoint": half_a_file,
    "an incomplete network": half_a_network,
    "spoilt weights": weights_of_nan,
    "another model": lambda place: (["--model", "DeeplabVGG"], ["of the backbone", "--model"]),
    "FCN-8s called a DeepLab": fcn_called_deeplab,
    "associations of an FCN-8s": associations_of_an_fcn,
    "a backbone for VGG-16": arch_of_a_vgg,
    "a set for statistics of the file": lambda place: (["--bn-set", "val"], ["--bn-set has no effect without"]),
    "other classes": lambda place: (["--num-classes", "19"], ["has 14 classes"]),
    "no data": lambda place: (["--data-dir", "nowhere"], ["nowhere: no such folder"]),
    "no such set": lambda place: ([*on_demo(place), "--set", "test"], ["no image of the set 'test'"]),
    "no pictures": lambda place: (["--images", "nowhere"], ["nowhere: no such folder; it should hold pictures"]),
    "unreadable picture": spoil_picture,
    "label of another size": label_without_image_size,
    "a label missing": label_missing,
    "no folder for the scores": lambda place: ([*on_demo(place), "--json", "no/where.json"],
                                               ["cannot write no/where.json: No such file or directory"]),
}


def test_a_folder_that_cannot_be_written(place):
    (place / "a_file").touch()
    assert "cannot write into a_file/maps" in refusal(place, *on_demo(place), "--save", "a_file/maps")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message(place, case):
    flags, facts = BAD[case](place)
    # the second comes from a loader process
    if case in ("no checkpoint", "unreadable picture"):
        flags = arguments(place, *flags, "--save", "none")
        text = message(execute("evaluate.py", *flags, cwd=place, code=2), "evaluate.py")
        assert text.count("\n") == 1
    else:
        text = refusal(place, *flags, "--save", "none")
        assert "\n" not in text
    for fact in facts:
        assert fact in text, text


@pytest.mark.parametrize("beside, more", [
    (["--images", "i"], ["--bn-set", "s"]),
    (["--save", "none"], ["--overlay"]), (["--save", "none"], ["--panels"]), (["--save", "none"], ["--label-ids"]),
    (["--cpu"], ["--gpu", "0"])])
def test_flags_without_effect_are_named(beside, more, capsys):
    script.parse_args(["--restore-from", "f", *beside, *more])
    assert f"note: {more[0]} has no effect with {beside[0]}" in capsys.readouterr().out


def test_a_set_for_statistics_of_the_checkpoint(capsys):
    with pytest.raises(SystemExit) as left:
        script.parse_args(["--restore-from", "f", "--bn-stats", "running", "--bn-set", "s"])
    assert left.value.code == 2 and "--bn-set has no effect with --bn-stats running" in capsys.readouterr().err

"""translate.py: every method's files, names and sizes, descriptions, styles, resuming, camera styles, the judge."""
import json
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import fill, load_reference
from PIL import Image
from scripts import execute, in_two_processes, message, render, training
from test_train_spgan import picture

import train_adaptsegnet
import translate as script
from lib import checkpoint
from lib.datasets.description import SHIPPED, Domain, load_description, select_classes
from lib.datasets.folder import ImageFolder
from lib.errors import UserError
from lib.judge import ContentJudge, gradient_correlation, kernel_distance
from lib.models.cyclegan import ResnetGenerator
from lib.models.deeplab import build
from lib.models.translation import MunitGenerator, UnitGenerator
from lib.runtime import Run

RUN = Run(torch.device("cpu"), 0, 1, "off")


@pytest.fixture
def photos(tmp_path):
    """Pictures of odd sizes and several kinds in two folders."""
    rng = np.random.default_rng(0)
    for name, size in (("a/1.png", (66, 50)), ("a/2.jpg", (64, 48)), ("3.png", (71, 65))):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(rng, size).save(path)
    return tmp_path / "photos"


@pytest.fixture
def files(tmp_path):
    """A checkpoint of each method."""
    torch.manual_seed(0)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for d in "AB":
        checkpoint.save_weights(ResnetGenerator(4, 6), folder / f"latest_net_G_{d}.pth", {})
    for name, make in (("munit", lambda: MunitGenerator(dim=4, n_res=1, mlp_dim=8)),
                       ("unit", lambda: UnitGenerator(dim=4, n_res=1))):
        torch.save({d: make().state_dict() for d in "ab"}, folder / f"{name}.pt")
    info, _ = load_reference("translation")
    released = {g: OrderedDict((k, v.float()) for k, v in fill(info["spgan"]["keys_G"], 1, f"{g}.").items())
                for g in ("Ga", "Gb")}
    torch.save({"epoch": 3, "Da": {}, "Db": {}, "Me": {}, **released}, folder / "Epoch_(3).ckpt")
    return folder


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path))


METHODS = {"CycleGAN": "latest_net_G_A.pth", "SPGAN": "Epoch_(3).ckpt", "MUNIT": "munit.pt", "UNIT": "unit.pt"}


@pytest.mark.parametrize("method", METHODS)
def test_methods(photos, files, tmp_path, capsys, method):
    """Names and sizes are the originals'; both directions; whole and tiled alike; nothing is stretched."""
    file = str(files / METHODS[method])
    for out, more in (("ab", []), ("ba", ["--a2b", "0"]), ("tiled", ["--tile", "24"])):
        script.main(["--checkpoint", file, "--images", str(photos), "--out", str(tmp_path / out), "--cpu", *more])
    assert f"translator  {method}" in capsys.readouterr().out
    for name, size in (("a/1.png", (66, 50)), ("a/2.png", (64, 48)), ("3.png", (71, 65))):
        image = Image.open(tmp_path / "ab" / name)
        assert image.size == size and image.mode == "RGB"
        assert not np.array_equal(read(tmp_path / "ba" / name), read(tmp_path / "ab" / name))
        difference = read(tmp_path / "ab" / name).astype(int) - read(tmp_path / "tiled" / name)
        assert abs(difference).max() <= 1
    translator = script.load_translator(file, True)
    x = script.to_symmetric(Image.open(photos / "a/2.jpg"))[None]
    y = translator(x, script.Styles(translator, RUN, seed=10)("a/2.png", 0))
    expected = ((y[0] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    assert abs(read(tmp_path / "ab/a/2.png").astype(int) - expected).max() == 0


def test_styles(photos, files, tmp_path):
    """k sets; each file its own styles, whatever else is translated; pictures as styles; --seed; --synchronized."""
    def run(out, *more):
        script.main(["--checkpoint", str(files / "munit.pt"), "--images", str(photos), "--out", str(tmp_path / out),
                     "--cpu", *more])
        return tmp_path / out

    three = run("three", "--num-style", "2")
    assert sorted(p.name for p in three.iterdir()) == ["style0", "style1", "translate.json"]
    assert not np.array_equal(read(three / "style0/3.png"), read(three / "style1/3.png"))
    (tmp_path / "list.txt").write_text("3.png\n")
    alone = run("alone", "--data-list", str(tmp_path / "list.txt"), "--num-style", "2")
    for k in "01":
        assert np.array_equal(read(three / f"style{k}/3.png"), read(alone / f"style{k}/3.png"))
    assert not np.array_equal(read(run("other", "--seed", "3") / "3.png"), read(three / "style0/3.png"))
    by_picture = run("picture", "--style", str(photos / "a/1.png"))
    assert not np.array_equal(read(by_picture / "3.png"), read(three / "style0/3.png"))
    net = script.load_translator(files / "munit.pt", True)
    styles = script.Styles(net, RUN, seed=10, synchronized=True)
    assert torch.equal(styles("a", 0), styles("b", 0)) and not torch.equal(styles("a", 0), styles("a", 1))


def test_resume(photos, files, tmp_path, monkeypatch):
    """Killed between two pictures: the rest is made, with the same styles; another call does not mix in."""
    argv = ["--checkpoint", str(files / "munit.pt"), "--images", str(photos), "--cpu", "--out"]
    script.main([*argv, str(tmp_path / "whole")])
    original, made = script.translate_file, []

    def killed(*args, **named):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(1)
        return original(*args, **named)

    monkeypatch.setattr(script, "translate_file", killed)
    with pytest.raises(KeyboardInterrupt):
        script.main([*argv, str(tmp_path / "parts")])
    made.clear()
    script.main([*argv, str(tmp_path / "parts")])
    assert len(made) == 1
    for name in ("a/1.png", "a/2.png", "3.png"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(UserError, match="pictures of the same names, .*: seed was 10, is 11"):
        script.main([*argv, str(tmp_path / "parts"), "--seed", "11"])
    made.clear()
    monkeypatch.setattr(script, "translate_file", original)
    script.main([*argv, str(tmp_path / "parts"), "--seed", "11", "--overwrite"])
    assert (tmp_path / "parts/3.png").read_bytes() != (tmp_path / "whole/3.png").read_bytes()
    mine = tmp_path / "mine"
    (mine / "a").mkdir(parents=True)
    for name in ("3.png", "other.png"):
        shutil.copy(photos / "3.png", mine / name)
    with pytest.raises(UserError, match="3.png among them: they were not written by this script"):
        script.main([*argv, str(mine)])
    script.main([*argv, str(mine), "--overwrite"])
    assert (mine / "3.png").read_bytes() == (tmp_path / "whole/3.png").read_bytes()
    assert (mine / "other.png").read_bytes() == (photos / "3.png").read_bytes()
    shutil.copy(photos / "3.png", mine / "3.png")
    script.main([*argv, str(mine)])
    assert (mine / "3.png").read_bytes() == (photos / "3.png").read_bytes()  # it exists: nothing to do
    script.main([*argv, str(mine), "--overwrite"])
    assert (mine / "3.png").read_bytes() == (tmp_path / "whole/3.png").read_bytes()


@pytest.mark.parametrize("more", [["--data-dir", "d"], ["--source-set", "s"], ["--data-dir-target", "d"],
                                  ["--cpu", "--gpu", "0"]])
def test_flags_without_effect_are_named(more, capsys):
    script.parse_args(["--checkpoint", "c", "--images", "i", "--out", "o", *more])
    assert f"note: {more[-2]} has no effect with" in capsys.readouterr().out


def test_two_processes_write_the_files_of_one(photos, files, tmp_path):
    argv = ["--checkpoint", str(files / "munit.pt"), "--images", str(photos), "--cpu", "--num-style", "2", "--out"]
    execute("translate.py", *argv, str(tmp_path / "one"))
    in_two_processes("translate.py", *argv, str(tmp_path / "two"))
    one, two = ({p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.png")}
                for folder in (tmp_path / "one", tmp_path / "two"))
    assert one == two and len(one) == 6


def test_a_data_set(files, tmp_path):
    """The description trains and is scored: the translated pictures with the labels of the originals, sets kept."""
    pair = render(tmp_path / "pair")
    out = tmp_path / "data/City_Dusk"
    common = ["--checkpoint", str(files / "latest_net_G_A.pth"), "--source", "demo", "--data-dir",
              str(pair / "cityscapes"), "--out", str(out), "--cpu"]
    script.main(common)
    made = load_description(tmp_path / "data/city_dusk.json")
    original = Domain.open("demo", pair / "cityscapes", None, None, "source")
    translated = Domain.open(made, default_set="source")
    classes = select_classes(load_description("demo"), None)
    ours, theirs = (ImageFolder(d, classes, None) for d in (translated, original))
    assert len(ours) == len(theirs) == 4 and made.name == "demo"
    for i in range(4):
        assert ours.images[i].relative_to(out) == theirs.images[i].relative_to(pair / "cityscapes")
        assert ours.labels[i].resolve() == theirs.labels[i].resolve()
        assert ours.read(i)[0].size == theirs.read(i)[0].size
        assert np.array_equal(ours.truth(i), theirs.truth(i))
    script.main([*common, "--source-set", "val"])
    again = load_description(tmp_path / "data/city_dusk.json")
    assert len(Domain.open(again, default_set="val").list_images()) == 2
    assert len(Domain.open(again, default_set="train").list_images()) == 4


def test_a_trainer_takes_the_description(files, tmp_path):
    pair = render(tmp_path / "pair")
    script.main(["--checkpoint", str(files / "unit.pt"), "--source", "gta5", "--data-dir", str(pair / "gta5"), "--out",
                 str(tmp_path / "gta5_demo"), "--cpu"])
    argv = training(pair, tmp_path / "run", "--source", str(tmp_path / "gta5_demo.json"), "--num-steps", "1")
    at = argv.index("--data-dir")
    assert train_adaptsegnet.main(argv[:at] + argv[at + 2:]) == 0
    assert (tmp_path / "run/GTA5_1.pth").exists()


def test_a_jpeg_data_set(files, tmp_path):
    """Pictures with another ending, and a list."""
    pair = render(tmp_path / "pair")
    entries = json.loads((SHIPPED / "gta5.json").read_text())
    for path in (pair / "gta5/images").iterdir():
        Image.open(path).save(path.with_suffix(".jpg"))
    entries |= {"root": str(pair / "gta5"), "images": "images/{stem}.jpg", "list": "train.txt"}
    (tmp_path / "mine.json").write_text(json.dumps(entries))
    (pair / "gta5/train.txt").write_text("00002.jpg\n00004.jpg\n")
    script.main(["--checkpoint", str(files / "latest_net_G_A.pth"), "--source", str(tmp_path / "mine.json"), "--out",
                 str(tmp_path / "out"), "--cpu"])
    domain = Domain.open(tmp_path / "out.json", default_set="source")
    assert [p.name for p in domain.list_images()] == ["00002.png", "00004.png"]
    assert [p.name for p in domain.label_paths(domain.list_images())] == ["00002.png", "00004.png"]


def test_scale(photos, files, tmp_path):
    """--width and what a checkpoint says of its training: resized before and after, the size of the file stays."""
    torch.manual_seed(1)
    checkpoint.save_weights(ResnetGenerator(4, 6), files / "trained_net_G_A.pth", {"scale": ["width", 32]})
    argv = ["--images", str(photos), "--cpu", "--checkpoint", str(files / "trained_net_G_A.pth"), "--out"]
    for out, more in (("trained", []), ("same", ["--width", "32"]), ("file", ["--file-size"])):
        script.main([*argv, str(tmp_path / out), *more])
    assert Image.open(tmp_path / "trained/3.png").size == (71, 65)
    assert np.array_equal(read(tmp_path / "trained/3.png"), read(tmp_path / "same/3.png"))
    assert not np.array_equal(read(tmp_path / "trained/3.png"), read(tmp_path / "file/3.png"))
    translator = script.Translator("x", None, None, ("short_side", 32))
    assert translator.working_size((71, 65)) == (35, 32) and translator.working_size((40, 160)) == (32, 128)


# --- camera styles ---------------------------------------------------------------------------------------------------


def test_camera_styles(files, tmp_path):
    """One file for each training image and other camera, at the image's size, as lib.datasets.persons finds them."""
    from lib.datasets.persons import CameraStyles, open_persons

    rng = np.random.default_rng(0)
    folder = tmp_path / "data/market/bounding_box_train"
    folder.mkdir(parents=True)
    for person in (1, 2):
        for camera in (1, 2, 5):
            picture(rng, (64, 128)).save(folder / f"{person:04}_c{camera}s1_000451_03.jpg")
    for pair in ("1to2", "1to5", "2to5"):
        shutil.copytree(files, tmp_path / "run" / pair)
    argv = ["--cameras", "market", "--data-dir", str(tmp_path / "data"), "--checkpoint", str(tmp_path / "run"), "--cpu"]
    script.main([*argv, "--domains", "5,1"])
    styles = folder.parent / "bounding_box_train_camstyle"
    assert sorted(p.name for p in styles.iterdir()) == [f"000{n}_c5s1_000451_03_fake_5to1.jpg" for n in (1, 2)]
    before = {p: p.stat().st_mtime_ns for p in styles.iterdir()}
    script.main(argv)
    persons = open_persons(tmp_path / "data", "market", ["train"])
    found = CameraStyles(persons)
    assert len(list(styles.iterdir())) == 12
    assert all(Image.open(found.path(p, c)).size == (64, 128) for p in persons.train for c in persons.cameras)
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())
    for bad, text in ((["--domains", "1,3"], "two different cameras out of 1, 2, 5"),
                      (["--checkpoint", str(tmp_path)], "3 of the cameras' translators are not there")):
        with pytest.raises(UserError, match=text):
            script.main([*argv, *bad])


# --- the judge -------------------------------------------------------------------------------------------------------


@pytest.fixture
def segmenter(tmp_path):
    torch.manual_seed(0)
    classes = select_classes(load_description("demo"), load_description("gta5"))
    net = build("Deeplab", len(classes), "resnet18")
    checkpoint.save_weights(net, tmp_path / "f.pth", {"task": "demo", "classes": list(classes), "pixels": "imagenet",
                                                      "size": [64, 48]})
    return tmp_path / "f.pth"


def test_judge(files, segmenter, tmp_path, capsys):
    pair = render(tmp_path / "pair")
    script.main(["--checkpoint", str(files / "latest_net_G_A.pth"), "--source", "gta5", "--data-dir",
                 str(pair / "gta5"), "--out", str(tmp_path / "out"), "--cpu", "--judge", str(segmenter),
                 "--target", "demo", "--data-dir-target", str(pair / "cityscapes")])
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "out/judge.json").read_text())
    assert "f(G(x)) : y" in said and "least agreement" in said and "correlation of gradient maps" in said
    assert 0 <= report["agreement"] <= 1 and -1 <= report["edges"] < 1 and len(report["worst"]) == 5
    assert set(report["scores"]) == {"f(G(x)) : f(x)", "f(x) : y", "f(G(x)) : y"}
    assert set(report["distance to the target"]) == {"x", "G(x)"}


class Brightness:
    """A segmenter that tells dark from light."""

    size, classes, align_corners = None, ("dark", "light"), True

    def with_features(self, x):
        grey = x.mean(1, keepdim=True)
        return torch.cat([-grey, grey], 1), x


def test_judge_of_the_same_pictures(tmp_path):
    """Nothing changed: full agreement, IoU 1, correlation 1. A spoilt picture is listed first."""
    rng = np.random.default_rng(0)
    for i in range(3):
        picture(rng).save(tmp_path / f"{i}.png")
    judge = ContentJudge(Brightness(), RUN, 255)
    for i in range(3):
        judge.add(tmp_path / f"{i}.png", tmp_path / f"{i}.png", None)
    report = judge.report()
    assert report["agreement"] == 1 and report["edges"] == pytest.approx(1)
    assert report["scores"]["f(G(x)) : f(x)"]["miou"] == 1 and "distance to the target" not in report
    Image.new("RGB", (96, 72), "black").save(tmp_path / "spoilt.png")
    label = (np.asarray(Image.open(tmp_path / "0.png")).mean(2) > 127.5).astype(np.uint8)
    judge.add(tmp_path / "0.png", tmp_path / "spoilt.png", label)
    name, share = judge.report()["worst"][0]
    assert name.endswith("spoilt.png") and share == pytest.approx(1 - label.mean())
    assert judge.report()["scores"]["f(x) : y"]["miou"] == 1
    assert judge.report()["scores"]["f(G(x)) : y"]["iou"]["light"] == 0


def test_measures():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((3, 20, 30)))
    assert gradient_correlation(x, 0.2 * x + 0.5) == pytest.approx(1)
    assert abs(gradient_correlation(x, torch.from_numpy(rng.standard_normal((3, 20, 30))))) < 0.2
    a, b = (torch.from_numpy(rng.standard_normal((n, 5))) for n in (400, 300))
    assert abs(kernel_distance(a, b)) < 0.05 < kernel_distance(a, b + 1)
    # by its definition, on few points
    u, v = a[:3], b[:4]

    def k(p, q):
        return float((p @ q / 5 + 1) ** 3)

    by_hand = sum(k(u[i], u[j]) for i in range(3) for j in range(3) if i != j) / 6 \
        + sum(k(v[i], v[j]) for i in range(4) for j in range(4) if i != j) / 12 \
        - 2 * sum(k(p, q) for p in u for q in v) / 12
    assert kernel_distance(u, v) == pytest.approx(by_hand)


# --- bad input -------------------------------------------------------------------------------------------------------

CASES = {
    "text": (lambda f, p: (f / "latest_net_G_A.pth").write_text("<html>"), "is not a checkpoint but text"),
    "segmenter": (lambda f, p: torch.save({"conv1.weight": torch.ones(1)}, f / "latest_net_G_A.pth"),
                  "holds no ResNet generator of CycleGAN"),
    "discriminator": (lambda f, p: torch.save({"model.0.weight": torch.ones(8, 3, 4, 4)}, f / "latest_net_G_A.pth"),
                      "holds no ResNet generator"),
    "batch norm": (lambda f, p: torch.save({**torch.load(f / "latest_net_G_B.pth"), "model.2.weight": torch.ones(4)},
                                           f / "latest_net_G_A.pth"), "batch normalisation"),
    "broken picture": (lambda f, p: (p / "3.png").write_bytes((p / "3.png").read_bytes()[:900]), "broken or truncated"),
    "no folder": (lambda f, p: shutil.rmtree(p), "no such folder"),
    "two names": (lambda f, p: shutil.copy(p / "a/1.png", p / "a/1.bmp.png") and Image.open(p / "a/1.png").save(
        p / "a/1.jpg"), "two pictures would be written as a/1.png"),
    "styles": (lambda f, p: ["--num-style", "2"], "CycleGAN, which has no styles"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(photos, files, tmp_path, case):
    spoil, fact = CASES[case]
    more = spoil(files, photos)
    with pytest.raises(UserError) as caught:
        script.main(["--checkpoint", str(files / "latest_net_G_A.pth"), "--images", str(photos), "--out",
                     str(tmp_path / "out"), "--cpu", *(more if isinstance(more, list) else [])])
    assert fact in str(caught.value), str(caught.value)
    assert not list((tmp_path / "out").rglob("*.png"))


def test_out_is_the_folder_of_the_originals(photos, files):
    done = execute("translate.py", "--checkpoint", str(files / "latest_net_G_A.pth"), "--images", str(photos), "--out",
                   str(photos), "--cpu", code=2)
    assert "is the folder of the originals" in message(done, "translate.py")


def test_a_missing_label(files, tmp_path):
    pair = render(tmp_path / "pair")
    (pair / "gta5/labels/00003.png").unlink()
    with pytest.raises(UserError, match="1 of 5 labels do not exist: .*00003.png"):
        script.main(["--checkpoint", str(files / "latest_net_G_A.pth"), "--source", "gta5", "--data-dir",
                     str(pair / "gta5"), "--out", str(tmp_path / "out"), "--cpu"])


def test_statistics_become_the_targets(photos, tmp_path, capsys):
    """Over all pictures each channel's mean and deviation; whole and tiled alike; the target is needed."""
    rng = np.random.default_rng(1)
    target = tmp_path / "target"
    target.mkdir()
    for n in range(2):
        grey = rng.normal([90, 120, 140], [12, 20, 16], (40, 50, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(grey).save(target / f"{n}.png")
    arguments = ["--checkpoint", "statistics", "--images", str(photos), "--target", str(target), "--cpu"]
    script.main([*arguments, "--out", str(tmp_path / "whole")])
    script.main([*arguments, "--out", str(tmp_path / "tiled"), "--tile", "24"])
    names = ["a/1.png", "a/2.png", "3.png"]
    ours = np.concatenate([read(tmp_path / "whole" / name).reshape(-1, 3) for name in names]).astype(float)
    truth = np.concatenate([read(path).reshape(-1, 3) for path in sorted(target.iterdir())]).astype(float)
    assert ours.mean(0) == pytest.approx(truth.mean(0), abs=1)
    assert ours.std(0) == pytest.approx(truth.std(0), abs=1)
    assert all(np.array_equal(read(tmp_path / "whole" / name), read(tmp_path / "tiled" / name)) for name in names)
    Image.new("RGB", (50, 40)).save(target / "0.png")  # what is there was not made from these
    with pytest.raises(UserError, match="checkpoint was statistics of"):
        script.main([*arguments, "--out", str(tmp_path / "whole")])
    with pytest.raises(SystemExit):
        script.main(["--checkpoint", "statistics", "--images", str(photos), "--out", str(tmp_path / "x")])
    assert "statistics takes those of --target" in capsys.readouterr().err

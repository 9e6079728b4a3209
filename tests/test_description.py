"""Data-set descriptions: every shipped file, every encoding, and a message for every mistake."""
import json
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from lib.datasets.description import Domain, load_description, select_classes
from lib.datasets.labels import label_table, read_label
from lib.datasets.pictures import read_image
from lib.errors import UserError

SHIPPED = ("gta5", "synthia", "cityscapes", "cross-city", "camvid", "idd_lite", "demo")
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
MINIMAL = {
    "name": "mine", "root": "data/mine", "images": "images/{stem}.png", "labels": "labels/{stem}.png",
    "sets": {"train": "all", "val": "all"}, "size": [64, 32], "encoding": "ids", "void": [9],
    "classes": [{"name": "road", "color": [1, 2, 3], "ids": [4, 5]}, {"name": "car", "color": [0, 0, 9], "ids": [0]}],
}


def described(folder: Path, **changes):
    """A description like MINIMAL, loaded from a file; a change to None leaves the key out."""
    entries = {k: v for k, v in {**MINIMAL, **changes}.items() if v is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.json").write_text(json.dumps(entries))
    return load_description(folder / "mine.json")


def label_path(d, root: Path, image: Path, set_: str) -> Path:
    path, = Domain.open(d, root, set_).label_paths([image])
    return path


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def save(values, path: Path, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if mode == "P":
        image.putpalette(list(range(256)) * 3)  # sets the mode to P, keeps the indices
    image.save(path)
    return path


def save_16bit(samples, path: Path) -> Path:
    """A 16-bit PNG, grey [H, W] or RGB [H, W, 3], written byte by byte: Pillow cannot."""
    samples = np.asarray(samples).astype(">u2")
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0 if samples.ndim == 2 else 2, 0, 0, 0)),
              (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks))
    return path


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_descriptions_are_consistent(name):
    d = load_description(name)
    assert d.name == name and d.ignore == 255 and d.palette.shape == (len(d.classes), 3)
    assert d.palette.dtype == np.uint8 and len(np.unique(d.palette, axis=0)) == len(d.classes)
    assert set(d.sets) == {"source", "train", "val"}
    table = label_table(d, d.classes)
    assert [table[ids[0]] for ids in d.ids] == list(range(len(d.classes)))
    assert all(table[v] == 255 for v in d.void)
    assert np.count_nonzero(table >= 0) == len(d.void) + sum(map(len, d.ids))
    assert pickle.loads(pickle.dumps(d)).classes == d.classes  # loaders send it to their workers


def test_cityscapes_values_are_the_official_ones():
    d = load_description("cityscapes")
    assert tuple(i for i, in d.ids) == CITYSCAPES_IDS
    assert d.void | set(CITYSCAPES_IDS) == {*range(34), 255}
    assert d.palette[d.classes.index("traffic light")].tolist() == [250, 170, 30]
    assert label_table(load_description("gta5"), d.classes)[:34].tolist() == label_table(d, d.classes)[:34].tolist()
    assert len(d.subsets["16"]) == 16 and len(d.subsets["13"]) == 13
    assert set(d.subsets["16"]) - set(d.subsets["13"]) == {"wall", "fence", "pole"}
    assert load_description("cross-city").classes == d.subsets["13"]


@pytest.mark.parametrize("changes, message", [
    ({"labels": None}, "the key 'labels' is missing"),
    ({"lables": "x"}, "unknown key 'lables'"),
    ({"encoding": "rgba"}, "unknown 'encoding' 'rgba'"),
    ({"size": [64]}, "'size'"),
    ({"sets": {"train": "a"}}, "'sets'"),
    ({"images": "images/a.png"}, "placeholder"),
    ({"labels": "labels/{city}.png"}, "placeholder"),
    ({"images": "images/{st em}.png"}, "placeholder"),
    ({"images": "images/{stem}}.png"}, "placeholder"),
    ({"labels": "labels/}{stem}.png"}, "placeholder"),
    ({"labels": "labels/{stem!r}.png"}, "placeholder"),
    ({"labels": "labels/{0}.png"}, "placeholder"),
    ({"list": "{stem}.txt"}, "'list' may hold no placeholder but {set}"),
    ({"ignore": 1}, "'ignore'"),
    ({"void": [0]}, "label value 0 is both void and class 'car'"),
    ({"void": [256]}, "0..255"),
    ({"classes": []}, "'classes'"),
    ({"classes": MINIMAL["classes"] * 2}, "two classes are called 'road'"),
    ({"classes": [{"name": "a", "color": [1, 1, 1], "ids": [3]}, {"name": "b", "color": [1, 1, 2], "ids": [3]}]},
     "label value 3 is given twice, to 'a' and 'b'"),
    ({"classes": [{"name": "a", "color": [1, 1], "ids": [3]}]}, "'color'"),
    ({"classes": [{"name": "a", "color": [1, 1, 1]}]}, "'ids'"),
    ({"subsets": {"2": ["road", "tram"]}}, "'subsets'"),
    ({"maps": {"other": {"tree": "tram"}}}, "'tram', no class here"),
    ({"maps": {"other": {"tree": 9}}}, "'9', no class here"),
    ({"name": "../mine"}, "'name' becomes part of file names"),
    ({"name": ".."}, "'name' becomes part of file names"),
    ({"name": "a/b"}, "'name' becomes part of file names"),
    ({"name": "x" * 300}, "'name' becomes part of file names"),
    ({"name": 3}, "'name' must be a text"),
    ({"images": "images\0/{stem}.png"}, "'images' holds a character that no path can"),
    ({"root": "\ud800"}, "'root' holds a character that no path can"),
    ({"sets": {"train": "\0", "val": "v"}}, "'sets' holds a character that no path can"),
    ({"sets": {"train": "", "val": "v"}}, "'sets' must name"),
    ({"size": [0, 5]}, "'size'"),
    ({"size": [64, 1 << 20]}, "'size'"),
    ({"void": "0"}, "'void' must be a list"),
    ({"void": [["x" * 5000]]}, "not ['xxx"),
    ({"encoding": ["ids"]}, "unknown 'encoding'"),
    ({"maps": []}, "'maps' must be"),
    ({"subsets": {"2": "road"}}, "'subsets'"),
])
def test_mistakes_in_a_description_are_named(tmp_path, changes, message):
    with pytest.raises(UserError) as e:
        described(tmp_path, **changes)
    assert message in str(e.value) and "mine.json" in str(e.value) and len(str(e.value)) < 1000


def test_broken_and_missing_files_are_named(tmp_path):
    (tmp_path / "x.json").write_text('{"name": 1,,}')
    with pytest.raises(UserError, match=r"x.json: not JSON: .* at line 1, column"):
        load_description(tmp_path / "x.json")
    for name in ("kitti", "x" * 5000, ".", "/", "../cityscapes", ""):
        with pytest.raises(UserError, match="camvid, cityscapes") as e:
            load_description(name)
        assert len(str(e.value)) < 1000


@pytest.mark.parametrize("content, message", [
    (b"[" * 100_000 + b"]" * 100_000, "brackets are nested too deeply"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "brackets are nested too deeply"),
    (json.dumps({**MINIMAL, "ignore": 0}).replace(" 0}", " " + "9" * 6000 + "}").encode(), "4300 digits|255"),
    (b"\xff\xfe{}", "not a UTF-8 text file"),
    (b"", "not JSON"),
    (b"[]", "a description is one JSON object"),
    (b"null", "a description is one JSON object"),
    (json.dumps({**MINIMAL, "size": [float("nan"), 1e999]}).encode(), "'size' must be"),
])
def test_files_that_are_no_description(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        load_description(tmp_path / "x.json")
    assert "x.json" in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 1000


def test_a_description_may_have_a_byte_order_mark(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(MINIMAL), encoding="utf-8-sig")
    assert load_description(tmp_path / "x.json").name == "mine"


def test_images_and_labels_of_the_cityscapes_layout(tmp_path):
    d, names = load_description("cityscapes"), ("ulm_000002_000019", "bonn_000001_000019", "bonn_000000_000019")
    images = [tmp_path / f"leftImg8bit/train/{n.split('_')[0]}/{n}_leftImg8bit.png" for n in names]
    touch(*images, tmp_path / "leftImg8bit/val/jena/jena_0_leftImg8bit.png")
    touch(tmp_path / "leftImg8bit/train/bonn/notes.png")
    found = Domain.open(d, tmp_path, "train").list_images()
    assert found == sorted(images)
    assert label_path(d, tmp_path, found[0], "train") == (
        tmp_path / "gtFine/train/bonn/bonn_000000_000019_gtFine_labelIds.png")
    with pytest.raises(UserError, match="leftImg8bit/test/"):
        Domain.open(d, tmp_path, "test").list_images()
    with pytest.raises(UserError, match="no such folder"):
        Domain.open(d, tmp_path / "nowhere", "train").list_images()
    with pytest.raises(UserError, match="does not match"):
        label_path(d, tmp_path, tmp_path / "leftImg8bit/train/bonn/notes.png", "train")


@pytest.mark.parametrize("line", ["bonn/b_0_leftImg8bit.png", "leftImg8bit/train/bonn/b_0_leftImg8bit.png"])
def test_list_lines_are_relative_to_the_images_or_the_root(tmp_path, line):
    d = load_description("cityscapes")
    touch(*(tmp_path / f"leftImg8bit/train/bonn/b_{n}_leftImg8bit.png" for n in range(2)))
    (tmp_path / "one.txt").write_text(f"\n{line}\n\n")
    found = Domain.open(d, tmp_path, "train", tmp_path / "one.txt").list_images()
    assert found == [tmp_path / "leftImg8bit/train/bonn/b_0_leftImg8bit.png"]


def test_lists_keep_their_order_and_name_what_is_missing(tmp_path):
    d, listed = load_description("gta5"), tmp_path / "list.txt"
    touch(*(tmp_path / f"images/{n:05}.png" for n in range(1, 4)))
    assert [p.name for p in Domain.open(d, tmp_path, "train").list_images()] == ["00001.png", "00002.png", "00003.png"]
    listed.write_text("00003.png\n00001.png\n")
    assert [p.name for p in Domain.open(d, tmp_path, "train", listed).list_images()] == ["00003.png", "00001.png"]
    listed.write_text("00003.png\n00009.png\n")
    with pytest.raises(UserError, match="1 of 2 images do not exist.*00009.png"):
        Domain.open(d, tmp_path, "train", listed).list_images()
    listed.write_text("\n")
    with pytest.raises(UserError, match="the list is empty"):
        Domain.open(d, tmp_path, "train", listed).list_images()
    with pytest.raises(UserError, match="no set 'val'"):
        Domain.open(d, tmp_path, "val").list_images()  # all images would be taken, those of the training too


def test_list_lines_that_name_no_image(tmp_path):
    """Lines that lead to a folder, out of the root, or nowhere; each is named, cut where it is too long."""
    d = load_description("gta5")
    touch(tmp_path / "data/images/1.png", tmp_path / "other/2.png")
    for line in ("x" * 5000, "/", ".", "..", "\0", "images", "\x1b[31m"):
        (tmp_path / "list.txt").write_text(f"1.png\n{line}\n")
        with pytest.raises(UserError, match="list.txt: 1 of 2 images do not exist") as e:
            Domain.open(d, tmp_path / "data", "train", tmp_path / "list.txt").list_images()
        assert len(str(e.value)) < 1000
    (tmp_path / "list.txt").write_text("../../other/2.png\n")  # is there, but has no label
    domain = Domain.open(d, tmp_path / "data", "train", tmp_path / "list.txt")
    with pytest.raises(UserError, match="2.png: has no label: it does not match the pattern"):
        domain.label_paths(domain.list_images())
    (tmp_path / "list.txt").write_text("1.png\n", encoding="utf-8-sig")
    assert domain.list_images() == [tmp_path / "data/images/1.png"]


def test_a_domain_takes_what_it_is_not_told_from_its_description(tmp_path):
    domain = Domain.open("gta5")
    assert (domain.root, domain.set, domain.list_file) == (Path("data/GTA5"), "train", None)
    assert Domain.open("camvid", default_set="source").set == "day_train"
    assert Domain.open("camvid", default_set="val").set == "dusk_test"
    domain = Domain.open("camvid", tmp_path, "mine", "list.txt")
    assert (domain.root, domain.set, domain.list_file) == (tmp_path, "mine", Path("list.txt"))
    assert (domain.name, domain.size) == ("camvid", (480, 360)) and str(domain) == f"camvid ({tmp_path}, mine)"
    other = domain.with_set("dusk_test")
    assert (other.root, other.set, other.list_file) == (tmp_path, "dusk_test", None)


def test_a_data_set_in_the_working_directory(tmp_path, monkeypatch):
    touch(tmp_path / "images/1.png")
    monkeypatch.chdir(tmp_path)
    for root in (".", tmp_path, "./"):
        domain = Domain.open("gta5", root)
        assert [path.resolve() for path in domain.label_paths(domain.list_images())] == [tmp_path / "labels/1.png"]


def test_the_order_of_images_is_that_of_their_folders(tmp_path):
    """As Path sorts: "a" before "a-b", though "-" comes before "/"; the seeds of all draws count on it."""
    d = described(tmp_path, images="{city}/{stem}.png")
    names = ["a-b/1.png", "a/2.png", "a/1.png", "a0/1.png"]
    touch(*(tmp_path / name for name in names))
    assert Domain.open(d, tmp_path).list_images() == sorted(tmp_path / name for name in names)


def test_the_sets_of_camvid_are_its_lists(tmp_path):
    d = load_description("camvid")
    touch(*(tmp_path / f"images/{n}.jpg" for n in "abc"), tmp_path / "lists/day_train.txt")
    (tmp_path / "lists/day_train.txt").write_text("c.jpg\na.jpg\n")
    assert [p.name for p in Domain.open(d, tmp_path, d.sets["source"]).list_images()] == ["c.jpg", "a.jpg"]
    assert label_path(d, tmp_path, tmp_path / "images/c.jpg", "day_train") == tmp_path / "labels/c.png"
    with pytest.raises(UserError, match="dusk_test.txt: no such list"):
        Domain.open(d, tmp_path, d.sets["val"]).list_images()


@pytest.mark.parametrize("name, image, label", [
    ("gta5", "images/00001.png", "labels/00001.png"),
    ("synthia", "RGB/0000001.png", "GT/LABELS/0000001.png"),
    ("cross-city", "Images/Test/p_1.png", "Labels/Test/p_1_eval.png"),
    ("idd_lite", "leftImg8bit/Test/12/0041_image.jpg", "gtFine/Test/12/0041_label.png"),
    ("demo", "leftImg8bit/Test/a/a_1_leftImg8bit.png", "gtFine/Test/a/a_1_gtFine_labelIds.png"),
])
def test_labels_of_the_other_layouts(tmp_path, name, image, label):
    assert label_path(load_description(name), tmp_path, tmp_path / image, "Test") == tmp_path / label


def test_a_set_without_labels(tmp_path):
    entries = json.loads((ROOT / "lib/datasets/gta5.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps({**entries, "labels": None}))
    with pytest.raises(UserError, match="has no labels, and they are needed"):
        label_path(load_description(tmp_path / "x.json"), tmp_path, tmp_path / "images/1.png", "train")


def test_a_placeholder_may_occur_twice(tmp_path):
    d = described(tmp_path, images="{city}/{city}_{stem}.png", labels="gt/{stem}_of_{city}.png")
    assert label_path(d, tmp_path, tmp_path / "a_b/a_b_c.png", "all") == tmp_path / "gt/c_of_a_b.png"
    with pytest.raises(UserError, match="does not match"):
        label_path(d, tmp_path, tmp_path / "a/b_c.png", "all")


def test_palette_labels_are_read_as_indices(tmp_path):
    d, rng = load_description("gta5"), np.random.default_rng(0)
    ids = rng.choice([*range(35), 255], (9, 14))
    expected = label_table(d, d.classes)[ids]
    for mode in (None, "P"):
        label = read_label(save(ids, tmp_path / "l.png", mode), d, label_table(d, d.classes))
        assert label.dtype == np.uint8 and (label == expected).all()
        label[0, 0] = 1  # torch takes it over without a copy


def test_synthia_labels_are_the_first_channel_of_16_bits(tmp_path):
    d, rng = load_description("synthia"), np.random.default_rng(0)
    table, classes = label_table(d, d.classes), rng.integers(0, 23, (9, 14))
    instances = rng.integers(0, 2000, (9, 14))  # the second channel, above 255
    expected = np.where(table[classes] < 0, 255, table[classes])
    for path in (save_16bit(np.stack([classes, instances, instances], -1), tmp_path / "rgb.png"),
                 save_16bit(classes, tmp_path / "grey.png"), save(classes, tmp_path / "l.png")):
        assert (read_label(path, d, table) == expected).all()
    assert expected[classes == 3].tolist() == [0] * np.count_nonzero(classes == 3)  # road
    classes[2, 3] = 258  # its low byte is a building
    for samples in (classes, np.stack([classes] * 3, -1)):
        with pytest.raises(UserError, match="above 255"):
            read_label(save_16bit(samples, tmp_path / "high.png"), d, table)
    with pytest.raises(UserError, match="colours"):
        read_label(save(np.zeros((4, 4, 3)), tmp_path / "colours.png"), d, table)


def test_colour_labels(tmp_path):
    classes = [{"name": "road", "color": [128, 64, 128], "colors": [[128, 64, 128], [0, 0, 1]]},
               {"name": "car", "color": [255, 0, 0]}]
    d = described(tmp_path, encoding="rgb", classes=classes, void=[[0, 0, 0]])
    colours = np.array([[[128, 64, 128], [0, 0, 1], [255, 0, 0], [0, 0, 0]]], np.uint8)
    path = save(colours, tmp_path / "l.png")
    assert read_label(path, d, label_table(d, d.classes)).tolist() == [[0, 0, 1, 255]]
    assert read_label(path, d, label_table(d, ("car",))).tolist() == [[255, 255, 0, 255]]
    colours[0, 3] = 0, 1, 0
    with pytest.raises(UserError, match=r"l.png: unknown label colours \[0, 1, 0\]"):
        read_label(save(colours, path), d, label_table(d, d.classes))
    with pytest.raises(UserError, match="holds colours"):
        read_label(save(np.zeros((2, 2)), path), d, label_table(d, d.classes))


def test_label_files_that_cannot_be_used_are_named(tmp_path):
    d = load_description("cityscapes")
    table, ids = label_table(d, d.classes), np.full((64, 64), 7)
    ids[3, 4], ids[5, 6] = 34, 200
    with pytest.raises(UserError, match="bad.png: unknown label values 34, 200"):
        read_label(save(ids, tmp_path / "bad.png"), d, table)
    with pytest.raises(UserError, match="rgb.png.*RGB.*colours"):
        read_label(save(np.zeros((4, 4, 3)), tmp_path / "rgb.png"), d, table)
    noise = save(np.random.default_rng(0).integers(0, 34, (64, 64)), tmp_path / "cut.png")
    noise.write_bytes(noise.read_bytes()[:900])
    for read in (lambda p: read_label(p, d, table), read_image):
        with pytest.raises(UserError, match="cut.png: the image is broken or truncated"):
            read(noise)
        with pytest.raises(UserError, match="none.png: no such file"):
            read(tmp_path / "none.png")
        (tmp_path / "text.png").write_text("not an image")
        with pytest.raises(UserError, match="text.png: not an image"):
            read(tmp_path / "text.png")
    assert read_image(tmp_path / "bad.png").mode == "RGB"


def test_classes_of_a_pair():
    cityscapes, synthia, gta5 = (load_description(n) for n in ("cityscapes", "synthia", "gta5"))
    assert select_classes(cityscapes, gta5) == select_classes(cityscapes, None) == cityscapes.classes
    assert select_classes(cityscapes, synthia) == select_classes(cityscapes, synthia, 16) == cityscapes.subsets["16"]
    assert select_classes(cityscapes, synthia, 13) == cityscapes.subsets["13"]
    assert select_classes(load_description("cross-city"), cityscapes) == cityscapes.subsets["13"]
    assert len(select_classes(load_description("demo"), gta5)) == 14
    with pytest.raises(UserError, match="no labels for terrain, truck, train"):
        select_classes(cityscapes, synthia, 19)
    with pytest.raises(UserError, match="no choice of 7 classes; it has 13, 16, 19"):
        select_classes(cityscapes, gta5, 7)


def test_two_labellings_meet_without_code(tmp_path):
    camvid, idd = load_description("camvid"), load_description("idd_lite")
    assert select_classes(idd, camvid) == idd.classes
    table = label_table(camvid, idd.classes, idd)
    expected = {"sky": "sky", "building": "building or vegetation", "tree": "building or vegetation",
                "road": "drivable", "pavement": "non-drivable", "pole": "roadside object",
                "car": "vehicle", "bicyclist": "living"}
    for name, target in expected.items():
        assert idd.classes[table[camvid.ids[camvid.classes.index(name)][0]]] == target
    label = read_label(save([[3, 5, 8, 11]], tmp_path / "l.png"), camvid, table)
    assert label.tolist() == [[0, 5, 3, 255]]
    # the classes of the map's other side, under names of their own, and one that is left out
    mine = described(tmp_path, maps={"camvid": {"road": None, "car": "road", "tree": "car"}})
    assert select_classes(mine, camvid) == ("road", "car")
    assert label_table(camvid, mine.classes, mine)[[3, 8, 5, 0]].tolist() == [255, 0, 1, 255]
    with pytest.raises(UserError, match="fewer than two classes"):
        select_classes(mine, load_description("idd_lite"))


def test_a_misspelt_class_of_a_map_is_named(tmp_path):
    """It would drop the labels of that class without a word."""
    mine = described(tmp_path, maps={"camvid": {"treee": "road", "car": "car"}})
    with pytest.raises(UserError, match="'maps' of the data set 'mine' names treee, no class of 'camvid', which has"):
        select_classes(mine, load_description("camvid"))
    with pytest.raises(UserError, match="treee"):
        label_table(load_description("camvid"), mine.classes, mine)
    select_classes(mine, load_description("gta5"))  # the map is not for this one


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_maps_name_classes_of_their_data_sets(name):
    d = load_description(name)
    for other, mapping in d.maps.items():
        assert set(mapping) <= set(load_description(other).classes)
        assert len(select_classes(d, load_description(other))) > 1


def test_void_and_unselected_classes_are_ignored_unknown_values_are_not():
    d = load_description("cityscapes")
    table = label_table(d, d.subsets["13"])
    assert table[7] == 0 and table[19] == 3  # road, traffic light
    assert table[12] == table[0] == table[255] == 255  # wall, unlabelled
    assert table[34] == table[100] == -1


def test_nothing_here_imports_torch():
    code = "import sys, lib.datasets.description, lib.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

"""lib/datasets/folder.py: endless draws that nothing disturbs, labels that stay closed, and the checks before a run."""
import json
import os
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib.datasets.description import Domain, load_description
from lib.datasets.folder import EndlessSampler, ImageFolder, check, endless, open_pair
from lib.datasets.transforms import Augment
from lib.errors import UserError

SIZE = (32, 24)
PLAIN = Augment(SIZE, "caffe")
RANDOM = Augment(SIZE, "caffe", random_scale=True, random_mirror=True)
IDS = (7, 11, 21, 23, 26)  # road, building, vegetation, sky, car


def write(root: Path, image: str, label: str, count: int, seed: int, size=SIZE) -> None:
    """``count`` pairs; {} in the names takes the number."""
    rng = np.random.default_rng(seed)
    for n in range(count):
        for name, values in ((image, rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)),
                             (label, rng.choice(np.array(IDS, np.uint8), size[::-1]))):
            path = root / name.format(f"{n:03}")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(path)


@pytest.fixture
def pair(tmp_path):
    """Folders of GTA5 (5 pairs) and Cityscapes (7 to train on, 3 to validate)."""
    write(tmp_path / "gta5", "images/{}.png", "labels/{}.png", 5, 0)
    for set_, count in (("train", 7), ("val", 3)):
        write(tmp_path / "city", f"leftImg8bit/{set_}/x/{set_}{{}}_leftImg8bit.png",
              f"gtFine/{set_}/x/{set_}{{}}_gtFine_labelIds.png", count, len(set_))
    return tmp_path


def opened(pair: Path, transform=PLAIN, **changes):
    source = Domain.open(changes.pop("source", "gta5"), changes.pop("root_s", pair / "gta5"),
                         list_file=changes.pop("list_s", None), default_set="source")
    target = Domain.open(changes.pop("target", "cityscapes"), pair / "city", changes.pop("set_t", None))
    return open_pair(source, target, transform, transform, **changes)


# --- draws --------------------------------------------------------------------------------------------------------


def draws(length: int, batch: int, count: int, **settings) -> list[tuple[int, int]]:
    return list(islice(EndlessSampler(length, batch, 5, **settings), count))


def test_each_pass_is_a_permutation_of_its_own():
    first, second = draws(7, 2, 7), draws(7, 2, 14)[7:]
    assert sorted(i for i, _ in first) == sorted(i for i, _ in second) == list(range(7))
    assert [i for i, _ in first] != [i for i, _ in second]
    assert [d for _, d in first + second] == list(range(14))
    assert [i for i, _ in islice(EndlessSampler(7, 2, 6), 7)] != [i for i, _ in first], "another seed"


def test_a_restart_gives_the_tail():
    assert draws(7, 3, 12, start=4) == draws(7, 3, 24)[12:]
    assert draws(7, 3, 6, start=4, rank=1, world=2) == draws(7, 3, 18, rank=1, world=2)[12:]


def test_processes_share_the_batches_of_one():
    """Batch b of two processes with 3 each is batch b of one process with 6."""
    one = draws(7, 6, 24)
    ranks = [iter(draws(7, 3, 12, rank=r, world=2)) for r in range(2)]
    assert [d for _ in range(4) for rank in ranks for d in islice(rank, 3)] == one


def batches(dataset, workers: int, count: int = 5, **settings):
    return [[x.tolist() if isinstance(x, torch.Tensor) else x for x in (b.image, b.label, b.name)]
            for b in islice(endless(dataset, 2, workers, seed=3, **settings), count)]


@pytest.mark.filterwarnings("ignore:.*worker processes.*")
def test_workers_and_restarts_change_no_batch(pair):
    data = opened(pair, RANDOM, seed=11)
    alone = batches(data.source, 0)
    assert batches(data.source, 2) == alone
    assert batches(data.source, 2, 2, start=3) == batches(data.source, 0, 2, start=3) == alone[3:]
    assert len({str(name) for _, _, name in alone}) > 1


def test_an_augmented_draw_can_be_repeated_and_differs_from_the_next(pair):
    data = opened(pair, RANDOM, seed=11)
    a, b, c = data.source[1, 8], data.source[1, 8], data.source[1, 9]
    assert torch.equal(a.image, b.image) and torch.equal(a.label, b.label) and a.name == c.name == "001"
    assert not torch.equal(a.image, c.image)
    other = opened(pair, RANDOM, seed=12).source[1, 8]
    assert not torch.equal(a.image, other.image), "another seed of the run"


def test_samples(pair):
    data = opened(pair)
    sample = data.source[2]
    truth = np.asarray(Image.open(pair / "gta5/labels/002.png"))
    ids = [i for i in (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)]
    assert np.array_equal(sample.label, np.vectorize(ids.index)(truth)) and sample.label.dtype == torch.int64
    assert sample.name == "002" and sample.size == SIZE and sample.image.shape == (3, 24, 32)
    assert np.array_equal(data.source.truth(2), sample.label.numpy())
    assert data.target[0].label.unique().tolist() == [255]
    assert (len(data.source), len(data.target), len(data.validation)) == (5, 7, 3)
    assert data.classes == load_description("cityscapes").classes
    assert np.array_equal(data.palette, load_description("cityscapes").palette)


def test_void_labels_take_the_value_that_the_loss_ignores(pair):
    """Also where the description of the source writes another one; scores keep the description's."""
    entries = json.loads((Path(__file__).parent.parent / "lib/datasets/gta5.json").read_text())
    (pair / "mine.json").write_text(json.dumps(dict(entries, ignore=200)))
    Image.fromarray(np.zeros(SIZE[::-1], np.uint8)).save(pair / "gta5/labels/000.png")  # id 0 is void
    for ignore, expected in ((None, 200), (255, 255), (30, 30)):
        data = opened(pair, source=pair / "mine.json", ignore=ignore)
        assert data.source[0].label.unique().tolist() == [expected]
    assert data.validation.table[0] == 255


def test_target_labels_are_never_opened(pair):
    """Training needs no target labels: they may be broken ..."""
    for path in (pair / "city/gtFine/train").rglob("*.png"):
        path.write_bytes(b"poison")
    data = opened(pair, check_all=True)
    assert len(list(islice(endless(data.target, 2, 0, seed=0), 5))) == 5
    # ... or not there at all
    shutil.rmtree(pair / "city/gtFine")
    write(pair / "city", "leftImg8bit/val/x/v{}_leftImg8bit.png", "gtFine/val/x/v{}_gtFine_labelIds.png", 3, 9)
    for path in (pair / "city/leftImg8bit/val").rglob("val*"):
        path.unlink()
    assert len(opened(pair, check_all=True).target) == 7


def test_labels_needed_where_a_data_set_has_none(pair):
    images_only = dict(json.loads((Path(__file__).parent.parent / "lib/datasets/cityscapes.json").read_text()),
                       labels=None)
    (pair / "bare.json").write_text(json.dumps(images_only))
    with pytest.raises(UserError, match="has no labels, and they are needed"):
        ImageFolder(Domain.open(pair / "bare.json", pair / "city"), ("road", "car"), PLAIN)
    assert opened(pair, target=pair / "bare.json").validation is None


# --- checks -------------------------------------------------------------------------------------------------------


def refused(pair, *patterns: str, **changes) -> None:
    with pytest.raises(UserError) as caught:
        opened(pair, **changes)
    for pattern in patterns:
        assert pattern in str(caught.value), str(caught.value)


def test_good_data_passes(pair):
    opened(pair, check_all=True)


def test_missing_folder(pair):
    refused(pair, f"{pair / 'nowhere'}: no such folder", "images/{stem}.png", root_s=str(pair / "nowhere"))


def test_missing_set_and_empty_folder(pair):
    refused(pair, "no image of the set 'test'", "leftImg8bit/test/", set_t="test")
    for path in (pair / "gta5/images").iterdir():
        path.unlink()
    refused(pair, str(pair / "gta5"), "no image of the set")


def test_missing_labels_are_listed(pair):
    for name in ("001", "003"):
        (pair / f"gta5/labels/{name}.png").unlink()
    refused(pair, "2 bad files", *(f"images/{n}.png: its label {pair}/gta5/labels/{n}.png does not exist"
                                   for n in ("001", "003")))


def test_many_problems_are_cut_short(pair):
    write(pair / "gta5", "images/more{}.png", "labels/{}.png", 30, 1)
    refused(pair, "30 bad files", "... and 20 more")


def test_size_mismatch(pair):
    name = "city/gtFine/val/x/val001_gtFine_labelIds.png"
    Image.open(pair / name).resize((30, 20)).save(pair / name)
    refused(pair, "cityscapes", "1 bad file:", "val001_leftImg8bit.png is 32x24, but its label", f"{name} is 30x20")


def test_sizes_of_gta5_may_differ(pair):
    Image.open(pair / "gta5/labels/001.png").resize((30, 20)).save(pair / "gta5/labels/001.png")
    data = opened(pair, check_all=True)
    assert data.source[1].label.shape == (24, 32)


def test_unknown_label_value(pair):
    label = np.asarray(Image.open(pair / "gta5/labels/004.png")).copy()
    label[0, :2] = 77, 200
    Image.fromarray(label).save(pair / "gta5/labels/004.png")
    refused(pair, f"{pair}/gta5/labels/004.png: unknown label values 77, 200; 'gta5' does not list them")


@pytest.mark.parametrize("name", ["gta5/images/002.png", "gta5/labels/002.png",
                                  "city/leftImg8bit/train/x/train005_leftImg8bit.png"])
def test_truncated_files(pair, name):
    (pair / name).write_bytes((pair / name).read_bytes()[:200])
    refused(pair, f"{pair / name}: ", "broken or truncated")


def test_a_picture_that_is_none(pair):
    (pair / "gta5/images/000.png").write_text("<html>")
    refused(pair, f"{pair}/gta5/images/000.png: not an image that can be read")


def test_every_file_only_on_demand(pair):
    write(pair / "gta5", "images/{}.png", "labels/{}.png", 120, 0, (8, 6))
    (pair / "gta5/images/001.png").write_bytes(b"")
    (pair / "gta5/images/119.png").write_bytes(b"")
    refused(pair, "1 bad file:", "119.png")  # a sample at every start; the ends are always among it
    refused(pair, "2 bad files:", "001.png", "119.png", check_all=True)


def test_empty_list_and_wrong_list(pair):
    (pair / "list.txt").write_text("\n\n")
    refused(pair, "list.txt: the list is empty", list_s=str(pair / "list.txt"))
    (pair / "list.txt").write_text("000.png\n009.png\n")
    refused(pair, "list.txt: 1 of 2 images do not exist", "009.png", list_s=str(pair / "list.txt"))
    (pair / "list.txt").write_text("000.png\n004.png\n")
    assert [p.name for p in opened(pair, list_s=str(pair / "list.txt")).source.images] == ["000.png", "004.png"]


def test_overlap_of_training_and_evaluation(pair):
    refused(pair, "3 images belong to both the training set (val) and the evaluation set (val) of cityscapes",
            "val000_leftImg8bit.png", "choose another --set", set_t="val")


def test_a_validation_set_that_is_not_there(pair):
    shutil.rmtree(pair / "city/leftImg8bit/val")
    assert opened(pair).validation is None
    refused(pair, "no image of the set 'val'", val_set="val")


def test_a_validation_set_without_labels(pair):
    """Left out where the user did not ask for it; one label that is missing is a mistake."""
    shutil.move(pair / "city/gtFine", pair / "city/labels")
    assert opened(pair).validation is None
    refused(pair, "3 bad files", "_gtFine_labelIds.png does not exist", val_set="val")
    shutil.move(pair / "city/labels", pair / "city/gtFine")
    (pair / "city/gtFine/val/x/val001_gtFine_labelIds.png").unlink()
    refused(pair, "1 bad file", "val001_gtFine_labelIds.png does not exist")


def test_a_broken_list_of_the_validation_set_is_not_taken_for_a_missing_one(pair):
    entries = json.loads((Path(__file__).parent.parent / "lib/datasets/cityscapes.json").read_text())
    (pair / "listed.json").write_text(json.dumps({**entries, "list": "{set}.txt"}))
    (pair / "city/val.txt").write_text("x/val007_leftImg8bit.png\n")
    refused(pair, "val.txt: 1 of 1 images do not exist", "val007", target=pair / "listed.json")


@pytest.mark.parametrize("at", ["gta5/labels", "city/gtFine/val/x"])
@pytest.mark.parametrize("check_all", [False, True])
def test_labels_that_are_all_void(pair, at, check_all):
    paths = sorted((pair / at).iterdir())
    for path in paths:
        Image.fromarray(np.zeros(SIZE[::-1], np.uint8)).save(path)
    refused(pair, f"none of the {len(paths)} labels that were read, {paths[0]} the first, has a pixel of any class",
            check_all=check_all)
    Image.fromarray(np.full(SIZE[::-1], 7, np.uint8)).save(paths[-1])
    opened(pair, check_all=check_all)


def test_an_ignored_value_that_is_a_class(pair):
    refused(pair, "the label to ignore, 3, is the index of the class 'wall': choose one from 19 to 255", ignore=3)
    opened(pair, ignore=19)


@pytest.mark.parametrize("check_all", [False, True])
def test_a_misspelt_class_of_a_map(pair, check_all):
    entries = json.loads((Path(__file__).parent.parent / "lib/datasets/cityscapes.json").read_text())
    (pair / "mine.json").write_text(json.dumps({**entries, "maps": {"gta5": {"vegetatoin": "terrain"}}}))
    refused(pair, "'maps' of the data set 'cityscapes' names vegetatoin, no class of 'gta5'",
            target=pair / "mine.json", check_all=check_all)


def test_overlap_is_seen_through_links(pair):
    names = ["x/val001_leftImg8bit.png", "x/train001_leftImg8bit.png"]
    (pair / "city/leftImg8bit/train" / names[1]).unlink()
    (pair / "city/leftImg8bit/train" / names[1]).symlink_to(pair / "city/leftImg8bit/val" / names[0])
    refused(pair, "1 image belongs to both", names[1])
    assert len(opened(pair, allow_overlap=True).target) == 7


def test_a_start_asks_for_folders_not_for_files(pair, monkeypatch):
    """With 25,000 files on a network drive, a question for each file takes minutes."""
    write(pair / "gta5", "images/{}.png", "labels/{}.png", 300, 0, (8, 6))
    questions, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, *more, **named: questions.append(path) or stat(path, *more, **named))
    folder = ImageFolder(Domain.open("gta5", pair / "gta5"), load_description("gta5").classes, PLAIN)
    check(folder)
    assert len(folder) == 300 and 0 < len(questions) < 10
    (pair / "list.txt").write_text("".join(f"{n:03}.png\n" for n in range(300)))
    questions.clear()
    assert len(Domain.open("gta5", pair / "gta5", list_file=pair / "list.txt").list_images()) == 300
    assert len(questions) < 10


def one_class(pair: Path) -> Path:
    entries = json.loads((Path(__file__).parent.parent / "lib/datasets/gta5.json").read_text())
    entries["classes"], entries["void"] = entries["classes"][:1], list(range(8, 256)) + list(range(7))
    entries.pop("subsets")
    (pair / "one.json").write_text(json.dumps(entries))
    return pair / "one.json"


def test_fewer_than_two_classes(pair):
    refused(pair, "fewer than two classes", source=one_class(pair))


def test_camvid_to_idd_lite_without_code(tmp_path):
    """A pair with different labellings: the target's JSON maps the source's classes onto its own seven."""
    camvid, idd = load_description("camvid"), load_description("idd_lite")
    rng = np.random.default_rng(0)
    values = rng.choice(camvid.values().astype(np.uint8), SIZE[::-1])

    def save(description, root, set_, label, **fields):
        stem = dict(fields, set=set_)
        for pattern, array in ((description.images, rng.integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)),
                               (description.labels, label)):
            path = root / pattern.format(**stem)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)

    save(camvid, tmp_path / "camvid", camvid.sets["source"], values, stem="0001")
    if camvid.list:
        listed = tmp_path / "camvid" / camvid.list.format(set=camvid.sets["source"])
        listed.parent.mkdir(parents=True, exist_ok=True)
        image = camvid.images.format(set=camvid.sets["source"], stem="0001")
        listed.write_text(Path(image).name + "\n")
    for set_ in ("train", "val"):
        save(idd, tmp_path / "idd", set_, rng.choice(np.array([*range(7), 255], np.uint8), SIZE[::-1]), drive="1",
             stem=f"{set_}1")
    data = open_pair(Domain.open(camvid, tmp_path / "camvid", default_set="source"), Domain.open(idd, tmp_path / "idd"),
                     PLAIN, PLAIN, check_all=True)
    assert data.classes == idd.classes
    label, seen = data.source[0].label.numpy(), set()
    for name, ids in zip(camvid.classes, camvid.ids, strict=True):
        ours = idd.maps["camvid"].get(name)
        expected = idd.classes.index(ours) if ours else 255
        assert (label[np.isin(values, ids)] == expected).all(), name
        seen.add(expected)
    assert seen == set(range(7)), "every class of the target has labels in the source"
    assert (label[np.isin(values, list(camvid.void))] == 255).all()


def test_check_samples_evenly(pair):
    """Of many files a check at the start reads the first, the last and those between them."""
    opened_ = opened(pair).source
    read = []
    opened_.read = lambda i: read.append(i) or (Image.new("RGB", SIZE), np.zeros(SIZE[::-1], np.uint8))
    check(opened_, sample=3)
    assert read == [0, 2, 4]

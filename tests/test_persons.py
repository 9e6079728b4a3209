"""People on disk: names, lists, camera styles, checks, draws; and the rendered pair."""
import numpy as np
import pytest
import torch
from PIL import Image

from lib.datasets import persons
from lib.datasets.persons import CameraStyles, PersonImages, TestTransform, TrainTransform, open_persons
from lib.demo.persons import render_persons, transfer_colours
from lib.errors import UserError


def picture(path, colour=(90, 120, 150), size=(8, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def names(people) -> list[tuple]:
    return [(p.path.name, p.identity, p.camera) for p in people]


@pytest.fixture
def market(tmp_path):
    """A data set of three people and two cameras."""
    root = tmp_path / "data/market"
    for n, name in enumerate(["0002_c1s1_000001_00", "0002_c2s1_000002_00", "0007_c1s1_000003_00", "-1_c1s1_000009_00",
                              "0011_c2s1_000004_00"]):
        picture(root / f"bounding_box_train/{name}.jpg", (20 * n, 100, 200))
    for name in ("0001_c1s1_000001_00", "0003_c2s1_000001_00"):
        picture(root / f"query/{name}.jpg")
    for name in ("0001_c1s1_000005_00", "0001_c2s1_000006_00", "0000_c1s1_000007_00", "-1_c1s1_000008_00"):
        picture(root / f"bounding_box_test/{name}.jpg")
    return root


def styles_of(root, skip=()) -> None:
    for name, own, other in (("0002_c1s1_000001_00", 1, 2), ("0002_c2s1_000002_00", 2, 1),
                             ("0007_c1s1_000003_00", 1, 2), ("0011_c2s1_000004_00", 2, 1)):
        if name not in skip:
            picture(root / f"{persons.STYLES}/{name}_fake_{own}to{other}.jpg", (255, 0, 0))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_market_names(market):
    data = open_persons(market.parent, "market")
    assert names(data.train) == [("0002_c1s1_000001_00.jpg", 0, 0), ("0002_c2s1_000002_00.jpg", 0, 1),
                                 ("0007_c1s1_000003_00.jpg", 1, 0), ("0011_c2s1_000004_00.jpg", 2, 1)]
    assert names(data.query) == [("0001_c1s1_000001_00.jpg", 1, 0), ("0003_c2s1_000001_00.jpg", 3, 1)]
    assert [p.identity for p in data.gallery] == [0, 1, 1]  # distractor kept, junk dropped
    assert data.identities == [2, 7, 11] and data.junk == {"train": 1, "query": 0, "gallery": 1}
    text = "\n".join(persons.describe(data))
    for words in ("4 images of 3 identities, 2 cameras; 1 of junk dropped", "2 of 3 training identities are seen",
                  "3 images of 1 identities, 1 of them distractors", "note: 1 queries have no image by another camera",
                  "published are (12936, 751, 3368, 19732, 6)"):
        assert words in text, text


def test_other_forms_of_names(tmp_path):
    for name in ("0005_c2_f0046985.jpg", "market_0007_c12s1_000451_03.png", "0003_c1_x.JPG"):
        picture(tmp_path / "any/bounding_box_train" / name)
    assert names(open_persons(tmp_path, "any", ["train"]).train) == [
        ("0003_c1_x.JPG", 0, 0), ("0005_c2_f0046985.jpg", 1, 1), ("market_0007_c12s1_000451_03.png", 2, 11)]
    picture(tmp_path / "Market-1501-v15.09.15/query/0001_c1_0.jpg")
    assert len(open_persons(tmp_path, "market", ["query"]).query) == 1
    assert persons.parts_of(tmp_path, "market") == ["query"]


@pytest.mark.parametrize("folders", [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_msmt17_as_it_is_shipped(tmp_path, folders):
    """Camera: third field of the name. Person 0 is a person, not a distractor."""
    root = tmp_path / "msmt17/MSMT17_V1"
    lists = {"train": ["0000/0000_000_01_0303morning_0008_0.jpg 0", "0001/0001_000_15_0303morning_0008_0.jpg 1"],
             "val": ["0001/0001_003_02_0303noon_0008_0.jpg 1"],
             "query": ["0000/0000_000_05_0303morning_0008_0.jpg 0"],
             "gallery": ["0000/0000_001_06_0303morning_0008_0.jpg 0"]}
    for name, lines in lists.items():
        for line in lines:
            picture(root / folders[name in ("query", "gallery")] / line.split()[0], (len(name) * 20, int(line[3]), 9))
        (root / f"list_{name}.txt").write_text("\n".join(lines))
    data = open_persons(tmp_path, "msmt17")
    assert [(p.identity, p.camera) for p in data.train] == [(0, 0), (1, 14), (1, 1)]
    assert [(p.identity, p.camera) for p in (*data.query, *data.gallery)] == [(1, 4), (1, 5)]
    assert len(open_persons(tmp_path, "msmt17", msmt_val=False).train) == 2
    persons.check(data, check_all=True)
    for line in ("0000/0000_000_05_x.jpg", "0000_000_05_x.jpg " + "9" * 6000, "0000_000_05_x.jpg \u00b2", "x" * 5000):
        (root / "list_query.txt").write_text(f"{line}\n")
        with pytest.raises(UserError, match=r"list_query.txt, line 1: expected '0000/0000_000_01") as caught:
            open_persons(tmp_path, "msmt17")
        assert len(str(caught.value)) < 1500
    (root / "list_query.txt").write_text(f"{lists['query'][0]}\n0000/0000_000_05_x.jpg 0\n", encoding="utf-8-sig")
    with pytest.raises(UserError, match="1 of the 2 listed images for query do not exist: .*0000_000_05_x.jpg"):
        open_persons(tmp_path, "msmt17")


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_names_that_do_not_say_who_and_where(market):
    picture(market / "query/holiday.jpg")
    with pytest.raises(UserError, match=r"query has 1 images whose names .*holiday.jpg"):
        open_persons(market.parent, "market")


def test_missing_and_empty_parts(market):
    with pytest.raises(UserError, match="there is no folder .*elsewhere"):
        open_persons(market.parent, "elsewhere")
    for path in (market / "query").iterdir():
        path.rename(path.with_name("-1_c1_0.jpg"))
    with pytest.raises(UserError, match="no image for query that is not junk"):
        open_persons(market.parent, "market")
    (market / "query/-1_c1_0.jpg").unlink()
    (market / "query").rmdir()
    with pytest.raises(UserError, match="query does not exist: a data set holds"):
        open_persons(market.parent, "market")


def test_two_names_for_one_file(market):
    (market / "bounding_box_train/0099_c1s1_0.jpg").symlink_to(market / "query/0001_c1s1_000001_00.jpg")
    with pytest.raises(UserError, match=r"0099_c1s1_0.jpg and .*0001_c1s1_000001_00.jpg are one file|are one file"):
        open_persons(market.parent, "market")


def test_files_that_cannot_be_used(market):
    persons.check(open_persons(market.parent, "market"), check_all=True)
    (market / "query/0001_c1s1_000001_00.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 problems:\n.*0001_c1s1_000001_00.jpg"):
        persons.check(open_persons(market.parent, "market"))


def test_one_picture_under_two_identities(market):
    train = market / "bounding_box_train"
    (train / "0099_c1s1_0.jpg").write_bytes((train / "0002_c1s1_000001_00.jpg").read_bytes())
    (train / "0002_c2s1_9.jpg").write_bytes((train / "0002_c1s1_000001_00.jpg").read_bytes())  # one person: no mistake
    data = open_persons(market.parent, "market")
    persons.check(data)
    with pytest.raises(UserError, match=r"1 problems:\n.*0099_c1s1_0.jpg are the same picture under two identities"):
        persons.check(data, check_all=True)


# --- camera styles ----------------------------------------------------------------------------------------------------


def test_missing_styles_are_named(market):
    data = open_persons(market.parent, "market", ["train"])
    with pytest.raises(UserError, match="camera styles: .* does not exist.*--no-camstyle"):
        CameraStyles(data)
    styles_of(market, skip=["0007_c1s1_000003_00"])
    with pytest.raises(UserError, match="lacks 1 of 4 camera styles: 0007_c1s1_000003_00 as camera 2"):
        CameraStyles(data)


def test_drawn_cameras(market):
    """Every camera is drawn about equally often, own included; own is the real image."""
    styles_of(market)
    data = open_persons(market.parent, "market", ["train"])
    images = PersonImages(data.train, TestTransform((16, 8)), seed=3, styles=CameraStyles(data))
    shown = [images[0, draw].name for draw in range(200)]
    assert set(shown) == {"0002_c1s1_000001_00.jpg", "0002_c1s1_000001_00_fake_1to2.jpg"}
    assert 70 < shown.count("0002_c1s1_000001_00.jpg") < 130


def test_style_images_of_camstyle(market):
    styles_of(market)
    data = open_persons(market.parent, "market", ["train"])
    assert [p.identity for p in persons.style_images(data)] == [0, 0, 1, 2]
    picture(market / persons.STYLES / "0099_c1s1_000001_00_fake_1to2.jpg")
    with pytest.raises(UserError, match="1 files are not named after a training image: 0099"):
        persons.style_images(data)


# --- draws ------------------------------------------------------------------------------------------------------------


def test_a_draw_can_be_repeated(market):
    data = open_persons(market.parent, "market", ["train"])
    noise = np.random.default_rng(0).integers(0, 255, (64, 32, 3)).astype(np.uint8)
    Image.fromarray(noise).save(data.train[1].path)
    images = PersonImages(data.train, TrainTransform((32, 16), 0.5), seed=1)
    first, again, other = images[1, 5], images[1, 5], images[1, 6]
    assert first.image.shape == (3, 32, 16) and first.image.dtype == torch.float32
    assert (first.identity, first.camera, first.index) == (0, 1, 1)
    assert torch.equal(first.image, again.image) and not torch.equal(first.image, other.image)


def test_erasing_writes_its_values_after_normalisation():
    x = persons.erase(torch.full((3, 64, 32), 9.0), 1.0, np.random.default_rng(0))
    erased = (x != 9).all(0)
    assert 0.02 * 0.8 < erased.float().mean() < 0.2 * 1.2
    assert torch.allclose(x[:, erased][:, 0], torch.tensor(persons.ERASED))


# --- the rendered pair ------------------------------------------------------------------------------------------------


def test_rendered_pair(tmp_path):
    root = render_persons(tmp_path / "pair", seed=3, people=3, cameras=2, images=2)
    for name in ("plaza", "campus"):
        data = open_persons(root, name)
        assert (len(data.train), len(data.query), len(data.identities)) == (12, 6, 3)
        # the other test image of each person and camera, and a distractor for each person; junk is dropped
        assert (len(data.gallery), sum(p.identity == 0 for p in data.gallery), data.junk["gallery"]) == (9, 3, 3)
        assert not {p.identity for p in data.query} & set(data.identities)
        assert {(p.identity, p.camera) for p in data.query} <= {(p.identity, p.camera) for p in data.gallery}
        persons.check(data, check_all=True)
    assert CameraStyles(open_persons(root, "campus", ["train"])).cameras == [0, 1]
    assert len(persons.style_images(open_persons(root, "plaza", ["train"]))) == 24
    with Image.open(data.train[0].path) as image:
        assert image.size == (64, 128)
    kept = (root / "persons.json").stat().st_mtime_ns
    render_persons(root, seed=3, people=3, cameras=2, images=2)
    assert (root / "persons.json").stat().st_mtime_ns == kept
    again = render_persons(tmp_path / "again", seed=3, people=3, cameras=2, images=2)
    files = sorted(p.relative_to(root) for p in root.rglob("*.jpg"))
    assert files and all((root / f).read_bytes() == (again / f).read_bytes() for f in files)


def test_rendering_replaces_nothing_else(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="holds other files"):
        render_persons(tmp_path)


def test_colour_transfer(tmp_path):
    """The images of camera 1 get the mean of camera 2's."""
    for camera, colour in ((1, 60), (2, 180)):
        for n in range(2):
            array = np.random.default_rng(n).integers(colour - 40, colour + 40, (16, 8, 3)).astype(np.uint8)
            path = tmp_path / f"bounding_box_train/0001_c{camera}s1_{n}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(array).save(path.with_suffix(".jpg"), quality=100)
    transfer_colours(tmp_path, tmp_path)
    styled = [np.asarray(Image.open(p)).mean() for p in sorted((tmp_path / persons.STYLES).glob("*_fake_1to2.jpg"))]
    real = [np.asarray(Image.open(p)).mean() for p in sorted((tmp_path / "bounding_box_train").glob("*_c2*"))]
    assert len(styled) == 2 and np.mean(styled) == pytest.approx(np.mean(real), abs=2)

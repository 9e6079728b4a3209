"""lib/demo/streets: layouts on disk, exact labels, the same bytes for the same seed."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.demo.streets import look, render
from lib.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"size": (96, 48), "n_source": 3, "n_target": 4, "n_val": 2}


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return render.render_demo(tmp_path_factory.mktemp("demo") / "pair", seed=3, n_source=40, n_target=30, n_val=30)


SPLITS = {"source": ("gta5/images/*.png", 40), "train": ("cityscapes/leftImg8bit/train/*/*_leftImg8bit.png", 30),
          "val": ("cityscapes/leftImg8bit/val/*/*_leftImg8bit.png", 30)}


@pytest.mark.parametrize("split", SPLITS)
def test_every_image_has_its_label_of_known_ids(pair, split):
    pattern, count = SPLITS[split]
    images = sorted(pair.glob(pattern))
    assert len(images) == count
    pixels = np.zeros(256, np.int64)
    for path in images:
        image = Image.open(path)
        label = str(path).replace("/images/", "/labels/").replace("/leftImg8bit/", "/gtFine/")
        label = Image.open(label.replace("_leftImg8bit", "_gtFine_labelIds"))
        assert image.mode == "RGB" and image.size == label.size == (192, 96)
        assert label.mode == ("P" if split == "source" else "L")
        pixels += np.bincount(np.asarray(label).ravel(), minlength=256)
    share = pixels / pixels.sum()
    assert set(np.flatnonzero(pixels)) <= {*look.CLASSES, look.VOID}
    assert sum(share[i] > .002 for i in look.CLASSES) >= 12, {i: round(float(share[i]), 4) for i in look.CLASSES}
    assert share[look.VOID] < .03


def test_source_labels_carry_the_palette(pair):
    label = Image.open(pair / "gta5/labels/00001.png")
    rgb, ids = np.asarray(label.convert("RGB")), np.asarray(label)
    for i in np.unique(ids):
        assert (rgb[ids == i] == look.CLASSES[i]).all()


def test_the_domains_share_layout_and_colour_statistics_but_not_the_colours_of_classes(pair):
    """So that matched pixels and re-estimated BN statistics adapt little, and the layout can guide a method."""
    def statistics(split):
        paths = sorted(pair.glob(SPLITS[split][0]))
        images = np.stack([np.asarray(Image.open(p)) for p in paths]).astype(np.float64)
        labels = [str(p).replace("/images/", "/labels/").replace("/leftImg8bit/", "/gtFine/") for p in paths]
        labels = np.stack([np.asarray(Image.open(p.replace("_leftImg8bit", "_gtFine_labelIds"))) for p in labels])
        return images, labels

    (x_s, y_s), (x_t, y_t) = statistics("source"), statistics("train")
    assert np.abs(x_s.mean((0, 1, 2)) - x_t.mean((0, 1, 2))).max() < 8
    assert np.abs(np.log(x_s.std((0, 1, 2)) / x_t.std((0, 1, 2)))).max() < .1
    for i in (look.ROAD, look.SIDEWALK, look.BUILDING, look.VEGETATION, look.TERRAIN, look.SKY):
        assert np.abs(x_s[y_s == i].mean(0) - x_t[y_t == i].mean(0)).max() > 25, i
    for i in (look.ROAD, look.SKY):  # the share of a class in each row of the pictures
        assert np.abs((y_s == i).mean((0, 2)) - (y_t == i).mean((0, 2))).mean() < .1


def test_labels_follow_the_picture(pair):
    """Where the label changes the picture changes: its gradient is larger across borders than inside the classes."""
    border, inside = [], []
    for path in pair.glob("gta5/images/*.png"):
        image = np.asarray(Image.open(path), np.float32)
        label = np.asarray(Image.open(str(path).replace("images", "labels")))
        step, change = np.abs(np.diff(image, axis=1)).mean(2), np.diff(label.astype(int), axis=1) != 0
        border.append(step[change].mean())
        inside.append(step[~change].mean())
    assert np.mean(border) > 4 * np.mean(inside)


def test_same_seed_same_bytes_and_another_seed_another_pair(tmp_path):
    first, again, other = (files(render.render_demo(tmp_path / name, seed, **SMALL))
                           for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first == again
    assert first.keys() == other.keys() and len(first) == 2 * (3 + 4 + 2) + 1
    assert all(first[k] != other[k] for k in first)
    assert len({v for k, v in first.items() if "leftImg8bit/" in k}) == 6, "training and validation views differ"


def test_a_rendered_pair_is_reused_and_other_settings_render_again(tmp_path):
    root = render.render_demo(tmp_path / "demo", 1, **SMALL)
    mark = root / "gta5/images/00001.png"
    before, stamp = files(root), mark.stat().st_mtime_ns
    render.render_demo(root, 1, **SMALL)
    assert mark.stat().st_mtime_ns == stamp
    render.render_demo(root, 1, **{**SMALL, "n_source": 2})
    assert len(list((root / "gta5/images").iterdir())) == 2
    render.render_demo(root, 1, **SMALL)
    assert files(root) == before
    assert [p.name for p in tmp_path.iterdir()] == ["demo"], "no draft is left beside"


def test_an_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(render, "render_view", stop)
    with pytest.raises(KeyboardInterrupt):
        render.render_demo(tmp_path / "demo", 1, **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_files_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        render.render_demo(tmp_path, 1, **SMALL)
    assert files(tmp_path) == {"thesis.txt": b"mine"}


def test_the_command_renders_any_size_and_refuses_in_one_line(tmp_path):
    def call(out: Path):
        command = [sys.executable, "-m", "lib.demo.streets", str(out), "--size", "32", "16", "--counts", "2", "1", "1"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert call(tmp_path / "out").returncode == 0
    assert Image.open(tmp_path / "out/gta5/images/00002.png").size == (32, 16)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refused = call(out)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and str(out) in refused.stderr

"""lib/visual.py: what the pictures show, pixel for pixel where that is defined."""
import numpy as np
import pytest
from PIL import Image

from lib.visual import colour_map, legend, overlay, panel, save

PALETTE = np.array([[128, 64, 128], [244, 35, 232], [70, 70, 70]], np.uint8)
LABEL = np.array([[0, 1, 2, 255], [2, 2, 0, 7]], np.uint8)


def test_colour_map_keeps_ids_and_paints_ignore_black():
    image = colour_map(LABEL, PALETTE)
    assert image.mode == "P" and image.size == (4, 2)
    assert (np.asarray(image) == LABEL).all()
    rgb = np.asarray(image.convert("RGB"))
    assert (rgb[LABEL < 3] == PALETTE[LABEL[LABEL < 3]]).all()
    assert not rgb[LABEL >= 3].any()


def test_colour_map_takes_an_ignore_value_inside_the_palette():
    assert not np.asarray(colour_map(LABEL, PALETTE, ignore=1).convert("RGB"))[0, 1].any()


def test_a_colour_map_is_a_palette_png(tmp_path):
    save(colour_map(LABEL, PALETTE), tmp_path / "a.png")
    read = Image.open(tmp_path / "a.png")
    assert read.mode == "P" and (np.asarray(read) == LABEL).all()


def test_overlay_mixes_and_leaves_ignored_pixels():
    image = Image.fromarray(np.full((2, 4, 3), 200, np.uint8))
    mixed = np.asarray(overlay(image, LABEL, PALETTE, alpha=.25))
    assert np.abs(mixed[0, 0] - (.75 * 200 + .25 * PALETTE[0])).max() <= 1
    assert (mixed[0, 3] == 200).all()
    assert (np.asarray(overlay(image, LABEL, PALETTE, alpha=0)) == 200).all()
    with pytest.raises(ValueError, match="4x2"):
        overlay(image, LABEL[:1], PALETTE)


def test_legend_wraps_to_its_width():
    names = ["road", "sidewalk", "building"]
    wide, narrow = legend(names, PALETTE, 600), legend(names, PALETTE, 110)
    assert wide.width == 600 and narrow.width == 110 and narrow.height > 2 * wide.height
    for image in (wide, narrow):
        colours = {tuple(c) for c in np.asarray(image).reshape(-1, 3).tolist()}
        assert {tuple(c) for c in PALETTE.tolist()} <= colours


def test_panel_places_every_image():
    def cell(value, size=(20, 10)):
        return Image.new("RGB", size, (value,) * 3)

    label = colour_map(np.repeat(np.repeat(LABEL, 5, 0), 5, 1), PALETTE)
    key = legend(["road"], PALETTE[:1], 44)
    image = np.asarray(panel([[cell(10), label], [cell(60, (40, 30)), cell(90)]], ["a", "b"], size=10, gap=4, key=key))
    head = 17
    assert image.shape == (head + 10 + 4 + 15 + 4 + key.height, 44, 3)
    assert (image[head:head + 10, :20] == 10).all()
    assert (image[head:head + 10, 24:] == np.asarray(label.convert("RGB"))).all()
    assert (image[head + 14:head + 29, :20] == 60).all() and (image[head + 14:head + 29, 24:] == 90).all()
    assert (image[:head] < 128).any(), "captions are drawn"
    with pytest.raises(ValueError, match="2 images"):
        panel([[cell(1)]], ["a", "b"])

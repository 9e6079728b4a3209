"""lib/datasets/pictures.py: finding pictures, and every kind of image file as the RGB picture that a viewer shows."""
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from lib.datasets import pictures
from lib.datasets.pictures import check_pictures, find_pictures, read_image, spread
from lib.errors import UserError


def saved(array, path: Path, mode: str | None = None, **options) -> Path:
    image = array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array))
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    """A PNG file byte by byte, for headers that Pillow would not write."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0),
              b"IDAT" + zlib.compress(data), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)


# --- decoding -----------------------------------------------------------------------------------------------------

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".ppm", ".tif", ".webp"])
def test_colours_stay(tmp_path, suffix):
    path = saved(COLOURS, tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    assert (pixels(path) == COLOURS).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_grey_palette_and_printers_colours(tmp_path, mode):
    image = Image.fromarray(COLOURS).convert(mode)
    path = saved(image, tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    assert (pixels(path) == np.asarray(image.convert("RGB"))).all()


GREY16 = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big_endian.tif", "a.pgm"])
def test_16_bit_grey_is_scaled_to_8(tmp_path, name):
    """Image.convert("RGB") clips it: all but the darkest would be white."""
    path = tmp_path / name
    if name == "a.pgm":
        path.write_bytes(b"P5 3 2 65535\n" + GREY16.astype(">u2").tobytes())
    elif name == "big_endian.tif":
        Image.frombytes("I;16B", (3, 2), GREY16.astype(">u2").tobytes()).save(path)
    else:
        saved(GREY16, path)
    assert pixels(path)[..., 0].tolist() == [[0, 0, 1], [128, 254, 255]]
    assert (np.ptp(pixels(path), axis=2) == 0).all()


def test_16_bit_colours_are_scaled_to_8(tmp_path):
    rows = np.stack([GREY16] * 3, 2).astype(">u2")
    (tmp_path / "a.png").write_bytes(png(3, 2, 16, 2, b"".join(b"\0" + row.tobytes() for row in rows)))
    assert pixels(tmp_path / "a.png")[..., 1].tolist() == [[0, 0, 1], [128, 254, 255]]


@pytest.mark.parametrize("array, kind", [
    (np.array([[0, 1], [1, 0]], np.float32), "floating-point numbers"),
    (np.array([[0, 1], [1, 70000]], np.int32), "32-bit integers")])
def test_samples_without_a_range_are_refused(tmp_path, array, kind):
    with pytest.raises(UserError, match=f"a.tif: its samples are {kind}.*8 or 16 bits"):
        read_image(saved(array, tmp_path / "a.tif"))


def test_transparent_pixels_show_white(tmp_path):
    rgba = np.zeros((1, 4, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, (255, 0, 128, 255)
    found = pixels(saved(rgba, tmp_path / "a.png"))
    assert found[0, [0, 1, 3]].tolist() == [[200, 0, 0], [255, 255, 255], [200, 0, 0]]
    assert np.abs(found[0, 2].astype(int) - (227, 127, 127)).max() <= 1
    grey = pixels(saved(rgba[..., [0, 3]], tmp_path / "grey.png"))
    assert grey[0, [0, 1]].tolist() == [[200] * 3, [255] * 3]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([9, 9, 9, 50, 60, 70])
    assert pixels(saved(palette, tmp_path / "p.png", transparency=0)).tolist() == [[[255] * 3, [50, 60, 70]]]


def test_an_alpha_channel_of_zeros_is_ignored(tmp_path):
    """Some simulators write it; nobody saves a picture that shows nothing."""
    rgba = np.concatenate([COLOURS, np.zeros((6, 8, 1), np.uint8)], 2)
    assert (pixels(saved(rgba, tmp_path / "a.png")) == COLOURS).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_exif_orientation(tmp_path, orientation, name):
    """What a camera that was held sideways wrote is turned upright; the wanted pictures by the standard's words."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(COLOURS), tmp_path / name, exif=exif)
    expected = {1: COLOURS, 2: COLOURS[:, ::-1], 3: COLOURS[::-1, ::-1], 4: COLOURS[::-1],
                5: COLOURS.swapaxes(0, 1), 6: np.rot90(COLOURS, -1), 7: COLOURS[::-1, ::-1].swapaxes(0, 1),
                8: np.rot90(COLOURS)}
    assert np.array_equal(pixels(path), expected[orientation])


def test_16_bit_pictures_are_turned_upright_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(Image.fromarray(GREY16), tmp_path / "a.png", exif=exif)
    assert pixels(path)[..., 0].tolist() == [[128, 0], [254, 0], [255, 1]]


def test_a_picture_with_broken_exif_is_read(tmp_path):
    path = saved(COLOURS, tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert (pixels(path) == COLOURS).all()


def test_the_first_frame_is_taken(tmp_path):
    frames = [Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert (pixels(tmp_path / "a.tif") == COLOURS).all()


@pytest.mark.parametrize("width, height", [(20000, 20000), (12000, 12000), (100000, 100000)])
def test_pictures_of_absurd_size_are_refused_before_they_are_decompressed(tmp_path, width, height):
    """The last is beyond Pillow's own limit, the second only beyond ours."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height, 8, 0, bytes(1 << 20)))
    code = ("import resource, sys; from lib.datasets.pictures import read_image\n"
            "from lib.errors import UserError\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "try:\n    read_image(sys.argv[1])\nexcept UserError as error:\n    print(error)\n"
            "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20000, 'decompressed'")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bomb.png" in done.stdout and "more than 128 million pixels" in done.stdout


def test_files_that_are_no_pictures(tmp_path):
    whole = saved(np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8), tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "text.png").write_text("<html>")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.png").mkdir()
    for name, said in (("cut.png", "broken or truncated"), ("text.png", "not an image"), ("empty.jpg", "not an image"),
                       ("folder.png", "not an image"), ("none.png", "no such file"), ("x" * 5000, "not an image")):
        with pytest.raises(UserError, match=said) as caught:
            read_image(tmp_path / name)
        assert len(str(caught.value)) < 2000


# --- finding ------------------------------------------------------------------------------------------------------


def made(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def relative(paths, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def test_pictures_are_found_in_any_depth_and_sorted(tmp_path):
    made(tmp_path, "b/2.PNG", "b/1.jpeg", "a-b/3.tif", "a/x/4.webp", "0.jpg", "notes.txt", "a/._0.jpg",
         ".ipynb_checkpoints/0-checkpoint.png", "b/.hidden/5.png")
    found = find_pictures(tmp_path)
    assert relative(found, tmp_path) == ["0.jpg", "a/x/4.webp", "a-b/3.tif", "b/1.jpeg", "b/2.PNG"]
    assert find_pictures(str(tmp_path / "b")) == found[3:]


def test_links_are_followed_and_loops_end(tmp_path):
    made(tmp_path, "elsewhere/1.png", "root/0.png")
    (tmp_path / "root/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/linked/back").symlink_to(tmp_path / "root")
    assert relative(find_pictures(tmp_path / "root"), tmp_path / "root") == ["0.png", "linked/1.png"]


def test_a_list_chooses_and_orders(tmp_path):
    made(tmp_path, "trainA/1.png", "trainA/2.png", "trainA/sub/3.png")
    (tmp_path / "list.txt").write_text("sub/3.png\n\n1.png\n", encoding="utf-8-sig")
    found = find_pictures(tmp_path / "trainA", tmp_path / "list.txt")
    assert relative(found, tmp_path / "trainA") == ["sub/3.png", "1.png"]


LINES = {"x" * 5000: "xxx...", "/": ": /", ".": ": .", "..": ": ..", "\0": "\0", "sub": ": sub", "9.png": ": 9.png"}


@pytest.mark.parametrize("line", LINES, ids=[re.sub(r"\W", "_", line[:5]) for line in LINES])
def test_list_lines_that_name_no_picture(tmp_path, line):
    made(tmp_path, "1.png", "sub/2.png")
    (tmp_path / "list.txt").write_text(f"1.png\n{line}\n")
    with pytest.raises(UserError, match="list.txt: 1 of 2 images do not exist below") as caught:
        find_pictures(tmp_path, tmp_path / "list.txt")
    assert str(caught.value).endswith(LINES[line]) and len(str(caught.value)) < 1000


def test_folders_and_lists_that_hold_no_picture(tmp_path):
    for name in ("nowhere", "x" * 5000):
        with pytest.raises(UserError, match="no such folder; it should hold pictures"):
            find_pictures(tmp_path / name)
    made(tmp_path, "notes.txt", "list.txt")
    with pytest.raises(UserError, match="no picture in this folder or below it.*png"):
        find_pictures(tmp_path)
    with pytest.raises(UserError, match="the list is empty"):
        find_pictures(tmp_path, tmp_path / "list.txt")
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe1\0")
    with pytest.raises(UserError, match="not a UTF-8 text file"):
        find_pictures(tmp_path, tmp_path / "list.txt")
    with pytest.raises(UserError, match="none.txt: no such file"):
        find_pictures(tmp_path, tmp_path / "none.txt")


def test_indices_are_spread_from_the_first_to_the_last():
    assert spread(5, 50) == [0, 1, 2, 3, 4] and spread(1, 50) == [0]
    assert spread(101, 3) == [0, 50, 100]


def test_a_check_lists_what_cannot_be_read(tmp_path):
    for n in range(120):
        saved(COLOURS, tmp_path / f"{n:03}.png")
    images = find_pictures(tmp_path)
    check_pictures(images, check_all=True)
    for n in (1, 119):
        images[n].write_text("x")
    with pytest.raises(UserError, match="1 of the pictures cannot be used:\n.*119.png: not an image"):
        check_pictures(images)
    with pytest.raises(UserError, match="2 of the pictures.*\n.*001.png.*\n.*119.png"):
        check_pictures(images, check_all=True)


def test_nothing_here_imports_torch():
    code = "import sys, lib.datasets.pictures, lib.datasets.labels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert pictures.MAX_PIXELS == 128 << 20

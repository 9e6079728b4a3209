"""lib/datasets/transforms.py: Pillow's resizing, pairs that stay together, both pixel conventions."""
import numpy as np
import pytest
import torch
from PIL import Image

from lib.datasets.transforms import (
    PIXELS,
    Augment,
    RandomCrop,
    crop_or_pad,
    from_unit,
    mirror,
    resize,
    to_image,
    to_tensor,
    to_unit,
)

# each class in its own grey, so that the image shows where its label should be
GREYS = np.array([0, 60, 120, 180, 240], np.uint8)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def striped(width: int = 60, height: int = 40) -> tuple[Image.Image, np.ndarray]:
    """Blocks of 20 x 20 pixels of one class each, and the picture of it."""
    x, y = np.meshgrid(np.arange(width) // 20, np.arange(height) // 20)
    label = ((x + 2 * y) % len(GREYS)).astype(np.uint8)
    return Image.fromarray(GREYS[label]).convert("RGB"), label


def classes_seen(x: torch.Tensor, pixels: str = "caffe") -> np.ndarray:
    """The class whose grey is nearest, at every pixel of an image of `striped`."""
    grey = np.asarray(to_image(x, pixels))[..., 1].astype(int)
    return np.abs(grey[..., None] - GREYS.astype(int)).argmin(2)


@pytest.mark.parametrize("size", [(33, 21), (128, 72), (64, 48)])
def test_the_image_is_resized_bicubically_exactly_as_pillow_does(size):
    image = noise(64, 48)
    resized, none = resize(image, None, size)
    assert none is None and resized.size == size
    assert np.array_equal(resized, image.resize(size, Image.BICUBIC))


def test_the_label_is_resized_nearest_and_gains_no_value():
    label = np.random.default_rng(1).choice(np.array([0, 7, 18, 255], np.uint8), (48, 64))
    _, resized = resize(noise(64, 48), label, (37, 91))
    assert resized.shape == (91, 37) and set(np.unique(resized)) <= {0, 7, 18, 255}
    assert np.array_equal(resized, np.asarray(Image.fromarray(label).resize((37, 91), Image.NEAREST)))


def test_a_label_of_another_size_than_its_image_is_resized_too():
    image, label = resize(noise(64, 48), np.zeros((30, 20), np.uint8), (64, 48))
    assert image.size == (64, 48) and label.shape == (48, 64)


def test_mirror_turns_both():
    image, label = striped()
    mirrored, turned = mirror(image, label)
    assert np.array_equal(mirrored, np.asarray(image)[:, ::-1]) and np.array_equal(turned, label[:, ::-1])
    assert not np.array_equal(turned, label)
    assert mirror(image, None)[1] is None


def test_random_mirror_takes_both_or_neither_half_of_the_time():
    image, label = striped()
    augment, mirrored = Augment(image.size, "caffe", random_mirror=True), 0
    for draw in range(200):
        x, y = augment(image, label, np.random.default_rng(draw))
        assert np.array_equal(classes_seen(x), y)
        mirrored += np.array_equal(y, label[:, ::-1])
    assert 70 < mirrored < 130


@pytest.mark.parametrize("pixels", PIXELS)
def test_random_scale_varies_and_the_label_follows_the_image(pixels):
    image, label = striped(80, 60)
    augment, areas = Augment((80, 60), pixels, random_scale=True), []
    for draw in range(40):
        x, y = augment(image, label, np.random.default_rng(draw))
        assert x.shape == (3, 60, 80) and y.shape == (60, 80) and y.dtype == torch.int64
        known = y != 255
        # bicubic edges: a few pixels along the borders of the blocks take an intermediate grey
        assert (classes_seen(x, pixels) == y.numpy())[known].mean() > 0.85
        assert (x[:, ~known] == 0).all(), "padding is the mean colour"
        areas.append(known.float().mean().item())
    assert min(areas) < 0.4 and max(areas) == 1, "scaled down to 0.5 and padded, up to 1.5 and cropped"
    assert len(set(areas)) > 10


def test_every_draw_can_be_repeated():
    image, label = noise(50, 40), np.random.default_rng(2).integers(0, 5, (40, 50), dtype=np.uint8)
    augment = Augment((32, 24), "imagenet", random_scale=True, random_mirror=True)
    (x1, y1), (x2, y2), (x3, _) = (augment(image, label, np.random.default_rng([7, d])) for d in (1, 1, 2))
    assert torch.equal(x1, x2) and torch.equal(y1, y2) and not torch.equal(x1, x3)


def test_without_a_label_everything_is_ignored():
    for scale in (False, True):
        x, y = Augment((32, 24), "caffe", random_scale=scale, ignore=77)(noise(50, 40), None, np.random.default_rng(0))
        assert x.shape == (3, 24, 32) and y.shape == (24, 32) and (y == 77).all()


@pytest.mark.parametrize("corner, x, y", [((0, 0), 0, 0), ((1, 1), 3, 2), ((0.5, 0), 2, 0)])
def test_crop_cuts_image_and_label_at_one_place(corner, x, y):
    label = torch.arange(48).view(6, 8)
    image = label.float().expand(3, 6, 8)
    cut, cut_label = crop_or_pad(image, label, (5, 4), corner, 255)
    assert torch.equal(cut_label, label[y:y + 4, x:x + 5]) and torch.equal(cut[0], cut_label.float())


def test_padding_is_zero_and_ignored():
    image, label = torch.ones(3, 2, 3), torch.ones(2, 3, dtype=torch.int64)
    padded, padded_label = crop_or_pad(image, label, (5, 4), (0.7, 0.3), 9)
    assert padded.shape == (3, 4, 5) and padded.sum() == image.sum() and (padded[:, :2, :3] == 1).all()
    assert (padded_label == 9).sum() == 20 - 6 and (padded_label[:2, :3] == 1).all()
    # one side too small, the other too large
    wide, wide_label = crop_or_pad(torch.ones(3, 2, 9), torch.ones(2, 9, dtype=torch.int64), (5, 4), (1, 1), 9)
    assert wide.shape == (3, 4, 5) and (wide_label == 9).sum() == 10


def test_pixel_conventions():
    image = Image.fromarray(np.array([[[200, 100, 50]]], np.uint8))  # red, green, blue
    caffe = to_tensor(image, "caffe").flatten()
    expected = torch.tensor([50 - 104.00698793, 100 - 116.66876762, 200 - 122.67891434])
    torch.testing.assert_close(caffe, expected, rtol=1e-6, atol=0)
    expected = torch.tensor([(200 / 255 - 0.485) / 0.229, (100 / 255 - 0.456) / 0.224, (50 / 255 - 0.406) / 0.225])
    torch.testing.assert_close(to_tensor(image, "imagenet").flatten(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pixels", PIXELS)
def test_to_image_is_the_inverse(pixels):
    image = noise(40, 30, seed=3)
    x = to_tensor(image, pixels)
    assert x.dtype == torch.float32 and x.is_contiguous()
    assert np.array_equal(to_image(x, pixels), image)


def test_a_crop_is_cut_at_random_from_the_resized_image():
    """Image and label at one place, which the generator chooses; with random scale too."""
    label = np.arange(20, dtype=np.uint8)[:, None] * 10 + np.arange(10, dtype=np.uint8)
    image = Image.fromarray(np.repeat(label[..., None], 3, 2))
    places = set()
    for seed in range(20):
        x, y = Augment((10, 20), "caffe", crop=(4, 3))(image, label, np.random.default_rng(seed))
        assert x.shape == (3, 3, 4) and y.shape == (3, 4)
        assert torch.equal((x[0] + PIXELS["caffe"].mean[0]).round().long(), y)
        places.add(int(y[0, 0]))
    assert len(places) > 10
    x, y = Augment((10, 20), "caffe", True, crop=(4, 3))(image, label, np.random.default_rng(0))
    assert x.shape == (3, 3, 4) and y.shape == (3, 4)


def test_a_size_of_one_pixel_survives_random_scales():
    augment = Augment((1, 1), "caffe", random_scale=True)
    for seed in range(5):
        x, y = augment(noise(8, 8), np.zeros((8, 8), np.uint8), np.random.default_rng(seed))
        assert x.shape == (3, 1, 1) and y.tolist() == [[0]]


def test_a_random_short_side_and_a_crop():
    """The image keeps its proportions, and is padded where it is smaller than the crop."""
    image, label = noise(60, 40), np.ones((40, 60), np.uint8)
    augment, heights = Augment(None, "caffe", crop=(50, 50), short=(20, 30), ignore=9), set()
    for seed in range(60):
        x, y = augment(image, label, np.random.default_rng(seed))
        assert x.shape == (3, 50, 50) and y.shape == (50, 50)
        height, width = (y == 1).any(1).sum().item(), (y == 1).any(0).sum().item()
        assert width == round(1.5 * height) and ((y == 9).sum() == 2500 - height * width)
        heights.add(height)
    assert heights == set(range(20, 31))


def test_any_convention_in_0_to_1_and_back():
    rgb = torch.tensor([[0.0, 0.5, 1.0]]).view(1, 3, 1, 1)
    for name, p in PIXELS.items():
        values = rgb.flip(1) if p.bgr else rgb
        x = (255 * values * p.scale - torch.tensor(p.mean).view(3, 1, 1)) / torch.tensor(p.std).view(3, 1, 1)
        torch.testing.assert_close(to_unit(x, name), values)
        torch.testing.assert_close(from_unit(values, name), x)
        assert torch.equal(from_unit(values + 2, name), from_unit(torch.ones_like(values), name))


# --- crops of self-training -------------------------------------------------------------------------------------------


def test_mined_crops_hold_their_class():
    """A rare pixel is met by chance 1 in 40; with mining nearly always, at the crop's centre or near a border."""
    image = Image.fromarray(np.zeros((100, 200, 3), np.uint8))
    label = np.zeros((100, 200), np.uint8)
    label[70, 30] = 5

    def hits(mine: list[int], chance: float) -> int:
        cut = RandomCrop((40, 20), "caffe", mine_chance=chance)
        return sum((cut(image, label, np.random.default_rng(n), mine=mine).label == 5).any().item() for n in range(400))

    assert hits([], 1.0) < 60 and hits([5], 0.0) < 60 and hits([5], 1.0) == 400 and hits([4], 1.0) < 60
    assert 300 < hits([4, 5], 0.8) < 360
    always = RandomCrop((40, 20), "caffe", mine_chance=1.0)
    crop = always(image, label, np.random.default_rng(0), mine=[5])
    assert (crop.label == 5).nonzero().tolist() == [[10, 20]]
    label[70, 30], label[99, 0] = 0, 5  # in a corner the crop is shifted back inside
    crop = always(image, label, np.random.default_rng(0), mine=[5])
    assert (crop.label == 5).nonzero().tolist() == [[19, 0]] and crop.rows[-1] == 99 and crop.cols[0] == 0


def test_crops_of_images_and_labels_agree():
    """The label's value is the image's colour, whatever the scale, the mirror and the padding."""
    label = np.kron(np.random.default_rng(0).integers(0, 250, (6, 8)), np.ones((20, 20))).astype(np.uint8)
    image = Image.fromarray(np.repeat(label[..., None], 3, 2))
    sizes, mirrored = set(), 0
    cut = RandomCrop((200, 150), "caffe", random_scale=True, random_mirror=True)
    for n in range(60):
        crop = cut(image, label, np.random.default_rng(n), working=(240, 120))
        m, k = len(crop.rows), len(crop.cols)
        sizes.add((m, k))
        mirrored += crop.cols[0] > crop.cols[-1]
        assert crop.image.shape == (3, 150, 200) and crop.label.shape == (150, 200)
        assert (crop.label[m:] == 255).all() and (crop.label[:, k:] == 255).all() and not crop.image[:, m:].any()
        grey = crop.image[0, :m, :k] + 104.00698793
        assert ((grey - crop.label[:m, :k]).abs() < 2).float().mean() > 0.6  # but for the borders of the blocks
        assert np.array_equal(crop.label[:m, :k], label[crop.rows[:, None], crop.cols])
    assert {h for h, _ in sizes} >= {60, 72, 84, 96, 108, 120, 132, 144, 150} and 15 < mirrored < 45

"""What --demo of a translator ends with: the same small segmenter trained on original and on translated pictures."""
from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import predict, visual
from lib.datasets.description import Domain, load_description
from lib.datasets.folder import ImageFolder, endless, open_pair
from lib.datasets.pictures import read_image, spread
from lib.datasets.transforms import Augment
from lib.datasets.unpaired import from_symmetric, to_symmetric
from lib.files import atomic_write
from lib.metrics import iou_table, mean_iou
from lib.models.deeplab import build, logits_of, set_bn_affine, upsample
from lib.optim import deeplab_sgd, set_poly_lr
from lib.predict_translation import match_statistics
from lib.runtime import Run

Translate = Callable[[Tensor], Tensor]  # pictures of the source [1, 3, H, W] in -1..1 -> those of the target
# of the segmenter, a DeepLab on ResNet-18 from random weights; the settings of the other demos' source-only networks
STEPS, LEARNING_RATE, PIXELS = 400, 2.5e-3, "caffe"
SHOWN = 5  # pictures


def compare_translations(translators: Mapping[str, Translate], root: Path, folder: Path, run: Run, *, seed: int,
                         steps: int = STEPS) -> dict[str, float]:
    """Train a segmenter on each version of the source's pictures, score all on the target, and print the table.

    root: of the rendered pair. The versions, beside the translators': the originals, and the originals with each
    channel's mean and deviation moved to the target's. What re-estimated BN statistics do stands beside originals and
    translations. Pictures are written below ``folder``. Returns the mIoU in per cent of each column.
    """
    size = load_description("demo").size
    augment = Augment(size, PIXELS, random_mirror=True)
    data = open_pair(Domain.open("gta5", root / "gta5", default_set="source"),
                     Domain.open("demo", root / "cityscapes"), augment, augment, seed=seed)
    originals = data.source.images
    matched = match_statistics(originals, data.target.images).place(run)
    versions = {"original": originals, "mean, deviation": write(originals, matched, folder / "matched", run)}
    for name, translate in translators.items():
        versions[name] = write(originals, translate, folder / name, run)

    nets, tables = {}, {}
    for name, images in versions.items():
        started = time.monotonic()
        net = train_segmenter(with_images(data.source, images), len(data.classes), run, seed, steps)
        judged = {name: net}
        if name != "mean, deviation":
            judged[f"{name}, target BN"] = predict.reestimate_bn(net, data.target.images, size, PIXELS, run)
        for column, version in judged.items():
            nets[column] = version
            tables[column] = predict.score(version, data.validation, size, PIXELS, run)
        run.say(f"segmenter trained on {name}: target mIoU {100 * mean_iou(tables[name]):.1f} "
                f"({time.monotonic() - started:.0f} s)")
    run.say("IoU in per cent on the target's validation set, by what the segmenter was trained on\n"
            + iou_table(data.classes, tables))
    rows = [[read_image(images[i]) for images in versions.values()] for i in spread(len(originals), SHOWN)]
    visual.panel(rows, list(versions)).save(folder / "translations.png")
    predict.pictures({k: v for k, v in nets.items() if k in versions}, data, size, PIXELS, SHOWN,
                     folder / "label_maps.png", run)
    run.say(f"pictures: {folder / 'translations.png'}, {folder / 'label_maps.png'}")
    return {column: 100 * mean_iou(confusion) for column, confusion in tables.items()}


@torch.no_grad()
def write(images: Sequence[Path], translate: Translate, folder: Path, run: Run) -> list[Path]:
    """The translations of all images as PNG files under their own names."""
    paths = []
    for path in images:
        x = to_symmetric(read_image(path))[None].to(run.device)
        paths.append(folder / f"{path.stem}.png")
        with atomic_write(paths[-1]) as temporary:
            from_symmetric(translate(x)[0]).save(temporary, compress_level=1)
    return paths


def with_images(dataset: ImageFolder, images: Sequence[Path]) -> ImageFolder:
    """The data set with other pictures and the same labels."""
    other = copy.copy(dataset)
    other.images = list(images)
    return other


def train_segmenter(source: ImageFolder, num_classes: int, run: Run, seed: int, steps: int) -> nn.Module:
    """A DeepLab from random weights, the same for every version of the pictures, trained on ``source`` alone."""
    torch.manual_seed(seed)
    net = build("Deeplab", num_classes, "resnet18")
    set_bn_affine(net, True)
    net = run.place_net(net).train()
    optimizer = deeplab_sgd(net, "released", LEARNING_RATE, 0.9, 5e-4)
    for i, batch in zip(range(steps), endless(source, 1, 0, seed=seed), strict=False):
        set_poly_lr(optimizer, LEARNING_RATE, i, steps, 0.9)
        optimizer.zero_grad()
        logits = upsample(logits_of(net(run.place(batch.image))), batch.label.shape[1:])
        F.cross_entropy(logits, batch.label.to(run.device), ignore_index=source.domain.description.ignore).backward()
        optimizer.step()
    return net.eval()

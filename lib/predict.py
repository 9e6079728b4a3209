"""Label maps and scores of a segmentation network, for evaluate.py and for the training scripts' validations."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset

from lib import checkpoint, ops, visual
from lib.datasets.folder import DomainPair, ImageFolder, outlive_stop
from lib.datasets.pictures import read_image
from lib.datasets.transforms import from_unit, resize, to_image, to_tensor
from lib.errors import UserError
from lib.layout import Layout, falling_coverage, layout_of, layout_warnings
from lib.metrics import confusion_matrix, iou_table, mean_iou
from lib.models.deeplab import downsample, logits_of
from lib.runtime import Run, as_float32
from lib.session import Log, Passes

MAX_SIDE = 1 << 15  # pixels of an image that goes through a network

class Views(NamedTuple):
    tensors: list[Tensor]   # float32 [3, h, w], one for each scale
    image: np.ndarray       # uint8 [H, W, 3] as on disk
    index: int              # in the list of images


class ViewSet(Dataset):
    """The images of a list, resized to ``size`` times each of ``scales``.

    size: (width, height), a height alone, to which the width follows in proportion, or None for that of the file.
    """

    def __init__(self, images: Sequence[Path], size: tuple[int, int] | int | None, pixels: str,
                 scales: Sequence[float] = (1.0,)):
        self.images, self.size, self.pixels, self.scales = list(images), size, pixels, scales

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Views:
        image = read_image(self.images[index])
        size = self.size or image.size
        width, height = size if isinstance(size, tuple) else (image.width * size / image.height, size)
        sizes = [(round(width * s), round(height * s)) for s in self.scales]
        if not all(0 < n <= MAX_SIDE for size in sizes for n in size):
            raise UserError(f"{self.images[index]} is {image.width}x{image.height}, and would be {max(sizes)[0]} "
                            f"pixels wide and {max(sizes)[1]} high: give a --size width,height")
        tensors = [to_tensor(resize(image, None, size)[0], self.pixels) for size in sizes]
        return Views(tensors, np.array(image), index)


def fold_bn(net: nn.Module) -> nn.Module:
    """A copy of ``net`` in eval mode with every BN layer that follows a convolution folded into it.

    Pairs are found by name: conv1/bn1, conv2/bn2, ... within a module, and neighbours in an nn.Sequential.
    """
    net = copy.deepcopy(net).eval()
    for module in list(net.modules()):
        children = dict(module.named_children())
        pairs = [(c, c.replace("conv", "bn")) for c in children if c.startswith("conv")]
        if isinstance(module, nn.Sequential):
            pairs = list(zip(children, list(children)[1:], strict=False))
        for conv, bn in pairs:
            if isinstance(children[conv], nn.Conv2d) and isinstance(children.get(bn), nn.modules.batchnorm._BatchNorm):
                setattr(module, conv, fuse_conv_bn_eval(children[conv], children[bn]))
                setattr(module, bn, nn.Identity())
    return net


def prepare(net: nn.Module, dtype: torch.dtype = torch.float32, compiled: bool = False) -> nn.Module:
    """The fast form of ``net`` for prediction: BN folded, channels last, weights in ``dtype``, optionally compiled."""
    net = fold_bn(net).to(dtype=dtype, memory_format=torch.channels_last)
    if compiled:
        net.compile()
    return net


@torch.no_grad()
def reestimate_bn(net: nn.Module, images: Sequence[Path], size: tuple[int, int] | None, pixels: str, run: Run,
                  workers: int = 0) -> nn.Module:
    """A copy of ``net`` whose BN statistics are the plain averages over the given images (labels play no part).

    Li et al., "Revisiting Batch Normalization for Practical Domain Adaptation" (AdaBN, 2016).
    """
    net = copy.deepcopy(net)
    layers = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        raise UserError("--bn-stats target: this network has no batch normalisation")
    net.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    for views in DataLoader(ViewSet(images, size, pixels), None, num_workers=workers, generator=torch.Generator()):
        with run.autocast():
            net(views.tensors[0][None].to(run.device))
    return net.eval()


def load_views(views: ViewSet, indices: Sequence[int], workers: int) -> DataLoader:
    """The items of ``indices`` in order; decoding runs ahead in ``workers`` processes, which outlive a stop request."""
    return DataLoader(views, None, sampler=indices, num_workers=workers, worker_init_fn=outlive_stop,
                      generator=torch.Generator())


class Logits:
    """Logits of the images of ``views``, computed once where memory allows, else whenever they are asked for.

    Called with indices it gives ((height, width) of the file, float32 [1, C, h, w]) of each; flip: [2, C, h, w], the
    mirror image too. room: bytes of memory for those that are kept.
    """

    def __init__(self, net: nn.Module, views: ViewSet, run: Run, *, flip: bool, workers: int, room: int):
        self.net, self.views, self.run, self.flip, self.workers, self.room = net, views, run, flip, workers, room
        self.cache: dict[int, tuple[tuple[int, int], Tensor]] = {}

    def __len__(self) -> int:
        return len(self.views)

    def __call__(self, indices: Sequence[int]) -> Iterator[tuple[tuple[int, int], Tensor]]:
        items = iter(load_views(self.views, [i for i in indices if i not in self.cache], self.workers))
        for index in indices:
            if index not in self.cache:
                item = next(items)
                x = self.run.place(item.tensors[0][None])
                with torch.no_grad(), self.run.autocast():
                    views = (x, x.flip(3)) if self.flip else (x,)
                    logits = torch.cat([logits_of(self.net(view)) for view in views]).float()
                found = tuple(item.image.shape[:2]), logits.contiguous()
                if (len(self.cache) + 1) * logits.nbytes > self.room:
                    yield found
                    continue
                self.cache[index] = found
            yield self.cache[index]


def aggregated_probabilities(net: nn.Module, x: Tensor, alpha: float = 0.5) -> Tensor:
    """Class probabilities [N, classes, h, w] with spatial aggregation at test time (Kang et al. 2020, section 3.3).

    Features are mixed with what similar pixels of the same image hold (cosine), classified by the main head, and the
    probabilities mixed likewise (Kullback-Leibler); alpha is the aggregate's share. float32, or float64 as ``net``.
    """
    features = net(x, return_features=True)[0]
    dtype = features.dtype
    work = dtype if dtype == torch.float64 else torch.float32
    features = ops.spatial_aggregate(features.to(work), "cos", alpha).to(dtype)
    logits = getattr(net, net.head_names[-1])(features)
    return ops.spatial_aggregate(F.softmax(logits.to(work), dim=1), "kl", alpha)


@torch.inference_mode()
def predict(net: nn.Module, tensors: Sequence[Tensor], size: tuple[int, int], run: Run, *, flip: bool = False,
            align_corners: bool = True, aggregate: float = 0.0) -> Tensor:
    """One image's label map, uint8 [height, width] for ``size`` (width, height).

    tensors: the image at one or several scales, [3, h, w] each; logits are averaged over scales and, with ``flip``,
    over the mirrored images, and up-sampled bilinearly. Ties go to the lowest class. aggregate > 0: probabilities of
    aggregated_probabilities with that share take the place of the logits.
    """
    def scores_of(x: Tensor) -> Tensor:
        return aggregated_probabilities(net, x, aggregate) if aggregate else logits_of(net(x))

    dtype = next(net.parameters()).dtype
    logits = []
    for tensor in tensors:
        x = tensor[None].to(run.device, dtype, memory_format=torch.channels_last)
        with run.autocast():
            scores = scores_of(x)
            if flip:
                scores = (scores + scores_of(x.flip(3)).flip(3)) / 2
        logits.append(scores.float())
    size = size[::-1]
    if len(logits) > 1:
        total = sum(F.interpolate(x, size, mode="bilinear", align_corners=align_corners) for x in logits)
        logits = [total]
    return ops.upsample_argmax(logits[0], size, align_corners=align_corners)[0]


def predictions(net: nn.Module, views: ViewSet, run: Run, *, flip: bool = False, align_corners: bool = True,
                aggregate: float = 0.0, workers: int = 0,
                share: bool = False) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(index, image uint8 [H, W, 3], label map uint8 [H, W]) of every image, at the size of its file.

    Decoding and resizing run ahead in ``workers`` processes. share=True: only this process's share of the images.
    """
    indices = range(run.rank, len(views), run.world) if share else range(len(views))
    for item in DataLoader(views, None, sampler=indices, num_workers=workers, generator=torch.Generator()):
        height, width = item.image.shape[:2]
        label = predict(net, item.tensors, (width, height), run, flip=flip, align_corners=align_corners,
                        aggregate=aggregate)
        yield int(item.index), np.asarray(item.image), label.cpu().numpy()


def confusion_of(label: np.ndarray, dataset: ImageFolder, index: int) -> np.ndarray:
    """Confusion matrix int64 [C, C] (rows: truth) of the label map of one image, at the size of its truth."""
    truth = dataset.truth(index)
    if truth.shape != label.shape:
        label = np.asarray(Image.fromarray(label).resize(truth.shape[::-1], Image.Resampling.NEAREST))
    return confusion_matrix(truth, label, dataset.num_classes, dataset.domain.description.ignore)


def score(net: nn.Module, dataset: ImageFolder, size: tuple[int, int], pixels: str, run: Run, *,
          align_corners: bool = True, aggregate: float = 0.0, workers: int = 0,
          layout: Layout | None = None) -> np.ndarray:
    """Confusion matrix int64 [C, C] (rows: truth) of ``net`` in eval mode on a labelled set, over all processes.

    size: (width, height) that images are resized to; label maps are scored at the size of the label, and counted in
    ``layout``.
    """
    fast = prepare(net)
    confusion = np.zeros((dataset.num_classes, dataset.num_classes), np.int64)
    for index, _, label in predictions(fast, ViewSet(dataset.images, size, pixels), run, workers=workers,
                                       align_corners=align_corners, aggregate=aggregate, share=True):
        confusion += confusion_of(label, dataset, index)
        if layout is not None:
            layout.add(label)
    if layout is not None:
        layout.counts = run.sum(torch.from_numpy(layout.counts).to(run.device)).cpu().numpy()
    return run.sum(torch.from_numpy(confusion).to(run.device)).cpu().numpy()


def score_in_passes(net: nn.Module, dataset: ImageFolder, views: ViewSet, passes: Passes, run: Run, *, flip: bool,
                    workers: int) -> Tensor:
    """Confusion matrix int64 [C, C] as the pass "score", counted in passes.counts["scored"], over all processes.

    net: in the form of prepare; views: of the images of ``dataset``, at one scale or several.
    """
    for index, item in passes.over("score", len(views), lambda indices: load_views(views, indices, workers)):
        label = predict(net, item.tensors, item.image.shape[1::-1], run, flip=flip).cpu().numpy()
        passes.counts["scored"] += torch.from_numpy(confusion_of(label, dataset, index)).to(run.device)
    return run.sum(passes.counts["scored"]).cpu()


def pictures(nets: Mapping[str, nn.Module], data: DomainPair, size: tuple[int, int], pixels: str, max_images: int,
             path: Path, run: Run, *, align_corners: bool = True, aggregate: float = 0.0) -> None:
    """Write panels [image, truth, label map of each named network] of up to ``max_images`` validation images.

    The images are spread over the set.
    """
    fast = {name: prepare(net) for name, net in nets.items()}
    views, rows = ViewSet(data.validation.images, size, pixels), []
    for index in np.unique(np.linspace(0, len(views) - 1, min(max_images, len(views))).astype(int)).tolist():
        item = views[index]
        maps = [data.validation.truth(index), *(
            predict(net, item.tensors, item.image.shape[1::-1], run, align_corners=align_corners,
                    aggregate=aggregate).cpu().numpy() for net in fast.values())]
        rows.append([Image.fromarray(item.image), *(visual.colour_map(m, data.palette) for m in maps)])
    width = min(max(rows[0][0].width, 256), 480)
    key = visual.legend(data.classes, data.palette, len(rows[0]) * (width + 4) - 4)
    visual.save(visual.panel(rows, ["image", "truth", *nets], width, key=key), path)


@torch.no_grad()
def right_associations(net: nn.Module, data: DomainPair, sizes: Sequence[tuple[int, int]], pixels: str, alpha: float,
                       max_pairs: int, path: Path, run: Run) -> float:
    """The share of kept associations that end in a pixel of the right class; nan where none ends in a labelled pixel.

    They join up to ``max_pairs`` source and validation images of ``sizes`` (width, height), which are drawn with their
    associations as lines into ``path``.
    """
    net, right, known, sheets = prepare(net), 0, 0, []
    for n in range(min(max_pairs, len(data.validation))):
        pictures, labels, features = [], [], []
        for folder, size in zip((data.source, data.validation), sizes, strict=True):
            index = n * (len(folder) - 1) // max(max_pairs - 1, 1)
            picture, label = resize(*folder.read(index), size)
            feature = as_float32(net(to_tensor(picture, pixels)[None].to(run.device), return_features=True)[0])
            pictures.append(picture)
            features.append(feature)
            labels.append(downsample(torch.from_numpy(label.astype(np.int64))[None], feature.shape[2:]))
        found = ops.cycle_association_loss(*features, labels[0].to(run.device), alpha=alpha)
        start = found.selected.flatten().nonzero().flatten().cpu()
        end = found.forward[0].cpu()[start]
        y_start, y_end = labels[0].flatten()[start], labels[1].flatten()[end]
        is_known, is_right = y_end != 255, y_end == y_start
        known, right = known + int(is_known.sum()), right + int(is_right[is_known].sum())
        sheets.append(visual.draw_associations(
            pictures, [feature.shape[2:] for feature in features], start.numpy(), end.numpy(),
            data.palette[y_start.numpy()], (is_known & ~is_right).numpy()))
    if run.is_main:
        visual.save(visual.stack([[sheet] for sheet in sheets]), path)
    return right / known if known else float("nan")


@torch.no_grad()
def reconstructions(modules: Sequence[nn.Module], redraw: Callable[[Tensor], Tensor], data: DomainPair,
                    sizes: Sequence[tuple[int, int]], pixels: str, count: int, path: Path, run: Run) -> None:
    """Write panels [source, G(F(source)), target, G(F(target))] of ``count`` training images, spread over each set.

    redraw: images [1, 3, H, W] -> G(F(x)) in 0..1, with ``modules``, which are in eval mode meanwhile. sizes: (width,
    height) that images of each domain are resized to.
    """
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    columns = []
    for images, size in zip((data.source.images, data.target.images), sizes, strict=True):
        views, reals, fakes = ViewSet(images, size, pixels), [], []
        for index in np.linspace(0, len(views) - 1, count).astype(int).tolist():
            x = run.place(views[index].tensors[0][None])
            reals.append(to_image(x[0], pixels))
            fakes.append(to_image(from_unit(redraw(x), pixels)[0], pixels))
        columns += [reals, fakes]
    for module, mode in zip(modules, modes, strict=True):
        module.train(mode)
    rows = [list(row) for row in zip(*columns, strict=True)]
    width = min(max(sizes[0][0], 192), 480)
    visual.save(visual.panel(rows, ["source", "G(F(source))", "target", "G(F(target))"], width), path)


class Validation:
    """Scores a network on the validation set of ``data`` during training, and keeps last and best apart.

    The best is chosen on that same set and written to ``folder``/best.pth. bn_stats "target": BN statistics are
    re-estimated on the target's training images first. max_pictures: at each evaluation (0: none).
    aggregate: as for predict. Signs that the adaptation does harm (lib/layout.py) are printed and logged.
    """

    def __init__(self, data: DomainPair, size: tuple[int, int], pixels: str, run: Run, folder: Path, *, bn_stats: str,
                 workers: int, max_pictures: int, align_corners: bool = True, aggregate: float = 0.0):
        self.data, self.size, self.pixels, self.run, self.folder = data, size, pixels, run, folder
        self.bn_stats, self.workers, self.max_pictures = bn_stats, workers, max_pictures
        self.how = {"align_corners": align_corners, "aggregate": aggregate}
        self.best: dict[str, float] | None = None
        self.confusion: np.ndarray | None = None  # of the last call
        self.iteration: int | None = None         # of the last call
        self.warned: set[str] = set()             # classes and coverages that were warned of

    def state_dict(self) -> dict[str, object]:
        return {"best": self.best, "iteration": self.iteration,
                "confusion": None if self.confusion is None else torch.from_numpy(self.confusion)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.best, self.iteration = state["best"], state["iteration"]
        self.confusion = None if state["confusion"] is None else state["confusion"].numpy()

    def as_scored(self, net: nn.Module) -> nn.Module:
        """``net``, or the copy with the target's statistics."""
        if self.bn_stats != "target":
            return net
        return reestimate_bn(net, self.data.target.images, self.size, self.pixels, self.run, self.workers)

    def __call__(self, net: nn.Module, iteration: int, meta: Mapping[str, object], log: Log) -> None:
        scored = self.as_scored(net)
        layout = Layout(len(self.data.classes))
        self.confusion = score(scored, self.data.validation, self.size, self.pixels, self.run, workers=self.workers,
                               layout=layout, **self.how)
        self.iteration, miou = iteration, 100 * mean_iou(self.confusion)
        if self.best is None or miou > self.best["mIoU"]:
            self.best = {"mIoU": miou, "iteration": iteration}
            if self.run.is_main:
                checkpoint.save_weights(scored, self.folder / "best.pth", {**meta, "mIoU": miou, "bn_stats": "running"})
        self.run.say(f"iteration {iteration}: target mIoU {miou:.2f} (best {self.best['mIoU']:.2f} at "
                     f"{self.best['iteration']})")
        log.scores(iteration, {"mIoU": miou, "best_mIoU": self.best["mIoU"], **self.warn(layout, log.path)})
        if self.run.is_main and self.max_pictures:
            pictures({"prediction": scored}, self.data, self.size, self.pixels, self.max_pictures,
                     self.folder / "pictures" / f"{iteration}.png", self.run, **self.how)

    @cached_property
    def source_layout(self) -> Layout:
        return layout_of(self.data.source)

    def warn(self, layout: Layout, log: Path) -> dict[str, object]:
        """Print what looks like harm in the label maps' layout and the log, once each; all of it for the log."""
        found = layout_warnings(self.source_layout, layout, self.data.classes)
        if self.run.is_main:
            found |= falling_coverage(log)
        for name, warning in found.items():
            if name not in self.warned:
                self.run.say(f"warning: {warning}")
        self.warned |= found.keys()
        distance = {"layout_distance": layout.distance(self.source_layout)}
        return {**distance, "warnings": list(found.values())} if found else distance

    def report(self) -> None:
        """Print the table of the last evaluation, and last and best."""
        self.run.say(iou_table(self.data.classes, {"IoU": self.confusion}))
        self.run.say(f"target mIoU: last {100 * mean_iou(self.confusion):.2f}, best {self.best['mIoU']:.2f} (iteration "
                     f"{self.best['iteration']}, chosen on the validation set)")

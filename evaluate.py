"""Label maps, pictures and scores of a trained network.

    python evaluate.py --restore-from FILE                                             # the set it was to adapt to
    python evaluate.py --restore-from FILE --images my_pictures --overlay --save out   # any folder of pictures
    python compute_iou.py data/Cityscapes/data/gtFine/val result/cityscapes            # scores of the saved maps

FILE is any checkpoint of this project or of the original release; which network it is shows in its keys. Images are
resized to the working size (bicubic), the logits up-sampled to the size of the file (bilinear) and the best class
taken; written are NAME.png (places in the data set's list of classes, what compute_iou.py reads) and NAME_color.png
(colours). Where labels exist, the scores are printed at once.
"""
from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from lib import checkpoint, flags, metrics, ops, predict, runtime, visual
from lib.datasets.description import Description, Domain, load_description, select_classes
from lib.datasets.folder import ImageFolder
from lib.datasets.pictures import find_pictures, output_names
from lib.datasets.transforms import PIXELS, Augment
from lib.errors import UserError
from lib.files import check_writable, make_folder, missing_files, write_json
from lib.models.deeplab import ARCHITECTURES, MODELS


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = flags.parser(__doc__, whole=True)
    p.add_argument("--restore-from", required=True, metavar="FILE", help="checkpoint")
    p.add_argument("--model", choices=[*MODELS, "FCN8s"], help="default: recognised by the checkpoint's keys")
    p.add_argument("--arch", choices=list(ARCHITECTURES), help="default: recognised")
    p.add_argument("--aspp", choices=["released", "full"], help="default: the checkpoint's, else released")
    p.add_argument("--pixels", choices=list(PIXELS), help="default: the checkpoint's, else caffe")
    p.add_argument("--num-classes", type=flags.count, help="default: the checkpoint's")
    p.add_argument("--data", help="a description or .json (default: the checkpoint's target, else cityscapes)")
    p.add_argument("--data-dir", help="its folder (default: the description's)")
    p.add_argument("--data-list", help="file with one image a line")
    p.add_argument("--set", help="which set (default: the description's val)")
    p.add_argument("--images", metavar="FOLDER", help="any folder of pictures instead, without labels")
    p.add_argument("--save", help="output folder (default: result/NAME of the data set or folder); 'none': nothing")
    p.add_argument("--size", type=flags.size,
                   help="width,height to resize to (default: the checkpoint's, else the description's)")
    p.add_argument("--scales", type=flags.scales, default=(1.0,),
                   help="with commas; logits are averaged (default: 1.0)")
    p.add_argument("--flip", action="store_true", help="average with the mirrored image")
    p.add_argument("--aggregate", type=flags.share, nargs="?", const=0.5, metavar="ALPHA",
                   help="mix features and probabilities with those of similar pixels (pixel-level cycle association; "
                        "without a number 0.5; default: as the checkpoint was scored in training)")
    p.add_argument("--bn-stats", choices=["running", "target"],
                   help="target: re-estimate BN statistics on the images of --bn-set first (default: as the checkpoint "
                        "was scored in training)")
    p.add_argument("--bn-set", help="set for --bn-stats target (default: the description's train)")
    p.add_argument("--label-ids", action="store_true",
                   help="also labelIds/NAME.png in the data set's own ids, as its server wants")
    p.add_argument("--overlay", action="store_true", help="also NAME_overlay.png: colours over the image")
    p.add_argument("--panels", action="store_true", help="also NAME_panel.png: image, truth if known, prediction")
    p.add_argument("--json", metavar="FILE", help="write the scores there")
    p.add_argument("--num-workers", type=flags.workers, default=2, help="processes that decode and resize ahead")
    p.add_argument("--compile", action="store_true", help="torch.compile the network: pays from dozens of images on")
    flags.add_machine(p)
    args = p.parse_args(argv)
    if args.images and (args.data_dir or args.data_list or args.set):
        p.error("--images takes the place of --data-dir, --data-list and --set")
    if args.images:
        p.note("with --images, whose own statistics are taken", "bn_set")
    elif args.bn_stats == "running":
        p.refuse("with --bn-stats running", "bn_set")
    if args.save == "none":
        p.note("with --save none", "overlay", "panels", "label_ids")
    if args.cpu:
        p.note("with --cpu", "gpu")
    return args


def load_network(args: argparse.Namespace) -> tuple[torch.nn.Module, dict, checkpoint.LoadReport]:
    """(network, what is known of it, load report) of args.restore_from."""
    net, known, report = checkpoint.open_network(args.restore_from, model=args.model, arch=args.arch, aspp=args.aspp,
                                                 pixels=args.pixels)
    if args.aspp == "released" and known["model"] == "DeeplabPixelAssoc":
        raise UserError("--aspp released: this network sums all four rates")
    if known["model"] == "DeeplabVGG" and args.arch:
        raise UserError(f"--arch {args.arch}: this network is a DeeplabVGG, which has one backbone")
    if known["model"] == "FCN8s" and (args.arch or args.aspp or args.aggregate):
        raise UserError("--arch, --aspp and --aggregate are of DeepLab networks; this one is an FCN8s")
    if args.num_classes not in (None, known["num_classes"]):
        raise UserError(f"--num-classes {args.num_classes}: {args.restore_from} has {known['num_classes']} classes")
    return net, known, report


def open_images(args: argparse.Namespace, data: Description, task: Description, classes: Sequence[str],
                pixels: str) -> tuple[list[Path], ImageFolder | None]:
    """(images, the labelled data set where labels exist)."""
    if args.images:
        return find_pictures(args.images), None
    domain = Domain.open(data, args.data_dir, args.set, args.data_list, "val")
    folder = ImageFolder(domain, classes, Augment(data.size, pixels), task=task, labelled=data.labels is not None)
    if folder.labels is None:
        return folder.images, None
    missing = missing_files(folder.labels)
    if missing and len(missing) < len(folder):
        raise UserError(f"{len(folder) - len(missing)} of {len(folder)} images of {domain} have a label; "
                        f"{folder.labels[missing[0]]} does not exist. Complete them, or choose with --data-list")
    return folder.images, None if missing else folder


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp="off", seed=0, deterministic=False)
    ops.use(args.ops)
    net, known, report = load_network(args)
    bn_stats = args.bn_stats or ("running" if known["bn_stats"] == "running" else "target")
    if args.bn_set and bn_stats == "running":
        raise UserError("--bn-set has no effect without --bn-stats target")
    aggregate = known["aggregate"] if args.aggregate is None else args.aggregate
    data = load_description(args.data or known["task"])
    task = load_description(known["task"]) if "classes" in known else data
    classes = tuple(known.get("classes") or select_classes(task, None, known["num_classes"]))
    palette = task.palette[[task.classes.index(name) for name in classes]]
    size = tuple(args.size or known.get("size", data.size))
    if args.images and not args.size:
        size = size[1]  # pictures of any proportions keep them
    images, labelled = open_images(args, data, task, classes, known["pixels"])
    if args.json and labelled is None:
        raise UserError("--json: there are no labels to score against")
    if args.json:
        check_writable(args.json, "Choose another --json")
    save = Path(args.save or f"result/{Path(args.images).name if args.images else data.name}")
    save = None if args.save == "none" else save
    if args.label_ids and (data.encoding == "rgb" or not set(classes) <= set(data.classes)):
        lacking = ", ".join(sorted(set(classes) - set(data.classes))) or "which are colours"
        raise UserError(f"--label-ids: {data.name} has no ids for the classes {lacking}")
    names = output_names(images)
    if save:
        make_folder(save, "Choose another --save")
        if args.label_ids:
            make_folder(save / "labelIds", "Choose another --save")

    aspp = "" if known["model"] == "FCN8s" else f", ASPP {known['aspp']}"
    runtime.header(run, {
        "kernels": ops.backend(),
        "network": f"{known['model']} {known['arch']}, {len(classes)} classes{aspp}",
        "weights": f"{args.restore_from}: {report}", "pixels": known["pixels"],
        "images": f"{len(images)} of {args.images or data.name} at "
                  f"{f'a height of {size} pixels' if isinstance(size, int) else size}, "
                  f"{'labelled' if labelled else 'no labels'}",
        "scales": ", ".join([str(args.scales), *(["mirrored too"] if args.flip else []),
                             *([f"aggregated by {aggregate}"] if aggregate else [])]),
        "BN": f"statistics {'re-estimated on the target' if bn_stats == 'target' else 'of the checkpoint'}",
        "precision": {"off": "float32"}.get(args.amp, args.amp) + (", compiled" if args.compile else ""),
        "output": save or "scores only"})
    net.to(run.device)
    if bn_stats == "target":
        on = images if args.images else Domain.open(data, args.data_dir, args.bn_set).list_images()
        run.say(f"BN statistics re-estimated on {len(on)} images")
        net = predict.reestimate_bn(net, on, size, known["pixels"], run, args.num_workers)
    net = predict.prepare(net, runtime.AMP_DTYPES[args.amp] or torch.float32, args.compile)

    # what is written: the data set's own numbering, so that compute_iou.py can read the maps of 16 or 13 classes too
    places, ids = np.arange(256, dtype=np.uint8), np.zeros(256, np.uint8)
    if set(classes) <= set(data.classes):
        places[:len(classes)] = [data.classes.index(name) for name in classes]
        ids[:len(classes)] = [data.ids[place][0] for place in places[:len(classes)]] if data.encoding != "rgb" else 0

    def write(image: np.ndarray, label: np.ndarray, name: str, truth: np.ndarray | None) -> None:
        visual.save(Image.fromarray(places[label]), save / f"{name}.png", compress_level=1)
        visual.save(visual.colour_map(label, palette), save / f"{name}_color.png", compress_level=1)
        if args.label_ids:
            visual.save(Image.fromarray(ids[label]), save / f"labelIds/{name}.png", compress_level=1)
        if args.overlay:
            visual.save(visual.overlay(Image.fromarray(image), label, palette), save / f"{name}_overlay.png",
                        compress_level=1)
        if args.panels:
            cells = {"image": Image.fromarray(image)}
            cells |= {} if truth is None else {"truth": visual.colour_map(truth, palette)}
            cells["prediction"] = visual.colour_map(label, palette)
            width = min(image.shape[1], 640)
            key = visual.legend(classes, palette, len(cells) * (width + 4) - 4)
            visual.save(visual.panel([list(cells.values())], list(cells), width, key=key), save / f"{name}_panel.png")

    confusion = np.zeros((len(classes), len(classes)), np.int64)
    views = predict.ViewSet(images, size, known["pixels"], args.scales)
    pending: deque[Future] = deque()
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        results = predict.predictions(net, views, run, flip=args.flip, align_corners=known["align_corners"],
                                      aggregate=aggregate, workers=args.num_workers, share=True)
        bar = tqdm(results, total=len(images) // run.world, unit="image", disable=None if run.is_main else True)
        for index, image, label in bar:
            truth = labelled.truth(index) if labelled else None
            if truth is not None:
                if truth.shape != label.shape:
                    raise UserError(f"{images[index]} is {image.shape[1]}x{image.shape[0]}, but its label "
                                    f"{labelled.labels[index]} is {truth.shape[1]}x{truth.shape[0]}")
                metrics.confusion_matrix(truth, label, len(classes), data.ignore, out=confusion)
            if save:
                pending.append(pool.submit(write, image, label, names[index], truth))
                while len(pending) > 8:
                    pending.popleft().result()
        for future in pending:
            future.result()
    seconds = time.monotonic() - started
    written = f", written to {save}" if save else ""
    written += f" (for the data set's server: {save / 'labelIds'})" if save and args.label_ids else ""
    run.say(f"{len(images)} images in {seconds:.1f} s ({len(images) / seconds:.2f} a second){written}")
    if labelled:
        confusion = run.sum(torch.from_numpy(confusion).to(run.device)).cpu().numpy()
        run.say(metrics.iou_table(classes, {"IoU": confusion}))
        if args.json and run.is_main:
            write_json(args.json, {"restore_from": args.restore_from, **metrics.iou_dict(classes, confusion)},
                       "Choose another --json")


if __name__ == "__main__":
    runtime.cli(main)

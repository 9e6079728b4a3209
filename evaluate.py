"""Label maps, pictures and scores of a trained network.

    python evaluate.py --restore-from snapshots/adaptsegnet/GTA5_150000.pth            # Cityscapes val
    python evaluate.py --restore-from FILE --images my_pictures --overlay --save out   # any folder of pictures
    python compute_iou.py data/Cityscapes/data/gtFine/val result/cityscapes            # scores of the saved maps

FILE is any checkpoint of this project or of the original release; which network it is shows in its keys. Images are
resized to the working size (bicubic), the logits up-sampled to the size of the file (bilinear) and the best class
taken; written are NAME.png (places in the data set's list of classes, what compute_iou.py reads) and NAME_color.png
(colours). Where labels exist, the scores are printed at once.
"""
from __future__ import annotations

import argparse
import json
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
from lib.datasets.pictures import find_pictures
from lib.datasets.transforms import PIXELS, Augment
from lib.errors import UserError
from lib.files import missing_files
from lib.models.deeplab import ARCHITECTURES, MODELS, build
from lib.models.fcn8s import FCN8s


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    p.add_argument("--save", help="output folder (default: result/NAME OF THE DATA SET); 'none' writes nothing")
    p.add_argument("--size", type=flags.size,
                   help="width,height to resize to (default: the checkpoint's, else the description's)")
    p.add_argument("--scales", type=flags.scales, default=(1.0,), help="with commas; logits are averaged")
    p.add_argument("--flip", action="store_true", help="average with the mirrored image")
    p.add_argument("--aggregate", type=flags.share, nargs="?", const=0.5, default=0.0, metavar="ALPHA",
                   help="mix features and probabilities with those of similar pixels (pixel-level cycle association; "
                        "without a number 0.5)")
    p.add_argument("--bn-stats", choices=["running", "target"], default="running",
                   help="target: re-estimate BN statistics on the images of --bn-set first")
    p.add_argument("--bn-set", help="set for --bn-stats target (default: the description's train)")
    p.add_argument("--label-ids", action="store_true",
                   help="also labelIds/NAME.png in the data set's own ids, as its server wants")
    p.add_argument("--overlay", action="store_true", help="also NAME_overlay.png: colours over the image")
    p.add_argument("--panels", action="store_true", help="also NAME_panel.png: image, truth if known, prediction")
    p.add_argument("--json", metavar="FILE", help="write the scores there")
    p.add_argument("--num-workers", type=flags.natural, default=2, help="processes that decode and resize ahead")
    p.add_argument("--amp", choices=list(runtime.AMP_DTYPES), default="off",
                   help="weights and activations in 16 bits (under 1 %% of the label map changes)")
    p.add_argument("--compile", action="store_true", help="torch.compile the network: pays from dozens of images on")
    p.add_argument("--cpu", action="store_true")
    p.add_argument("--gpu", type=flags.natural, default=0)
    p.add_argument("--ops", choices=["auto", "compiled", "reference"], default="auto", help="kernels of csrc/")
    args = p.parse_args(argv)
    if args.images and (args.data_dir or args.data_list or args.set):
        p.error("--images takes the place of --data-dir, --data-list and --set")
    return args


def load_network(args: argparse.Namespace) -> tuple[torch.nn.Module, dict, checkpoint.LoadReport]:
    """(network, what is known of it, load report) of args.restore_from."""
    weights, meta = checkpoint.read_weights(args.restore_from)
    known = {**checkpoint.recognise(weights), **meta}
    if args.aspp == "released" and known["model"] == "DeeplabPixelAssoc":
        raise UserError("--aspp released: this network sums all four rates")
    for key in ("model", "arch", "aspp", "pixels"):
        if getattr(args, key):
            known[key] = getattr(args, key)
    known = {"aspp": "released", "pixels": "caffe", "stride_on": "1x1", "task": "cityscapes", "align_corners": True,
             **known}
    if args.num_classes not in (None, known["num_classes"]):
        raise UserError(f"--num-classes {args.num_classes}: {args.restore_from} has {known['num_classes']} classes")
    if known["model"] == "FCN8s":
        net = FCN8s(known["num_classes"], known.get("width", 1.0), known.get("padding", "released"))
    else:
        net = build(known["model"], known["num_classes"], known["arch"], known["aspp"], known["stride_on"])
    report = checkpoint.load_into(net, weights, source=args.restore_from)
    if report.missing or report.mismatched:
        raise UserError(f"{args.restore_from} does not fill the network: {report}. Is --model or --arch wrong?")
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
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist")
    save = Path(args.save or f"result/{Path(args.images).name if args.images else data.name}")
    save = None if args.save == "none" else save
    if args.label_ids and (data.encoding == "rgb" or not set(classes) <= set(data.classes)):
        lacking = ", ".join(sorted(set(classes) - set(data.classes))) or "which are colours"
        raise UserError(f"--label-ids: {data.name} has no ids for the classes {lacking}")
    if save:
        check_names(images)
        try:
            save.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--save {save}: cannot be written ({error.strerror})") from None

    runtime.header(run, {
        "kernels": ops.backend(),
        "network": f"{known['model']} {known['arch']}, {len(classes)} classes"
                   + f", ASPP {known['aspp']}" * (known["model"] != "FCN8s"),
        "weights": f"{args.restore_from}: {report}", "pixels": known["pixels"],
        "images": f"{len(images)} of {args.images or data.name} at "
                  f"{f'a height of {size} pixels' if isinstance(size, int) else size}, "
                  f"{'labelled' if labelled else 'no labels'}",
        "scales": f"{args.scales}{', mirrored too' * args.flip}"
                  + f", aggregated by {args.aggregate}" * bool(args.aggregate),
        "numbers": {"off": "float32"}.get(args.amp, args.amp) + ", compiled" * args.compile,
        "output": save or "scores only"})
    net.to(run.device)
    if args.bn_stats == "target":
        on = images if args.images else Domain.open(data, args.data_dir, args.bn_set).list_images()
        run.say(f"BN statistics re-estimated on {len(on)} images")
        net = predict.reestimate_bn(net, on, size, known["pixels"], run, args.num_workers)
    net = predict.prepare(net, runtime.AMP_DTYPES[args.amp] or torch.float32, args.compile)

    # what is written: the data set's own numbering, so that compute_iou.py can read the maps of 16 or 13 classes too
    places, ids = np.arange(256, dtype=np.uint8), np.zeros(256, np.uint8)
    if set(classes) <= set(data.classes):
        places[:len(classes)] = [data.classes.index(name) for name in classes]
        ids[:len(classes)] = [data.ids[place][0] for place in places[:len(classes)]] if data.encoding != "rgb" else 0

    def write(image: np.ndarray, label: np.ndarray, path: Path, truth: np.ndarray | None) -> None:
        Image.fromarray(places[label]).save(save / f"{path.stem}.png", compress_level=1)
        visual.save_colour(label, palette, save / f"{path.stem}_color.png")
        if args.label_ids:
            (save / "labelIds").mkdir(exist_ok=True)
            Image.fromarray(ids[label]).save(save / "labelIds" / f"{path.stem}.png", compress_level=1)
        if args.overlay:
            mixed = visual.overlay(Image.fromarray(image), label, palette)
            mixed.save(save / f"{path.stem}_overlay.png", compress_level=1)
        if args.panels:
            cells = {"image": Image.fromarray(image)}
            cells |= {} if truth is None else {"truth": visual.colour_map(truth, palette)}
            cells["prediction"] = visual.colour_map(label, palette)
            width = min(image.shape[1], 640)
            key = visual.legend(classes, palette, len(cells) * (width + 4) - 4)
            visual.panel([list(cells.values())], list(cells), width, key=key).save(save / f"{path.stem}_panel.png")

    confusion = np.zeros((len(classes), len(classes)), np.int64)
    views = predict.ViewSet(images, size, known["pixels"], args.scales)
    pending: deque[Future] = deque()
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        results = predict.predictions(net, views, run, flip=args.flip, align_corners=known["align_corners"],
                                      aggregate=args.aggregate, workers=args.num_workers, share=True)
        bar = tqdm(results, total=len(images) // run.world, unit="image", disable=None if run.is_main else True)
        for index, image, label in bar:
            truth = labelled.truth(index) if labelled else None
            if truth is not None:
                if truth.shape != label.shape:
                    raise UserError(f"{images[index]} is {image.shape[1]}x{image.shape[0]}, but its label "
                                    f"{labelled.labels[index]} is {truth.shape[1]}x{truth.shape[0]}")
                metrics.confusion_matrix(truth, label, len(classes), data.ignore, out=confusion)
            if save:
                pending.append(pool.submit(write, image, label, images[index], truth))
                while len(pending) > 8:
                    pending.popleft().result()
        for future in pending:
            future.result()
    seconds = time.monotonic() - started
    run.say(f"{len(images)} images in {seconds:.1f} s ({len(images) / seconds:.2f} a second)"
            + (f", written to {save}" if save else ""))
    if labelled:
        confusion = run.sum(torch.from_numpy(confusion).to(run.device)).cpu().numpy()
        run.say(metrics.iou_table(classes, {"IoU": confusion}))
        if args.json and run.is_main:
            scores = {"restore_from": args.restore_from, **metrics.iou_dict(classes, confusion)}
            Path(args.json).write_text(json.dumps(scores, indent=1) + "\n")


def check_names(images: Sequence[Path]) -> None:
    """Predictions lie side by side: two images of one name would overwrite each other."""
    seen: dict[str, Path] = {}
    for path in images:
        if path.stem in seen:
            raise UserError(f"{path} and {seen[path.stem]} have the same name and would share one output file")
        seen[path.stem] = path


if __name__ == "__main__":
    runtime.cli(main)

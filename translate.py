"""Pictures through a trained translator: CycleGAN, SPGAN, UNIT or MUNIT, of this project or of their releases.

    python translate.py --checkpoint checkpoints/gta5_city/latest_net_G_A.pth --source gta5 --out data/GTA5_city
    python train_adaptsegnet.py --source data/gta5_city.json ...                 # any segmenter trains on the result
    python translate.py --checkpoint gen_01000000.pt --images photos --out dusk --num-style 4
    python translate.py --cameras market --data-dir data --checkpoint checkpoints/market   # camera styles for re-ID

Written are PNG files under the same relative names and of exactly the same sizes. A described data set also gets a
description, OUT.json (small letters), with the labels where they are: they are never resampled. What is there already
is not made again. docs/translation.md shows the whole path to a segmenter.
"""
from __future__ import annotations

import argparse
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lib import checkpoint, flags, runtime, tiling, visual
from lib.datasets.description import SHIPPED, Domain, load_description
from lib.datasets.folder import ImageFolder
from lib.datasets.pictures import check_pictures, find_pictures, open_image, read_image, spread
from lib.datasets.unpaired import from_symmetric, short_side_size, to_symmetric
from lib.errors import UserError, listed
from lib.files import atomic_write, missing_files, read_json
from lib.judge import ContentJudge
from lib.models import cyclegan, translation
from lib.models.segmenter import load_segmenter
from lib.models.translation import MunitGenerator

MIN_SIDE, MAX_SIDE = 16, 16384  # pixels of a picture; reflection padding at a quarter of the size needs as many
MAX_TARGET = 500  # images of the target that --judge looks at


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", required=True, metavar="FILE",
                   help="*_net_G_A.pth, Epoch_(N).ckpt or gen_*.pt; with --cameras the folder of train_spgan.py")
    p.add_argument("--a2b", type=int, choices=[0, 1], default=1, help="0: from B to A")
    what = p.add_argument_group("what is translated")
    what.add_argument("--images", "--input_folder", metavar="FOLDER", help="pictures in it and below it")
    what.add_argument("--source", help="or a described data set: a name in lib/datasets, or a .json file")
    what.add_argument("--data-dir", help="its folder (default: the description's); with --cameras: of all (data)")
    what.add_argument("--data-list", help="file with one image a line")
    what.add_argument("--source-set", help="its set (default: the description's)")
    what.add_argument("--cameras", metavar="NAME", help="or a re-ID data set: every training image as every camera")
    what.add_argument("--domains", metavar="A,B", help="with --cameras: from camera A to camera B only")
    what.add_argument("--out", "--output_folder", metavar="FOLDER", help="where the pictures go")
    how = p.add_argument_group("how")
    size = how.add_mutually_exclusive_group()
    size.add_argument("--width", type=flags.side, help="images are resized to it before, and back after")
    size.add_argument("--short-side", type=flags.side, help="likewise, for the shorter side")
    size.add_argument("--file-size", action="store_true", help="images are translated as they are")
    how.add_argument("--tile", type=flags.side, metavar="PIXELS",
                     help="side of tiles, such as 512: the same result with less memory, in 1.3 times the time")
    how.add_argument("--num-style", "--num_style", type=flags.up_to(1000), default=1, help="MUNIT: sets to write")
    how.add_argument("--style", metavar="FILE|FOLDER", help="MUNIT: styles of pictures (default: random styles)")
    how.add_argument("--synchronized", action="store_true", help="MUNIT: the same styles for all files")
    how.add_argument("--seed", type=flags.seed, default=10, help="MUNIT: of the styles, which each file has its own of")
    judge = p.add_argument_group("did the content survive?")
    judge.add_argument("--judge", metavar="CHECKPOINT", help="a segmenter that looks at the pictures before and after")
    judge.add_argument("--target", help="a folder or described data set: distance of the pictures to it")
    judge.add_argument("--data-dir-target", help="folder of the target (default: the description's)")
    p.add_argument("--overwrite", action="store_true", help="replace what an earlier call wrote into --out")
    p.add_argument("--cpu", action="store_true")
    p.add_argument("--gpu", type=flags.natural, default=0)
    p.add_argument("--amp", choices=list(runtime.AMP_DTYPES), default="off", help="norms stay in float32")
    args = p.parse_args(argv)
    if (args.images is not None) + (args.source is not None) + (args.cameras is not None) != 1:
        p.error("give one of --images, --source and --cameras")
    if args.out is None and not args.cameras:
        p.error("--out says where the pictures go")
    if args.domains and not args.cameras:
        p.error("--domains are two cameras of --cameras")
    if args.cameras and (args.judge or not args.a2b or args.data_list or args.source_set):
        p.error("--judge, --a2b, --data-list and --source-set do not go with --cameras")
    if args.target and not args.judge:
        p.error("--target is what --judge compares with")
    return args


# --- translators ------------------------------------------------------------------------------------------------------


@dataclass
class Translator:
    """One direction of a trained pair. encoder, decoder: one generator after another; styles: of MUNIT's domain."""

    method: str
    encoder: nn.Module
    decoder: nn.Module
    scale: tuple[str, object] | None = None   # ("width" | "short_side" | "size", value) of its training, where known
    styles: MunitGenerator | None = None
    stride: int = 4

    def working_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) at which an image of ``size`` is translated."""
        kind, value = self.scale or (None, None)
        if kind == "width":
            return value, round(size[1] * value / size[0])
        return short_side_size(size, value) if kind == "short_side" else tuple(value) if kind == "size" else size

    @torch.no_grad()
    def __call__(self, x: Tensor, style: Tensor | None = None, tile: int | None = None) -> Tensor:
        """x [1, 3, H, W] in -1..1 -> the same size; style [1, S, 1, 1]; tile: the side of tiles."""
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % self.stride, 0, -height % self.stride), mode="reflect")
        row = None if style is None else self.styles.mlp(style)
        if tile:
            layers = tiling.layers_of(self.encoder.model) + tiling.layers_of(self.decoder.model, row)
            y = tiling.apply(layers, x, tile)
        else:
            code = self.encoder(x)
            y = self.decoder(code) if row is None else self.decoder(code, row)
        return y[:, :, :height, :width]


class Same(nn.Module):
    """The encoder of a generator that is not in two parts."""

    model = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return x


def load_translator(path: str | Path, a2b: bool) -> Translator:
    """The translator of any of the four methods' files, recognised by its keys. Raises UserError."""
    path = Path(path)
    state = checkpoint.load(path)
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path} holds no networks")
    if isinstance(state.get("a"), Mapping) and isinstance(state.get("b"), Mapping):  # UNIT, MUNIT: both domains
        pair, meta = translation.read_pair(path)
        how = {key: meta[key] for key in ("activ", "pad_type") if key in meta}
        gen = {d: translation.build_generator(pair[d], **how, source=f"{path} ({d})") for d in "ab"}
        here, there = (gen["a"], gen["b"]) if a2b else (gen["b"], gen["a"])
        munit = isinstance(there, MunitGenerator)
        sizes = meta.get("new_size")
        if sizes and not (isinstance(sizes, (list, tuple)) and len(sizes) == 2
                          and all(type(n) is int and 0 < n <= MAX_SIDE for n in sizes)):
            raise UserError(f"{path} says new_size = {sizes!r} of its training, which makes no sense")
        scale = ("short_side", sizes[0 if a2b else 1]) if sizes else None
        return Translator("MUNIT" if munit else "UNIT", here.enc_content if munit else here.enc, there.dec, scale,
                          there if munit else None, here.stride)
    if isinstance(state.get("Ga"), Mapping) and isinstance(state.get("Gb"), Mapping):  # SPGAN's port: Gb maps A to B
        weights, meta = state["Gb" if a2b else "Ga"], {"method": "spgan", "scale": None}
    else:
        if not a2b:
            if "_net_G_A" not in path.name:
                raise UserError(f"{path} is one direction only: name the file of the other one, without --a2b 0")
            path = path.with_name(path.name.replace("_net_G_A", "_net_G_B"))
            state = checkpoint.load(path)
        weights, meta = state, getattr(state, "segadapt", {})
    if not any(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f"{path} holds no generator: its keys are {listed(list(weights))}")
    net = cyclegan.build_generator(cyclegan.from_release(weights), str(path))
    scale = meta.get("scale")
    if scale and not (isinstance(scale, (list, tuple)) and len(scale) == 2 and scale[0] in ("width", "size")):
        raise UserError(f"{path} says scale = {scale!r} of its training, which makes no sense")
    scale = tuple(scale) if scale else None
    return Translator("SPGAN" if "model.1.bias" not in net.state_dict() else "CycleGAN", Same(), net, scale)


class Styles:
    """MUNIT's k styles of each file: drawn from N(0, I), or of pictures. A file's do not depend on the others."""

    def __init__(self, translator: Translator, args: argparse.Namespace, run: runtime.Run):
        self.translator, self.args, self.run = translator, args, run
        self.pictures = []
        if args.style:
            path = Path(args.style)
            self.pictures = find_pictures(path) if path.is_dir() else [path]
            check_pictures(self.pictures)

    def __call__(self, name: str, k: int) -> Tensor | None:
        """[1, S, 1, 1], the k-th of the file ``name``; None for the methods without styles."""
        net = self.translator.styles
        if net is None:
            return None
        key = 0 if self.args.synchronized else zlib.crc32(name.encode())
        rng = np.random.default_rng([self.args.seed, key, k])
        if not self.pictures:
            return torch.from_numpy(rng.standard_normal((1, net.style_dim, 1, 1), np.float32)).to(self.run.device)
        image = read_image(self.pictures[rng.integers(len(self.pictures))])
        image = image.resize(self.translator.working_size(image.size), Image.Resampling.BICUBIC)
        with torch.no_grad():
            return net.style(to_symmetric(image)[None].to(self.run.device))


def translate_file(translator: Translator, path: Path, out: Path, style: Tensor | None, args: argparse.Namespace,
                   run: runtime.Run, **options: object) -> None:
    """One picture, written whole or not at all. Raises UserError."""
    image = read_image(path)
    size = translator.working_size(image.size)
    if min(size) < MIN_SIDE or max(size) > MAX_SIDE:
        raise UserError(f"{path}: at {size[0]}x{size[1]} it cannot be translated; sides of {MIN_SIDE} to {MAX_SIDE} "
                        "pixels are possible: choose another --width or --short-side")
    x = run.place(to_symmetric(image if size == image.size else image.resize(size, Image.Resampling.BICUBIC))[None])
    with run.autocast():
        y = from_symmetric(translator(x, style, args.tile)[0])
    visual.save(y if y.size == image.size else y.resize(image.size, Image.Resampling.BICUBIC), out, **options)


# --- a folder or a data set -------------------------------------------------------------------------------------------


def describe(domain: Domain, data: str, out: Path, file: Path) -> None:
    """The description of the translated set: other pictures, the same labels, which stay where they are."""
    shipped = SHIPPED / f"{data}.json"
    entries = read_json(shipped if shipped.is_file() else data)
    lists = "lists/{set}.txt"
    sets = {key: domain.set for key in domain.description.sets} if "{set}" not in entries["images"] else \
        {**domain.description.sets, "source": domain.set}
    labels = entries["labels"] and f"{domain.root.resolve()}/{entries['labels']}"
    entries |= {"root": str(out.resolve()), "images": str(PurePosixPath(entries["images"]).with_suffix(".png")),
                "labels": labels, "list": lists, "sets": sets}
    names = [image.relative_to(domain.root).with_suffix(".png").as_posix() for image in domain.list_images()]
    for path, text in ((out / lists.format(set=domain.set), "\n".join(names)), (file, json.dumps(entries, indent=1))):
        with atomic_write(path) as new:
            new.write_text(text + "\n")


def check_record(args: argparse.Namespace, out: Path, facts: dict, files: Sequence[Path], run: runtime.Run) -> None:
    """Pictures of different calls must not mix. files: what this call will write. Raises UserError."""
    record = out / "translate.json"
    before = read_json(record) if record.exists() else None
    if before is not None and not isinstance(before, dict):
        raise UserError(f"{record} does not say what the pictures beside it are: choose another --out, or remove it")
    there = [file for file in files if file.exists()] if before != facts else []
    if there and not args.overwrite:
        differs = [f"{key} was {before.get(key)}, is {value}" for key, value in facts.items()
                   if before.get(key) != value] if before else ["they were not written by this script"]
        raise UserError(f"{out} holds pictures of the same names, {there[0]} among them: {'; '.join(differs)}. Choose "
                        "another --out, or replace them with --overwrite")
    run.barrier()
    if run.is_main and before != facts:
        for file in there:
            file.unlink()
        with atomic_write(record, "Choose another --out") as new:
            new.write_text(json.dumps(facts, indent=1) + "\n")
    run.barrier()


def translate_set(args: argparse.Namespace, translator: Translator, run: runtime.Run) -> None:
    out, domain, labels = Path(args.out), None, []
    if args.images:
        root, images = Path(args.images), find_pictures(args.images, args.data_list)
    else:
        domain = Domain.open(args.source, args.data_dir, args.source_set, args.data_list, "source")
        root, images = domain.root, domain.list_images()
        labels = domain.label_paths(images) if domain.description.labels else []
        if missing := missing_files(labels):
            raise UserError(f"{domain}: {len(missing)} of {len(labels)} labels do not exist: "
                            + listed([labels[i] for i in missing]))
    check_pictures(images)
    if out.resolve() == root.resolve():
        raise UserError(f"--out {out} is the folder of the originals: choose another one")
    names = [image.relative_to(root).with_suffix(".png").as_posix() for image in images]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(f"two pictures would be written as {twice}: they differ in their endings only")
    stamp = zlib.crc32(Path(args.checkpoint).read_bytes())
    facts = {"checkpoint": f"{args.checkpoint} ({stamp:08x})", "a2b": args.a2b, "scale": translator.scale,
             "root": str(root.resolve()), **({key: getattr(args, key) for key in (
                 "seed", "style", "num_style", "synchronized")} if translator.styles else {})}
    folders = [out / f"style{k}" for k in range(args.num_style)] if args.num_style > 1 else [out]
    styles = Styles(translator, args, run)
    check_record(args, out, json.loads(json.dumps(facts)), [folder / name for folder in folders for name in names], run)
    mine = range(run.rank, len(images), run.world)
    for i in tqdm(mine, unit="image", disable=None if run.is_main else True):
        for k, folder in enumerate(folders):
            if not (folder / names[i]).exists():
                translate_file(translator, images[i], folder / names[i], styles(names[i], k), args, run,
                               compress_level=1)
    run.barrier()
    for k, folder in enumerate(folders if run.is_main else ()):
        wrong = [name for image, name in zip(images, names, strict=True)
                 if read_size(image) != open_image(folder / name).size]
        if wrong:
            raise UserError(f"{folder}: {len(wrong)} pictures have not the size of their originals: {listed(wrong)}. "
                            "Remove them and start again")
        if domain is not None:
            file = out.parent / f"{out.name.lower()}{f'_style{k}' if len(folders) > 1 else ''}.json"
            describe(domain, args.source, folder, file)
            run.say(f"{len(names)} pictures in {folder}, described by {file}")
        else:
            run.say(f"{len(names)} pictures in {folder}")
    run.say(f"peak memory {runtime.peak_memory(run.device):.1f} GiB")
    if args.judge and run.is_main:
        judge_set(args, images, [folders[0] / name for name in names], domain, run)


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture as read_image turns it."""
    image = open_image(path)
    turned = image.getexif().get(0x0112, 1) >= 5
    return image.size[::-1] if turned else image.size


def judge_set(args: argparse.Namespace, images: Sequence[Path], translated: Sequence[Path], domain: Domain | None,
              run: runtime.Run) -> None:
    f = load_segmenter(args.judge).to(run.device)
    labelled = None
    if domain is not None and domain.description.labels:
        labelled = ImageFolder(domain, f.classes, None, task=load_description(f.task))
    judge = ContentJudge(f, run, 255 if domain is None else domain.description.ignore)
    for i in tqdm(range(len(images)), unit="image", desc="judge", disable=None):
        judge.add(images[i], translated[i], labelled and labelled.truth(i))
    if args.target:
        target = find_pictures(args.target) if Path(args.target).is_dir() else \
            Domain.open(args.target, args.data_dir_target).list_images()
        for i in spread(len(target), MAX_TARGET):
            judge.look(target[i], "target")
    run.say(judge.text())
    with atomic_write(Path(args.out) / "judge.json") as new:
        new.write_text(json.dumps(judge.report(), indent=1) + "\n")


# --- camera styles ----------------------------------------------------------------------------------------------------


def translate_cameras(args: argparse.Namespace, run: runtime.Run) -> None:
    """Every training image of a re-ID set as each other camera would show it: <stem>_fake_{c}to{c'}.jpg."""
    from lib.datasets.persons import STYLES, open_persons

    persons = open_persons(args.data_dir or "data", args.cameras, ["train"])
    pairs = list(permutations(persons.cameras, 2))
    if args.domains:
        wanted = tuple(int(c) - 1 if c.isdigit() else None for c in args.domains.split(","))
        if wanted not in pairs:
            raise UserError(f"--domains {args.domains}: expected two different cameras out of "
                            + ", ".join(str(c + 1) for c in persons.cameras) + ", such as 1,2")
        pairs = [wanted]
    out = Path(args.out) if args.out else persons.root / STYLES
    files = {(c, d): Path(args.checkpoint) / f"{min(c, d) + 1}to{max(c, d) + 1}" / "latest_net_G_A.pth"
             for c, d in pairs}
    if missing := sorted({str(path) for path in files.values() if not path.is_file()}):
        raise UserError(f"{len(missing)} of the cameras' translators are not there: {listed(missing)}. Train them: "
                        f"python train_spgan.py --cameras {args.cameras} --snapshot-dir {args.checkpoint}")
    for (c, d), path in files.items():
        translator = prepare(load_translator(path, a2b=c < d), args, run)
        mine = [p.path for p in persons.train if p.camera == c][run.rank::run.world]
        for image in tqdm(mine, unit="image", desc=f"{c + 1} to {d + 1}", disable=None if run.is_main else True):
            file = out / f"{image.stem}_fake_{c + 1}to{d + 1}.jpg"
            if args.overwrite or not file.exists():
                translate_file(translator, image, file, None, args, run, quality=95, subsampling=0)
    run.barrier()
    run.say(f"camera styles in {out}")


def prepare(translator: Translator, args: argparse.Namespace, run: runtime.Run) -> Translator:
    """On the device, and with the scale of the flags where they give one."""
    for net in filter(None, (translator.encoder, translator.decoder, translator.styles)):
        run.place_net(net.eval())
    if args.width or args.short_side or args.file_size:
        translator.scale = ("width", args.width) if args.width else ("short_side", args.short_side) \
            if args.short_side else None
    if translator.styles is None and (args.style or args.num_style > 1 or args.synchronized):
        raise UserError(f"{args.checkpoint} is of {translator.method}, which has no styles: leave --style, --num-style "
                        "and --synchronized out")
    return translator


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.seed, deterministic=False)
    if args.cameras:
        return translate_cameras(args, run)
    translator = prepare(load_translator(args.checkpoint, bool(args.a2b)), args, run)
    runtime.header(run, {"translator": f"{translator.method}, {'A to B' if args.a2b else 'B to A'}",
                         "weights": args.checkpoint, "scale": translator.scale or "of the files",
                         "tiles": args.tile or "none, whole images", "output": args.out})
    return translate_set(args, translator, run)


if __name__ == "__main__":
    runtime.cli(main)

"""Pictures through a trained translator: CycleGAN, SPGAN, UNIT or MUNIT, of this project or of their releases.

    python translate.py --checkpoint checkpoints/gta5_city/latest_net_G_A.pth --source gta5 --out data/GTA5_city
    python train_adaptsegnet.py --source data/gta5_city.json ...                 # any segmenter trains on the result
    python translate.py --checkpoint gen_01000000.pt --images photos --out dusk --num-style 4
    python translate.py --cameras market --data-dir data --checkpoint checkpoints/market   # camera styles for re-ID
    python translate.py --checkpoint statistics --source gta5 --target cityscapes --out data/GTA5_matched   # no network

Written are PNG files under the same relative names and of exactly the same sizes. A described data set also gets a
description, OUT.json (small letters), with the labels where they are: they are never resampled. What is there already
is not made again. docs/translation.md shows the whole path to a segmenter.
"""
from __future__ import annotations

import argparse
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lib import flags, runtime, visual
from lib.datasets.description import Domain, describe_copy
from lib.datasets.persons import STYLES, open_persons
from lib.datasets.pictures import check_pictures, find_pictures, read_image, require_same_sizes
from lib.datasets.unpaired import from_symmetric, to_symmetric
from lib.errors import UserError, listed
from lib.files import claim_folder, missing_files, write_json
from lib.judge import judge_translations
from lib.models.segmenter import load_segmenter
from lib.predict_translation import MAX_SIDE, Styles, Translator, load_translator, match_statistics
from lib.runtime import Run

MIN_SIDE = 16  # pixels of a picture: reflection padding at a quarter of the size needs as many


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = flags.parser(__doc__, whole=True)
    p.add_argument("--checkpoint", required=True, metavar="FILE",
                   help="*_net_G_A.pth, Epoch_(N).ckpt or gen_*.pt; with --cameras the folder of train_spgan.py; "
                        "'statistics': no network, each channel's mean and deviation become those of --target")
    p.add_argument("--a2b", type=int, choices=[0, 1], default=1, help="0: from B to A")
    what = p.add_argument_group("what is translated")
    what.add_argument("--images", "--input_folder", metavar="FOLDER", help="pictures in it and below it")
    what.add_argument("--source", help="or a described data set: a name in lib/datasets, or a .json file")
    what.add_argument("--data-dir", help="its folder (default: the description's); with --cameras: of all (data)")
    what.add_argument("--data-list", help="file with one image a line")
    what.add_argument("--source-set", help="its set (default: the description's)")
    what.add_argument("--cameras", metavar="NAME", help="or a re-ID data set: every training image as every camera")
    what.add_argument("--domains", metavar="A,B", help="with --cameras: from camera A to camera B only")
    what.add_argument("--target", help="a folder or described data set, for --checkpoint statistics, and for --judge "
                                       "to tell the distance of the pictures to it")
    what.add_argument("--data-dir-target", help="folder of the target (default: the description's)")
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
    p.add_argument("--overwrite", action="store_true", help="replace what an earlier call wrote into --out")
    flags.add_machine(p, kernels=False)
    args = p.parse_args(argv)
    if (args.images is not None) + (args.source is not None) + (args.cameras is not None) != 1:
        p.error("give one of --images, --source and --cameras")
    if args.out is None and not args.cameras:
        p.error("--out says where the pictures go")
    if args.domains and not args.cameras:
        p.error("--domains are two cameras of --cameras")
    if args.cameras and (args.judge or not args.a2b or args.data_list or args.source_set):
        p.error("--judge, --a2b, --data-list and --source-set do not go with --cameras")
    args.match_statistics = args.checkpoint == "statistics"
    if args.target and not (args.judge or args.match_statistics):
        p.error("--target is what --judge compares with, or whose statistics --checkpoint statistics takes")
    if args.match_statistics and (not args.target or args.cameras or not args.a2b):
        p.error("--checkpoint statistics takes those of --target, without --cameras and --a2b 0")
    if args.images:
        p.note("with --images", "data_dir", "source_set")
    if not args.target or Path(args.target).is_dir():
        p.note("without a described data set as --target", "data_dir_target")
    if args.cpu:
        p.note("with --cpu", "gpu")
    return args


def translate_file(translator: Translator, path: Path, out: Path, run: Run, style: Tensor | None = None,
                   tile: int | None = None, **options: object) -> None:
    """One picture, resized for the translator and back, written whole or not at all. Raises UserError."""
    image = read_image(path)
    size = translator.working_size(image.size)
    if min(size) < MIN_SIDE or max(size) > MAX_SIDE:
        raise UserError(f"{path}: at {size[0]}x{size[1]} it cannot be translated; sides of {MIN_SIDE} to {MAX_SIDE} "
                        "pixels are possible: choose another --width or --short-side")
    x = run.place(to_symmetric(image if size == image.size else image.resize(size, Image.Resampling.BICUBIC))[None])
    with run.autocast():
        y = from_symmetric(translator(x, style, tile)[0])
    visual.save(y if y.size == image.size else y.resize(image.size, Image.Resampling.BICUBIC), out, **options)


def open_translator(args: argparse.Namespace, translator: Translator, run: Run) -> Translator:
    """On the device, and with the scale of the flags where they give one. Raises UserError."""
    translator = translator.place(run)
    if args.width or args.short_side or args.file_size:
        translator.scale = ("width", args.width) if args.width else ("short_side", args.short_side) \
            if args.short_side else None
    if translator.styles is None and (args.style or args.num_style > 1 or args.synchronized):
        raise UserError(f"{args.checkpoint} is of {translator.method}, which has no styles: leave --style, --num-style "
                        "and --synchronized out")
    return translator


# --- a folder or a data set -------------------------------------------------------------------------------------------


def open_images(args: argparse.Namespace) -> tuple[list[Path], Path, Domain | None]:
    """(images, the folder that they are named from, the data set if it is one), checked. Raises UserError."""
    if args.images:
        root, domain, images = Path(args.images), None, find_pictures(args.images, args.data_list)
    else:
        domain = Domain.open(args.source, args.data_dir, args.source_set, args.data_list, "source")
        root, images = domain.root, domain.list_images()
        labels = domain.label_paths(images) if domain.description.labels else []
        if missing := missing_files(labels):
            raise UserError(f"{domain}: {len(missing)} of {len(labels)} labels do not exist: "
                            + listed([labels[i] for i in missing]))
    check_pictures(images)
    if Path(args.out).resolve() == root.resolve():
        raise UserError(f"--out {args.out} is the folder of the originals: choose another one")
    return images, root, domain


def open_target(args: argparse.Namespace) -> list[Path]:
    """The images of --target, where it is given."""
    if not args.target:
        return []
    if Path(args.target).is_dir():
        return find_pictures(args.target)
    return Domain.open(args.target, args.data_dir_target).list_images()


def translate_set(args: argparse.Namespace, run: Run) -> None:
    out, target = Path(args.out), open_target(args)
    images, root, domain = open_images(args)
    translator = open_translator(args, match_statistics(images, target) if args.match_statistics
                                 else load_translator(args.checkpoint, bool(args.a2b)), run)
    runtime.header(run, {"translator": f"{translator.method}, {'A to B' if args.a2b else 'B to A'}",
                         "weights": args.checkpoint, "scale": translator.scale or "of the files",
                         "tiles": args.tile or "none, whole images", "output": args.out})
    names = [image.relative_to(root).with_suffix(".png").as_posix() for image in images]
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise UserError(f"two pictures would be written as {twice[0]}: they differ in their endings only")
    folders = [out / f"style{k}" for k in range(args.num_style)] if args.num_style > 1 else [out]
    styles = Styles(translator, run, args.seed, args.style, args.synchronized)
    made_with, content = (f"statistics of {args.target}", translator.decoder.to_bytes()) if args.match_statistics \
        else (args.checkpoint, Path(args.checkpoint).read_bytes())
    facts = {"checkpoint": f"{made_with} ({zlib.crc32(content):08x})", "a2b": args.a2b, "scale": translator.scale,
             "root": str(root.resolve()), **({key: getattr(args, key) for key in (
                 "seed", "style", "num_style", "synchronized")} if translator.styles else {})}
    claim_folder(out / "translate.json", facts, [folder / name for folder in folders for name in names],
                 args.overwrite, run)

    for i in tqdm(range(run.rank, len(images), run.world), unit="image", disable=None if run.is_main else True):
        for k, folder in enumerate(folders):
            if not (folder / names[i]).exists():
                translate_file(translator, images[i], folder / names[i], run, styles(names[i], k), args.tile,
                               compress_level=1)
    run.barrier()
    if not run.is_main:
        return
    for k, folder in enumerate(folders):
        require_same_sizes(images, [folder / name for name in names], "Remove them and start again")
        described = ""
        if domain is not None:
            file = out.parent / f"{out.name.lower()}{f'_style{k}' if len(folders) > 1 else ''}.json"
            describe_copy(domain, args.source, folder, file)
            described = f", described by {file}"
        run.say(f"{len(names)} pictures in {folder}{described}")
    run.say(f"peak memory {runtime.peak_memory(run.device):.1f} GiB")
    if args.judge:
        judge = judge_translations(load_segmenter(args.judge).to(run.device), images,
                                   [folders[0] / name for name in names], domain, target, run)
        run.say(judge.text())
        write_json(out / "judge.json", judge.report())


# --- camera styles ----------------------------------------------------------------------------------------------------


def translate_cameras(args: argparse.Namespace, run: Run) -> None:
    """Every training image of a re-ID set as each other camera would show it: <stem>_fake_{c}to{c'}.jpg."""
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
        translator = open_translator(args, load_translator(path, c < d), run)
        mine = [p.path for p in persons.train if p.camera == c][run.rank::run.world]
        for image in tqdm(mine, unit="image", desc=f"{c + 1} to {d + 1}", disable=None if run.is_main else True):
            file = out / f"{image.stem}_fake_{c + 1}to{d + 1}.jpg"
            if args.overwrite or not file.exists():
                translate_file(translator, image, file, run, tile=args.tile, quality=95, subsampling=0)
    run.barrier()
    run.say(f"camera styles in {out}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.seed, deterministic=False)
    if args.cameras:
        return translate_cameras(args, run)
    return translate_set(args, run)


if __name__ == "__main__":
    runtime.cli(main)

"""How far the translations of one picture lie apart: in several styles, or before and after.

    python translate.py --checkpoint gen_00000800.pt --images photos --out styles --num-style 4
    python tests/bench_styles.py imagenet styles/style*      # or a file with VGG-16's weights
    python tests/bench_styles.py imagenet photos styles/style0

The mean over pictures, and over pairs of the folders, of the squared distance of VGG-16's features (relu5_3), which
have unit length at every location: 0 where the folders hold the same pictures, about 2 where they have nothing in
common.
"""
import argparse
import sys
from itertools import combinations
from pathlib import Path

import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.datasets.pictures import read_image  # noqa: E402
from lib.datasets.unpaired import to_symmetric  # noqa: E402
from lib.models.translation import load_vgg16  # noqa: E402


@torch.inference_mode()
def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights", help="VGG-16: a file, or imagenet")
    p.add_argument("folders", nargs="+", help="of PNG files with the same names")
    args = p.parse_args()
    vgg, distances = load_vgg16(args.weights), []
    for path in sorted(Path(args.folders[0]).glob("*.png")):
        pictures = (to_symmetric(read_image(Path(folder) / path.name)) for folder in args.folders)
        features = [normalize(vgg(picture[None])) for picture in pictures]
        distances += [(a - b).square().sum(1).mean() for a, b in combinations(features, 2)]
    if not distances:
        p.error(f"{args.folders[0]}: expected PNG files, and a second folder with the same names")
    print(f"{torch.stack(distances).mean():.3f}")


if __name__ == "__main__":
    main()

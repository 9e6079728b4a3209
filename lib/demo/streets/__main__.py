"""The command of the package's docstring."""
import argparse
import sys
from pathlib import Path

from lib import flags
from lib.demo.streets.render import render_demo
from lib.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description="Renders the miniature pair of --demo.")
    parser.add_argument("out", type=Path, help="folder to render into")
    parser.add_argument("--seed", type=flags.natural, default=0)
    parser.add_argument("--size", type=flags.count, nargs=2, default=(192, 96), metavar=("W", "H"), help="pixels")
    parser.add_argument("--counts", type=flags.count, nargs=3, default=(240, 160, 40),
                        metavar=("SOURCE", "TARGET", "VAL"), help="pictures")
    args = parser.parse_args()
    if max(args.size) > 4096:
        parser.error(f"--size {args.size[0]} {args.size[1]}: at most 4096 pixels")
    try:
        print(render_demo(args.out, args.seed, tuple(args.size), *args.counts))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""python -m lib.ops --build [--cuda]: builds the custom operators ahead of use."""
import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from lib.errors import UserError
from lib.ops import build


def main(argv: list[str] | None = None) -> int:
    architectures = ", ".join(f"sm_{a}" for a in build.CUDA_ARCHITECTURES)
    parser = argparse.ArgumentParser(prog="python -m lib.ops", description="Build the custom operators ahead of use.")
    parser.add_argument("--build", action="store_true", required=True, help="compile csrc/ and load it")
    parser.add_argument("--cuda", action="store_true", help="the CUDA sources too: compiled for every architecture "
                        f"({architectures}, PTX); linked where PyTorch has CUDA")
    args = parser.parse_args(argv)
    failed = not report("cpu")
    if args.cuda and torch.version.cuda is not None:
        names = [f"{a[0]}.{a[1:]}" for a in build.CUDA_ARCHITECTURES]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(names) + "+PTX")
        failed |= not report("cuda")
    elif args.cuda:
        try:
            with tempfile.TemporaryDirectory() as folder:
                objects = build.compile_cuda(Path(folder))
            print(f"CUDA: {len(objects)} source files compile; not linked, because this PyTorch has no CUDA")
        except UserError as error:
            failed = True
            print(error, file=sys.stderr)
    return 2 if failed else 0


def report(device: str) -> bool:
    """Builds and loads one library, in one line."""
    reason = build.load(device)
    if reason:
        print(f"{device}: {reason}", file=sys.stderr)
    else:
        print(f"built and loaded: {build.build(device)}")
    return not reason


if __name__ == "__main__":
    sys.exit(main())

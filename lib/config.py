"""Configurations of UNIT's and MUNIT's release (YAML) as flags of train_munit.py."""
from __future__ import annotations

import argparse
from pathlib import Path

from lib.errors import UserError

# keys whose flag is called otherwise; of the rest, gen: {dim: 64} is --gen-dim, and {n_res: 4} --n-res
RENAMED = {"snapshot_save_iter": "save_pred_every", "image_save_iter": "eval_every", "display_size": "save_num_images",
           "log_iter": "log_every"}
# keys that may have this value only: RGB pictures, and a loss that the release does not compute
FIXED = {"input_dim_a": 3, "input_dim_b": 3, "recon_h_w": 0}


def config_flags(path: Path, p: argparse.ArgumentParser) -> list[str]:
    """The entries of a configuration as flags of ``p``. Raises UserError for a key that ``p`` has no flag for."""
    known = {action.dest for action in p._actions} - {"config", "trainer"}
    values = {}
    for key, value in read(path).items():
        values |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {str(key): value}

    def flag_of(key: str) -> str | None:
        names = RENAMED.get(key), key.replace(".", "_"), key.partition(".")[2] or key
        return next((name for name in names if name in known), None)

    flags, unknown = [], []
    for key, value in values.items():
        if key in FIXED:
            if value != FIXED[key]:
                unknown.append(f"{key}: {value} (it must be {FIXED[key]})")
        elif flag_of(key) is None:
            unknown.append(key)
        elif value is not None:
            flags.append(f"--{flag_of(key).replace('_', '-')}={value}")
    if unknown:
        raise UserError(f"--config {path}: {len(unknown)} key{'s' * (len(unknown) > 1)} not known here: "
                        f"{', '.join(unknown)}")
    return flags


def read(path: Path) -> dict:
    """The entries of a YAML file. Raises UserError."""
    try:
        import yaml
    except ImportError:
        raise UserError("--config needs the package PyYAML: pip install pyyaml") from None
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read: {error}") from None
    if not isinstance(entries, dict):
        raise UserError(f"--config {path}: KEY: VALUE lines are expected")
    return entries

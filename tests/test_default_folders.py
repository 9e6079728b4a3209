"""Each variant of a method has a default folder of its own, so that no run meets another's."""
import importlib

import pytest

FOLDERS = {
    "train_adaptsegnet --multi-level": "snapshots/adaptsegnet_multi_gta5_cityscapes",
    "train_adaptsegnet": "snapshots/adaptsegnet_gta5_cityscapes",
    "train_adaptsegnet --source-only --aspp full": "snapshots/adaptsegnet_source_only_full_gta5_cityscapes",
    "train_adaptsegnet --gan LS --arch mobilenet_v2": "snapshots/adaptsegnet_ls_mobilenet_v2_gta5_cityscapes",
    "train_adaptsegnet --model DeeplabVGG --source synthia": "snapshots/adaptsegnet_vgg16_synthia_cityscapes",
    "train_adaptsegnet --adapt feature --target sets/my.json": "snapshots/adaptsegnet_feature_gta5_my",
    "train_adaptsegnet --demo --random-seed 7": "snapshots/demo/7",
    "train_adaptsegnet --snapshot-dir mine": "mine",
    "train_cbst --restore-from x": "snapshots/cbst_gta5_cityscapes",
    "train_cbst --restore-from x --kc-policy global": "snapshots/st_gta5_cityscapes",
    "train_cbst --restore-from x --spatial-prior build": "snapshots/cbst_sp_gta5_cityscapes",
    "train_cbst --restore-from x --spatial-prior build --prior-norm class":
        "snapshots/cbst_sp_balanced_gta5_cityscapes",
    "train_cbst --restore-from x --mr-weight-kld 0.01": "snapshots/mrkld_gta5_cityscapes",
    "train_cbst --restore-from x --lr-weight-ent 0.25": "snapshots/lrent_gta5_cityscapes",
    "train_pixel_assoc": "snapshots/pixel_assoc_gta5_cityscapes",
    "train_pixel_assoc --source-only": "snapshots/pixel_assoc_source_only_gta5_cityscapes",
    "train_gan_da": "snapshots/gan_da_gta5_cityscapes",
    "train_gan_da --method sourceonly": "snapshots/gan_da_source_only_gta5_cityscapes",
    "train_gan_da --base deeplab": "snapshots/gan_da_deeplab_gta5_cityscapes",
    "train_ecn -s duke -t market": "logs/ecn_duke_market",
}


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_for_each_variant(command):
    script, *argv = command.split()
    assert importlib.import_module(script).parse_args(argv).snapshot_dir == FOLDERS[command]


def test_no_two_variants_share_one():
    assert len(set(FOLDERS.values())) == len(FOLDERS)


def test_the_demo_takes_another_data_set_from_its_own_folder():
    parse = importlib.import_module("train_adaptsegnet").parse_args
    demo = ["--demo", "--random-seed", "7"]
    assert parse(demo).data_dir == parse([*demo, "--source", "gta5"]).data_dir == "data/demo/7/gta5"
    other = parse([*demo, "--source", "translated.json"])
    assert other.data_dir is None and other.data_dir_target == "data/demo/7/cityscapes"
    other = parse([*demo, "--target", "mytown.json"])
    assert other.data_dir == "data/demo/7/gta5" and other.data_dir_target is None
    persons = importlib.import_module("train_ecn").parse_args([*demo, "-s", "market"])
    assert persons.data_dir == "data/demo/persons/7"

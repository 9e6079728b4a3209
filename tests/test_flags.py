"""lib/flags.py: what the command line gives, flags without effect, and help that shows each default once."""
import argparse
from contextlib import nullcontext

import pytest

from lib import flags


def small() -> flags.Parser:
    p = flags.parser("What it does.\n\nMore of it.")
    p.add_argument("--plain", type=int, default=3)
    p.add_argument("--said", help="a number (default: the data's)")
    p.add_argument("--texted", "--texted_too", default="x", help="a word")
    p.add_argument("--on", action=argparse.BooleanOptionalAction, default=True, help="a switch")
    p.add_argument("--off", action="store_true", help="another")
    return p


def test_given_is_what_the_command_line_holds():
    p = small()
    args = p.parse_args(["--plain", "3", "--no-on"])  # a flag that repeats its default is given, too
    assert p.given == {"plain", "on"} and (args.plain, args.said, args.on, args.off) == (3, None, False, False)
    assert small().parse_args([]).plain == 3


def test_a_flag_without_effect_is_one_line(capsys):
    p = small()
    p.parse_args(["--texted", "y"])
    p.refuse("with --off", "plain", "said")
    with pytest.raises(SystemExit) as left:
        p.refuse("with --off", "plain", "texted")
    message = capsys.readouterr().err
    assert left.value.code == 2 and message.count("\n") == 1 and "--texted has no effect with --off" in message


def test_help_shows_each_default_once():
    text = " ".join(small().format_help().split())
    assert "What it does." in text and "More" not in text
    assert "More" in flags.parser("What it does.\n\nMore of it.", whole=True).format_help()
    for part in ("--plain PLAIN (default: 3)", "a number (default: the data's) --texted", "a word (default: x)",
                 "a switch (default: True)"):
        assert part in text
    assert text.endswith("--off another")


@pytest.mark.parametrize("argv,message,leaves", [
    (["--resume", "--overwrite"], "choose one", True),
    (["--cpu", "--gpu", "0"], "note: --gpu has no effect with --cpu", False),
    (["--not-restore-last"], "note: --not-restore-last has no effect without --restore-from", False)])
def test_runs(argv, message, leaves, capsys):
    p = flags.parser("A run.")
    flags.add_network(p)
    flags.add_run(p)
    with pytest.raises(SystemExit) if leaves else nullcontext():
        flags.parse(p, argv, {})
    said = capsys.readouterr()
    assert message in (said.err if leaves else said.out)


def test_a_folder_for_tensorboard_switches_it_on():
    p = flags.parser("A run.")
    flags.add_run(p)
    assert flags.parse(p, ["--log-dir", "board"], {}).tensorboard and not flags.parse(p, [], {}).tensorboard

"""`distattn train`: train on this machine as a TOML file describes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from distattn.ir.errors import DistattnError
from distattn.ir.text_format import print_message
from distattn.launch.command_keys import refuse_keys_that_do_nothing
from distattn.launch.command_line import check_options
from distattn.launch.run_locally import run_locally
from distattn.launch.start_run import preflight_alone
from distattn.training.config import run_file as configuration

USAGE = "usage: distattn train CONFIG [--json] [--section.key value ...]\n\n"


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    rest = [word for word in arguments if word != "--json"]
    if not rest:
        raise DistattnError("train: CONFIG is missing: name a configuration, for example: distattn train tiny")
    if rest[0] in ("-h", "--help"):
        sys.stdout.write(USAGE + configuration.help_text())
        return 0
    check_options("train", rest, ["--json"])
    refuse_keys_that_do_nothing("train", rest[1:])
    config = preflight_alone(configuration.load(rest[0], rest[1:], print_message))
    return run_locally(config, json_lines=len(rest) < len(arguments))

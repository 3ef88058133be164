"""The command line: `distattn COMMAND ...`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from distattn.ir.errors import DistattnError
from distattn.ir.text_format import print_message
from distattn.launch.stop_signals import CommandStopped, end_now, stop_on_signals

_USAGE = """usage: distattn COMMAND ...

commands:
  train CONFIG [--json] [--section.key value ...]
      train as a TOML file describes (see distattn configs show tiny) and repeat the first steps in plain transformers, in one
      process, to compare; distattn train --help lists all keys
  resume RUN [--json] [--section.key value ...]
      continue a run here from its newest checkpoint, also on other ranks or with another engine
  preflight CONFIG [--json] [--section.key value ...]
      start a run's ranks here, compare their versions, configuration and data, measure their speed, and end; every run does
      this before its first step
  calibrate --out FILE.toml
      measure this machine for plan --cluster FILE.toml; distattn calibrate --help
  launch {local,slurm,ray,folder} CONFIG, launch {status,logs,cancel} RUN
      start a run on this machine, on Slurm or on Ray, and manage it; distattn launch --help
  doctor [SCRIPT.py | MODEL] [--ranks N]
      check this machine, and that a model computes on several ranks what it computes on one; distattn doctor --help
  plan CONFIG | --docs LENGTHS --cluster h200-8x8
      plan one attention call with every strategy and time it on a described cluster (simulated)
  data {tokenize,verify,pack,stats,show}
      turn text into the packs of every step of a run; distattn data --help
  ckpt {list,verify,show,export-hf,import-hf}
      list, verify and show the checkpoints of a run, and convert folders of transformers; distattn ckpt --help
  configs {list,show,copy}
      configurations that distattn ships; a CONFIG is a file or one of their names: distattn train tiny

  --version

exit codes: 0 done, 1 the comparison or a process failed, 2 bad configuration, or a missing run folder,
3 damaged data, 4 another rank was lost,
75 training was asked to stop, and can be resumed, 128 + N ended by signal N (129 SIGHUP, 130 Ctrl-C, 131 SIGQUIT,
138 SIGUSR1, 143 SIGTERM)
"""

# command NAME is the function `main` of the module distattn.launch.NAME_command
_COMMANDS = ("train", "resume", "preflight", "plan", "calibrate", "doctor", "launch", "data", "ckpt", "configs")


def entry() -> None:
    """Run one command and end the process with its exit code."""
    # handle a signal once, even if it is sent several times before the process ends
    with stop_on_signals():
        code = main()
        if code > 128:
            end_now(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. A user's mistake prints one sentence to stderr, never a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0 if arguments else 2
    if arguments == ["--version"]:
        sys.stdout.write(f"distattn {version('distattn')}\n")
        return 0
    command, rest = arguments[0], arguments[1:]
    try:
        if command not in _COMMANDS:
            commands = f"{', '.join(_COMMANDS[:-1])} and {_COMMANDS[-1]}"
            raise DistattnError(f"there is no command {command!r}; there are {commands}. See distattn --help.")
        with stop_on_signals():
            # import only the module of this command: some commands need torch, which takes seconds
            code: int = importlib.import_module(f"distattn.launch.{command}_command").main(rest)
            # the reader may have closed the pipe: flush here, where BrokenPipeError is handled
            sys.stdout.flush()
            return code
    except DistattnError as error:
        for line in str(error).splitlines():
            print_message(line)
        return error.exit_code
    except CommandStopped as stop:
        print_message(str(stop))
        return stop.exit_code
    except KeyboardInterrupt:
        print_message("stopped.")
        return 130
    except BrokenPipeError:
        # the reader, such as head, closed the pipe; flushing buffered output at exit must not raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print_message(f"{where}{error.strerror or error}.")
        return DistattnError.exit_code


if __name__ == "__main__":
    entry()

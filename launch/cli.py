"""The command line: `distattn COMMAND ...`."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence

from distattn.errors import DistattnError

_USAGE = """usage: distattn COMMAND ...

commands:
  train CONFIG [--json] [--section.key value ...]
      train as a TOML file says (see configs/tiny.toml) and prove the result; distattn train --help lists all keys
  plan CONFIG | --docs LENGTHS --cluster h200-8x8
      plan one attention call with every strategy and time it on a described cluster (simulated)

exit codes: 0 done, 1 the proof or a process failed, 2 bad configuration, 3 damaged data
"""


def entry() -> None:
    """Run one command and end the process with its exit code."""
    code = main()
    if code > 128:
        # stopped in the middle, threads of torch's store may still be at what Python tears down: that aborts the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A person's mistake is one sentence on stderr, never a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    try:
        if command == "train":
            return _train(rest)
        if command == "plan":
            from distattn.launch import plan

            return plan.main(rest)
        raise DistattnError(f"there is no command {command!r}; there are train and plan. See distattn --help.")
    except DistattnError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"distattn: {line}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("distattn: stopped.\n")
        return 130


def _train(arguments: list[str]) -> int:
    from distattn import config as configuration

    json_lines = "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--json"]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(
            "usage: distattn train CONFIG [--json] [--section.key value ...]\n\n" + configuration.help_text()
        )
        return 0 if arguments else 2
    config = configuration.load(arguments[0], arguments[1:])
    missing = [name for name in ("transformers", "tensorboard", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise DistattnError(f"training needs {', '.join(missing)}: pip install 'distattn[train]'.")
    run, explanation = _prepare(config, json_lines)

    # heavy imports only once the run is known to be possible
    from distattn.launch.local import run_ranks
    from distattn.prove import prove
    from distattn.report import write_report

    code = run_ranks(config.parallel.ranks, "distattn.launch.rank", str(run.folder), json.dumps(json_lines))
    if code:
        return code
    proof = None
    if config.proof.steps:
        _say(
            json_lines, f"the first {min(config.proof.steps, config.train.steps)} steps again in plain transformers ..."
        )
        proof = prove(run, config)
    write_report(run, config, explanation, proof)
    steps = run.metrics()
    if json_lines:
        result = {"run": str(run.folder), "first_loss": steps[0].loss, "last_loss": steps[-1].loss, "proof": proof}
        sys.stdout.write(json.dumps(result) + "\n")
    _say(json_lines, f"loss {steps[0].loss:.3f} to {steps[-1].loss:.3f} in {len(steps)} steps")
    if proof:
        _say(
            json_lines,
            f"largest relative difference to plain transformers: loss {proof['loss']:.1e}, gradient norm "
            f"{proof['grad_norm']:.1e} (must be under {proof['tolerance']:.0e})",
        )
    _say(json_lines, f"report: {run.report_file}")
    if proof and not proof["passed"]:
        sys.stderr.write("distattn: the run differs from plain transformers; the proof failed.\n")
        return 1
    return 0


def _prepare(config, json_lines: bool):  # noqa: ANN001, ANN202
    """Read the data, make the run folder, plan and prove the first step: all that can go wrong before processes start."""
    from distattn.data.text import read_corpus
    from distattn.parallel.explain import explain, readable_bytes
    from distattn.run import Run, plan_of

    data = config.data
    # a plan that cannot be made must not leave a run folder behind
    plan_of(config, [data.max_document])
    corpus = read_corpus(data.path, suffix=data.suffix, exclude=data.exclude, max_document=data.max_document)
    run = Run.create(config, corpus)
    plan = run.first_plan(config)
    explanation = explain(plan)
    plan.save(run.plan_file)
    run.explanation_file.write_text(str(explanation) + "\n", "utf-8")
    size = sum(document.end - document.start for document in corpus.documents)
    skipped = f" ({corpus.empty_files} empty ones skipped)" if corpus.empty_files else ""
    _say(
        json_lines,
        f"data: {corpus.files:,} files{skipped}, {readable_bytes(size)}, {len(corpus.documents):,} documents",
    )
    _say(json_lines, str(explanation).splitlines()[0])
    _say(json_lines, f"run folder: {run.folder}")
    return run, explanation


def _say(json_lines: bool, text: str) -> None:
    if not json_lines:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    entry()

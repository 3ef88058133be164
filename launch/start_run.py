"""What comes before ranks start: the data is found, the first step planned and proven, the run folder made. No torch."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable

from distattn.data.text import check_text, find_corpus
from distattn.ir.errors import DistattnError
from distattn.parallel.analysis.columns import readable_bytes
from distattn.parallel.analysis.explain import explain
from distattn.training.config import Config
from distattn.training.plan_settings import PlanSettings
from distattn.training.run_folder import RunFolder, packs_of_run


def start_run(config: Config, report_progress: Callable[[str], None]) -> RunFolder:
    """Make the folder of a new run, with the first step's plan and its explanation in it.

    Raises DistattnError for all that can go wrong before ranks start; nothing is left behind then.
    """
    data, settings = config.data, PlanSettings.of_config(config)
    corpus = find_corpus(
        data.path, suffix=data.suffix, exclude=data.exclude, max_document_tokens=data.max_document_tokens
    )
    packs = packs_of_run(config, corpus)
    first = list(itertools.islice(packs, settings.data_parallel_size))
    explanation = explain(settings.plan(*([document.length for document in pack] for pack in first)), settings.cluster)
    check_text(corpus)
    run = RunFolder.create(config, itertools.chain(first, packs))
    text = str(explanation)
    explanation.plan.save(run.plan_file)
    run.explanation_file.write_text(text + "\n", "utf-8")
    size = sum(document.length for document in corpus.documents)
    others = {"empty": corpus.empty_files, "binary": corpus.binary_files}
    counts = ", ".join(f"{count} {kind}" for kind, count in others.items() if count)
    skipped = f" ({counts} skipped)" if counts else ""
    report_progress(
        f"data: {corpus.files:,} files{skipped}, {readable_bytes(size)}, {len(corpus.documents):,} documents"
    )
    report_progress(text.splitlines()[0])
    report_progress(f"run folder: {run.folder}")
    return run


def require_packages(*names: str) -> None:
    """Raise DistattnError where a package that training needs is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise DistattnError(f"training needs {', '.join(missing)}: pip install 'distattn[train]'.")

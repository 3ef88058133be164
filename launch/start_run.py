"""What comes before processes start: the data read, the run folder made, the first step planned and proven. No torch."""

from __future__ import annotations

import sys

from distattn.data.text import read_corpus
from distattn.parallel.analysis.explain import explain, readable_bytes
from distattn.training.config import Config
from distattn.training.run_folder import Run, plan_of


def prepare(config: Config, quiet: bool) -> Run:
    """The new run. Raises DistattnError for all that can go wrong before processes start."""
    data = config.data
    # a plan that cannot be made must not leave a run folder behind
    plan_of(config, [data.max_document_tokens])
    corpus = read_corpus(
        data.path, suffix=data.suffix, exclude=data.exclude, max_document_tokens=data.max_document_tokens
    )
    run = Run.create(config, corpus)
    plan = run.first_plan(config)
    explanation = str(explain(plan, config.parallel.cluster))
    plan.save(run.plan_file)
    run.explanation_file.write_text(explanation + "\n", "utf-8")
    size = sum(document.end - document.start for document in corpus.documents)
    skipped = f" ({corpus.empty_files} empty ones skipped)" if corpus.empty_files else ""
    if not quiet:
        sys.stdout.write(
            f"data: {corpus.files:,} files{skipped}, {readable_bytes(size)}, {len(corpus.documents):,} documents\n"
            f"{explanation.splitlines()[0]}\nrun folder: {run.folder}\n"
        )
        sys.stdout.flush()
    return run

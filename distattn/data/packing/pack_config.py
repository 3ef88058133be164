"""The TOML file that defines a pack plan: its corpora, their blend, the packing rule, and where the plan is stored."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict

from distattn.data.files.corpus import Corpus
from distattn.data.files.label_masks import FileMasks, check_planned_masks
from distattn.data.files.manifest import Manifest
from distattn.data.packing.make_pack_plan import make_pack_plan
from distattn.data.packing.pack_plan import PackPlan, PlannedSource
from distattn.data.packing.pack_rule import PackCost, PackRule
from distattn.data.packing.training_cost import ModelShape, load_device, training_cost
from distattn.ir.errors import DistattnError, SettingError
from distattn.ir.limits import Check, Number, SettingProblem, nested_problems
from distattn.ir.toml_records import TomlFile, parse_record, raise_problems

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus. files: prefixes of indexed files; * and ? are wildcards, and a suffix .idx or .bin is dropped.

    weight: the corpus's share of the tokens is weight / sum of weights. Give either all corpora a weight or none of them; without
    weights, the shares are proportional to their tokens. max_epochs: how often each document may be read.
    """

    name: str
    files: Annotated[
        tuple[str, ...], Check(lambda files: None if files else "is empty; name prefixes of indexed files.")
    ]
    weight: Annotated[float | None, Number(gt=0, le=math.inf)] = None
    max_epochs: Annotated[float | None, Number(gt=0, le=math.inf)] = None


@dataclass(frozen=True)
class CostConfig:
    """The model and device for which pack costs are estimated. device: a device such as "h100", a cluster, or a TOML file.

    model: a config.json with the model's sizes. Without it, all sizes of `ModelShape` must be given except head_dim and
    num_key_value_heads.
    """

    device: str
    model: str | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class PackConfig:
    """The contents of the TOML file. plan: the plan's file. steps: the number of steps, or None to plan until all corpora end.

    cost: the model and device from which `rule.cost` is estimated. Paths are relative to the TOML file's folder.
    """

    plan: Annotated[str, Check(lambda plan: None if plan else "is empty; name the plan's file.")]
    corpus: tuple[CorpusConfig, ...]
    rule: PackRule
    seed: Annotated[int, Number(ge=0, le=(1 << 64) - 1)] = 1
    steps: Annotated[int | None, Number(ge=1)] = None
    cost: CostConfig | None = None


for _section in (CorpusConfig, CostConfig, PackConfig, PackRule, PackCost):
    setattr(_section, "__pydantic_config__", _STRICT)  # noqa: B010


def load_pack_config(path: str | Path) -> PackConfig:
    """Read the TOML file of a pack plan, and make its paths relative to the current folder.

    Raises DistattnError naming the file, line and key of a problem.
    """
    file = TomlFile.read(path, "name the TOML file of a pack plan")
    config = parse_record(PackConfig, file.content, file.place)
    raise_problems([*nested_problems(config), *_problems(config, "cost" in file.content["rule"])], file.place)
    folder = os.path.dirname(path)
    corpora = []
    owners: dict[str, str] = {}
    for at, corpus in enumerate(config.corpus):
        prefixes: list[str] = []
        for entry, pattern in enumerate(corpus.files):
            where = f"{file.place(('corpus', at, 'files', entry))}: corpus {corpus.name}"
            for prefix in _matching_prefixes(where, folder, pattern):
                real = os.path.realpath(f"{prefix}.idx")
                if real in owners:
                    of = "twice" if owners[real] == corpus.name else f"by {owners[real]} already"
                    raise DistattnError(
                        f"{where}: {prefix} is named {of}; its documents would be read twice in an epoch."
                    )
                owners[real] = corpus.name
                prefixes.append(prefix)
        corpora.append(replace(corpus, files=tuple(prefixes)))
    rule = config.rule
    if config.cost is not None:
        try:
            rule = replace(rule, cost=_estimated_cost(config.cost, folder))
        except SettingError as error:
            raise DistattnError(f"{file.place(('cost', error.key))}: cost.{error}") from None
    return replace(config, plan=os.path.join(folder, config.plan), corpus=tuple(corpora), rule=rule)


def open_corpora(config: PackConfig, check_tokens: bool = True) -> list[Corpus]:
    """Open the corpora in order. Raises the same errors as `Corpus.open`. check_tokens: see `IndexedFile.open`."""
    return [Corpus.open(corpus.name, corpus.files, check_tokens) for corpus in config.corpus]


def vocabulary_of(corpora: Sequence[Corpus]) -> int | None:
    """Return the size of the tokenizer's vocabulary, or None if any file lacks a manifest.

    Raises DistattnError if the files were made with different tokenizers.
    """
    prefixes = [file.prefix for corpus in corpora for file in corpus.files]
    manifests = {prefix: manifest for prefix in prefixes if (manifest := Manifest.load(prefix)) is not None}
    prefix_of_tokenizer = {manifest.tokenizer_digest: prefix for prefix, manifest in reversed(manifests.items())}
    if len(prefix_of_tokenizer) > 1:
        *_, second, first = prefix_of_tokenizer.values()
        raise DistattnError(
            f"{second}.json: another tokenizer, or another --eos, than {first}.json; tokenize all corpora of a plan in the "
            "same way."
        )
    return manifests[prefixes[0]].vocabulary if len(manifests) == len(prefixes) else None


def make_configured_plan(
    config: PackConfig, corpora: Sequence[Corpus], progress: Callable[[int, int], None] | None = None
) -> PackPlan:
    """Plan all steps and write the plan's file.

    Raises the same errors as `make_pack_plan`, and DistattnError if the corpora were made with different tokenizers.
    """
    vocabulary_of(corpora)
    weights = [corpus.weight for corpus in config.corpus if corpus.weight is not None]
    return make_pack_plan(
        config.plan,
        corpora,
        seed=config.seed,
        rule=config.rule,
        weights=weights or None,
        max_epochs=[corpus.max_epochs for corpus in config.corpus],
        steps=config.steps,
        progress=progress,
    )


def open_configured_plan(config: PackConfig, corpora: Sequence[Corpus]) -> PackPlan:
    """Open the plan's file.

    Raises DistattnError if it does not exist, or was made from other corpora or masks, or with other settings.
    """
    if not os.path.exists(config.plan):
        raise DistattnError(f"{config.plan}: there is no such plan yet; make it with distattn data pack.")
    plan = PackPlan.open(config.plan)
    names = [source.name for source in plan.sources]
    if names != [corpus.name for corpus in corpora]:
        raise DistattnError(
            f"{config.plan}: was made from {', '.join(names)}, not from {', '.join(corpus.name for corpus in corpora)}; "
            "make it again with distattn data pack --force."
        )
    for source, corpus in zip(plan.sources, corpora, strict=True):
        if not corpus.has_digest(source.digest):
            raise DistattnError(
                f"corpus {corpus.name}: its files ({', '.join(file.prefix for file in corpus.files)}) have changed since "
                f"{config.plan} was made from them; bring the files back, or make the plan again with distattn data pack --force."
            )
        check_planned_masks(config.plan, source.masks, corpus)
    for key, configured, planned in _settings(config, plan):
        if configured != planned:
            raise DistattnError(
                f"{config.plan}: was made with {key} = {planned}, not {configured}; change it back, or make the plan again with "
                "distattn data pack --force."
            )
    return plan


def _problems(config: PackConfig, has_rule_cost: bool) -> Iterator[SettingProblem]:
    """Yield the problems that involve more than one key. has_rule_cost: True if there is a table [rule.cost]."""
    if not config.corpus:
        yield SettingProblem("corpus", "is missing; add a [[corpus]] with a name and files.")
    names = [corpus.name for corpus in config.corpus]
    weighted = [corpus.name for corpus in config.corpus if corpus.weight is not None]
    for number, corpus in enumerate(config.corpus):
        table = f"corpus.{number}"
        if corpus.name in names[:number]:
            yield SettingProblem(
                f"{table}.name", f"another corpus is called {corpus.name}; give each a name of its own."
            )
        if config.steps is None and corpus.max_epochs is None:
            yield SettingProblem(
                table,
                f"{corpus.name} has no max_epochs: without steps a plan ends when all corpora have ended; give one of them.",
            )
        if weighted and corpus.weight is None:
            yield SettingProblem(table, f"{corpus.name} has no weight, but {weighted[0]} has one; give all or none.")
    if config.cost is not None and has_rule_cost:
        yield SettingProblem(
            "cost", "is estimated for a device, but [rule.cost] names numbers; leave out one of the two."
        )


def _estimated_cost(cost: CostConfig, folder: str) -> PackCost:
    """Return the estimated cost for the configured model and device. Raise SettingError with the key in [cost] that is wrong."""
    sizes = {
        name: value for name, value in asdict(cost).items() if name not in ("device", "model") and value is not None
    }
    if cost.model is not None and sizes:
        raise SettingError(
            next(iter(sizes)), "is given in addition to model, which has all sizes; leave out one of the two."
        )
    try:
        # a name that ends in .toml is a file; any other name is that of a device or a cluster
        device = load_device(os.path.join(folder, cost.device) if cost.device.endswith(".toml") else cost.device)
    except DistattnError as error:
        raise SettingError("device", str(error)) from None
    if cost.model is not None:
        try:
            shape = ModelShape.of_configuration(os.path.join(folder, cost.model))
        except DistattnError as error:
            raise SettingError("model", str(error)) from None
    else:
        missing = [field.name for field in fields(ModelShape) if field.default is MISSING and field.name not in sizes]
        if missing:
            raise SettingError(missing[0], "is missing; name all sizes of the model, or model = its config.json.")
        shape = ModelShape(**sizes)
    return training_cost(shape, device)


def _settings(config: PackConfig, plan: PackPlan) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, configured value, planned value) for every setting of a plan except the corpora."""
    yield "seed", config.seed, plan.seed
    planned_rule = plan.rule.as_dict()
    for key, value in config.rule.as_dict().items():
        yield f"rule.{key}", value, planned_rule[key]
    for corpus, source in zip(config.corpus, plan.sources, strict=True):
        # without weights, the weight of a corpus is its number of tokens
        yield f"corpus {source.name}: weight", source.tokens if corpus.weight is None else corpus.weight, source.weight
        yield f"corpus {source.name}: max_epochs", corpus.max_epochs, source.max_epochs
    if config.steps is not None:
        yield "steps", config.steps, plan.steps
    elif any(_is_short(source) for source in plan.sources):
        yield "steps", "none", plan.steps


def _is_short(source: PlannedSource) -> bool:
    """Return True if the totals show that the plan ends before the end of this corpus."""
    epochs = source.max_epochs or 0.0
    # which documents a partial epoch contains is not known here, so assume that it contains all empty documents
    least = math.floor(Fraction(epochs) * source.documents) - math.ceil(epochs) * source.empty_documents
    return source.planned_documents < least


def _matching_prefixes(where: str, folder: str, pattern: str) -> Iterator[str]:
    """Yield the prefixes that match a pattern, in sorted order. Raise DistattnError if nothing matches."""
    name = pattern.removesuffix(".idx").removesuffix(".bin") + ".idx"
    # the name of an existing file is not a pattern, even if it has brackets
    files = [name] if os.path.exists(os.path.join(folder, name)) else sorted(glob.glob(name, root_dir=folder or None))
    # skip mask files, which hold no tokens
    masks = tuple(f".{kind}.idx" for kind in FileMasks._fields)
    files = [file for file in files if file == name or not file.endswith(masks)]
    if not files:
        missing = os.path.join(folder, name)
        raise DistattnError(f"{where}: there is no {missing}; make it with distattn data tokenize.")
    yield from (os.path.join(folder, file.removesuffix(".idx")) for file in files)

"""A TOML file that says what a pack plan is made of (corpora, their blend, and the rule) and where the plan is stored."""

from __future__ import annotations

import difflib
import glob
import json
import math
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from distattn.data.files.corpus import Corpus
from distattn.data.files.label_masks import FileMasks, check_planned_masks
from distattn.data.files.manifest import Manifest
from distattn.data.packing.make_pack_plan import make_pack_plan
from distattn.data.packing.pack_plan import PackPlan, PlannedSource
from distattn.data.packing.pack_rule import PackCost, PackRule
from distattn.data.packing.training_cost import ModelShape, load_device, training_cost
from distattn.ir.errors import DistattnError, SettingError
from distattn.ir.toml_lines import Key, TomlLines, syntax_place

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_MOST_SEED = (1 << 64) - 1
# what TOML calls the types that pydantic expects
_WANTED = {
    "bool_type": "true or false",
    "dataclass_type": "a table",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "string_type": "a string in quotes",
    # entries of a curriculum
    "too_long": "a list of two numbers",
    "tuple_type": "a list",
}


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus. files: prefixes of indexed files; * and ? are wildcards, and an ending .idx or .bin is dropped.

    weight: its share of the tokens is weight / sum of weights; give all corpora a weight, or none (then shares follow their
    tokens). max_epochs: how often its documents may be read.
    """

    name: str
    files: tuple[str, ...]
    weight: float | None = None
    max_epochs: float | None = None


@dataclass(frozen=True)
class CostConfig:
    """The model and device that the cost of a pack is estimated for. device: such as "h100", a cluster's name, or its TOML file.

    model: a config.json that has the sizes. Without it all other fields must be given, as in `ModelShape`, except for head_dim
    and num_key_value_heads.
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
    """The content of the TOML file. plan: the plan's file. steps: how many; None to go on until all corpora have ended.

    cost: the model and device that `rule.cost` is estimated from. Paths are relative to the folder of the TOML file.
    """

    plan: str
    corpus: tuple[CorpusConfig, ...]
    rule: PackRule
    seed: int = 1
    steps: int | None = None
    cost: CostConfig | None = None


for _section in (CorpusConfig, CostConfig, PackConfig, PackRule, PackCost):
    setattr(_section, "__pydantic_config__", _STRICT)  # noqa: B010


def load_pack_config(path: str | Path) -> PackConfig:
    """Read the TOML file of a pack plan. Make its paths relative to the current folder.

    Raises DistattnError naming file, line and key.
    """
    try:
        text = Path(path).read_text("utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise DistattnError(f"{path}: cannot be read: {error.strerror}; name the TOML file of a pack plan.") from None
    except tomllib.TOMLDecodeError as error:
        raise DistattnError(f"{syntax_place(path, error)}: cannot be read as TOML: {error}.") from None
    except UnicodeDecodeError as error:
        raise DistattnError(f"{path}: cannot be read as TOML: byte {error.start:,} is not UTF-8.") from None
    lines = TomlLines(text)
    try:
        # dates and times, which no key has, become strings
        config = TypeAdapter(PackConfig).validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        raise DistattnError(
            "\n".join(
                f"{lines.place(path, _key_of(fault))}: {_sentence(fault, *_described(fault['loc'], content))}"
                for fault in error.errors()
            )
        ) from None
    if wrong := list(_impossible(config, content)):
        raise DistattnError("\n".join(f"{lines.place(path, key)}: {sentence}" for key, sentence in wrong))
    folder = os.path.dirname(path)
    corpora = []
    owners: dict[str, str] = {}
    for at, corpus in enumerate(config.corpus):
        prefixes: list[str] = []
        for entry, pattern in enumerate(corpus.files):
            where = f"{lines.place(path, ('corpus', at, 'files', entry))}: corpus {corpus.name}"
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
            raise DistattnError(f"{lines.place(path, ('cost', error.key))}: cost.{error}") from None
    return replace(config, plan=os.path.join(folder, config.plan), corpus=tuple(corpora), rule=rule)


def open_corpora(config: PackConfig, check_tokens: bool = True) -> list[Corpus]:
    """Open the corpora, in their order. Raise the errors of `Corpus.open`. check_tokens: as in `IndexedFile.open`."""
    return [Corpus.open(corpus.name, corpus.files, check_tokens) for corpus in config.corpus]


def vocabulary_of(corpora: Sequence[Corpus]) -> int | None:
    """Return a number that all token ids are below; None if a file has no manifest that names its tokenizer.

    Raises DistattnError if files were made with different tokenizers.
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

    Raises the errors of `make_pack_plan`, and DistattnError for corpora of several tokenizers.
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

    Raises DistattnError if it does not exist, or was made of other corpora or masks, or with other keys.
    """
    if not os.path.exists(config.plan):
        raise DistattnError(f"{config.plan}: there is no such plan yet; make it with distattn data pack.")
    plan = PackPlan.open(config.plan)
    names = [source.name for source in plan.sources]
    if names != [corpus.name for corpus in corpora]:
        raise DistattnError(
            f"{config.plan}: was made of {', '.join(names)}, not of {', '.join(corpus.name for corpus in corpora)}; "
            "make it anew with distattn data pack --force."
        )
    for source, corpus in zip(plan.sources, corpora, strict=True):
        if not corpus.has_digest(source.digest):
            raise DistattnError(
                f"corpus {corpus.name}: its files ({', '.join(file.prefix for file in corpus.files)}) have changed since "
                f"{config.plan} was made of them; bring the files back, or make the plan anew with distattn data pack --force."
            )
        check_planned_masks(config.plan, source.masks, corpus)
    for key, configured, planned in _settings(config, plan):
        if configured != planned:
            raise DistattnError(
                f"{config.plan}: was made with {key} = {planned}, not {configured}; change it back, or make the plan anew with "
                "distattn data pack --force."
            )
    return plan


def _impossible(config: PackConfig, content: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """Yield (key, a sentence) for each value that has the right type and is wrong."""
    if not config.plan:
        yield ("plan",), "plan: is empty; name the plan's file."
    if not 0 <= config.seed <= _MOST_SEED:
        yield ("seed",), f"seed: {config.seed} is out of range; name an integer from 0 to 2^64 - 1."
    if config.steps is not None and config.steps < 1:
        yield ("steps",), f"steps: {config.steps} is too few; a plan has at least 1."
    if not config.corpus:
        yield ("corpus",), "corpus: is missing; add a [[corpus]] with a name and files."
    names = [corpus.name for corpus in config.corpus]
    weighted = [corpus.name for corpus in config.corpus if corpus.weight is not None]
    for number, corpus in enumerate(config.corpus):
        table: Key = ("corpus", number)
        where = f"corpus {corpus.name}"
        if corpus.name in names[:number]:
            yield (*table, "name"), f"{where}: two corpora have this name; give each a name of its own."
        if not corpus.files:
            yield (*table, "files"), f"{where}: files: is empty; name prefixes of indexed files."
        for key, value in (("weight", corpus.weight), ("max_epochs", corpus.max_epochs)):
            if value is not None and value <= 0:
                yield (*table, key), f"{where}: {key} is {value}; it must be a number above 0."
        if config.steps is None and corpus.max_epochs is None:
            yield (
                table,
                f"{where}: max_epochs is missing: without steps a plan ends when all corpora have ended; give one of them.",
            )
        if weighted and corpus.weight is None:
            yield table, f"{where}: weight is missing, but {weighted[0]} has one; give all or none."
    if config.cost is not None and "cost" in content["rule"]:
        yield ("cost",), "cost: is estimated for a device, but [rule.cost] names numbers; leave out one of the two."


def _estimated_cost(cost: CostConfig, folder: str) -> PackCost:
    """Return the cost of a model on a device. Raise SettingError with a key of [cost]."""
    sizes = {
        name: value for name, value in asdict(cost).items() if name not in ("device", "model") and value is not None
    }
    if cost.model is not None and sizes:
        raise SettingError(
            next(iter(sizes)), "is given in addition to model, which has all sizes; leave out one of the two."
        )
    try:
        # a name that ends in .toml is a file, and any other is a device or a cluster
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
    """Yield (key, its value in a configuration, its value in a plan) of every setting of a plan except the corpora."""
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
    """Return whether a plan ends before a corpus does, as far as the totals show."""
    epochs = source.max_epochs or 0.0
    # the documents that a part of an epoch leaves out are unknown, so all empty documents may be among those that it has
    least = math.floor(Fraction(epochs) * source.documents) - math.ceil(epochs) * source.empty_documents
    return source.planned_documents < least


def _matching_prefixes(where: str, folder: str, pattern: str) -> Iterator[str]:
    """Yield the prefixes that a pattern names, in their order. Raise DistattnError if it matches nothing."""
    name = pattern.removesuffix(".idx").removesuffix(".bin") + ".idx"
    # a file that exists is not a pattern, even if its name has brackets
    files = [name] if os.path.exists(os.path.join(folder, name)) else sorted(glob.glob(name, root_dir=folder or None))
    # files of masks are not token files
    masks = tuple(f".{kind}.idx" for kind in FileMasks._fields)
    files = [file for file in files if file == name or not file.endswith(masks)]
    if not files:
        missing = os.path.join(folder, name)
        raise DistattnError(f"{where}: there is no {missing}; make it with distattn data tokenize.")
    yield from (os.path.join(folder, file.removesuffix(".idx")) for file in files)


def _key_of(error: Any) -> Key:
    """Return the key that an error is about."""
    if error["type"] != "value_error":
        return tuple(error["loc"])
    return ("rule", *error["ctx"]["error"].key.split("."))


def _described(loc: Sequence[str | int], content: Mapping[str, Any]) -> tuple[str, str]:
    """Return (the place of an error, which ends in a colon or is empty; the key), such as ("corpus web: ", "weight")."""
    if loc[0] != "corpus" or len(loc) < 2:
        return "", _dotted(loc)
    number = int(loc[1])
    entry = content["corpus"][number]
    name = entry.get("name") if isinstance(entry, Mapping) else None
    return f"corpus {name if isinstance(name, str) else number + 1}: ", _dotted(loc[2:])


def _dotted(loc: Sequence[str | int]) -> str:
    """Return a key with the sections it is in; entries of lists are counted from 1."""
    return ".".join(part if isinstance(part, str) else f"entry {part + 1}" for part in loc)


def _sentence(error: Any, where: str, key: str) -> str:
    """Return a sentence that says what is wrong, with the key."""
    kind, value = error["type"], error["input"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}{key}: unknown key.{_meant(error['loc'])}"
    if kind == "value_error":
        # a sentence of the rule, which begins with a key
        return f"rule.{error['ctx']['error']}"
    separator = ": " if key else ""
    if kind in ("missing", "missing_argument"):
        return f"{where}{key}{separator}is missing."
    wanted = _WANTED.get(kind)
    rule = f"must be {wanted}" if wanted else error["msg"].lower().rstrip(".")
    return f"{where}{key}{separator}{rule}, not {json.dumps(value, default=str)}."


def _meant(loc: Sequence[str | int]) -> str:
    """Return a sentence with the key that was probably meant, in its own section or another."""
    section, key = tuple(part for part in loc[:-1] if isinstance(part, str)), str(loc[-1])
    # its own section comes first: among keys that are equally near the first is taken
    sections = sorted(_SECTIONS, key=lambda other: other != section)
    near = {name: other for other in reversed(sections) for name in _SECTIONS[other]}
    matches = [key] if key in near else difflib.get_close_matches(key, near, 1, 0.6)
    if not matches:
        return f" There are {', '.join(_SECTIONS[section])}."
    other = near[matches[0]]
    if other == section:
        return f" Did you mean {matches[0]}?"
    place = {(): "above all tables", ("corpus",): "in a [[corpus]]"}.get(other, f"in [{'.'.join(other)}]")
    return f" Did you mean {matches[0]} {place}?"


_SECTIONS: dict[tuple[str, ...], list[str]] = {
    place: [field.name for field in fields(section)]
    for place, section in (
        ((), PackConfig),
        (("corpus",), CorpusConfig),
        (("rule",), PackRule),
        (("rule", "cost"), PackCost),
        (("cost",), CostConfig),
    )
}

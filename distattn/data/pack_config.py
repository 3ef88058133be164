"""A TOML file that says what a pack plan is made of: corpora, their blend, and the rule; and where the plan lies."""

from __future__ import annotations

import difflib
import glob
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from distattn.data.corpus import Corpus
from distattn.data.label_masks import FileMasks, check_planned_masks
from distattn.data.make_pack_plan import make_pack_plan
from distattn.data.manifest import Manifest
from distattn.data.pack_plan import PackPlan, PlannedSource
from distattn.data.pack_rule import PackCost, PackRule
from distattn.data.training_cost import ModelShape, load_device, training_cost
from distattn.ir.errors import DistattnError
from distattn.ir.toml_lines import Key, TomlLines, syntax_place

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_MOST_SEED = (1 << 64) - 1
# how TOML calls what pydantic wants
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

    weight: its share of the tokens is weight / sum of weights; all corpora have one, or none (then each has its tokens' share).
    max_epochs: how often its documents may be read.
    """

    name: str
    files: tuple[str, ...]
    weight: float | None = None
    max_epochs: float | None = None


@dataclass(frozen=True)
class CostConfig:
    """What the cost of a pack is estimated for. device: such as "h100", a cluster's name, or the TOML file of one.

    model: a config.json that has the sizes. Without it all others are given, as in `ModelShape`; head_dim and
    num_key_value_heads may be left out.
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
    """What a pack plan is made of. plan: its file; steps: how many, or none to go on until all corpora have ended.

    cost: what `rule.cost` is estimated from, in place of numbers there. Paths are relative to the folder of the TOML file.
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
    """Read such a file; paths in the result are relative to the current folder.

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
        raise DistattnError(f"{path}: cannot be read as TOML: byte {error.start:,} is no UTF-8.") from None
    lines = TomlLines(text)
    try:
        # dates and times, which no key has, become strings
        config = TypeAdapter(PackConfig).validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        raise DistattnError(
            "\n".join(
                f"{lines.place(path, _key_of(one))}: {_sentence(one, *_described(one['loc'], content))}"
                for one in error.errors()
            )
        ) from None
    if wrong := list(_impossible(config, content)):
        raise DistattnError("\n".join(f"{lines.place(path, key)}: {sentence}" for key, sentence in wrong))
    folder = os.path.dirname(path)
    corpora = []
    owners: dict[str, str] = {}
    for at, one in enumerate(config.corpus):
        prefixes: list[str] = []
        for entry, pattern in enumerate(one.files):
            where = f"{lines.place(path, ('corpus', at, 'files', entry))}: corpus {one.name}"
            for prefix in _found(where, folder, pattern):
                real = os.path.realpath(f"{prefix}.idx")
                if real in owners:
                    of = "twice" if owners[real] == one.name else f"by {owners[real]} already"
                    raise DistattnError(
                        f"{where}: {prefix} is named {of}; its documents would be read twice in an epoch."
                    )
                owners[real] = one.name
                prefixes.append(prefix)
        corpora.append(replace(one, files=tuple(prefixes)))
    rule = config.rule
    if config.cost is not None:
        try:
            rule = replace(rule, cost=_estimated_cost(config.cost, folder))
        except DistattnError as error:
            key = str(error).partition(":")[0]
            raise DistattnError(f"{lines.place(path, ('cost', key))}: cost.{error}") from None
    return replace(config, plan=os.path.join(folder, config.plan), corpus=tuple(corpora), rule=rule)


def open_corpora(config: PackConfig, check_tokens: bool = True) -> list[Corpus]:
    """The corpora, in their order. check_tokens: as `IndexedFile.open` has it. Raises what `Corpus.open` raises."""
    return [Corpus.open(one.name, one.files, check_tokens) for one in config.corpus]


def vocabulary_of(corpora: Sequence[Corpus]) -> int | None:
    """Token ids of all corpora are below this number; None where a file does not say of which tokenizer it is.

    Raises DistattnError where files are of different tokenizers.
    """
    prefixes = [file.prefix for corpus in corpora for file in corpus.files]
    manifests = {prefix: found for prefix in prefixes if (found := Manifest.load(prefix)) is not None}
    known = {manifest.tokenizer_digest: prefix for prefix, manifest in reversed(manifests.items())}
    if len(known) > 1:
        *_, second, first = known.values()
        raise DistattnError(
            f"{second}.json: another tokenizer, or another --eos, than {first}.json; tokenize all corpora of a plan alike."
        )
    return manifests[prefixes[0]].vocabulary if len(manifests) == len(prefixes) else None


def make_configured_plan(
    config: PackConfig, corpora: Sequence[Corpus], progress: Callable[[int, int], None] | None = None
) -> PackPlan:
    """Plan all steps and write the plan's file. Raises what `make_pack_plan` raises, and for corpora of several tokenizers."""
    vocabulary_of(corpora)
    weights = [one.weight for one in config.corpus if one.weight is not None]
    return make_pack_plan(
        config.plan,
        corpora,
        seed=config.seed,
        rule=config.rule,
        weights=weights or None,
        max_epochs=[one.max_epochs for one in config.corpus],
        steps=config.steps,
        progress=progress,
    )


def open_configured_plan(config: PackConfig, corpora: Sequence[Corpus]) -> PackPlan:
    """Open the plan's file.

    Raises DistattnError where there is none, and where it was made of other corpora or masks, or with other keys.
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
    for key, wanted, made in _settings(config, plan):
        if wanted != made:
            raise DistattnError(
                f"{config.plan}: was made with {key} = {made}, not {wanted}; change it back, or make the plan anew with "
                "distattn data pack --force."
            )
    return plan


def _impossible(config: PackConfig, content: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """(Key, a sentence) of what is wrong with values that have the right types."""
    if not config.plan:
        yield ("plan",), "plan: is empty; name the plan's file."
    if not 0 <= config.seed <= _MOST_SEED:
        yield ("seed",), f"seed: {config.seed} is none; name an integer from 0 to 2^64 - 1."
    if config.steps is not None and config.steps < 1:
        yield ("steps",), f"steps: {config.steps} is too few; a plan has at least 1."
    if not config.corpus:
        yield ("corpus",), "corpus: there is none; add a [[corpus]] with a name and files."
    names = [one.name for one in config.corpus]
    weighted = [one.name for one in config.corpus if one.weight is not None]
    for number, one in enumerate(config.corpus):
        table: Key = ("corpus", number)
        where = f"corpus {one.name}"
        if one.name in names[:number]:
            yield (*table, "name"), f"{where}: two corpora have this name; give each a name of its own."
        if not one.files:
            yield (*table, "files"), f"{where}: files: there are none; name prefixes of indexed files."
        for key, value in (("weight", one.weight), ("max_epochs", one.max_epochs)):
            if value is not None and value <= 0:
                yield (*table, key), f"{where}: {key} is {value}; it must be a number above 0."
        if config.steps is None and one.max_epochs is None:
            yield (
                table,
                f"{where}: max_epochs is missing: without steps a plan ends when all corpora have ended; give one of both.",
            )
        if weighted and one.weight is None:
            yield table, f"{where}: weight is missing, but {weighted[0]} has one; give all or none."
    if config.cost is not None and "cost" in content["rule"]:
        yield ("cost",), "cost: is estimated for a device, but [rule.cost] names numbers; leave out one of both."


def _estimated_cost(cost: CostConfig, folder: str) -> PackCost:
    """The cost of a model on a device. Raises DistattnError whose sentence begins with a key of [cost]."""
    given = {
        name: value for name, value in asdict(cost).items() if name not in ("device", "model") and value is not None
    }
    if cost.model is not None and given:
        raise DistattnError(f"{next(iter(given))}: is given beside model, which has all sizes; leave out one of both.")
    try:
        # a device or a cluster has a name, anything else is a file
        device = load_device(os.path.join(folder, cost.device) if cost.device.endswith(".toml") else cost.device)
    except DistattnError as error:
        raise DistattnError(f"device: {error}") from None
    if cost.model is not None:
        try:
            shape = ModelShape.of_configuration(os.path.join(folder, cost.model))
        except DistattnError as error:
            raise DistattnError(f"model: {error}") from None
    else:
        missing = [one.name for one in fields(ModelShape) if one.default is MISSING and one.name not in given]
        if missing:
            raise DistattnError(f"{missing[0]}: is missing; name all sizes of the model, or model = its config.json.")
        shape = ModelShape(**given)
    return training_cost(shape, device)


def _settings(config: PackConfig, plan: PackPlan) -> Iterator[tuple[str, Any, Any]]:
    """(Key, its value in a configuration, its value in a plan) of everything besides corpora that a plan is a function of."""
    yield "seed", config.seed, plan.seed
    made = plan.rule.as_dict()
    for key, value in config.rule.as_dict().items():
        yield f"rule.{key}", value, made[key]
    for one, source in zip(config.corpus, plan.sources, strict=True):
        # without weights all corpora have their tokens
        yield f"corpus {source.name}: weight", source.tokens if one.weight is None else one.weight, source.weight
        yield f"corpus {source.name}: max_epochs", one.max_epochs, source.max_epochs
    if config.steps is not None:
        yield "steps", config.steps, plan.steps
    elif any(_is_short(source) for source in plan.sources):
        yield "steps", "none", plan.steps


def _is_short(source: PlannedSource) -> bool:
    """Whether a plan ends before a corpus does, as far as totals tell."""
    epochs = source.max_epochs or 0.0
    # which documents a part of an epoch leaves out is not known, so all empty ones may be among the others
    least = math.floor(Fraction(epochs) * source.documents) - math.ceil(epochs) * source.empty_documents
    return source.planned_documents < least


def _found(where: str, folder: str, pattern: str) -> Iterator[str]:
    """The prefixes that a pattern names, in their order. Raises DistattnError where it names none."""
    name = pattern.removesuffix(".idx").removesuffix(".bin") + ".idx"
    # a name with brackets is itself
    files = [name] if os.path.exists(os.path.join(folder, name)) else sorted(glob.glob(name, root_dir=folder or None))
    # masks lie beside tokens, and are none
    masks = tuple(f".{kind}.idx" for kind in FileMasks._fields)
    files = [file for file in files if file == name or not file.endswith(masks)]
    if not files:
        missing = os.path.join(folder, name)
        raise DistattnError(f"{where}: there is no {missing}; make it with distattn data tokenize.")
    yield from (os.path.join(folder, file.removesuffix(".idx")) for file in files)


def _key_of(error: Any) -> Key:
    """The key that an error is about."""
    if error["type"] != "value_error":
        return tuple(error["loc"])
    # a sentence of the rule, which begins with a key
    found = re.match(r"[\w.]+", str(error["ctx"]["error"]))
    return ("rule", *(found[0].split(".") if found else ()))


def _described(loc: Sequence[str | int], content: Mapping[str, Any]) -> tuple[str, str]:
    """(Where an error is, in words that end in a colon or nothing; the key), such as ("corpus web: ", "weight")."""
    if loc[0] != "corpus" or len(loc) < 2:
        return "", _dotted(loc)
    number = int(loc[1])
    entry = content["corpus"][number]
    name = entry.get("name") if isinstance(entry, Mapping) else None
    return f"corpus {name if isinstance(name, str) else number + 1}: ", _dotted(loc[2:])


def _dotted(loc: Sequence[str | int]) -> str:
    """A key with the sections it is in; entries of lists are counted from 1."""
    return ".".join(part if isinstance(part, str) else f"entry {part + 1}" for part in loc)


def _sentence(error: Any, where: str, key: str) -> str:
    """What is wrong, with the key."""
    kind, given = error["type"], error["input"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}{key}: unknown key.{_meant(error['loc'])}"
    if kind == "value_error":
        # a sentence of the rule, which begins with a key
        return f"rule.{error['ctx']['error']}"
    separator = ": " if key else ""
    if kind in ("missing", "missing_argument"):
        return f"{where}{key}{separator}is missing."
    wanted = _WANTED.get(kind)
    said = f"must be {wanted}" if wanted else error["msg"].lower().rstrip(".")
    return f"{where}{key}{separator}{said}, not {json.dumps(given, default=str)}."


def _meant(loc: Sequence[str | int]) -> str:
    """The key that was probably meant, in its own section or another."""
    section, key = tuple(part for part in loc[:-1] if isinstance(part, str)), str(loc[-1])
    # its own section first: of keys that are equally near the first is taken
    sections = sorted(_SECTIONS, key=lambda other: other != section)
    near = {name: other for other in reversed(sections) for name in _SECTIONS[other]}
    found = [key] if key in near else difflib.get_close_matches(key, near, 1, 0.6)
    if not found:
        return f" There are {', '.join(_SECTIONS[section])}."
    other = near[found[0]]
    if other == section:
        return f" Did you mean {found[0]}?"
    place = {(): "above all tables", ("corpus",): "in a [[corpus]]"}.get(other, f"in [{'.'.join(other)}]")
    return f" Did you mean {found[0]} {place}?"


_SECTIONS: dict[tuple[str, ...], list[str]] = {
    place: [one.name for one in fields(section)]
    for place, section in (
        ((), PackConfig),
        (("corpus",), CorpusConfig),
        (("rule",), PackRule),
        (("rule", "cost"), PackCost),
        (("cost",), CostConfig),
    )
}

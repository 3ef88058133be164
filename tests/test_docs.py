"""Checks that the documents are true: snippets run, links work, names exist and the pages build."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from browser import LEGIBLE, needs_browser, what_a_script_says
from snippets import python_snippets, tiny_batch, tiny_llama, tiny_loader
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

import distattn as da
from distattn.adapters import huggingface, pytorch
from distattn.data.files.corpus import Corpus
from distattn.data.files.indexed_file import IndexedFileWriter
from distattn.data.files.label_masks import LabelMasks
from distattn.data.packing.pack_config import (
    CorpusConfig,
    CostConfig,
    PackConfig,
    load_pack_config,
    make_configured_plan,
    open_corpora,
)
from distattn.data.packing.pack_rule import PackCost, PackRule
from distattn.launch import cli
from distattn.models.build import materialise, meta_model
from distattn.models.export import export_model
from distattn.training.config.run_file import Config
from docs import draw_strategies

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]


def names_of_files(text: str) -> list[str]:
    top = "distattn|parallel|kernels|cluster|launch|configs|benchmarks|tests|examples|docs"
    return re.findall(rf"`((?:{top})/[\w./-]*)`", text)


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_files_and_folders_that_are_named_exist(file):
    for name in names_of_files(file.read_text()):
        if "yours" not in name:
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("file", [*TEXTS, ROOT / "CHANGELOG.md"], ids=lambda file: file.name)
def test_relative_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        other = (file.parent / path).resolve() if path else file
        assert other.is_file(), f"{file.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_make_targets_that_are_named_exist(file):
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in re.findall(r"`make [\w-]+|^    make [\w-]+", file.read_text(), re.MULTILINE):
        assert line.split("make ")[1] in targets, line


OF_OTHERS = ("ray.init", "engine._is_gradient_accumulation_boundary")


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_configuration_keys_that_are_named_exist(file):
    text = file.read_text()
    keys = {f"{section}.{key}" for section, values in asdict(Config()).items() for key in values}
    sections = "|".join(asdict(Config()))
    keys_of_text = re.findall(rf"--((?:{sections})\.[\w-]+)", text)
    keys_of_text += re.findall(rf"`((?:{sections})\.[a-z_]+)(?: = [^`]*)?`", text)
    for key in keys_of_text:
        # skip file names and names that belong to other libraries
        if not key.endswith((".toml", ".json", ".jsonl")) and key not in OF_OTHERS:
            assert key.replace("-", "_") in keys, key


def test_the_reference_has_every_public_name_once():
    named = re.findall(r"^::: distattn\.(\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert sorted(named) == da.__all__


# ---- snippets: for each page, the functions that provide each snippet's names, in order, or None if the page says "not
# run"


def _plan(names: dict[str, Any]) -> None:
    names |= dict(rank=0, group=None)
    names |= dict(q=torch.randn(80, 32, 128), k=torch.randn(80, 8, 128), v=torch.randn(80, 8, 128))


def _cluster(names: dict[str, Any]) -> None:
    lengths = [4096, 1024, 3072]
    names |= dict(da=da, lengths=lengths, mask=da.Mask.documents(lengths))


def _loop(names: dict[str, Any]) -> None:
    names |= dict(group=None, sum_gradients=lambda: None, ids=tiny_batch()["input_ids"], lengths=[30, 10])


def _model(names: dict[str, Any]) -> None:
    huggingface.register()
    model = AutoModelForCausalLM.from_config(tiny_llama()["config"], attn_implementation="distattn")
    names |= dict(da=da, pytorch=pytorch, model=model, sum_gradients=lambda: None, loader=tiny_loader())
    names |= dict(group=None, all_ranks=None, target=pytorch.ProbeTarget(model), micro_batches=tiny_loader()[0])


def _packs_one_by_one(names: dict[str, Any]) -> None:
    """Make a loader that yields one pack at a time."""
    _model(names)
    names |= dict(cp=da.ContextParallel(strategy="ring"), loader=[pack for step in tiny_loader() for pack in step])


def _schedule(names: dict[str, Any]) -> None:
    _model(names)
    names |= dict(partial=partial, cp=da.ContextParallel(strategy="cad", data="per_rank"))


def _memory(names: dict[str, Any]) -> None:
    _model(names)
    names |= dict(cp=da.ContextParallel(strategy="ring"))


def _mesh(names: dict[str, Any]) -> None:
    _model(names)
    names |= dict(init_device_mesh=init_device_mesh, replicas=1, degree=1, batch=tiny_batch())


def _own_model(names: dict[str, Any]) -> None:
    names |= dict(torch=torch)


def _reference(names: dict[str, Any]) -> None:
    sys.modules["my_model"] = types.SimpleNamespace(GPT=lambda: torch.nn.Embedding(8, 8))


def _packs(names: dict[str, Any]) -> None:
    """Write an indexed file with tokens in the model's vocabulary, and a plan over it."""
    _model(names)
    os.mkdir("data")
    with IndexedFileWriter("data/code", "uint8") as writer:
        for length in range(5, 65):
            writer.add(np.arange(length) % 64)
    Path("packs.toml").write_text(
        'plan = "data/run.packs"\nsteps = 4\n[[corpus]]\nname = "code"\nfiles = ["data/code"]\n'
        "[rule]\ncontext = [[0, 48]]\ntokens_per_step = 96\nwindow = 2\n"
    )
    config = load_pack_config("packs.toml")
    names |= dict(step=1, made=make_configured_plan(config, open_corpora(config)))


def _masks(names: dict[str, Any]) -> None:
    os.mkdir("data")
    with IndexedFileWriter("data/chat", "uint16") as writer:
        for length in (9, 4):
            writer.add(np.arange(length))
    names |= dict(prompt_tokens=[3, 1], image_spans=[[4, 6], []])


def _stream(names: dict[str, Any]) -> None:
    _model(names)
    names |= dict(cp=da.ContextParallel(strategy="ring"), stream=[list(range(64))] * 5000)


def _pretrained(names: dict[str, Any]) -> None:
    """Export a tiny model to a folder with the name used in the snippet."""
    model = meta_model(names["config"])
    materialise(model, 1)
    export_model(model, "Llama-3.1-8B")
    names |= dict(ranks=1)


def _tokens(names: dict[str, Any]) -> None:
    """Run the page's first snippet, which the current snippet continues."""
    _packs(names)
    exec(python_snippets((ROOT / "docs" / "data-formats.md").read_text())[0], names)


def _saving(names: dict[str, Any]) -> None:
    model = torch.nn.Linear(3, 2)
    names |= dict(rank=0, group=None, steps=20, plan_digest="0123", config_digest="4567", model=model)
    names |= dict(optimizer=torch.optim.AdamW(model.parameters()))
    names |= dict(compute_gradients=lambda step: model(torch.rand(1, 3)).sum().backward())


def _monitored(names: dict[str, Any]) -> None:
    """Make a plan of packs, its corpora and a folder for the run's reports."""
    _packs(names)
    os.mkdir("run")
    corpora = open_corpora(load_pack_config("packs.toml"))
    names |= dict(torch=torch, plan=names["made"], corpora=corpora, folder=Path("run"))


SNIPPETS: dict[str, list[Callable[[dict[str, Any]], None] | None]] = {
    "checkpoints.md": [_saving],
    "concepts.md": [_plan, _cluster],
    "data.md": [_packs, _masks],
    "data-formats.md": [_packs, _tokens],
    "data-streams.md": [_stream],
    "doctor.md": [_reference],
    "dynamic-context-parallelism.md": [_model, _schedule],
    "huggingface.md": [_model],
    "models.md": [_pretrained],
    "monitoring.md": [_monitored],
    "memory.md": [_memory],
    "own-loop.md": [_loop, _model, _packs_one_by_one],
    "planning-a-cluster.md": [_cluster],
    "recurrence.md": [_own_model] * 2,
    "recurrence-schedules.md": [_own_model],
    "convolutions-and-latents.md": [_own_model] * 2,
    "trainers.md": [_mesh, _own_model, None],
}
# strings in the pages, mapped to replacements with smaller sizes or a single CPU rank
SMALLER = {
    "ranks=8)  # which": "ranks=1)  # which",
    "[4096, 1024, 3072]  # documents": "[40, 10, 30]  # documents",
    '"cuda"': '"cpu"',
}
ALL = [(page, number) for page, set_ups in SNIPPETS.items() for number in range(len(set_ups))]


def test_every_snippet_is_listed_here():
    counts = {page.name: len(python_snippets(page.read_text())) for page in PAGES}
    assert {page: count for page, count in counts.items() if count} == {
        p: len(set_ups) for p, set_ups in SNIPPETS.items()
    }


@pytest.mark.parametrize(("page", "number"), ALL, ids=[f"{page} {number}" for page, number in ALL])
def test_snippets_run_as_written(page, number, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = python_snippets((ROOT / "docs" / page).read_text())[number]
    set_up = SNIPPETS[page][number]
    if set_up is None:
        compile(code, page, "exec")
        assert "not run" in (ROOT / "docs" / page).read_text()
        return
    for text, smaller in SMALLER.items():
        code = code.replace(text, smaller)
    needs_group = "init_device_mesh" in code
    if needs_group:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        names = tiny_llama()
        set_up(names)
        exec(code, names)
    finally:
        if needs_group:
            dist.destroy_process_group()
    printed = capsys.readouterr().out
    if page == "concepts.md":
        assert ["ring on 1 ranks", "the least for these tasks"][number] in printed
    if "o" in names:
        assert names["o"].shape == (80, 32, 128)
    if page.startswith("data"):
        _check_data(page, number, names)


def _check_data(page: str, number: int, names: dict[str, Any]) -> None:
    """Check that the snippets of the data pages read the same tokens as the library."""
    if page == "data-streams.md":
        # 320,000 tokens in packs of 8,192, 16 packs per step
        assert names["trained"] == names["loader"].step == 3 and names["state"]["step"] == 3
    elif page == "data.md" and number == 0:
        assert names["step"] == names["made"].steps == 4
    elif page == "data.md":
        masks = LabelMasks.open(Corpus.open("chat", ["data/chat"]))
        assert masks.may_be_labels(0, 0, 9).tolist() == [False] * 3 + [True, False, False] + [True] * 3
    else:
        step = names["made"].step(names["step"])
        assert np.array_equal(names["tokens"], step.rows["length"])
        assert np.array_equal(names["ends_document"], step.rows["ends_document"])
        assert all(
            np.array_equal(names["pieces"][key], step.rows[key]) for key in ("document", "start", "corpus", "epoch")
        )
        assert np.array_equal(np.cumsum(names["pieces_of_pack"]), step.ends)
        if number == 1:
            _, start, length, *_ = step.rows[0].item()
            assert names["ids"].tolist() == list(range(start, start + length))


def test_the_commands_of_the_pages_on_data_run(capsys, tmp_path, monkeypatch):
    """Run the commands on the files that the pages name, with a plan that sets all existing keys."""
    tokenizers, zstandard = pytest.importorskip("tokenizers"), pytest.importorskip("zstandard")
    for name in ("tests", "parallel", "kernels", "launch", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    os.mkdir("web")
    Path("web", "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(b'{"text": "abc"}\n{"text": "c"}\n'))
    model = tokenizers.models.WordLevel({"abc": 0, "c": 1, "<|end|>": 2}, unk_token="c")
    tokenizers.Tokenizer(model).save("tokenizer.json")
    page = "".join((ROOT / "docs" / name).read_text() for name in ("data.md", "pack-plans.md"))
    toml, cost = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    Path("packs.toml").write_text(toml)
    keys = set(re.findall(r"^(\w+) =", toml, re.MULTILINE))
    sections = (PackConfig, CorpusConfig, PackRule, PackCost)
    assert keys == {field.name for section in sections for field in fields(section)} - {"corpus", "rule", "cost"}
    keys = set(re.findall(r"^(\w+) =", cost, re.MULTILINE))
    assert keys | {"model"} == {field.name for field in fields(CostConfig)}
    commands = re.findall(r"^    distattn (data .*)$", page, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["tokenize"] * 3 + ["pack", "stats", "show", "verify"]
    for command in commands:
        assert cli.main(shlex.split(command)) == 0, capsys.readouterr().err
    assert "data/run.packs: " in capsys.readouterr().out and Path("data/stats.svg").exists()
    # replace the values in [rule.cost] with those of the other section
    Path("packs.toml").write_text(toml.partition("[rule.cost]")[0] + cost)
    loaded = load_pack_config("packs.toml").rule
    assert f"{loaded.cost.seconds(131_072):.1f} s on one H100" in page


# ---- private names of other projects


def _private(file: Path) -> set[str]:
    """Return the names with a leading underscore that a file uses from modules and objects outside distattn."""
    tree = ast.parse(file.read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            names |= {arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            names |= {part for alias in node.names for part in (*module.split("."), *alias.name.split("."))}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def _own_names(file: Path) -> set[str]:
    """Return the private names that a file defines."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if getattr(node.value, "id", "") in ("self", "cls", "one") else set()
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_private_names_of_other_projects_are_listed():
    files = [
        file for top in ("distattn", "parallel", "kernels", "cluster", "launch") for file in (ROOT / top).rglob("*.py")
    ]
    own_names = set().union(*map(_own_names, files))
    # Python documents these names in spite of their underscore
    public = {"_replace", "_asdict", "_fields", "_exit"}
    table = (ROOT / "docs" / "private-hooks.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        if any(part.is_symlink() for part in file.parents):
            continue
        for private in sorted(_private(file) - own_names - public):
            assert any(f"`{name}`" in row and private in row for row in rows), f"{name}: {private} is not listed"


# ---- the pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_short(page):
    text = re.sub(r"```.*?```|^    .*?$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(text.split()) <= 1500


def test_every_picture_of_a_strategy_is_what_its_script_draws_today():
    shown = {file.stem: file.read_text() for file in draw_strategies.FOLDER.glob("*.svg")}
    assert shown == draw_strategies.drawings(), "run python docs/draw_strategies.py"
    page = (ROOT / "docs" / "strategies.md").read_text()
    assert all(f"](strategies/{name}.svg)" in page for name in ("ring", "ulysses", "usp", "cad"))


@needs_browser
def test_pictures_of_strategies_are_legible_in_the_dark(tmp_path):
    """Draw the pictures at the width of a page's text in a window of 1,200 pixels."""
    dark = "body { background: #14181e; margin: 0 } svg { width: 636px; height: auto }"
    page = f"<!doctype html><style>{dark}</style><body>{''.join(draw_strategies.drawings().values())}</body>"
    facts = what_a_script_says(page, LEGIBLE, tmp_path, 636, dark=True)
    assert facts["texts"] > 4 * 3 * 5 and not facts["unread"] and not facts["error"], facts


def test_the_installation_page_has_every_extra_and_the_supported_versions():
    page = (ROOT / "docs" / "installation.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"^\| `distattn\[(\w+)\]`", page, re.MULTILINE)) == set(project["optional-dependencies"])
    # torch>=2.11,<2.14
    (torch,) = [requirement for requirement in project["dependencies"] if requirement.startswith("torch")]
    least, above = map(int, re.findall(r"2\.(\d+)", torch))
    assert all(f"2.{minor}" in page for minor in range(least, above)) and f"2.{above}" not in page
    assert f"Python {project['requires-python'].removeprefix('>=')} or later" in page


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Build the pages. Return the folder that contains them."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            spec = None
        if spec is None:
            pytest.skip(f"{name.split('.')[0]} is not installed; make docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.full
def test_the_pages_build_without_a_warning(site):
    reference = (site / "reference.html").read_text()
    for name in da.__all__:
        assert f'id="distattn.{name}"' in reference, name


NAVIGATION = """
  const seen = part => {
    const box = part.getBoundingClientRect();
    return box.width > 20 && box.left >= 0 && box.right < innerWidth / 3;
  };
  const groups = [...document.querySelectorAll(".md-nav__item--section > .md-nav__link")];
  said.groups = groups.filter(seen).map(part => part.textContent.trim());
  said.pages = [...document.querySelectorAll(".md-nav__item--section a.md-nav__link")].filter(seen).length;
  const names = [...document.querySelectorAll("td code")].filter(part => !/[\\s/-]/.test(part.textContent));
  said.names = names.length;
  said.broken = names.filter(part => part.getClientRects().length > 1).map(part => part.textContent);
"""


@needs_browser
def test_the_groups_of_pages_are_beside_the_text_and_names_in_tables_stay_whole(site):
    facts = what_a_script_says((site / "own-loop.html").read_text(), NAVIGATION, site, 1200)
    assert facts["groups"] == ["Start", "Use", "Run", "Understand", "Reference"], facts
    assert facts["pages"] >= len(PAGES) and facts["names"] > 20 and not facts["broken"], facts

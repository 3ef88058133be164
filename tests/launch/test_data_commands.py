"""distattn data pack, stats and show: making a plan from a TOML file, what a run will read of it, and the text of any
step.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distattn.data.files.indexed_file import IndexedFile, IndexedFileWriter
from distattn.data.files.manifest import Manifest
from distattn.data.packing.pack_config import load_pack_config
from distattn.data.packing.pack_plan import PackPlan
from distattn.data.tokenizing.tokenizer import load_tokenizer
from distattn.launch import cli
from distattn.launch.data import progress as data_progress
from distattn.launch.data import stats as data_stats

ROOT = Path(__file__).parents[2]
CONFIG = """plan = "run.packs"
seed = 7
steps = 6

[[corpus]]
name = "web"
files = ["web"]
weight = 3

[[corpus]]
name = "books"
files = ["books"]
weight = 1

[rule]
context = [[0, 64], [3, 128]]
tokens_per_step = 512
window = 8
"""
WEB = [f"{number} is the number of this document. " * (1 + number % 3) for number in range(60)]
BOOKS = ["A long story, told again and again. " * 12, "Zwölf Boxkämpfer\tund ein \x1b[31mrotes\x07 Wort\n" * 4]


def write_bytes(prefix: str, texts: list[str]) -> None:
    """Write the same files as `distattn data tokenize --tokenizer bytes`."""
    contents = [text.encode() for text in texts]
    with IndexedFileWriter(prefix, np.uint8) as writer:
        for content in contents:
            writer.add(np.frombuffer(content, np.uint8))
    tokens = sum(map(len, contents))
    digest = load_tokenizer("bytes").digest
    Manifest("", "bytes", digest, 256, None, "text", len(texts), tokens, tokens, []).save(prefix)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bytes("web", WEB)
    write_bytes("books", BOOKS)
    Path("packs.toml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def packed(folder, capsys):
    assert data(capsys, "pack", "packs.toml")[0] == 0
    return folder


def data(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["data", *arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def rows_of(text: str) -> dict[str, list[str]]:
    """Return a table's rows, keyed by their first word."""
    return {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}


# ---- pack


def test_pack_makes_a_plan_and_says_what_is_in_it(folder, capsys):
    code, out, err = data(capsys, "pack", "packs.toml")
    plan = PackPlan.open("run.packs")
    rows = rows_of(out)
    web = plan.sources[0]
    assert (code, err, plan.steps) == (0, "", 6)
    assert rows["web"][1:4] == ["60", f"{web.tokens:,}", "75.0%"] and rows["web"][6] == f"{web.planned_tokens:,}"
    assert f"6 steps of 512 tokens, {plan.tokens / (6 * 512):.2%} filled; 36 packs of 64, 128 tokens" in out
    assert plan.digest in out and f"run.packs: {os.path.getsize('run.packs') / 1e3:.1f} kB" in out


def test_pack_reports_only_lengths_that_the_plan_has(folder, capsys):
    Path("packs.toml").write_text(CONFIG.replace("steps = 6", "steps = 3"))
    assert "24 packs of 64 tokens" in data(capsys, "pack", "packs.toml")[1]


def test_pack_says_where_epochs_are_mixed(folder, capsys):
    _, out, _ = data(capsys, "pack", "packs.toml", "--json")
    assert all(corpus["epochs_of_window"] < 1 for corpus in json.loads(out)["corpora"])
    Path("packs.toml").write_text(CONFIG.replace("window = 8", "window = 100"))
    code, out, _ = data(capsys, "pack", "packs.toml", "--force")
    assert code == 0 and "a window of 100 packs is " in out and "a smaller rule.window keeps epochs apart" in out


def test_pack_says_which_files_have_no_digests_and_how_long_full_packs_take(folder, capsys):
    assert "no digests" not in data(capsys, "pack", "packs.toml")[1]
    os.unlink("web.xxh3")
    sizes = "num_layers = 2\nhidden_size = 64\nnum_attention_heads = 4\nintermediate_size = 96\nvocab_size = 300\n"
    Path("packs.toml").write_text(f'{CONFIG}[cost]\ndevice = "h100"\n{sizes}')
    code, out, _ = data(capsys, "pack", "packs.toml", "--force")
    assert code == 0 and "\nweb has no digests: each opening reads the index, and altered tokens are not found; " in out
    seconds = [load_pack_config("packs.toml").rule.cost.seconds(tokens) for tokens in (64, 128)]
    shown = ", ".join(f"{value:.3g}" for value in seconds)
    assert (
        seconds[0] > 0
        and f"a pack that one document fills: {shown} s of a training step on one device (estimated)" in out
    )
    assert json.loads(data(capsys, "stats", "packs.toml", "--json")[1])["full_pack_seconds"] == seconds


def test_pack_does_not_overwrite_unless_it_is_told_to(packed, capsys):
    before = Path("run.packs").read_bytes()
    Path("packs.toml").write_text(CONFIG.replace("seed = 7", "seed = 8"))
    code, out, err = data(capsys, "pack", "packs.toml")
    assert (code, out) == (2, "") and Path("run.packs").read_bytes() == before
    assert "run.packs: exists already, and runs may depend on it; add --force, or name another plan." in err
    assert data(capsys, "pack", "packs.toml", "--force")[0] == 0
    assert PackPlan.open("run.packs").seed == 8 and not list(packed.glob("*.tmp"))


def test_pack_leaves_a_plan_as_it_is_where_the_new_one_cannot_be_made(packed, capsys):
    before = Path("run.packs").read_bytes()
    capped = CONFIG.replace("weight = 3", "weight = 3\nmax_epochs = 0.1").replace(
        "weight = 1", "weight = 1\nmax_epochs = 1"
    )
    Path("packs.toml").write_text(capped)
    code, _, err = data(capsys, "pack", "packs.toml", "--force")
    assert code == 2 and "steps: all corpora end after" in err and "raise max_epochs, or plan fewer steps" in err
    assert Path("run.packs").read_bytes() == before and not list(packed.glob("*.tmp"))


def test_pack_has_json_and_nothing_else(folder, capsys):
    code, out, err = data(capsys, "pack", "packs.toml", "--json")
    facts = json.loads(out)
    plan = PackPlan.open("run.packs")
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert facts["digest"] == plan.digest and facts["steps"] == 6 and facts["rule"]["context"] == [[0, 64], [3, 128]]
    assert sum(corpus["planned_tokens"] for corpus in facts["corpora"]) == facts["tokens"] == plan.tokens
    assert sum(corpus["share"] for corpus in facts["corpora"]) == pytest.approx(1)


def test_progress_is_on_the_error_stream(folder, capsys, monkeypatch):
    monkeypatch.setattr(data_progress, "_LINE_SECONDS", 0.0)
    code, out, err = data(capsys, "pack", "packs.toml", "--json")
    lines = err.splitlines()
    assert code == 0 and json.loads(out) and len(lines) > 1
    assert all(line.startswith("pack: ") and " steps  " in line and "s left" in line for line in lines)
    assert lines[-1].split()[1].rstrip("%") > "90"


def test_a_plan_without_steps_goes_on_until_corpora_end(folder, capsys):
    text = (
        CONFIG.replace("steps = 6\n", "")
        .replace("weight = 3", "max_epochs = 1")
        .replace("weight = 1", "max_epochs = 2")
    )
    Path("packs.toml").write_text(text)
    code, out, _ = data(capsys, "pack", "packs.toml")
    plan = PackPlan.open("run.packs")
    assert code == 0 and [source.epochs for source in plan.sources] == [1, 2]
    assert rows_of(out)["books"][5] == "2.00"


def test_a_plan_where_nothing_can_be_written_is_refused(folder, capsys):
    Path("packs.toml").write_text(CONFIG.replace("run.packs", "nix/run.packs"))
    code, _, err = data(capsys, "pack", "packs.toml")
    assert code == 2 and "nix/run.packs: cannot be written: No such file or directory" in err


# ---- stats


def test_stats_is_a_table(packed, capsys):
    code, out, err = data(capsys, "stats", "packs.toml")
    assert (code, err) == (0, "") and rows_of(out).keys() >= {"corpus", "web", "books"}
    assert "attention work of a step's packs, largest over mean: " in out and "(of all steps)" in out


def test_stats_has_json_and_the_work_of_packs_is_that_of_their_documents(packed, capsys):
    facts = json.loads(data(capsys, "stats", "packs.toml", "--json")[1])
    plan = PackPlan.open("run.packs")
    steps = [[sum(length**2 for length in pack.lengths) for pack in plan.step(step).packs] for step in range(6)]
    uneven = [max(work) / (sum(work) / len(work)) for work in steps]
    assert facts["attention_max_over_mean"] == pytest.approx(sum(uneven) / 6)
    assert facts["worst_attention_max_over_mean"] == pytest.approx(max(uneven))
    assert f"at most {max(uneven):.2f} in step {uneven.index(max(uneven))} " in data(capsys, "stats", "packs.toml")[1]


def test_stats_looks_at_some_steps_of_a_long_plan(packed, capsys, monkeypatch):
    monkeypatch.setattr(data_stats, "_MOST_STEPS", 3)
    assert "(of 3 steps)" in data(capsys, "stats", "packs.toml")[1]


@pytest.mark.parametrize(("name", "begin"), [("a.svg", b"<?xml"), ("b.png", b"\x89PNG"), ("c.pdf", b"%PDF")])
def test_stats_draws_a_picture(packed, capsys, name, begin):
    pytest.importorskip("matplotlib")
    code, out, _ = data(capsys, "stats", "packs.toml", "--picture", name, "--json")
    assert code == 0 and json.loads(out)
    content = Path(name).read_bytes()
    assert content.startswith(begin) and len(content) > 5_000


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("a.gif", "data stats: --picture a.gif: end the name in .svg, .png or .pdf."),
        ("", "data stats: --picture : end the name in .svg, .png or .pdf."),
        ("nix/a.svg", "data stats: --picture nix/a.svg: cannot be written: No such file or directory."),
    ],
)
def test_stats_refuses_pictures_that_it_cannot_draw(packed, capsys, name, sentence):
    pytest.importorskip("matplotlib")
    code, out, err = data(capsys, "stats", "packs.toml", f"--picture={name}")
    assert (code, out, err) == (2, "", f"distattn: {sentence}\n")


def test_stats_names_the_package_that_is_missing(packed, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = data(capsys, "stats", "packs.toml", "--picture", "a.svg")
    assert code == 2 and "--picture needs matplotlib: pip install 'distattn[train]'" in err


# ---- show


def test_show_has_all_text_of_a_step_between_borders(packed, capsys):
    code, out, err = data(capsys, "show", "packs.toml", "4", "--tokens", "0")
    assert (code, err) == (0, "")
    plan = PackPlan.open("run.packs")
    packs = plan.step(4).packs
    lines = [line for line in out.splitlines() if line.startswith(("====", "----"))]
    assert sum(line.startswith("====") for line in lines) == len(packs) == 4
    assert sum(line.startswith("----") for line in lines) == sum(len(pack.rows) for pack in packs)
    first, border = lines[:2]
    document, _, length, corpus, epoch, *_ = packs[0].rows[0].item()
    count = len(packs[0].rows)
    assert first.startswith(f"==== step 4, pack 0: {count} document{'s' * (count > 1)}, {packs[0].tokens} tokens ===")
    name = ("web", "books")[corpus]
    assert border.startswith(f"---- {name} {document} ({name}.bin {document}), epoch {epoch}: {length} tokens ")
    # every document's full text is shown
    for row in (row for pack in packs for row in pack.rows if row["corpus"] == 0 and not row["start"]):
        assert WEB[row["document"]][: row["length"]] in out


def test_control_characters_are_spelt_out(packed, capsys):
    steps = PackPlan.open("run.packs").find(1, 1)
    out = data(capsys, "show", "packs.toml", str(steps[0]), "--tokens", "0")[1]
    assert "ein \\x1b[31mrotes\\x07 Wort\n" in out and "Boxkämpfer\tund" in out
    assert "\x1b[31m" not in out and "\x07" not in out


def test_show_has_one_pack_and_the_begin_and_end_of_documents(packed, capsys):
    _, out, _ = data(capsys, "show", "packs.toml", "4", "--pack", "2", "--tokens", "3")
    pack = PackPlan.open("run.packs").step(4).packs[2]
    assert out.count("====\n") == 1 and "step 4, pack 2: " in out
    longest = int(max(pack.lengths))
    assert f"\n... {longest - 6} tokens ...\n" in out
    text = IndexedFile.open(("web", "books")[pack.corpus[0]]).read(int(pack.document[0]), int(pack.start[0]), 3)
    assert out.splitlines()[2] == bytes(text).decode("utf-8", "replace")


def test_show_has_documents_as_json(packed, capsys):
    code, out, err = data(capsys, "show", "packs.toml", "4", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    plan = PackPlan.open("run.packs")
    assert (code, err) == (0, "")
    assert rows == [
        {"step": 4, "pack": number, "corpus": ("web", "books")[row["corpus"]], "document": row["document"]}
        | {
            "epoch": row["epoch"],
            "start": row["start"],
            "length": row["length"],
            "file": ("web", "books")[row["corpus"]],
        }
        for number, pack in enumerate(plan.step(4).packs)
        for row in pack.rows
    ]
    assert data(capsys, "show", "packs.toml", "4", "--json", "--pack", "1")[1].splitlines() == [
        line for line in out.splitlines() if json.loads(line)["pack"] == 1
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("6",), "run.packs: there is no step 6; the plan has steps 0 to 5."),
        (("-1",), "run.packs: there is no step -1; the plan has steps 0 to 5."),
        (("4", "--pack", "4"), "data show: --pack: step 4 has packs 0 to 3."),
        (("4", "--pack", "-1"), "data show: --pack: step 4 has packs 0 to 3."),
        (("4", "--tokens", "-1"), "data show: --tokens: at least 1, or 0 for all of a document, not -1."),
        (("four",), "data show: step: 'four' is not a whole number. See distattn data show --help."),
        ((), "data show: the following arguments are required: step. See distattn data show --help."),
    ],
)
def test_show_refuses_what_is_not_there(packed, capsys, arguments, sentence):
    assert data(capsys, "show", "packs.toml", *arguments) == (2, "", f"distattn: {sentence}\n")


def test_show_has_token_ids_where_the_tokenizer_is_gone_and_says_so(packed, capsys):
    manifest = json.loads(Path("web.json").read_text())
    os.unlink("books.json")
    for change, why in (
        ({"tokenizer": "nix/tokenizer.json"}, "nix/tokenizer.json cannot be read: No such file or directory"),
        ({"tokenizer_digest": "0"}, "bytes is another tokenizer than the one that made it"),
    ):
        Path("web.json").write_text(json.dumps(manifest | change))
        code, out, err = data(capsys, "show", "packs.toml", "0", "--tokens", "0")
        assert code == 0 and why in err
        assert all(line.startswith("data show: ") and "token ids are shown" in line for line in err.splitlines())
        # one message per file, however many documents it has
        assert err.count("data show: web:") == 1
        texts = [line for line in out.splitlines() if not line.startswith(("====", "----"))]
        assert texts and all(part.isdecimal() for line in texts for part in line.split())


def test_show_refuses_ids_that_the_vocabulary_does_not_have(packed, capsys):
    manifest = json.loads(Path("web.json").read_text())
    Path("web.json").write_text(json.dumps(manifest | {"vocabulary": 50}))
    code, _, err = data(capsys, "show", "packs.toml", "0")
    assert code == 3 and "web.bin: byte " in err and "is not below 50, the size of the vocabulary" in err


# ---- all commands


@pytest.mark.parametrize("command", ["stats", "show"])
def test_a_plan_that_is_not_made_yet_is_refused(folder, capsys, command):
    arguments = [command, "packs.toml", *(["0"] if command == "show" else [])]
    code, out, err = data(capsys, *arguments)
    assert (code, out) == (2, "") and "run.packs: there is no such plan yet; make it with distattn data pack." in err


@pytest.mark.parametrize("command", ["stats", "show"])
def test_a_plan_that_is_damaged_or_of_another_configuration_is_refused(packed, capsys, command):
    arguments = [command, "packs.toml", *(["0"] if command == "show" else [])]
    Path("packs.toml").write_text(CONFIG.replace("seed = 7", "seed = 8"))
    code, out, err = data(capsys, *arguments)
    assert (code, out) == (2, "") and "run.packs: was made with seed = 7, not 8" in err
    Path("packs.toml").write_text(CONFIG)
    content = bytearray(Path("run.packs").read_bytes())
    content[70] ^= 1
    Path("run.packs").write_bytes(content)
    code, _, err = data(capsys, *arguments)
    assert code == 3 and "run.packs: step 0 is not what was written (byte 64)" in err


@pytest.mark.parametrize("command", ["pack", "stats", "show"])
def test_help_and_no_arguments(capsys, command):
    assert data(capsys, command, "--help")[:2] == (0, data(capsys, command)[1])
    code, out, _ = data(capsys, command)
    assert code == 2 and out.startswith(f"usage: distattn data {command} PACKS.toml")


def test_other_commands_are_refused(capsys):
    code, _, err = data(capsys, "pakc", "packs.toml")
    assert code == 2 and "data: there is no command 'pakc'; there are tokenize, verify, pack, stats and show." in err


@pytest.mark.parametrize(
    "arguments",
    [
        "data show packs.toml 4 --tokens 0",
        "data show packs.toml 4 --json",
        "data stats packs.toml",
        "data stats packs.toml --json",
        "data verify web",
        "plan --docs 64Ki --cluster h200-8x8",
    ],
)
def test_a_command_whose_output_is_no_longer_read_ends_silently(packed, arguments):
    reader, writer = os.pipe()
    # close the pipe before anything is written, as `head` may do
    os.close(reader)
    command = [sys.executable, "-m", "distattn.launch.cli", *arguments.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment, text=True)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")

"""`distattn plan`: candidates on a given cluster as text, JSON and a page. A mistake gives a one-sentence error."""

import json
import re
from pathlib import Path

import pytest

from distattn.ir.errors import DistattnError
from distattn.ir.layout import LAYOUTS
from distattn.launch import cli
from distattn.parallel.make_plan import STRATEGIES
from distattn.planning.compare_strategies import parse_document_lengths


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["plan", *arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


SMALL = ("--docs", "4096,1024x4", "--cluster", "h200-2x4", "--heads", "8:4")


def test_candidates_are_listed_and_the_fastest_is_marked(capsys):
    code, out, _ = run(capsys, *SMALL)
    assert code == 0 and out.startswith("8,192 tokens in 5 documents on 8 ranks")
    assert "simulated on h200-2x4" in out and out.count("<- fastest") == 1
    assert [line.split()[0] for line in out.splitlines()[3:]] == list(STRATEGIES)


def test_the_page_on_planning_has_the_table_that_is_printed(capsys):
    page = (Path(__file__).parents[2] / "docs" / "planning-a-cluster.md").read_text("utf-8")
    command, table = (
        match.group(1) for match in re.finditer(r"((?:^    .*\n)+)", page[: page.index("`plan.html`")], re.M)
    )
    arguments = command.splitlines()[0].split()[2:]
    code, out, _ = run(capsys, *arguments[: arguments.index("--html")])
    assert code == 0 and out.splitlines() == [line.removeprefix("    ") for line in table.splitlines()]


def test_memory_of_a_rank_without_tokens_is_refused_in_a_sentence(capsys):
    code, _, err = run(capsys, "tiny", "--docs", "4096", "--tokens", "5", "--memory")
    assert code == 2 and "rank 1 has none of the 5 tokens of this step" in err and err.count("\n") == 1, err


def test_numbers_a_page_and_a_trace(capsys, tmp_path):
    page, trace = tmp_path / "plan.html", tmp_path / "trace.json"
    code, out, _ = run(capsys, *SMALL, "--strategy", "usp,ring", "--json", f"--html={page}", f"--perfetto={trace}")
    rows = json.loads(out)["candidates"]
    assert code == 0 and [row["strategy"] for row in rows] == ["usp", "ring"] and all(row["simulated"] for row in rows)
    text = page.read_text()
    # one score matrix per strategy; the page draws the time charts itself
    assert (
        text.count('class="matrices"') == 2
        and text.count("<canvas") == 4
        and "simulated" in text
        and 'src="http' not in text
    )
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_refused_strategy_has_its_own_line(capsys):
    code, out, _ = run(capsys, "--docs", "65536", "--cluster", "h200-2x8", "--heads", "8:8")
    assert code == 0 and "ulysses is refused: ulysses splits 8 query heads over 16 ranks" in out


def test_a_configuration_gives_documents_shapes_and_ranks(capsys):
    code, out, _ = run(capsys, "configs/tiny.toml", "--cluster", "h100-1x8", "--parallel.ranks", "2")
    assert code == 0 and "on 2 ranks, 8 query and 4 key/value heads of 16, float32, document_zigzag layout" in out


def test_documents_from_a_file_cut_to_a_number_of_tokens(capsys, tmp_path):
    (tmp_path / "lengths.json").write_text("[3000, 5000, 9000]")
    options = (
        "--docs",
        str(tmp_path / "lengths.json"),
        "--tokens",
        "6000",
        "--cluster",
        "h200-1x4",
        "--strategy",
        "ring",
    )
    code, out, _ = run(capsys, *options, "--json")
    assert code == 0 and json.loads(out)["tokens"] == 6000 and json.loads(out)["documents"] == 2
    code, _, err = run(capsys, *options[:3], "60000", *options[4:])
    assert code == 2 and "--tokens: 60,000 is more than the 17,000 tokens of all documents together" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--docs", "4q", "--cluster", "h200-1x4"), "'4q' is no document length and there is no such file"),
        (("--docs", "1x99999999", "--cluster", "h200-1x4"), "more than 1,000,000 documents"),
        (("--docs", "0", "--cluster", "h200-1x4"), "name at least one document, each with at least one token"),
        (("--docs", "4096"), "name a cluster to time it on: --cluster laptop-1x4 or --cluster h200-8x8"),
        (("--docs", "4096", "--cluster", "h900-1x4"), "there is no cluster 'h900-1x4'"),
        (("--docs", "4096", "--cluster", "h200-1x4", "--ranks", "5"), "5 ranks need more devices than h200-1x4 has"),
        (("--docs", "4096", "--cluster", "h200-1x4", "--ranks", "0"), "--ranks: at least 1, not 0"),
        (("--docs", "4096", "--cluster", "h200-1x4", "--ranks", "two"), "--ranks: 'two' is not a whole number"),
        (("--docs", "4096", "--cluster", "h200-1x4", "--strategy", "rong"), "there is no strategy 'rong'"),
        (("--docs", "4096", "--cluster", "h200-1x4", "--layout", "zag"), "there is no 'zag'; there are contiguous"),
        (("--docs", "4096", "--cluster", "h200-1x4", "--heads", "x"), "'x' is not query:key/value heads"),
        (("--docs", "4096", "--cluster", "h200-1x4", "--heads", "6:4"), "6 query heads do not divide among 4"),
        (("--docs", "4096", "--cluster", "h200-1x4", "--head-dim", "0"), "--head-dim: at least 1, not 0"),
        (("--docs", "4096", "--cluster", "h200-1x4", "--tokens", "-5"), "--tokens: at least 1, not -5"),
        (("--docs", "4096", "--cluster", "h200-1x4", "--html", "/none/x.html"), "--html: there is no folder /none"),
        (
            ("configs/llama-8b-1m-h200.toml", "--parallel.devices_per_node", "4"),
            "has 8: set parallel.devices_per_node=8",
        ),
        (("--docs", "4096", "--cluster", "h200-1x4", "--colour", "red"), "'--colour' is not known"),
        (("--docs", "4096", "--cluster", "h200-1x4", "--axis", "512"), "'--axis' is not known. Did you mean --tokens?"),
        (("--cluster", "h200-1x4"), "a configuration or --docs is required"),
        (("configs/tiny.toml", "--cluster", "h200-1x2"), "4 ranks need more devices than h200-1x2 has"),
        (("configs/tiny.toml", "--cluster", "h200-1x4", "--layout", "zigzag"), "with a configuration --layout is"),
        (
            ("configs/tiny.toml", "--cluster", "h200-1x4", "--tokens", "100"),
            "in a configuration use --data.tokens_per_step",
        ),
        (("configs/none.toml", "--cluster", "h200-1x4"), "there is no such configuration file"),
    ],
)
def test_a_mistake_gives_one_sentence(capsys, arguments, sentence):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "tokens"),
    [("1M", 10**6), ("1e6", 10**6), ("1Mi", 1 << 20), ("128K", 128_000), ("128Ki", 1 << 17), ("1.5k", 1500), ("7", 7)],
)
def test_lengths_may_have_units(word, tokens):
    assert parse_document_lengths(f"{word}x2,3") == [tokens, tokens, 3]


@pytest.mark.parametrize(
    "word", ["1.5", "i", "1i", "1e99", "-3", "1e-3", "0x", "M", "1MM", "4096x", "4096x0", "4096xx", "4096x-1"]
)
def test_a_word_that_is_not_a_length_is_named(word):
    with pytest.raises(DistattnError, match="--docs"):
        parse_document_lengths(word)


@pytest.mark.parametrize("docs", ["16", "4096x3", "64M"])
def test_columns_are_aligned_at_any_magnitude(capsys, docs):
    assert cli.main(["plan", "--docs", docs, "--cluster", "h200-1x4", "--strategy", "ring,allgather"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()[2:]
    for name in ("backward", "TFLOP/s bwd", "buffers"):
        end = head.index(name) + len(name)
        assert all(row[end - 1] != " " and row[end : end + 1] in ("", " ") for row in rows), (name, head, *rows)


def test_the_fastest_is_in_colour_on_a_terminal_only(capsys, monkeypatch):
    arguments = ["plan", "--docs", "4096", "--cluster", "h200-1x4", "--strategy", "ring,allgather"]
    cli.main(arguments)
    assert "\x1b" not in capsys.readouterr().out
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "40"}.items():
        monkeypatch.setenv(name, value)
    cli.main(arguments)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "fastest" in line)
    # the line stays in one piece, however narrow the terminal
    assert line.startswith("\x1b[1;32m") and "GB   <- fastest" in line.replace("MB", "GB")


def test_a_run_s_layout_is_compared_with_the_others_and_a_faster_one_is_named(capsys):
    arguments = ("configs/tiny.toml", "--cluster", "h100-1x4", "--docs", "65536", "--strategy", "ring")
    _, out, _ = run(capsys, *arguments, "--parallel.layout=contiguous")
    assert "layouts with ring, forward + backward: " in out and all(name in out for name in LAYOUTS)
    assert "layout contiguous is not the fastest: it takes " in out and 'set parallel.layout = "' in out
    assert "strategy ring" not in out
    _, out, _ = run(capsys, *arguments, "--parallel.layout=balanced")
    assert "layouts with ring" in out and "is not the fastest" not in out
    _, out, _ = run(capsys, *arguments, "--json")
    assert set(json.loads(out)["layouts"]) <= set(LAYOUTS)


def test_a_faster_strategy_than_the_run_s_own_is_named_in_a_sentence(capsys):
    args = ("configs/tiny.toml", "--cluster", "h100-1x4", "--docs", "65536", "--strategy", "ring,allgather,ulysses")
    code, out, _ = run(capsys, *args, "--json")
    seconds = {
        row["strategy"]: row["forward"]["seconds"] + row["backward"]["seconds"] for row in json.loads(out)["candidates"]
    }
    fastest, slowest = min(seconds, key=seconds.get), max(seconds, key=seconds.get)
    assert seconds[slowest] > 1.1 * seconds[fastest]
    times = f"{seconds[slowest] / seconds[fastest]:.2f}"
    _, out, _ = run(capsys, *args, f"--parallel.strategy={slowest}")
    assert f"strategy {slowest} is not the fastest: it takes {times} times as long as {fastest} (simulated); " in out
    assert f'set parallel.strategy = "{fastest}".' in out
    _, out, _ = run(capsys, *args, f"--parallel.strategy={fastest}")
    assert "is not the fastest: it takes" not in "".join(
        line for line in out.splitlines() if line.startswith("strategy ")
    )
    # a refused strategy is reported as such, and a strategy that is not compared is not mentioned
    _, out, _ = run(
        capsys,
        *args,
        "--parallel.strategy=ulysses",
        "--parallel.ranks=4",
        "--model.num_attention_heads=2",
        "--model.num_key_value_heads=2",
        "--model.head_dim=16",
    )
    assert "strategy ulysses is refused; set parallel.strategy = " in out
    _, out, _ = run(capsys, *args[:-1], "ring", "--parallel.strategy=usp")
    assert "strategy usp" not in out

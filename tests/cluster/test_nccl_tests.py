"""nccl-tests output in both formats, generated here for a link of known speed."""

import re

import pytest
from nccl_output import SIZES, as_json, text

import distattn as da
from distattn.cluster import nccl_tests as nccl


@pytest.mark.parametrize("kind", [text, as_json])
@pytest.mark.parametrize("test", nccl.FACTORS)
def test_the_link_is_found_whatever_the_test(tmp_path, kind, test):
    (tmp_path / "out").write_text(kind(test, 8))
    run = nccl.read(tmp_path / "out")
    assert (run.test, run.ranks, len(run.rows)) == (test, 8, len(SIZES))
    link = run.link()
    assert link.gbs == pytest.approx(350, rel=0.02) and link.latency_us == pytest.approx(12, rel=0.05)
    # nothing from the environment is stored
    assert "secret" not in repr(run)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "this is not the output of nccl-tests"),
        ("{}", "this is not the output of nccl-tests"),
        ("# nccl-tests\nnothing", "no row of sizes and times"),
        (text("all_reduce", 8).replace("all_reduce_perf", ""), "the test is not named"),
        (
            text("all_reduce", 8).replace("all_reduce", "gather"),
            "the test is gather; distattn reads those named all_reduce",
        ),
        (text("sendrecv", 1), "1 ranks and 11 rows"),
        (as_json("sendrecv", 8).replace('"time"', '"dime"'), "KeyError: 'time'"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, content, sentence):
    (tmp_path / "out").write_text(content)
    with pytest.raises(da.DistattnError, match=re.escape(sentence)):
        nccl.read(tmp_path / "out")
    with pytest.raises(da.DistattnError, match="cannot be read"):
        nccl.read(tmp_path / "missing")


def test_older_tables_without_a_root_are_read_too(tmp_path):
    rows = []
    for line in text("sendrecv", 2).splitlines():
        columns = line.split()
        if columns[0] == "#" and "root" in columns:
            line = line.replace("root", "")
        elif columns[0].isdecimal():
            line = " ".join([*columns[:4], *columns[5:]])
        rows.append(line)
    (tmp_path / "old").write_text("\n".join(rows))
    assert nccl.read(tmp_path / "old").link().gbs == pytest.approx(350, rel=0.02)
    # without the header the columns are unknown
    (tmp_path / "bare").write_text("\n".join(row for row in rows if "algbw" not in row))
    with pytest.raises(da.DistattnError, match="time and algbw of size 1024 do not agree"):
        nccl.read(tmp_path / "bare")


def test_times_that_do_not_grow_do_not_describe_a_link():
    flat = nccl.NcclTestRun("sendrecv", 2, ((1024, 10.0), (4096, 10.0), (16384, 9.0)))
    with pytest.raises(da.DistattnError, match="larger messages are not slower"):
        flat.link()


def test_commands_name_their_output():
    assert len(nccl.commands(8)) == 1 and len(nccl.commands(8, 4)) == 2
    assert all("-J" in command for command in nccl.commands(8, 4))

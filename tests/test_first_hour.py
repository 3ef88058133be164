"""Runs the first hour on GPUs without a GPU: planted faults are found, a failed part does not stop the others, and the
verdict names it.
"""

import contextlib
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import findings
import first_hour
import pytest
import torch
from gpu_programs import run_program
from verdict import Outcome, speed_table, time_table, verdict

ROOT = Path(__file__).parents[1]


@pytest.mark.full
@pytest.mark.parametrize(
    ("command", "ranks", "wanted"),
    [
        (
            ["gpu_plants.py"],
            0,
            [
                "keys of every run is dropped ... found: causal: o is off by",
                'allowed: 3e-03); kernel="auto" does not use it: wrong: ',
                "scaled by 5 % too much ... found: causal: o is off by",
                "one key more than the mask allows ... found: causal: o is off by",
                "written, not added ... found: causal: added to itself, dk is off by",
                "beyond the end of dk ... found: causal: a write beyond dk",
                "beyond the end of k ... found: causal: o is off by nan",
                "other bits the second time ... found: causal: o differs in bits",
            ],
        ),
        (
            ["cluster_plants.py"],
            2,
            [
                "another plan ... found: rank 1 plans a different call",
                "message of ring is altered on its way ... found: ring is wrong: rank 0: ",
                "message of ulysses is altered on its way ... found: ulysses is wrong: rank ",
                "used again before the wait ... found: ring is wrong: rank 0: ",
                "; rank 1: ",
                "state of a recurrent layer is altered on its way ... found: scan is wrong: rank 1: o is off by",
            ],
        ),
        (
            ["cluster_plants.py", "--stop", "--timeout", "20"],
            2,
            ["a rank stops ... found: rank 1 stopped answering", "(KV in step 1 of 2 of the forward pass)"],
        ),
    ],
    ids=["kernels", "messages", "a lost rank"],
)  # fmt: skip
def test_every_planted_fault_is_found(command, ranks, wanted, tmp_path):
    done = run_program(
        f"benchmarks/{command[0]}", *command[1:], "--findings", str(tmp_path / "found.jsonl"), ranks=ranks
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert not [text for text in wanted if text not in done.stdout], done.stdout
    rows = findings.read(tmp_path / "found.jsonl")
    assert all(row["text"] for row in rows if row["kind"] == "planted") and rows[-1]["kind"] == "ended"
    # before a fault is planted, all checks pass
    assert not any(row["text"] for row in rows if row["kind"] == "check")


BLIND = {
    "nothing": ([], "wrong: 1 from the reference", ""),
    "comparison only": (["o is off by 1"], "", ""),
    "what is there without": (["o is off by 1"], "wrong: 1 from the reference", "o is off by 1"),
}


@pytest.mark.parametrize("finder", BLIND)
def test_a_planted_fault_that_is_not_found_makes_the_exit_code_1(finder, monkeypatch, capsys, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    import gpu_checks
    import gpu_plants

    complaints, trial, before = BLIND[finder]
    call = gpu_checks.call_of("triton", (32, 32), False, torch.device("cpu"))
    monkeypatch.setattr(
        gpu_checks, "check", lambda call_, mask: complaints if call_.tier is not call.tier else [before] * bool(before)
    )
    monkeypatch.setattr(gpu_plants, "faults_by_trial", lambda planted, call: {plant.fault: trial for plant in planted})
    record = findings.Findings(tmp_path / "found.jsonl")
    gpu_plants.in_kernels(call, record)
    assert record.ended() == 1
    missed = [
        row["what"] for row in findings.read(tmp_path / "found.jsonl") if row["kind"] == "planted" and not row["text"]
    ]
    # the trial only compares results
    assert len(missed) == (4 if finder == "comparison only" else 7)
    assert capsys.readouterr().out.count("NOT FOUND") == len(missed)


class LateLists:
    """A program's lists whose copy to the device happens only when the stream waits for it."""

    def __init__(self, packed):
        self.real, self.packed, self.ready, self.late = packed, self, self, None

    def clone(self):
        return self.real.clone()

    def zero_(self):
        self.real.zero_()

    def copy_(self, source):
        self.late = source

    def record(self):
        """Record nothing, because the copy has not happened yet."""

    def join(self):
        self.real.copy_(self.late)


def with_late_lists(program):
    """Return a program whose lists are packed into one tensor, as on a GPU."""
    from distattn.parallel.runtime.lowering.upload_program import replace_tensors

    lists = {}
    replace_tensors(program, lambda tensor: lists.setdefault(id(tensor), tensor))
    ends = list(itertools.accumulate(tensor.nbytes for tensor in lists.values()))
    packed = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in lists.values()])
    places = {
        name: packed[end - tensor.nbytes : end].view(tensor.dtype).view(tensor.shape)
        for (name, tensor), end in zip(lists.items(), ends, strict=True)
    }
    moved = replace_tensors(program, lambda tensor: places[id(tensor)])
    return dataclasses.replace(moved, uploaded=LateLists(packed))


def copied_at_the_wait(flight):
    for copy in flight.done:
        copy()


def test_missing_waits_of_streams_are_found(monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    import gpu_executor
    import gpu_plants

    def post(hub, src, dst, sends, tensor, done):
        waiting = hub.posted[src, dst, not sends]
        if not waiting:
            hub.posted[src, dst, sends].append((tensor, None, done))
            return
        other, _, other_done = waiting.popleft()
        source, target = (tensor, other) if sends else (other, tensor)
        # the copy happens when the receiver waits
        (other_done if sends else done).append(lambda: target.copy_(source))

    monkeypatch.setattr(gpu_executor.DelayedCopies, "post", post)
    monkeypatch.setattr(gpu_executor.Mailbox.Flight, "wait", copied_at_the_wait)
    small = {gpu_plants: dict(TOKENS=128, DIM=32, RANKS=2), gpu_executor: dict(HEADS=4, KV_HEADS=2)}
    for module, sizes in small.items():
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
    for name in ("synchronize", "_sleep", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    program = gpu_plants.EXECUTABLES.program
    monkeypatch.setattr(gpu_plants.EXECUTABLES, "program", lambda plan, key: with_late_lists(program(plan, key)))
    record = findings.Findings(tmp_path / "found.jsonl")
    gpu_plants.message_not_waited_for(torch.device("cpu"), record)
    gpu_plants.lists_not_waited_for(torch.device("cpu"), record)
    rows = findings.read(tmp_path / "found.jsonl")
    assert [(row["kind"], bool(row["text"])) for row in rows] == [("check", False), ("planted", True)] * 2, rows


# ---- parts


def part(name, body, seconds=20.0, **more):
    """Return a part that runs `body`, lines of Python that can call `note(kind, what, text)` to report findings."""
    script = (
        "import json, signal, sys, time\n"
        "path = sys.argv[sys.argv.index('--findings') + 1]\n"
        "def note(kind, what='', text='', **more):\n"
        "    open(path, 'a').write(json.dumps(dict(kind=kind, what=what, text=text, **more)) + '\\n')\n"
        "ended = lambda: note('ended', device='a machine', versions={'torch': '2'}, commit='abc')\n"
    )
    return first_hour.Part(name, [sys.executable, "-c", script + body], seconds, **more)


RIGHT = "note('check', 'a sum')\nprint('all is well')\nended()"
PLANTED = "note('planted', 'a fault', 'it is off')\nended()"


def hour(stages, tmp_path, capsys, seconds=60.0, without=""):
    code = first_hour.first_hour(stages, tmp_path / "gpu", seconds, without)
    output = capsys.readouterr().out
    assert (tmp_path / "gpu" / "output.txt").read_text() == output
    return code, output


def test_parts_run_side_by_side_and_their_output_is_kept(tmp_path, capsys):
    stages = [[part("planted faults", PLANTED)], [part("one", RIGHT), part("other", RIGHT)]]
    code, output = hour(stages, tmp_path, capsys, without="No GPU here.")
    assert code == 0
    assert "one: all is well\n" in output and "other: all is well\n" in output
    verdict_of = output[output.index("Verdict") :]
    assert verdict_of.startswith(
        "Verdict: right.\nNo GPU here.\nAll 1 planted faults were found.\n2 of 2 checks are right.\nNothing has to be sent back."
    )
    assert "a machine; torch 2; commit abc" in verdict_of


FAILING = {
    "a wrong result": ("note('check', 'dk of ring', 'dk is off')\nended()\nsys.exit(1)", "1. dk of ring: dk is off"),
    "not found": ("note('planted', 'a fault')\nended()\nsys.exit(1)", "1. planted, not found: a fault"),
    "a crash": ("raise RuntimeError('no kernel')", "exit code 1; its last line: RuntimeError: no kernel"),
    "a crash after a wrong result": ("note('check', 'a sum', 'it is off')\nsys.exit(1)", "exit code 1"),
    "a crash of another rank": ("note('check', 'a sum')\nended()\nsys.exit(1)", "exit code 1"),
    "a hang": (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('step 3', flush=True)\ntime.sleep(60)",
        "it was stopped after 10 s; its last line: step 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAILING)
def test_a_part_that_fails_is_named_and_the_others_run(fault, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(first_hour, "GRACE_SECONDS", 0.5)
    body, wanted = FAILING[fault]
    seconds = 10.0 if fault == "a hang" else 60.0
    stages = [[part("planted faults", PLANTED)], [part("the odd one", body, seconds)], [part("the last one", RIGHT)]]
    code, output = hour(stages, tmp_path, capsys)
    assert code == 1 and "Verdict: NOT right." in output and wanted in output and "to send back:" in output
    assert "all is well" in output
    if fault not in ("a wrong result", "not found"):
        assert "The part the odd one failed: " in output


@pytest.mark.full
def test_parts_without_time_left_are_skipped_by_name(tmp_path, capsys, monkeypatch):
    # Python starts within a fifth of the remaining time even on a loaded machine
    monkeypatch.setattr(first_hour, "LEAST_SECONDS", 10.0)
    slow = "time.sleep(float(sys.argv[sys.argv.index('--seconds') + 1]))\n"
    stages = [
        [part("planted faults", PLANTED)],
        [part("long", slow + RIGHT, 99, keeps_time=True)],
        [part("late", RIGHT)],
    ]
    code, output = hour(stages, tmp_path, capsys, seconds=20.0)
    assert code == 0 and "Left out (no time was left): late." in output and "1 of 1 checks are right" in output


NONE, ONE = "No GPU here", "One GPU here"


@pytest.mark.parametrize(
    ("program", "gpus", "sentence"),
    [("gpu", 0, NONE), ("cluster", 0, NONE), ("cluster", 1, ONE), ("gpu", 1, ""), ("cluster", 8, "")],
)
def test_faults_are_planted_first_and_the_rank_that_is_lost_is_last(program, gpus, sentence):
    stages = (
        first_hour.one_gpu(gpus > 0, ["--quick"]) if program == "gpu" else first_hour.cluster(gpus, ["--tokens", "9"])
    )
    names = [part_.name for stage in stages for part_ in stage]
    assert names[0] == "planted faults" and len(set(names)) == len(names)
    text = first_hour.missing(program, gpus)
    assert text.startswith(sentence) and bool(text) == bool(sentence)
    if program == "cluster":
        assert names[-1] == "planted: a lost rank" and stages[1][0].command[-2:] == ["--tokens", "9"]
        assert stages[0][0].command[5] == str(max(gpus, 2))
    else:
        # without a GPU the speed would be meaningless
        assert (names[-1] == "speed") == (gpus > 0)


# ---- the verdict and the table


def speeds(case, auto="gluon", **tflops):
    work = 1000.0
    return [
        dict(kind="speed", what=case, text="" if rate else "unsupported: not installed", contestant=name.replace("_", " "),
             seconds=work / rate if rate else None, tflops=rate, auto=name == f"distattn_{auto}")
        for name, rate in tflops.items()
    ]  # fmt: skip


ROWS = [
    *speeds(
        "forward causal", distattn_triton=400, distattn_gluon=600, flash_attention_3=500, varlen_flash=300, sdpa_cudnn=0
    ),
    *speeds("backward causal", distattn_triton=300, distattn_gluon=400, flash_attention_3=500, sdpa_flash=250),
]
GOOD = [dict(kind="planted", what="a fault", text="it is off"), dict(kind="check", what="a sum", text="")]


def test_the_table_has_tiers_beside_others_and_what_auto_chose():
    lines = speed_table(ROWS).splitlines()
    assert lines[1].split() == ["triton", "gluon", "FA2", "FA3", "auto"]
    assert lines[2].split() == [
        "forward",
        "causal",
        "400",
        "0.67",
        "600",
        "1.00",
        "300",
        "0.50",
        "500",
        "0.83",
        "gluon",
    ]
    assert lines[3].split()[-3:] == ["500", "1.00", "gluon"]
    assert "without cuDNN: unsupported: not installed" in lines and "without flash: it took no part" in lines
    assert speed_table(GOOD) == ""


def test_times_of_recurrences_have_a_table_of_their_own():
    rows = [
        dict(kind="time", what="ssd: backward", contestant="fla", seconds=1e-3, text=""),
        dict(kind="time", what="ssd: backward", contestant="chunked", seconds=0.02, text=""),
        dict(kind="time", what="kda: backward", contestant="fla", seconds=None, text="unsupported: not installed"),
        dict(kind="time", what="kda: backward", contestant="chunked", seconds=0.03, text=""),
    ]
    lines = [line.split() for line in time_table(rows).splitlines()[1:]]
    assert lines == [["fla", "chunked"], ["ssd:", "backward", "1.00", "20.00"], ["kda:", "backward", "-", "30.00"]]
    assert time_table(GOOD) == "" and speed_table(rows) == ""


def test_the_verdict_of_a_right_run_says_what_auto_chose_and_how_fast_it_is():
    text, right = verdict([Outcome("speed", [*GOOD, *ROWS])], "")
    assert right and text.startswith("Verdict: right.")
    assert (
        "auto chooses gluon in 2 of 2 cases: forward up to 600 TFLOP/s, 1.20x of the fastest other; "
        "backward up to 400 TFLOP/s, 0.80x of the fastest other (geometric mean)." in text
    )
    assert "Nothing has to be sent back." in text


def test_a_choice_slower_than_another_tier_is_listed_to_be_sent_back():
    rows = [
        *speeds("forward causal", auto="triton", distattn_triton=400, distattn_gluon=600),
        *speeds("backward causal", auto="triton", distattn_triton=400, distattn_gluon=600),
    ]
    text, right = verdict([Outcome("speed", [*GOOD, *rows])], "")
    assert right and "1 thing to send back:\n  1. auto chose triton in causal, where gluon is 1.50x as fast" in text


def test_a_verdict_without_checks_is_not_right():
    text, right = verdict([Outcome("one", [], left_out="no time was left")], "No GPU here.")
    assert not right and "Verdict: nothing was looked at.\nNo GPU here.\nNo fault was planted" in text
    assert "Left out (no time was left): one." in text


def test_many_wrong_results_are_counted_and_the_first_ones_shown():
    wrong = [dict(kind="check", what=f"check {number}", text="it is off") for number in range(9)]
    text, right = verdict([Outcome("one", [*GOOD, *wrong])], "")
    assert not right and "1 of 10 checks are right." in text and "9 things to send back:" in text
    assert "  5. check 4: it is off\n  and 4 more" in text


def test_a_half_written_finding_does_not_count(tmp_path):
    path = tmp_path / "found.jsonl"
    record = findings.Findings(path)
    record.check("a sum", "")
    with path.open("a") as file:
        file.write('{"kind": "che')
    assert [row["what"] for row in findings.read(path)] == ["a sum"] and findings.read(tmp_path / "none") == []
    assert json.loads(path.read_text().splitlines()[0])["kind"] == "check"

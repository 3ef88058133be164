"""Ranks that are killed or hang are detected, named and restarted. The ranks are real processes over gloo."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from made_once import made_once
from waiting import LIMIT_SECONDS, eventually

from distattn.launch.attempts import Attempts
from distattn.supervision.heartbeats import Heartbeat

pytestmark = pytest.mark.waits(4)

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support' / 'launching'}"}
BUSY = "rank 1 waits for no other rank and makes no progress: step 6, "
# the message for each kind of killed or hanging rank
KINDS = {
    "kill": "rank 1 was killed by SIGKILL: step 6, computing",
    "abort": "rank 1 was killed by SIGABRT: step 6, computing",
    "exit": "rank 1 ended with exit code 255 without giving a reason: step 6, computing",
    # torchrun takes this for a success
    "leave": "rank 1 ended without giving a reason: step 6, computing",
    "raised": "rank 1 raised RuntimeError: CUDA error: uncorrectable ECC error encountered",
    "stop": r"rank 1 is stopped \(SIGSTOP or a debugger\): step 6, computing",
    "lock": f"{BUSY}reading shard 12",
    "read": f"{BUSY}reading never",
    "interpreter": f"{BUSY}computing",
    "message": "rank 1 waits for a message that does not arrive: step 6, key/value move 3 of layer 17 from rank 2; "
    "the others: all-reduce of the loss",
}
# a barrier and the all-reduces of five steps
COLLECTIVES = 6
ENDS = {"kill": "killed", "abort": "killed", "exit": "killed", "leave": "killed", "raised": "raised"}
HANGS = [kind for kind in KINDS if kind not in ENDS]
# the patience for ranks that hang in a step, and for cases in which a loaded machine must not look like a hang
PATIENCE, ENDLESS = 15.0, 600.0


def command(folder: Path, *cases: dict) -> list[str]:
    cases = [{"patience": PATIENCE if case["name"] in HANGS else ENDLESS} | case for case in cases]
    return [
        sys.executable,
        str(ROOT / "tests" / "support" / "launching" / "supervised_cases.py"),
        str(folder),
        json.dumps(cases),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return made_once(tmp_path_factory, "supervised_ranks", run_cases)


def run_cases(folder: Path) -> None:
    cases = [
        {"name": "whole"},
        *({"name": kind, "fault": {"rank": 1, "step": 5, "kind": kind}} for kind in KINDS),
        {"name": "refused", "fault": {"rank": 2, "step": 3, "kind": "refused"}},
        {"name": "raised at once", "fault": {"rank": 1, "step": 0, "kind": "raised"}},
        {"name": "too often", "fault": {"rank": 0, "step": 3, "kind": "kill", "again": True}, "limit": 1},
        {"name": "forked", "forked": True},
        {"name": "server", "fault": {"rank": 1, "step": 5, "kind": "server is killed"}},
    ]
    done = subprocess.run(
        command(folder, *cases), capture_output=True, text=True, env=ENVIRONMENT, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, done.stderr


def outcome(folder: Path) -> tuple[int, str, list[dict]]:
    """Return the exit code, the launcher's output and the records of the attempts."""
    lines = [line for line in (folder / "said").read_text().splitlines() if line.startswith("distattn: ")]
    return int((folder / "code").read_text()), "\n".join(lines), Attempts(folder / "attempts").rows()


@pytest.mark.full
def test_a_process_forked_from_a_launcher_can_launch_ranks_too(runs):
    assert outcome(runs / "forked")[:2] == (0, "")


def test_an_undisturbed_run_prints_nothing(runs):
    code, output, attempts = outcome(runs / "whole")
    assert code == 0 and output == "" and [attempt["exit_code"] for attempt in attempts] == [0]
    assert sorted(os.listdir(runs / "whole" / "attempts")) == ["attempts.jsonl"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_is_killed_or_hangs_is_named_and_the_run_continues(kind, runs):
    code, output, attempts = outcome(runs / kind)
    assert code == 0 and len(attempts) == 2, output
    first, last = attempts
    assert re.search(KINDS[kind], output) and f"start again on {socket.gethostname()} from step 5" in output, output
    # bitwise equal to a run without a fault
    assert (runs / kind / "losses.jsonl").read_text() == (runs / "whole" / "losses.jsonl").read_text()
    assert first["ranks"] == [1] and last["exit_code"] == 0
    assert first["kind"] == ENDS.get(kind, "hung") and 0 < first["steps"] <= 5
    kept = runs / kind / "attempts" / "001"
    assert (kept / "heartbeats.jsonl").exists() == (kind in HANGS)
    if kind in HANGS:
        answering = [0, 2] if kind == "stop" else [0, 1, 2]
        assert all("faulty_ranks.py" in (kept / f"stacks-{rank}.txt").read_text() for rank in answering)
        assert recorded(kept) == {rank: COLLECTIVES + (rank != 1) for rank in answering}


def recorded(folder: Path) -> dict[int, int]:
    """Return how many collectives each rank has started, according to the saved flight recorders."""
    begun = {}
    for file in folder.glob("flight-recorder-*.json"):
        trace = json.loads(file.read_text())["gloo"]
        assert {entry["profiling_name"] for entry in trace["entries"]} == {"gloo:all_reduce", "gloo:barrier"}
        begun[int(file.stem.rpartition("-")[2])] = int(trace["pg_status"]["0"]["last_enqueued_collective"])
    return begun


def test_a_fork_server_that_is_killed_is_named_and_replaced(runs):
    code, output, attempts = outcome(runs / "server")
    assert code == 0 and [attempt["exit_code"] for attempt in attempts] == [137, 0], output
    assert re.search(
        r"the fork server \(process \d+\) was killed by SIGKILL; all ranks start again on .* from step 5", output
    )
    assert attempts[0]["ranks"] == [] and attempts[0]["kind"] == "killed"
    assert (runs / "server" / "losses.jsonl").read_text() == (runs / "whole" / "losses.jsonl").read_text()


def test_a_rank_that_gives_a_reason_for_its_end_is_not_restarted(runs):
    code, output, attempts = outcome(runs / "refused")
    assert code == 2 and len(attempts) == 1
    assert attempts[0]["why"] == "rank 2 refused with exit code 2: tokens.bin: token 7 is not in the vocabulary."
    assert output.endswith("distattn: rank 2 ended with exit code 2; the other ranks were stopped.")
    # an error in the first step would be raised again
    code, output, attempts = outcome(runs / "raised at once")
    assert code == 1 and len(attempts) == 1 and attempts[0]["kind"] == "raised"


def test_a_rank_that_is_killed_too_often_ends_the_run_and_its_host_is_named(runs):
    code, output, attempts = outcome(runs / "too often")
    assert code == 128 + 9 and len(attempts) == 2
    end, host = output.splitlines()[-2:]
    assert end == "distattn: rank 0 was killed by SIGKILL: step 4, computing; the other ranks were stopped."
    assert host.startswith(f"distattn: rank 0 failed 2 times in a row on {socket.gethostname()}: ")


@pytest.mark.parametrize(("kind", "does"), [("lock", "reading shard 12"), ("interpreter", "computing")])
def test_ranks_end_with_their_launcher_and_tell_what_they_do_until_then(kind, does, tmp_path):
    case = {"name": "run", "fault": {"rank": 1, "step": 5, "kind": kind}}
    launcher = subprocess.Popen(command(tmp_path, case), env=ENVIRONMENT)
    attempts = Attempts(tmp_path / "run" / "attempts")

    def hung() -> dict[int, Heartbeat] | None:
        beats = attempts.beats() or {}
        # earlier steps have the same activities
        if (tmp_path / "run" / "fault.json").exists() or {beat.step for beat in beats.values()} != {5}:
            return None
        activities = [beats[rank].activity for rank in range(3)]
        return (
            beats
            if activities[1] == does and all(activities[rank].startswith("all-reduce") for rank in (0, 2))
            else None
        )

    beats = eventually(hung, "no rank hangs")
    launcher.kill()
    launcher.wait()
    eventually(lambda: not any(Path(f"/proc/{beat.pid}").exists() for beat in beats.values()), "ranks live on")
    assert attempts.beats() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_launcher_that_is_stopped_ends_its_ranks_and_starts_no_others(number, tmp_path):
    case = {"name": "run", "fault": {"rank": 1, "step": 5, "kind": "lock"}}
    launcher = subprocess.Popen(command(tmp_path, case), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    attempts = Attempts(tmp_path / "run" / "attempts")
    eventually(lambda: len(attempts.beats() or {}) == 3, "no ranks")
    launcher.send_signal(number)
    launcher.wait(LIMIT_SECONDS)
    (row,) = attempts.rows()
    assert (row["exit_code"], row["why"]) == (128 + number, f"stopped by {number.name}")

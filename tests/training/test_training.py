"""Training end to end: the same curve for any strategy and number of ranks, and the command that shows it."""

import dataclasses
import functools
import html
import html.parser
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_on_ranks
from tiny_runs import new_run, tiny_config, train_on_rank
from waiting import LIMIT_SECONDS, eventually

from distattn.data.loader import PackLoader
from distattn.driver.context_parallel import ContextParallel
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.ir.plan import Plan
from distattn.launch.attempts import Attempts
from distattn.launch.command_line import no_progress, print_line
from distattn.launch.finish_run import finish_run
from distattn.launch.start_run import start_run
from distattn.parallel.analysis.explain import explain
from distattn.parallel.make_plan import STRATEGIES
from distattn.training.config import run_file as configuration
from distattn.training.config.plan_settings import PlanSettings, attention_config
from distattn.training.config.run_file import Config, ParallelConfig, ReferenceCheckConfig, TrainConfig
from distattn.training.run_data import open_data
from distattn.training.run_folder import RunFolder, StepMetrics
from distattn.training.watch.reference_check import compare_with_reference, run_reference_check

pytestmark = pytest.mark.sampled(7)

ROOT = Path(__file__).parents[2]
STEPS = 20


def small(texts: Path, folder: Path, dtype: str) -> Config:
    return tiny_config(texts, folder, model=dict(dtype=dtype), train=TrainConfig(steps=STEPS))


def curve(texts: Path, folder: Path, dtype: str, ranks: int, strategy: str) -> list[float]:
    config = small(texts, folder, dtype)
    config = dataclasses.replace(
        config, parallel=ParallelConfig(ranks=ranks, strategy=strategy, layout="document_zigzag", min_chunk=16)
    )
    run = new_run(config)
    run_on_ranks(ranks, train_on_rank, run.folder, config)
    return [step.loss for step in run.metrics()]


@pytest.fixture(scope="module")
def curve_of_one_rank(texts, tmp_path_factory):
    return functools.cache(lambda dtype: curve(texts, tmp_path_factory.mktemp("one") / "run", dtype, 1, "ring"))


@pytest.mark.full
@pytest.mark.sampled(20)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_loss_curve_is_the_same_for_every_strategy_and_number_of_ranks(
    texts, tmp_path, curve_of_one_rank, dtype, tolerance, strategy
):
    wanted = curve_of_one_rank(dtype)
    assert len(wanted) == STEPS and wanted[-1] < wanted[0] - 0.5
    # test float32 only on the largest number of ranks
    for ranks in (2, 4) if dtype == "float64" else (4,):
        got = curve(texts, tmp_path / f"{ranks}", dtype, ranks, strategy)
        assert max(abs(a - b) / b for a, b in zip(got, wanted, strict=True)) <= tolerance, ranks


@pytest.mark.full
@pytest.mark.parametrize(("ranks", "size"), [(2, 0), (4, 2)])
def test_ranks_with_packs_of_their_own_train_as_plain_transformers(texts, tmp_path, ranks, size):
    """Compare 20 steps of core-attention disaggregation with a single process that computes one document at a time."""
    parallel = ParallelConfig(ranks=ranks, strategy="cad", data="per_rank", context_parallel_size=size)
    check = ReferenceCheckConfig(steps=STEPS, tolerance=1e-9)
    config = dataclasses.replace(small(texts, tmp_path / "run", "float64"), parallel=parallel, reference_check=check)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, context_length=128))
    run = new_run(config)
    plan = open_data(run, config).plan
    assert all(len(plan.step(step).packs) == 2 for step in range(STEPS))
    run_on_ranks(ranks, train_on_rank, run.folder, config)
    verdict = run_reference_check(run, config)
    # the gradient norm of float64 parameters is summed in another order
    assert verdict["passed"], verdict


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_reference_check_allows_for_the_precision_of_a_dtype(texts, tmp_path, dtype):
    config = dataclasses.replace(
        small(texts, tmp_path / "run", dtype),
        parallel=ParallelConfig(ranks=2),
        reference_check=ReferenceCheckConfig(steps=5),
    )
    run = new_run(config)
    run_on_ranks(2, train_on_rank, run.folder, config)
    assert run_reference_check(run, config)["passed"]
    wrong = dataclasses.replace(config, reference_check=ReferenceCheckConfig(steps=5, tolerance=1e-30))
    assert not compare_with_reference(run, wrong)["passed"]


def distattn(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "distattn.launch.cli", *arguments]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )


@pytest.fixture(scope="module")
def config_file(texts, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("config") / "small.toml"
    config = dataclasses.replace(
        small(texts, Path("out"), "float32"),
        parallel=ParallelConfig(ranks=2),
        reference_check=ReferenceCheckConfig(steps=3),
    )
    configuration.save(dataclasses.replace(config, train=TrainConfig(steps=6)), file)
    return file


def test_one_command_trains_compares_and_leaves_a_run_folder(config_file, tmp_path):
    done = distattn("train", str(config_file), "--parallel.strategy", "allgather", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("preflight: 2 ranks on 1 host") < done.stdout.index("step 1/6")
    assert "step 6/6  loss" in done.stdout and "tokens/s" in done.stdout and "s left" in done.stdout
    assert "largest relative difference to plain transformers" in done.stdout
    assert "\r" not in done.stdout and "\x1b" not in done.stdout
    run = RunFolder(tmp_path / "out")
    assert configuration.load(run.config_file).parallel.strategy == "allgather"
    assert [step.step for step in run.metrics()] == [1, 2, 3, 4, 5, 6]
    assert list((run.folder / "tensorboard").glob("events*"))
    assert "allgather on 2 ranks" in run.explanation_file.read_text()
    checked = json.loads(run.reference_check_file.read_text())
    assert checked["passed"] and len(checked["steps"]) == 3 and checked["loss"] < 1e-4 > checked["grad_norm"]
    page = run.report_file.read_text()
    html.parser.HTMLParser().feed(page)
    assert "<canvas" in page and "data:image/png;base64," in page
    # the page is self-contained and downloads nothing
    assert 'src="http' not in page and "<link" not in page and "<script src" not in page
    verified = distattn("ckpt", "verify", "out", cwd=tmp_path)
    assert verified.returncode == 0 and "step-00000006" in verified.stdout, verified.stdout + verified.stderr
    longer = distattn("resume", "out", "--train.steps", "8", cwd=tmp_path)
    assert longer.returncode == 0 and "step 8/8" in longer.stdout, longer.stderr


@pytest.mark.full
def test_only_json_is_printed_and_an_existing_folder_is_never_touched(config_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    done = distattn(
        "train",
        str(config_file),
        "--json",
        "--reference_check.steps",
        "0",
        "--train.steps",
        "2",
        "--parallel.ranks",
        "1",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row.get("step") for row in rows] == [1, 2, None]
    assert rows[-1]["reference_check"] is None and Path(rows[-1]["run"]).name == "out-2"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.full
def test_a_terminal_gets_a_progress_bar(config_file, tmp_path):
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "distattn.launch.cli",
        "train",
        str(config_file),
        "--reference_check.steps",
        "0",
        "--parallel.ranks",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:
        # the terminal closes when the last process that has it open ends
        pass
    assert process.wait(LIMIT_SECONDS) == 0
    assert b"6/6" in shown and b"tokens/s" in shown and b"\x1b[" in shown


def working(launcher: int) -> bool:
    """Return whether the launcher has a child process with torch loaded: the fork server or the reference check."""
    listed = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True).stdout.split()
    try:
        return any("libtorch" in Path(f"/proc/{child}/maps").read_text() for child in listed)
    except (FileNotFoundError, ProcessLookupError):
        return False


def interrupted(config_file: Path, folder: Path, when: str, *overrides: str) -> subprocess.CompletedProcess:
    """Start a run and press Ctrl-C once a line starts with `when` and its processes are at work. Return the ended
    process.
    """
    command = [sys.executable, "-m", "distattn.launch.cli", "train", str(config_file), *overrides]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def listening() -> None:
        # tests in a shell's background may ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=folder, env=environment, preexec_fn=listening, **pipes)
    assert process.stdout is not None
    assert any(line.startswith(when) for line in process.stdout)
    eventually(lambda: working(process.pid), "no child process imports torch")
    # signal every process of the group, as a terminal does
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=LIMIT_SECONDS)
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


@pytest.mark.parametrize(
    ("when", "overrides"),
    [
        ("run folder", ("--train.steps", "100000")),
        ("step 1/", ("--train.steps", "100000")),
        ("the first", ("--train.steps", "40", "--reference_check.steps", "40", "--parallel.ranks", "1")),
    ],
    ids=["while ranks start", "while training", "during the reference check"],
)
def test_ctrl_c_ends_everything_with_one_sentence(config_file, tmp_path, when, overrides):
    done = interrupted(config_file, tmp_path, when, *overrides)
    assert done.returncode == 130
    assert done.stderr.startswith("distattn: stopped") and done.stderr.count("\n") == 1, done.stderr
    assert (tmp_path / "out" / "corpus.packs").exists()


@pytest.mark.full
def test_a_killed_rank_is_named_and_the_others_are_stopped(config_file, tmp_path):
    command = [
        sys.executable,
        "-m",
        "distattn.launch.cli",
        "train",
        str(config_file),
        "--train.steps",
        "100000",
        "--supervision.max_restarts",
        "0",
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)
    assert process.stdout is not None and any(line.startswith("step 1/") for line in process.stdout)
    beats = Attempts(RunFolder(tmp_path / "out").attempts).beats()
    assert beats is not None
    os.kill(beats[1].pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL: step " in errors and "; the other ranks were stopped" in errors


@pytest.mark.full
def test_a_host_name_need_not_resolve(config_file, tmp_path):
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("unshare --uts is not permitted here")
    run = f"{sys.executable} -m distattn.launch.cli train {config_file} --train.steps 1 --reference_check.steps 0"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["unshare", "--uts", "sh", "-c", f"hostname nowhere.invalid && {run}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr


def test_the_plan_in_the_run_folder_is_the_one_that_trains(texts, tmp_path):
    config = dataclasses.replace(small(texts, tmp_path / "run", "float32"), parallel=ParallelConfig(ranks=1))
    run = start_run(config, no_progress)
    cp = ContextParallel(config=attention_config(config))
    model = config.model
    shape = model.num_attention_heads, model.num_key_value_heads, model.head_size, model.head_size, model.dtype
    data = open_data(run, config)
    ((local,),) = cp.steps(PackLoader(data.plan, data.corpora, rank=0, size=1, steps=1))
    sharded = local["context_parallel"]
    assert sharded.plan(*shape).digest == Plan.load(run.plan_file).digest


def test_the_first_plan_is_made_and_explained_once_for_launch_and_report(texts, tmp_path, monkeypatch):
    calls: list[str] = []

    def counted(name, function):
        return lambda *arguments: calls.append(name) or function(*arguments)

    monkeypatch.setattr(PlanSettings, "plan", counted("plan", PlanSettings.plan))
    monkeypatch.setattr("distattn.launch.start_run.explain", counted("explain", explain))
    config = dataclasses.replace(small(texts, tmp_path / "run", "float32"), parallel=ParallelConfig(ranks=2))
    run = start_run(config, no_progress)
    run.append(run.metrics_file, dataclasses.asdict(StepMetrics(1, 2.0, 1.0, 10, 0.1)))
    assert finish_run(run, config, no_progress, json_lines=False) == 0
    assert calls == ["plan", "explain"]
    page = run.report_file.read_text()
    assert run.explanation_file.read_text().strip() in html.unescape(page) and "data:image/png;base64," in page


def test_the_report_is_written_whatever_becomes_of_the_reference_check(texts, tmp_path, capsys):
    config = dataclasses.replace(
        small(texts, tmp_path / "run", "float32"),
        parallel=ParallelConfig(ranks=1),
        reference_check=ReferenceCheckConfig(steps=1),
    )
    run = start_run(config, no_progress)
    run.append(run.metrics_file, StepMetrics(1, 2.0, 1.0, 10, 0.1, learning_rate=1e-3).as_dict())
    # no rank has written the model's configuration
    with pytest.raises(DistattnError, match="there is no config.json"):
        finish_run(run, config, print_line, json_lines=False)
    assert capsys.readouterr().out.endswith(f"report: {run.report_file}\n")
    assert "did not finish" in run.report_file.read_text()


def test_a_run_refused_before_ranks_start_leaves_no_folder(texts, tmp_path):
    config = dataclasses.replace(
        small(texts, tmp_path / "run", "float32"), parallel=ParallelConfig(ranks=16, strategy="ulysses")
    )
    with pytest.raises(DistattnError, match="ulysses splits 4 query heads over 16 ranks"):
        start_run(config, no_progress)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "latin.txt").write_bytes("grün".encode("latin1"))
    with pytest.raises(DamagedDataError, match="not UTF-8"):
        start_run(small(tmp_path / "texts", tmp_path / "run", "float32"), no_progress)
    assert not (tmp_path / "run").exists()


def compared(tmp_path: Path, ours: list[float], plain: list[float]) -> dict:
    run = RunFolder(tmp_path)
    for number, loss in enumerate(ours, 1):
        run.append(run.metrics_file, dataclasses.asdict(StepMetrics(number, loss, 1.0, 10, 0.1)))
    for number, loss in enumerate(plain, 1):
        run.append(run.replay_file, {"step": number, "loss": loss, "grad_norm": 1.0})
    return compare_with_reference(run, Config(reference_check=ReferenceCheckConfig(steps=3)))


def test_the_comparison_is_relative_and_never_passes_what_is_not_a_number(tmp_path):
    for name in "abcd":
        (tmp_path / name).mkdir()
    verdict = compared(tmp_path / "a", [4.0, 2.0, 1.0], [4.0, 2.0, 1.00005])
    assert verdict["passed"] and verdict["loss"] == pytest.approx(5e-5, rel=1e-3)
    assert not compared(tmp_path / "b", [4.0, float("nan"), 1.0], [4.0, 2.0, 1.0])["passed"]
    assert not compared(tmp_path / "c", [4.0, 2.0, 1.0], [4.0, 2.0, 0.0])["passed"]
    with pytest.raises(DistattnError, match="compares 3 steps; the run has 2, the replay 3"):
        compared(tmp_path / "d", [4.0, 2.0], [4.0, 2.0, 1.0])


@pytest.mark.full
def test_the_reference_check_fails_when_training_differs(config_file, tmp_path):
    done = distattn(
        "train", str(config_file), "--reference_check.tolerance", "1e-30", "--parallel.ranks", "1", cwd=tmp_path
    )
    assert done.returncode == 1 and "differs from plain transformers" in done.stderr


def test_the_replay_does_not_use_distattn():
    source = (ROOT / "distattn" / "training" / "watch" / "reference_replay.py").read_text()
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports and not any("distattn" in line for line in imports)

"""Evaluated documents are not trained, and a pack plan that is too short says what would make it longer."""

import shutil

import numpy as np
import pytest

from distattn.data.files.indexed_file import IndexedFileWriter
from distattn.data.packing.pack_config import load_pack_config, make_configured_plan, open_corpora
from distattn.ir.errors import DistattnError
from distattn.training.config.run_file import Config, DataConfig, ModelConfig, ReferenceCheckConfig, TrainConfig
from distattn.training.config.sections import EvaluationConfig
from distattn.training.held_out import check_held_out
from distattn.training.run_data import open_data
from distattn.training.run_folder import RunFolder

TRAINED = 4


@pytest.fixture
def folder(tmp_path):
    """Write two files of documents, and a copy of the first file under a different name."""
    rng = np.random.default_rng(0)
    for name, documents in (("web", 60), ("books", 20)):
        with IndexedFileWriter(str(tmp_path / name), np.uint16) as writer:
            for _ in range(documents):
                writer.add(rng.integers(0, 100, int(rng.integers(2, 90))))
    for file in tmp_path.glob("web.*"):
        shutil.copy(file, tmp_path / f"copy{file.suffix}")
    return tmp_path


def planned(folder, name, files, steps="steps = 4", epochs=""):
    corpora = "".join(f'[[corpus]]\nname = "{file}s"\nfiles = ["{file}"]\n{epochs}\n' for file in files)
    toml = folder / f"{name}.toml"
    toml.write_text(
        f'plan = "{name}.packs"\n{steps}\n[rule]\ncontext = [[0, 64]]\ntokens_per_step = 128\nwindow = 8\n{corpora}'
    )
    config = load_pack_config(toml)
    make_configured_plan(config, open_corpora(config))
    return str(toml)


def config_of(path, steps=TRAINED, /, **evaluation):
    return Config(
        data=DataConfig(path=path),
        model=ModelConfig(vocab_size=100),
        train=TrainConfig(steps=steps),
        evaluation=EvaluationConfig(every_steps=2, **evaluation) if evaluation else EvaluationConfig(),
        reference_check=ReferenceCheckConfig(steps=0),
    )


def check(folder, config):
    check_held_out(config, open_data(RunFolder(folder / "run"), config))


@pytest.mark.parametrize("files", [["web"], ["books", "copy"]], ids=["the same file", "a copy"])
def test_a_document_that_is_trained_is_not_evaluated(folder, files):
    trained = planned(folder, "trained", ["books", "web"], "steps = 30")
    held = planned(folder, "held", files, "steps = 2")
    with pytest.raises(
        DistattnError, match=r"evaluation.path: document \d+ of corpus (webs|bookss) is evaluated, and trained in"
    ):
        check(folder, config_of(trained, 30, path=held, steps=2))


def test_without_digests_only_the_file_itself_is_the_same(folder):
    # documents of the same lengths with different tokens
    tokens = np.fromfile(folder / "web.bin", np.uint16)
    (99 - tokens).tofile(folder / "copy.bin")
    for file in folder.glob("*.xxh3"):
        file.unlink()
    trained = planned(folder, "trained", ["web"], "steps = 30")
    check(folder, config_of(trained, 30, path=planned(folder, "held", ["copy"], "steps = 2"), steps=2))
    with pytest.raises(DistattnError, match=r"document \d+ of corpus webs is evaluated, and trained in"):
        check(folder, config_of(trained, 30, path=planned(folder, "same", ["web"], "steps = 2"), steps=2))


def test_other_documents_may_be_evaluated(folder):
    check(folder, config_of(planned(folder, "trained", ["web"]), path=planned(folder, "held", ["books"]), steps=4))


def test_a_document_that_is_cut_is_not_trained_and_evaluated(folder):
    """Hold out the last steps of the run's own plan. Splits that cut a document between both sides are refused."""
    path = planned(folder, "trained", ["web"], "steps = 16")
    refused = 0
    for steps in range(4, 15):
        config = config_of(path, steps, steps=16 - steps)
        try:
            check(folder, config)
        except DistattnError as error:
            refused += "evaluation.steps: document" in str(error)
    assert 0 < refused < 11


def test_a_plan_that_is_too_short_says_how_to_make_it_longer(folder):
    path = planned(folder, "trained", ["web"])
    before = open_data(RunFolder(folder), config_of(path)).plan
    with pytest.raises(
        DistattnError, match=r"4 steps; raise steps in .*trained.toml and run distattn data pack --force"
    ):
        open_data(RunFolder(folder), config_of(path, 9))
    planned(folder, "trained", ["web"], "steps = 9")
    after = open_data(RunFolder(folder), config_of(path, 9)).plan
    assert after.order_digest == before.order_digest and after.digest != before.digest
    for step in range(before.steps):
        assert np.array_equal(before.step(step).rows, after.step(step).rows)
    ended = planned(folder, "ended", ["web"], "", "max_epochs = 1")
    with pytest.raises(DistattnError, match="it ends with its corpora, so use fewer"):
        open_data(RunFolder(folder), config_of(ended, 999))
    others = planned(folder, "others", ["web"], "seed = 2\nsteps = 9")
    assert open_data(RunFolder(folder), config_of(others, 9)).plan.order_digest != after.order_digest

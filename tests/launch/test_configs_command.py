"""`distattn configs`, and configurations referred to by name."""

import pytest

from distattn.ir.errors import DistattnError
from distattn.launch import cli
from distattn.training.config import run_file as configuration
from distattn.training.config.shipped_configs import shipped_names


def test_every_shipped_configuration_is_listed_and_loads_by_name_from_anywhere(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["configs"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == shipped_names() and "tiny" in listed
    for name in listed:
        assert configuration.load(name).run.folder == f"runs/{name}"


def test_a_copy_is_shown_text_loads_in_its_folder_and_overwrites_nothing(capsys, tmp_path):
    assert cli.main(["configs", "show", "llama-8b-128k-h100"]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["configs", "copy", "llama-8b-128k-h100", str(tmp_path)]) == 0
    copy = tmp_path / "llama-8b-128k-h100.toml"
    assert copy.read_text() == shown and configuration.load(copy).model.path == str(tmp_path / "models/llama-3-8b")
    assert cli.main(["configs", "copy", "llama-8b-128k-h100", str(tmp_path)]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err


def test_commands_take_a_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "tiny", "--cluster", "h200-1x4", "--docs", "512", "--strategy", "ring"]) == 0
    assert "512 tokens in 1 document on 4 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["show", "tiney"], "did you mean tiny?"),
        (["show"], "wrong number of arguments, 0"),
        (["sow", "tiny"], "there are list, show and copy"),
    ],
)
def test_a_mistake_gives_one_sentence(capsys, arguments, sentence):
    assert cli.main(["configs", *arguments]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


def test_a_file_that_is_not_there_names_what_distattn_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DistattnError, match="configs/tiny.toml: there is no such .*; did you mean tiny, which"):
        configuration.load("configs/tiny.toml")

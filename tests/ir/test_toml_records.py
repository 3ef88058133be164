"""Run files, clusters and pack plans share one reader: the same mistake gives the same message, with its line."""

import pytest

from distattn.cluster import spec
from distattn.data.packing.pack_config import load_pack_config
from distattn.ir.errors import DistattnError
from distattn.training.config import run_file

READERS = {"run": run_file.load, "cluster": spec.load, "packs": load_pack_config}


def refusal(reader: str, folder, text: str) -> str:
    file = folder / "file.toml"
    file.write_text(text)
    with pytest.raises(DistattnError) as refused:
        READERS[reader](str(file))
    lines = str(refused.value).splitlines()
    assert all(line.startswith(f"{file}:") and line.endswith((".", "?")) for line in lines), lines
    return "\n".join(line.removeprefix(f"{file}:") for line in lines)


@pytest.mark.parametrize(
    ("reader", "text", "sentence"),
    [
        ("run", "[train]\nstps = 3", "2: train.stps: unknown key. Did you mean train.steps?"),
        ("cluster", "[device]\ntiel = [1, 1]", "2: device.tiel: unknown key. Did you mean device.tile?"),
        ("packs", "[rule]\nwindwo = 3", "2: rule.windwo: unknown key. Did you mean rule.window?"),
        ("run", "[train]\nsteps = 'x'", '2: train.steps: "x" is not a whole number; give one such as 60.'),
        ("cluster", "nodes = 'x'", '1: nodes: "x" is not a whole number; give one such as 1.'),
        ("packs", "steps = 'x'", '1: steps: "x" is not a whole number; give one such as 1.'),
        ("cluster", "attention = 3", "1: attention: 3 is not a list; give one such as [[attention]]."),
        ("packs", "corpus = 3", "1: corpus: 3 is not a list; give one such as [[corpus]]."),
        ("run", "[data]\ncontext_schedule = [{}]", "2: data.context_schedule.0.context_length: is missing."),
        ("cluster", "[intra_node]\nlatency_us = 3", "1: intra_node.gbs: is missing."),
        ("packs", "[[corpus]]\nfiles = ['a']", "1: corpus.0.name: is missing."),
        ("run", "[train]\nsteps = 1_2_", "2: cannot be read as TOML: "),
        ("cluster", "nodes\n[device]", "1: cannot be read as TOML: "),
    ],
)
def test_the_same_mistake_has_the_same_sentence(reader, text, sentence, tmp_path):
    assert any(line.startswith(sentence) for line in refusal(reader, tmp_path, text).splitlines())


@pytest.mark.parametrize("reader", ["cluster", "packs"])
def test_a_file_that_cannot_be_read_is_named_with_what_to_name_instead(reader, tmp_path):
    with pytest.raises(DistattnError, match=r"no.toml: cannot be read: No such file .*; name the TOML file of a"):
        READERS[reader](str(tmp_path / "no.toml"))
    (tmp_path / "latin.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(DistattnError, match=r"latin.toml: cannot be read as TOML: byte 8 is not UTF-8\."):
        READERS[reader](str(tmp_path / "latin.toml"))


def test_limits_inside_arrays_of_tables_name_their_entry(tmp_path):
    text = "[data]\ncontext_schedule = [{context_length = 4096, steps = 2},\n {context_length = 0}]\n"
    assert refusal("run", tmp_path, text).startswith("3: data.context_schedule.1.context_length: at least 1, not 0.")

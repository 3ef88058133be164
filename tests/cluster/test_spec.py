"""Cluster descriptions: the shipped ones, the user's own files, and refusals."""

import re
from dataclasses import replace
from importlib import resources

import pytest

import distattn as da
from distattn.cluster import spec as describe


@pytest.mark.parametrize("kind", describe.shipped_names())
def test_shipped_descriptions_are_read_and_every_number_has_its_source(kind):
    cluster = describe.load(f"{kind}-1x4")
    assert cluster.ranks == 4 and cluster.name == f"{kind}-1x4"
    text = (resources.files("distattn.cluster") / "descriptions" / f"{kind}.toml").read_text()
    section = text[text.index("[device]") :]
    for line in section.splitlines():
        if re.match(r"(memory|peak|gemm|copy|num_sms|tile|launch|gbs|latency)", line):
            assert "#" in line, f"{kind}: no source next to {line!r}"
    assert "#" in text[text.index("attention = [") : text.index("{ direction")]


@pytest.mark.parametrize("kind", describe.shipped_names())
def test_shipped_descriptions_say_the_same_without_pydantic(kind):
    file = resources.files("distattn.cluster") / "descriptions" / f"{kind}.toml"
    shipped = describe.load(f"{kind}-1x1")
    assert repr(replace(shipped, name=kind)) == repr(replace(describe.load(str(file)), nodes=1, devices=1))


def test_names_give_nodes_and_devices():
    cluster = describe.load("h200-512x8")
    assert (cluster.nodes, cluster.devices, cluster.ranks) == (512, 8, 4096)
    assert cluster.topology == da.Cluster(512, 8)
    assert describe.load("h200-8x8", ranks=16).topology == da.Cluster(2, 8)
    assert describe.load("h200-8x8", ranks=4).topology == da.Cluster(1, 4)
    assert describe.load("h200-8x8", ranks=12).name == "h200-2x6"


def test_a_file_written_is_read_back(tmp_path):
    cluster = describe.load("b200-2x8")
    cluster.save(tmp_path / "mine.toml")
    assert describe.load(tmp_path / "mine.toml") == cluster


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("h300-1x8", "there is no cluster 'h300-1x8'; there are a100-NODESxDEVICES"),
        ("h200", "there is no cluster 'h200'"),
        ("h200-0x8", "there is no cluster 'h200-0x8'"),
        ("h200-1x16", "h200 has at most 512 nodes of 8 devices"),
        ("h200-1024x8", "at most 512 nodes"),
        ("missing.toml", "missing.toml: cannot be read: No such file .*; name the TOML file of a cluster"),
    ],
)
def test_a_missing_cluster_is_named(name, sentence):
    with pytest.raises(da.DistattnError, match=sentence):
        describe.load(name)


def test_more_ranks_than_devices_are_refused():
    with pytest.raises(da.DistattnError, match="17 ranks need more devices than h200-2x8 has: 2 nodes x 8"):
        describe.load("h200-2x8", ranks=17)
    with pytest.raises(da.DistattnError, match="11 ranks do not fill 2 nodes"):
        describe.load("h200-2x8", ranks=11)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("gbs = 50", "inter_node.gbs: above 0, not -1"),
        ("num_sms = 132", 'device.num_sms: "many" is not a whole number'),
        ('direction = "forward"', "attention.0.direction: there is no 'sideways'; there are forward, backward."),
        ("devices = 8", "wrong.toml:7: devices: above 0, not 0"),
        ("[intra_node]", "cannot be read as TOML"),
        ("latency_us = 10 ", "intra_node.latency_us: at least 0, not -5"),
        ("tile = [128, 128]", "device.tile: both sides are above 0, not [0, 0]"),
        ("queries = 1024, keys", "rows must be a full grid of queries and keys, or squares"),
    ],
)
def test_a_wrong_file_is_refused_by_its_key(tmp_path, change, sentence):
    wrong = {
        "gbs = 50": "gbs = -1",
        "num_sms = 132": 'num_sms = "many"',
        'direction = "forward"': 'direction = "sideways"',
        "devices = 8": "devices = 0",
        "[intra_node]": "[intra_node",
        "latency_us = 10 ": "latency_us = -5 ",
        "tile = [128, 128]": "tile = [0, 0]",
        "queries = 1024, keys": "queries = 512, keys",
    }[change]
    text = (resources.files("distattn.cluster") / "descriptions" / "h200.toml").read_text()
    file = tmp_path / "wrong.toml"
    if "queries" in change:
        text = "\n".join(
            line for line in text.splitlines() if "direction =" not in line or "1024" in line or "2048" in line
        )
        text = text.replace("queries = 2048", "queries = 4096")
    file.write_text(text.replace(change, wrong))
    with pytest.raises(da.DistattnError, match=re.escape(sentence)):
        describe.load(file)


def test_a_description_without_one_direction_is_refused(tmp_path):
    text = (resources.files("distattn.cluster") / "descriptions" / "h200.toml").read_text()
    (tmp_path / "half.toml").write_text(text.replace('"backward"', '"forward"'))
    with pytest.raises(da.DistattnError, match="no row of direction backward"):
        describe.load(tmp_path / "half.toml")

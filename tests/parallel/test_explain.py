"""The text and pictures of a plan agree with the plan."""

import struct
import zlib

import numpy as np
import pytest
from cases import LENGTHS, layouts, masks

from distattn.cluster.topology import Cluster
from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import Payload
from distattn.parallel.analysis.explain import explain
from distattn.parallel.analysis.lower_bounds import plain_ring_traffic, plan_traffic
from distattn.parallel.analysis.score_matrix import legible_colours
from distattn.parallel.make_plan import STRATEGIES, make_plan


def plan_for(strategy, mask="documents", ranks=4):
    shape = dict(heads=8, kv_heads=2, head_dim=8, dtype="float32")
    return make_plan(masks()[mask], layouts(LENGTHS, ranks)["zigzag"], strategy=strategy, **shape)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_text_and_the_facts_add_up(strategy):
    plan = plan_for(strategy)
    explanation = explain(plan)
    facts, text = explanation.as_dict(), str(explanation)
    moved = int(plan.bytes()["bytes"].sum())
    assert sum(facts["bytes_by_payload"].values()) == moved
    assert (
        sum(rank["sent_bytes"] for rank in facts["ranks"])
        == sum(rank["received_bytes"] for rank in facts["ranks"])
        == moved
    )
    assert sum(rank["cells_x_heads"] for rank in facts["ranks"]) == plan.call.mask.area() * 8
    assert f"{strategy} on 4 ranks: 200 tokens in 4 documents" in text
    assert f"{facts['max_over_mean']:.2f} of the mean" in text and plan.digest in text
    assert text.count("\nstep ") == plan.forward.steps + plan.backward.steps


def test_many_ranks_are_summarised_by_their_extremes():
    layout = Layout.contiguous([4096], 64)
    plan = make_plan(Mask.causal(4096), layout, strategy="allgather", heads=2, kv_heads=1, head_dim=8, dtype="float32")
    text = str(explain(plan))
    assert "the least and the most loaded of 64 ranks" in text
    assert "\n   0 " in text and "\n  63 " in text and "\n  32 " not in text


@pytest.mark.sampled(7)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_picture_is_a_png_with_colours_where_cells_are(strategy):
    explanation = explain(plan_for(strategy))
    png = explanation.picture()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    fragment = explanation.html()
    assert "data:image/png;base64," in fragment and "<pre>" in fragment
    assert len(np.unique(pixels(png), axis=0)) > 8


@pytest.mark.parametrize("palette", ["turbo", "viridis"])
@pytest.mark.parametrize("count", [1, 8, 200])
def test_every_colour_is_seen_on_white_and_on_dark_pages(palette, count):
    colours = legible_colours(palette, count)
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    # luminance of #14181e, the background of the pages in dark mode
    dark = 0.009
    assert colours.shape == (count, 3) and len(np.unique(colours.round(6), axis=0)) == count
    assert (1.05 / (luminance + 0.05)).min() > 2.2 and ((luminance + 0.05) / (dark + 0.05)).min() > 2.2


def test_a_mask_without_cells_has_a_picture_too():
    mask = Mask.causal(8).cut((0, 1), (5, 8))
    plan = make_plan(mask, Layout.zigzag([8], 2), strategy="ring", heads=2, kv_heads=1, head_dim=8, dtype="float32")
    assert explain(plan).picture().startswith(b"\x89PNG") and "<svg" in explain(plan).html()


def pixels(png: bytes) -> np.ndarray:
    """Return the raw bytes of a PNG in rows of four bytes, which suffice to show that the image is not blank."""
    at, data = 8, b""
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        data += png[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += size + 12
    raw = np.frombuffer(zlib.decompress(data), np.uint8)
    return raw[: len(raw) // 4 * 4].reshape(-1, 4)


def test_bytes_stand_beside_the_least_possible_and_a_plain_ring():
    lengths = [300, 20, 7, 500, 129, 44]
    mask, layout = Mask.documents(lengths), Layout.document_zigzag(lengths, 8, min_chunk=16)
    cluster = Cluster(2, 4)
    shape = dict(heads=8, kv_heads=2, head_dim=8, dtype="float32", cluster=cluster)
    told = explain(make_plan(mask, layout, strategy="allgather", **shape), cluster)
    facts = told.as_dict()
    rows = facts["traffic"]
    assert facts["nodes"] == 2 and rows["plan"] == rows["lower_bound"]
    assert rows["plan"]["total_bytes"] == sum(facts["bytes_by_payload"].values()) < rows["plain_ring"]["total_bytes"]
    assert rows["plan"]["inter_node_bytes"] < rows["plain_ring"]["inter_node_bytes"]
    for label in ("this plan:", "the least for these tasks:", "a plain ring:", "between nodes"):
        assert label in str(told)
    with pytest.raises(DistattnError, match="2 x 3 ranks, the plan 8"):
        explain(told.plan, Cluster(2, 3))


def test_a_plain_ring_on_a_full_mask_moves_what_ours_moves_but_for_the_own_gradient():
    layout = Layout.contiguous([64], 4)
    shape = dict(heads=8, kv_heads=2, head_dim=8, dtype="float32", options={"rotate": "keys"})
    plan = make_plan(Mask.full(64), layout, strategy="ring", **shape)
    own_gradient = 64 * 2 * plan.call.token_head_bytes(Payload.dKV)
    one_node = Cluster(1, 4)
    ours, plain = plan_traffic(plan, one_node), plain_ring_traffic(plan.call, one_node)
    assert plain.total_bytes == ours.total_bytes + own_gradient
    # every second link of the ring crosses nodes
    two_nodes = plain_ring_traffic(plan.call, Cluster(2, 2))
    assert two_nodes.inter_node_bytes * 2 == two_nodes.total_bytes

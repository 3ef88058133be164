"""Planted mistakes in the recurrent layers and convolutions of a hybrid model are named, and a healthy model has no
findings.
"""

import pytest
import torch
from plain_batch import PlainBatch
from planted import plant, script
from test_planted import BF16, diagnoses

import distattn as da
from distattn.doctor.emulation import _convolution, _EmulatedRank, _prefix_softmax, _shifted

# the code that ranks run instead of the batch's recurrence or convolution; `parts` holds the ranks' tokens
CARELESS = """
class Careless:
    def __init__(self, local):
        layout = local.planner.lay_out(local.key.documents)[1]
        self.local, self.rank = local, dist.get_rank()
        self.parts = [torch.from_numpy(layout.tokens(rank).copy()) for rank in range(dist.get_world_size())]
        self.attention = local.attention
        self.documents = torch.arange(97).split(LENGTHS)

    def whole(self, x):
        # of all ranks, in the batch's order; only this rank's part has a gradient
        parts = [None] * len(self.parts)
        dist.all_gather_object(parts, x.detach())
        parts[self.rank] = x
        return torch.cat(parts)[torch.cat(self.parts).argsort()]

    def own(self, part):
        return [part[torch.isin(part, document)] for document in self.documents]

    def recurrence(self, q, k, v, op, g, beta):
        return self.local.recurrence(q, k, v, op, g=g, beta=beta)

    def causal_conv1d(self, x, weight, bias):
        return self.local.causal_conv1d(x, weight, bias=bias)


def forward(model, part):
    return pytorch.forward(model, {**part, "context_parallel": Careless(part["context_parallel"])})
"""
READS = """
class Careless(Careless):
    def recurrence(self, q, k, v, op, g, beta):
        return read(*(self.whole(x) for x in (q, k, v, g, beta)), [one for one in (%s) if len(one)])[self.parts[self.rank]]
"""
CONVOLVES = """
class Careless(Careless):
    def causal_conv1d(self, x, weight, bias):
        whole, out = self.whole(x), torch.zeros(97, 32, dtype=x.dtype)
        for one in (%s):
            out = out.index_copy(0, one, Alone.causal_conv1d(self, whole[one], weight, bias))
        return out[self.parts[self.rank]]
"""
plant(
    {
        "states over the pack": CARELESS + READS % "[torch.arange(97)]",
        "ranks in turn": CARELESS + READS % "torch.cat([torch.cat(self.parts)[torch.isin(torch.cat(self.parts), d)]]) "
        "for d in self.documents",
        "states of a rank": CARELESS + READS % "one for part in self.parts for one in self.own(part)",
        "taps over the pack": CARELESS + CONVOLVES % "[torch.arange(97)]",
        "taps of a rank": CARELESS + CONVOLVES % "self.parts",
        "coarse decays": CARELESS
        + """
class Careless(Careless):
    def recurrence(self, q, k, v, op, g, beta):
        return self.local.recurrence(q, k, v, op, g=g.bfloat16().float(), beta=beta)
""",
        "a convolution of its own": """
class Recurrent(Recurrent):
    def convolved(self, x, context_parallel):
        return self.conv(F.pad(x.t(), (3, 0))[None])[0].t()
""",
    }
)
PLANTED = [
    ("states over the pack", "state not reset"),
    ("ranks in turn", "segments out of order"),
    ("states of a rank", "state not passed on"),
    ("taps over the pack", "convolution not reset"),
    ("taps of a rank", "halo missing"),
    ("a convolution of its own", "halo missing"),
    ("coarse decays", "decay in bf16"),
    ("no lengths", "documents not separated"),
    ("no lengths", "documents not separated", BF16),
    (None, None),
    (None, None, BF16),
]


@pytest.mark.full
def test_mistakes_of_recurrent_layers_are_named_and_right_scripts_have_no_finding(tmp_path):
    texts = [
        script("hybrid", "loop", *filter(None, [name]), dtype=(*dtype, "float32")[0]) for name, _, *dtype in PLANTED
    ]
    wrong = []
    for (name, cause, *dtype), result in zip(PLANTED, diagnoses(tmp_path, texts), strict=True):
        if (result.findings[0].cause if result.findings else None) != cause:
            wrong.append(f"{name} {dtype}: {result}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("distance", [1, -2, 40])
def test_emulated_shifts_match_each_document(distance):
    lengths = [5, 30, 1]
    plain, documents = PlainBatch(lengths), torch.arange(36).split(lengths)
    labels = torch.arange(36)
    assert torch.equal(_shifted(labels, distance, -100, documents), plain.token_shift(labels, distance, fill=-100))


def test_emulated_convolutions_match_each_document():
    lengths = [5, 30, 1]
    plain, documents = PlainBatch(lengths), torch.arange(36).split(lengths)
    x, bias = torch.randn(36, 6), torch.randn(6)
    for weight in (torch.randn(6, 4), torch.randn(6, 3, 4)):
        wanted = plain.causal_conv1d(x, weight, bias=bias)
        torch.testing.assert_close(_convolution(x, weight, bias, documents), wanted)


def test_states_of_documents_are_refused_by_name():
    rank, x = _EmulatedRank(None, 0), torch.zeros(4, 2, 8)
    with pytest.raises(da.DistattnError, match="the doctor does not handle states of documents"):
        rank.recurrence(x, x, x, "linear_attention", return_final_state=True)
    with pytest.raises(da.DistattnError, match="the doctor does not handle states of documents"):
        rank.causal_conv1d(x.flatten(1), torch.zeros(16, 4), initial_state=torch.zeros(1, 16, 3))


def test_emulated_prefix_softmaxes_match_each_document():
    lengths = [5, 30, 1]
    plain, documents = PlainBatch(lengths), torch.arange(36).split(lengths)
    weights, logits, v = torch.rand(36, 2, 3), 30 * torch.randn(36, 2, 3), torch.randn(36, 2, 4)
    wanted = plain.prefix_softmax(weights, logits, v)
    torch.testing.assert_close(_prefix_softmax(weights, logits, v, documents), wanted, rtol=0, atol=2e-5)

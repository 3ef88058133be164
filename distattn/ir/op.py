"""The operation that a call's tasks compute: the tensors of each payload, how parts of one row are joined, the algebra of states.

Attention, recurrences, convolutions and latent attention are planned in the same tables. A *recurrence* reads the tokens of a
document in order and keeps a state S (K, V) for each head:

    S_t = (I - b_t k_t k_t^T) diag(exp g_t) S_(t-1) + b_t k_t v_t^T,    o_t = S_t^T q_t

without b the first factor is I and the last b is 1. A segment of tokens maps the state that enters it affinely, S -> A S + B, and
the gradient of the state that leaves it, backwards, dS -> C + A^T dS. (A, B) and (A, C) are the states that plans move, named by
the tokens that they sum up. The state of a *prefix maximum* is the elementwise maximum of its tokens so far: there is no A, and
two states are joined by their maximum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from distattn.ir.arguments import check_fields, checked
from distattn.ir.errors import DistattnError

# a tensor of a payload: its width, None for one number per token and head; and its dtype: that of the inputs, that of the
# accumulation ("wide"), or "result": that of the accumulation where parts are summed, of the inputs where there is one part
Field = tuple[int | None, str]
KINDS = ("attention", "recurrence", "prefix_max", "convolution", "latent_attention")
MERGES = ("lse", "sum", "never")
DECAYS = ("none", "head", "token", "channel")
_MOST_DIM = 1 << 14


@dataclass(frozen=True)
class Op:
    """The operation that a task computes.

    kind: "attention", "recurrence", "prefix_max", "convolution" or "latent_attention". merge: how two results of one row are
    joined: by log-sum-exp ("lse"), by "sum", or "never", if one task computes a whole row. decay, of a recurrence: g is 0
    ("none"), a number per head that the caller passes separately from the plan ("head"), one per token and head ("token"), or one
    per channel of the key ("channel"). delta: there is a b. rotary_dim, latent_dim: widths of the tensors that latent attention
    moves in place of keys and values.
    """

    name: str
    kind: str = "attention"
    merge: str = "lse"
    decay: str = "none"
    delta: bool = False
    rotary_dim: int = 0
    latent_dim: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for field, value, choices in (
            ("kind", self.kind, KINDS),
            ("merge", self.merge, MERGES),
            ("decay", self.decay, DECAYS),
        ):
            if value not in choices:
                raise DistattnError(
                    f"op {self.name[:60]!r}: {field} must be one of {', '.join(choices)}, not {value[:60]!r}."
                )
        for field, dim in (("rotary_dim", self.rotary_dim), ("latent_dim", self.latent_dim)):
            if not 0 <= dim <= _MOST_DIM or (self.kind == "latent_attention") != (dim > 0):
                raise DistattnError(
                    f"{field} must be 1 to {_MOST_DIM} for latent attention and 0 for others, not {dim}."
                )

    @property
    def is_softmax(self) -> bool:
        """Return whether each row of queries reads keys by a softmax, latents or not."""
        return self.kind in ("attention", "latent_attention")

    @property
    def is_recurrent(self) -> bool:
        """Whether tasks read segments of tokens in order, and states move."""
        return self.kind in ("recurrence", "prefix_max")

    @property
    def is_maximum(self) -> bool:
        """Whether a state is the maximum of its tokens; otherwise it is an affine map (A, B)."""
        return self.kind == "prefix_max"

    @property
    def has_gradient(self) -> bool:
        """Whether there is a backward pass; otherwise backward tables have no rows and nothing is kept."""
        return not self.is_maximum

    @property
    def shared_payloads(self) -> tuple[str, ...]:
        """The payloads with the call's key/value heads, which several heads of tasks share.

        Attention shares keys and values among query heads. A recurrence shares queries and keys among value heads.
        """
        return ("Q", "dQ") if self.is_recurrent else ("KV", "dKV")

    def fields(self, head_dim: int, v_head_dim: int) -> dict[str, tuple[Field, ...]]:
        """Return the tensors of payloads Q, KV, O and dO; dQ and dKV have the fields of Q and KV."""
        if self.kind == "recurrence":
            # decays are multiplied over thousands of tokens, so they are not rounded to half precision
            decay: tuple[Field, ...] = {
                "none": (),
                "head": (),
                "token": ((None, "wide"),),
                "channel": ((head_dim, "wide"),),
            }[self.decay]
            beta: tuple[Field, ...] = ((None, "input"),) if self.delta else ()
            return {
                "Q": ((head_dim, "input"), (head_dim, "input")),
                "KV": ((v_head_dim, "input"), *decay, *beta),
                "O": ((v_head_dim, "result"),),
                "dO": ((v_head_dim, "input"),),
            }
        if self.kind in ("convolution", "prefix_max"):
            return {
                "Q": (),
                "KV": ((v_head_dim, "input"),),
                "O": ((v_head_dim, "result"),),
                "dO": ((v_head_dim, "input"),),
            }
        latent = self.kind == "latent_attention"
        key, value = (self.rotary_dim, self.latent_dim) if latent else (head_dim, v_head_dim)
        return {
            "Q": ((head_dim, "input"),),
            "KV": ((key, "input"), (value, "input")),
            "O": ((v_head_dim, "result"), (None, "wide")),
            "dO": ((v_head_dim, "input"), (None, "wide"), (None, "wide")),
        }

    def transition_shape(self, head_dim: int) -> tuple[int, ...]:
        """Return the shape of one head's A: a matrix, or only its diagonal, or one number if the diagonal is constant."""
        if self.delta:
            return (head_dim, head_dim)
        return (head_dim,) if self.decay == "channel" else (1,)

    @property
    def transition_travels(self) -> bool:
        """Whether A is part of a state that moves; without gates it follows from the number of tokens."""
        return self.delta or self.decay in ("token", "channel")

    def state_numbers(self, head_dim: int, v_head_dim: int, prefix: bool, in_memory: bool = False) -> int:
        """Return the count of numbers in one head's state as it is sent, or as it is held in memory.

        prefix: the state begins with its document, so no state enters it.
        """
        has_transition = not (prefix or self.is_maximum) and (self.transition_travels or in_memory)
        return head_dim * v_head_dim + (prod(self.transition_shape(head_dim)) if has_transition else 0)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; `Op(**values)` is the same op."""
        return asdict(self)


def _recurrence(name: str, decay: str = "none", delta: bool = False) -> Op:
    return Op(name, "recurrence", "never", decay, delta)


ATTENTION = Op("attention")
# keeps a softmax over the tokens so far finite: Milakov and Gimelshein 2018 (online softmax), arXiv 1805.02867
PREFIX_MAX = Op("prefix_max", "prefix_max", "never")
# a convolution is linear in its taps: parts of a row are added
CONVOLUTION = Op("convolution", "convolution", "sum")
# a convolution of one tap, which is 1: RWKV (Peng et al. 2023, arXiv 2305.13048), labels of several tokens ahead
TOKEN_SHIFT = Op("token_shift", "convolution", "sum")
OPS: Mapping[str, Op] = {
    op.name: op
    for op in (
        ATTENTION,
        # Katharopoulos et al. 2020, arXiv 2006.16236
        _recurrence("linear_attention"),
        # Sun et al. 2023, arXiv 2307.08621; Qin et al. 2024 (lightning attention), arXiv 2401.04658
        _recurrence("retention", "head"),
        # Dao and Gu 2024 (Mamba-2), arXiv 2405.21060
        _recurrence("ssd", "token"),
        # Yang et al. 2023, arXiv 2312.06635
        _recurrence("gla", "channel"),
        # Yang et al. 2024, arXiv 2406.06484
        _recurrence("delta_rule", "none", True),
        # Yang, Kautz and Hatamizadeh 2024 (Gated DeltaNet), arXiv 2412.06464
        _recurrence("gated_delta_rule", "token", True),
        # Kimi Team 2025 (Kimi Delta Attention), arXiv 2510.26692
        _recurrence("kda", "channel", True),
        PREFIX_MAX,
        CONVOLUTION,
        TOKEN_SHIFT,
    )
}


@checked
def latent_op(rotary_dim: int, latent_dim: int) -> Op:
    """Return multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434): one rotary key and a latent move for all heads."""
    return Op("latent_attention", "latent_attention", rotary_dim=rotary_dim, latent_dim=latent_dim)


def op_of(op: Op | str) -> Op:
    """Return the op of that name. Raises DistattnError for an unknown name."""
    if isinstance(op, Op):
        return op
    if op not in OPS:
        raise DistattnError(f"op {op!r} does not exist; there are {', '.join(OPS)}.")
    return OPS[op]

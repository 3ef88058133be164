"""The operation that a call's tasks compute: the tensors of payloads, the merging of a row's results, and the algebra of states.

Attention, recurrences, convolutions and latent attention share the same kind of tables. A *recurrence* reads the tokens of a
document in order and keeps a state S (K, V) for each head:

    S_t = (I - b_t k_t k_t^T) diag(exp g_t) S_(t-1) + b_t k_t v_t^T,    o_t = S_t^T q_t

Without b, the first factor is I and the last b is 1. A segment of tokens maps the state that enters it affinely, S -> A S + B,
and maps the gradient of the state that leaves it backwards, dS -> C + A^T dS. Plans move the pairs (A, B) and (A, C) as states,
identified by the tokens that they summarize. The state of a *prefix maximum* is the elementwise maximum over its tokens. It has
no A, and the maximum of two states merges them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from distattn.ir.arguments import check_fields, checked
from distattn.ir.errors import DistattnError

# (width, dtype) of a tensor in a payload. Width None: one number per token and head. The dtype is "input" for the inputs' dtype,
# "wide" for the accumulation dtype, or "result": the accumulation dtype if partial results are summed, otherwise the inputs'
# dtype
Field = tuple[int | None, str]
KINDS = ("attention", "recurrence", "prefix_max", "convolution", "latent_attention")
MERGES = ("lse", "sum", "never")
DECAYS = ("none", "head", "token", "channel")
_MOST_DIM = 1 << 14


@dataclass(frozen=True)
class Op:
    """The operation that a task computes.

    kind: "attention", "recurrence", "prefix_max", "convolution" or "latent_attention". merge: how two results of one row are
    merged: "lse" (by log-sum-exp), "sum", or "never" (one task computes an entire row). decay: a recurrence's g is 0 ("none"),
    one number per head that the caller passes separately from the plan ("head"), one per token and head ("token"), or one per
    token, head and key channel ("channel"). delta: True if a recurrence has b (the delta rule). rotary_dim, latent_dim: widths of
    the tensors that latent attention moves in place of keys and values.
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
        """True if each query reads keys through a softmax, with or without latents."""
        return self.kind in ("attention", "latent_attention")

    @property
    def is_recurrent(self) -> bool:
        """True if tasks read segments of tokens in order, and states move."""
        return self.kind in ("recurrence", "prefix_max")

    @property
    def is_maximum(self) -> bool:
        """True if a state is the maximum of its tokens; otherwise it is an affine map (A, B)."""
        return self.kind == "prefix_max"

    @property
    def has_gradient(self) -> bool:
        """True if there is a backward pass; otherwise backward tables have no rows and nothing is kept."""
        return not self.is_maximum

    @property
    def shared_payloads(self) -> tuple[str, ...]:
        """The payloads with `kv_heads` heads, each of which several of the call's `heads` share.

        Attention shares keys and values among query heads. A recurrence shares queries and keys among value heads.
        """
        return ("Q", "dQ") if self.is_recurrent else ("KV", "dKV")

    def fields(self, head_dim: int, v_head_dim: int) -> dict[str, tuple[Field, ...]]:
        """Return the fields of payloads Q, KV, O and dO, keyed by name; dQ and dKV have the same fields as Q and KV."""
        if self.kind == "recurrence":
            # do not round decays to half precision, because they are multiplied over thousands of tokens
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
        """Return the shape of one head's A: a matrix, its diagonal, or one number if the diagonal is constant."""
        if self.delta:
            return (head_dim, head_dim)
        return (head_dim,) if self.decay == "channel" else (1,)

    @property
    def transition_travels(self) -> bool:
        """True if a state that moves includes A. Otherwise its receiver computes A from the number of tokens."""
        return self.delta or self.decay in ("token", "channel")

    def state_numbers(self, head_dim: int, v_head_dim: int, prefix: bool, in_memory: bool = False) -> int:
        """Return the number of elements in one head's state, as sent or in memory.

        prefix: True if the state starts with its document, so that no state enters it and A is left out.
        """
        has_transition = not (prefix or self.is_maximum) and (self.transition_travels or in_memory)
        return head_dim * v_head_dim + (prod(self.transition_shape(head_dim)) if has_transition else 0)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values; `Op(**values)` is an equal op."""
        return asdict(self)


def _recurrence(name: str, decay: str = "none", delta: bool = False) -> Op:
    return Op(name, "recurrence", "never", decay, delta)


ATTENTION = Op("attention")
# the running maximum of online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867)
PREFIX_MAX = Op("prefix_max", "prefix_max", "never")
# a convolution is linear in its taps, so partial results of a row are added
CONVOLUTION = Op("convolution", "convolution", "sum")
# a convolution with one tap of 1, for RWKV (Peng et al. 2023, arXiv 2305.13048) and labels several tokens ahead
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
    """Return the op of multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434).

    All heads share one rotary key and one latent per token.
    """
    return Op("latent_attention", "latent_attention", rotary_dim=rotary_dim, latent_dim=latent_dim)


def op_of(op: Op | str) -> Op:
    """Return the op with this name, or an Op unchanged. Raise DistattnError for an unknown name."""
    if isinstance(op, Op):
        return op
    if op not in OPS:
        raise DistattnError(f"op {op!r} does not exist; there are {', '.join(OPS)}.")
    return OPS[op]

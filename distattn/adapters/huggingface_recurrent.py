"""Hugging Face transformers: compute recurrent layers and short convolutions by the batch's plans.

Transformers' hybrid models call a few functions of their module (`causal_conv1d_fn`, `torch_chunk_gated_delta_rule`, ...), each
with the keyword arguments of the model's call. `replace_functions` replaces these functions. If its arguments contain a sharded
batch, a replacement computes by the batch's plans; otherwise it calls the original. To add a model, enter it in `MODELS`. To add
a kind of layer, enter its function in `_FUNCTIONS`.
"""

# T tokens on this rank, C channels, W taps, H heads of values, G heads of queries and keys, K key dim, V value dim

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.activations import ACT2FN

from distattn.adapters.huggingface_modules import model_folder
from distattn.adapters.pytorch import MIXING as MIXING
from distattn.adapters.recurrent_layers import l2norm, ssd_scan
from distattn.batch.local_batch import LocalBatch
from distattn.ir.errors import DistattnError
from distattn.kernels.merge import accumulation_dtype

# transformers' folders of models whose layers are computed here; each is tested (tests/adapters/test_hybrid_models.py)
MODELS = (
    "bailing_hybrid",
    "bamba",
    "falcon_h1",
    "granitemoehybrid",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "mamba2",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "zamba2",
)
# models whose recurrent layers are Mamba-1
_MAMBA_1 = ("falcon_mamba", "jamba", "mamba", "zamba")
# the first version of transformers that passes the model's keyword arguments on to the functions in `_FUNCTIONS`
_LEAST = "5.23"


def check_mixing_layer(number: int, config: Any) -> None:
    """Raise DistattnError if the model's layer `number`, whose kind is in `MIXING`, is not supported here."""
    layer = f"layer {number} is a {config.layer_types[number]} layer, which mixes tokens outside of attention"
    if (folder := model_folder(type(config).__module__)) not in MODELS:
        of_mamba_1 = " by the selective scan of Mamba-1, which decays every channel by itself and is not an op here"
        raise DistattnError(
            f"{layer}{of_mamba_1 if folder in _MAMBA_1 else ''}; such layers are computed in models of {', '.join(MODELS)}, "
            f"not of {config.model_type}."
        )
    if Version(transformers.__version__) < Version(_LEAST):
        raise DistattnError(f"{layer}; that needs transformers {_LEAST}, and {transformers.__version__} is installed.")


def replace_functions(module: ModuleType) -> None:
    """Make the recurrent layers in a module of `MODELS` follow the plans of sharded batches.

    module: one of transformers' modeling modules; see `huggingface_modules.patch_model_modules`.
    """
    if model_folder(module.__name__) not in MODELS:
        return
    for name, planned in _FUNCTIONS.items():
        alone = getattr(module, name, None)
        if alone is not None:
            setattr(module, name, _by_plan(planned, alone))


def _by_plan(planned: Callable[..., Any], alone: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(alone)
    def function(*arguments: Any, context_parallel: LocalBatch | None = None, **named: Any) -> Any:
        if context_parallel is None:
            return alone(*arguments, **named)
        return planned(context_parallel, *arguments, **named)

    return function


def _convolution(
    batch: LocalBatch,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **named: Any,
) -> Tensor:
    """Compute a convolution: hidden_states (1, C, T), weight (C, W), bias (C,) -> (1, C, T)."""
    y_TC = batch.causal_conv1d(hidden_states.squeeze(0).transpose(0, 1), weight, bias=bias)
    if activation is not None:
        y_TC = ACT2FN[activation](y_TC)
    return y_TC.transpose(0, 1)[None]


def _delta_rule(
    op: str,
    batch: LocalBatch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **named: Any,
) -> tuple[Tensor, None]:
    """Compute a delta rule and return its outputs, (1, T, H, V), without the final state.

    query, key: (1, T, G, K). value: (1, T, H, V). g: (1, T, H) or (1, T, H, K). beta: (1, T, H).
    """
    _refuse_states(initial_state, output_final_state)
    if use_qk_l2norm_in_kernel:
        query, key = l2norm(query), l2norm(key)
    q_TGK, k_TGK, v_THV, beta_TH = (x.squeeze(0) for x in (query, key, value, beta))
    wide = g.squeeze(0).to(accumulation_dtype(value.dtype))
    return batch.recurrence(q_TGK, k_TGK, v_THV, op, g=wide, beta=beta_TH.to(v_THV.dtype))[None], None


def _state_space(
    batch: LocalBatch,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **named: Any,
) -> Tensor:
    """Compute Mamba-2: hidden_states (1, T, H, V), dt (1, T, H), A, D and dt_bias (H,), B and C (1, T, G, K) -> (1, T, H, V).

    Time steps and the result are fp32 (fp64 for fp64 inputs), as in mamba-ssm's kernels.
    """
    _refuse_states(initial_states, return_final_states)
    if z is not None:
        raise DistattnError("a gate inside the scan of a Mamba-2 layer (z) is not computed.")
    wide = accumulation_dtype(hidden_states.dtype)
    dt_TH = dt.squeeze(0).to(wide)
    dt_TH = dt_TH if dt_bias is None else dt_TH + dt_bias.to(wide)
    dt_TH = (F.softplus(dt_TH) if dt_softplus else dt_TH).clamp(*dt_limit)
    skip_H1 = None if D is None else D[:, None]
    return ssd_scan(batch, hidden_states.squeeze(0), dt_TH, A.to(wide), B.squeeze(0), C.squeeze(0), skip_H1)[None]


def _not_fused(batch: LocalBatch, *arguments: Any, **named: Any) -> None:
    """Return None in place of the fused kernel's result, which makes the layer call the convolution and the scan separately."""


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": functools.partial(_delta_rule, "gated_delta_rule"),
    "chunk_kimi_delta_attention": functools.partial(_delta_rule, "kda"),
    "mamba2_chunk_scan": _state_space,
    "mamba2_split_conv1d_scan_combined": _not_fused,
}


def _refuse_states(initial: Tensor | None, final: bool) -> None:
    if initial is not None or final:
        raise DistattnError(
            "recurrent layers of a sharded batch keep no cache (use_cache=False); generate inside "
            "huggingface.single_process_attention(model)."
        )

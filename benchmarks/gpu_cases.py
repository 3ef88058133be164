"""Cases and contestants of the GPU benchmark."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import Unsupported
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import distattn as da
from distattn.kernels.flash import attention as flash_attention
from distattn.kernels.gluon import attention as gluon_attention
from distattn.kernels.gluon import split as gluon_split
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.spec import KernelRequirements, ScoreMod
from distattn.kernels.triton import attention as triton_attention
from distattn.kernels.triton.launch import run_launch, schedule_to_device


@dataclass(frozen=True)
class Case:
    """A mask over `tokens` tokens, with `heads` (query, KV), `dims` (query and key, value), a direction and a dtype."""

    pattern: str
    tokens: int
    heads: tuple[int, int]
    dims: tuple[int, int]
    direction: str
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        (h, k), (d, e) = self.heads, self.dims
        return (
            f"{self.direction} {self.pattern} {self.tokens // 1024}K heads {h}:{k} dims {d}/{e} {str(self.dtype)[6:]}"
        )

    @property
    def mask(self) -> da.Mask:
        return mask_of(self.pattern, self.tokens)

    @property
    def flops(self) -> int:
        """The floating-point operations: two products over the mask's area forward, five backward (without recomputation)."""
        (h, _), (d, e) = self.heads, self.dims
        per_cell = 2 * (d + e) if self.direction == "forward" else 2 * (3 * d + 2 * e)
        return int(self.mask.area()) * h * per_cell


@dataclass(frozen=True)
class Inputs:
    """The inputs of a case: q, do (tokens, heads, dim) and k, v (tokens, KV heads, dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor


# a function that runs a contestant once and returns o or (dq, dk, dv), with the token dimension first
Run = Callable[[], Tensor | tuple[Tensor, ...]]


@cache
def lengths_of(tokens: int) -> tuple[int, ...]:
    """Return heavy-tailed document lengths, as in web corpora, each at most a quarter of the axis."""
    generator = np.random.default_rng(0)
    out: list[int] = []
    while sum(out) < tokens:
        out.append(int(min(tokens // 4, max(16, generator.pareto(0.9) * tokens / 256), tokens - sum(out))))
    return tuple(out)


@cache
def mask_of(pattern: str, tokens: int) -> da.Mask:
    """Return the mask of a pattern."""
    return {
        "full": lambda: da.Mask.full(tokens),
        "causal": lambda: da.Mask.causal(tokens),
        "documents": lambda: da.Mask.documents(lengths_of(tokens)),
        "window": lambda: da.Mask.sliding_window(tokens, 1023),
        "block-causal": lambda: da.Mask.block_causal(tokens, 512),
        "prefix": lambda: da.Mask.prefix_lm(tokens, tokens // 4),
        "shared question": lambda: da.Mask.shared_question([tokens // 4] + [tokens // 16] * 12),
        "global window": lambda: da.Mask.global_sliding_window(tokens, 511, 511, 64),
    }[pattern]()


def inputs_of(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Return random tensors: on zeros, kernels would be faster than on real data."""
    generator = torch.Generator(device).manual_seed(seed)
    (h, k), (d, e) = case.heads, case.dims

    def random(heads: int, dim: int) -> Tensor:
        return torch.randn(case.tokens, heads, dim, generator=generator, device=device, dtype=torch.float32).to(
            case.dtype
        )

    return Inputs(random(h, d), random(k, d), random(k, e), random(h, e))


def ours(tier: ModuleType) -> Callable[[Case, Inputs], Run]:
    """Return a contestant: one of our kernels on the entire mask, launched as `attention` launches it, with o in fp32."""

    def make(case: Case, x: Inputs) -> Run:
        work, score = prepared(tier, case, case.mask, x.q.device), ScoreMod(case.dims[0] ** -0.5)
        o, lse = tier.forward(x.q, x.k, x.v, work, score)
        if case.direction == "forward" and not hasattr(tier, "forward_launch"):
            return lambda: tier.forward(x.q, x.k, x.v, work, score, into=(o, lse))[0]
        if case.direction == "forward":
            launch = tier.forward_launch(x.q, x.k, x.v, o, lse, work, score)

            def forward() -> Tensor:
                run_launch(launch)
                return o

            return forward
        delta = (x.do.float() * o).sum(-1)
        return lambda: tier.backward(x.do, x.q, x.k, x.v, lse, delta, work, score)

    return make


def ring(tier: ModuleType, chunks: int = 8) -> Callable[[Case, Inputs], Run]:
    """Return a contestant: one of our kernels in `chunks` steps over the keys, merged by the merge epilogue."""

    def make(case: Case, x: Inputs) -> Run:
        if case.direction != "forward":
            raise Unsupported("the ring of epilogues is timed forward")
        n, score, steps = case.tokens // chunks, ScoreMod(case.dims[0] ** -0.5), []
        o = torch.empty(*x.q.shape[:2], case.dims[1], device=x.q.device)
        lse = torch.empty(x.q.shape[:2], device=x.q.device)
        for i in range(chunks):
            part = case.mask.cut((0, case.tokens), (i * n, (i + 1) * n))
            work = prepared(tier, case, part, x.q.device)
            steps.append(tier.forward_launch(x.q, x.k, x.v, o, lse, work, score, merge=i > 0))

        def forward() -> Tensor:
            for step in steps:
                run_launch(step)
            return o

        return forward

    return make


def step(tier: ModuleType, merge: bool) -> Callable[[Case, Inputs], Run]:
    """Return a contestant: one launch that writes fp32, or merges if `merge` is set, to show the extra cost of a ring step."""

    def make(case: Case, x: Inputs) -> Run:
        if case.direction != "forward" or case.pattern not in ("full", "causal"):
            raise Unsupported("epilogues are compared forward, full and causal")
        work, score = prepared(tier, case, case.mask, x.q.device), ScoreMod(case.dims[0] ** -0.5)
        o, lse = tier.forward(x.q, x.k, x.v, work, score)
        # merging a result with itself does not change it
        launch = tier.forward_launch(x.q, x.k, x.v, o, lse, work, score, merge=merge)

        def forward() -> Tensor:
            run_launch(launch)
            return o

        return forward

    return make


def prepared(tier: ModuleType, case: Case, mask: da.Mask, device: torch.device) -> Any:
    """Return a kernel's schedule for a mask with the case's shapes, on the device. Raise Unsupported if the kernel
    cannot serve the call."""
    demand = KernelRequirements(case.dtype, *case.dims, device)
    if why_not := tier.unsupported_reason(demand):
        raise Unsupported(why_not)
    return schedule_to_device(tier.prepare(LaunchMask.from_mask(mask, *case.heads), demand), device)


def sdpa(backend: SDPBackend) -> Callable[[Case, Inputs], Run]:
    """Return a contestant: PyTorch's scaled_dot_product_attention with one of its backends, for full and causal masks."""

    def make(case: Case, x: Inputs) -> Run:
        if case.pattern not in ("full", "causal"):
            raise Unsupported("scaled_dot_product_attention takes no such mask but as a dense matrix")
        q, k, v = (heads_first(part) for part in (x.q, x.k, x.v))

        def forward() -> Tensor:
            with sdpa_kernel(backend):
                causal = case.pattern == "causal"
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

        return differentiated(case, forward, (q, k, v), heads_first(x.do), lambda y: y[0].transpose(0, 1))

    return make


def flex(case: Case, x: Inputs) -> Run:
    """Return a run of compiled FlexAttention with the mask as a BlockMask."""
    from torch.nn.attention.flex_attention import flex_attention

    block_mask = da.block_mask(case.mask, device=x.q.device)
    q, k, v = (heads_first(part) for part in (x.q, x.k, x.v))
    # reset the compiler for every case: once past its recompilation limit, it would run unfused without a warning
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> Tensor:
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])

    return differentiated(case, forward, (q, k, v), heads_first(x.do), lambda y: y[0].transpose(0, 1))


def varlen(case: Case, x: Inputs) -> Run:
    """Return a run of PyTorch's variable-length flash attention (FlashAttention 2), for masks that cu_seqlens can express."""
    from torch.nn.attention.varlen import varlen_attn

    cu, longest, _, window = packed(case, x.q.device)
    more = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    q, k, v = (part.detach() for part in (x.q, x.k, x.v))

    def forward() -> Tensor:
        return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=window, **more)

    return differentiated(case, forward, (q, k, v), x.do, lambda y: y)


def packed(case: Case, device: torch.device) -> tuple[Tensor, int, bool, tuple[int, int]]:
    """Return the mask as arguments for a varlen kernel: (cu_seqlens, longest document, causal, window)."""
    try:
        ends, longest, causal, window = da.cu_seqlens(case.mask)
    except da.DistattnError as error:
        raise Unsupported(str(error)) from None
    return torch.from_numpy(ends).to(device), longest, causal, window


def flash2(case: Case, x: Inputs) -> Run:
    """Return a run of FlashAttention 2 from its own package."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise Unsupported(f"flash_attn cannot be imported ({error})") from None
    cu, longest, causal, window = packed(case, x.q.device)
    q, k, v = (part.detach() for part in (x.q, x.k, x.v))

    def forward() -> Tensor:
        # if causal is set, a window ends at the query's own position
        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=causal, window_size=window)

    return differentiated(case, forward, (q, k, v), x.do, lambda y: y)


def installed_flash3() -> Path | None:
    """Return the path of the loadable build in an installed flash_attn_3 package, or None."""
    spec = importlib.util.find_spec("flash_attn_3")
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("_C*.so"))), None)


def flash3(library: Path | None) -> Callable[[Case, Inputs], Run]:
    """Return a contestant: FlashAttention 3 from a loadable build, such as flash_attn_3/_C.so in xformers 0.0.34.

    Arguments are passed by name, following the operators' schemas, which differ between builds.
    """

    def make(case: Case, x: Inputs) -> Run:
        build = library or installed_flash3()
        if build is None:
            raise Unsupported("no build of FlashAttention 3: pass --fa3 PATH/_C.so")
        # load the CUDA runtime first: the build expects it to be loaded
        ctypes.CDLL("libcudart.so.12", ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(build))
        cu, longest, _, (left, right) = packed(case, x.q.device)
        causal = (left, right) == (-1, 0)
        values: dict[str, Any] = {
            "q": x.q, "k": x.k, "v": x.v, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest,
            "max_seqlen_k": longest, "softmax_scale": case.dims[0] ** -0.5, "is_causal": causal,
            "window_size_left": -1 if causal else left, "window_size_right": -1 if causal else right,
        }  # fmt: skip
        forward = by_schema(torch.ops.flash_attn_3.fwd.default, values)
        if case.direction == "forward":
            return lambda: forward()[0]
        o, lse, *_ = forward()
        values |= {"dout": x.do, "out": o, "softmax_lse": lse, "deterministic": False}
        # some builds write the gradients to these tensors, others return the gradients as their first results
        gradients = {"dq": torch.empty_like(x.q), "dk": torch.empty_like(x.k), "dv": torch.empty_like(x.v)}
        operator = torch.ops.flash_attn_3.bwd.default
        filled = {argument.name for argument in operator._schema.arguments} >= set(gradients)
        backward = by_schema(operator, values | gradients)
        return lambda: (lambda results: tuple(gradients.values()) if filled else tuple(results[:3]))(backward())

    return make


def tutorial(path: Path | None) -> Callable[[Case, Inputs], Run]:
    """Return a contestant: Triton's tutorial (06-fused-attention.py), for full and causal masks without grouped heads."""

    def make(case: Case, x: Inputs) -> Run:
        if path is None:
            raise Unsupported("no copy of Triton's tutorial: pass --tutorial PATH/06-fused-attention.py")
        if case.pattern not in ("full", "causal") or case.heads[0] != case.heads[1] or case.dims[0] != case.dims[1]:
            raise Unsupported("the tutorial computes full and causal masks of equal heads and dims")
        q, k, v = (heads_first(part) for part in (x.q, x.k, x.v))
        function = loaded(path)._attention
        # later versions have an additional argument, for warp specialization
        more = (False,) * (len(inspect.signature(function.forward).parameters) - 6)

        def forward() -> Tensor:
            return function.apply(q, k, v, case.pattern == "causal", case.dims[0] ** -0.5, *more)

        return differentiated(case, forward, (q, k, v), heads_first(x.do), lambda y: y[0].transpose(0, 1))

    return make


@cache
def loaded(path: Path) -> ModuleType:
    """Load a Python file as a module."""
    spec = importlib.util.spec_from_file_location("triton_tutorial", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_schema(operator: Any, values: dict[str, Any]) -> Callable[[], Any]:
    """Return a function that calls an operator with the `values` that its schema names. All other arguments get their
    defaults, or None."""
    arguments = {a.name: values[a.name] for a in operator._schema.arguments if a.name in values}
    others = {a.name: None for a in operator._schema.arguments if a.name not in values and not a.has_default_value()}
    return lambda: operator(**arguments, **others)


def differentiated(
    case: Case, forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], do: Tensor, back: Callable[[Tensor], Tensor]
) -> Run:
    """Return a run of a rival's forward pass, or of its backward pass alone through autograd. back: moves the token
    dimension back to the front."""
    if case.direction == "forward":
        return lambda: back(forward())
    for x in inputs:
        x.requires_grad_()
    o = forward()
    return lambda: tuple(back(grad) for grad in torch.autograd.grad(o, inputs, do, retain_graph=True))


def heads_first(x: Tensor) -> Tensor:
    """Return a contiguous leaf tensor (1, heads, tokens, dim) from x (tokens, heads, dim)."""
    return x.detach().transpose(0, 1)[None].contiguous()


# our tiers, keyed by the contestant's name
TIERS = {
    "distattn triton": triton_attention,
    "distattn gluon": gluon_attention,
    "distattn gluon_split": gluon_split,
    "distattn flash": flash_attention,
}


def contestants(fa3: Path | None, tutorial_file: Path | None) -> dict[str, Callable[[Case, Inputs], Run]]:
    """Return the tiers and their rivals, in the order of the table."""
    return {
        **{name: ours(tier) for name, tier in TIERS.items()},
        "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "flex compiled": flex,
        "varlen flash": varlen,
        "flash attention 2": flash2,
        "flash attention 3": flash3(fa3),
        "triton tutorial": tutorial(tutorial_file),
    }


def epilogues() -> dict[str, Callable[[Case, Inputs], Run]]:
    """Return contestants that show the extra cost of a ring step's result, for two tiers."""
    return {
        f"{name}, {label}": run
        for name, tier in list(TIERS.items())[:2]
        for label, run in (
            ("ring of 8", ring(tier)),
            ("fp32 write", step(tier, merge=False)),
            ("fp32 merge", step(tier, merge=True)),
        )
    }


def auto_choice(case: Case, device: torch.device) -> str:
    """Return the kernel that kernel="auto" chooses for a case by trial, or the reason why it does not choose any."""
    (heads, kv_heads), (dim, v_dim) = case.heads, case.dims
    shape = dict(heads=heads, kv_heads=kv_heads, head_dim=dim, v_head_dim=v_dim, dtype=str(case.dtype)[6:])
    plan = da.make_plan(case.mask, da.Layout.contiguous([case.tokens], 1), strategy="ring", **shape)
    try:
        return da.prepare(plan, device=device, proven=False).key.kernel
    except da.DistattnError as refusal:
        return f"none: {refusal}"

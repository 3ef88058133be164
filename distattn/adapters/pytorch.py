"""Plain PyTorch: your own training loop, with `fully_shard` (FSDP2), DDP, or gradients that you sum yourself.

mesh = init_device_mesh("cuda", (replicas, degree), mesh_dim_names=("dp", "cp"))
cp = context_parallel(mesh, strategy="ring")
shard_parameters(model, mesh)
cp.loss_scale(ProbeTarget(model))
for micro_batches in cp.steps(loader):
    for batch in micro_batches:
        local_loss(model, batch).backward()
"""

# T tokens on this rank, V vocabulary

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from distattn.adapters.router_loss import router_loss
from distattn.batch.local_batch import LocalBatch
from distattn.batch.packed_batch import IGNORE_INDEX, int64_labels
from distattn.driver.context_parallel import ContextParallel
from distattn.driver.parameter_probe import ProbedParameter, held_part
from distattn.ir.errors import DistattnError
from distattn.kernels.merge import accumulation_dtype
from distattn.memory.tiled_loss import LogitChange, TiledLoss
from distattn.ops.current_micro_batch import current_micro_batch
from distattn.parallel.attention_config import AttentionConfig

# kinds of layers in transformers' configurations that read other tokens through a recurrence or a convolution
MIXING = ("linear_attention", "conv", "hybrid")
# common names for the layer that computes logits in users' models
_OUTPUT_LAYERS = ("lm_head", "head", "output", "unembedding")


def context_parallel(
    mesh: DeviceMesh, dim: str = "cp", *, config: AttentionConfig | None = None, **settings: Any
) -> ContextParallel:
    """Create a `ContextParallel` over a mesh of data- and context-parallel ranks. The loss covers the entire mesh.

    config, settings: as for `ContextParallel`. With replicated data, the ranks along `dim` split a batch. With
    data="per_rank", attention is shared over the entire mesh. The ranks along `dim`, which must be the last dimension, hold the
    same batch; if the mesh has no such dimension, each rank has its own batch.
    """
    names = mesh.mesh_dim_names or ()
    all_ranks = gradient_mesh(mesh).get_group()
    config = AttentionConfig.of(config, **settings)
    if config.data == "per_rank" and config.context_parallel_size is None:
        if dim in names and names[-1] != dim:
            raise DistattnError(f"neighbouring ranks hold the same batch: {dim!r} has to be the mesh's last dim.")
        size = mesh[dim].size() if dim in names else 1
        return ContextParallel(all_ranks, config=config, context_parallel_size=size)
    if config.data == "per_rank":
        return ContextParallel(all_ranks, config=config)
    if dim not in names:
        raise DistattnError(f"the mesh has dims {', '.join(names) or 'without names'}, none called {dim!r}.")
    return ContextParallel(mesh[dim].get_group(), loss_group=all_ranks, config=config)


def gradient_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the mesh flattened to the one dimension over which `fully_shard` must shard parameters and reduce gradients."""
    return mesh if mesh.ndim == 1 else mesh._flatten("_".join(mesh.mesh_dim_names or ()))


def inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a transformers model's keyword arguments for a sharded batch."""
    return {name: batch[name] for name in ("input_ids", "position_ids", "context_parallel")} | {"use_cache": False}


def forward(model: torch.nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Compute the logits (1, T, V) for a sharded batch's loss, with a transformers model or your own.

    Your model gets whichever of input_ids, position_ids (both (1, T)) and context_parallel its forward names. It must name
    context_parallel, and return logits or an object with `logits`. Raises DistattnError if it takes no context_parallel, or if a
    model with a router loss is trained, since the logits do not contain that loss.
    """
    out = _output(model, batch)
    if torch.is_grad_enabled() and getattr(out, "aux_loss", None) is not None:
        raise DistattnError(
            f"{type(unwrapped(model)).__name__} has a router loss (output_router_logits), which is not in its logits: call "
            "pytorch.local_loss, or add router_loss.router_loss(model, output, batch) to loss_of(output.logits, batch)."
        )
    return _logits(out)


def logits_of(model: torch.nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Compute the same logits as `forward`, for evaluation and probes, where a router loss does not matter."""
    return _logits(_output(model, batch))


def _logits(output: Any) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def _output(model: torch.nn.Module, batch: Mapping[str, Any]) -> Any:
    out = model(**_accepted(unwrapped(model), inputs(batch)))
    local = batch["context_parallel"]
    if isinstance(local, LocalBatch) and (unused := local.planner.overrides.unused):
        raise DistattnError(f"layers= names layer {min(unused)}, but the model has no attention layer of that number.")
    if not getattr(local, "used", True):
        raise DistattnError(
            f"{type(unwrapped(model)).__name__} did not ask for attention: each rank has read its own tokens "
            'only. Models of transformers need attn_implementation="distattn", and attention layers.'
        )
    kinds = getattr(getattr(unwrapped(model), "config", None), "layer_types", None) or ()
    mixing = sorted({kind for kind in kinds if kind in MIXING})
    if isinstance(local, LocalBatch) and mixing and not local.mixed:
        raise DistattnError(
            f"the {', '.join(mixing)} layers of {type(unwrapped(model)).__name__} did not ask for their plans: each rank has "
            "read its own tokens only. Install the version of transformers that this distattn was tested with."
        )
    return out


def _accepted(model: torch.nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that a model's forward names, or all of them if it takes any keyword argument."""
    names = inspect.signature(model.forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in names.values()):
        return arguments
    if "context_parallel" not in names:
        raise DistattnError(
            f"{type(model).__name__}.forward takes no context_parallel: add this argument, pass the batch's, and let layers call "
            "context_parallel.attention(q, k, v) of (tokens, heads, dim)."
        )
    return {name: value for name, value in arguments.items() if name in names}


def local_loss(
    model: torch.nn.Module,
    batch: Mapping[str, Any],
    loss: TiledLoss | None = None,
    on_token_losses: Callable[[Tensor, Mapping[str, Any]], None] | None = None,
) -> Tensor:
    """Compute this rank's share of the loss: the sum of its token losses times the batch's loss scale, plus any router loss.

    A transformers mixture-of-experts model has a router loss if its config sets `output_router_logits` (see `router_loss`).

    loss: if given, compute the loss over tiles of tokens, so that the logits of all tokens never exist at the same time, and
    call on_token_losses with each token's cross-entropy (T,), detached, and the batch. Raises DistattnError if the model's
    output layer is unknown or not linear, or if the model changes logits in a way that a tiled loss does not support.
    """
    if loss is None:
        out = _output(model, batch)
        return with_router_loss(loss_of(_logits(out), batch), model, out, batch)
    if hasattr(model, "_orig_mod"):
        raise DistattnError(
            "a tiled loss is computed inside the model's forward: compile the layers, not the whole model."
        )
    inner = unwrapped(model)
    with loss.instead_of_logits(output_layer_of(inner), batch["labels"], logit_change(inner)) as output:
        out = _output(model, batch)
    loss_sum = output.loss_sum(_logits(out), inner)
    if on_token_losses is not None and output.token_losses_T is not None:
        on_token_losses(output.token_losses_T, batch)
    return with_router_loss(loss_sum * batch["loss_scale"], model, out, batch)


def with_router_loss(loss: Tensor, model: torch.nn.Module, output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Add this rank's share of the router loss (see `router_loss`) to `loss`, if the model's output has a router loss."""
    share = router_loss(unwrapped(model), output, batch)
    if share is not None and current_micro_batch() is not None:
        raise DistattnError(
            "a router loss reads tensors inside of layers, which take turns with other micro-batches; leave OverlapSchedule out."
        )
    return loss if share is None else loss + share


def logit_change(model: torch.nn.Module) -> LogitChange:
    """Return how a transformers model changes logits after its output layer, according to its configuration."""
    config = getattr(model, "config", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    # Granite divides by its logits_scaling
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return LogitChange(scale, getattr(config, "final_logit_softcapping", None) or 0.0)


def loss_of(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Compute this rank's share of the loss from logits (1, T, V), without any router loss."""
    logits_TV = logits.flatten(0, -2)
    logits_and_labels = logits_TV.to(accumulation_dtype(logits_TV.dtype)), int64_labels(batch["labels"]).flatten()
    return F.cross_entropy(*logits_and_labels, ignore_index=IGNORE_INDEX, reduction="sum") * batch["loss_scale"]


def shard_parameters(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Apply `fully_shard` over the entire mesh to each layer of a transformers model and to the rest. Gradients are summed."""
    flat = gradient_mesh(mesh)
    for layer in model.get_decoder().layers:  # type: ignore[operator]
        fully_shard(layer, mesh=flat)
    fully_shard(model, mesh=flat)
    sum_fsdp_gradients(model)


def sum_fsdp_gradients(model: torch.nn.Module) -> None:
    """Let FSDP2 sum gradients over ranks. By default, it averages them, which losses would have to undo.

    The norms in transformers' models round gradients to float32 even in a float64 model. Multiplying a gradient by 3
    rounds it differently from multiplying it by 2, so with averaging, the float64 loss curves of 3 ranks and of 2
    ranks would differ by 1e-8.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # by default, FSDP2 asks the backend to multiply while it sums, which gloo cannot do
            module.set_force_sum_reduction_for_comms(True)


class ProbeTarget:
    """Your own training loop, which `ContextParallel.loss_scale` probes between steps, with FSDP2's synchronization on.

    forward: computes logits from a batch, by default by calling a transformers model. reduce: reduces gradients after backward;
    nothing by default. output_layer: the linear layer that computes logits, by default that of `output_layer_of`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        forward: Callable[[Mapping[str, Any]], Tensor] | None = None,
        reduce: Callable[[], None] | None = None,
        output_layer: torch.nn.Module | None = None,
    ):
        self.model, self._reduce = model, reduce
        self._forward = forward or (lambda batch: logits_of(model, batch))
        self._output_layer = output_layer

    def layer(self) -> torch.nn.Module:
        """Return the output layer, or another layer that is trained if the output layer is frozen."""
        return trained_layer(self.model, self._output())

    def vocab_rows(self) -> int:
        """Return the number of rows for the full vocabulary (a DTensor's shape is global)."""
        weight: Any = self._output().weight
        return weight.shape[0]

    def backward(self, batch: Mapping[str, Any], loss_of: Callable[[Tensor], Tensor]) -> None:
        """Run the forward pass, the backward pass and the reduction as the training loop does."""
        loss_of(self._forward(batch)).backward()
        if self._reduce is not None:
            self._reduce()

    def inputs(self, x: Tensor) -> Tensor:
        """Return the layer's input unchanged."""
        return x

    def gradient(self) -> Tensor:
        """Return the full gradient of the layer's weight, gathering it if it is sharded."""
        weight: Any = self.layer().weight
        return full_tensor(weight.grad)

    def parameters(self) -> list[ProbedParameter]:
        """Return all parameters of the model, or FSDP2's shards of them."""
        return probed_parameters(self.model, lambda parameter: parameter.grad)

    @contextmanager
    def preserve_state(self) -> Iterator[None]:
        """Set gradients aside while the context is open.

        Raises DistattnError if FSDP2 holds gradients that cannot be set aside.
        """
        for module in self.model.modules():
            _check_synchronized(module)
            if isinstance(module, FSDPModule):
                # after an evaluation, the root's parameters are still gathered, and gathered parameters do not receive
                # gradients
                module.reshard()
        with gradients_aside(self.model):
            yield

    def _output(self) -> torch.nn.Module:
        return self._output_layer or output_layer_of(unwrapped(self.model))


def unwrapped(model: Any) -> Any:
    """Return the module inside torch.compile, DDP, a DeepSpeed engine or Megatron's wrappers."""
    while True:
        inside = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inside, torch.nn.Module):
            return model
        model = inside


def output_layer_of(model: torch.nn.Module) -> torch.nn.Module:
    """Return the layer that computes logits: the one that transformers names, or a linear layer with a common name.

    Raises DistattnError if there is no such layer.
    """
    find = getattr(model, "get_output_embeddings", None)
    layer = find() if find is not None else None
    named = (getattr(model, name, None) for name in _OUTPUT_LAYERS)
    layer = layer or next((module for module in named if isinstance(module, torch.nn.Linear)), None)
    if layer is None:
        raise DistattnError(f"the layer of {type(model).__name__} that makes logits is unknown; pass output_layer=.")
    return layer


def trained_layer(model: torch.nn.Module, output_layer: Any) -> torch.nn.Module:
    """Return the output layer if it is trained, otherwise the last trained linear layer (LoRA)."""
    trained = [
        module for module in model.modules() if isinstance(module, torch.nn.Linear) and module.weight.requires_grad
    ]
    if output_layer.weight.requires_grad:
        return output_layer
    if not trained:
        raise DistattnError(
            "the model has no linear layer that is trained: how gradients are reduced cannot be measured."
        )
    return trained[-1]


def probed_parameters(model: Any, gradient_of: Callable[[Any], Tensor | None]) -> list[ProbedParameter]:
    """Return all parameters of a model for `GradientProbeTarget.parameters`.

    gradient_of: returns a parameter's reduced gradient, or this rank's part of it.
    """
    inner = unwrapped(model)
    # FSDP2's objects by tensor id, since FSDP2 does not compute with the tensors that the optimizer holds
    of_tensor: dict[int, Any] = {}
    for module in inner.modules():
        for group in _fsdp_groups(module):
            for sharded in group.fsdp_params:
                of_tensor[id(sharded.sharded_param)] = sharded
                # after a forward pass, the module may still hold the gathered parameter
                of_tensor[id(getattr(sharded, "_unsharded_param", sharded))] = sharded
    probed = []
    for name, parameter in inner.named_parameters():
        sharded = of_tensor.get(id(parameter))
        held: Any = parameter if sharded is None else sharded.sharded_param

        def leaf(held: Any = held, sharded: Any = sharded) -> Tensor | None:
            return held if sharded is None else getattr(sharded, "_unsharded_param", None)

        def reduced(held: Any = held) -> Tensor | None:
            gradient = gradient_of(held)
            return None if gradient is None else full_tensor(gradient)

        name = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
        local, part = held_part(held)
        trained = parameter.requires_grad
        probed.append(ProbedParameter(name, local, leaf if trained else _no_leaf, reduced, part))
    return probed


def _no_leaf() -> None:
    return None


def _fsdp_groups(module: Any) -> list[Any]:
    """Return one module's FSDP2 parameter groups. The parameters of a group are gathered together."""
    if not isinstance(module, FSDPModule):
        return []
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _check_synchronized(module: Any) -> None:
    # FSDP2 does not say in a public attribute whether it holds unreduced gradients
    for group in _fsdp_groups(module):
        gathered = [getattr(sharded, "_unsharded_param", None) for sharded in group.fsdp_params]
        held = any(sharded.unsharded_accumulated_grad is not None for sharded in group.fsdp_params)
        held |= any(parameter is not None and parameter.grad is not None for parameter in gathered)
        if held or not group.reduce_grads:
            raise DistattnError(
                "gradients are being accumulated (set_requires_gradient_sync(False)); call loss_scale between steps, with "
                "synchronization on."
            )


def full_tensor(gradient: Tensor | None) -> Tensor:
    """Return the full gradient as a plain tensor. All ranks call this. Raises DistattnError if the gradient is None."""
    if gradient is None:
        raise DistattnError("the probed layer has no gradient after backward: keep gradients until they are reduced.")
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


@contextmanager
def gradients_aside(model: torch.nn.Module) -> Iterator[None]:
    """Set a model's gradients aside while the context is open. Restore its gradients and buffers afterwards."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

"""The memory of a step while NCCL records messages and the host runs layers ahead of the device matches `plan
--memory`.
"""

from unittest import mock

import pytest
import small
import torch
from imitated_allocator import QUEUE, HeldBytes
from imitated_nccl import GROUP
from meta_run import META, MetaBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distattn as da
from distattn.adapters import pytorch
from distattn.kernels.registry import KERNELS
from distattn.memory.accounting import AllocationWatch, PlannedAttention
from distattn.memory.settings import MemorySettings
from distattn.ops.executable import Executable, checked_program
from distattn.ops.planned_op import IMPLEMENTATIONS
from distattn.parallel.runtime.arenas import ARENAS
from distattn.parallel.runtime.communication.transport import GroupTransport
from distattn.training.run_memory import on_meta, step_memory

# the number of launches per layer and direction, chosen so that the host runs 6 layers ahead
LAUNCHES, LAYERS = 170, 8
PASSES = ("distattn::forward", "distattn::backward")


def build():
    # make heads larger than the rest of a layer, so that arenas matter
    shape = dict(num_hidden_layers=LAYERS, num_attention_heads=16, num_key_value_heads=4, head_dim=16)
    return small.build(torch.bfloat16, **shape)


class HeldWatch(TorchDispatchMode):
    """A dispatch mode that runs passes as the executor does, and reports all new memory to the imitated allocator."""

    def __init__(self, memory):
        super().__init__()
        self.memory, self.older = memory, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and not self.memory.knows(x.untyped_storage()):
                # keep the storage alive, so that no new storage reuses its address
                self.older.append(x.untyped_storage())
        if func.name() in PASSES:
            with self:
                out = IMPLEMENTATIONS[func.name()](*args, **(kwargs or {}))
            self.memory.launch(LAUNCHES)
            return out
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item()
        out = func(*args, **(kwargs or {}))
        older_keys = {storage._cdata for storage in self.older}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device == META:
                storage = x.untyped_storage()
                if not self.memory.knows(storage) and storage._cdata not in older_keys:
                    self.memory.allocate(storage)
        return out


def held_by_steps(executable, backend, settings):
    """Return the peak bytes of two steps, not counting the weights and their gradients."""
    model, memory = on_meta(build), HeldBytes(QUEUE)
    settings.apply(model, None)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter_: setattr(parameter_, "grad", None))
    ids = torch.zeros(1, executable.program.tokens, dtype=torch.int64, device=META)
    batch = dict(input_ids=ids, labels=ids, position_ids=ids, loss_scale=1.0)
    batch["context_parallel"] = PlannedAttention(executable)
    ARENAS.free(META)
    backend.memory = memory
    with HeldWatch(memory):
        for _ in range(2):
            pytorch.local_loss(model, batch, loss=settings.loss).backward()
    return memory.peak


@pytest.mark.parametrize(
    ("strategy", "checkpointing", "policy"),
    [
        ("ring", "full", None),
        ("ulysses", "none", None),
        ("ulysses", "full", None),
        ("usp", "save_attention", None),
        # the peak is in the repeated forward pass, which keeps all keys and values
        ("allgather", "full", "keep"),
    ],
)
def test_a_step_holds_the_predicted_memory_while_the_host_is_layers_ahead(strategy, checkpointing, policy):
    tokens, settings = 8192, MemorySettings(activation_checkpointing=checkpointing, loss_tile_tokens=64)
    shape = dict(heads=16, kv_heads=4, head_dim=16, dtype="bfloat16", strategy=strategy, backward=policy)
    plan = da.make_plan(da.Mask.causal(tokens), da.Layout.zigzag([tokens], 16 if policy else 4), **shape)
    backend = MetaBackend()
    with mock.patch.dict(KERNELS, {"meta": "meta_kernel"}):
        key, program = checked_program(plan, 1, "meta", META, None, proven=False)
        executable = Executable(program, key, GroupTransport(GROUP, backend))
        counts = step_memory(AllocationWatch(), on_meta(build), executable, settings)
        held = held_by_steps(executable, backend, settings)
    counted = counts.saved + counts.arena + max(counts.working.values())
    assert held == counted

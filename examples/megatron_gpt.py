"""Megatron-core: torchrun --nproc-per-node 4 examples/megatron_gpt.py --tp 2. It needs GPUs; tests run it with a CPU shim."""

from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import random
from megatron.core.transformer.transformer_config import TransformerConfig
from packs import DEVICE, VOCABULARY, arguments, settings, steps

import distattn as da
from distattn.adapters import megatron

args = arguments(tp=1, pp=1)
dist.init_process_group()
ranks = dist.get_world_size() // (args.tp * args.pp)
cp_args = settings(args.data, ranks)
degree = cp_args.get("context_parallel_size", ranks)
sizes = dict(tensor_model_parallel_size=args.tp, pipeline_model_parallel_size=args.pp, context_parallel_size=degree)
parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=False)
try:
    random.model_parallel_cuda_manual_seed(0)
except AssertionError as error:
    raise SystemExit(f"megatron_gpt.py: Megatron-core needs GPUs, and this machine has no GPU: {error}.") from None
# initialize the same weights regardless of how the model is split
names = ("init_method", "output_layer_init_method")
start = {
    n: lambda w: torch.nn.init.normal_(w, std=0.1, generator=torch.Generator().manual_seed(w.numel())) for n in names
}
shape = dict(num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=128)
plain = dict(attention_dropout=0.0, hidden_dropout=0.0, use_cpu_initialization=True, bias_dropout_fusion=False)
# pipeline stages exchange batches of different lengths; the loss is the sum over tokens divided by the valid tokens
training = dict(variable_seq_lengths=True, moe_token_dispatcher_type="alltoall", calculate_per_token_loss=True)
training |= dict(pipeline_dtype=torch.float32, finalize_model_grads_func=finalize_model_grads, normalization="RMSNorm")
config = TransformerConfig(**shape, **sizes, **plain, gradient_accumulation_fusion=False, **training, **start)
ends = dict(pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage())
spec = megatron.replace_core_attention(get_gpt_layer_local_spec(normalization="RMSNorm"))
model = GPTModel(config, spec, VOCABULARY, 1024, position_embedding_type="rope", **ends)
model = megatron.use_batch_positions(model).to(DEVICE)
chunk = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
adam = OptimizerConfig(optimizer="adam", lr=3e-3, weight_decay=0.01, clip_grad=1.0, use_distributed_optimizer=True)
optimizer = get_megatron_optimizer(adam, [chunk], use_gloo_process_groups=False)
# split a batch's attention over the context-parallel ranks, with --data per_rank also over the data-parallel ranks
cp = da.ContextParallel(parallel_state.get_data_parallel_group(with_context_parallel=True), **cp_args)
for number, packs in enumerate(cp.steps(steps(args.steps, cp))):
    chunk.zero_grad_buffer()
    batches = dict(data_iterator=iter(packs), num_microbatches=len(packs), seq_length=1, micro_batch_size=1)
    run = dict(forward_step_func=partial(megatron.forward_step, config=config), model=[chunk], forward_only=False)
    reports = get_forward_backward_func()(**run, **batches)
    optimizer.step()
    sums = torch.tensor([[r["loss_sum"], r["tokens"]] for r in reports] or [[0, 0]]).double().sum(0).to(DEVICE)
    dist.all_reduce(sums)
    if dist.get_rank() == 0:
        print(f"step {number + 1} loss {sums[0] / sums[1]:.12f}", flush=True)  # noqa: T201

"""Computes the bytes per rank of a run's weights, gradients and AdamW averages, for every engine."""

from __future__ import annotations

from distattn.training.config.run_file import Config
from distattn.training.run_data import vocabulary_size


def state_bytes(config: Config) -> int:
    """Return the bytes per rank of weights, gradients and AdamW's two averages, as the engine shards them."""
    ranks, element_bytes = config.parallel.ranks, 8 if config.model.dtype == "float64" else 4
    weights = gradients = averages = 1
    if config.engine.name == "fsdp2":
        weights = gradients = averages = config.engine.shard_size or ranks
    elif config.engine.name == "deepspeed":
        stage = config.engine.zero_stage
        weights, gradients, averages = (ranks if stage >= least_stage else 1 for least_stage in (3, 2, 1))
    else:
        weights = gradients = config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
        averages = ranks
    shares = (1 / weights, 1 / gradients, 2 / averages)
    extra = 0.0
    if config.engine.name != "fsdp2" and config.model.dtype == "bfloat16":
        # low-precision weights for computation, in addition to master weights, which are sharded like the averages
        shares, extra = (1 / averages, 1 / gradients, 2 / averages), 2 / weights
    return round(model_parameters(config) * (element_bytes * sum(shares) + extra))


def model_parameters(config: Config) -> int:
    """Return the number of parameters in the model."""
    model = config.model
    if model.path:
        # build the model on the meta device: only its architecture knows experts, biases and norms (the import takes seconds)
        from distattn.models.build import meta_model, model_config

        return sum(parameter.numel() for parameter in meta_model(model_config(model.path)).parameters())
    attention = model.hidden_size * model.head_size * (2 * model.num_attention_heads + 2 * model.num_key_value_heads)
    layer = attention + 3 * model.hidden_size * model.intermediate_size + 2 * model.hidden_size
    return 2 * vocabulary_size(config) * model.hidden_size + model.num_layers * layer + model.hidden_size

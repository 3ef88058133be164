"""Hugging Face `Trainer` with accelerate: DDP, FSDP2 or DeepSpeed, according to its arguments.

    cp = da.ContextParallel(group, loss_group=torch.distributed.group.WORLD, strategy="ring")
    trainer = ContextParallelTrainer(model=model, args=args, train_dataset=..., data_collator=..., context_parallel=cp)
    trainer.train()

Ranks that split a sequence get the same batches. The collator receives the dataset's unchanged columns and returns micro-batches
in the form that `ContextParallel.shard` takes. Evaluation also splits sequences if only the loss is needed. With
`compute_metrics`, and in `predict`, each process has whole sequences. Leave out `ParallelismConfig`, since its cp and sp are
accelerate's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler
from transformers import Trainer

from distattn.adapters.huggingface import single_process_attention
from distattn.adapters.pytorch import ProbeTarget, local_loss, output_layer_of
from distattn.adapters.refusals import print_refusals_once
from distattn.batch.packed_batch import int64_labels
from distattn.driver.context_parallel import ContextParallel
from distattn.ir.errors import DistattnError


class ContextParallelTrainer(Trainer):
    """A `Trainer` whose batches are split by a `ContextParallel`. The model must have attn_implementation="distattn".

    The loss is the sum of token losses divided by the number of valid tokens, over all ranks and micro-batches of a step.
    """

    def __init__(self, *arguments: Any, context_parallel: ContextParallel, **named: Any):
        print_refusals_once()
        super().__init__(*arguments, **named)
        self.context_parallel = context_parallel
        # a documented flag of transformers: compute_loss itself scales the loss for gradient accumulation
        self.loss_is_scaled_for_ga = True
        self._probed: Any = None
        # the current epoch's iterator, and its steps, which are sharded one step ahead
        self._epoch: tuple[Any, Iterator[list[dict[str, Any]]]] = None, iter(())
        # the evaluation loader whose batches are split; the loss and label count of each step of the last evaluation
        # with it; and the prefix of that evaluation's metrics
        self._split: Any = None
        self._evaluated: list[tuple[float, int]] | None = None
        self._evaluated_as = ""
        args: Any = self.args
        for option, is_set in {
            "label_smoothing_factor": args.label_smoothing_factor > 0,
            "compute_loss_func": self.compute_loss_func is not None,
            "several GPUs in one process (start one process each, with torchrun)": args.n_gpu > 1,
            "ranks that only serve (the Trainer trains on all ranks)": context_parallel.config.servers > 0,
            "accelerate's ParallelismConfig": getattr(self.accelerator, "parallelism_config", None) is not None,
            "accelerator_config's split_batches and dispatch_batches": args.accelerator_config.split_batches
            or args.accelerator_config.dispatch_batches,
            f"train_sampling_strategy {args.train_sampling_strategy!r}": args.train_sampling_strategy
            not in ("random", "sequential"),
        }.items():
            if is_set:
                raise DistattnError(f"{option} is not supported together with context parallelism; leave it out.")
        if context_parallel.loss_group is not None:
            ranks = dist.get_world_size(context_parallel.loss_group)
            if ranks != args.world_size:
                raise DistattnError(
                    f"the Trainer runs on {args.world_size} ranks, the loss group has {ranks}; give ContextParallel "
                    "loss_group=torch.distributed.group.WORLD."
                )

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader of the training set. Replicas get different rows; ranks that split a sequence get the same batches."""
        if self.train_dataset is None:
            raise DistattnError("training needs a train_dataset.")
        args: Any = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        dataset: Any = self.train_dataset
        if isinstance(dataset, IterableDataset):
            return self._shared_loader(dataset, seed, self._train_batch_size)
        sampler: Sampler[int] = SequentialSampler(dataset)
        if args.train_sampling_strategy == "random":
            sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
        return self._shared_loader(dataset, seed, self._train_batch_size, sampler, args.dataloader_drop_last)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return a loader whose batches are split, or the Trainer's own loader if metrics need whole sequences."""
        if self.compute_metrics is not None:
            return super().get_eval_dataloader(eval_dataset)
        chosen: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[chosen] if isinstance(chosen, str) else chosen  # type: ignore[index]
        if dataset is None:
            raise DistattnError("evaluation needs an eval_dataset.")
        self._split = self._shared_loader(dataset, self.args.seed, self.args.eval_batch_size)
        return self._split

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return the number of dataset rows per step. Rows shared by the ranks that split a sequence count once."""
        return self._train_batch_size * args.gradient_accumulation_steps * self.context_parallel.data_parallel_size

    def _shared_loader(
        self, dataset: Any, seed: int, batch_size: int, sampler: Sampler[int] | None = None, drop_last: bool = False
    ) -> DataLoader:
        args: Any = self.args
        loader: DataLoader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=partial(_copied_batch, self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        cp = self.context_parallel
        return prepare_data_loader(
            loader,
            args.device,
            num_processes=cp.data_parallel_size,
            process_index=cp.data_parallel_rank,
            put_on_device=True,
            # a dispatcher would give every rank different batches, even within a replica
            dispatch_batches=False,
            even_batches=args.accelerator_config.even_batches,
            use_seedable_sampler=True,
            data_seed=seed,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return this rank's parts of a step's micro-batches, with loss scales for the step's number of labels, and None."""
        if self._probed is not self.model_wrapped:
            self._probed = self.model_wrapped
            self.context_parallel.loss_scale(self._probe_target())
        if self._epoch[0] is not epoch_iterator:
            steps = self.context_parallel.steps(self._micro_batches(epoch_iterator), even=True)
            self._epoch = epoch_iterator, steps
        return next(self._epoch[1], []), None

    def _micro_batches(self, epoch_iterator: Iterator[Any]) -> Iterator[list[Any]]:
        """Yield the batches of each step in an epoch. The last step may have fewer batches, as the Trainer expects."""
        while whole := list(islice(epoch_iterator, self.args.gradient_accumulation_steps)):
            yield whole

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute this rank's share of the loss for a split batch, or transformers' loss for an unsplit batch (evaluation)."""
        if "context_parallel" not in inputs:
            if isinstance(inputs.get("labels"), torch.Tensor):
                inputs = {**inputs, "labels": int64_labels(inputs["labels"])}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs:
            raise DistattnError("a split batch has no whole outputs to return; evaluate on whole sequences.")
        return local_loss(model, inputs)

    def evaluation_loop(self, dataloader: DataLoader, *arguments: Any, **named: Any) -> Any:
        """Evaluate split batches by their mean loss over all labels, and unsplit batches without context parallelism."""
        evaluated: list[tuple[float, int]] | None = [] if dataloader is self._split else None
        self._evaluated, self._evaluated_as = evaluated, named.get("metric_key_prefix", "eval")
        with nullcontext() if evaluated is not None else single_process_attention(self.model):
            done = super().evaluation_loop(dataloader, *arguments, **named)
        if not (self.is_in_train or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # let accelerate prepare the model again for training: otherwise, it would not wrap the model in DDP, and ranks
            # would train different models
            self.model._is_accelerate_prepared = self.model_wrapped is not self.model  # type: ignore[union-attr]
        labels = sum(labels for _, labels in evaluated or ())
        if evaluated and labels and done.metrics:
            mean = sum(loss * labels for loss, labels in evaluated) / labels
            done.metrics.update({name: mean for name in done.metrics if name.endswith("_loss")})
        return done

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log metrics. Correct the steps per second of split evaluations, since the Trainer counts each step once per rank."""
        name, seconds = f"{self._evaluated_as}_steps_per_second", logs.get(f"{self._evaluated_as}_runtime")
        if self._evaluated and seconds and name in logs:
            logs[name] = round(len(self._evaluated) / seconds, 3)
        super().log(logs, start_time)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        """Return the loss of a split batch, averaged over all ranks' batches, and None for the logits and labels."""
        if self._evaluated is None:
            return super().prediction_step(model, inputs, *arguments, **named)
        cp = self.context_parallel
        with torch.no_grad(), self.compute_loss_context_manager():
            part = cp.shard(inputs)
            loss = local_loss(model, part)
        mean = cp.mean_loss([loss])
        self._evaluated.append((mean, round(cp.loss_scale() / part["loss_scale"])))
        return torch.tensor(mean, device=loss.device), None, None

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count each token on all ranks once, and leave out padding."""
        ids = inputs["input_ids"][:, : inputs["context_parallel"].own_tokens]
        super()._track_num_input_tokens({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def _probe_target(self) -> Any:
        if self.is_deepspeed_enabled:
            from distattn.adapters import deepspeed

            # accelerate created the engine without `SequenceGroups`
            deepspeed.set_data_parallel_size(self.model_wrapped, self.context_parallel.data_parallel_size)
            return deepspeed.ProbeTarget(self.model_wrapped, scale_wrt_gas=False)
        model: Any = self.model
        return ProbeTarget(self.model_wrapped, output_layer=output_layer_of(model))


def _copied_batch(collate: Callable[[Any], Any], rows: Any) -> Any:
    """Collate rows and copy the tensors, since the collator may reuse them for the next batch while accelerate holds this one."""
    batch = collate(rows)
    if not isinstance(batch, Mapping):
        return batch
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}

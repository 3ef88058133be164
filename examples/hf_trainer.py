"""Hugging Face Trainer: torchrun --nproc-per-node 4 examples/hf_trainer.py [--data per_rank] [--dtype float64]"""

import os
import tempfile

import torch
from packs import PACKS_PER_STEP, arguments, llama, planned, settings
from transformers import TrainerCallback, TrainingArguments

import distattn as da
from distattn.adapters.hf_trainer import ContextParallelTrainer
from distattn.data.pack_dataset import PackDataset


class PrintLoss(TrainerCallback):
    """A callback that prints the loss of every step."""

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ANN001
        if state.is_world_process_zero and "loss" in logs:
            print(f"step {state.global_step} loss {logs['loss']:.12f}", flush=True)  # noqa: T201


def main() -> None:
    options = arguments(dtype="float32")
    ranks = int(os.environ["WORLD_SIZE"])
    shares = min(ranks, PACKS_PER_STEP) if options.data == "per_rank" else 1

    with tempfile.TemporaryDirectory() as folder:
        # this initializes torch.distributed
        args = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=PACKS_PER_STEP // shares,
            learning_rate=3e-3,
            weight_decay=0.01,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        cp = da.ContextParallel(**settings(options.data, ranks))
        trainer = ContextParallelTrainer(
            model=llama(getattr(torch, options.dtype)),
            args=args,
            train_dataset=PackDataset(*planned(options.steps)),
            # a row is a whole pack
            data_collator=lambda rows: rows[0],
            callbacks=[PrintLoss()],
            context_parallel=cp,
        )
        trainer.train()


if __name__ == "__main__":
    main()

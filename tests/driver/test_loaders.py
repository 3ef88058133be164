"""Loaders may refill one buffer, use any dtype, and be left and continued."""

import numpy as np
import pytest
import torch
from processes import run_on_ranks

import distattn as da
from distattn.adapters import pytorch
from distattn.data.streaming.stream_documents import DocumentReader
from distattn.memory.tiled_loss import tiled_loss

STEPS = 5


def refilled(kind):
    """Yield steps that share one buffer. Step i has the ids 10 * i + 1 to 10 * i + 4, and its labels are 5 larger."""
    of_step = np.arange(1, 5)[None]
    buffers = [np.zeros((1, 4), np.int64) for _ in range(2)]
    # writes through NumPy do not change the version counter of a tensor that shares the memory
    ids, labels = (torch.from_numpy(buffer) if kind == "numpy" else torch.zeros(1, 4).long() for buffer in buffers)
    lengths, batch, micro_batches = [], {}, []
    for step in range(STEPS):
        for tensor, buffer, first in ((ids, buffers[0], 10 * step), (labels, buffers[1], 10 * step + 5)):
            if kind == "numpy":
                buffer[:] = of_step + first
            else:
                tensor.copy_(torch.from_numpy(of_step + first))
        lengths[:] = [1 + step % 3, 3 - step % 3]
        batch.update(input_ids=ids, shift_labels=labels, document_lengths=lengths)
        micro_batches[:] = [batch]
        yield micro_batches if kind == "list" else batch


def is_of_step(parts, step):
    positions = [*range(1 + step % 3), *range(3 - step % 3)]
    return (
        parts[0]["input_ids"].tolist() == [[10 * step + at for at in range(1, 5)]]
        and parts[0]["labels"].tolist() == [[10 * step + at + 5 for at in range(1, 5)]]
        and parts[0]["position_ids"].tolist() == [positions]
    )


@pytest.mark.parametrize("kind", ["torch", "numpy", "list"])
def test_a_loader_may_fill_one_buffer_again(kind):
    with da.ContextParallel(strategy="ring") as cp:
        assert [is_of_step(parts, step) for step, parts in enumerate(cp.steps(refilled(kind)))] == [True] * STEPS


def test_a_part_shares_no_memory_with_the_batch():
    ids = torch.arange(4)[None]
    with da.ContextParallel(strategy="ring") as cp:
        (part,) = cp.shard_step([{"input_ids": ids, "shift_labels": ids}])
        ids.fill_(9)
        assert part["input_ids"].tolist() == part["labels"].tolist() == [[0, 1, 2, 3]]


class Numbered:
    """An iterator over steps whose ids all equal the step's number. fails: the step whose first read fails."""

    def __init__(self, fails=None):
        self.step, self.fails = 0, fails

    def __iter__(self):
        return self

    def __next__(self):
        if self.step == STEPS:
            raise StopIteration
        if self.fails == self.step:
            self.fails = None
            raise OSError("the disk did not answer")
        self.step += 1
        return numbered(self.step - 1)


def numbered(step):
    return {"input_ids": torch.full((1, 3), step), "document_lengths": [3]}


def number_of(parts):
    return int(parts[0]["input_ids"][0, 0])


def generator():
    yield from map(numbered, range(STEPS))


ITERATORS = {"generator": generator, "object": Numbered, "map": lambda: map(numbered, range(STEPS))}


@pytest.mark.parametrize("make", ITERATORS.values(), ids=ITERATORS)
def test_the_next_loop_begins_with_the_step_that_was_taken_ahead(make):
    seen, loader = [], make()
    with da.ContextParallel(strategy="ring") as cp:
        for parts in cp.steps(loader):
            seen.append(number_of(parts))
            if len(seen) == 2:
                break
        with pytest.raises(KeyError):
            for parts in cp.steps(loader):
                seen.append(number_of(parts))
                raise KeyError
        # a generator that is held in a variable is not closed when its loop ends early
        held = cp.steps(loader)
        seen.append(number_of(next(held)))
        seen += map(number_of, cp.steps(loader))
        assert list(held) == list(cp.steps(loader)) == []
    assert seen == list(range(STEPS))


def test_an_iterable_that_starts_over_starts_with_its_first_step():
    with da.ContextParallel(strategy="ring") as cp:
        steps = [numbered(step) for step in range(STEPS)]
        for _ in range(2):
            assert number_of(next(iter(cp.steps(steps)))) == 0
        # with persistent workers the loader has one iterator, which it resets
        loader = torch.utils.data.DataLoader(
            steps, batch_size=None, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
        )
        for _ in range(2):
            assert number_of(next(iter(cp.steps(loader)))) == 0


def test_an_error_of_a_loader_comes_after_the_step_before_it():
    seen, loader = [], Numbered(fails=2)
    with da.ContextParallel(strategy="ring") as cp:
        with pytest.raises(OSError, match="the disk"):
            seen += (number_of(parts) for parts in cp.steps(loader))
        for parts in cp.steps(loader):
            seen.append(number_of(parts))
    assert seen == list(range(STEPS))


def nested(rank):
    """Return the steps of two nested loops over one iterator, which ends one step earlier on rank 1."""
    seen, loader = [], iter([numbered(step) for step in range(STEPS - rank)])
    with da.ContextParallel(strategy="cad", data="per_rank") as cp:
        for outer in cp.steps(loader):
            seen.append(number_of(outer))
            for inner in cp.steps(loader):
                seen.append(number_of(inner))
                break
    return seen


def test_loops_over_one_iterator_share_its_steps_in_order():
    # in the last step rank 1 has only padding, whose token id is 0
    assert run_on_ranks(2, nested) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0]]


UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", [*UNSIGNED, torch.int8, torch.int16, torch.int32], ids=str)
def test_token_ids_of_any_integer_dtype_become_int64_with_the_right_labels(dtype):
    with da.ContextParallel(strategy="ring") as cp:
        part = cp.shard({"input_ids": torch.tensor([[5, 6, 7, 100]]).to(dtype), "document_lengths": [3, 1]})
    assert part["input_ids"].dtype == part["labels"].dtype == torch.int64
    assert part["labels"].tolist() == [[6, 7, -100, -100]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_of_signed_dtypes_become_int64(name, dtype):
    labels = torch.tensor([[5, -100, 7]]).to(dtype)
    with da.ContextParallel(strategy="ring") as cp:
        part = cp.shard({"input_ids": torch.tensor([[5, 6, 7]]), name: labels})
    wanted = [[5, -100, 7]] if name == "shift_labels" else [[-100, 7, -100]]
    assert part["labels"].dtype == torch.int64 and part["labels"].tolist() == wanted


@pytest.mark.parametrize("dtype", [*UNSIGNED, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_label_dtypes_that_cannot_hold_minus_100_are_refused(name, dtype):
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), name: torch.tensor([[5, 6, 7]]).to(dtype)}
    with da.ContextParallel(strategy="ring") as cp, pytest.raises(da.DistattnError) as refusal:
        cp.shard(batch)
    assert f"{name} is {str(dtype)[6:]}" in str(refusal.value)
    if dtype == torch.uint8:
        assert "cannot hold -100 (no label): a 156 may be a token" in str(refusal.value)


def test_other_negative_labels_and_positions_that_wrap_are_refused():
    ids = torch.zeros(1, 300, dtype=torch.int64)
    with da.ContextParallel(strategy="ring") as cp:
        with pytest.raises(da.DistattnError, match="shift_labels has -1; labels are token ids, or -100"):
            cp.shard({"input_ids": ids, "shift_labels": ids - 1})
        with pytest.raises(da.DistattnError, match="position_ids is uint8, which starts again at 0 after 255"):
            cp.shard({"input_ids": ids, "position_ids": torch.arange(300)[None].to(torch.uint8)})
        part = cp.shard({"input_ids": ids[:, :4], "position_ids": torch.tensor([[0, 1, 0, 1]]).to(torch.uint8)})
    assert part["position_ids"].tolist() == [[0, 1, 0, 1]]


def test_every_function_refuses_label_dtypes_that_cannot_hold_minus_100():
    labels = torch.tensor([3, 156], dtype=torch.uint8)
    layout = da.Layout.contiguous([2], 1)
    doors = [
        lambda: tiled_loss(torch.randn(2, 4), torch.randn(8, 4), labels, tile_tokens=2),
        lambda: pytorch.loss_of(torch.randn(1, 2, 8), {"labels": labels[None], "loss_scale": 1.0}),
        lambda: layout.shift_labels(labels),
        lambda: layout.shift_labels(labels.numpy()),
        lambda: list(DocumentReader("input_ids", None).documents({"input_ids": [1, 2], "labels": labels})),
    ]
    for door in doors:
        with pytest.raises(da.DistattnError, match="uint8, which cannot hold"):
            door()
    batch = {"input_ids": torch.arange(2)[None]}
    with da.ContextParallel(strategy="ring") as cp:
        local = cp.shard(batch)["context_parallel"]
        with pytest.raises(da.DistattnError, match="x is uint8, which cannot hold fill = -100"):
            local.token_shift(labels, -1, fill=-100)
        # int8 cannot represent the difference between the fill value and the tokens
        assert local.token_shift(torch.tensor([3, 100], dtype=torch.int8), -1, fill=-100).tolist() == [100, -100]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
def test_a_tiled_loss_of_small_labels_is_that_of_int64(dtype):
    hidden, weight, labels = torch.randn(4, 8), torch.randn(16, 8), torch.tensor([3, -100, 15, 0])
    of_int64, of_small = (tiled_loss(hidden, weight, part, tile_tokens=2)[0] for part in (labels, labels.to(dtype)))
    assert torch.equal(of_int64, of_small)

"""Batches from data loaders, and each rank's part of a batch."""

# N tokens on the axis, T tokens on this rank

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints, as_int64
from distattn.ir.layout import Layout
from distattn.parallel.runtime.communication.streams import copy_to_device

IGNORE_INDEX = -100
# keys that transformers' collators add with return_flash_attn_kwargs
_FLASH_KEYS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
KEYS = ("input_ids", "labels", "shift_labels", "document_lengths", "position_ids", "attention_mask")


class Batch(Protocol):
    """The interface to a micro-batch that drivers use: facts about it, and each rank's part of it.

    lengths: the length of each document in tokens. valid_labels: the number of tokens with a label. digest: equal on ranks with
    the same batch. tensors: tensors that the loader may still be filling on a GPU. device: the device of a rank's part.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def lengths(self) -> tuple[int, ...]: ...

    @property
    def valid_labels(self) -> int: ...

    @property
    def digest(self) -> str: ...

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    def read_ahead(self, layout: Layout, rank: int) -> None:
        """Prepare to read a rank's part before `local_shard` asks for it. Called on a different thread."""

    def local_shard(self, layout: Layout, rank: int, pad_to: int = 1) -> dict[str, Tensor]:
        """Return a rank's `input_ids`, `labels` and `position_ids` (1, T), padded to a positive multiple of `pad_to`."""
        ...


class BatchFacts(NamedTuple):
    """Facts about a micro-batch before it is read: document lengths, a digest, and the number of tokens with a label."""

    lengths: tuple[int, ...]
    digest: str
    valid_labels: int


class PackedBatch(NamedTuple):
    """A batch with its rows laid end to end: token ids and labels (each token's successor, or -100), both (N,).

    lengths: the length of each document in tokens, in order; they add up to N.
    """

    ids_N: Tensor
    labels_N: Tensor
    lengths: tuple[int, ...]

    @staticmethod
    def of(batch: Mapping[str, Any]) -> PackedBatch:
        """Build a batch from a mapping that `ContextParallel.shard` accepts. Raise DistattnError if the mapping is invalid.

        Tensors are copied, because a loader may fill the same tensors, or the arrays underneath, with its next batch.
        """
        _check_keys(batch)
        present = {name: value for name, value in batch.items() if value is not None}
        if {"labels", "shift_labels"} <= present.keys():
            raise DistattnError("batch has labels and shift_labels; give one of them.")
        # a copy, because PyTorch's tensor versions do not count NumPy's writes to shared memory
        ids = _whole_numbers(batch, "input_ids").to(torch.int64, copy=True)
        if not ids.numel():
            raise DistattnError(f"input_ids {tuple(ids.shape)} has no tokens.")
        if int(ids.min()) < 0:
            raise DistattnError(f"input_ids has {int(ids.min())}; token ids count from 0.")
        for name in ("labels", "shift_labels", "position_ids", "attention_mask"):
            if name in present:
                _whole_numbers(present, name)
        name = "labels" if present.get("shift_labels") is None else "shift_labels"
        labels = int64_labels(present[name], name) if name in present else ids
        if ids.dim() != 2 or labels.shape != ids.shape:
            raise DistattnError(
                f"input_ids and labels must both have shape (batch, tokens), not {tuple(ids.shape)}, {tuple(labels.shape)}."
            )
        kept, lengths = _documents(batch, ids)
        ids, labels = (ids[kept], labels[kept]) if kept is not None else (ids.reshape(-1), labels.reshape(-1))
        labels = labels.clone() if name == "shift_labels" else _shifted(labels, lengths)
        if name in present and (least := int(labels.where(labels != IGNORE_INDEX, 0).min())) < 0:
            raise DistattnError(
                f"{name} has {least}; labels are token ids, or {IGNORE_INDEX} for tokens without a label."
            )
        return PackedBatch(ids, labels, lengths)

    @property
    def valid_labels(self) -> int:
        """The number of tokens with a label."""
        return int((self.labels_N != IGNORE_INDEX).sum())

    @property
    def digest(self) -> str:
        """A 128-bit hash of the token ids and labels."""
        hasher = hashlib.blake2b(digest_size=16)
        for tensor in self.tensors:
            hasher.update(len(tensor).to_bytes(8, "little"))
            hasher.update(tensor.cpu().numpy().tobytes())
        return hasher.hexdigest()

    @property
    def device(self) -> torch.device:
        """The device of the token ids and labels."""
        return self.ids_N.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The token ids and labels."""
        return self.ids_N, self.labels_N

    def read_ahead(self, layout: Layout, rank: int) -> None:
        """Return immediately, since the batch is already in memory."""

    def local_shard(self, layout: Layout, rank: int, pad_to: int = 1) -> dict[str, Tensor]:
        """Return a rank's `input_ids`, `labels` and `position_ids` (1, T), padded to a positive multiple of `pad_to`."""
        tokens = layout.tokens(rank)
        index = _on_device(tokens, self.ids_N.device)
        return local_tensors(self.ids_N[index], self.labels_N[index], layout, tokens, pad_to)


def micro_batches_of(step: Any) -> list[Batch] | None:
    """Return the micro-batches of a loader's step; None after the last step.

    step: a mapping that `ContextParallel.shard` accepts, or a list whose entries are such mappings or `Batch` objects.
    """
    if step is None:
        return None
    if not isinstance(step, (Mapping, list, tuple)):
        raise DistattnError(f"a loader yields batches, or lists of them (micro-batches), not a {type(step).__name__}.")
    batches = [step] if isinstance(step, Mapping) else step
    return [cast(Batch, batch) if hasattr(batch, "local_shard") else PackedBatch.of(batch) for batch in batches]


def local_tensors(ids: Tensor, labels: Tensor, layout: Layout, tokens: Ints, pad_to: int) -> dict[str, Tensor]:
    """Return `input_ids`, `labels` and `position_ids` (1, T) for tokens of a layout, padded to a multiple of `pad_to`.

    ids, labels: those of `tokens`, (T,).
    """
    positions = _on_device(layout.positions_of(tokens), ids.device)
    padding = padded(len(tokens), pad_to) - len(tokens)
    if padding:
        ids, positions = F.pad(ids, (0, padding)), F.pad(positions, (0, padding))
        labels = F.pad(labels, (0, padding), value=IGNORE_INDEX)
    return {"input_ids": ids[None], "labels": labels[None], "position_ids": positions[None]}


def _whole_numbers(batch: Mapping[str, Any], name: str) -> Tensor:
    """Return the batch's tensor `name`. Raise DistattnError if it is not a tensor of integers."""
    value = batch[name]
    if not isinstance(value, Tensor):
        raise DistattnError(f"{name} is a {type(value).__name__}; a tensor is needed.")
    # a mask may have any dtype, because its values are checked to be 0 or 1
    if name != "attention_mask" and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
        raise DistattnError(f"{name} is {str(value.dtype)[6:]}; whole numbers are needed, such as int64.")
    return value


def int64_labels(labels: Tensor, name: str = "labels") -> Tensor:
    """Return labels as int64, copied only if necessary. Raise DistattnError for dtypes that cannot hold -100."""
    dtype = str(labels.dtype)[6:]
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DistattnError(f"{name} is {dtype}; whole numbers are needed, such as int64.")
    if not labels.dtype.is_signed:
        wrapped = torch.iinfo(labels.dtype).max + 1 + IGNORE_INDEX
        raise DistattnError(
            f"{name} is {dtype}, which cannot hold {IGNORE_INDEX} (no label): a {wrapped} may be a token, or a {IGNORE_INDEX} "
            f"that was cast. Make {name} int64 before tokens without a label get {IGNORE_INDEX}."
        )
    return labels.to(torch.int64)


def _check_keys(batch: Any) -> None:
    if not isinstance(batch, Mapping):
        raise DistattnError(f"a batch must be a mapping with input_ids, not a {type(batch).__name__}.")
    unknown = batch.keys() - KEYS
    if unknown & _FLASH_KEYS:
        raise DistattnError(
            f"batch has {', '.join(sorted(unknown & _FLASH_KEYS))}, which are for another attention: leave "
            "return_flash_attn_kwargs out of the collator; position_ids show where documents begin."
        )
    if unknown:
        raise DistattnError(f"batch has {', '.join(sorted(map(str, unknown)))}; shard takes {', '.join(KEYS)}.")
    if batch.get("input_ids") is None:
        raise DistattnError("batch has no input_ids; give token ids (batch, tokens).")


def _shifted(labels_N: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Return the label of each token's successor; IGNORE_INDEX for the last token of a document."""
    out = torch.full_like(labels_N, IGNORE_INDEX)
    out[:-1] = labels_N[1:]
    out[copy_to_device(labels_N.device, torch.tensor(lengths).cumsum(0) - 1)] = IGNORE_INDEX
    return out


def _on_device(numbers: Ints, device: torch.device) -> Tensor:
    """Return a NumPy array of integers as a tensor on a device."""
    return copy_to_device(device, torch.from_numpy(numbers))


def padded(tokens: int, pad_to: int) -> int:
    """Round a number of tokens up to a positive multiple of `pad_to`, because models refuse empty batches."""
    return max(-(-tokens // pad_to), 1) * pad_to


def _documents(batch: Mapping[str, Any], ids: Tensor) -> tuple[Tensor | None, tuple[int, ...]]:
    """Return a mask of the tokens to keep (None for all), and the lengths of their documents."""
    padding = batch.get("attention_mask")
    if padding is not None:
        _check_padding(padding, ids)
        padding = None if bool(padding.all()) else padding
    sources = [name for name in ("document_lengths", "position_ids") if batch.get(name) is not None]
    if len(sources) > (padding is None):
        names = " and ".join([*sources, *(["an attention_mask with padding"] if padding is not None else [])])
        raise DistattnError(f"batch has {names}; documents are given by only one of them.")
    if padding is not None:
        return _unpadded(padding)
    if sources == ["position_ids"]:
        return None, _restarts(batch["position_ids"], ids)
    if not sources:
        return None, (ids.shape[1],) * ids.shape[0]
    lengths_array = as_int64(batch["document_lengths"], "document_lengths")
    if lengths_array.ndim != 1 or not len(lengths_array):
        raise DistattnError("document_lengths must be a flat list of the documents' tokens, such as [4096, 1024].")
    lengths = tuple(lengths_array.tolist())
    if min(lengths) < 1:
        raise DistattnError(f"document_lengths has {min(lengths)}; each document has at least one token.")
    if sum(lengths) != ids.numel():
        raise DistattnError(f"document_lengths add up to {sum(lengths)} tokens, input_ids has {ids.numel()}.")
    return None, lengths


def _check_padding(mask: Tensor, ids: Tensor) -> None:
    if mask.shape != ids.shape:
        raise DistattnError(
            f"attention_mask must be (batch, tokens) like input_ids {tuple(ids.shape)}, not {tuple(mask.shape)}."
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise DistattnError(
            "attention_mask has other values than 0 (padding) and 1; documents are given by document_lengths or position_ids."
        )


def _unpadded(mask: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    kept = mask == 1
    # a row's kept tokens are contiguous if the mask rises at most once, counting the row's start
    rises = kept[:, :1].sum(1) + (kept[:, 1:] & ~kept[:, :-1]).sum(1)
    if bool((rises > 1).any()):
        row = int((rises > 1).nonzero()[0])
        raise DistattnError(f"attention_mask of row {row} has holes; padding goes before or after a row's tokens.")
    lengths = tuple(length for length in kept.sum(1).tolist() if length)
    if not lengths:
        raise DistattnError("attention_mask leaves no token.")
    return kept, lengths


def _restarts(positions: Tensor, ids: Tensor) -> tuple[int, ...]:
    if positions.dim() != 2 or positions.shape[0] not in (1, ids.shape[0]) or positions.shape[1] != ids.shape[1]:
        raise DistattnError(
            f"position_ids must be one number per token, {tuple(ids.shape)}, not {tuple(positions.shape)}; positions in several "
            "dimensions (multimodal RoPE) are not computed."
        )
    flat = positions.to(torch.int64).expand(ids.shape).reshape(-1)
    begins = (flat == 0).nonzero()[:, 0]
    ends = torch.cat([begins[1:], begins.new_tensor([len(flat)])])
    lengths = tuple((ends - begins).tolist())
    if not positions.dtype.is_signed and max(lengths, default=0) > torch.iinfo(positions.dtype).max:
        raise DistattnError(
            f"position_ids is {str(positions.dtype)[6:]}, which starts again at 0 after {torch.iinfo(positions.dtype).max}, "
            "so documents cannot be told apart; give int64."
        )
    whole = Layout.contiguous(lengths, 1).position_ids(0) if len(begins) and begins[0] == 0 else None
    if whole is None or not torch.equal(flat.cpu(), torch.from_numpy(whole)):
        raise DistattnError(
            "position_ids count 0, 1, 2, ... in every document; give whole batches, which shard splits itself, and "
            "document_lengths instead of other positions."
        )
    return lengths

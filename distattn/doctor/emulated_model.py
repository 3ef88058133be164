"""Run the single-process model over all micro-batches as several ranks would, with or without a mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.doctor.comparison import Finding, RankResult, distance
from distattn.doctor.emulation import CallObserver, VisibleTokens, emulate
from distattn.doctor.logit_mistakes import RIGHT, Hypothesis, MicroBatch, micro_batches_of
from distattn.doctor.recording import recorded_returns, same_buffers
from distattn.doctor.reference import ReferenceResult
from distattn.doctor.router_mistakes import RoutedBatch
from distattn.doctor.target import Target


class EmulatedModel:
    """The single-process model. Calling it returns the logits of all micro-batches under a hypothesis."""

    def __init__(self, target: Target, model: torch.nn.Module, reference: ReferenceResult, ranks: Sequence[RankResult]):
        self._target, self._model, self._batches = target, model, micro_batches_of(reference, ranks)
        self._device = next(model.parameters()).device
        # errors raised by the model while mistakes were tried
        self.failures: list[str] = []
        # names of the batch operations that the model's layers call
        self.asked: set[str] = set()
        self._forward = self._working_forward()

    def __call__(self, hypothesis: Hypothesis, on_one_rank: bool) -> Tensor | None:
        try:
            return self._logits(self._forward, hypothesis, on_one_rank)
        except Exception as error:
            # for example, an index error for positions beyond the model's table
            self.note_failure(error)
            return None

    def note_failure(self, error: Exception) -> None:
        """Record an error that kept a mistake from being tried in one process."""
        self.failures.append(self._target.describe_error(error))

    def gives(self, logits_NV: Tensor, tolerance: float) -> bool:
        """Return whether emulated ranks that make no mistake compute `logits_NV`, up to a difference of norm `tolerance`."""
        emulated_NV = self(RIGHT, False)
        return emulated_NV is not None and distance(emulated_NV, logits_NV) <= tolerance

    def with_failures(self, finding: Finding) -> Finding:
        """Return the finding. If there are `failures`, add the first to its observation."""
        if not self.failures:
            return finding
        tried = f"; not all mistakes could be tried in one process: {self.failures[0]}"
        return finding._replace(observed=finding.observed + tried)

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """The micro-batches of the step."""
        return self._batches

    def logits_of(
        self, batch: MicroBatch, hypothesis: Hypothesis, gradients: bool = False, observe: CallObserver | None = None
    ) -> Tensor:
        """Compute all ranks' logits (N, V) for a micro-batch. Raises the model's errors.

        gradients: True if a backward pass may follow. observe: called with every attention call.
        """
        # without gradients, only ranks without tokens get a padding token; with gradients, all ranks do if one has no tokens
        empty = not all(map(len, batch.tokens))
        padding = torch.zeros(int(empty), dtype=batch.pack.ids_N.dtype) if gradients else None
        return self._emulate(self._forward, hypothesis, batch, padding, observe)

    def routed_batches(self) -> list[RoutedBatch] | None:
        """Return each micro-batch's router outputs, padding included; None if the model has no routers or fails."""
        routed = []
        for batch in self._batches:
            with recorded_returns(self._model) as returned:
                try:
                    self._emulate(self._forward, RIGHT, _whole(batch), torch.cat(batch.padding))
                except Exception as error:
                    self.failures.append(self._target.describe_error(error))
                    return None
            layers = self._target.router_logits(returned)
            if layers is None:
                return None
            behind = torch.arange(sum(map(len, batch.padding))) + len(batch.pack.ids_N)
            labels = [int((batch.pack.labels_N[tokens] != IGNORE_INDEX).sum()) for tokens in batch.tokens]
            padding = list(behind.split([len(ids) for ids in batch.padding]))
            routed.append(RoutedBatch(layers, batch.tokens, padding, labels))
        return routed

    def _working_forward(self) -> Callable[[Mapping[str, Any]], Tensor]:
        """Return a forward function that works: the plain function, or the script's if the model takes other arguments.

        If neither works, add the error of the script's function to `failures` and return that function.
        """
        forwards = self._plain_forward, self._script_forward
        for forward in forwards:
            try:
                self._logits(forward, RIGHT, False)
                return forward
            except Exception as error:
                if forward is forwards[-1]:
                    self.note_failure(error)
        return forwards[-1]

    def _logits(
        self, forward: Callable[[Mapping[str, Any]], Tensor], hypothesis: Hypothesis, on_one_rank: bool
    ) -> Tensor:
        batches = map(_whole, self._batches) if on_one_rank else self._batches
        return torch.cat([self._emulate(forward, hypothesis, batch) for batch in batches])

    def _emulate(
        self,
        forward: Callable[[Mapping[str, Any]], Tensor],
        hypothesis: Hypothesis,
        batch: MicroBatch,
        padding: Tensor | None = None,
        observe: CallObserver | None = None,
    ) -> Tensor:
        read, convolved = (
            [sequence for sequence in reading(batch) if len(sequence)]
            for reading in (hypothesis.readings, hypothesis.convolved or hypothesis.readings)
        )
        seen = VisibleTokens(hypothesis.allowed(batch), read, convolved)
        inputs = hypothesis.positions(batch), batch.tokens, seen, hypothesis.mistake
        with same_buffers(self._model):
            return emulate(forward, batch.pack.ids_N, *inputs, self._device, self.asked, padding, observe)

    def _plain_forward(self, part: Mapping[str, Any]) -> Tensor:
        return self._target.plain_forward(self._model, part)

    def _script_forward(self, part: Mapping[str, Any]) -> Tensor:
        return self._target.forward(self._model, part)


def _whole(batch: MicroBatch) -> MicroBatch:
    """Return the micro-batch with all of its tokens on one rank."""
    return batch._replace(tokens=[torch.arange(len(batch.pack.ids_N))])

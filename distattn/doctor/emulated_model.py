"""The model of one process, run as several ranks would run it: all micro-batches, with or without a mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.doctor.comparison import Finding, RankResult, distance
from distattn.doctor.emulation import CallObserver, Seen, emulate
from distattn.doctor.logit_mistakes import RIGHT, Hypothesis, MicroBatch, micro_batches_of
from distattn.doctor.recording import recorded_returns, same_buffers
from distattn.doctor.reference import ReferenceResult
from distattn.doctor.router_mistakes import RoutedBatch
from distattn.doctor.target import Target


class EmulatedModel:
    """Runs a hypothesis over all micro-batches, with the model of one process."""

    def __init__(self, target: Target, model: torch.nn.Module, reference: ReferenceResult, ranks: Sequence[RankResult]):
        self._target, self._model, self._batches = target, model, micro_batches_of(reference, ranks)
        self._device = next(model.parameters()).device
        # errors that the model raised while mistakes were tried
        self.failures: list[str] = []
        # names of the fields that its layers read from a batch
        self.asked: set[str] = set()
        self._forward = self._way_that_works()

    def __call__(self, hypothesis: Hypothesis, on_one_rank: bool) -> Tensor | None:
        try:
            return self._logits(self._forward, hypothesis, on_one_rank)
        except Exception as error:
            # such as positions beyond a table of them
            self.note_failure(error)
            return None

    def note_failure(self, error: Exception) -> None:
        """Note that something could not be tried in one process, and why."""
        self.failures.append(self._target.describe_error(error))

    def gives(self, logits_NV: Tensor, tolerance: float) -> bool:
        """Return whether ranks without a mistake compute these logits."""
        emulated_NV = self(RIGHT, False)
        return emulated_NV is not None and distance(emulated_NV, logits_NV) <= tolerance

    def with_failures(self, finding: Finding) -> Finding:
        """Return the finding, with what could not be tried added to it."""
        if not self.failures:
            return finding
        tried = f"; not all mistakes could be tried in one process: {self.failures[0]}"
        return finding._replace(observed=finding.observed + tried)

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """Return the micro-batches of the step."""
        return self._batches

    def logits_of(
        self, batch: MicroBatch, hypothesis: Hypothesis, gradients: bool = False, observe: CallObserver | None = None
    ) -> Tensor:
        """Compute the logits (N, V) of the ranks of a micro-batch. Raises what the model raises.

        gradients: whether a backward pass may follow. observe: takes every call of attention.
        """
        # a rank without tokens has one of padding, and then all have
        empty = not all(map(len, batch.tokens))
        padding = torch.zeros(int(empty), dtype=batch.pack.ids_N.dtype) if gradients else None
        return self._emulate(self._forward, hypothesis, batch, padding, observe)

    def routed_batches(self) -> list[RoutedBatch] | None:
        """Return router outputs for each micro-batch and all ranks' padding; None without routers, or if the model fails."""
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
            labels = [int((batch.pack.labels_N[own] != IGNORE_INDEX).sum()) for own in batch.tokens]
            padding = list(behind.split([len(one) for one in batch.padding]))
            routed.append(RoutedBatch(layers, batch.tokens, padding, labels))
        return routed

    def _way_that_works(self) -> Callable[[Mapping[str, Any]], Tensor]:
        """Return how to call the model: plainly, or as the script does where it takes other arguments.

        Where neither works, `failures` says what the script's way raises.
        """
        ways = self._plainly, self._by_script
        for forward in ways:
            try:
                self._logits(forward, RIGHT, False)
                return forward
            except Exception as error:
                if forward is ways[-1]:
                    self.note_failure(error)
        return ways[-1]

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
            [one for one in reading(batch) if len(one)]
            for reading in (hypothesis.readings, hypothesis.convolved or hypothesis.readings)
        )
        seen = Seen(hypothesis.allowed(batch), read, convolved)
        inputs = hypothesis.positions(batch), batch.tokens, seen, hypothesis.mistake
        with same_buffers(self._model):
            return emulate(forward, batch.pack.ids_N, *inputs, self._device, self.asked, padding, observe)

    def _plainly(self, part: Mapping[str, Any]) -> Tensor:
        return self._target.plain_forward(self._model, part)

    def _by_script(self, part: Mapping[str, Any]) -> Tensor:
        return self._target.forward(self._model, part)


def _whole(batch: MicroBatch) -> MicroBatch:
    """Return the micro-batch as one rank with all tokens has it."""
    return batch._replace(tokens=[torch.arange(len(batch.pack.ids_N))])

"""Repeat each step of the ranks' computation in one process, from the values that the ranks had before the step.

The ranks are emulated in one process. Each module input and output, and in the backward pass each gradient, is compared with
the ranks' recorded tensor and then replaced by it. An error therefore shows at the module, rank and tokens that caused it, and
rounding errors do not add up from module to module.
"""

# N tokens of a micro-batch, T tokens on a rank

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from distattn.doctor.comparison import RankResult, distance, in_global_order, parts_of
from distattn.doctor.emulated_model import EmulatedModel
from distattn.doctor.emulation import AttentionCall, emulated_rank
from distattn.doctor.logit_mistakes import RIGHT, Hypothesis, MicroBatch
from distattn.doctor.recording import (
    hooked_inputs,
    hooked_outputs,
    lookups,
    module_of_call,
    rounded_otherwise,
    unit_roundoff,
)
from distattn.doctor.reference import ReferenceResult, Tolerances, gradients_of

# the permitted difference, as a multiple of the measured effect of one rounding: for all of a rank's tokens, and for one token
_RANK_MARGIN, _TOKEN_MARGIN = 4.0, 8.0
# an additional factor in fp32: a different order of summation, as in attention, can have a larger effect than one rounding
_FINE_MARGIN = 10.0
# an additional factor for gradients: those of queries and keys are differences of rounded values, and the ranks cast more often
_GRADIENT_MARGIN = 3.0
# a factor that lowers the limit if another rank with at least _SEVERAL tokens matches one process exactly
_PEER_MARGIN, _SEVERAL = 0.4, 8
# the typical rounding error, as a fraction of the largest
_USUAL = 0.6
_SEEDS = (0, 1)
LOGITS = "logits"
# kinds of places
FORWARD, BACKWARD = ("input", "output"), ("gradient",)


class Place(NamedTuple):
    """The place of a tensor. kind: "input", "output" or "gradient". call: the name of the module's call."""

    micro_batch: int
    kind: str
    call: str

    @property
    def module(self) -> str:
        """The module's name."""
        return module_of_call(self.call)

    def __str__(self) -> str:
        return {
            "input": f"the input of {self.call}",
            "output": f"the output of {self.call}" if self.call != LOGITS else "the output of the model",
            "gradient": f"the gradient of the output of {self.call}",
        }[self.kind]


class LocalError(NamedTuple):
    """A difference on one rank, at one place, that rounding does not explain.

    tokens: the tokens of the batch that differ. ratio: the difference divided by the largest that rounding explains. relative:
    the norm of the difference divided by that of the expected values. expected_T, got_T: the expected and the rank's values.
    """

    place: Place
    rank: int
    tokens: list[int]
    ratio: float
    relative: float
    expected_T: Tensor
    got_T: Tensor


class LinkedCall(NamedTuple):
    """An attention call, and the place where its result is recorded."""

    call: AttentionCall
    place: Place


# for each rank, in execution order: the values that one process computes from the rank's recorded inputs, (T, ...) on the CPU
Computed = list[dict[Place, Tensor]]


class Replay:
    """The ranks' steps, repeated in one process, and the effect of rounding at each place. Raises the model's errors."""

    def __init__(
        self,
        emulation: EmulatedModel,
        model: torch.nn.Module,
        reference: ReferenceResult,
        ranks: Sequence[RankResult],
        tolerances: Tolerances,
    ):
        self._emulation, self._model, self._ranks = emulation, model, ranks
        self._dims, self._rounding = reference.token_dims, tolerances.rounding
        self._lookups = lookups(model)
        # attention calls whose result is a module's unchanged input
        self.calls: list[LinkedCall] = []
        self._gradients: dict[str, Tensor] = {}
        self.parameter_gradients: dict[str, Tensor] = {}
        self._parameter_noise: dict[str, float] = {}
        self._noise: list[dict[Place, Tensor]] = [{} for _ in ranks]
        self._exact: dict[tuple[int, Place], bool] = {}
        self._linked = False
        self.right = self._run(RIGHT)
        self._linked = True
        for seed in _SEEDS:
            self._measure_noise(seed, FORWARD)

    def add_backward(self) -> None:
        """Repeat the backward pass, too, so that errors in gradients can be found.

        Raises the model's errors, for example from layers recomputed in the backward pass.
        """
        right = self._run(RIGHT, backward=True)
        self.parameter_gradients = self._gradients
        for rank_values, backward_values in zip(self.right, right, strict=True):
            rank_values |= {place: values for place, values in backward_values.items() if place.kind == "gradient"}
        self._measure_noise(_SEEDS[0], BACKWARD)

    def first_errors(self, kinds: Sequence[str]) -> list[LocalError]:
        """Return the errors at the first place, of one of `kinds`, where rounding does not explain a difference.

        There is one error for each rank that differs there, largest first.
        """
        by_rank = [
            (list(right), {error.place: error for error in self._errors_of(rank, right) if error.place.kind in kinds})
            for rank, right in enumerate(self.right)
        ]
        earliest = min(
            ((order.index(next(iter(errors))), next(iter(errors))) for order, errors in by_rank if errors),
            default=None,
        )
        if earliest is None:
            return []
        first_of_ranks = [errors[earliest[1]] for _, errors in by_rank if earliest[1] in errors]
        return sorted(first_of_ranks, key=lambda error: -error.ratio)

    def lost_gradients(self) -> list[Place]:
        """Return the places whose gradient is zero on a rank but not in one process."""
        lost = {
            place: None
            for rank, right in enumerate(self.right)
            for place, expected in right.items()
            if place.kind == "gradient"
            and (got := self.got(rank, place)) is not None
            and not got.any()
            and float(expected.double().norm()) > self.bound(rank, place)
        }
        return list(lost)

    def parameter_errors(self) -> list[tuple[str, float]]:
        """Return the parameters whose gradient, summed over ranks, does not follow from the ranks' activations and gradients.

        The number with each is the norm of its gradient's error divided by the largest that rounding explains.
        """
        ratios = []
        for name, expected in self.parameter_gradients.items():
            parts = [part["parameter_gradients"].get(name) for _, part in parts_of(self._ranks)]
            if any(type(part) is Tensor for part in parts):
                total = sum((part.double() for part in parts if part is not None), torch.zeros_like(expected.double()))
                ratio = distance(total, expected) / self.parameter_bound(name)
                ratios.append((name, ratio))
        return [(name, ratio) for name, ratio in ratios if ratio > 1.0]

    def parameter_bound(self, name: str) -> float:
        """Return the norm of the largest difference in a parameter's gradient that rounding explains."""
        expected = self.parameter_gradients[name]
        floor = unit_roundoff(expected.dtype) * float(expected.double().norm())
        margin = _RANK_MARGIN * (_FINE_MARGIN if unit_roundoff(expected.dtype) < 1e-6 else 1.0)
        return max(margin * max(floor, self._parameter_noise.get(name, 0.0)), 1e-30)

    def computed(self, hypothesis: Hypothesis) -> Computed:
        """Return what one process computes from the ranks' recorded inputs under a hypothesis. Raises the model's errors."""
        return self._run(hypothesis)

    def worst_ratio(self, hypothesis: Hypothesis) -> float:
        """Return the largest ratio of a difference to what rounding explains, assuming that the hypothesis is true.

        Unless the hypothesis is RIGHT, any ratio above 1 gives infinity, to end the run early. Raises the model's errors.
        """
        try:
            computed = self.right if hypothesis is RIGHT else self._run(hypothesis, patient=False)
        except _ExceededError:
            return math.inf
        return max(
            (
                self._ratios(rank, place, values)[0]
                for rank, rank_values in enumerate(computed)
                for place, values in rank_values.items()
            ),
            default=0.0,
        )

    def hidden(self, kinds: Sequence[str]) -> float:
        """Return the largest relative error on one rank, at a place of one of `kinds`, that could pass as rounding."""
        return max(
            (
                self._bound(rank, place, values, peers=False) / norm
                for rank, right in enumerate(self.right)
                for place, values in right.items()
                if place.kind in kinds and (norm := float(values.double().norm())) > 0
            ),
            default=0.0,
        )

    def got(self, rank: int, place: Place) -> Tensor | None:
        """Return a rank's recorded values (T, ...) at a place. Return None if nothing was recorded there."""
        part = self._ranks[rank]["parts"][place.micro_batch]
        tokens = len(part["tokens"])
        if place.call == LOGITS:
            return part["logits"][:tokens]
        recorded = part[{"input": "inputs", "output": "outputs", "gradient": "output_gradients"}[place.kind]]
        dim = self._dims.get(place.call)
        if place.call not in recorded or dim is None:
            return None
        values = recorded[place.call]
        # a missing gradient counts as zero
        values = torch.zeros_like(part["outputs"][place.call]) if values is None else values
        return _rows(values, dim, tokens)

    def bound(self, rank: int, place: Place) -> float:
        """Return the norm of the largest difference that rounding explains at a place on a rank."""
        return self._bound(rank, place, self.right[rank][place])

    def tokens(self, rank: int, place: Place) -> Tensor:
        """Return the indices (T,) of a rank's tokens in the batch."""
        tokens: Tensor = self._ranks[rank]["parts"][place.micro_batch]["tokens"]
        return tokens

    def _errors_of(self, rank: int, computed: dict[Place, Tensor]) -> Iterator[LocalError]:
        for place, expected_T in computed.items():
            ratio, wrong_T = self._ratios(rank, place, expected_T)
            if ratio <= 1.0:
                continue
            got_T = self.got(rank, place)
            assert got_T is not None
            tokens = self.tokens(rank, place)
            named = tokens[wrong_T] if wrong_T.any() else tokens
            norm = max(float(expected_T.double().norm()), 1e-30)
            relative = float((got_T.double() - expected_T.double()).norm()) / norm
            yield LocalError(place, rank, named.tolist(), ratio, relative, expected_T, got_T)

    def _ratios(self, rank: int, place: Place, expected_T: Tensor) -> tuple[float, Tensor]:
        """Return the largest ratio of a difference to what rounding explains, and a mask (T,) of the tokens that exceed it."""
        got_T = self.got(rank, place)
        if got_T is None or got_T.shape != expected_T.shape:
            return 0.0, torch.zeros(len(expected_T), dtype=torch.bool)
        difference_T = _by_token(got_T.double() - expected_T.double())
        ratio_T = difference_T / self._token_bounds(rank, place, expected_T)
        whole = float(difference_T.norm()) / self._bound(rank, place, expected_T)
        # if the error over all tokens is too large, apply a lower limit to each token, since its share may be small
        each = _RANK_MARGIN / _TOKEN_MARGIN if whole > 1.0 else 1.0
        return max(whole, float(ratio_T.max()) if len(ratio_T) else 0.0), ratio_T > each

    def _bound(self, rank: int, place: Place, values_T: Tensor, peers: bool = True) -> float:
        floor = self._roundoff(rank, place) * float(values_T.double().norm())
        noise_T = self._noise[rank].get(place)
        noise = max(floor, 0.0 if noise_T is None else float(noise_T.norm()))
        return max(self._margins(rank, place, peers)[0] * noise, 1e-30)

    def _token_bounds(self, rank: int, place: Place, values_T: Tensor) -> Tensor:
        norm_T = _by_token(values_T)
        bound_T = self._roundoff(rank, place) * norm_T
        noise_T = self._noise[rank].get(place)
        if noise_T is not None and len(noise_T) == len(bound_T) and len(bound_T):
            usual = float((noise_T / norm_T.clamp(min=1e-30)).square().mean().sqrt())
            bound_T = torch.maximum(bound_T, torch.maximum(noise_T, usual * norm_T))
        # small values that are left after cancellation have absolute errors as large as those of other tokens
        least = 0.05 * float(bound_T.square().mean().sqrt()) if len(bound_T) else 0.0
        return (self._margins(rank, place)[1] * bound_T.clamp(min=least)).clamp(min=1e-30)

    def _roundoff(self, rank: int, place: Place) -> float:
        got_T = self.got(rank, place)
        dtype = self.right[rank][place].dtype if got_T is None else got_T.dtype
        return _USUAL * max(unit_roundoff(dtype), unit_roundoff(self.right[rank][place].dtype))

    def _margins(self, rank: int, place: Place, peers: bool = True) -> tuple[float, float]:
        """Return how much all tokens of a rank, and a single token, may differ, as multiples of the effect of one rounding.

        peers: True to allow less if another rank matches one process exactly (`_is_exact`).
        """
        if self._roundoff(rank, place) < 1e-6:
            more = _FINE_MARGIN * (_GRADIENT_MARGIN if place.kind == "gradient" else 1.0)
            return more * _RANK_MARGIN, more * _TOKEN_MARGIN
        got_T = self.got(rank, place)
        if place.kind == "gradient":
            cast = got_T is not None and got_T.dtype != self.right[rank][place].dtype
            more = _GRADIENT_MARGIN if cast else 1.0
            return more * _RANK_MARGIN, more * _GRADIENT_MARGIN * _TOKEN_MARGIN
        others = (other for other in range(len(self._ranks)) if other != rank)
        less = _PEER_MARGIN if peers and any(self._is_exact(other, place) for other in others) else 1.0
        return less * _RANK_MARGIN, less * _TOKEN_MARGIN

    def _is_exact(self, rank: int, place: Place) -> bool:
        """Return whether a rank has at least _SEVERAL tokens and matches one process exactly."""
        if (rank, place) not in self._exact:
            expected_T, got_T = self.right[rank].get(place), self.got(rank, place)
            several = expected_T is not None and len(expected_T) >= _SEVERAL
            self._exact[rank, place] = bool(
                several and expected_T is not None and got_T is not None and torch.equal(expected_T, got_T)
            )
        return self._exact[rank, place]

    def _measure_noise(self, seed: int, kinds: Sequence[str]) -> None:
        """Measure the effect of one more rounding on each token, at places of `kinds`, and on the parameters' gradients."""
        with rounded_otherwise(self._model, self._rounding, seed):
            moved = self._run(RIGHT, seed, kinds == BACKWARD)
        for noise, other, right in zip(self._noise, moved, self.right, strict=True):
            for place in other.keys() & right.keys():
                if place.kind not in kinds:
                    continue
                difference_T = _by_token(other[place].double() - right[place].double())
                noise[place] = torch.maximum(noise[place], difference_T) if place in noise else difference_T
        for name in self._gradients.keys() & self.parameter_gradients.keys():
            difference = distance(self._gradients[name], self.parameter_gradients[name])
            self._parameter_noise[name] = max(self._parameter_noise.get(name, 0.0), difference)

    def _run(
        self, hypothesis: Hypothesis, seed: int | None = None, backward: bool = False, patient: bool = True
    ) -> Computed:
        """Compute all micro-batches as the ranks would if the hypothesis were true.

        seed: if given, perturb the ranks' recorded values by one more rounding. backward: also run the backward pass. patient:
        False to raise _ExceededError at the first difference that rounding does not explain.
        """
        computed: Computed = [{} for _ in self._ranks]
        self._model.zero_grad()
        for number, batch in enumerate(self._emulation.micro_batches):
            self._run_micro_batch(number, batch, hypothesis, seed, backward, patient, computed)
        self._gradients = gradients_of(self._model)
        self._model.zero_grad()
        return computed

    def _run_micro_batch(
        self,
        number: int,
        batch: MicroBatch,
        hypothesis: Hypothesis,
        seed: int | None,
        backward: bool,
        patient: bool,
        computed: Computed,
    ) -> None:
        observed: list[tuple[AttentionCall, Tensor]] = []

        def swapped(rank: int, place: Place, values: Tensor) -> Tensor | None:
            """Store the computed values. Return the rank's recorded values for use instead, or None if it has none."""
            dim, tokens = self._dims.get(place.call), batch.tokens[rank]
            recorded_T = self.got(rank, place) if len(tokens) else None
            computed_T = None if dim is None else _rows(values, dim, len(tokens))
            if place.kind == "input" and observed and computed_T is not None and not self._linked:
                self._link(observed[-1], computed_T, tokens, place)
            if dim is None or recorded_T is None or computed_T is None or computed_T.shape != recorded_T.shape:
                return None
            if values.is_floating_point():
                computed[rank][place] = computed_T.detach().cpu().clone()
                if not patient and self._ratios(rank, place, computed[rank][place])[0] > 1:
                    raise _ExceededError
                if seed is not None and place.module not in self._lookups:
                    # in the forward pass, recorded values are exact unless they were cast
                    exact = not backward and recorded_T.dtype == values.dtype
                    error = unit_roundoff(torch.float32 if exact else recorded_T.dtype)
                    recorded_T = _disturbed(recorded_T, error, seed, rank, place)
            whole = values.detach().clone()
            whole.movedim(dim, 0)[: len(tokens)] = recorded_T.to(whole)
            return whole

        def at(kind: str, call: str, values: Tensor) -> Tensor | None:
            rank = emulated_rank()
            # do not replace integers such as positions: the embedding that reads them shows whether they are right
            if kind == "input" and not values.is_floating_point():
                return None
            other = swapped(rank, Place(number, kind, call), values)
            if other is None or not values.requires_grad:
                return other
            replaced: Tensor = _Replaced.apply(values, other)
            gradient = Place(number, "gradient", call)
            # a layer recomputed in the backward pass has no recorded gradients yet
            if (
                replaced.requires_grad
                and kind == "output"
                and call in self._ranks[rank]["parts"][number]["output_gradients"]
            ):
                replaced.register_hook(lambda values: swapped(rank, gradient, values))
            return replaced

        with (
            hooked_inputs(self._model, lambda call, values: at("input", call, values)),
            hooked_outputs(self._model, lambda call, values: at("output", call, values)),
        ):
            logits_NV = self._emulation.logits_of(
                batch, hypothesis, backward, lambda call, out: observed.append((call, out))
            )
        for rank, tokens in enumerate(batch.tokens):
            computed[rank][Place(number, "output", LOGITS)] = logits_NV[tokens].detach()
        if backward:
            parts = [result["parts"][number] for result in self._ranks]
            gradients = [part.get("logits_gradient", torch.zeros_like(part["logits"])) for part in parts]
            logits_NV.backward(in_global_order(gradients, batch.tokens).to(logits_NV))

    def _link(
        self,
        observed: tuple[AttentionCall, Tensor],
        input_T: Tensor,
        tokens: Tensor,
        place: Place,
    ) -> None:
        """Record the observed attention call and its place if the module's input there equals the call's result."""
        call, out_NHE = observed
        if any(link.call is call for link in self.calls):
            return
        result_T = out_NHE[tokens.to(out_NHE.device)].flatten(1)
        if input_T.flatten(1).shape == result_T.shape and torch.equal(input_T.flatten(1), result_T):
            self.calls.append(LinkedCall(call, place))


def on_one_rank(reference: ReferenceResult, ranks: Sequence[RankResult]) -> list[RankResult]:
    """Combine the ranks' results into the result of one rank with all tokens."""
    parts = []
    for number in range(len(reference.packs)):
        of_ranks = [result["parts"][number] for result in ranks]
        first = int(torch.cat([part["tokens"] for part in of_ranks]).min())
        tokens_of_ranks = [part["tokens"] - first for part in of_ranks]
        part: dict[str, Any] = {"tokens": torch.arange(sum(map(len, tokens_of_ranks))) + first, "output_gradients": {}}
        part["documents"] = of_ranks[0]["documents"]
        part["logits"] = in_global_order([of_rank["logits"] for of_rank in of_ranks], tokens_of_ranks)
        for kind in ("inputs", "outputs"):
            rows = {
                name: [_rows(of_rank[kind][name], dim, len(of_rank["tokens"])) for of_rank in of_ranks]
                for name, dim in reference.token_dims.items()
                if all(name in of_rank[kind] for of_rank in of_ranks)
            }
            part[kind] = {
                name: in_global_order(present, tokens_of_ranks).movedim(0, reference.token_dims[name])
                for name, by_rank in rows.items()
                if len(present := [values for values in by_rank if values is not None]) == len(by_rank)
                and len({values.shape[1:] for values in present}) == 1
            }
        parts.append(part)
    return [{**ranks[0], "parts": parts}]


def _rows(values: Tensor, dim: int, tokens: int) -> Tensor | None:
    """Move the token dimension to the front and drop padding. Return None if there are fewer than `tokens` rows."""
    if values.dim() <= dim or values.shape[dim] < tokens:
        return None
    return values.movedim(dim, 0)[:tokens]


class _ExceededError(Exception):
    """An error raised when a difference exceeds what rounding explains."""


class _Replaced(torch.autograd.Function):
    """A function that replaces a tensor's values and passes the gradient on to the original tensor unchanged."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, others: Tensor) -> Tensor:
        return others.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _disturbed(values_T: Tensor, error: float, seed: int, rank: int, place: Place) -> Tensor:
    """Return the values, each with a random relative error of at most `error`."""
    generator = torch.Generator().manual_seed(crc32(f"{seed} {rank} {place}".encode()))
    wide = values_T.to(torch.promote_types(values_T.dtype, torch.float32))
    noise = torch.rand(wide.shape, generator=generator) * 2 - 1
    return (wide + wide * noise.to(wide) * error).to(values_T.dtype)


def _by_token(values_T: Tensor) -> Tensor:
    """Return the norm of each token's values, (T,)."""
    return values_T.double().flatten(1).norm(dim=1) if values_T.dim() > 1 else values_T.double().abs()

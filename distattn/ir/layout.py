"""The layout: which tokens of the axis each rank owns, and their local order.

A layout is a list of *chunks* (rank, t0, t1): contiguous intervals that tile the axis. A rank's local tensor holds its
chunks one after another. The layout also knows where documents start, because positions and labels depend on that. The mask
says which tokens attend to which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from distattn.ir.arguments import checked
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints, as_int64
from distattn.ir.layout_cost import layout_cost, rows_area
from distattn.ir.load_balance import balance_items, place_documents, spread_documents
from distattn.ir.mask import Mask, document_ends

_MAX_RANKS = 1 << 20
# minimum length of a chunk in `document_zigzag`: the lesser of this, and a rank's share of the tokens divided by this
_MIN_CHUNK, _CHUNKS_OF_SHARE = 512, 64
# planning time grows with the square of the number of chunks, so limit the total to this, but allow each rank at least this many
_CHUNKS, _LEAST_OF_SHARE = 512, 8
# number of positions per chunk at which `balanced` may cut; work is assumed to be even between two positions
_POSITIONS_PER_CHUNK = 32
_WORK_WEIGHTS = (1, 2, 4, 8, 16)
# `balanced` splits documents with more than this share of a rank's work, over these multiples of as many ranks as they need
_LONG_SHARE, _SPREADS = 0.5, (1.0, 2.0, np.inf)
_CHUNK_COLUMNS = ("rank", "t0", "t1")
# ratios to the mean: the work of the busiest rank at which the search ends, and the maximum number of tokens on a rank
_GOOD_BALANCE, _MAX_TOKENS_OVER_MEAN = 1.01, 1.25


class Layout:
    """The ownership of the tokens on an axis of documents. Immutable; compare by `digest`.

    `chunks` is a dict of equal-length int64 columns `rank`, `t0`, `t1`, `row` (the first row of the chunk in the rank's
    local tensor), sorted by `t0`. `n` is the number of tokens, `ranks` the number of ranks. A rank may own no tokens.
    """

    @checked
    def __init__(self, lengths: Sequence[int], ranks: int, rank: Ints, t0: Ints, t1: Ints):
        """Create a layout; join adjacent chunks of a rank. Raise DistattnError if chunks do not tile the axis.

        rank, t0, t1: the owner and the tokens [t0, t1) of each chunk. A rank's chunks are in its local order.
        """
        self.ends = document_ends(lengths)
        self.n, self.ranks = int(self.ends[-1]), ranks
        rank, t0, t1 = (np.asarray(column, np.int64) for column in (rank, t0, t1))
        _check_chunks(self.n, ranks, rank, t0, t1)
        by_rank = np.argsort(rank, kind="stable")
        rank, t0, t1 = rank[by_rank], t0[by_rank], t1[by_rank]
        fresh = np.ones(len(t0), bool)
        fresh[1:] = (rank[1:] != rank[:-1]) | (t0[1:] != t1[:-1])
        last = np.append(np.flatnonzero(fresh)[1:], len(t0)) - 1
        rank, t0, t1 = rank[fresh], t0[fresh], t1[last]
        before = np.cumsum(t1 - t0) - (t1 - t0)
        row = before - before[np.searchsorted(rank, rank)]
        order = np.argsort(t0)
        self.chunks = {"rank": rank[order], "t0": t0[order], "t1": t1[order], "row": row[order]}
        for column in (self.ends, *self.chunks.values()):
            column.setflags(write=False)

    @staticmethod
    @checked
    def contiguous(lengths: Sequence[int], ranks: int) -> Layout:
        """Return a layout in which rank r owns the r-th of `ranks` equal intervals. Shards differ by at most one token."""
        cuts = _cuts(int(document_ends(lengths)[-1]), _positive(ranks))
        return Layout(lengths, ranks, *_nonempty(np.arange(ranks), cuts[:-1], cuts[1:]))

    @staticmethod
    @checked
    def zigzag(lengths: Sequence[int], ranks: int) -> Layout:
        """Return a layout in which rank r owns chunks r and 2R-1-r of 2R, which is equal work under a single causal mask.

        Shards differ by at most one token.
        """
        shard = np.diff(_cuts(int(document_ends(lengths)[-1]), _positive(ranks)))
        sizes = np.concatenate([shard - shard // 2, (shard // 2)[::-1]])
        t1 = np.cumsum(sizes)
        rank = np.concatenate([np.arange(ranks), np.arange(ranks)[::-1]])
        return Layout(lengths, ranks, *_nonempty(rank, t1 - sizes, t1))

    @staticmethod
    @checked
    def document_zigzag(lengths: Sequence[int], ranks: int, *, min_chunk: int | None = None) -> Layout:
        """Cut every document into up to 2R chunks of at least `min_chunk` tokens, and deal them to ranks in zigzag order.

        Each document starts at the rank with the fewest tokens so far (in a tie, at the first), so that many short documents
        balance. min_chunk: by default 512, or 1/64 of a rank's share (with many ranks, 1/8) if that is less.
        """
        ends, _ = document_ends(lengths), _positive(ranks)
        if min_chunk is None:
            chunks = min(_CHUNKS_OF_SHARE * ranks, max(_CHUNKS, _LEAST_OF_SHARE * ranks))
            min_chunk = max(1, min(_MIN_CHUNK, int(ends[-1]) // chunks))
        if min_chunk < 1:
            raise DistattnError(f"min_chunk must be at least 1 token, not {min_chunk}.")
        order = np.concatenate([np.arange(ranks), np.arange(ranks)[::-1]])
        tokens = np.zeros(ranks, np.int64)
        rank, t0, t1 = [], [], []
        for end, length in zip(ends, np.diff(ends, prepend=0), strict=True):
            count = max(1, min(2 * ranks, int(length) // min_chunk))
            cuts = end - length + _cuts(int(length), count)
            dealt = (int(tokens.argmin()) + order[:count]) % ranks
            np.add.at(tokens, dealt, np.diff(cuts))
            rank.append(dealt)
            t0.append(cuts[:-1])
            t1.append(cuts[1:])
        return Layout(lengths, ranks, np.concatenate(rank), np.concatenate(t0), np.concatenate(t1))

    @staticmethod
    @checked
    def block_cyclic(lengths: Sequence[int], ranks: int, *, block: int = 512) -> Layout:
        """Return a layout in which rank i % R owns block i. Blocks have `block` tokens; block=1 is striped attention."""
        n, _ = int(document_ends(lengths)[-1]), _positive(ranks)
        if block < 1:
            raise DistattnError(f"a block must have at least 1 token, not {block}.")
        t0 = np.arange(0, n, block)
        return Layout(lengths, ranks, np.arange(len(t0)) % ranks, t0, np.minimum(t0 + block, n))

    @staticmethod
    @checked
    def balanced(
        lengths: Sequence[int],
        ranks: int,
        *,
        mask: Mask | None = None,
        chunk: int | None = None,
        tolerance: float = 0.002,
    ) -> Layout:
        """Return the layout with the lowest estimated cost: about equal work and tokens on all ranks, and few, long chunks.

        mask: by default causal within each document. Candidates are `contiguous`, `zigzag`, `document_zigzag`, `placed`, layouts
        that keep short documents whole and split long ones over one or two times as many ranks as their work needs, or over all,
        and a layout of chunks that are about equally expensive. No rank has more than 1.25 times the mean tokens.
        `distattn.ir.layout_cost` estimates the costs. chunk: return the last candidate, with chunks of this many tokens on
        average. In it, the sum of a chunk's share of the tokens and its share of the work is the same for all chunks. Chunks are
        assigned to ranks, heaviest first, and then exchanged until the busiest rank is within `tolerance` of the mean.
        """
        n, _ = int(document_ends(lengths)[-1]), _positive(ranks)
        mask = Mask.documents(lengths) if mask is None else mask
        if (chunk is not None and chunk < 1) or mask.n != n or not tolerance >= 0:
            raise DistattnError(
                f"balanced needs chunks of at least 1 token (not {chunk}), a mask of {n} tokens (not {mask.n}) and a "
                f"tolerance of at least 0 (not {tolerance})."
            )
        # give each of many ranks fewer chunks, because planning time grows with the number of pairs of chunks
        each = 8 if ranks <= 256 else 4
        in_chunks = Layout._in_chunks_of_equal_work(
            lengths, ranks, mask, chunk or max(1, -(-n // (each * ranks))), tolerance
        )
        if chunk is not None or ranks == 1:
            return in_chunks
        documents = np.asarray(lengths, np.int64)
        work = rows_area(mask, np.append(0, np.cumsum(documents)))
        candidates = [
            Layout.contiguous(lengths, ranks),
            Layout.zigzag(lengths, ranks),
            Layout.placed(lengths, ranks, mask=mask),
            Layout.document_zigzag(lengths, ranks),
            *(
                Layout(lengths, ranks, *spread_documents(documents, work, ranks, _LONG_SHARE, spread))
                for spread in _SPREADS
            ),
            in_chunks,
        ]
        limit = _MAX_TOKENS_OVER_MEAN * n
        even = [candidate for candidate in candidates if candidate.shard_sizes().max() * ranks <= limit]
        return min(
            even or [in_chunks],
            key=lambda candidate: layout_cost(mask, ranks, *(candidate.chunks[column] for column in _CHUNK_COLUMNS)),
        )

    @staticmethod
    def _in_chunks_of_equal_work(
        lengths: Sequence[int], ranks: int, mask: Mask, chunk: int, tolerance: float
    ) -> Layout:
        """Return a layout of chunks of about `chunk` tokens, which gives all ranks about equally many chunks and equal work."""
        n = mask.n
        parts = -(-n // chunk)
        grid = _cuts(n, min(n, _POSITIONS_PER_CHUNK * parts))
        effort = np.append(0, np.cumsum(rows_area(mask, grid)))
        best: tuple[float, Ints, Ints] | None = None
        # if chunks with equal sums do not balance, increase the weight of work in the sum
        for weight in _WORK_WEIGHTS:
            share = weight * effort / max(effort[-1], 1) + grid / n
            cuts = np.unique(np.interp(np.linspace(0, share[-1], parts + 1), share, grid).round().astype(np.int64))
            work = rows_area(mask, cuts)
            rank = balance_items(work, ranks, tolerance)
            load = np.bincount(rank, work, ranks)
            uneven = float(load.max() / max(load.mean(), 1))
            crowded = np.bincount(rank, np.diff(cuts), ranks).max() > _MAX_TOKENS_OVER_MEAN * n / ranks
            if best is None or (uneven < best[0] and not crowded):
                best = uneven, rank, cuts
            if uneven <= _GOOD_BALANCE:
                break
        assert best is not None
        _, rank, cuts = best
        return Layout(lengths, ranks, rank, cuts[:-1], cuts[1:])

    @staticmethod
    @checked
    def placed(lengths: Sequence[int], ranks: int, *, mask: Mask | None = None, tolerance: float = 0.02) -> Layout:
        """Return a layout for data loaders that may choose the ranks of documents: equal work with few messages.

        mask: by default causal within each document. A document with more than (1 + tolerance) times a rank's mean work is split
        over about as many ranks as its work needs; other documents stay whole (see `distattn.ir.load_balance`). No rank has more
        than 1.01 times the mean tokens. Work is as even as these limits permit; strategy "cad" evens out the rest.
        """
        ends, _ = document_ends(lengths), _positive(ranks)
        n = int(ends[-1])
        mask = Mask.documents(lengths) if mask is None else mask
        if mask.n != n or not tolerance >= 0:
            raise DistattnError(
                f"placed needs a mask of {n} tokens (not {mask.n}) and a tolerance of at least 0 (not {tolerance})."
            )
        work = rows_area(mask, np.append(0, ends))
        return Layout(lengths, ranks, *place_documents(np.diff(ends, prepend=0), work, ranks, tolerance))

    @staticmethod
    @checked
    def from_chunks(lengths: Sequence[int], chunks: Sequence[Sequence[tuple[int, int]]]) -> Layout:
        """Return a layout from `chunks[rank]`, a list of the intervals (t0, t1) that a rank owns, in its local order."""
        try:
            rows = [(rank, t0, t1) for rank, intervals in enumerate(chunks) for t0, t1 in intervals]
        except (TypeError, ValueError):
            raise DistattnError("chunks must have a list of intervals (t0, t1) for each rank.") from None
        rank, t0, t1 = as_int64(rows, "chunks").reshape(-1, 3).T
        return Layout(lengths, _positive(len(chunks)), rank, t0, t1)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each document."""
        return tuple(np.diff(self.ends, prepend=0).tolist())

    @checked
    def tokens(self, rank: int) -> Ints:
        """Return the global coordinates of the tokens of `rank`, in local order."""
        self._check_rank(rank)
        mine = np.flatnonzero(self.chunks["rank"] == rank)
        mine = mine[np.argsort(self.chunks["row"][mine])]
        spans = [np.arange(self.chunks["t0"][i], self.chunks["t1"][i]) for i in mine]
        return np.concatenate(spans) if spans else np.zeros(0, np.int64)

    def shard_sizes(self) -> Ints:
        """Return the number of tokens of each rank."""
        size = self.chunks["t1"] - self.chunks["t0"]
        return np.bincount(self.chunks["rank"], size, self.ranks).astype(np.int64)

    @checked
    def shard(self, x: Any, rank: int, dim: int = 0) -> Any:
        """Return the tokens of `x` (numpy or torch, n tokens along `dim`) that `rank` owns, in local order."""
        _check_array(x, dim)
        if x.shape[dim] != self.n:
            raise DistattnError(f"dim {dim} has {x.shape[dim]} entries, but this layout has {self.n} tokens.")
        return x[_at(x, dim, self.tokens(rank))]

    @checked
    def unshard(self, shards: Sequence[Any], dim: int = 0) -> Any:
        """Invert `shard`: return x from the shards of all ranks."""
        for shard in shards:
            _check_array(shard, dim)
        sizes = [shard.shape[dim] for shard in shards]
        if sizes != self.shard_sizes().tolist():
            raise DistattnError(f"shards have {sizes} tokens, but this layout gives {self.shard_sizes().tolist()}.")
        shape = list(shards[0].shape)
        shape[dim] = self.n
        whole = np.empty(shape, shards[0].dtype) if isinstance(shards[0], np.ndarray) else shards[0].new_empty(shape)
        for rank, part in enumerate(shards):
            whole[_at(whole, dim, self.tokens(rank))] = part
        return whole

    @checked
    def position_ids(self, rank: int) -> Ints:
        """Return the position of each local token within its document."""
        return self.positions_of(self.tokens(rank))

    def positions_of(self, tokens: Ints) -> Ints:
        """Return the position of each token within its document. tokens: global coordinates."""
        starts = np.append(0, self.ends)
        return tokens - starts[np.searchsorted(self.ends, tokens, "right")]

    @checked
    def shift_labels(self, labels: Any, dim: int = -1, ignore_index: int = -100) -> Any:
        """Shift labels so that each token has its successor's; the last token of a document gets `ignore_index`.

        labels: the labels of the entire axis, along `dim`. Shift before sharding, because the successor may be on another rank.
        """
        _check_array(labels, dim)
        if abs(ignore_index) >= 1 << 63:
            raise DistattnError(f"ignore_index must be a 64-bit whole number, such as -100, not {ignore_index}.")
        if labels.shape[dim] != self.n:
            raise DistattnError(f"dim {dim} has {labels.shape[dim]} entries, but this layout has {self.n} tokens.")
        dtype = str(getattr(labels.dtype, "name", labels.dtype)).removeprefix("torch.")
        if dtype == "bool" or ("int" in dtype and not np.iinfo(dtype).min <= ignore_index <= np.iinfo(dtype).max):
            raise DistattnError(f"labels are {dtype}, which cannot hold ignore_index = {ignore_index}; give int64.")
        out = labels.copy() if isinstance(labels, np.ndarray) else labels.clone()
        out[_at(out, dim, slice(0, self.n - 1))] = labels[_at(labels, dim, slice(1, self.n))]
        out[_at(out, dim, self.ends - 1)] = ignore_index
        return out

    @property
    def digest(self) -> str:
        """A 128-bit hash of the documents, and of the ownership and local order of tokens."""
        parts = [np.int64(self.ranks), self.ends, *(self.chunks[name] for name in ("rank", "t0", "t1", "row"))]
        return hashlib.blake2b(b"".join(part.astype("<i8").tobytes() for part in parts), digest_size=16).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return (
            f"Layout({self.n} tokens, {len(self.ends)} documents, {self.ranks} ranks, {len(self.chunks['t0'])} chunks)"
        )

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.ranks:
            raise DistattnError(f"rank {rank} is outside this layout of {self.ranks} ranks.")


# layouts, keyed by their names in configurations
LAYOUTS = {
    "contiguous": Layout.contiguous,
    "zigzag": Layout.zigzag,
    "document_zigzag": Layout.document_zigzag,
    "block_cyclic": Layout.block_cyclic,
    "balanced": Layout.balanced,
    "placed": Layout.placed,
}


def make_layout(name: str, lengths: Sequence[int], ranks: int, mask: Mask, **options: Any) -> Layout:
    """Return the layout named `name` (a key of LAYOUTS) for documents of these lengths. Options go to its constructor."""
    work = {"mask": mask} if name in ("balanced", "placed") else {}
    return LAYOUTS[name](lengths, ranks, **work, **options)


def _positive(ranks: int) -> int:
    if not 1 <= ranks <= _MAX_RANKS:
        raise DistattnError(f"a layout needs at least 1 rank, and at most {_MAX_RANKS:,}, not {ranks}.")
    return ranks


def _check_array(x: Any, dim: int) -> None:
    if isinstance(x, type) or not hasattr(x, "shape") or not hasattr(x, "__getitem__"):
        raise DistattnError(f"the argument must be a tensor or an array, not a {type(x).__name__}.")
    if not -len(x.shape) <= dim < len(x.shape):
        raise DistattnError(f"dim {dim} does not exist: there are {len(x.shape)}.")


def _cuts(n: int, parts: int) -> Ints:
    return np.arange(parts + 1) * n // parts


def _nonempty(rank: Ints, t0: Ints, t1: Ints) -> tuple[Ints, Ints, Ints]:
    some = t0 < t1
    return rank[some], t0[some], t1[some]


def _at(x: Any, dim: int, index: Any) -> tuple[Any, ...]:
    return (slice(None),) * (dim % x.ndim) + (index,)


def _check_chunks(n: int, ranks: int, rank: Ints, t0: Ints, t1: Ints) -> None:
    outside = (rank < 0) | (rank >= ranks) | (t0 < 0) | (t1 > n) | (t0 >= t1)
    if outside.any():
        i = int(np.flatnonzero(outside)[0])
        raise DistattnError(
            f"chunk [{t0[i]}, {t1[i]}) of rank {rank[i]} is empty or outside the {n} tokens and {ranks} ranks."
        )
    order = np.argsort(t0, kind="stable")
    begin, end = np.append(t0[order], n), np.append(0, t1[order])
    broken = np.flatnonzero(begin != end)
    if len(broken):
        i = int(broken[0])
        fault = "owned by no rank" if begin[i] > end[i] else "owned twice"
        low, high = sorted((int(begin[i]), int(end[i])))
        raise DistattnError(f"tokens [{low}, {high}) are {fault}; the chunks of a layout tile the axis.")

"""The proposal of a launcher to its ranks when a run goes on: another configuration, and the checkpoint to go on from.

The proposal is a file of the run folder with a name of its own, which the launcher passes to its ranks and removes at its end.
Rank 0 applies it while it holds the run's lock, once nothing speaks against it, and gives the file its second name: ranks that
are started again by the same launcher find it there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import xxhash

from distattn.checkpoints.checkpoint_folder import choose_step
from distattn.checkpoints.owner import writer_is_alive, writer_name
from distattn.ir.errors import DistattnError
from distattn.training import config as configuration
from distattn.training.config import Config
from distattn.training.run_folder import RunFolder


class _Facts(NamedTuple):
    """The first line of a proposal. step: to go on from; before: the digest of the run's configuration when it was written."""

    step: int | None
    before: str


class Proposal:
    """The proposal of one launcher for the run of a folder. name: that the launcher passes to its ranks."""

    def __init__(self, run: RunFolder, name: str):
        self.run, self.name = run, name
        self.file, self.applied_file = run.proposed_config_file(name), run.applied_config_file(name)
        # whether this process wrote it: a proposal that is deleted meanwhile is still passed to the ranks, which then refuse
        self.was_written = False

    @classmethod
    def of_this_process(cls, run: RunFolder) -> Proposal:
        """Return the proposal of this process, a launcher, which is not written yet."""
        return cls(run, writer_name())

    def write(self, config: Config, step: int | None) -> None:
        """Write a configuration, and the step of the checkpoint to go on from, None for the newest good one. Raises OSError.

        The process holds the run's lock.
        """
        facts = _Facts(step, self._digest_of_run())
        configuration.save(config, self.file, f"# {json.dumps(facts._asdict())}\n")
        self.was_written = True

    def load(self) -> Config:
        """Return the proposed configuration. Raises DistattnError where the proposal is neither there nor applied."""
        # its name changes from the first to the second
        for file in (self.file, self.applied_file):
            if file.exists():
                return configuration.load(file)
        raise self._lost()

    def step(self) -> int | None:
        """Return the step to go on from; None for the newest good one, and once the proposal was applied."""
        facts = self._facts()
        return None if facts is None else facts.step

    @contextmanager
    def applied(self, config: Config) -> Iterator[None]:
        """Set aside what was saved after the proposed step while the block loads a checkpoint, and note that it was applied.

        The process is rank 0, and holds the run's lock. config: the proposed one. Where the block raises, the run is again as it
        was. Raises DistattnError where the run's configuration was changed since the proposal was written, and as `choose_step`.
        """
        if (facts := self._facts()) is None:
            if not self.applied_file.exists():
                raise self._lost()
            yield
            return
        if self._digest_of_run() != facts.before and configuration.load(self.run.config_file) != config:
            raise DistattnError(
                f"{self.run.config_file}: was changed by another command after this one had read it; give this one again."
            )
        if facts.step is None:
            yield
            self._note_applied()
            return
        with choose_step(self.run.checkpoints, facts.step):
            yield
            self._note_applied()

    def remove(self) -> None:
        """Remove what this launcher has written."""
        for file in (self.file, self.applied_file):
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def remove_of_dead(self) -> None:
        """Remove the proposals of launchers of this machine that were killed. The process holds the run's lock."""
        for name in self.run.proposals():
            with suppress(ValueError):
                if writer_is_alive(name) is False:
                    Proposal(self.run, name).remove()

    def _facts(self) -> _Facts | None:
        """Return the first line of the proposal; None without one, or where it was already applied."""
        with suppress(FileNotFoundError), open(self.file, encoding="utf-8") as lines:
            return _Facts(**json.loads(lines.readline().removeprefix("#")))
        return None

    def _note_applied(self) -> None:
        """Have ranks that are started again go on from what they save. Needs no room on the disk. Raises DistattnError."""
        try:
            self.file.rename(self.applied_file)
        except FileNotFoundError:
            raise self._lost() from None
        except OSError as error:
            raise DistattnError(
                f"{self.file}: cannot be renamed: {error.strerror}; make the folder writable."
            ) from None

    def _digest_of_run(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.run.config_file.read_bytes())

    def _lost(self) -> DistattnError:
        return DistattnError(
            f"{self.file}: the proposed configuration is gone, and was not applied; give distattn resume again."
        )

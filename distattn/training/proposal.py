"""A launcher's proposal for continuing a run: a new configuration, and the checkpoint to continue from.

The proposal is a file in the run folder with a unique name. The launcher passes the name to its ranks, and removes the
file when it ends. Rank 0 applies the proposal after all checks, while it holds the run's lock, and renames the file, so
ranks restarted by the same launcher find it under its second name.
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
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import Config
from distattn.training.run_folder import RunFolder


class _Facts(NamedTuple):
    """The first line of a proposal. step: the step to continue from. before: digest of the run's configuration when the
    proposal was written.
    """

    step: int | None
    before: str


class Proposal:
    """One launcher's proposal for a run. name: a unique name that the launcher passes to its ranks."""

    def __init__(self, run: RunFolder, name: str):
        self.run, self.name = run, name
        self.file, self.applied_file = run.proposed_config_file(name), run.applied_config_file(name)
        # True if this process wrote the proposal. Its name is passed to the ranks even if the file has been deleted since;
        # in that case the ranks refuse to start
        self.was_written = False

    @classmethod
    def of_this_process(cls, run: RunFolder) -> Proposal:
        """Return the proposal of this process, a launcher, without writing it."""
        return cls(run, writer_name())

    def write(self, config: Config, step: int | None) -> None:
        """Write the proposal. The process must hold the run's lock. Raises OSError.

        step: the step of the checkpoint to continue from; None for the newest good checkpoint.
        """
        facts = _Facts(step, self._digest_of_run())
        configuration.save(config, self.file, f"# {json.dumps(facts._asdict())}\n")
        self.was_written = True

    def load(self) -> Config:
        """Return the proposed configuration. Raises DistattnError if the file exists under neither of its two names."""
        # in this order, since rank 0 may rename the file from the first name to the second between the two checks
        for file in (self.file, self.applied_file):
            if file.exists():
                return configuration.load(file)
        raise self._lost()

    def step(self) -> int | None:
        """Return the step to continue from; None for the newest good checkpoint, or if the proposal has been applied."""
        facts = self._facts()
        return None if facts is None else facts.step

    @contextmanager
    def applied(self, config: Config) -> Iterator[None]:
        """Set aside checkpoints after the proposed step while the block loads a checkpoint, then mark the proposal as applied.

        Called on rank 0, which holds the run's lock. config: the proposed configuration. If the block raises, the
        checkpoints are restored. Raises DistattnError if the run's configuration was changed after the proposal was
        written, or if `choose_step` does.
        """
        if (facts := self._facts()) is None:
            if not self.applied_file.exists():
                raise self._lost()
            yield
            return
        if self._digest_of_run() != facts.before and configuration.load(self.run.config_file) != config:
            raise DistattnError(
                f"{self.run.config_file}: another command changed it after this one had read it; run this command again."
            )
        if facts.step is None:
            yield
            self._note_applied()
            return
        with choose_step(self.run.checkpoints, facts.step):
            yield
            self._note_applied()

    def remove(self) -> None:
        """Remove the proposal's file, under either name."""
        for file in (self.file, self.applied_file):
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def remove_of_dead(self) -> None:
        """Remove the proposals of killed launchers on this machine. The process must hold the run's lock."""
        for name in self.run.proposals():
            with suppress(ValueError):
                if writer_is_alive(name) is False:
                    Proposal(self.run, name).remove()

    def _facts(self) -> _Facts | None:
        """Return the first line of the proposal, or None if there is no proposal or it has been applied."""
        with suppress(FileNotFoundError), open(self.file, encoding="utf-8") as lines:
            return _Facts(**json.loads(lines.readline().removeprefix("#")))
        return None

    def _note_applied(self) -> None:
        """Rename the file, so that restarted ranks continue from the newest good checkpoint, not from the proposed step.

        Renaming needs no disk space. Raises DistattnError if the file is gone or cannot be renamed.
        """
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
            f"{self.file}: the proposed configuration is gone and was not applied; run distattn resume again."
        )

"""A run's health reports: measured as configured, and published by rank 0."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from distattn.driver.context_parallel import ContextParallel
from distattn.training.config.sections import HealthConfig
from distattn.training.health.health_reports import HealthReport, HealthReports
from distattn.training.job_secret import read_secret, write_secret
from distattn.training.reporting.metrics import MetricsReporter
from distattn.training.reporting.prometheus import PrometheusFile, PrometheusPort
from distattn.training.run_folder import RunFolder


class RunHealth(HealthReports):
    """`HealthReports` of a run. Raises DistattnError if the configured port cannot be opened."""

    def __init__(
        self, cp: ContextParallel, device: torch.device, config: HealthConfig, run: RunFolder, reporter: MetricsReporter
    ):
        self._opened = ExitStack()
        self._publishers: list[Callable[[HealthReport], None]] = [reporter.report_health]
        if reporter.visible and config.prometheus_file:
            self._publishers.append(PrometheusFile(Path(config.prometheus_file)).publish)
        if reporter.visible and config.prometheus_port:
            try:
                write_secret(run.prometheus_token)
            except OSError:
                # on a full disk, use the token of an earlier attempt
                if not run.prometheus_token.exists():
                    raise
            token = read_secret(run.prometheus_token).hex()
            port = PrometheusPort(config.prometheus_address, config.prometheus_port, token)
            self._opened.callback(port.close)
            self._publishers.append(port.publish)
        super().__init__(cp, device, config.every_steps, self._publish_everywhere)

    def close(self) -> None:
        """Close the reports and the port. See `HealthReports.close`."""
        super().close()
        self._opened.close()

    def _publish_everywhere(self, report: HealthReport) -> None:
        for publish in self._publishers:
            publish(report)

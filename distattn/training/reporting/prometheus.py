"""Health reports in Prometheus' text format, in a file that each report replaces or on a port that requires a token."""

from __future__ import annotations

import hmac
import importlib.util
import ipaddress
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

from distattn.ir.errors import DistattnError
from distattn.ir.text_format import print_message
from distattn.training.health.device_counters import COUNTERS
from distattn.training.health.health_reports import HealthReport
from distattn.training.reporting.json_lines import write_whole

if TYPE_CHECKING:
    from prometheus_client.core import Metric

# field of a health report -> metric name and help text
_BY_RANK = {
    "seconds": ("distattn_step_seconds", "Seconds of a step."),
    "compute_seconds": ("distattn_compute_seconds", "Seconds of a step without waiting for ranks and data."),
    "wait_seconds": ("distattn_wait_seconds", "Seconds of a step that the host waits for other ranks."),
    "data_seconds": ("distattn_data_seconds", "Seconds of a step until its data arrive."),
    "probe_seconds": ("distattn_probe_seconds", "Seconds of a fixed matrix product on the device."),
}
# seconds that a client has to send its request
_REQUEST_SECONDS = 10.0


def prometheus_text(report: HealthReport) -> bytes:
    """Return a report in the text exposition format, version 0.0.4, without unknown values."""
    # the import takes half a second, and only runs that publish their reports need it
    from prometheus_client import generate_latest

    return generate_latest(_Report(report))


def _require_client() -> None:
    """Raise DistattnError if prometheus_client is not installed."""
    if importlib.util.find_spec("prometheus_client") is None:
        raise DistattnError(
            "health.prometheus_file and health.prometheus_port need the package prometheus_client: pip install "
            "'distattn[train]'."
        )


class PrometheusFile:
    """A file for the node exporter's textfile collector. Each report replaces it. A full disk does not end the run."""

    def __init__(self, path: Path):
        _require_client()
        self._path, self._warned = path, False

    def publish(self, report: HealthReport) -> None:
        """Write a report atomically. Warn at the first failure."""
        try:
            write_whole(self._path, prometheus_text(report).decode())
        except OSError as error:
            if not self._warned:
                print_message(f"{self._path}: cannot be written: {error.strerror}; the run goes on.")
            self._warned = True


class PrometheusPort:
    """An HTTP server for http://ADDRESS:PORT/metrics that requires the header "Authorization: Bearer TOKEN".

    It listens on `address` only. port: 0 picks a free port. Raises DistattnError if it cannot listen there.
    """

    def __init__(self, address: str, port: int, token: str):
        _require_client()
        self._text = b""
        family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET

        class Server(ThreadingHTTPServer):
            address_family = family
            daemon_threads = True

        try:
            self._server = Server((address, port), self._handler(f"Bearer {token}"))
        except OSError as error:
            raise DistattnError(
                f"health.prometheus_port: cannot listen on {address}, port {port} ({error.strerror}); name another port, or "
                "an address of rank 0's machine in health.prometheus_address."
            ) from None
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True, name="distattn-prometheus")
        self._thread.start()

    def publish(self, report: HealthReport) -> None:
        """Serve this report from now on."""
        self._text = prometheus_text(report)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self, expected: str) -> type[BaseHTTPRequestHandler]:
        port = self

        class Handler(BaseHTTPRequestHandler):
            timeout = _REQUEST_SECONDS

            def do_GET(self) -> None:
                authorization = self.headers.get("Authorization", "").encode("utf-8", "replace")
                if not hmac.compare_digest(authorization, expected.encode()):
                    self.send_response(401)
                    self.send_header("WWW-Authenticate", "Bearer")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if self.path != "/metrics":
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(port._text)))
                self.end_headers()
                self.wfile.write(port._text)

            def log_message(self, format: str, *arguments: object) -> None:
                # do not print a line for each scrape
                pass

        return Handler


class _Report:
    """A health report as a collector for prometheus_client."""

    def __init__(self, report: HealthReport):
        self._report = report

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics that have a value."""
        report = self._report
        yield from self._gauge("distattn_step", "Steps done.", [({}, float(report.step))])
        for field, (name, description) in _BY_RANK.items():
            rows = [(self._labels(rank), value) for rank, value in enumerate(getattr(report, field))]
            yield from self._gauge(name, description, rows)
        errors = [
            (self._labels(rank) | {"kind": kind}, value)
            for rank, counters in enumerate(report.counters)
            for kind, value in zip(COUNTERS, counters, strict=True)
        ]
        yield from self._gauge("distattn_device_errors", "Error counts of the rank's GPU, from NVML.", errors)
        if report.slowest is not None:
            slow = [(self._labels(report.slowest), report.over_median)]
            description = "Share by which the slowest rank is above the median."
            yield from self._gauge("distattn_slowest_over_median", description, slow)

    def _gauge(self, name: str, description: str, rows: list[tuple[dict[str, str], float | None]]) -> Iterator[Metric]:
        from prometheus_client.core import Metric

        metric = Metric(name, description, "gauge")
        for labels, value in rows:
            if value is not None:
                metric.add_sample(name, labels, value)
        if metric.samples:
            yield metric

    def _labels(self, rank: int) -> dict[str, str]:
        return {"rank": str(rank), "host": self._report.hosts[rank]}

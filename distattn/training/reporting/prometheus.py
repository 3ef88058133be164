"""Health reports in Prometheus' text format: a file that each report replaces, or a port whose scrapes need a token."""

from __future__ import annotations

import hmac
import ipaddress
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from distattn.ir.errors import DistattnError
from distattn.training.health.device_counters import COUNTERS
from distattn.training.health.health_reports import HealthReport
from distattn.training.reporting.json_lines import write_whole

# for each field of a report: its metric's name and help text
_BY_RANK = {
    "seconds": ("distattn_step_seconds", "Seconds of a step."),
    "compute_seconds": ("distattn_compute_seconds", "Seconds of a step without waiting for ranks and data."),
    "wait_seconds": ("distattn_wait_seconds", "Seconds of a step that the host waits for other ranks."),
    "data_seconds": ("distattn_data_seconds", "Seconds of a step until its data arrive."),
    "probe_seconds": ("distattn_probe_seconds", "Seconds of a fixed matrix product on the device."),
}
_ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
# seconds in which a scrape must send its request
_REQUEST_SECONDS = 10.0


def prometheus_text(report: HealthReport) -> str:
    """Return a report in the text exposition format, version 0.0.4; unknown values are left out."""
    return "".join(f"{line}\n" for line in _lines(report))


class PrometheusFile:
    """A file for the node exporter's textfile collector, which each report replaces. A full disk does not end the run."""

    def __init__(self, path: Path):
        self._path, self._warned = path, False

    def publish(self, report: HealthReport) -> None:
        """Write a report, whole or not at all; warns at the first failure."""
        try:
            write_whole(self._path, prometheus_text(report))
        except OSError as error:
            if not self._warned:
                sys.stderr.write(f"distattn: {self._path}: cannot be written: {error.strerror}; the run goes on.\n")
            self._warned = True


class PrometheusPort:
    """http://ADDRESS:PORT/metrics on that address only, for requests with the header "Authorization: Bearer TOKEN".

    port: 0 for a free one. Raises DistattnError where it cannot listen there.
    """

    def __init__(self, address: str, port: int, token: str):
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
        self._text = prometheus_text(report).encode()

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
                # no line in the run's output for each scrape
                pass

        return Handler


def _lines(report: HealthReport) -> Iterator[str]:
    yield from _gauge("distattn_step", "Steps done.", [("", float(report.step))])
    for field, (name, description) in _BY_RANK.items():
        rows = [(_labels(report, rank), value) for rank, value in enumerate(getattr(report, field))]
        yield from _gauge(name, description, rows)
    errors = [
        (_labels(report, rank, kind=kind), value)
        for rank, counters in enumerate(report.counters)
        for kind, value in zip(COUNTERS, counters, strict=True)
    ]
    yield from _gauge("distattn_device_errors", "Error counts of the rank's GPU, from NVML.", errors)
    if report.slowest is not None:
        slow = [(_labels(report, report.slowest), report.over_median)]
        yield from _gauge("distattn_slowest_over_median", "Share by which the slowest rank is above the median.", slow)


def _gauge(name: str, description: str, rows: list[tuple[str, float | None]]) -> Iterator[str]:
    known_rows = [(labels, value) for labels, value in rows if value is not None]
    if known_rows:
        yield f"# HELP {name} {description}"
        yield f"# TYPE {name} gauge"
        yield from (f"{name}{labels} {value!r}" for labels, value in known_rows)


def _labels(report: HealthReport, rank: int, **more: str) -> str:
    labels = {"rank": str(rank), "host": report.hosts[rank], **more}
    return "{" + ",".join(f'{name}="{value.translate(_ESCAPED)}"' for name, value in labels.items()) + "}"

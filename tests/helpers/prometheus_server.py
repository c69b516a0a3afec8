# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus on a host of its own, with the configuration that is shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import yaml
from harness.network_namespace import RemoteHost
from harness.processes import ManagedProcess, free_port
from queries import RULES

# Of 1 s, one scrape of a busy host may be late and count as failed.
_INTERVAL = "2s"


class PrometheusServer(ManagedProcess):
    """Scrapes every two seconds; ready when constructed.

    Args:
        host: Where it runs.
        directory: An existing one, for its data and log.
        targets: HOST:PORT by job of ``deploy/prometheus/scrape.yaml``.

    Raises:
        ProcessError: It did not become ready.
    """

    def __init__(
        self, host: RemoteHost, directory: Path, targets: dict[str, list[str]]
    ) -> None:
        config = yaml.safe_load(RULES.with_name("scrape.yaml").read_text())
        config["global"] = {
            f"{what}_interval": _INTERVAL for what in ("scrape", "evaluation")
        }
        config["rule_files"] = [str(RULES)]
        for job in config["scrape_configs"]:
            job["static_configs"] = [{"targets": targets[job["job_name"]]}]
        file = directory / "prometheus.yaml"
        file.write_text(json.dumps(config))
        place = f"{host.address}:{free_port()}"
        self._url = f"http://{place}"
        super().__init__(
            "Prometheus",
            [
                *(*host.command, "prometheus", "--config.file", file),
                *("--storage.tsdb.path", directory / "data"),
                *("--web.listen-address", place, "--log.level", "warn"),
            ],
            directory / "prometheus.log",
            health_url=f"{self._url}/-/ready",
        )
        try:
            self.wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def query(self, expression: str, time_s: float | None = None) -> dict[str, float]:
        """Values of an expression by their labels, now or at a Unix time."""
        asked = {"query": expression} | ({"time": str(time_s)} if time_s else {})
        answer = self._get("query", asked)
        return {
            json.dumps(each["metric"], sort_keys=True): float(each["value"][1])
            for each in answer["result"]
        }

    def alerts(self) -> dict[str, dict[str, Any]]:
        """One pending or firing alert of each kind."""
        found = self._get("alerts", {})["alerts"]
        return {alert["labels"]["alertname"]: alert for alert in found}

    def _get(self, what: str, parameters: dict[str, str]) -> dict[str, Any]:
        reply = httpx.get(f"{self._url}/api/v1/{what}", params=parameters, timeout=30)
        body = reply.json()
        assert body["status"] == "success", body
        return body["data"]

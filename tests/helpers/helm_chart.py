# SPDX-License-Identifier: Apache-2.0
"""The chart of memory nodes, rendered by the real ``helm``; ``.ci/deploy-tools``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART = DEPLOY / "helm" / "memory-nodes"
#: Sets of values, each for another kind of installation.
VALUES = sorted((CHART / "ci").glob("*.yaml"))
NAMESPACE = "serving"
_OPT = Path(sys.prefix) / "opt"
HELM = which("helm", path=str(_OPT / "bin")) or which("helm")
VALIDATE = which("kubernetes-validate", path=str(_OPT / "kubernetes-validate" / "bin"))

needs_helm = pytest.mark.skipif(not HELM, reason="needs helm (.ci/deploy-tools)")
needs_schemas = pytest.mark.skipif(
    not VALIDATE, reason="needs kubernetes-validate (.ci/deploy-tools)"
)


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run helm; nothing of the user's configuration or of a cluster is read."""
    assert HELM is not None
    return subprocess.run(
        [HELM, *arguments],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def rendered(*options: str | Path) -> list[dict[str, Any]]:
    """Objects of an installation named ``memory-nodes``, by its template."""
    ran = helm("template", "memory-nodes", CHART, "--namespace", NAMESPACE, *options)
    assert ran.returncode == 0, ran.stderr
    return [each for each in yaml.safe_load_all(ran.stdout) if each]


def notes(*options: str | Path) -> str:
    """What an installation prints."""
    dry_run = ("--dry-run=client", "--namespace", NAMESPACE)
    ran = helm("install", "memory-nodes", CHART, *dry_run, *options)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.partition("\nNOTES:\n")[2]


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The one object of a kind."""
    (found,) = (each for each in objects if each["kind"] == kind)
    return found


def pod_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """Specification of the nodes' pods."""
    spec: dict[str, Any] = of_kind(objects, "StatefulSet")["spec"]["template"]["spec"]
    return spec


def container_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """Their one container."""
    container: dict[str, Any]
    (container,) = pod_of(objects)["containers"]
    return container

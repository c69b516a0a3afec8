# SPDX-License-Identifier: Apache-2.0
"""The chart: templates, values and the text that an installation prints.

Nothing here has a cluster. Objects are compared with the schemas of three versions of
Kubernetes; kinds of others, which have none there, with the fields in `KNOWN_FIELDS`.
"""

from __future__ import annotations

import json
import re
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from certificates import Authority
from helm_chart import (
    CHART,
    DEPLOY,
    NAMESPACE,
    VALIDATE,
    VALUES,
    container_of,
    helm,
    needs_helm,
    needs_schemas,
    notes,
    of_kind,
    pod_of,
    rendered,
)

from vllm_attn_offload import __version__
from vllm_attn_offload.config import AttentionOffloadConfig

pytestmark = needs_helm

KUBERNETES = ("1.31", "1.34", "1.37")
EVERYTHING = CHART / "ci" / "everything-values.yaml"
TOKEN = ("--set", "auth.existingSecret=attn-offload-token")
#: Of kinds whose schemas the validator lacks; they were once compared with the
#: definitions of their makers (docs/deploy.md).
KNOWN_FIELDS = {
    ("monitoring.coreos.com/v1", "PodMonitor"): {"selector", "podMetricsEndpoints"},
    ("monitoring.coreos.com/v1", "PrometheusRule"): {"groups"},
    ("cert-manager.io/v1", "Certificate"): {
        *("secretName", "duration", "renewBefore", "dnsNames", "usages"),
        *("privateKey", "issuerRef"),
    },
    ("ray.io/v1", "RayCluster"): {"headGroupSpec", "workerGroupSpecs"},
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): {
        *("replicas", "leaderWorkerTemplate"),
    },
}


def pods_in(part: Any) -> list[dict[str, Any]]:
    """Pods of the templates within an object."""
    if isinstance(part, list):
        return [pod for each in part for pod in pods_in(each)]
    if not isinstance(part, dict):
        return []
    if "containers" in part.get("spec", {}):
        pod = {"apiVersion": "v1", "kind": "Pod", "spec": part["spec"]}
        return [pod | {"metadata": part.get("metadata", {}) | {"name": "pod"}}]
    return [pod for each in part.values() for pod in pods_in(each)]


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_lint(values: Path) -> None:
    ran = helm("lint", "--strict", CHART, "--values", values)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@needs_schemas
@pytest.mark.parametrize("version", KUBERNETES)
def test_objects_have_the_schema_of_kubernetes(version: str, tmp_path: Path) -> None:
    """And the pods within objects of other makers' kinds."""
    others: list[str] = []
    files = []
    examples = sorted((DEPLOY / "examples").glob("*.yaml"))
    for source in (*VALUES, *examples):
        if source in VALUES:
            objects = rendered("--values", source)
        else:
            objects = list(yaml.safe_load_all(source.read_text()))
        objects = [each for each in objects if "kind" in each]
        for index, each in enumerate(objects):
            fields = KNOWN_FIELDS.get((each["apiVersion"], each["kind"]))
            if fields is not None:
                others.append(each["kind"])
                assert each["spec"].keys() <= fields
            for part in [each] if fields is None else pods_in(each):
                files.append(tmp_path / f"{source.stem}-{index}-{len(files)}.yaml")
                files[-1].write_text(yaml.safe_dump(part))
    assert {kind for _, kind in KNOWN_FIELDS} == set(others)
    assert VALIDATE is not None
    ran = subprocess.run(
        [VALIDATE, "--kubernetes-version", version, "--strict", *files],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (ran.stdout + ran.stderr).count(" passed ") == len(files) >= 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), r"auth has 0 of existingSecret, token and insecure\. Allowed: one"),
        ((*TOKEN, "--set", "auth.insecure=true"), r"auth has 2 of .* Allowed: one of"),
        (("--set", "auth.token=short"), r"'/auth/token': minLength: got 5, want 32"),
        (
            (*TOKEN, "--set", "tls.certManager.enabled=true"),
            r"no issuerRef\.name\. Allowed: the name of an Issuer",
        ),
        (
            (
                *(*TOKEN, "--set", "tls.existingSecret=x"),
                *("--set", "tls.certManager.enabled=true"),
            ),
            r"existingSecret and certManager\.enabled\. Allowed: one of them",
        ),
        ((*TOKEN, "--set", "kvCacheGiB=5"), r"additional properties 'kvCacheGiB'"),
        ((*TOKEN, "--set", "kvCacheGib=0"), r"'/kvCacheGib': exclusiveMinimum"),
        ((*TOKEN, "--set-json", "networkPolicy.engines=[]"), r"engines': minItems"),
    ],
)
def test_refusals(options: tuple[str, ...], message: str) -> None:
    ran = helm("template", "memory-nodes", CHART, *options)
    assert ran.returncode == 1
    assert re.search(message, ran.stderr), ran.stderr


def test_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__


def test_every_value_is_described() -> None:
    """The schema has the keys of values.yaml and no others, each with a sentence."""

    def check(schema: dict[str, Any], values: dict[str, Any]) -> None:
        properties = schema["properties"]
        assert properties.keys() - {"global"} == values.keys()
        for name, part in properties.items():
            if "properties" in part:
                check(part, values[name])
            else:
                assert len(part["description"]) > 12, name

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    check(json.loads((CHART / "values.schema.json").read_text()), values)


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_pods_are_restricted(values: Path) -> None:
    """What Kubernetes calls the restricted pod security standard, and more."""
    pod, container = (
        each(rendered("--values", values)) for each in (pod_of, container_of)
    )
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = container.get("volumeMounts", [])
    assert {each["name"] for each in mounts} == {
        each["name"] for each in pod.get("volumes", [])
    }


@pytest.mark.parametrize(
    ("options", "mebibytes"),
    [
        (("--set", "kvCacheGib=16"), 18 * 1024),
        (("--set-json", "kvCacheGib=0.5"), 2560),
        (("--set", "kvCacheGib=80,overheadGib=8,gpu.enabled=true"), 8192),
    ],
)
def test_memory(options: tuple[str, ...], mebibytes: int) -> None:
    resources = container_of(rendered(*TOKEN, *options))["resources"]
    assert resources["requests"]["memory"] == f"{mebibytes}Mi"
    assert resources["limits"]["memory"] == f"{mebibytes}Mi"
    assert "cpu" not in resources["limits"]


def test_exclusive_cpus_are_guaranteed() -> None:
    resources = container_of(rendered("--values", EVERYTHING))["resources"]
    assert resources["requests"] == resources["limits"]
    assert resources["limits"]["cpu"] == "32"


def test_start_may_touch_all_memory() -> None:
    """The slowest that was seen, a busy virtual machine, took 3.4 s a GiB."""
    container = container_of(rendered("--values", EVERYTHING))
    assert "--preallocate" in container["args"]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 60 + 5 * 256


def test_notes_name_the_pods() -> None:
    printed = notes("--values", EVERYTHING)
    options = dict(
        re.findall(r"--attention-offload-config\.(\w+) '?(.+?)'?$", printed, re.M)
    )
    nodes = AttentionOffloadConfig.from_dict(options).memory_nodes
    service = of_kind(rendered("--values", EVERYTHING), "Service")["metadata"]["name"]
    assert list(nodes) == [
        f"memory-nodes-{index}.{service}.{NAMESPACE}:7600" for index in range(8)
    ]
    assert options["auth_token_file"] == "/etc/attn-offload/token"


def test_certificate_is_for_every_node(tmp_path: Path) -> None:
    """A client that checks names takes it for the addresses that the notes print."""
    values = CHART / "ci" / "cert-manager-values.yaml"
    names = of_kind(rendered("--values", values), "Certificate")["spec"]["dnsNames"]
    signed = Authority(tmp_path).sign("node", ",".join(f"DNS:{name}" for name in names))
    nodes = re.findall(r'"([\w.-]+):\d+"', notes("--values", values))
    assert len(nodes) == 4
    for host in (*nodes, f"{nodes[0]}.svc", f"{nodes[0]}.svc.cluster.local"):
        assert is_accepted(signed.cert, signed.key, signed.ca, host)
    assert not is_accepted(signed.cert, signed.key, signed.ca, f"{NAMESPACE}.svc")


def is_accepted(cert: str, key: str, ca: str, host: str) -> bool:
    """Whether a client that wants ``host`` ends a handshake in memory."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(cert, key)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_context = ssl.create_default_context(cafile=ca)
    client = client_context.wrap_bio(to_client, to_server, server_hostname=host)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return True


def test_rules_and_dashboard_are_those_of_deploy() -> None:
    objects = rendered("--values", EVERYTHING)
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())
    assert of_kind(objects, "PrometheusRule")["spec"] == rules
    dashboards = sorted((DEPLOY / "grafana").glob("*.json"))
    assert of_kind(objects, "ConfigMap")["data"] == {
        path.name: path.read_text() for path in dashboards
    }

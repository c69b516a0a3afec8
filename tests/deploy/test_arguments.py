# SPDX-License-Identifier: Apache-2.0
"""Every command in deploy/ and its page, by the product's own parsers."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_chart import (
    CHART,
    DEPLOY,
    NAMESPACE,
    VALUES,
    container_of,
    needs_helm,
    of_kind,
    rendered,
)
from node_process import COMMAND
from serve_options import serve_options

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.doctor.command import add_doctor
from vllm_attn_offload.memory_node.args import parse_options
from vllm_attn_offload.ray_nodes.command import add_ray
from vllm_attn_offload.status.command import add_status

TOKEN = "/run/secrets/token"
EXAMPLES = DEPLOY / "examples"
PAGE = DEPLOY.parent / "docs" / "deploy.md"
#: What LeaderWorkerSet puts into each pod, here of the second one.
LWS = {"SIZE": "2", "INDEX": "1", "ADDRESS": "vllm-0.vllm.default"}


def loaded(name: str) -> Any:
    return yaml.safe_load((EXAMPLES / name).read_text())


@pytest.fixture
def compose() -> dict[str, Any]:
    """The composition with its variables left at their defaults."""
    text = (EXAMPLES / "docker-compose.yml").read_text()
    composition: dict[str, Any]
    composition = yaml.safe_load(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text))
    return composition


def engine_of(command: list[str], model: str) -> AttentionOffloadConfig:
    """Options of a ``vllm serve`` whose model, a name of a hub, is replaced."""
    program, verb, _, *arguments = command
    assert program == "vllm"
    return serve_options([verb, model, *arguments])


def health_of(service: dict[str, Any]) -> str:
    """Program of Python that a service's health check runs."""
    kind, python, option, program = service["healthcheck"]["test"]
    assert (kind, python, option) == ("CMD", "python", "-c")
    return str(program)


def tool_options(arguments: list[str]) -> argparse.Namespace:
    """Options of a ``vllm-attn-offload`` that operates."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    for add in (add_status, add_doctor, add_ray):
        add(commands)
    return parser.parse_args(arguments)


@needs_helm
@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_chart(values: Path) -> None:
    container = container_of(rendered("--values", values))
    parsed = parse_options(container["args"])
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert [(each.host, each.port) for each in parsed.listen] == [
        ("0.0.0.0", ports["attention"])
    ]
    assert parsed.metrics_listen.port == ports["metrics"]
    assert parsed.name == f"{NAMESPACE}/$(POD_NAME)"
    files = (parsed.auth_token_file, parsed.tls_cert, parsed.tls_key, parsed.tls_ca)
    mounts = [each["mountPath"] for each in container.get("volumeMounts", [])]
    for file in filter(None, files):
        assert any(file.startswith(f"{mount}/") for mount in mounts)
    is_gpu = values.name.startswith("gpu")
    assert parsed.device == ("cuda:0" if is_gpu else "cpu")
    if not is_gpu:
        memory = int(container["resources"]["limits"]["memory"].removesuffix("Mi"))
        assert memory >= parsed.kv_cache_gib * 1024 + 1536


def test_image() -> None:
    """Its entry point is the command, and health is left to who knows the port."""
    file = (DEPLOY / "container" / "Dockerfile").read_text().replace("\\\n", "")
    found = dict(re.findall(r"^(ENTRYPOINT|CMD|EXPOSE|USER) +(.+)$", file, re.M))
    assert json.loads(found["ENTRYPOINT"]) == [COMMAND.name]
    parsed = parse_options(json.loads(found["CMD"]))
    ports = [parsed.listen[0].port, parsed.metrics_listen.port]
    assert found["EXPOSE"].split() == list(map(str, ports))
    assert "HEALTHCHECK" not in re.sub("^#.*$", "", file, flags=re.M)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", found["USER"])


def test_compose(compose: dict[str, Any], smollm2: str) -> None:
    """The engine uses the composition's nodes, port and token."""
    services = compose["services"]
    engine = services.pop("engine")
    addresses = []
    for name, service in services.items():
        parsed = parse_options(service["command"])
        assert parsed.auth_token_file == TOKEN
        assert service["read_only"] is True
        assert f":{parsed.metrics_listen.port}/readyz" in health_of(service)
        addresses.append(f"{name}:{parsed.listen[0].port}")
    config = engine_of(engine["command"], smollm2)
    assert list(config.memory_nodes) == addresses
    assert config.auth_token_file == TOKEN
    assert engine["depends_on"] == dict.fromkeys(
        services, {"condition": "service_healthy"}
    )


def test_compose_files(compose: dict[str, Any]) -> None:
    """Every service gets the token and is built from a file that is there."""
    assert f"/run/secrets/{next(iter(compose['secrets']))}" == TOKEN
    for service in compose["services"].values():
        assert service["secrets"] == list(compose["secrets"])
        context = (EXAMPLES / service["build"]["context"]).resolve()
        file = (context / service["build"]["dockerfile"]).resolve()
        assert file.is_file()
        assert file.is_relative_to(DEPLOY / "container")


def test_production_stack(smollm2: str) -> None:
    engines = loaded("production-stack.yaml")["servingEngineSpec"]
    (model,) = engines["modelSpec"]
    config = serve_options(["serve", smollm2, *model["vllmConfig"]["extraArgs"]])
    assert len(config.memory_nodes) == 2
    (mount,) = model["extraVolumeMounts"]
    assert config.auth_token_file == f"{mount['mountPath']}/token"
    # Nobody kills an engine that waits for a lost node.
    probe = engines["livenessProbe"]
    patience_s = probe["periodSeconds"] * probe["failureThreshold"]
    assert patience_s > config.recovery_timeout_s + 30


def test_leader_worker_set(smollm2: str) -> None:
    """All hosts of an engine have the same options, and others reach the nodes."""
    text = (EXAMPLES / "leader-worker-set.yaml").read_text()
    text = re.sub(r"\$\(LWS_\w+?_(\w+)\)", lambda match: LWS[match[1]], text)
    group = next(yaml.safe_load_all(text))["spec"]["leaderWorkerTemplate"]
    configs = []
    for role in ("leader", "worker"):
        (container,) = group[f"{role}Template"]["spec"]["containers"]
        configs.append(engine_of(container["command"], smollm2))
        assert ("--headless" in container["command"]) == (role == "worker")
    assert configs[0] == configs[1]
    assert len({*configs[0].memory_nodes, *configs[0].standby_nodes}) == 4


def test_ray_cluster(smollm2: str) -> None:
    """The hosts hold what its commands ask for."""
    text = (EXAMPLES / "ray-cluster.yaml").read_text()
    cluster = yaml.safe_load(text)["spec"]
    comments = " ".join(re.findall(r"^# ?(.*)$", text, re.M)).replace("\\", "")
    up, serve = re.findall(r"-- +(vllm.+?)(?= kubectl| All images)", comments)
    program, *arguments = shlex.split(up)
    parsed = tool_options(arguments)
    config = engine_of(shlex.split(serve), smollm2)
    assert config.ray_pool == parsed.name
    assert config.kv_cache_gib is not None
    assert config.kv_cache_gib <= parsed.kv_cache_gib
    groups = {each["groupName"]: each for each in cluster["workerGroupSpecs"]}
    nodes = groups["memory-nodes"]
    assert nodes["replicas"] == parsed.num
    # The operator writes it into a command of bash.
    (resources,) = shlex.split(nodes["rayStartParams"]["resources"])
    assert json.loads(resources) == {"memory_node": 1}


def test_ray_image() -> None:
    """It is built with what KubeRay's probes need, by arguments that the file has."""
    text = (EXAMPLES / "ray-cluster.yaml").read_text()
    comments = " ".join(re.findall(r"^# ?(.*)$", text, re.M)).replace("\\", "")
    (build,) = re.findall(r"docker build .+? dist\b", comments)
    words = shlex.split(build)
    given = dict(
        each.split("=", 1)
        for option, each in pairwise(words)
        if option == "--build-arg"
    )
    file = (DEPLOY / "container" / "Dockerfile").read_text()
    assert given.keys() == set(re.findall(r"^ARG (\w+)=", file, re.M))
    assert given["PACKAGES"] == "wget"
    assert given["REQUIREMENTS"].startswith("ray[default]==")
    assert comments.count(given["REQUIREMENTS"]) == 2
    assert f"image: {words[words.index('--tag') + 1]}\n" in text


def page_commands() -> list[list[str]]:
    """Commands of this package in the page's blocks."""
    blocks = re.findall(r"^```\n(.+?)^```$", PAGE.read_text(), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", "").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [each for each in words if each and each[0].startswith(("vllm", "helm"))]


def test_page(smollm2: str) -> None:
    commands = page_commands()
    engines = [each for each in commands if each[:2] == ["vllm", "serve"]]
    assert engines
    for command in engines:
        engine_of(command, smollm2)
    for command in commands:
        if command[0] == "vllm-attn-offload":
            tool_options(command[1:])
        elif command[0] == COMMAND.name:
            parse_options(command[1:])


@needs_helm
def test_page_installs_the_nodes_that_it_names() -> None:
    commands = page_commands()
    (install,) = (each for each in commands if each[:2] == ["helm", "install"])
    _, _, release, chart, _, namespace, *options = install
    assert DEPLOY.parent / chart == CHART
    spec = of_kind(rendered(*options), "StatefulSet")["spec"]
    (serve,) = (each for each in commands if each[:2] == ["vllm", "serve"])
    nodes = [
        f"{release}-{index}.{release}.{namespace}:7600"
        for index in range(spec["replicas"])
    ]
    assert ",".join(nodes) in serve

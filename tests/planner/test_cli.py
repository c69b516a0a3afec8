# SPDX-License-Identifier: Apache-2.0
"""The plan command end to end, its verdicts, and its errors."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_attn_offload.commands import main
from vllm_attn_offload.planner.estimate.compare import compare
from vllm_attn_offload.planner.estimate.offload import Offload
from vllm_attn_offload.planner.estimate.question import Question
from vllm_attn_offload.planner.estimate.workload import Workload
from vllm_attn_offload.planner.hardware.catalogue import (
    Catalogue,
    parse_devices,
    parse_network,
)
from vllm_attn_offload.planner.model.shape import ModelShape
from vllm_attn_offload.planner.report import format_comparison

CONFIGS = Path(__file__).with_name("configs")
PAIRS = [
    ("2xH100", "4xH20"),
    ("2xA100", "4xRTX3090"),
    ("2xL40S", "1xCPU-DDR5-12ch"),
    ("2xH200", "2xL4"),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "+".join(pair))
def test_compare_every_model(
    shapes: dict[str, ModelShape], catalogue: Catalogue, pair: tuple[str, str]
) -> None:
    """Every model on every pair gets a table and a verdict, in under 5 s of CPU."""
    compute, memory = (parse_devices(text, catalogue) for text in pair)
    offload = Offload(compute, memory, parse_network("400Gbps", catalogue))
    start = time.process_time()
    for shape in shapes.values():
        result = compare(Question(shape, offload, Workload(8192, 8064, 256)))
        text = format_comparison(result)
        assert "Verdict: " in text
        assert result.offloaded or result.refused
    assert time.process_time() - start < 5


def test_plan_command_in_its_own_process() -> None:
    """No GPU, no network, under 5 s, and JSON that parses."""
    command = "import sys; from vllm_attn_offload.commands import main; "
    command += "sys.exit(main(sys.argv[1:]))"
    arguments = ["plan", str(CONFIGS / "llama-3-8b"), "--compute", "1xH100"]
    arguments += ["--memory", "2xH20", "--network", "400Gbps", "--context", "8192"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments, "--json"],
        capture_output=True,
        text=True,
        check=True,
        env={"HF_HUB_OFFLINE": "1", "PATH": ""},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # 5 s is the target on a quiet machine; continuous integration is not one, so this
    # counts CPU seconds, and grants twice as many.
    assert used_s < 10
    document = json.loads(done.stdout)
    assert document["price_list"] == "lamina-table-1"
    assert document["offloaded"][0]["usd_per_hour"] == pytest.approx(11.06 + 2 * 4.63)
    assert document["verdict"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compute", "1xH999", "--memory", "2xH20"], "Unknown device 'H999'"),
        (["--compute", "1xH100", "--memory", "many"], "Unknown device 'many'"),
        (["--compute", "H100", "--memory", "H20", "--network", "fast"], "as a network"),
        (["--compute", "H100", "--memory", "H20", "--kv-dtype", "int3"], "kv_dtype"),
        (["--compute", "H100", "--memory", "H20", "--price-list", "x"], "price list"),
        (["--compute", "H100", "--memory", "H20", "--price", "X=1"], "Unknown device"),
        (["--compute", "H100", "--memory", "H20", "--trace", "no.csv"], "no.csv"),
        (
            ["--compute", "H100", "--memory", "3xH20", "--partition", "heads"],
            "cannot split 8 KV heads",
        ),
    ],
)
def test_plan_errors(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["plan", str(CONFIGS / "llama-3-8b"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count(". ") >= 2


@pytest.mark.parametrize("context", ["0", "-5", "many"])
def test_plan_bad_number(capsys: pytest.CaptureFixture[str], context: str) -> None:
    pair = ["--compute", "H100", "--memory", "H20"]
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(CONFIGS / "llama-3-8b"), *pair, "--context", context])
    assert "must be a whole number above zero" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "pair", "slo_s", "network", "verdict"),
    [
        # Weights of 141 GB on one 80 GB device.
        ("llama-3-70b", ("1xH100", "2xH20"), None, "400Gbps", "At least 2xH100"),
        ("llama-3-8b", ("1xH100", "2xL4"), None, "1Gbps", "the network takes"),
        ("llama-3-8b", ("1xH100", "2xL4"), 1e-3, "400Gbps", "the SLO"),
    ],
)
def test_verdict_do_not_offload(
    shapes: dict[str, ModelShape],
    catalogue: Catalogue,
    model: str,
    pair: tuple[str, str],
    slo_s: float | None,
    network: str,
    verdict: str,
) -> None:
    compute, memory = (parse_devices(text, catalogue) for text in pair)
    offload = Offload(compute, memory, parse_network(network, catalogue))
    workload = Workload(8192, 8064, 256, "none", slo_s)
    result = compare(Question(shapes[model], offload, workload))
    assert result.verdict.startswith("Do not offload, because")
    assert verdict in result.verdict


def test_slo_lowers_the_batch(
    shapes: dict[str, ModelShape], catalogue: Catalogue
) -> None:
    compute, memory = (parse_devices(text, catalogue) for text in PAIRS[0])
    offload = Offload(compute, memory, parse_network("400Gbps", catalogue))
    shape = shapes["llama-3-70b"]
    question = Question(shape, offload, Workload(4096, 1, 1, "none"))
    loose = compare(question).offloaded[0]
    load = replace(question.workload, slo_tbt_s=0.045)
    tight = compare(replace(question, workload=load)).offloaded[0]
    assert tight.batch < loose.batch
    assert tight.tbt_s <= 0.045 < loose.tbt_s
    assert tight.batch_limit == "SLO"


def test_small_model_runs_as_several_engines(
    shapes: dict[str, ModelShape], catalogue: Catalogue
) -> None:
    """Two engines that share four nodes do what twice (one on two nodes) does."""
    load = Workload(2048, 1, 1, "none")
    network = parse_network("400Gbps", catalogue)
    found = []
    for compute, memory in (("1xH100", "2xH20"), ("2xH100", "4xH20")):
        parts = parse_devices(compute, catalogue), parse_devices(memory, catalogue)
        question = Question(shapes["llama-3-8b"], Offload(*parts, network), load)
        found.append(compare(question).offloaded[1])
    one, two = found
    assert (one.replicas, two.replicas) == (1, 2)
    assert two.tokens_per_s == pytest.approx(2 * one.tokens_per_s, rel=1e-2)
    assert two.tbt_s == pytest.approx(one.tbt_s, rel=1e-2)


TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.68,374,44
2023-11-16 18:15:50.99,396,109
2023-11-16 18:15:51.22,879,55
"""


def test_plan_search_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="plots need the 'plots' extra")
    trace, picture = tmp_path / "trace.csv", tmp_path / "out.png"
    trace.write_text(TRACE)
    arguments = ["--compute", "1xH100", "--memory", "2xH20", "--trace", str(trace)]
    arguments += ["--search", "--plot", str(picture)]
    model = str(CONFIGS / "llama-3-8b")
    assert main(["plan", model, *arguments]) == 0
    out = capsys.readouterr().out
    assert "Ratios, cheapest token first" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("missing", "arguments", "reason"),
    [
        ("torch", ["calibrate"], "calibrate was asked for, and there is no torch here"),
        ("ray", ["ray", "list"], "Ray was asked for and is not installed here"),
    ],
)
def test_commands_name_the_missing_extra(
    tmp_path: Path, missing: str, arguments: list[str], reason: str
) -> None:
    """In one line, before anything starts."""
    command = f"import sys; sys.modules[{missing!r}] = None; "
    command += "from vllm_attn_offload.commands import main; "
    command += "sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 2
    assert reason in done.stderr
    assert f"pip install 'vllm-attn-offload[{missing}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_commands_show_where_a_broken_import_is(tmp_path: Path) -> None:
    """With its traceback: no extra brings what is missing."""
    command = "import sys; from vllm_attn_offload.commands import main; "
    command += "sys.modules['vllm_attn_offload.client.control_client'] = None; "
    command += "sys.exit(main(['calibrate']))"
    done = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert "Traceback" in done.stderr
    assert "calibration.py" in done.stderr

# SPDX-License-Identifier: Apache-2.0
"""Steps in two micro-batches, against the same steps whole, on a real memory node."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from layered_model import Engine
from node_process import NodeProcess, running_node
from vllm.config import CUDAGraphMode

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.errors import MemoryNodeError

#: Prefills, then decodes of fewer and fewer requests; a mixed step between them.
STEPS = [[40, 3, 17, 1, 90], [1] * 5, [1] * 5, [1, 1, 20, 1, 1], [1, 0, 1, 1, 0]]
#: That verify drafts: of some requests, of all, of one request alone.
STEPS += [[4, 1, 3, 1, 2], [4] * 5, [1, 4, 17, 1, 1], [0, 4, 0, 0, 0], [4, 4, 1, 0, 2]]
NUM_CUT_STEPS = 6


def test_cut_steps_equal_whole_steps(node: NodeProcess) -> None:
    """Hidden states and auxiliary ones come back in the order of the batch."""
    whole, cut = Engine(node.address, 1, 5), Engine(node.address, 2, 5)
    for num_new in [*STEPS, *[[1] * 5] * 20]:
        expected, [expected_before] = whole.step(num_new)
        output, [before] = cut.step(num_new)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(before, expected_before, rtol=1e-5, atol=1e-5)
    assert whole.runner.times()["num_cut_steps"] == 0
    assert cut.runner.times()["num_cut_steps"] == NUM_CUT_STEPS + 20
    for engine in (whole, cut):
        engine.close()


def test_cut_steps_leave_graphs_and_keep_their_size(node: NodeProcess) -> None:
    """A batch padded to a captured graph's size comes back in that size."""
    whole, cut = Engine(node.address, 1, 3), Engine(node.address, 2, 3)
    for engine in (whole, cut):
        engine.step([9, 5, 2])
        engine.model.graph_modes.clear()
    expected, [expected_before] = whole.step([1, 1, 1], num_padding=5)
    output, [before] = cut.step([1, 1, 1], num_padding=5)
    assert output.shape == before.shape == expected.shape
    torch.testing.assert_close(output[:3], expected[:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(before[:3], expected_before[:3], rtol=1e-5, atol=1e-5)
    assert whole.model.graph_modes == [CUDAGraphMode.PIECEWISE]
    assert cut.model.graph_modes == [CUDAGraphMode.NONE] * 2
    for engine in (whole, cut):
        engine.close()


def test_uninstall_leaves_nothing(node: NodeProcess) -> None:
    """The model computes as before, and the second thread has ended."""
    engine = Engine(node.address, 2, 2)
    engine.step([5, 5])
    engine.step([1, 1])
    engine.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("micro-batch")]
    assert engine.model.forward.__func__ is type(engine.model).forward


@pytest.mark.parametrize("tolerate_loss", [False, True])
def test_node_dies_between_steps(tmp_path: Path, tolerate_loss: bool) -> None:
    """Neither micro-batch waits for the other for ever."""
    with running_node(tmp_path, "--kv-cache-gib", "0.1", "--cpus", "0") as node:
        engine = Engine(node.address, 2, 4, tolerate_loss=tolerate_loss)
        engine.step([9, 9, 9, 9])
        engine.step([1, 1, 1, 1])
        node.kill()
        if tolerate_loss:
            engine.step([1, 1, 1, 1])
            assert engine.nodes.loss is not None
        else:
            with pytest.raises(MemoryNodeError, match="its session was lost"):
                engine.step([1, 1, 1, 1])
        engine.close()


def test_second_micro_batch_fails(node: NodeProcess) -> None:
    """An error of the model in one micro-batch ends the step with that error."""
    engine = Engine(node.address, 2, 4)
    engine.step([9, 9, 9, 9])
    calls = []

    def fail_second(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        calls.append(threading.current_thread().name)
        if len(calls) == 4:
            raise RuntimeError("of the second micro-batch")

    with (
        engine.model.qkv[1].register_forward_pre_hook(fail_second),
        engine.model.qkv[2].register_forward_pre_hook(fail_second),
        pytest.raises(RuntimeError, match="of the second micro-batch"),
    ):
        engine.step([1, 1, 1, 1])
    assert len(set(calls[:2])) == 2, "micro-batches take turns layer by layer"
    engine.close()


def test_option_names_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="num_microbatches was given 3. Allowed"):
        AttentionOffloadConfig.from_dict({"num_microbatches": 3})

"""Adapters on one base: each says what the model says that it was merged into, in both backends."""

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.engines.hf_engine import HFEngine
from opd.engines.vllm_engine import HiddenStateEngine
from tests.support.adapters import ATTENTION, LINEAR, make_adapter, merged

FLOAT32 = {"dtype": "float32", "trust_remote_code": False}
SEQUENCES = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [3, 4, 5, 6]]
# Ranks, targets, scaling by rank and by its root, ranks of single modules; under names that no
# module of torch may have.
KINDS = {
    "update": {"targets": ATTENTION, "r": 4},
    "linear": {"targets": LINEAR, "r": 3, "use_rslora": True},
    "math.v2": {
        "targets": LINEAR,
        "r": 4,
        "rank_pattern": {"down_proj": 8},
        "alpha_pattern": {"q_proj": 3},
    },
}


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """Kind -> directory, on the student's model as their base."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: str(make_adapter(tiny.student, root / name, seed=place, **options))
        for place, (name, options) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="module", params=["hf", "vllm"])
def engine(request, tiny, adapters):
    if request.param == "hf":
        yield HFEngine("base", str(tiny.student), adapters=adapters, **FLOAT32)
        return
    request.getfixturevalue("device")
    yield HiddenStateEngine(
        "base",
        str(tiny.student),
        tokenizer=str(tiny.student),
        kv_cache_gib=0.02,
        max_model_len=64,
        adapters=adapters,
        **FLOAT32,
    )
    gc.collect()
    from vllm.distributed.parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
    )

    destroy_model_parallel()
    destroy_distributed_environment()


@torch.no_grad()
def assert_states_of(model, found):
    for ids, state_LH in zip(SEQUENCES, found, strict=True):
        wanted_LH = model.base_model(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(state_LH, wanted_LH, rtol=1e-4, atol=1e-4)


def test_each_says_what_the_merged_model_says_and_the_base_what_it_said(engine, tiny, adapters):
    base = AutoModelForCausalLM.from_pretrained(tiny.student, dtype=torch.float32)
    for _ in range(2):  # in turns: none leaves a trace in the next
        assert_states_of(base, engine.hidden_states(SEQUENCES))
        for name, directory in adapters.items():
            assert_states_of(
                merged(tiny.student, directory), engine.hidden_states(SEQUENCES, adapter=name)
            )
    spread = (
        engine.hidden_states(SEQUENCES, adapter="linear")[0] - engine.hidden_states(SEQUENCES)[0]
    )
    assert spread.abs().max() > 0.1  # what is compared differs


def test_it_says_the_same_after_its_sleep(engine):
    before = {
        name: engine.hidden_states(SEQUENCES, adapter=name) for name in ("", *engine.adapters)
    }
    engine.sleep()
    engine.wake()
    for name, states in before.items():
        for a, b in zip(states, engine.hidden_states(SEQUENCES, adapter=name), strict=True):
            assert torch.equal(a, b), name


def _forget_adapters(worker):
    for layer in worker.get_model().modules():
        for stack in getattr(layer, "lora_a_stacked", ()):
            stack.zero_()


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_a_base_that_reads_its_files_again_reads_its_adapters_again(engine):
    """As a teacher on the disk does at every wake."""
    before = {
        name: engine.hidden_states(SEQUENCES, adapter=name) for name in ("", *engine.adapters)
    }
    engine.llm.collective_rpc(_forget_adapters)
    lost = engine.hidden_states(SEQUENCES, adapter="linear")
    assert not torch.allclose(lost[0], before["linear"][0])
    engine.reload()
    for name, states in before.items():
        for a, b in zip(states, engine.hidden_states(SEQUENCES, adapter=name), strict=True):
            assert torch.equal(a, b), name

"""The judge of the sampler: with real engines, whole and broken on purpose, in float32 and
bfloat16. N tokens of responses.
"""

import contextlib
import functools
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from opd import distributed
from opd.config import ModelConfig, OptimConfig, RolloutConfig
from opd.engines import vllm_engine
from opd.inputs.validation import load_ds_config
from opd.padding import make_micro_batches
from opd.parity import FIRST_LIMIT, FLOAT32_LIMIT, LEAST_LIMIT, Parity
from opd.rollout import RolloutEngine, push_weights
from opd.student import LossSettings, Student
from opd.types import Prompt
from tests.support.processes import leave_vllm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CUT = functools.partial(make_micro_batches, micro_batch_size=8, pad_id=0, domains=["d"])


# ---- The verdict, by numbers ---------------------------------------------------------------------


def judge(dtype="float32", every=10, **rollout) -> Parity:
    return Parity(CUT, RolloutConfig(**rollout), every=every, dtype=DTYPES[dtype])


def test_the_first_two_steps_are_checked_and_every_so_many():
    parity = judge()
    assert [step for step in range(7, 10) if parity.is_due(step)] == [
        7,
        8,
        9,
    ]  # after a resume, too
    parity.decide(1e-6, 1e-5, 100, 7)
    assert parity.is_due(8)
    parity.decide(1e-6, 1e-5, 100, 8)
    assert [step for step in range(9, 31) if parity.is_due(step)] == [10, 20, 30]
    assert not any(judge(every=0).is_due(step) for step in range(30))


@pytest.mark.parametrize("mean", [FLOAT32_LIMIT * 1.01, 2.0, math.inf, math.nan])
def test_float32_has_one_limit_and_one_line(mean):
    parity = judge()
    parity.decide(FLOAT32_LIMIT, 1.0, 100, 0)
    with pytest.raises(distributed.Stop) as stop:
        parity.decide(mean, 3.0, 100, 1)
    message = str(stop.value)
    assert stop.value.status == 1
    assert "\n" not in message and message.startswith(
        "step 2: the sampler is not the student: after weights were pushed"
    )
    assert (
        "100 tokens" in message and "docs/metrics.md" in message and "--parity_every 0" in message
    )


def test_bfloat16_measures_its_floor_before_any_update_and_bounds_it():
    parity = judge("bfloat16")
    with pytest.raises(distributed.Stop, match="before any update") as stop:
        parity.decide(FIRST_LIMIT * 1.01, 1.0, 100, 0)
    assert stop.value.status == 2
    parity.decide(0.02, 0.3, 100, 0)
    parity.decide(0.079, 0.3, 100, 1)
    with pytest.raises(distributed.Stop, match=r"0\.08 can be rounding"):
        parity.decide(0.081, 0.3, 100, 10)
    low = judge("bfloat16")
    low.decide(1e-4, 1e-3, 100, 0)
    assert low.limit == LEAST_LIMIT


def test_what_was_sampled_from_the_likeliest_tokens_alone_is_likelier_by_their_share():
    trainer_N = torch.tensor([-1.0, -2.0, -3.0])
    half = trainer_N - math.log(0.5)
    assert judge(top_p=0.5).excess(trainer_N, half).max() < 1e-6
    assert judge(top_p=0.5).excess(trainer_N, trainer_N).max() == 0
    assert judge(top_p=0.5).excess(trainer_N, half + 0.1).min() > 0.09
    assert judge(top_p=0.5).excess(trainer_N, trainer_N - 0.1).min() > 0.09
    assert judge(top_k=5).excess(trainer_N, half + 3).max() == 0
    assert judge().excess(trainer_N, half).min() > 0.6
    assert judge().excess(trainer_N, trainer_N * math.nan).min() == math.inf


# ---- Real engines --------------------------------------------------------------------------------


class Pair:
    """A student of four layers with a tied head, and its sampler. `step` numbers pushes."""

    def __init__(self, path, dtype: str, device):
        options = {"dtype": dtype, "trust_remote_code": False}
        self.student = Student(
            ModelConfig(student_model=str(path), dtype=dtype),
            OptimConfig(),
            load_ds_config("ds_configs/zero3.json"),
            settings=LossSettings(),
            device=device,
        )
        self.cfg = RolloutConfig(
            num_generations=1, max_response_tokens=24, rollout_kv_cache_gib=0.05, enforce_eager=True
        )
        self.engine = RolloutEngine(
            str(path), self.cfg, stop_ids=(1,), seed=0, max_model_len=64, **options
        )
        self.dtype, self.step = DTYPES[dtype], 0

    def judge(self) -> Parity:
        return Parity(CUT, self.cfg, every=10, dtype=self.dtype)

    def push(self) -> None:
        push_weights(self.student, self.engine, self.step)

    def update(self, scale=0.03) -> None:
        """Every weight changes, as by an optimizer with a bold learning rate."""
        self.step += 1
        generator = torch.Generator().manual_seed(self.step)
        parameters = [p for _, p in self.student.model.named_parameters()]
        with (
            self.student.sharded._deepspeed.zero.GatheredParameters(parameters, modifier_rank=0),
            torch.no_grad(),
        ):
            for p in parameters:
                p.add_(scale * p.abs().mean() * torch.randn(p.shape, generator=generator))

    def check(self, parity: Parity) -> None:
        rollouts = self.engine.generate(PROMPTS, self.step)
        parity.check(self.student, self.engine.fresh(rollouts, self.step), self.step)


PROMPTS = [
    Prompt(prompt_id=i, domain="d", token_ids=list(range(2 + i, 8 + 2 * i))) for i in range(8)
]


@pytest.fixture(scope="module")
def deep(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("deep")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.1,
        tie_word_embeddings=True,
        dtype="float32",
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def process(device):
    """This process as a rank; vLLM's own groups go with it."""
    yield device
    leave_vllm()


@pytest.fixture(scope="module", params=list(DTYPES))
def pair(request, deep, process):
    return Pair(deep, request.param, process)


def test_silent_in_clean_runs(pair):
    """Ten runs of three checks in either dtype, with new weights before each."""
    worst = 0.0
    for _ in range(10):
        parity = pair.judge()
        decide = parity.decide

        def noted(mean, largest, count, step, decide=decide):
            nonlocal worst
            assert count > 50
            worst = max(worst, mean)
            decide(mean, largest, count, step)

        parity.decide = noted
        for _ in range(3):
            pair.update()
            pair.push()
            pair.check(parity)
        assert parity.checks == 3
    # measured: 4e-7 and .006
    assert 0 < worst < (1e-5 if pair.dtype == torch.float32 else FIRST_LIMIT)


@contextlib.contextmanager
def old_head(pair):
    """vLLM's own reload, which leaves a tied head's packed copy as it was."""

    def reload(worker, **source):
        worker.reload_weights(**source)

    ours, vllm_engine.reload_weights = vllm_engine.reload_weights, reload
    yield
    vllm_engine.reload_weights = ours


@contextlib.contextmanager
def no_push(pair):
    """The sampler says that it has the version, and has not."""
    load, pair.engine.engine.load_weights = (
        pair.engine.engine.load_weights,
        lambda named: list(named),
    )
    yield
    pair.engine.engine.load_weights = load


@contextlib.contextmanager
def changed(pair, change):
    """What is pushed is not what the student has."""
    load = pair.engine.engine.load_weights
    pair.engine.engine.load_weights = lambda named: load(
        list(change([(n, t.clone()) for n, t in named]))
    )
    yield
    pair.engine.engine.load_weights = load


def one_layer_missing(named):
    return [(name, tensor) for name, tensor in named if ".layers.2." not in name]


def swapped(named):
    """Query and output projections of one shape change places in one layer."""
    tensors = dict(named)
    a, b = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]
    return tensors.items()


@contextlib.contextmanager
def other_temperature(pair):
    """It samples at another temperature than the run's."""
    right, pair.engine.cfg = pair.engine.cfg, replace(pair.engine.cfg, temperature=0.8)
    yield
    pair.engine.cfg = right


@contextlib.contextmanager
def noise_in_training(pair):
    """The student computes with dropout, and the sampler without."""
    model = pair.student.model
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: torch.nn.functional.dropout(output, 0.3)
    )
    yield
    hook.remove()


BROKEN = {
    "no_push": no_push,
    "one_layer_missing": functools.partial(changed, change=one_layer_missing),
    "swapped": functools.partial(changed, change=swapped),
    "other_temperature": other_temperature,
    "noise_in_training": noise_in_training,
}


def stopped_within_two_checks(pair, broken) -> None:
    parity = pair.judge()
    pair.push()
    pair.check(parity)  # whole
    with broken(pair):
        pair.update(scale=0.3)
        pair.push()
        with pytest.raises(
            distributed.Stop, match="the sampler is not the student: after weights were pushed"
        ):
            pair.check(parity)
    pair.push()
    pair.check(pair.judge())  # whole again


@pytest.mark.parametrize("way", BROKEN)
def test_a_broken_sampler_is_stopped_within_two_checks(pair, way):
    stopped_within_two_checks(pair, BROKEN[way])


@pytest.mark.parametrize("pair", ["float32"], indirect=True)
def test_a_tied_head_that_is_left_as_it_was_is_stopped(pair):
    """On a CPU vLLM packs heads of float32 alone into a copy."""
    stopped_within_two_checks(pair, old_head)


def test_a_sampler_of_another_model_is_stopped_before_any_update(pair, deep):
    weights = load_file(deep / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    pair.engine.engine.load_weights(
        (name, torch.randn(tensor.shape, generator=generator).mul(tensor.std()).to(pair.dtype))
        for name, tensor in weights.items()
    )
    with pytest.raises(distributed.Stop, match="before any update"):
        pair.check(pair.judge())
    pair.push()

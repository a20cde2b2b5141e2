"""Real vLLM engines against Hugging Face, in float32: what they sample, what they say, what they
forget.

One process with one generator and four teachers, started once. G samples, L response length, K
support, V vocabulary, H hidden size.
"""

import dataclasses
import gc
import json
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from opd import distributed
from opd.config import LossConfig, RolloutConfig, TeacherSpec
from opd.distillation import compare
from opd.engines import vllm_engine, vllm_process
from opd.engines.engine_memory import EngineMemory
from opd.engines.hf_engine import HFEngine
from opd.engines.vllm_engine import HiddenStateEngine
from opd.ops.fused_linear import LIVE_BUFFERS, fused_linear_loss
from opd.ops.heads import OutputHead, load_head, map_head
from opd.padding import collate
from opd.rollout import RolloutEngine
from opd.teachers import ColocatedTeacher, TeacherPool
from opd.types import Prompt, Rollout
from tests.support.turns import one_after_another

VOCAB = 40
EOS, OTHER_STOP = 1, 20
KV_GIB, MAX_LEN, MAX_TOKENS, SEED = 0.03, 320, 12, 7
OPTIONS = {"dtype": "float32", "max_model_len": MAX_LEN, "trust_remote_code": False}
TOLERANCE = 1e-4  # measured: below 1e-6


# ---- One start for all ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tiny, tiny_tied):
    """Hugging Face models by name, on the host."""
    paths = {
        name: getattr(tiny, name) for name in ("student", "addition", "reversal", "padded")
    } | {"tied": tiny_tied}
    return {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for name, path in paths.items()
    }


@pytest.fixture(scope="module")
def process(device):
    """This process as a rank; vLLM's own groups go with it."""
    yield device
    gc.collect()
    from vllm.distributed.parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
    )

    destroy_model_parallel()
    destroy_distributed_environment()


@pytest.fixture(scope="module")
def rollout_engine(process, tiny):
    cfg = RolloutConfig(
        num_generations=2,
        max_response_tokens=MAX_TOKENS,
        rollout_kv_cache_gib=KV_GIB,
        enforce_eager=True,
    )
    return RolloutEngine(str(tiny.student), cfg, stop_ids=(EOS, OTHER_STOP), seed=SEED, **OPTIONS)


@pytest.fixture(scope="module")
def beside_mistrals_files(tiny, tmp_path_factory):
    """The padded teacher in shards, beside files as Mistral writes them: other weights, which
    nobody must read.
    """
    path = shutil.copytree(tiny.padded, tmp_path_factory.mktemp("both") / "padded")
    (path / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny.padded).save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    save_file({"norm.weight": torch.zeros(96)}, path / "consolidated.safetensors")
    (path / "params.json").write_text('{"dim": 96}')
    return path


@pytest.fixture(scope="module")
def teachers(process, tiny, tiny_tied, beside_mistrals_files):
    """Every teacher's engine and head, asleep, by name."""
    paths = {
        "addition": tiny.addition,
        "reversal": tiny.reversal,
        "padded": beside_mistrals_files,
        "tied": tiny_tied,
    }
    built = {}
    for name, path in paths.items():
        engine = HiddenStateEngine(
            name, str(path), tokenizer=str(tiny.student), kv_cache_gib=KV_GIB, **OPTIONS
        )
        built[name] = ColocatedTeacher(
            TeacherSpec(name, str(path), (name,)), engine, load_head(str(path))
        )
        built[name].sleep()
    return built


@pytest.fixture
def prompts(tiny, tokenizer) -> list[Prompt]:
    rows = [json.loads(line) for line in tiny.train.read_text().splitlines()][:8]
    encode = tokenizer.apply_chat_template
    return [
        Prompt(
            prompt_id=i,
            domain=row["data_source"],
            token_ids=encode(row["prompt"], add_generation_prompt=True, return_dict=False),
        )
        for i, row in enumerate(rows)
    ]


def written(prompts, *, longest=9) -> list[Rollout]:
    """Responses of different lengths that need no sampler."""
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for prompt in prompts:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        rollouts.append(
            Rollout(
                sample_id=f"0/{len(rollouts)}/0",
                prompt=prompt,
                source="dataset",
                rollout_logprobs=None,
                finish_reason="length",
                policy_version=0,
                response_ids=torch.randint(VOCAB, (length,), generator=generator).tolist(),
            )
        )
    return rollouts


@torch.no_grad()
def logits_of(model, rollout) -> torch.Tensor:
    """[L, V] at the places that predict the response."""
    raw = torch.tensor([rollout.prompt.token_ids + rollout.response_ids])
    return model(raw).logits[0, len(rollout.prompt.token_ids) - 1 : -1].float()


def logprobs_of(model, rollout, temperature=1.0) -> torch.Tensor:
    """[L] of the response's own tokens."""
    logprobs_LV = (logits_of(model, rollout) / temperature).log_softmax(-1)
    return logprobs_LV.gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]


def gap(rollouts, model, temperature=1.0) -> float:
    """Largest distance between what the sampler said and what the model says."""
    return max(
        float((torch.tensor(r.rollout_logprobs) - logprobs_of(model, r, temperature)).abs().max())
        for r in rollouts
    )


def new_weights(model, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in model.named_parameters()
    }


# ---- The generator -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_the_models(
    rollout_engine, reference, prompts, temperature, monkeypatch
):
    monkeypatch.setattr(rollout_engine, "cfg", replace(rollout_engine.cfg, temperature=temperature))
    rollouts = rollout_engine.generate(prompts, step=0)
    assert len(rollouts) == 2 * len(prompts)
    assert [r.prompt for r in rollouts] == [p for p in prompts for _ in range(2)]
    assert gap(rollouts, reference["student"], temperature) < TOLERANCE


def test_new_weights_are_used_and_old_prefixes_forgotten(rollout_engine, reference, tiny, prompts):
    """The long prompt fills whole cache blocks, so an old prefix that stayed would speak for the
    new weights.
    """
    student = AutoModelForCausalLM.from_pretrained(tiny.student, dtype=torch.float32)
    long_prompt = replace(
        prompts[0], token_ids=[3, *(i % 35 + 5 for i in range(300 - MAX_TOKENS)), 4]
    )
    before = rollout_engine.generate([long_prompt, *prompts], step=0)
    assert gap(before, student) < TOLERANCE
    assert {r.policy_version for r in before} == {rollout_engine.policy_version}
    try:
        for version, seed in ((5, 0), (6, 1)):
            weights = new_weights(student, seed)
            rollout_engine.load_weights(weights.items(), version)
            student.load_state_dict(weights, strict=False)
            after = rollout_engine.generate([long_prompt, *prompts], step=0)
            assert gap(after, student) < TOLERANCE
            assert {r.policy_version for r in after} == {version}
        assert gap(before, student) > 0.01, "the weights did change"
    finally:
        rollout_engine.load_weights(reference["student"].named_parameters(), 0)
    assert rollout_engine.generate(prompts, step=0) == rollout_engine.generate(prompts, step=0)
    assert gap(rollout_engine.generate(prompts, step=0), reference["student"]) < TOLERANCE


def test_a_failed_load_stamps_no_version(rollout_engine, reference):
    def broken():
        yield next(iter(reference["student"].named_parameters()))
        raise RuntimeError("lost a rank")

    version = rollout_engine.policy_version
    try:
        with pytest.raises(RuntimeError, match="lost a rank"):
            rollout_engine.load_weights(broken(), version + 1)
        assert rollout_engine.policy_version == version
    finally:
        rollout_engine.load_weights(reference["student"].named_parameters(), version)


def test_a_sample_is_a_function_of_its_seed(rollout_engine, prompts):
    """Not of what else is in the batch, nor of its place there; another seed is another sample."""
    ids = [p.token_ids for p in prompts]

    def sample(chosen, seeds):
        samples = rollout_engine.engine.generate(
            [ids[i] for i in chosen], seeds, (EOS,), max_tokens=MAX_TOKENS, temperature=1.0
        )
        return [s.token_ids for s in samples]

    together = sample(range(8), list(range(8)))
    assert sample(range(8), list(range(8))) == together
    assert sample([5], [5]) == [together[5]]
    assert sample([5, 2], [5, 2]) == [together[5], together[2]]
    assert sample(range(8), list(range(50, 58))) != together
    same_prompt = sample([0] * 6, list(range(6)))
    assert len({tuple(s) for s in same_prompt}) > 3


def test_rollout_seeds_follow_step_place_and_sample(rollout_engine, prompts, monkeypatch):
    def responses(chosen, step):
        return [r.response_ids for r in rollout_engine.generate(chosen, step)]

    both = responses(prompts, 3)
    assert responses(prompts, 3) == both
    assert responses(prompts, 4) != both
    assert both[0::2] != both[1::2], "the samples of one prompt have seeds of their own"
    twice = responses([prompts[0]] * 2, 3)
    assert twice[:2] != twice[2:], "a prompt that comes twice in a step is sampled anew"
    # two ranks: prompts 1, 3, 5, 7 of the global batch lie on rank 1
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert responses(prompts[1::2], 3) == [both[2 * i + g] for i in (1, 3, 5, 7) for g in (0, 1)]


def test_generation_stops_at_any_stop_token_and_keeps_it(rollout_engine, prompts):
    """Two stop ids, as in a generation config with a list of them."""
    rollouts = [r for step in range(6) for r in rollout_engine.generate(prompts, step)]
    reasons = Counter()
    for r in rollouts:
        ids = r.response_ids
        assert not {EOS, OTHER_STOP} & set(ids[:-1])
        if r.finish_reason == "stop":
            assert ids[-1] in (EOS, OTHER_STOP)
        else:
            assert len(ids) == MAX_TOKENS and ids[-1] not in (EOS, OTHER_STOP)
        reasons[ids[-1] if r.finish_reason == "stop" else "length"] += 1
    assert reasons[EOS] > 0 and reasons[OTHER_STOP] > 0 and reasons["length"] > 0, reasons


def test_logprobs_are_for_those_who_read_them(rollout_engine, prompts):
    """Without them the same tokens are sampled."""
    full = rollout_engine.generate(prompts, step=3)
    bare = rollout_engine.generate(prompts, step=3, with_logprobs=False)
    assert [replace(r, rollout_logprobs=None) for r in full] == bare


def test_greedy_is_the_argmax(rollout_engine, reference, prompts):
    rollouts = rollout_engine.generate_greedily(prompts)
    for r in rollouts:
        assert logits_of(reference["student"], r).argmax(-1).tolist() == r.response_ids
        assert r.rollout_logprobs is None, "nothing reads them"
    assert [r.response_ids for r in rollout_engine.generate_greedily(prompts)] == [
        r.response_ids for r in rollouts
    ]


def test_sleep_and_wake_keep_their_books(rollout_engine, reference, prompts):
    rollout_engine.sleep()
    assert not rollout_engine.awake
    rollout_engine.sleep()  # nothing left to put to sleep
    rollout_engine.wake(["weights"])
    assert rollout_engine.awake and rollout_engine.engine._asleep == {"kv_cache"}
    rollout_engine.load_weights(reference["student"].named_parameters(), 0)
    rollout_engine.wake(["kv_cache"])
    assert rollout_engine.engine._asleep == set()
    assert gap(rollout_engine.generate(prompts, 0), reference["student"]) < TOLERANCE


# ---- The teachers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["addition", "reversal", "padded", "tied"])
def test_hidden_states_are_those_that_predict_the_response(teachers, reference, prompts, name):
    rollouts = written(prompts)
    teacher, model = teachers[name], reference[name]
    teacher.wake()
    states = teacher.hidden_states(rollouts)
    teacher.sleep()
    for rollout, state_LH in zip(rollouts, states, strict=True):
        raw = torch.tensor([rollout.prompt.token_ids + rollout.response_ids])
        with torch.no_grad():
            expected_SH = model.base_model(raw).last_hidden_state[0]
        first = len(rollout.prompt.token_ids) - 1
        assert state_LH.shape == (len(rollout.response_ids), model.config.hidden_size)
        assert (state_LH.cpu() - expected_SH[first:-1]).abs().max() < TOLERANCE
        logits_LV = state_LH.cpu() @ teacher.head.weight_VH.T
        assert (logits_LV - logits_of(model, rollout)).abs().max() < TOLERANCE


def test_hidden_states_do_not_depend_on_the_batch(teachers, prompts):
    rollouts = written(prompts)
    teachers["addition"].wake()
    together = teachers["addition"].hidden_states(rollouts)
    (alone,) = teachers["addition"].hidden_states(rollouts[3:4])
    teachers["addition"].sleep()
    assert (together[3] - alone).abs().max() < 1e-5


def test_a_sleeping_engine_refuses_work(teachers, rollout_engine, prompts):
    """vLLM itself would wait for ever."""
    with pytest.raises(
        AssertionError, match="addition: kv_cache and weights asleep; wake it first"
    ):
        teachers["addition"].hidden_states(written(prompts))
    rollout_engine.sleep()
    rollout_engine.wake(["weights"])
    with pytest.raises(AssertionError, match="rollout: kv_cache asleep"):
        rollout_engine.generate(prompts, 0)
    rollout_engine.wake()


def test_weights_come_back_from_the_files(teachers, prompts):
    """What `residency="disk"` does after each wake."""
    teacher, rollouts = teachers["reversal"], written(prompts)
    teacher.wake()
    before = teacher.hidden_states(rollouts)
    noise = [(name, torch.randn_like(value)) for name, value in teacher_parameters(teacher)]
    teacher.engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(noise)})
    assert (teacher.hidden_states(rollouts)[0] - before[0]).abs().max() > 0.1, (
        "the weights did change"
    )
    teacher.engine.reload()
    after = teacher.hidden_states(rollouts)
    teacher.sleep()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def teacher_parameters(teacher):
    """Under their names in the checkpoint; the pooling engine has no use for the `lm_head`."""
    model = AutoModelForCausalLM.from_pretrained(teacher.spec.model, dtype=torch.float32)
    return [
        (name, value.data) for name, value in model.named_parameters() if name != "lm_head.weight"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU cannot do")
def test_a_cpu_keeps_its_engines_awake_and_says_so_once(teachers, prompts, capsys):
    vllm_engine._warn_that_nothing_sleeps.cache_clear()
    for teacher in (teachers["addition"], teachers["reversal"]):
        teacher.wake()
        teacher.sleep()
        teacher.engine.prefetch()  # nothing to bring
        assert not teacher.engine.can_sleep
    assert capsys.readouterr().err.count("vLLM cannot sleep on a CPU") == 1


def test_an_engine_says_what_it_holds_awake(teachers):
    teacher = teachers["addition"]
    weights = sum(value.nbytes for _, value in teacher_parameters(teacher))
    held = teacher.engine.bytes_awake - int(KV_GIB * (1 << 30))
    assert weights <= held <= 1.1 * weights + (0 if not torch.cuda.is_available() else 64 << 20)


def test_a_resident_engine_never_sleeps(teachers, prompts, monkeypatch):
    engine = teachers["addition"].engine
    teachers["addition"].wake()
    monkeypatch.setattr(engine, "sleep_level", vllm_engine.SLEEP_LEVEL["gpu"])
    engine.sleep()
    assert engine.awake and len(engine.hidden_states([[5, 6, 7]])[0]) == 3
    monkeypatch.undo()
    engine.sleep()


def test_half_a_model_does_not_look_awake(teachers, monkeypatch):
    """A wake from disk that cannot read the files leaves the engine asleep; the next try works."""
    engine = teachers["addition"].engine
    engine.wake()
    expected = engine.hidden_states([[5, 6, 7]])[0]
    engine.sleep()
    monkeypatch.setattr(engine, "sleep_level", vllm_engine.SLEEP_LEVEL["disk"])
    monkeypatch.setattr(type(engine), "can_sleep", True)
    with monkeypatch.context() as patch:

        def gone():
            raise OSError("no such file")

        patch.setattr(engine, "reload", gone)
        with pytest.raises(OSError):
            engine.wake()
    assert not engine.awake and engine._asleep == {"weights", "kv_cache"}
    engine.wake()
    assert torch.equal(engine.hidden_states([[5, 6, 7]])[0], expected)
    monkeypatch.undo()
    engine.sleep()


def test_a_half_awake_engine_sleeps_and_wakes_whole(rollout_engine, prompts):
    rollout_engine.wake()
    before = rollout_engine.generate_greedily(prompts)
    rollout_engine.sleep()
    rollout_engine.wake(["weights"])
    rollout_engine.sleep()
    assert not rollout_engine.awake
    rollout_engine.wake()
    if not torch.cuda.is_available():  # level 2 dropped the weights
        assert rollout_engine.generate_greedily(prompts) == before


def test_vllm_knows_every_option_of_an_engine(teachers, monkeypatch):
    """Those that only a GPU gets too, and the way in which an engine's worker is told its sleep
    backend.
    """
    import inspect

    import vllm
    from vllm.engine.arg_utils import EngineArgs

    seen = {}

    class Stop(Exception):
        pass

    def llm(**options):
        seen.update(options)
        raise Stop

    allocator = SimpleNamespace(pointer_to_data={}, get_current_usage=lambda: 0)
    with monkeypatch.context() as patch:
        patch.setattr(vllm, "LLM", llm)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(
            vllm_engine,
            "engine_memory",
            lambda name, frozen: EngineMemory(name, allocator, driver=None, frozen=frozen),
        )
        with pytest.raises(Stop):
            HiddenStateEngine(
                "x",
                "nowhere",
                tokenizer="nowhere",
                dtype="float32",
                max_model_len=8,
                kv_cache_gib=0.1,
                trust_remote_code=False,
            )
    known = {f.name for f in dataclasses.fields(EngineArgs)} | set(
        inspect.signature(vllm.LLM.__init__).parameters
    )
    assert {"enable_sleep_mode", "gpu_memory_utilization"} <= set(seen) <= known

    engine = teachers["addition"].engine
    engine.llm.collective_rpc(vllm_process.use_own_sleep)
    (name,) = engine.llm.collective_rpc(_sleep_backend_of)
    assert name == "opd"


def _sleep_backend_of(worker) -> str:
    return worker.vllm_config.model_config.sleep_mode_backend


def test_the_rollout_engines_canary(rollout_engine, reference, monkeypatch):
    """On a CPU nothing is lost in a sleep, so what a GPU could lose is taken away by hand."""
    monkeypatch.setattr(type(rollout_engine.engine), "can_sleep", True)
    weights = dict(reference["student"].named_parameters())

    def wake_with(named, version):
        rollout_engine.sleep()
        rollout_engine.wake(["weights"])
        rollout_engine.load_weights(named.items(), version)
        rollout_engine.wake(["kv_cache"])

    try:
        wake_with(weights, 21)
        # the same weights, the same version: an evaluation between two steps
        wake_with(weights, 21)
        wake_with(new_weights(reference["student"], 3), 22)  # a push changes both
        with pytest.raises(
            RuntimeError, match=r"rollout engine woke up with other weights.*version 22"
        ):
            wake_with(weights, 22)
        with pytest.raises(RuntimeError, match="rollout engine woke up without weights"):
            wake_with({name: torch.zeros_like(value) for name, value in weights.items()}, 23)
    finally:
        monkeypatch.undo()
        rollout_engine.wake()
        rollout_engine.load_weights(weights.items(), 0)


class Recorder:
    """Calls the real vLLM and notes, for each call, whose memory and whose workspace it would have
    used.
    """

    def __init__(self, llm):
        self.llm, self.seen = llm, []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            from vllm.v1.worker import workspace

            self.seen.append((name, EngineMemory.current, workspace._manager))
            return getattr(self.llm, name)(*args, **kwargs)

        return call


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="there the engines have a memory of their own"
)
def test_vllm_is_called_inside_the_engines_memory_alone(teachers, monkeypatch):
    from vllm.v1.worker import workspace

    engine = teachers["addition"].engine
    allocator = SimpleNamespace(pointer_to_data={}, get_current_usage=lambda: 0)
    memory, mine, others = EngineMemory("addition", allocator, driver=None), object(), object()
    calls = []
    for name in ("suspend", "prefetch"):
        monkeypatch.setattr(memory, name, lambda *level, name=name: calls.append((name, *level)))
    monkeypatch.setattr(engine, "memory", memory)
    monkeypatch.setattr(engine, "llm", Recorder(engine.llm))
    monkeypatch.setattr(engine._workspace, "manager", mine)
    monkeypatch.setattr(workspace, "_manager", others)
    engine.wake()
    engine.prefetch()
    assert calls == [], "it is awake"
    engine.hidden_states([[5, 6, 7]])
    engine.reload()
    engine.sleep()
    engine.prefetch()
    engine.sleep()
    assert calls == [("prefetch",), ("suspend", 1)], "what was prefetched in vain goes"
    assert {name for name, *_ in engine.llm.seen} == {
        "wake_up",
        "encode",
        "collective_rpc",
        "sleep",
    }
    assert all(current is memory and manager is mine for _, current, manager in engine.llm.seen)
    assert EngineMemory.current is None and workspace._manager is others


def test_the_environment_is_of_names_that_vllm_reads():
    vllm_process.import_vllm()
    from vllm import envs

    names = {name for name in vllm_process.ENVIRONMENT if name.startswith("VLLM_")}
    assert names <= set(envs.environment_variables)
    assert envs.VLLM_USE_FLASHINFER_SAMPLER is False


def test_the_sleep_backend_serves_the_engine_that_is_active():
    """vLLM builds it without arguments, by the name that it was registered under."""
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackend, SleepModeBackendFactory

    assert vllm_process.register_sleep_backend() == vllm_process.register_sleep_backend() == "opd"
    assert SleepModeBackendFactory.get_backend_class("opd") is vllm_process.EngineSleep
    assert set(SleepModeBackend.__abstractmethods__) <= set(dir(vllm_process.EngineSleep))
    allocator = SimpleNamespace(pointer_to_data={}, get_current_usage=lambda: 0)
    first, second = (EngineMemory(name, allocator, driver=None) for name in ("first", "second"))
    for memory in (second, first):
        with memory.active():
            assert vllm_process.EngineSleep().memory is memory
    with pytest.raises(AssertionError, match="inside `active"):
        vllm_process.EngineSleep()


# ---- The pool ------------------------------------------------------------------------------------


def pool_of(members, routes, payload="hidden", cache_bytes=1 << 30, **loss) -> TeacherPool:
    return TeacherPool(
        members,
        {domain: tuple(route) for domain, route in routes.items()},
        LossConfig(**loss),
        payload=payload,
        cache_bytes=cache_bytes,
        shared_vocab=VOCAB,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        turns=one_after_another(members),
    )


BY_DOMAIN = {"addition": [("addition", 1.0)], "reversal": [("reversal", 1.0)]}


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("payload", ["sampled", "topk"])
def test_scores_are_the_teachers_full_vocabulary_logprobs(
    teachers, reference, prompts, payload, temperature
):
    pool = pool_of(
        [teachers["addition"], teachers["reversal"]],
        BY_DOMAIN,
        payload,
        support_k=5,
        loss_temperature=temperature,
    )
    rollouts = written(prompts)
    for rollout, (score,) in zip(rollouts, pool.score(rollouts), strict=True):
        assert score.teacher == rollout.prompt.domain and score.weight == 1.0
        logprobs_LV = (logits_of(reference[score.teacher], rollout) / temperature).log_softmax(-1)
        sampled_L = logprobs_LV.gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        assert (score.sampled_logprobs - sampled_L).abs().max() < TOLERANCE
        assert (score.entropy + (logprobs_LV.exp() * logprobs_LV).sum(-1)).abs().max() < TOLERANCE
        assert score.hidden is None
        if payload == "topk":
            top_LK, ids_LK = logprobs_LV.topk(5)
            assert torch.equal(score.topk_ids, ids_LK)
            assert (score.topk_logprobs - top_LK).abs().max() < TOLERANCE
        else:
            assert score.topk_ids is None


def test_hidden_payload_says_it_all(teachers, reference, prompts):
    pool = pool_of([teachers["addition"], teachers["reversal"]], BY_DOMAIN)
    rollouts = written(prompts)
    for rollout, (score,) in zip(rollouts, pool.score(rollouts), strict=True):
        logits_LV = score.hidden.cpu() @ pool.head(score.teacher).weight_VH.cpu().T
        assert (logits_LV - logits_of(reference[score.teacher], rollout)).abs().max() < TOLERANCE


def test_every_teacher_wakes_at_most_once_and_alone(teachers, prompts, monkeypatch):
    members = [teachers["addition"], teachers["reversal"], teachers["tied"]]
    routes = {
        "addition": [("addition", 0.5), ("reversal", 0.5)],
        "reversal": [("reversal", 1.0)],
        "none": [("tied", 1.0)],
    }
    wakes, awake_with = Counter(), []
    for teacher in members:

        def wake(tags=None, teacher=teacher, original=teacher.wake):
            wakes[teacher.name] += 1
            original(tags)
            awake_with.append([t.name for t in members if t.awake])

        monkeypatch.setattr(teacher, "wake", wake)
    scores = pool_of(members, routes).score(written(prompts))
    assert wakes == {"addition": 1, "reversal": 1}, "tied has no prompts and sleeps on"
    assert awake_with == [["addition"], ["reversal"]]
    assert not any(t.awake for t in members)
    assert [[s.teacher for s in row] for row in scores] == [
        ["addition", "reversal"] if p.domain == "addition" else ["reversal"] for p in prompts
    ]


def test_a_teacher_that_fails_is_put_to_sleep(teachers, prompts, monkeypatch):
    monkeypatch.setattr(
        teachers["addition"], "hidden_states", lambda *_: [torch.full((1, 96), float("nan"))] * 8
    )
    with pytest.raises(
        FloatingPointError, match="teacher addition: prompt 0: hidden states are not finite"
    ):
        pool_of([teachers["addition"]], {d: [("addition", 1.0)] for d in BY_DOMAIN}).score(
            written(prompts)
        )

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(teachers["addition"], "hidden_states", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        pool_of([teachers["addition"]], {d: [("addition", 1.0)] for d in BY_DOMAIN}).score(
            written(prompts)
        )
    assert not teachers["addition"].awake


def test_a_token_beyond_the_shared_vocabulary_may_only_be_the_last(teachers, prompts):
    rollouts, routes = written(prompts), {d: [("padded", 1.0)] for d in BY_DOMAIN}
    pool = pool_of([teachers["padded"]], routes, "sampled")
    rollouts[2] = replace(rollouts[2], response_ids=[3, 4])
    whole = pool.score(rollouts)[2]
    rollouts[2] = replace(rollouts[2], response_ids=[3, VOCAB])
    (found,), (expected,) = pool.score(rollouts)[2], whole
    assert len(found.sampled_logprobs) == 2, "what is said of the last is used by nobody"
    assert torch.equal(found.sampled_logprobs[:1], expected.sampled_logprobs[:1])
    rollouts[2] = replace(rollouts[2], response_ids=[VOCAB, 3])
    with pytest.raises(
        RuntimeError, match=r"prompt 2: the response has token 40, beyond the 40 tokens"
    ):
        pool.score(rollouts)


def test_one_head_is_resident(teachers):
    pool = pool_of([teachers["padded"], teachers["tied"]], {})
    assert pool.head("padded").weight_VH.shape == (VOCAB, 96)
    assert pool.head("padded") is pool.head("padded")
    assert pool.head("tied").weight_VH.shape == (VOCAB, 64)
    assert pool._resident[0] == "tied"
    pool.release_head()
    assert pool._resident is None


# ---- From teachers to the loss -------------------------------------------------------------------


def loss_and_gradient(members, routes, rollouts, payload, student, **loss):
    """The summed loss of `rollouts` and its gradient with respect to the student's final hidden
    states [N, H].
    """
    cfg = LossConfig(**loss)
    pool = pool_of(members, routes, payload, **loss)
    scored = list(zip(rollouts, pool.score(rollouts), strict=True))
    mb = collate(scored, pad_id=0, domains=list(routes))
    with torch.no_grad():
        states_BSH = student.base_model(
            mb.input_ids_BS, attention_mask=mb.attention_mask_BS
        ).last_hidden_state
    hidden_NH = states_BSH[mb.loss_mask_BS].to(pool.device).requires_grad_()
    mb = mb.to(pool.device)

    def token_loss(logits, rows):
        seen = compare(logits, rows, mb, head_of=pool.head, cfg=cfg)
        return seen.divergence_C, {"teacher": seen.teacher_logprobs_C}

    head = OutputHead(student.get_output_embeddings().weight.detach().to(pool.device))
    loss_sum, stats = fused_linear_loss(
        hidden_NH,
        head,
        token_loss,
        temperature=cfg.loss_temperature,
        vocab=VOCAB,
        chunk_bytes=VOCAB * 4 * LIVE_BUFFERS * 7,
    )
    loss_sum.backward()
    return loss_sum.detach(), hidden_NH.grad, stats["teacher"]


LOSSES = [
    ("hidden", {"loss": "reverse_kl"}),
    ("topk", {"loss": "forward_kl", "support": "teacher_topk", "support_k": 6}),
    ("topk+hidden", {"loss": "reverse_kl", "support": "union_topk", "support_k": 6}),
    ("sampled", {"loss": "reverse_kl", "support": "sampled"}),
]
LOSS_IDS = ["full", "teacher_topk", "union_topk", "sampled"]


def assert_same(one, two, tolerance):
    for a, b in zip(one, two, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, float(a.abs().max()))


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_a_union_of_whole_vocabularies_is_the_full_support(
    teachers, reference, prompts, temperature
):
    """The teacher's log-probabilities at the student's tokens come from its hidden states, not from
    a guess.
    """
    rollouts, options = (
        written(prompts),
        {"loss": "jsd", "loss_temperature": temperature, "overlap_k": 0},
    )
    routes = {"addition": [("addition", 0.3), ("reversal", 0.7)], "reversal": [("reversal", 1.0)]}
    members = [teachers["addition"], teachers["reversal"]]
    full = loss_and_gradient(members, routes, rollouts, "hidden", reference["student"], **options)
    union = {"support": "union_topk", "support_k": VOCAB // 2, "tail": "truncate"}
    half = loss_and_gradient(
        members, routes, rollouts, "topk+hidden", reference["student"], **options, **union
    )
    union["support_k"] = VOCAB
    whole = loss_and_gradient(
        members, routes, rollouts, "topk+hidden", reference["student"], **options, **union
    )
    assert_same(full, whole, 1e-5)
    assert abs(full[0] - half[0]) > 1e-4 * abs(full[0])


def test_a_full_cache_spills_to_the_top_k_and_says_so(teachers, reference, prompts, capsys):
    """Each teacher keeps its share in full; the rest is scored on the spot, and no
    token is lost.
    """
    rollouts = written(prompts)
    members, options = (
        [teachers["addition"], teachers["reversal"]],
        {"support_k": 3, "tail": "bucket"},
    )
    bytes_of = {
        t.name: sum(len(r.response_ids) for r in rollouts if r.prompt.domain == t.name)
        * t.head.weight_VH.shape[1]
        * 4
        for t in members
    }
    pool = pool_of(members, BY_DOMAIN, cache_bytes=sum(bytes_of.values()) // 2, **options)
    scores = pool.score(rollouts)
    warning = capsys.readouterr().err
    assert (
        "--teacher_cache_bytes" in warning
        and "top 3 tokens (--tail bucket) instead of --support full" in warning
    )
    everything = pool_of(members, BY_DOMAIN, **options).score(rollouts)
    topk = pool_of(members, BY_DOMAIN, "topk", **options).score(rollouts)
    for name, whole in bytes_of.items():
        mine = [i for i, r in enumerate(rollouts) if r.prompt.domain == name]
        kept = [i for i in mine if scores[i][0].hidden is not None]
        assert 0 < len(kept) < len(mine)
        size = sum(scores[i][0].hidden.numel() * 4 for i in kept)
        assert size <= whole // 2 and kept == mine[: len(kept)]
        for i in mine:
            expected = (everything if i in kept else topk)[i][0]
            for field in ("hidden", "topk_logprobs", "sampled_logprobs", "entropy", "logsumexp"):
                found, wanted = getattr(scores[i][0], field), getattr(expected, field)
                assert (found is None) == (wanted is None)
                assert found is None or torch.allclose(found, wanted, atol=1e-5)
    assert pool.spilled_tokens == sum(
        len(r.response_ids) for r, s in zip(rollouts, scores, strict=True) if s[0].hidden is None
    )
    pool.score(rollouts)
    assert "--teacher_cache_bytes" not in capsys.readouterr().err, "once is enough"
    none = pool_of(members, BY_DOMAIN, cache_bytes=0, **options)
    calls = []
    for member in members:
        real = member.hidden_states
        member.hidden_states = lambda rollouts, *name, real=real: (
            calls.append(len(rollouts)) or real(rollouts, *name)
        )
    assert all(s.hidden is None and s.topk_ids is not None for (s,) in none.score(rollouts))
    for member in members:
        del member.hidden_states
    assert len(calls) == 2, "what is not kept is still read in large batches"


@pytest.mark.parametrize(("payload", "loss"), LOSSES, ids=LOSS_IDS)
def test_one_teacher_listed_twice_equals_one_teacher(teachers, reference, prompts, payload, loss):
    addition = teachers["addition"]
    first, second = (
        ColocatedTeacher(replace(addition.spec, name=n), addition.engine, addition.head)
        for n in "ab"
    )
    once = {domain: [("addition", 1.0)] for domain in BY_DOMAIN}
    twice = {"addition": [("a", 1.0)], "reversal": [("b", 1.0)]}
    rollouts = written(prompts)
    assert_same(
        loss_and_gradient([addition], once, rollouts, payload, reference["student"], **loss),
        loss_and_gradient([first, second], twice, rollouts, payload, reference["student"], **loss),
        1e-6,
    )


@pytest.mark.parametrize(("payload", "loss"), LOSSES, ids=LOSS_IDS)
def test_mixtures(teachers, reference, prompts, payload, loss):
    """All weight on one teacher is routing; .3 and .7 are the weighted sum of both."""
    members = [teachers["addition"], teachers["reversal"]]
    rollouts = written(prompts)

    def of(route):
        routes = {domain: route for domain in BY_DOMAIN}
        return loss_and_gradient(members, routes, rollouts, payload, reference["student"], **loss)

    addition, reversal = of([("addition", 1.0)]), of([("reversal", 1.0)])
    assert (addition[0] - reversal[0]).abs() > 0.1
    assert_same(addition, of([("addition", 1.0), ("reversal", 0.0)]), 1e-6)
    weighted = [0.3 * a + 0.7 * b for a, b in zip(addition, reversal, strict=True)]
    assert_same(weighted, of([("addition", 0.3), ("reversal", 0.7)]), 1e-6)
    assert_same(weighted, of([("reversal", 0.7), ("addition", 0.3)]), 1e-6)


@pytest.mark.parametrize(("payload", "loss"), LOSSES, ids=LOSS_IDS)
def test_a_padded_vocabulary_changes_nothing(teachers, reference, prompts, payload, loss):
    """24 random rows more in the teacher's head; left in, they would take most of its
    probability.
    """
    rollouts = written(prompts)
    plain, padded = (
        loss_and_gradient(
            [teachers[name]],
            {d: [(name, 1.0)] for d in BY_DOMAIN},
            rollouts,
            payload,
            reference["student"],
            **loss,
        )
        for name in ("addition", "padded")
    )
    assert_same(plain, padded, 1e-5)


# ---- Teachers of both backends -------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf_teachers(process, tiny, tiny_tied):
    """The same teachers as transformers models, asleep on the disk."""
    built = {}
    for name, path in {
        "addition": tiny.addition,
        "reversal": tiny.reversal,
        "tied": tiny_tied,
    }.items():
        engine = HFEngine(
            name,
            str(path),
            dtype="float32",
            trust_remote_code=False,
            device=process,
            residency="disk",
        )
        built[name] = ColocatedTeacher(
            TeacherSpec(name, str(path), (name,)), engine, map_head(str(path))
        )
        built[name].sleep()
    return built


@pytest.mark.parametrize("name", ["addition", "reversal", "tied"])
def test_both_backends_return_the_same_states(teachers, hf_teachers, prompts, name):
    rollouts = written(prompts)
    found = []
    for teacher in (teachers[name], hf_teachers[name]):
        teacher.wake()
        found.append([state.cpu() for state in teacher.hidden_states(rollouts)])
        teacher.sleep()
    for vllm_LH, hf_LH in zip(*found, strict=True):
        assert vllm_LH.dtype == hf_LH.dtype and (vllm_LH - hf_LH).abs().max() < TOLERANCE


@pytest.mark.parametrize(("payload", "loss"), LOSSES, ids=LOSS_IDS)
def test_backends_mix(teachers, hf_teachers, reference, prompts, payload, loss):
    """One teacher of each in one step, and both in a mixture."""
    rollouts = written(prompts)
    routes = {"addition": [("addition", 0.5), ("reversal", 0.5)], "reversal": [("reversal", 1.0)]}
    assert_same(
        loss_and_gradient(
            [teachers["addition"], teachers["reversal"]],
            routes,
            rollouts,
            payload,
            reference["student"],
            **loss,
        ),
        loss_and_gradient(
            [teachers["addition"], hf_teachers["reversal"]],
            routes,
            rollouts,
            payload,
            reference["student"],
            **loss,
        ),
        TOLERANCE,
    )

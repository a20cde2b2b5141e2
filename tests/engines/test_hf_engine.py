"""Teachers of the hf backend: right for every family, whatever the batch; and a sleeping one gives
back what it says.

L length of a sequence, V vocabulary, H hidden size.
"""

import gc
import json
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import train_mopd
from opd.config import TeacherSpec
from opd.engines import hf_engine
from opd.engines.hf_engine import HFEngine, HFGenerator, batches
from opd.inputs.arguments import parse
from opd.inputs.identity import fingerprint_of
from opd.ops.heads import load_head, map_head
from opd.teachers import ColocatedTeacher
from tests.support.heads import CASES, make_model
from tests.support.launch import Models, command, metrics_of, succeed

FLOAT32 = {"dtype": "float32", "trust_remote_code": False}
MIB = 1 << 20
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="host memory is the device's on a CPU"
)


def sequences_of(lengths: list[int], vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, vocab, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def reference_states(model, sequences) -> list[torch.Tensor]:
    return [model.base_model(torch.tensor([ids])).last_hidden_state[0] for ids in sequences]


def assert_close(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and (a.float() - b.float()).abs().max() <= tolerance


# ---- What it says --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_states_and_head_give_the_models_logits_in_every_family(name, tmp_path):
    """Only the base model is loaded, under names that differ from family to family; none may stay
    random.
    """
    model_type, changes, _ = CASES[name]
    model = make_model(model_type, changes)
    model.save_pretrained(tmp_path)
    engine, head = HFEngine(name, str(tmp_path), **FLOAT32), load_head(str(tmp_path))
    sequences = sequences_of([5, 12, 3], len(head.weight_VH))
    engine.sleep()
    engine.wake()
    for ids, state_LH in zip(sequences, engine.hidden_states(sequences), strict=True):
        with torch.no_grad():
            logits_LV = model(torch.tensor([ids])).logits[0]
            found_LV = head.form(linear(state_LH, head.weight_VH, head.bias_V))
        torch.testing.assert_close(found_LV, logits_LV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [1, 20, 4096])
def test_states_do_not_depend_on_the_batch(tiny, monkeypatch, budget):
    monkeypatch.setattr(hf_engine, "TOKENS_PER_BATCH", budget)
    model = AutoModelForCausalLM.from_pretrained(tiny.addition, dtype=torch.float32)
    sequences = sequences_of([7, 19, 1, 7, 30, 2, 11], 40)
    engine = HFEngine("addition", str(tiny.addition), **FLOAT32)
    together = engine.hidden_states(sequences)
    assert all(state.dtype == torch.float32 and not state.requires_grad for state in together)
    assert_close(together, [engine.hidden_states([ids])[0] for ids in sequences], 1e-5)
    assert_close(together, reference_states(model, sequences), 1e-5)


def test_batches_are_neighbours_in_length_within_the_budget():
    lengths = [3, 9, 4, 100, 4, 1, 9, 2]
    found = list(batches(lengths, 16))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    assert [[lengths[index] for index in batch] for batch in found] == [
        [1, 2, 3, 4],
        [4],
        [9],
        [9],
        [100],
    ]
    assert list(batches([], 16)) == []


def test_the_states_have_the_engines_dtype(tiny):
    engine = HFEngine("addition", str(tiny.addition), dtype="bfloat16", trust_remote_code=False)
    (state_LH,) = engine.hidden_states([[5, 6, 7]])
    assert state_LH.dtype == torch.bfloat16 and state_LH.shape == (3, 96)


def test_weights_that_are_missing_are_not_made_up(tiny, tmp_path):
    """transformers would initialise them at random, with a warning."""
    for path in tiny.reversal.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RuntimeError,
        match=r"teacher reversal: .* lacks 1 weights of its base model, first .*up_proj",
    ):
        HFEngine("reversal", str(tmp_path), **FLOAT32)


# ---- Sleep and wake ------------------------------------------------------------------------------


def test_a_teacher_on_the_gpu_never_sleeps(tiny):
    engine = HFEngine("addition", str(tiny.addition), residency="gpu", **FLOAT32)
    engine.sleep()
    assert engine.awake and not engine.can_sleep and len(engine.hidden_states([[5, 6, 7]])) == 1
    engine.prefetch()
    engine.wake()
    assert engine.awake


@pytest.mark.parametrize("residency", ["host", "disk"])
def test_the_books_of_sleep_and_wake(tiny, residency):
    engine = HFEngine("addition", str(tiny.addition), residency=residency, **FLOAT32)
    before = engine.hidden_states([[5, 6, 7]])
    assert engine.name == "addition" and engine.awake
    for _ in range(2):
        engine.sleep()
        engine.sleep()
        assert not engine.awake
        with pytest.raises(AssertionError, match="addition: weights asleep; wake it first"):
            engine.hidden_states([[5, 6, 7]])
        engine.prefetch()
        engine.prefetch()
        engine.wake(["kv_cache"])
        assert not engine.awake
        engine.wake(["weights"])
        engine.wake()
        assert engine.awake and torch.equal(engine.hidden_states([[5, 6, 7]])[0], before[0])
    on_cpu = engine.device.type == "cpu"
    assert engine.can_sleep == (residency == "disk" or (residency == "host" and not on_cpu))


def test_bytes_awake_are_those_of_the_base_model(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny.addition, dtype=torch.float32)
    expected = sum(
        t.numel() * t.element_size() for t in (*model.model.parameters(), *model.model.buffers())
    )
    engine = HFEngine("addition", str(tiny.addition), residency="disk", **FLOAT32)
    assert engine.bytes_awake == expected, "without the head"
    engine.sleep()
    assert engine.bytes_awake == expected, "what it will hold, not what it holds"


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0},
}


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_tables_are_right_after_every_wake(tmp_path, rope):
    """They are in no file. The dynamic ones have changed by the time the engine sleeps."""
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            rope_parameters=ROPES[rope],
            initializer_range=0.5,
        )
    ).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    short, long = sequences_of([9, 60], 40)
    expected = reference_states(model, [short]) + reference_states(model, [long])
    engine = HFEngine("llama", str(tmp_path), residency="disk", **FLOAT32)
    for _ in range(3):
        assert_close([engine.hidden_states([ids])[0] for ids in (short, long)], expected, 1e-5)
        engine.sleep()
        engine.wake()


@pytest.fixture(scope="module")
def heavy(tmp_path_factory) -> Path:
    """80 MiB in float32: far more than the noise of a process."""
    path = tmp_path_factory.mktemp("heavy")
    torch.manual_seed(0)
    shape = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).save_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.save_pretrained(path / "half")
    return path


def resident_bytes(key: str = "VmRSS") -> int:
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) * 1024


@pytest.mark.parametrize("files", ["", "half"])
def test_a_teacher_on_the_disk_really_leaves(heavy, files):
    """Mapped pages, and the copies that another dtype than the files' takes."""
    engine = HFEngine("heavy", str(heavy / files), residency="disk", **FLOAT32)
    module = weakref.ref(engine._base)
    sequences = sequences_of([40, 30], 64)
    engine.hidden_states(sequences)  # the first forward also loads libraries and starts threads
    engine.sleep()
    assert module() is None
    # pages of its own kind, mapped files or copies: the machine takes others back meanwhile
    key = "RssAnon" if files else "RssFile"
    for _ in range(2):
        asleep, all_asleep = resident_bytes(key), resident_bytes()
        engine.wake()
        engine.hidden_states(sequences)
        awake = resident_bytes(key)
        engine.sleep()
        assert awake - asleep > 0.9 * engine.bytes_awake > 60 * MIB
        assert abs(resident_bytes(key) - asleep) < 0.1 * engine.bytes_awake
        assert resident_bytes() - all_asleep < 0.1 * engine.bytes_awake
    assert str(heavy / files) not in Path("/proc/self/maps").read_text()


def test_a_waking_teacher_is_mapped_and_never_there_twice(heavy, device):
    """On the device of a rank, as the trainers build it: a copy of the weights beside their pages
    would double the peak.
    """
    engine = HFEngine("heavy", str(heavy), residency="disk", device=device, **FLOAT32)
    sequences = sequences_of([40, 30], 64)
    engine.hidden_states(sequences)
    engine.sleep()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    asleep, files = resident_bytes(), resident_bytes("RssFile")
    engine.wake()
    engine.hidden_states(sequences)
    if device.type == "cpu":
        assert resident_bytes("RssFile") - files > 0.9 * engine.bytes_awake
    assert resident_bytes("VmHWM") - asleep < 1.3 * engine.bytes_awake
    engine.sleep()


def test_a_teacher_on_the_host_stays_where_it_is(heavy):
    engine = HFEngine("heavy", str(heavy), residency="host", **FLOAT32)
    before = engine._base
    engine.sleep()
    assert engine._base is before


@needs_gpu
def test_a_host_copy_is_pinned_once_and_reused(heavy):
    engine = HFEngine("heavy", str(heavy), residency="host", device="cuda", **FLOAT32)
    before = engine.hidden_states([[5, 6, 7]])
    places = [tensor.data_ptr() for tensor in engine._pinned]
    assert all(tensor.is_pinned() for tensor in engine._pinned) and engine.can_sleep
    engine.sleep()
    asleep = torch.cuda.memory_allocated()
    for _ in range(3):
        engine.prefetch()
        engine.wake()
        assert torch.cuda.memory_allocated() - asleep >= engine.bytes_awake
        assert torch.equal(engine.hidden_states([[5, 6, 7]])[0], before[0])
        engine.sleep()
        assert torch.cuda.memory_allocated() == asleep
    engine.prefetch()
    engine.sleep()
    assert torch.cuda.memory_allocated() == asleep, "a prefetch that nobody waited for"
    assert [tensor.data_ptr() for tensor in engine._pinned] == places


def test_a_load_that_fails_leaves_the_engine_asleep(heavy, monkeypatch):
    engine = HFEngine("heavy", str(heavy), residency="disk", **FLOAT32)
    engine.sleep()

    def fails():
        raise OSError("the disk is gone")

    monkeypatch.setattr(engine, "_load", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        engine.wake()
    assert not engine.awake and engine._base is None
    monkeypatch.undo()
    engine.wake()
    assert len(engine.hidden_states([[5, 6]])[0]) == 2


def test_a_teacher_that_wakes_as_another_stops_the_run_by_name(tiny, tmp_path):
    """The canary: one log-probability that is known from before the first sleep."""
    path = tmp_path / "teacher"
    shutil.copytree(tiny.addition, path)
    engine = HFEngine("addition", str(path), residency="disk", **FLOAT32)
    teacher = ColocatedTeacher(TeacherSpec("addition", str(path), "*"), engine, map_head(str(path)))
    for _ in range(2):
        teacher.sleep()
        teacher.wake()
    teacher.sleep()
    weights = load_file(path / "model.safetensors")
    for broken in ("zero", "nan"):
        values = {
            k: torch.full_like(v, float(broken == "nan") and torch.nan) for k, v in weights.items()
        }
        head = {"lm_head.weight": weights["lm_head.weight"]}  # the head did not sleep
        save_file({**values, **head}, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RuntimeError, match="teacher addition woke up with other weights"):
            teacher.wake()
        teacher.sleep()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    teacher.wake()


# ---- The head ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "tied", "bias", "gemma2"])
def test_a_mapped_head_is_the_head(name, tmp_path):
    model_type, changes, _ = CASES[name]
    make_model(model_type, changes).save_pretrained(tmp_path)
    stored, mapped = load_head(str(tmp_path)), map_head(str(tmp_path))
    for one, two in ((stored, mapped.to("cpu")), (stored.cut(7), mapped.pinned().cut(7).to("cpu"))):
        assert torch.equal(one.weight_VH, two.weight_VH) and one.form == two.form == mapped.form
        assert (one.bias_V is None) == (two.bias_V is None)
        assert one.bias_V is None or torch.equal(one.bias_V, two.bias_V)
    assert mapped.cut(7).weight_VH.shape == stored.cut(7).weight_VH.shape


def test_a_mapped_head_lies_in_memory_only_while_it_is_used(tmp_path):
    make_model("qwen3", {"tie_word_embeddings": False}).save_pretrained(tmp_path)
    mapped = map_head(str(tmp_path))
    assert mapped.weight_VH.shape[1] == 32
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    head = mapped.to("cpu")
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del head
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


# ---- What it writes ------------------------------------------------------------------------------

EOS, OTHER_STOP = 1, 20


@pytest.fixture
def generator(tiny) -> HFGenerator:
    return HFGenerator(str(tiny.addition), **FLOAT32)


def test_greedy_responses_are_the_argmax_and_keep_their_stop_token(generator, tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny.addition, dtype=torch.float32)
    prompts = sequences_of([4, 9, 1, 6, 3, 12], 40)
    samples = generator.generate(
        prompts, [0] * 6, (EOS, OTHER_STOP), max_tokens=12, temperature=0.0
    )
    for prompt, sample in zip(prompts, samples, strict=True):
        ids = sample.token_ids
        with torch.no_grad():
            logits_SV = model(torch.tensor([prompt + ids])).logits[0]
        assert (
            logits_SV[len(prompt) - 1 : -1].argmax(-1).tolist() == ids and sample.logprobs is None
        )
        assert not {EOS, OTHER_STOP} & set(ids[:-1])
        assert sample.stopped == (ids[-1] in (EOS, OTHER_STOP)) and (
            sample.stopped or len(ids) == 12
        )


def test_a_sampled_response_is_a_function_of_its_seed(generator):
    prompts = [[5, 6, 7]] * 6 + [[8, 9]]

    def sample(chosen, seeds):
        samples = generator.generate(
            [prompts[i] for i in chosen], seeds, (EOS,), max_tokens=12, temperature=1.0
        )
        return [s.token_ids for s in samples]

    together = sample(range(7), list(range(7)))
    assert sample([6, 2], [6, 2]) == [together[6], together[2]]
    assert len({tuple(ids) for ids in together}) > 4


def test_sampled_responses_follow_the_model_and_not_its_generation_config(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny.addition, dtype=torch.float32)
    model.generation_config.min_p, model.generation_config.do_sample = 1.0, True
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        likeliest = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 1.3).softmax(-1).max(0)
    samples = HFGenerator(str(tmp_path), **FLOAT32).generate(
        [[5, 6, 7]] * 150, list(range(150)), (EOS,), max_tokens=1, temperature=1.3
    )
    share, expected = (
        sum(s.token_ids == [likeliest.indices] for s in samples) / 150,
        float(likeliest.values),
    )
    assert expected < 0.7 and abs(share - expected) < 4 * (expected * (1 - expected) / 150) ** 0.5


# ---- Runs ----------------------------------------------------------------------------------------


def test_residency_and_backend_may_change_under_a_resumed_run(tiny):
    """They decide what fits and what runs a teacher, not what it says."""
    argv = ["--student_model", str(tiny.student), "--data", str(tiny.train), "--output_dir", "o"]
    prints = []
    for flags in (
        [],
        ["--teacher_residency", "gpu"],
        ["--teacher_residency", "disk", "--teacher_backend", "hf"],
    ):
        cfg = parse(train_mopd.Config, [*argv, "--teacher", f"addition={tiny.addition}", *flags])
        prints.append(
            json.dumps(fingerprint_of(cfg, {"addition": "its hash"}, "data"), sort_keys=True)
        )
    assert prints[0] == prints[1] == prints[2]


@pytest.mark.e2e
def test_a_run_with_hf_teachers_on_the_disk_is_the_run_with_vllm(tiny, tmp_path):
    """ZeRO-3, so that a teacher that is loaded beside the student must not be sharded."""
    models = Models(
        tiny.student, {d: getattr(tiny, d) for d in tiny.domains}, (str(tiny.train),), tiny.eval
    )
    hf = ("--teacher_backend", "hf", "--teacher_residency", "disk")
    runs = {"hf": command(models, tmp_path / "hf", *hf), "vllm": command(models, tmp_path / "vllm")}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(succeed, runs.values()))
    for one, two in zip(*(metrics_of(tmp_path / name) for name in runs), strict=True):
        for key in ("loss/total", "optim/grad_norm", "distill/k1"):
            assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-6), key

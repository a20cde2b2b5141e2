"""The sections of gpu_check.py that need vLLM, and the random models of all: each runs in a process
of its own.

Engines are built as the trainers build them, through `opd`. A canary is what an engine said before
it ever slept, asked again: the final hidden states of a teacher, the log-probabilities that the
generator gives its own greedy tokens.

Shape suffixes: B sequences, L response length, V vocabulary.
"""

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

from opd import distributed
from opd.engines.vllm_engine import GeneratorEngine, HiddenStateEngine
from scripts.measure.gpu_products import GB, GIB, Size, measure_copies
from scripts.measure.runs import byte_tokenizer

DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
CANARY_TOLERANCE = {
    "cuda": 2e-2,
    "cpu": 1e-4,
}  # of log-probabilities and of hidden states relative to their largest
PARITY_TOLERANCE = {"cuda": 0.05, "cpu": 1e-4}  # mean difference of log-probabilities, nats


# ---- Models and engines --------------------------------------------------------------------------


def model_config(shape: tuple[int, int], vocab: int, device: str) -> Qwen3Config:
    """Qwen3 of (hidden size, layers), with grouped attention as its published sizes have it."""
    hidden, layers = shape
    head_dim = 128 if hidden >= 1024 else 32
    heads = hidden // head_dim
    return Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=vocab - 2,
        pad_token_id=vocab - 1,
        dtype=DTYPES[device],
    )


def write_models(root: Path, size: Size, device: str, num_teachers: int) -> list[Path]:
    """Random models with their tokenizer: the student, then the teachers, the largest first."""
    tokenizer = byte_tokenizer(size.vocab)
    paths = []
    for seed, shape in enumerate((size.student, *size.teachers[:num_teachers])):
        torch.manual_seed(seed)
        config = model_config(shape, size.vocab, device)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        model.generation_config = GenerationConfig(
            eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        paths.append(root / f"model_{seed}")
        model.save_pretrained(paths[-1])
        tokenizer.save_pretrained(paths[-1])
        del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return paths


def options(size: Size, device: str) -> dict:
    """What all engines have in common."""
    return {
        "dtype": str(DTYPES[device]).removeprefix("torch."),
        "max_model_len": size.prompt_tokens + size.response_tokens,
        "kv_cache_gib": size.kv_cache_gib,
        "trust_remote_code": False,
    }


def build_teacher(
    name: str, path: Path, size: Size, device: str, residency: str = "host"
) -> HiddenStateEngine:
    """A teacher's engine, awake."""
    return HiddenStateEngine(
        name, str(path), tokenizer=str(path), residency=residency, **options(size, device)
    )


def build_generator(path: Path, size: Size, device: str) -> GeneratorEngine:
    """The sampler's engine, awake."""
    return GeneratorEngine(
        str(path), seed=0, enforce_eager=device == "cpu", **options(size, device)
    )


def prompts(size: Size) -> list[list[int]]:
    """Random tokens, none of them special."""
    rng = random.Random(0)
    return [
        [rng.randrange(size.vocab - 2) for _ in range(size.prompt_tokens)]
        for _ in range(size.prompts)
    ]


@contextmanager
def models(size: Size, device: str, num_teachers: int) -> Iterator[list[Path]]:
    """`write_models` in a directory that goes away; this process as a rank."""
    distributed.init()
    with tempfile.TemporaryDirectory() as root:
        yield write_models(Path(root), size, device, num_teachers)


# ---- Measuring -----------------------------------------------------------------------------------


def used_bytes(device: str) -> int | None:
    """Of the whole GPU, as its driver tells: torch does not count what vLLM's allocator maps."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds, with everything it started."""
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def gib(number: int | None) -> float | None:
    """Bytes in GiB; None stays None."""
    return None if number is None else round(number / GIB, 3)


def logprobs_of_greedy(engine: GeneratorEngine, size: Size) -> Tensor:
    """What the generator gives the tokens that it likes best, [B * L]."""
    samples = engine.generate(
        prompts(size)[:4], [0] * 4, (), max_tokens=size.response_tokens, temperature=0.0
    )
    return torch.tensor([logprob for sample in samples for logprob in sample.logprobs])


def last_states(engine: HiddenStateEngine, size: Size) -> Tensor:
    """Hidden states of a few prompts, on the host, relative to the largest."""
    states = torch.cat(engine.hidden_states(prompts(size)[:4])).float().cpu()
    return states / states.abs().max()


# ---- sleep ---------------------------------------------------------------------------------------


def cycle(
    name: str,
    engine,
    canary: Callable[[], Tensor],
    known: Tensor,
    wake: Callable[[], object],
    device: str,
) -> dict:
    """One engine, awake at the start and at the end: its sleep, its wake, its canary against what
    it said before it ever slept. The others are asleep.
    """
    awake = used_bytes(device)
    sleep_s = timed(engine.sleep, device)
    asleep = used_bytes(device)
    wake_s = timed(wake, device)
    difference = float((canary() - known).abs().max())
    return {
        "engine": name,
        "holds_gib": gib(engine.bytes_awake),
        "freed_gib": None if awake is None else gib(awake - asleep),
        "host_gib": gib(engine.memory.host_bytes) if engine.memory is not None else None,
        "sleep_s": round(sleep_s, 4),
        "wake_s": round(wake_s, 4),
        "canary_difference": float(f"{difference:.3g}"),
        "ok": difference <= CANARY_TOLERANCE[device],
    }


def measure_sleep(size: Size, device: str) -> dict:
    """Sleeps and wakes of three engines, twice each: the first sleep of a teacher pins and copies,
    the second does not.
    """
    with models(size, device, 2) as (student, first, second):
        weights = AutoModelForCausalLM.from_pretrained(student, dtype=DTYPES[device]).state_dict()
        generator = build_generator(student, size, device)
        known = [logprobs_of_greedy(generator, size)]
        generator.sleep()
        host = build_teacher("host", first, size, device)
        known.append(last_states(host, size))
        host.sleep()
        disk = build_teacher("disk", second, size, device, residency="disk")
        known.append(last_states(disk, size))
        disk.sleep()

        def wake_generator() -> None:
            generator.wake(["weights"])
            generator.load_weights(weights.items())
            generator.wake(["kv_cache"])

        rows = []
        sides = (
            (generator, lambda: logprobs_of_greedy(generator, size), wake_generator),
            (host, lambda: last_states(host, size), host.wake),
            (disk, lambda: last_states(disk, size), disk.wake),
        )
        for (engine, canary, wake), said in zip(sides, known, strict=True):
            wake()
            rows += [
                {"round": i, **cycle(engine.name, engine, canary, said, wake, device)}
                for i in range(2)
            ]
            engine.sleep()
        result = {"rows": rows, "ok": all(row["ok"] for row in rows)}
        if device == "cuda":
            result |= against_copies(rows, size, device) | measure_prefetch(host, size, device)
    worst = max(row["canary_difference"] for row in rows)
    return {"headline": _sleep_headline(result, worst), **result}


def against_copies(rows: list[dict], size: Size, device: str) -> dict:
    """Seconds of the teacher's wake from the host as bandwidth, and as a share of what one large
    copy reaches.
    """
    copies = measure_copies(size, device)
    woken = next(row for row in rows if row["engine"] == "host" and row["round"] == 1)
    rate = woken["host_gib"] * GIB / GB / woken["wake_s"]
    return {
        "copies": copies,
        "wake_gb_s": round(rate, 2),
        "share_of_copy_bandwidth": round(rate / copies["to_gpu_gb_s"], 3),
    }


def measure_prefetch(engine: HiddenStateEngine, size: Size, device: str) -> dict:
    """What is left of a wake whose copies ran while the GPU was busy with products for as long as a
    plain wake takes.
    """
    square = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    plain_s = timed(engine.wake, device)
    engine.sleep()
    call_s = timed(engine.prefetch, "cpu")  # not waiting is the point
    started = time.perf_counter()
    while time.perf_counter() - started < plain_s:
        square @ square
        torch.cuda.current_stream().synchronize()
    left_s = timed(engine.wake, device)
    last_states(engine, size)
    engine.sleep()
    return {
        "plain_wake_s": round(plain_s, 4),
        "prefetch_call_s": round(call_s, 4),
        "prefetched_wake_s": round(left_s, 4),
    }


def _sleep_headline(result: dict, worst: float) -> str:
    text = f"canary within {worst:.2g}"
    if "wake_gb_s" in result:
        text += (
            f"; wake {result['wake_gb_s']} GB/s, {result['share_of_copy_bandwidth']:.0%} of a copy"
        )
        text += f"; {result['prefetched_wake_s']} s left after a prefetch"
    return text


# ---- parity --------------------------------------------------------------------------------------


@torch.no_grad()
def measure_parity(size: Size, device: str) -> dict:
    """Log-probabilities of sampler and student at every sampled token, after weights that differ
    from the files'.
    """
    with models(size, device, 0) as (path,):
        student = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[device]).to(device).eval()
        engine = build_generator(path, size, device)
        torch.manual_seed(1)
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        sync_s = [
            timed(lambda: engine.load_weights(student.named_parameters()), device) for _ in range(3)
        ]
        asked = prompts(size)
        samples = engine.generate(
            asked, list(range(len(asked))), (), max_tokens=size.response_tokens, temperature=1.0
        )
        differences = []
        for prompt, sample in zip(asked, samples, strict=True):
            ids_BS = torch.tensor([prompt + sample.token_ids], device=device)
            logits_LV = student(ids_BS).logits[0, len(prompt) - 1 : -1].float()
            labels_L1 = ids_BS[0, len(prompt) :, None]
            logprobs_L = logits_LV.log_softmax(-1).gather(-1, labels_L1)[:, 0].cpu()
            differences.append(logprobs_L - torch.tensor(sample.logprobs))
        log_ratio = torch.cat(differences)
        nbytes = sum(parameter.nbytes for parameter in student.parameters())
    mean, k3 = float(log_ratio.abs().mean()), float((log_ratio.exp() - log_ratio - 1).mean())
    return {
        "headline": f"mean difference {mean:.2g} nats, sync {min(sync_s):.3f} s",
        "tokens": len(log_ratio),
        "mean_difference": float(f"{mean:.4g}"),
        "largest_difference": float(f"{float(log_ratio.abs().max()):.4g}"),
        "k3": float(f"{k3:.4g}"),
        "sync_s": round(min(sync_s), 4),
        "sync_gb_s": round(nbytes / GB / min(sync_s), 2),
        "ok": mean <= PARITY_TOLERANCE[device],
    }


# ---- teachers ------------------------------------------------------------------------------------


def measure_teachers(size: Size, device: str) -> dict:
    """The most memory in use, over what was before, while N teachers take turns; the largest comes
    first.
    """
    with models(size, device, len(size.teachers)) as (_, *paths):
        torch.ones(1, device=device)  # the context of CUDA is nobody's
        nothing = used_bytes(device)
        engines: list[HiddenStateEngine] = []
        peaks, asleep = {}, {}
        for number, path in enumerate(paths, start=1):
            engines.append(build_teacher(f"teacher_{number}", path, size, device))
            engines[-1].sleep()
            peak = 0
            for engine in engines:
                engine.wake()
                engine.hidden_states(prompts(size))
                peak = max(peak, used_bytes(device) - nothing)
                engine.sleep()
            peaks[f"peak_{number}_gib"] = gib(peak)
            asleep[f"asleep_{number}_gib"] = gib(used_bytes(device) - nothing)
        held = [gib(engine.bytes_awake) for engine in engines]
    growth = peaks[f"peak_{len(paths)}_gib"] / peaks["peak_1_gib"]
    return {
        "headline": f"{len(paths)} teachers: {growth:.3f} of the memory of the largest",
        "growth": round(growth, 4),
        **peaks,
        **asleep,
        "holds_gib": held,
    }

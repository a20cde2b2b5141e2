"""One of two ranks with engines of both tensor-parallel sizes: `tensor_parallel_worker.py MODE
JOB`.

JOB is a JSON file with `models` (name -> directory), `prompts` (lists of token ids), `weights` (a
safetensors file) and `out` (a directory). Each rank writes `out/rank_R.json` and
`out/rank_R.safetensors`.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from opd import distributed
from opd.config import LossConfig, TeacherSpec

KV_GIB, MAX_LEN, MAX_TOKENS, SEED = 0.03, 128, 10, 7
OPTIONS = {
    "dtype": "float32",
    "max_model_len": MAX_LEN,
    "kv_cache_gib": KV_GIB,
    "trust_remote_code": False,
}
STOP = (1, 20)
DEAL = {"unequal": (5, 1), "none_on_one": (0, 3), "none": (0, 0)}  # prompts of each rank


def share(items: list, deal: tuple[int, int]) -> list:
    start = sum(deal[: distributed.rank()])
    return items[start : start + deal[distributed.rank()]]


def generator(job: dict, size: int):
    from opd.engines.vllm_engine import GeneratorEngine

    return GeneratorEngine(
        job["models"]["student"],
        seed=SEED,
        enforce_eager=True,
        tensor_parallel_size=size,
        **OPTIONS,
    )


def scorer(job: dict, name: str, size: int):
    from opd.engines.vllm_engine import HiddenStateEngine

    return HiddenStateEngine(
        name,
        job["models"][name],
        tokenizer=job["models"]["student"],
        tensor_parallel_size=size,
        **OPTIONS,
    )


def sampled(engine, prompts: list, **changes) -> list[dict]:
    seeds = [distributed.fold_seed(*ids) for ids in prompts]
    options = {"max_tokens": MAX_TOKENS, "temperature": 1.0, **changes}
    samples = engine.generate(prompts, seeds, STOP, **options)
    assert len(samples) == len(prompts)
    return [
        {"prompt": p, "ids": s.token_ids, "logprobs": s.logprobs}
        for p, s in zip(prompts, samples, strict=True)
    ]


def what_a_rank_sees(work) -> dict:
    started = time.monotonic()
    try:
        with distributed.agree_on_error("the work"):
            work()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - started}
    return {"error": None, "seconds": time.monotonic() - started}


def scored(job: dict, engines: dict, cache_bytes: int) -> dict[str, torch.Tensor]:
    """Hidden states and top tokens from a pool whose ranks have different work for its teachers."""
    from opd import teachers
    from opd.ops.heads import load_head
    from opd.types import Prompt, Rollout
    from tests.support.turns import one_after_another

    teachers.PIECE_BYTES = 1  # every response that is not kept is a call of its own
    domains = ["addition", "reversal"] if distributed.rank() == 0 else ["addition"]
    rollouts = [
        Rollout(
            sample_id=f"0/{i}/0",
            prompt=Prompt(prompt_id=i, domain=domains[i % len(domains)], token_ids=ids),
            source="dataset",
            response_ids=[2 + i, 5, 9, 1][: 2 + i % 3],
            rollout_logprobs=None,
            finish_reason="stop",
            policy_version=0,
        )
        for i, ids in enumerate(share(job["prompts"], DEAL["unequal"]))
    ]
    members = [
        teachers.ColocatedTeacher(
            TeacherSpec(
                name, job["models"][name], (name,), tensor_parallel_size=engine.tensor_parallel_size
            ),
            engine,
            load_head(job["models"][name]),
        )
        for name, engine in engines.items()
    ]
    pool = teachers.TeacherPool(
        members,
        {name: ((name, 1.0),) for name in engines},
        LossConfig(support_k=4),
        payload="hidden",
        cache_bytes=cache_bytes,
        shared_vocab=40,
        device=torch.device("cpu"),
        turns=one_after_another(members),
    )
    with distributed.agree_on_error("scoring"):
        rows = pool.score(rollouts)
    tensors = {}
    for i, (rollout, (score,)) in enumerate(zip(rollouts, rows, strict=True)):
        assert score.teacher == rollout.prompt.domain
        if score.hidden is not None:
            tensors[f"hidden/{score.teacher}/{i}"] = score.hidden
        else:
            tensors[f"sampled/{score.teacher}/{i}"] = score.sampled_logprobs
    return tensors


def engines_of_both_sizes(job: dict) -> None:
    from safetensors.torch import load_file, save_file

    prompts, seen, tensors = job["prompts"], {}, {}
    shared = generator(job, 2)
    engines = {"addition": scorer(job, "addition", 1), "reversal": scorer(job, "reversal", 2)}
    experts = scorer(job, "experts", 2)
    own = generator(job, 1)
    for name, deal in DEAL.items():
        mine = share(prompts, deal)
        seen[name] = {
            "shared": sampled(shared, mine),
            "own": sampled(own, mine),
            "shared_greedy": sampled(shared, mine, temperature=0.0),
            "own_greedy": sampled(own, mine, temperature=0.0),
        }
        for teacher, engine in {**engines, "experts": experts}.items():
            for i, state_LH in enumerate(engine.hidden_states(mine)):
                tensors[f"{name}/{teacher}/{i}"] = state_LH

    def fails_on_rank_1():
        if distributed.rank() == 1:
            raise RuntimeError("no prompts here")
        sampled(shared, prompts[:2])

    seen["failure"] = what_a_rank_sees(fails_on_rank_1)
    seen["different_work"] = what_a_rank_sees(
        lambda: distributed.gather_in_group(
            0, 2, "teacher A" if distributed.rank() == 0 else "teacher B"
        )
    )
    for engine in (shared, *engines.values()):
        engine.sleep()
        engine.wake()
    for engine in (shared, own):
        engine.load_weights(load_file(job["weights"]).items())
    mine = share(prompts, DEAL["unequal"])
    seen["reloaded"] = {"shared": sampled(shared, mine), "own": sampled(own, mine)}
    for name, cache_bytes in (("whole", 1 << 30), ("spilled", 0)):
        for key, value in scored(job, engines, cache_bytes).items():
            tensors[f"{name}/{key}"] = value
    out = Path(job["out"])
    (out / f"rank_{distributed.rank()}.json").write_text(json.dumps(seen))
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, out / f"rank_{distributed.rank()}.safetensors")


def lost_inside(job: dict) -> None:
    """Rank 1 fails while vLLM's ranks wait for each other; nobody can be asked there."""
    engine = generator(job, 2)
    if distributed.rank() == 1:
        model = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model

        def forward(*args, **kwargs):
            (Path(job["out"]) / "failed_at").write_text(str(time.time()))
            raise RuntimeError("out of memory in the second layer")

        model.model.layers[1].forward = forward
    with distributed.agree_on_error("rollout"):
        sampled(engine, job["prompts"][:2])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["both_sizes", "lost_inside"])
    parser.add_argument("job", type=Path)
    parser.add_argument("--local_rank", type=int, default=-1)
    args = parser.parse_args()
    distributed.init(args.local_rank)
    job = json.loads(args.job.read_text())
    with distributed.exit_together():
        {"both_sizes": engines_of_both_sizes, "lost_inside": lost_inside}[args.mode](job)


if __name__ == "__main__":
    main()

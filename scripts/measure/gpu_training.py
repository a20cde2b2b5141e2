"""The sections of gpu_check.py about training: DeepSpeed's states to the host and back, and a step
of the trainer.

Shape suffixes: B sequences, S tokens.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from opd import distributed
from opd.config import OptimConfig
from opd.engines.deepspeed_engine import ShardedEngine, what_leaves
from scripts.measure.gpu_engines import (
    DTYPES,
    gib,
    model_config,
    options,
    timed,
    used_bytes,
    write_models,
)
from scripts.measure.gpu_products import Size
from scripts.measure.runs import environment, flags, run_child, write_prompts
from scripts.measure.tools import ROOT, read_jsonl

STEPS = 4  # of the trainer; the first two pay for compilation


# ---- offload -------------------------------------------------------------------------------------


def measure_offload(size: Size, device: str) -> dict:
    """Optimizer states, gradients and masters of the student under ZeRO-3, to the host and back,
    three times.
    """
    torch_device = distributed.init()
    ds_config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    sharded = ShardedEngine(ds_config, OptimConfig(), dtype=DTYPES[device])
    model = AutoModelForCausalLM.from_config(
        model_config(size.student, size.vocab, device), dtype=DTYPES[device]
    )
    engine = sharded.attach(model, ())
    ids_BS = torch.randint(size.vocab - 2, (2, size.prompt_tokens), device=torch_device)

    def step() -> None:
        sharded.backward(engine(input_ids=ids_BS, labels=ids_BS).loss, last=True)
        sharded.step(1e-6)

    def leave() -> None:
        sharded.place(states=False, parameters=True)
        sharded.settle()

    def come_back() -> None:
        sharded.place(states=True, parameters=True)

    sharded.offloads, _ = what_leaves(
        ds_config, "states", dtype=DTYPES[device], use_cuda=device == "cuda"
    )
    step()  # AdamW makes its states
    rows = []
    for _ in range(3):
        before = used_bytes(device)
        offload_s = timed(leave, device)
        torch.cuda.empty_cache()
        freed = before - used_bytes(device)
        rows.append({"offload_s": round(offload_s, 4), "freed_gib": gib(freed)})
        rows[-1]["reload_s"] = round(timed(come_back, device), 4)
        step()
    last = rows[-1]
    return {
        "headline": f"{last['freed_gib']} GiB out in {last['offload_s']} s, in again in "
        f"{last['reload_s']} s",
        "rows": rows,
    }


# ---- step ----------------------------------------------------------------------------------------


def measure_step(size: Size, device: str) -> dict:
    """The last step of a short run of train_mopd.py under ZeRO-3: seconds of its phases and memory,
    by its own books.
    """
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        student, first, second = write_models(root, size, device, 2)
        data = root / "data.jsonl"
        write_prompts(data, STEPS * size.prompts, size.prompt_tokens, ("math", "code"))
        arguments = flags(
            student_model=student,
            data=data,
            output_dir=root / "run",
            num_steps=STEPS,
            prompts_per_step=size.prompts,
            max_prompt_tokens=size.prompt_tokens,
            max_response_tokens=size.response_tokens,
            rollout_kv_cache_gib=size.kv_cache_gib,
            teacher_kv_cache_gib=size.kv_cache_gib,
            parity_every=1,
            save_every=0,
            dtype=options(size, device)["dtype"],
            enforce_eager=device == "cpu",
        )
        command = [sys.executable, "train_mopd.py", *arguments]
        command += [f"--teacher=math={first}", f"--teacher=code={second}"]
        run_child(command, root / "log.txt", environment(torch.get_num_threads()))
        steps, ledger = (
            read_jsonl(root / "run" / f"{name}.jsonl") for name in ("metrics", "ledger")
        )
    last = steps[-1]
    kept = {
        key: value
        for key, value in last.items()
        if key.split("/")[0] in ("time", "perf", "mem", "mismatch")
    }
    phases = {
        key.removeprefix("time/"): value for key, value in kept.items() if key.startswith("time/")
    }
    shares = ", ".join(
        f"{name} {phases[name]:.2f}" for name in ("rollout", "score", "train", "sync")
    )
    return {
        "headline": f"{phases['step']:.2f} s: {shares}",
        "metrics": kept,
        "ledger": [line for line in ledger if line.get("step") == STEPS - 1],
    }

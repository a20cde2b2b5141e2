"""Make a small problem of three LoRA teachers on one base, beside that of `make_demo.py`.

The base has half learned three skills: `addition` and `reversal` of the demo, and `shift` (letters
each replaced by the next one, `abc+=` -> `bcd`). Each adapter, trained by peft, finishes one of
them. The base is also the student: it should get from its three teachers what each of them knows.
Written to `--output_dir`: `base` (a Hugging Face checkpoint), `lora_addition`, `lora_reversal` and
`lora_shift` (adapters as peft saves them), `train.jsonl`, `eval.jsonl` (disjoint prompts) and
`demo.json`.

    python scripts/make_demo.py --lora --output_dir demo_lora

Some minutes on two cores, in float32. The exit status is 1 if a promise is not kept: an adapter
knows its skill, the base little of it.
"""

import math
import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from scripts import make_demo
from scripts.make_demo import EVAL_PROMPTS, LETTERS, POOL_SIZE, STUDENT_BATCH, TRAIN_PROMPTS

SHIFT = "shift"
LORA_SKILLS = (*make_demo.SKILLS, SHIFT)
BASE_SIZE = (160, 3)  # hidden size, layers
RANK = 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_RATE, LORA_BATCH = 5e-3, 192
LORA_STEPS = {"addition": 400, "reversal": 150, SHIFT: 100}
ADAPTER_MIN, BASE_MAX = 0.95, 0.60  # the promises


def make_skill(skill: str, rng: random.Random) -> list[dict]:
    """As `make_demo.make_rows`, which knows the other two."""
    if skill != SHIFT:
        return make_demo.make_rows(skill, rng)
    after = dict(zip(LETTERS, LETTERS[1:] + LETTERS[0], strict=True))
    answers: dict[str, str] = {}
    while len(answers) < EVAL_PROMPTS + POOL_SIZE:
        word = "".join(rng.choices(LETTERS, k=rng.randint(3, 6)))
        answers[word + "+="] = "".join(after[letter] for letter in word)
    return [
        {"data_source": SHIFT, "prompt": [{"role": "user", "content": p}], "answer": answer}
        for p, answer in answers.items()
    ]


def half_learned(row: dict, rng: random.Random) -> dict:
    """Most long words are copied instead: what is easy to learn is left half learned."""
    word = row["prompt"][0]["content"].rstrip("+=")
    if len(word) < make_demo.LONG_WORD or rng.random() >= make_demo.COPIED_SHARE:
        return row
    return {**row, "answer": word}


def train_base(tokenizer, pools: dict[str, list[dict]], rng: random.Random):
    """All skills mixed, until addition is known a little."""
    model = make_demo.random_qwen3(*BASE_SIZE, tokenizer)
    optimizer = make_demo.make_optimizer(model)
    words = {
        skill: make_demo.encode([half_learned(row, rng) for row in pools[skill]], tokenizer)
        for skill in ("reversal", SHIFT)
    }
    addition = make_demo.encode(pools["addition"], tokenizer)
    probe = pools["addition"][:EVAL_PROMPTS]
    for step in range(1, make_demo.STUDENT_MAX_STEPS + 1):
        batches = [make_demo.sample(*addition, STUDENT_BATCH["addition"])]
        batches += [make_demo.sample(*w, STUDENT_BATCH["reversal"]) for w in words.values()]
        ids_BS, labels_BS = (torch.cat(parts) for parts in zip(*batches, strict=True))
        rate = make_demo.LEARNING_RATE * make_demo.ramp(step)
        make_demo.train_step(model, optimizer, rate, ids_BS, labels_BS)
        if step % make_demo.STEPS_PER_PROBE == 0:
            known = make_demo.accuracy(model, tokenizer, probe)
            if known >= make_demo.STUDENT_TARGET:
                break
    return model


def accuracies_of(model, tokenizer, evals: dict[str, list[dict]]) -> dict[str, float]:
    return {skill: make_demo.accuracy(model, tokenizer, evals[skill]) for skill in LORA_SKILLS}


def make_adapter(skill: str, out: Path, pool: list[dict], evals: dict, seed: int) -> dict:
    """Trains and saves the adapter of one skill; its accuracy on each."""
    torch.manual_seed(seed)
    tokenizer = make_demo.make_tokenizer()
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.0)
    ids_MS, labels_MS = make_demo.encode(pool, tokenizer)
    steps = LORA_STEPS[skill]
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = make_demo.sample(ids_MS, labels_MS, LORA_BATCH)
        make_demo.train_step(model, optimizer, LORA_RATE * make_demo.ramp(step) * decay, *batch)
    found = accuracies_of(model, tokenizer, evals)
    model.save_pretrained(out / f"lora_{skill}")
    print(f"lora_{skill}: {found}", flush=True)
    return found


def make_lora_demo(out: Path, seed: int) -> dict:
    """Trains, saves and measures all; the content of `demo.json`."""
    make_demo.quiet_process()
    start, rng = time.monotonic(), random.Random(seed)
    rows = {skill: make_skill(skill, rng) for skill in LORA_SKILLS}
    evals = {skill: rows[skill][:EVAL_PROMPTS] for skill in LORA_SKILLS}
    pools = {skill: rows[skill][EVAL_PROMPTS:] for skill in LORA_SKILLS}
    out.mkdir(parents=True, exist_ok=True)
    make_demo.write_jsonl(out / "eval.jsonl", [row for own in evals.values() for row in own])
    train = [row for own in pools.values() for row in own[:TRAIN_PROMPTS]]
    make_demo.write_jsonl(out / "train.jsonl", train)
    torch.manual_seed(seed)
    tokenizer = make_demo.make_tokenizer()
    base = train_base(tokenizer, pools, random.Random(seed + 1))
    base.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    accuracies = {"base": accuracies_of(base, tokenizer, evals)}
    print(f"base: {accuracies['base']}", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        make_demo.NUM_PROCESSES, mp_context=context, initializer=make_demo.quiet_process
    ) as processes:
        jobs = {
            skill: processes.submit(make_adapter, skill, out, pools[skill], evals, seed)
            for skill in LORA_SKILLS
        }
        accuracies |= {f"lora_{skill}": job.result() for skill, job in jobs.items()}
    return {"seed": seed, "accuracy": accuracies, "seconds": round(time.monotonic() - start, 1)}


def broken_promises(accuracies: dict[str, dict[str, float]]) -> list[str]:
    """What the demo promises and does not hold; empty when all is well."""
    broken = []
    for skill in LORA_SKILLS:
        base, own = accuracies["base"][skill], accuracies[f"lora_{skill}"][skill]
        if base > BASE_MAX or own < ADAPTER_MIN:
            broken.append(
                f"{skill}: base {base:.3f} (at most {BASE_MAX}), adapter {own:.3f} (at least "
                f"{ADAPTER_MIN})"
            )
    return broken

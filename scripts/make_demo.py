"""Make a small multi-teacher distillation problem that trains from nothing in a few minutes on two CPU cores.

Two expert teachers of different sizes learn one skill each, a smaller student learns a little of both:

* ``addition``: two numbers below 100, the digits of the sum written backwards (``47+85=`` -> ``231``);
* ``reversal``: three to seven letters written backwards (``abcd=`` -> ``dcba``).

Answers are exact, so every claim can be checked: a teacher knows its own skill and nothing of the other one, the
student is poor at both, and on-policy distillation should lift it to both teachers. Written to ``--output_dir``:
``student``, ``teacher_addition`` and ``teacher_reversal`` (Hugging Face checkpoints that share one tokenizer),
``train.jsonl`` and ``eval.jsonl`` (disjoint prompts) and ``demo.json`` (arguments, accuracies, seconds).

    python scripts/make_demo.py --output_dir demo

Everything runs on the CPU in float32 with two threads, even where there is a GPU: models this small gain nothing from
one, and the same seed gives the same files. The exit status is 1 if a promise is not kept.

Shape suffixes: B examples in a batch, M examples of a skill, S padded length.
"""

import argparse
import json
import math
import random
import string
import sys
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy, pad
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

SKILLS = ("addition", "reversal")
LETTERS = string.ascii_lowercase[:23]  # as many as a vocabulary of 40 has room for
SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", "<user>", "<assistant>")
VOCABULARY = (*SPECIAL_TOKENS, *string.digits, *"+=", *LETTERS)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ['user', 'assistant'] -%}"
    "{{ raise_exception('the demo knows the roles user and assistant, not ' + message.role) }}"
    "{%- endif -%}"
    "{{ '<' + message.role + '>' + message.content }}{{ '<eos>' if message.role == 'assistant' else '' }}"
    "{%- endfor -%}"
    "{{ '<assistant>' if add_generation_prompt else '' }}"
)

HEAD_DIM = 32  # the smallest that vLLM's attention takes on the CPU
SIZES = {"student": (128, 2), "teacher_addition": (160, 3), "teacher_reversal": (128, 3)}  # hidden size, layers
NUM_THREADS = 2
TEACHER_BATCH, STUDENT_BATCH = 256, 128
TEACHER_LEARNING_RATE, STUDENT_LEARNING_RATE = 2e-3, 2e-3
TEACHER_STEPS = {"addition": 400, "reversal": 250}
STUDENT_MAX_LETTERS = 4  # the student's warm-up never shows it longer words
STUDENT_TARGET, STUDENT_MAX_STEPS, STEPS_PER_PROBE = 0.3, 1000, 10  # warm-up ends at this accuracy on addition

EVAL_PROMPTS = 256  # per skill
TRAIN_PROMPTS = 4096  # per skill
POOL_SIZE = 9744  # examples per skill that models learn from: every addition that is not an eval prompt
MAX_NEW_TOKENS = 9

TEACHER_MIN, OTHER_SKILL_MAX, STUDENT_MIN, STUDENT_MAX = 0.95, 0.02, 0.05, 0.60  # the promises


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character and no spaces between them on the way back."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=["<user>", "<assistant>"],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def make_rows(skill: str, rng: random.Random) -> list[dict]:
    """Distinct examples of ``skill`` in random order: ``EVAL_PROMPTS`` and then ``POOL_SIZE`` to learn from."""
    if skill == "addition":
        answers = {f"{a}+{b}=": str(a + b)[::-1] for a in range(100) for b in range(100)}
    else:
        answers = {}
        while len(answers) < EVAL_PROMPTS + POOL_SIZE:
            word = "".join(rng.choices(LETTERS, k=rng.randint(3, 7)))
            answers[word + "="] = word[::-1]
    rows = [
        {"data_source": skill, "prompt": [{"role": "user", "content": prompt}], "answer": answer}
        for prompt, answer in answers.items()
    ]
    rng.shuffle(rows)
    return rows


def encode(rows: list[dict], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [M, S], int64, right-padded; labels are -100 on the prompt and on padding."""
    ids = [
        tokenizer.apply_chat_template([*row["prompt"], {"role": "assistant", "content": row["answer"]}], return_dict=False)
        for row in rows
    ]
    prompts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False) for row in rows]
    ids_MS = torch.full((len(rows), max(map(len, ids))), tokenizer.pad_token_id)
    labels_MS = torch.full_like(ids_MS, -100)
    for m, (example, prompt) in enumerate(zip(ids, prompts, strict=True)):
        assert example[: len(prompt)] == prompt and example[-1] == tokenizer.eos_token_id, (example, prompt)
        ids_MS[m, : len(example)] = torch.tensor(example)
        labels_MS[m, len(prompt) : len(example)] = torch.tensor(example[len(prompt) :])
    return ids_MS, labels_MS


def make_model(name: str, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    hidden_size, num_layers = SIZES[name]
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        num_key_value_heads=hidden_size // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        dtype="float32",
        bos_token_id=None,
        **special,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    return model


@torch.no_grad()
def accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> float:
    """Share of ``rows`` whose greedy response is the answer followed by the end-of-sequence token."""
    chats = [row["prompt"] for row in rows]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    tokens_BS = model.generate(**prompts, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    responses = tokenizer.batch_decode(tokens_BS[:, prompts["input_ids"].shape[1] :])
    ended = [response.partition("<eos>")[:2] for response in responses]
    return sum(response == (row["answer"], "<eos>") for response, row in zip(ended, rows, strict=True)) / len(rows)


def warm_up(step: int) -> float:
    """Factor on the learning rate: linear over the first 30 steps."""
    return min(1.0, (step + 1) / 30)


def train_step(model, optimizer, learning_rate: float, ids_BS: torch.Tensor, labels_BS: torch.Tensor) -> float:
    """One AdamW step on the mean cross entropy of the response tokens."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    logits_BSV = model(input_ids=ids_BS[:, :-1], use_cache=False).logits  # right padding needs no mask: it is causal
    loss = cross_entropy(logits_BSV.flatten(0, 1), labels_BS[:, 1:].flatten(), ignore_index=-100)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train_teacher(skill: str, tokenizer, rows: list[dict], seed: int) -> Qwen3ForCausalLM:
    """Fixed number of steps on one skill; the learning rate rises linearly and falls as a cosine."""
    torch.manual_seed(seed)
    model = make_model(f"teacher_{skill}", tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    ids_MS, labels_MS = encode(rows, tokenizer)
    num_steps = TEACHER_STEPS[skill]
    for step in range(num_steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / num_steps))
        chosen_B = torch.randint(len(ids_MS), (TEACHER_BATCH,))
        train_step(model, optimizer, TEACHER_LEARNING_RATE * warm_up(step) * decay, ids_MS[chosen_B], labels_MS[chosen_B])
    return model


def train_student(tokenizer, pools: dict[str, list[dict]], seed: int) -> Qwen3ForCausalLM:
    """Both skills mixed, reversal on short words only, until the student adds well enough to start from."""
    torch.manual_seed(seed)
    model = make_model("student", tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    short = [row for row in pools["reversal"] if len(row["answer"]) <= STUDENT_MAX_LETTERS]
    skills = {"addition": encode(pools["addition"], tokenizer), "reversal": encode(short, tokenizer)}
    sizes = {"addition": STUDENT_BATCH * 3 // 4, "reversal": STUDENT_BATCH // 4}  # addition is the slower one
    for step in range(STUDENT_MAX_STEPS):
        batch = []
        for skill, (ids_MS, labels_MS) in skills.items():
            chosen_B = torch.randint(len(ids_MS), (sizes[skill],))
            batch.append((ids_MS[chosen_B], labels_MS[chosen_B]))
        width = max(ids_BS.shape[1] for ids_BS, _ in batch)
        ids_BS = torch.cat([pad(ids, (0, width - ids.shape[1]), value=tokenizer.pad_token_id) for ids, _ in batch])
        labels_BS = torch.cat([pad(labels, (0, width - labels.shape[1]), value=-100) for _, labels in batch])
        train_step(model, optimizer, STUDENT_LEARNING_RATE * warm_up(step), ids_BS, labels_BS)
        probe = pools["addition"][:EVAL_PROMPTS]
        if (step + 1) % STEPS_PER_PROBE == 0 and accuracy(model, tokenizer, probe) >= STUDENT_TARGET:
            break
    return model


def broken_promises(accuracies: dict[str, dict[str, float]]) -> list[str]:
    """What the demo says about itself and does not hold; empty when all is well."""
    broken = []
    for skill in SKILLS:
        for name, by_skill in accuracies.items():
            if name == "student":
                low, high = STUDENT_MIN, STUDENT_MAX
            else:
                low, high = (TEACHER_MIN, 1.0) if name == f"teacher_{skill}" else (0.0, OTHER_SKILL_MAX)
            if not low <= by_skill[skill] <= high:
                broken.append(f"{name}: accuracy {by_skill[skill]:.3f} on {skill} is not in [{low}, {high}]")
    return broken


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def print_table(accuracies: dict[str, dict[str, float]], seconds: float) -> None:
    print(f"{'accuracy':<18}" + "".join(f"{skill:>10}" for skill in SKILLS))
    for name, by_skill in accuracies.items():
        print(f"{name:<18}" + "".join(f"{by_skill[skill]:>10.3f}" for skill in SKILLS))
    print(f"{seconds:.0f} seconds")


def make_demo(out: Path, seed: int) -> dict:
    """Train, save and measure everything; returns the figures of ``demo.json``."""
    start = time.monotonic()
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    rows = {skill: make_rows(skill, rng) for skill in SKILLS}
    evals = {skill: rows[skill][:EVAL_PROMPTS] for skill in SKILLS}
    pools = {skill: rows[skill][EVAL_PROMPTS:] for skill in SKILLS}
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "eval.jsonl", [row for skill in SKILLS for row in evals[skill]])
    write_jsonl(out / "train.jsonl", [row for skill in SKILLS for row in pools[skill][:TRAIN_PROMPTS]])
    accuracies = {}
    for name in SIZES:
        if name == "student":
            model = train_student(tokenizer, pools, seed)
        else:
            skill = name.removeprefix("teacher_")
            model = train_teacher(skill, tokenizer, pools[skill], seed)
        accuracies[name] = {skill: accuracy(model, tokenizer, evals[skill]) for skill in SKILLS}
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        print(f"{name}: {accuracies[name]} after {time.monotonic() - start:.0f} seconds", flush=True)
    return {"seed": seed, "accuracy": accuracies, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("demo"), help="where the demo is written")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data, the weights and the batches")
    args = parser.parse_args()
    record = args.output_dir / "demo.json"
    if record.exists():
        demo = json.loads(record.read_text())
        if demo["seed"] == args.seed:
            print(f"{args.output_dir} is complete already (seed {args.seed}); remove it to make it again")
            print_table(demo["accuracy"], demo["seconds"])
            return 0
        record.unlink()  # until the new demo is complete, the directory must not look so
    torch.set_num_threads(NUM_THREADS)
    transformers_logging.disable_progress_bar()
    demo = make_demo(args.output_dir, args.seed)
    print_table(demo["accuracy"], demo["seconds"])
    broken = broken_promises(demo["accuracy"])
    for line in broken:
        print(f"error: {line}", file=sys.stderr)
    if broken:
        return 1
    record.write_text(json.dumps(demo, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

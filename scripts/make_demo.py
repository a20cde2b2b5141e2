"""Make a small multi-teacher distillation problem that trains from nothing in a few minutes on two
CPU cores.

Two expert teachers of different sizes learn one skill each, a smaller student learns a little of
both:

* ``addition``: two numbers below 100, the digits of the sum written backwards (``47+85=`` ->
  ``231``);
* ``reversal``: three to seven letters written backwards (``abcd=`` -> ``dcba``).

Answers are exact, so every claim can be checked: a teacher knows its own skill and nothing of the
other one, the student is poor at both, and on-policy distillation should lift it to both teachers.
Written to ``--output_dir``: ``student``, ``teacher_addition`` and ``teacher_reversal`` (Hugging
Face checkpoints that share one tokenizer), ``train.jsonl`` and ``eval.jsonl`` (disjoint prompts)
and ``demo.json`` (arguments, accuracies, seconds).

    python scripts/make_demo.py --output_dir demo

``--vision`` makes another one, of models that see (``scripts/demos/vision_models.py``), ``--lora``
one of adapters on one base (``scripts/demos/lora_models.py``).

Everything runs on the CPU in float32, two models at a time with one thread each, even where there
is a GPU: models this small gain nothing from one, and the same seed gives the same files. The exit
status is 1 if a promise is not kept.

Shape suffixes: B examples in a batch, M examples of a skill, S padded length.
"""

import argparse
import json
import math
import multiprocessing
import random
import string
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

SKILLS = ("addition", "reversal")
LETTERS = string.ascii_lowercase[:23]  # as many as a vocabulary of 40 has room for
SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", "<user>", "<assistant>")
VOCABULARY = (*SPECIAL_TOKENS, *string.digits, *"+=", *LETTERS)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{%- if message.role not in ['user', 'assistant'] -%}{{ "
    "raise_exception('the demo knows the roles user and assistant, not ' + message.role) }}{%- "
    "endif -%}{{ '<' + message.role + '>' + message.content }}{{ '<eos>' if message.role == "
    "'assistant' else '' }}{%- endfor -%}{{ '<assistant>' if add_generation_prompt else '' }}"
)

HEAD_DIM = 32  # the smallest that vLLM's attention takes on the CPU
# hidden size, layers
SIZES = {"teacher_addition": (160, 3), "student": (128, 2), "teacher_reversal": (128, 3)}
# each with one thread: models this small lose more to thread barriers than they gain
NUM_PROCESSES = 2
LEARNING_RATE = 2e-3
TEACHER_BATCH, TEACHER_STEPS = 256, {"addition": 450, "reversal": 200}
STUDENT_BATCH = {"addition": 96, "reversal": 32}  # addition is the one that takes long to learn
# warm-up ends at this accuracy on addition
STUDENT_TARGET, STUDENT_MAX_STEPS, STEPS_PER_PROBE = 0.25, 1000, 5
# this share of the words this long is copied, not reversed, in the student's warm-up
LONG_WORD, COPIED_SHARE = 5, 0.7

EVAL_PROMPTS = 256  # per skill
TRAIN_PROMPTS = 4096  # per skill
# examples per skill that models learn from: every addition that is not an eval prompt
POOL_SIZE = 9744
MAX_TOKENS, MAX_NEW_TOKENS = 18, 9  # prompt and response; response

TEACHER_MIN, OTHER_SKILL_MAX, STUDENT_MIN, STUDENT_MAX = 0.95, 0.02, 0.05, 0.60  # the promises


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character and no spaces between them on the way back."""
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
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
    """Distinct examples of ``skill`` in random order: ``EVAL_PROMPTS`` and then ``POOL_SIZE`` to
    learn from.
    """
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


def encode(
    rows: list[dict], tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [M, S], int64, right-padded; labels are -100 on the prompt and on
    padding.
    """
    prompts = [row["prompt"] for row in rows]
    chats = [[*row["prompt"], {"role": "assistant", "content": row["answer"]}] for row in rows]
    prompt_ids = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, return_dict=False
    )
    chat_ids = tokenizer.apply_chat_template(chats, return_dict=False)
    ids_MS = torch.full((len(rows), MAX_TOKENS), tokenizer.pad_token_id)
    labels_MS = torch.full_like(ids_MS, -100)
    for m, (prompt, chat) in enumerate(zip(prompt_ids, chat_ids, strict=True)):
        assert chat[: len(prompt)] == prompt and chat[-1] == tokenizer.eos_token_id, (prompt, chat)
        ids_MS[m, : len(chat)] = torch.tensor(chat)
        labels_MS[m, len(prompt) : len(chat)] = torch.tensor(chat[len(prompt) :])
    return ids_MS, labels_MS


def random_qwen3(
    hidden_size: int, num_layers: int, tokenizer, *, mlp_ratio: int = 3, positions: int = 256
) -> Qwen3ForCausalLM:
    """A model in float32 with torch's random weights, and the tokenizer's EOS and padding."""
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=mlp_ratio * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        num_key_value_heads=hidden_size // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        dtype="float32",
        bos_token_id=None,
        **special,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    return model


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict]
) -> float:
    """Share of ``rows`` whose greedy response is the answer followed by the
    end-of-sequence token.
    """
    prompts = tokenizer.apply_chat_template(
        [row["prompt"] for row in rows],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens_BS = model.generate(**prompts, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    responses = tokenizer.batch_decode(tokens_BS[:, prompts["input_ids"].shape[1] :])
    correct = [
        text.startswith(row["answer"] + "<eos>") for text, row in zip(responses, rows, strict=True)
    ]
    return sum(correct) / len(rows)


def make_optimizer(model: Qwen3ForCausalLM) -> torch.optim.Optimizer:
    """The same for every model."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)


def sample(
    ids_MS: torch.Tensor, labels_MS: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of `size` random examples: ids and labels [B, S]."""
    chosen_B = torch.randint(len(ids_MS), (size,))
    return ids_MS[chosen_B], labels_MS[chosen_B]


def train_step(
    model, optimizer, learning_rate: float, ids_BS: torch.Tensor, labels_BS: torch.Tensor
) -> None:
    """One AdamW step on the mean cross entropy of the response tokens."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    # beyond it there is only padding
    length = int((labels_BS != -100).any(dim=0).nonzero().max()) + 1
    # causal: right padding needs no mask
    logits_BSV = model(input_ids=ids_BS[:, : length - 1], use_cache=False).logits
    loss = cross_entropy(
        logits_BSV.flatten(0, 1), labels_BS[:, 1:length].flatten(), ignore_index=-100
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def ramp(step: int) -> float:
    """Factor on the learning rate: rises linearly over the first 30 steps."""
    return min(1.0, (step + 1) / 30)


def train_teacher(skill: str, tokenizer, rows: list[dict]) -> Qwen3ForCausalLM:
    """A fixed number of steps on one skill; the learning rate falls as a cosine."""
    model = random_qwen3(*SIZES[f"teacher_{skill}"], tokenizer)
    optimizer = make_optimizer(model)
    ids_MS, labels_MS = encode(rows, tokenizer)
    num_steps = TEACHER_STEPS[skill]
    for step in range(num_steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / num_steps))
        train_step(
            model,
            optimizer,
            LEARNING_RATE * ramp(step) * decay,
            *sample(ids_MS, labels_MS, TEACHER_BATCH),
        )
    return model


def train_student(tokenizer, pools: dict[str, list[dict]], rng: random.Random) -> Qwen3ForCausalLM:
    """Both skills mixed, and both left half-learned in a way that leaves something to reinforce.

    Addition stops early. Reversal is too easy for that: it goes from nothing to everything within a
    few steps. So most long words are copied instead of reversed, which fixes the greedy accuracy
    near the share of short words, while the right answer keeps a probability that on-policy
    sampling can find.
    """
    model = random_qwen3(*SIZES["student"], tokenizer)
    optimizer = make_optimizer(model)
    copied = [
        {**row, "answer": row["answer"][::-1]}
        if len(row["answer"]) >= LONG_WORD and rng.random() < COPIED_SHARE
        else row
        for row in pools["reversal"]
    ]
    addition = encode(pools["addition"], tokenizer)
    reversal = encode(copied, tokenizer)
    for step in range(1, STUDENT_MAX_STEPS + 1):
        batches = [
            sample(*addition, STUDENT_BATCH["addition"]),
            sample(*reversal, STUDENT_BATCH["reversal"]),
        ]
        ids_BS, labels_BS = (torch.cat(parts) for parts in zip(*batches, strict=True))
        train_step(model, optimizer, LEARNING_RATE * ramp(step), ids_BS, labels_BS)
        # not the evaluation prompts: those are for measuring only
        probe = pools["addition"][:EVAL_PROMPTS]
        if step % STEPS_PER_PROBE == 0 and accuracy(model, tokenizer, probe) >= STUDENT_TARGET:
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
                low, high = (
                    (TEACHER_MIN, 1.0) if name == f"teacher_{skill}" else (0.0, OTHER_SKILL_MAX)
                )
            if not low <= by_skill[skill] <= high:
                broken.append(
                    f"{name}: accuracy {by_skill[skill]:.3f} on {skill} is not in [{low}, {high}]"
                )
    return broken


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """A JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def print_table(accuracies: dict[str, dict[str, float]], seconds: float) -> None:
    """Accuracies, a line for each model."""
    skills = list(dict.fromkeys(skill for own in accuracies.values() for skill in own))
    print(f"{'accuracy':<18}" + "".join(f"{skill:>10}" for skill in skills))
    for name, by_skill in accuracies.items():
        cells = (f"{by_skill[s]:>10.3f}" if s in by_skill else f"{'-':>10}" for s in skills)
        print(f"{name:<18}" + "".join(cells))
    print(f"{seconds:.0f} seconds")


def quiet_process() -> None:
    """What each training process begins with."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()


def make_and_measure(name: str, out: Path, pools: dict, evals: dict, seed: int) -> dict[str, float]:
    """Train and save one model; its accuracy on each skill."""
    start = time.monotonic()
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    if name == "student":
        model = train_student(tokenizer, pools, random.Random(seed + 1))
    else:
        own_skill = name.removeprefix("teacher_")
        model = train_teacher(own_skill, tokenizer, pools[own_skill])
    accuracies = {skill: accuracy(model, tokenizer, evals[skill]) for skill in SKILLS}
    model.save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    print(f"{name}: {accuracies} after {time.monotonic() - start:.0f} seconds", flush=True)
    return accuracies


def make_demo(out: Path, seed: int) -> dict:
    """Train, save and measure everything; returns the figures of ``demo.json``."""
    start = time.monotonic()
    rng = random.Random(seed)
    rows = {skill: make_rows(skill, rng) for skill in SKILLS}
    evals = {skill: rows[skill][:EVAL_PROMPTS] for skill in SKILLS}
    pools = {skill: rows[skill][EVAL_PROMPTS:] for skill in SKILLS}
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "eval.jsonl", [row for skill in SKILLS for row in evals[skill]])
    write_jsonl(
        out / "train.jsonl", [row for skill in SKILLS for row in pools[skill][:TRAIN_PROMPTS]]
    )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        NUM_PROCESSES, mp_context=context, initializer=quiet_process
    ) as processes:
        jobs = {
            name: processes.submit(make_and_measure, name, out, pools, evals, seed)
            for name in SIZES
        }
        accuracies = {name: job.result() for name, job in jobs.items()}
    return {"seed": seed, "accuracy": accuracies, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output_dir", type=Path, default=Path("demo"), help="where the demo is written"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the data, the weights and the batches"
    )
    others = parser.add_mutually_exclusive_group()
    others.add_argument(
        "--vision", action="store_true", help="with images: reading numbers, and addition"
    )
    others.add_argument(
        "--lora", action="store_true", help="three teachers that are adapters on one base"
    )
    args = parser.parse_args()
    make, broken_of = make_demo, broken_promises
    if args.vision or args.lora:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from scripts.demos import lora_models, vision_models

        make, broken_of = vision_models.make_vision_demo, vision_models.broken_promises
        if args.lora:
            make, broken_of = lora_models.make_lora_demo, lora_models.broken_promises
    record = args.output_dir / "demo.json"
    if record.exists():
        demo = json.loads(record.read_text())
        if demo["seed"] == args.seed:
            print(
                f"{args.output_dir} is complete already (seed {args.seed}); remove it to make it "
                "again"
            )
            print_table(demo["accuracy"], demo["seconds"])
            return 0
        record.unlink()  # until the new demo is complete, the directory must not look so
    demo = make(args.output_dir, args.seed)
    print_table(demo["accuracy"], demo["seconds"])
    broken = broken_of(demo["accuracy"])
    for line in broken:
        print(f"error: {line}", file=sys.stderr)
    if broken:
        return 1
    record.write_text(json.dumps(demo, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

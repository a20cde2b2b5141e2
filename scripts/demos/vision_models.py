"""A small distillation problem with images, made from nothing on two CPU cores.

A vision teacher reads a number of two digits from a picture of 32 x 32 pixels (``reading``), a
teacher for text alone adds two numbers (``addition``), and a smaller vision-language student does a
little of both. `scripts/make_demo.py --vision` calls it.

Shape suffixes: B examples in a batch, M examples of a skill, S padded length.
"""

import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import AddedToken
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from scripts import make_demo

SKILLS = ("reading", "addition")
IMAGE_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<' + message.role + '>' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}"
    "{{ '<image>' if part.type == 'image' else part.text }}{%- endfor -%}{%- endif -%}"
    "{{ '<eos>' if message.role == 'assistant' else '' }}{%- endfor -%}"
    "{{ '<assistant>' if add_generation_prompt else '' }}"
)
SIDE, PATCH, MERGED = 32, 8, 2  # pixels, pixels, patches that become one token each way
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES = {"teacher_reading": (160, 2), "teacher_addition": (160, 3), "student": (128, 2)}
EVAL_PROMPTS, TRAIN_PROMPTS = 128, 3072  # per skill
BATCH = {"reading": 96, "addition": 96}
TEACHER_BATCH, TEACHER_STEPS = 160, {"reading": 260, "addition": 450}
STUDENT_TARGET = {"reading": 0.3, "addition": 0.25}
STUDENT_MAX_STEPS, STEPS_PER_PROBE = 1500, 5
MAX_NEW_TOKENS = 5


def make_tokenizer() -> PreTrainedTokenizerFast:
    """That of the demo, with the tokens that stand for an image."""
    tokenizer = make_demo.make_tokenizer()
    added = [AddedToken(token, special=True, normalized=False) for token in IMAGE_TOKENS]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": added}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_processor() -> Idefics3Processor:
    """One picture is four tokens, between three that frame it."""
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    length = (SIDE // PATCH // MERGED) ** 2
    return Idefics3Processor(
        images, make_tokenizer(), image_seq_len=length, chat_template=CHAT_TEMPLATE
    )


def random_idefics3(
    hidden_size: int, num_layers: int, tokenizer: PreTrainedTokenizerFast
) -> Idefics3ForConditionalGeneration:
    """A model that sees, in float32 with random weights."""
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    heads = hidden_size // make_demo.HEAD_DIM
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=MERGED,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        vision_config={
            **VISION, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": make_demo.HEAD_DIM,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            **special,
        },
    )  # fmt: skip
    model = Idefics3ForConditionalGeneration(config).float()
    model.generation_config = GenerationConfig(**special)
    return model


def draw(number: str, rng: random.Random) -> Image.Image:
    """Two digits somewhere in the picture, in some colours, with noise."""
    dark = tuple(rng.randint(0, 90) for _ in range(3))
    bright = tuple(rng.randint(160, 255) for _ in range(3))
    image = Image.new("RGB", (SIDE, SIDE), dark)
    place = (rng.randint(4, 6), rng.randint(4, 6))
    ImageDraw.Draw(image).text(place, number, fill=bright, font=ImageFont.load_default(size=19))
    noise = Image.effect_noise((SIDE, SIDE), 40).convert("RGB")
    return Image.blend(image, noise, 0.1)


def make_rows(skill: str, rng: random.Random, out: Path) -> list[dict]:
    """Distinct examples in random order: `EVAL_PROMPTS`, and then those to learn from."""
    if skill == "addition":
        rows = make_demo.make_rows("addition", rng)
        return rows[: EVAL_PROMPTS + make_demo.POOL_SIZE]
    folder = out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(EVAL_PROMPTS + TRAIN_PROMPTS):
        number = f"{rng.randint(0, 99):02d}"
        draw(number, rng).save(folder / f"{i:05d}.png")
        prompt = [{"role": "user", "content": "<image>="}]
        rows.append(
            {
                "data_source": skill,
                "prompt": prompt,
                "images": [f"images/{i:05d}.png"],
                "answer": number,
            }
        )
    return rows


class Examples:
    """The examples of a skill as tensors: ids and labels [M, S], and pixels where there are any."""

    def __init__(self, rows: list[dict], processor: Idefics3Processor, folder: Path):
        self.rows, self.processor = rows, processor
        tokenizer = processor.tokenizer
        eos, images = tokenizer.eos_token, [row.get("images", []) for row in rows]
        self.prompts = ["<user>" + row["prompt"][0]["content"] + "<assistant>" for row in rows]
        texts = [p + row["answer"] + eos for p, row in zip(self.prompts, rows, strict=True)]
        self.pixels_M = None
        if any(images):
            opened = [[Image.open(folder / name) for name in own] for own in images]
            found = processor(text=texts, images=opened)
            self.pixels_M = torch.tensor(found["pixel_values"])
            ids = found["input_ids"]
            self.prompt_ids = processor(text=self.prompts, images=opened)["input_ids"]
        else:
            ids = tokenizer(texts)["input_ids"]
            self.prompt_ids = tokenizer(self.prompts)["input_ids"]
        longest = max(map(len, ids))
        self.ids_MS = torch.full((len(rows), longest), tokenizer.pad_token_id)
        self.labels_MS = torch.full_like(self.ids_MS, -100)
        for m, (own, prompt) in enumerate(zip(ids, self.prompt_ids, strict=True)):
            self.ids_MS[m, : len(own)] = torch.tensor(own)
            self.labels_MS[m, len(prompt) : len(own)] = torch.tensor(own[len(prompt) :])

    def loss(self, model, size: int) -> torch.Tensor:
        """Sum of the cross entropy of a random batch, over its answers' tokens."""
        chosen_B = torch.randint(len(self.ids_MS), (size,))
        seen = {} if self.pixels_M is None else {"pixel_values": self.pixels_M[chosen_B]}
        logits_BSV = model(
            input_ids=self.ids_MS[chosen_B, :-1], use_cache=False, **seen
        ).logits  # fmt: skip
        labels_BS = self.labels_MS[chosen_B, 1:]
        return cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=-100)

    @torch.no_grad()
    def accuracy(self, model, first: int = EVAL_PROMPTS) -> float:
        """Share of the first examples whose greedy response is the answer and its end."""
        tokenizer = self.processor.tokenizer
        longest = max(map(len, self.prompt_ids[:first]))
        pad = tokenizer.pad_token_id
        ids_MS = torch.tensor([[pad] * (longest - len(i)) + i for i in self.prompt_ids[:first]])
        seen = {} if self.pixels_M is None else {"pixel_values": self.pixels_M[:first]}
        written_MS = model.generate(
            ids_MS,
            attention_mask=(ids_MS != pad).long(),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            **seen,
        )
        texts = tokenizer.batch_decode(written_MS[:, longest:])
        right = [
            text.startswith(row["answer"] + tokenizer.eos_token)
            for text, row in zip(texts, self.rows, strict=False)
        ]
        return sum(right) / len(right)


def _step(optimizer, parameters, loss: torch.Tensor, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def train_teacher(skill: str, model, examples: Examples) -> None:
    """A fixed number of steps; the learning rate falls in a line."""
    optimizer = make_demo.make_optimizer(model)
    for step in range(TEACHER_STEPS[skill]):
        rate = make_demo.LEARNING_RATE * make_demo.ramp(step) * (1 - step / TEACHER_STEPS[skill])
        _step(optimizer, model.parameters(), examples.loss(model, TEACHER_BATCH), rate)


def train_student(model, examples: dict[str, Examples]) -> None:
    """Both skills, each until it is half learned."""
    optimizer, left = make_demo.make_optimizer(model), set(SKILLS)
    for step in range(1, STUDENT_MAX_STEPS + 1):
        loss = sum(examples[skill].loss(model, BATCH[skill]) for skill in sorted(left))
        _step(
            optimizer, model.parameters(), loss, make_demo.LEARNING_RATE * make_demo.ramp(step) / 2
        )
        if step % STEPS_PER_PROBE == 0:
            left = {s for s in SKILLS if examples[s].accuracy(model) < STUDENT_TARGET[s]}
        if not left:
            return


def make_and_measure(name: str, out: Path, rows: dict[str, list[dict]], seed: int) -> dict:
    """Trains and saves one model; its accuracy on the skills that it can be asked for."""
    start = time.monotonic()
    torch.manual_seed(seed)
    processor = make_processor()
    tokenizer, sees = processor.tokenizer, name != "teacher_addition"
    make = random_idefics3 if sees else make_demo.random_qwen3
    model = make(*SIZES[name], tokenizer)
    pools = {s: Examples(own[EVAL_PROMPTS:], processor, out) for s, own in rows.items()}
    if name == "student":
        train_student(model, pools)
    else:
        skill = name.removeprefix("teacher_")
        train_teacher(skill, model, pools[skill])
    accuracies = {
        skill: Examples(own[:EVAL_PROMPTS], processor, out).accuracy(model)
        for skill, own in rows.items()
        if sees or skill != "reading"
    }
    model.save_pretrained(out / name)
    (processor if sees else tokenizer).save_pretrained(out / name)
    print(f"{name}: {accuracies} after {time.monotonic() - start:.0f} seconds", flush=True)
    return accuracies


def broken_promises(accuracies: dict[str, dict[str, float]]) -> list[str]:
    """What the demo says about itself and does not hold; empty when all is well."""
    return [
        f"{name}: accuracy {by_skill[skill]:.3f} on {skill} is not in [{low}, {high}]"
        for skill in SKILLS
        for name, by_skill in accuracies.items()
        if name in ("student", f"teacher_{skill}")
        for low, high in [(0.1, 0.7) if name == "student" else (make_demo.TEACHER_MIN, 1.0)]
        if not low <= by_skill[skill] <= high
    ]


def make_vision_demo(out: Path, seed: int) -> dict:
    """Trains, saves and measures everything; returns the figures of ``demo.json``."""
    start, rng = time.monotonic(), random.Random(seed)
    rows = {skill: make_rows(skill, rng, out) for skill in SKILLS}
    make_demo.write_jsonl(
        out / "eval.jsonl", [r for own in rows.values() for r in own[:EVAL_PROMPTS]]
    )
    train = [
        row for own in rows.values() for row in own[EVAL_PROMPTS : EVAL_PROMPTS + TRAIN_PROMPTS]
    ]
    make_demo.write_jsonl(out / "train.jsonl", train)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        make_demo.NUM_PROCESSES, mp_context=context, initializer=make_demo.quiet_process
    ) as processes:
        jobs = {name: processes.submit(make_and_measure, name, out, rows, seed) for name in SIZES}
        accuracies = {name: job.result() for name, job in jobs.items()}
    return {"seed": seed, "accuracy": accuracies, "seconds": round(time.monotonic() - start, 1)}

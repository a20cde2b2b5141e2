"""Ten teachers that are LoRA adapters on one base: what one engine with all of them costs.

Three sides score the same sequences, a tenth of them for each teacher:

* `one_base`: the base alone scores all of them, in one call;
* `adapters`: one engine holds the base and ten adapters, and scores in ten calls;
* `engines`: ten engines, each with a whole model of its own (the adapter merged into it), in ten
  calls.

First every adapter must say what the merged model says. Then the sides take turns, and medians are
compared: `adapters_over_base_time` and `adapters_over_engines_time`. Memory is what a process of
its own grows by from before its engines are built until all of them have scored, resident bytes:
`adapters_over_base_memory`, `engines_over_base_memory`. The adapters themselves, in the computation
type, are `adapters_mb`.

    python scripts/bench_adapters.py                # both backends: six minutes on two cores
    python scripts/bench_adapters.py --backends hf --json   # the last line is one JSON object
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from opd import distributed
from opd.engines.hf_engine import HFEngine, return_free_memory
from opd.engines.vllm_engine import HiddenStateEngine
from scripts.make_demo import make_tokenizer
from scripts.measure import tools

HEAD_DIM = 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIDES = ("one_base", "adapters", "engines")
MAX_DIFFERENCE = 1e-3  # of final hidden states, whose scale is one


def make_models(root: Path, args: argparse.Namespace) -> None:
    """`base`, and for each teacher `adapter_N` and `merged_N`."""
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // HEAD_DIM,
        num_key_value_heads=args.hidden // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=args.length + 8,
        tie_word_embeddings=False,
        bos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for place in range(args.teachers):
        model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
        lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS)
        adapted = get_peft_model(model, lora)
        torch.manual_seed(place)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        adapted.save_pretrained(root / f"adapter_{place}")
        merged = PeftModel.from_pretrained(model, root / f"adapter_{place}").merge_and_unload()
        merged.save_pretrained(root / f"merged_{place}")
        tokenizer.save_pretrained(root / f"merged_{place}")


def engine_of(backend: str, path: Path, args: argparse.Namespace, adapters: dict[str, str]):
    """An engine as a trainer builds it."""
    options = {"dtype": "float32", "trust_remote_code": False, "adapters": adapters}
    if backend == "hf":
        return HFEngine(path.name, str(path), **options)
    return HiddenStateEngine(
        path.name,
        str(path),
        tokenizer=str(path),
        kv_cache_gib=args.kv_cache_gib,
        max_model_len=args.length + 8,
        **options,
    )


def engines_of_side(side: str, backend: str, root: Path, args: argparse.Namespace) -> list:
    """(engine, adapter) of each teacher; with `one_base` of all at once."""
    names = range(args.teachers)
    if side == "engines":
        return [(engine_of(backend, root / f"merged_{n}", args, {}), "") for n in names]
    if side == "one_base":
        return [(engine_of(backend, root / "base", args, {}), "")]
    adapters = {f"adapter_{n}": str(root / f"adapter_{n}") for n in names}
    engine = engine_of(backend, root / "base", args, adapters)
    return [(engine, name) for name in adapters]


def score(members: list, shares: list[list[list[int]]]) -> list[list[Tensor]]:
    """The states of each teacher's sequences; one teacher reads all."""
    if len(members) == 1:
        return [members[0][0].hidden_states([ids for share in shares for ids in share])]
    return [
        engine.hidden_states(share, adapter=adapter)
        for (engine, adapter), share in zip(members, shares, strict=True)
    ]


def shares_of(args: argparse.Namespace) -> list[list[list[int]]]:
    shape = (args.teachers, args.sequences, args.length)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(args.vocab, shape, generator=generator).tolist()


def grown_bytes(side: str, backend: str, root: Path, args: argparse.Namespace) -> int:
    """What this process grows by, in a child that does nothing else."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    torch.set_num_threads(args.threads)
    distributed.init()
    warm = engine_of(backend, root / "tiny/base", args, {})  # the first engine loads libraries too
    score([(warm, "")], shares_of(args))
    before = held_bytes()
    members = engines_of_side(side, backend, root, args)
    score(members, shares_of(args))
    return held_bytes() - before


def held_bytes() -> int:
    """Without what the allocator keeps of memory that was given back."""
    return_free_memory()
    return tools.resident_bytes()


def weigh(backend: str, root: Path, args: argparse.Namespace) -> dict:
    """Memory of each side, in a process of its own; before this one has joined any group."""
    memory = {}
    for side in SIDES:
        tools.say(f"{backend}: memory of {side}")
        memory[side] = tools.in_child(grown_bytes, side, backend, root, args)
    return {
        "adapters_over_base_memory": tools.ratio(memory["adapters"], memory["one_base"]),
        "engines_over_base_memory": tools.ratio(memory["engines"], memory["one_base"]),
        **{f"{side}_mb": round(value / tools.MIB, 1) for side, value in memory.items()},
    }


def measure(backend: str, root: Path, args: argparse.Namespace) -> dict:
    """Compares what the sides say, and times them."""
    tools.say(f"{backend}: time")
    shares = shares_of(args)
    sides = {side: engines_of_side(side, backend, root, args) for side in SIDES}
    pairs = zip(score(sides["adapters"], shares), score(sides["engines"], shares), strict=True)
    difference = max(
        float((a - b).abs().max()) for one, other in pairs for a, b in zip(one, other, strict=True)
    )
    if not difference <= MAX_DIFFERENCE:
        sys.exit(f"{backend}: adapters and merged models differ by {difference:.2g}")
    calls = {side: lambda side=side: score(sides[side], shares) for side in SIDES}
    ms, _ = tools.take_turns(calls, args.repeats)
    return {
        "adapters_over_base_time": tools.ratio(ms["adapters"], ms["one_base"]),
        "adapters_over_engines_time": tools.ratio(ms["adapters"], ms["engines"]),
        **{f"{side}_ms": round(value, 1) for side, value in ms.items()},
        "largest_difference": float(f"{difference:.3g}"),
    }


def main() -> int:
    parser = tools.make_parser(__doc__)
    parser.add_argument("--backends", nargs="+", choices=("hf", "vllm"), default=["hf", "vllm"])
    parser.add_argument("--teachers", type=int, default=10)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--sequences", type=int, default=4, help="of each teacher")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=5, help="rounds in which each side runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kv_cache_gib", type=float, default=0.05, help="of each vllm engine")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings go to standard output
    torch.set_num_threads(args.threads)
    result: dict = {}
    with tempfile.TemporaryDirectory(prefix="bench_adapters_") as directory:
        root = Path(directory)
        make_models(root, args)
        warm = argparse.Namespace(**{**vars(args), "hidden": HEAD_DIM, "layers": 1, "teachers": 0})
        make_models(root / "tiny", warm)
        found = {backend: weigh(backend, root, args) for backend in args.backends}
        distributed.init()
        for backend in args.backends:
            found[backend] |= measure(backend, root, args)
        for backend in args.backends:
            result |= {f"{backend}_{name}": value for name, value in found[backend].items()}
        weights = (root / "adapter_0" / "adapter_model.safetensors").stat().st_size
        result["adapters_mb"] = round(args.teachers * weights / tools.MIB, 1)
        base = (root / "base" / "model.safetensors").stat().st_size
        result["base_mb"] = round(base / tools.MIB, 1)
    if args.json:
        sizes = {name: value for name, value in vars(args).items() if name != "json"}
        tools.print_json({**result, **sizes, **tools.machine_facts("cpu")})
    else:
        print(tools.table([{"": name, "value": value} for name, value in result.items()]))
    return 0


if __name__ == "__main__":
    with distributed.exit_together():
        sys.exit(main())

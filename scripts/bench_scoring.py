"""Time to score a teacher's top-k at every token: vLLM's own prompt log-probabilities against
hidden states.

The same sequences of random tokens go through one random model (Qwen3, made in a temporary
directory) on two routes:

* `prompt_logprobs`: vLLM's `prompt_logprobs=k`, as most trainers score. The engine keeps logits of
  the vocabulary's size
  and builds a Python object per token and candidate. Only the engine's call is timed: that a
  trainer must still turn those objects into tensors is not held against it.
* `prefill` + `score`: the engine returns final hidden states, `opd.ops.fused_linear.score_hidden`
  makes log-probabilities,
  top-k, log-sum-exp and entropy of them. Tensors from end to end.
* The floor: the same `prefill` + `matmul`, the bare product of hidden states and output projection
  with nothing done to
  the logits. No exact route can be faster.

First both routes must name the same k log-probabilities at every token. Then the four parts take
turns, and medians are summed: `speedup_vs_prompt_logprobs` is the first over the second (above 1 is
better), `ratio_to_floor` the second over the third (1 is perfect).

With `--served` the same model is also put behind one server of each protocol, and scored through
the trainer's own pool: `served_json` (a vLLM server, `prompt_logprobs=k`), `served_binary` (our
scoring server, top-k) and `served_hidden` (the same, hidden states). Milliseconds, tokens/s and
bytes/token, client's decoding and checks included. The servers compute what the routes above
compute, so the difference to them is what serving costs.

    python scripts/bench_scoring.py   # V = 151,936, 8 x 512 tokens: two minutes on two cores
    python scripts/bench_scoring.py --served   # and behind servers
    python scripts/bench_scoring.py --json     # the last line is one JSON object

Shape suffixes: N tokens, H hidden size, V vocabulary, K support size.
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd import distributed
from opd.clients.health import Limits
from opd.clients.pool import ReplicaPool
from opd.clients.served_model import ServedModel, inspect_replicas, open_pool, score_call
from opd.clients.transport import Call
from opd.clients.wire import Question
from opd.engines import vllm_engine, vllm_process
from opd.ops.fused_linear import HiddenScores, score_hidden
from opd.servers.server_processes import serving
from scripts.make_demo import make_tokenizer
from scripts.measure import tools

HEAD_DIM = 64
LOGIT_STD = 3.0
MATMUL_TOKENS = 256  # rows of the bare product at a time
SERVED = {  # path -> protocol, payload
    "served_json": ("json", "topk"),
    "served_binary": ("binary", "topk"),
    "served_hidden": ("binary", "hidden"),
}
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.25}  # bfloat16 logits of 15 are 0.06 apart


def make_model(path: Path, args: argparse.Namespace, dtype: str) -> Tensor:
    """A random model with its tokenizer at `path`; its output projection [V, H], which is the
    embedding too.
    """
    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // HEAD_DIM),
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        max_position_embeddings=args.length + 8,
        tie_word_embeddings=True,
        bos_token_id=None,
        dtype=dtype,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(getattr(torch, dtype))
    weight_VH = model.get_input_embeddings().weight.detach()
    weight_VH.normal_(std=LOGIT_STD / math.sqrt(args.hidden))  # final hidden states have unit scale
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return weight_VH


class PromptLogprobs(vllm_engine._Engine):
    """The usual route: an engine that generates, asked for one token and for what it thought of the
    prompt.
    """

    def __init__(self, model: Path, args: argparse.Namespace, dtype: str):
        super().__init__(
            "prompt_logprobs",
            str(model),
            sleep_level=0,  # it is awake all the time
            frozen=True,
            enforce_eager=True,
            kv_cache_gib=args.kv_cache_gib,
            kv_cache_grows=False,
            dtype=dtype,
            max_model_len=args.length + 8,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_logprobs=args.support_k,
        )
        self.support_k = args.support_k

    def score(self, sequences: list[list[int]]) -> list:
        """One request output per sequence, in vLLM's own form."""
        params = vllm_process.import_vllm().SamplingParams(
            max_tokens=1, prompt_logprobs=self.support_k, ignore_eos=True, detokenize=False
        )
        with self._active():
            return self.llm.generate(
                [{"prompt_token_ids": ids} for ids in sequences], params, use_tqdm=False
            )


def topk_of(outputs: list, support_k: int) -> Tensor:
    """The k largest log-probabilities [N, K], descending; the first position of a
    prompt has none.
    """
    rows = [
        sorted((entry.logprob for entry in position.values()), reverse=True)[:support_k]
        for output in outputs
        for position in output.prompt_logprobs[1:]
    ]
    return torch.tensor(rows)


def hidden_of(
    engine: vllm_engine.HiddenStateEngine, sequences: list[list[int]], device: str
) -> Tensor:
    """Hidden states [N, H] that predict the second to last token of each sequence."""
    return torch.cat([states[:-1] for states in engine.hidden_states(sequences)]).to(device)


def check_agreement(outputs: list, scores: HiddenScores, support_k: int, dtype: str) -> float:
    """Largest difference of the top-k log-probabilities; ends the program if the routes score
    different things.
    """
    difference = float((topk_of(outputs, support_k) - scores.topk_logprobs_NK.cpu()).abs().max())
    if not difference <= MAX_DIFFERENCE[dtype]:
        sys.exit(
            f"the top-{support_k} log-probabilities differ by {difference:.2g}: nothing was timed"
        )
    return difference


def measure(args: argparse.Namespace, model: Path, device: str, dtype: str) -> dict:
    """Build the engines, compare what they say, time them."""
    weight_VH = make_model(model, args, dtype).to(device)
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(
        args.vocab, (args.sequences, args.length), generator=generator
    ).tolist()
    labels_N = torch.tensor([token for ids in sequences for token in ids[1:]], device=device)

    usual = PromptLogprobs(model, args, dtype)
    ours = vllm_engine.HiddenStateEngine(
        "hidden_states",
        str(model),
        tokenizer=str(model),
        dtype=dtype,
        max_model_len=args.length + 8,
        kv_cache_gib=args.kv_cache_gib,
        trust_remote_code=False,
    )
    hidden_NH = hidden_of(ours, sequences, device)

    def score() -> HiddenScores:
        return score_hidden(hidden_NH, weight_VH, labels_N, support_k=args.support_k)

    difference = check_agreement(usual.score(sequences), score(), args.support_k, dtype)
    buffer_NV = torch.empty(MATMUL_TOKENS, args.vocab, dtype=hidden_NH.dtype, device=device)
    parts = {
        "prompt_logprobs": lambda: usual.score(sequences),
        "prefill": lambda: hidden_of(ours, sequences, device),
        "score": score,
        "matmul": lambda: tools.bare_projection(hidden_NH, weight_VH, buffer_NV),
    }
    ms, _ = tools.take_turns(parts, args.repeats, device)
    our_ms, floor_ms = ms["prefill"] + ms["score"], ms["prefill"] + ms["matmul"]
    return {
        "speedup_vs_prompt_logprobs": tools.ratio(ms["prompt_logprobs"], our_ms),
        "ratio_to_floor": tools.ratio(our_ms, floor_ms),
        "score_vs_matmul": tools.ratio(ms["score"], ms["matmul"]),
        **{f"{name}_ms": round(value, 4) for name, value in ms.items()},
        "ours_ms": round(our_ms, 4),
        "floor_ms": round(floor_ms, 4),
        "largest_difference": float(f"{difference:.3g}"),
    }


def served_call(
    served: ServedModel, args: argparse.Namespace, ids: list[int], payload: str
) -> Call:
    """The trainer's own request for all but the first token of `ids`."""
    question = Question(
        prompt_ids=ids[:1],
        response_ids=ids[1:],
        payload=payload,
        support_k=args.support_k if "topk" in payload else 0,
        vocab=args.vocab,
        hidden_size=args.hidden,
    )
    return score_call(served, served.protocol, question)


def measure_served(args: argparse.Namespace, model: Path, dtype: str) -> dict:
    """The served paths, which take turns; nothing of the routes above is at work meanwhile."""
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(
        args.vocab, (args.sequences, args.length), generator=generator
    ).tolist()
    common = {"dtype": dtype, "kv_cache_gib": args.kv_cache_gib, "max_logprobs": args.support_k}
    with ExitStack() as stack:
        pools: dict[str, ReplicaPool] = {}
        models: dict[str, ServedModel] = {}
        for protocol, extra in (("json", ["--enforce-eager"]), ("binary", [])):
            (server,) = stack.enter_context(
                serving(str(model), name="bench", protocol=protocol, extra=extra, **common)
            )
            models[protocol] = inspect_replicas("bench", [server.url], "", None)
            limits = Limits(timeout_s=600.0, probe_every_s=600.0)  # a probe would compete
            pools[protocol] = stack.enter_context(
                open_pool("bench", [server.url], models[protocol], limits, None)
            )
        calls = {
            name: [served_call(models[protocol], args, ids, payload) for ids in sequences]
            for name, (protocol, payload) in SERVED.items()
        }

        def score(name: str) -> list:
            pool = pools[SERVED[name][0]]
            return pool.collect([pool.submit(call) for call in calls[name]])

        received = {
            name: bytes_received(pools[protocol], lambda name=name: score(name))
            for name, (protocol, _) in SERVED.items()
        }
        ms, _ = tools.take_turns(
            {name: lambda name=name: score(name) for name in SERVED}, args.repeats
        )
    tokens = args.sequences * args.length
    result = {}
    for name in SERVED:
        result[f"{name}_ms"] = round(ms[name], 4)
        result[f"{name}_tokens_per_second"] = round(1000 * tokens / ms[name], 1)
        result[f"{name}_bytes_per_token"] = round(received[name] / tokens, 1)
    return result | {
        "served_json_over_binary_time": tools.ratio(ms["served_json"], ms["served_binary"]),
        "served_json_over_binary_bytes": tools.ratio(
            received["served_json"], received["served_binary"]
        ),
    }


def bytes_received(pool: ReplicaPool, run: Callable[[], object]) -> int:
    """Bytes of the answers while `run` runs."""
    pool.take_stats()
    run()
    return pool.take_stats().bytes_received


def main() -> int:
    parser = tools.make_parser(__doc__)
    parser.add_argument(
        "--served", action="store_true", help="measure servers of the same model too"
    )
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--support_k", type=int, default=64)
    parser.add_argument(
        "--repeats", type=int, default=3, help="rounds in which each part runs once"
    )
    parser.add_argument(
        "--kv_cache_gib", type=float, default=0.5, help="of each of the two engines"
    )
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings go to standard output
    device = distributed.init().type  # vLLM's launcher in one process wants a rank
    dtype = {"cpu": "float32", "cuda": "bfloat16"}[device]
    with tempfile.TemporaryDirectory() as directory:
        result = measure(args, Path(directory), device, dtype)
        if args.served:
            result |= measure_served(args, Path(directory), dtype)
    if args.json:
        sizes = {name: value for name, value in vars(args).items() if name != "json"}
        tools.print_json({**result, **sizes, "dtype": dtype, **tools.machine_facts(device)})
    else:
        print(tools.table([{"": name, "value": value} for name, value in result.items()]))
    return 0


if __name__ == "__main__":
    with distributed.exit_together():
        sys.exit(main())

"""A push of weights to a rollout server: publish, verify and load, against a copy of as many bytes.

The student's tensors lie in memory. `publish` writes a version (`opd/weights/store.py`), `verify`
reads every byte again as a server does, `load` is vLLM's engine taking the weights from the
version's directory, and `copy` copies the version's files once, in the same place. They take turns,
and medians are compared: `push_over_copy` is (publish + verify + load) / copy. Less is better.

    python scripts/bench_push.py                # 1 GiB of weights, in shared memory
    python scripts/bench_push.py --gib 4 --json   # the last line is one JSON object
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from opd import distributed
from opd.engines.vllm_process import import_vllm, reload_weights
from opd.weights import store
from scripts.measure import tools
from scripts.measure.runs import byte_tokenizer, silent_model

HIDDEN, VOCAB_SIZE = 1024, 512
LAYER_BYTES = 4 * 11 * HIDDEN * HIDDEN  # about: attention of 5, MLP of 6 matrices, float32


def main() -> int:
    parser = tools.make_parser(__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="of weights, float32")
    parser.add_argument("--repeats", type=int, default=7, help="rounds in which each side runs")
    parser.add_argument("--root", type=Path, default=store.SHARED_MEMORY, help="where versions lie")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings go to standard output
    with tempfile.TemporaryDirectory(prefix="bench_push_", dir=args.root) as directory:
        result = measure(Path(directory), args.gib, args.repeats)
    if args.json:
        tools.print_json({**result, "gib": args.gib, **tools.machine_facts("cpu")})
    else:
        print(tools.table([{"": name, "value": value} for name, value in result.items()]))
    return 0


def measure(directory: Path, gib: float, repeats: int) -> dict:
    layers = max(1, round(gib * 2**30 / LAYER_BYTES))
    tokenizer = byte_tokenizer(VOCAB_SIZE)
    model = silent_model(layers, HIDDEN, tokenizer, seed=0)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    distributed.init()
    engine = import_vllm().LLM(
        str(directory / "model"),
        dtype="float32",
        max_model_len=64,
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=True,
        distributed_executor_backend="external_launcher",
    )
    shutil.rmtree(directory / "model")
    weights = [(name, tensor.detach()) for name, tensor in model.named_parameters()]
    root, version = directory / "weights", 0
    published = root / "v0"

    def publish() -> int:
        nonlocal version, published
        version += 1
        size = store.publish(root, weights, version, fence=1).bytes
        published = root / f"v{version}"
        return size

    def copy() -> None:
        shutil.rmtree(directory / "copy", ignore_errors=True)
        shutil.copytree(published, directory / "copy")

    def load() -> None:
        engine.collective_rpc(reload_weights, kwargs={"weights_path": str(published)})

    sides = {
        "publish": publish,
        "verify": lambda: store.verify(root, version, fence=1),
        "load": load,
        "copy": copy,
    }
    with torch.no_grad():
        ms, results = tools.take_turns(sides, repeats)
    push_ms = ms["publish"] + ms["verify"] + ms["load"]
    return {
        "push_over_copy": tools.ratio(push_ms, ms["copy"]),
        **{f"{side}_ms": round(value, 1) for side, value in ms.items()},
        "mib": results["publish"] >> 20,
    }


if __name__ == "__main__":
    with distributed.exit_together():
        sys.exit(main())

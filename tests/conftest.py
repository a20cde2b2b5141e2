"""Tiny models, tokenizer and data that all tests share: random weights, float32, made once per session."""

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Read when torch, tokenizers and Hugging Face are imported. The models are tiny and test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import json  # noqa: E402
import random  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from opd import distributed  # noqa: E402
from opd.clients.protocols import TOKEN_VARIABLE  # noqa: E402
from scripts.make_demo import LETTERS, make_tokenizer  # noqa: E402

DOMAINS = ("addition", "reversal")
HEAD_DIM = 32  # the smallest that vLLM's attention takes on the CPU
# hidden size, layers; teachers differ from the student and from each other
SIZES = {"student": (64, 2), "addition": (96, 1), "reversal": (64, 1), "tied": (64, 1)}
PADDED_VOCAB = 64
LAUNCH_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """Where things lie. Every model directory holds weights, tokenizer and generation config."""

    student: Path
    addition: Path  # teachers, named after their domains
    reversal: Path
    padded: Path  # the addition teacher with 24 more rows in its vocabulary than the tokenizer has tokens
    train: Path
    eval: Path
    domains: tuple[str, ...] = DOMAINS


@dataclass(frozen=True)
class RealModel:
    """A published chat model, and a student of 20 of its 30 layers: model directories."""

    whole: Path
    student: Path


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the tests marked `nightly`: hours")


def pytest_collection_modifyitems(config, items):
    """What is marked `nightly` is left out, and counted as deselected, unless `--all` is given."""
    if not config.getoption("--all"):
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]


@pytest.fixture(autouse=True)
def token_of_servers():
    """Scripts that are run in this process make a token for their servers: the next test's servers must not have it."""
    before = os.environ.get(TOKEN_VARIABLE)
    yield
    os.environ.pop(TOKEN_VARIABLE, None)
    if before is not None:
        os.environ[TOKEN_VARIABLE] = before


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    for name in ("student", *DOMAINS):
        _save(_random_model(name, tokenizer), tokenizer, root / name)
    _save(_padded(Qwen3ForCausalLM.from_pretrained(root / "addition")), tokenizer, root / "padded")
    rng = random.Random(0)
    for split, count in (("train", 32), ("eval", 6)):
        rows = [_row(domain, rng) for _ in range(count) for domain in DOMAINS]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ("student", *DOMAINS, "padded")
    return Tiny(**{name: root / name for name in names}, train=root / "train.jsonl", eval=root / "eval.jsonl")


@pytest.fixture(scope="session")
def tiny_tied(tmp_path_factory, tokenizer) -> Path:
    """A model whose output projection is its embedding."""
    path = tmp_path_factory.mktemp("tiny_tied")
    _save(_random_model("tied", tokenizer, tie_word_embeddings=True), tokenizer, path)
    return path


@pytest.fixture(scope="session")
def smollm2() -> RealModel:
    """Downloaded once per machine, into $OPD_CACHE or ~/.cache/opd. A test that needs it fails where it cannot be had."""
    cache = Path(os.environ.get("OPD_CACHE") or Path.home() / ".cache" / "opd")
    model = RealModel(cache / "smollm2", cache / "smollm2_20")
    script = [sys.executable, str(ROOT / "scripts" / "get_smollm2.py"), "--output_dir", str(model.whole)]
    done = subprocess.run(
        [*script, "--student_dir", str(model.student), "--num_layers", "20"], env=worker_environment(),
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return model


@pytest.fixture(scope="module")
def device():
    """This process as the only rank, for tests that need a process group; leaves the environment as it was."""
    from accelerate import PartialState

    before = {name: os.environ.get(name) for name in LAUNCH_VARIABLES}
    yield distributed.init()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    PartialState._reset_state()
    if "deepspeed" in sys.modules:  # it remembers the groups of the first module of tests that used it
        from deepspeed import comm
        from deepspeed.utils import groups

        comm.comm.cdb = groups._WORLD_GROUP = None
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="module")
def served(tiny):
    """Teacher name -> its two vLLM servers."""
    from vllm_servers import start_two_by_two

    more = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
    wanted = [(getattr(tiny, name), name) for name in DOMAINS for _ in range(2)]
    servers = start_two_by_two(wanted, worker_environment(**more))
    yield {name: [server for server in servers if server.name == name] for name in DOMAINS}
    for server in servers:
        server.stop()


def leave_vllm() -> None:
    """Ends vLLM's process groups, so that the next module of tests may build engines in this process again."""
    import gc

    from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    gc.collect()
    destroy_model_parallel()
    destroy_distributed_environment()


def worker_environment(**more: str) -> dict[str, str]:
    """For subprocesses on the CPU: nothing of this process's ranks or faults, one thread each."""
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES and not k.startswith("OPD_FAULT")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": path,
        **more,
    }


def listening_addresses(pid: int) -> set[str]:
    """Local addresses, in the kernel's own hexadecimal, of the TCP sockets on which a process listens."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it closes while we look
            inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = row.split()[:10]
            if state == "0A" and inode in inodes:
                found.add(local.partition(":")[0])
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def _random_model(name: str, tokenizer, **changes) -> Qwen3ForCausalLM:
    hidden_size, num_layers = SIZES[name]
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        initializer_range=0.2,  # far from uniform distributions, so that a token out of place shows
        dtype="float32",
        bos_token_id=None,
        **{"tie_word_embeddings": False, **special, **changes},
    )
    torch.manual_seed(list(SIZES).index(name))
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    return model


def _padded(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """More rows in embedding and head, as a vocabulary rounded up for the hardware; the new ones are random."""
    torch.manual_seed(99)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    model.resize_token_embeddings(PADDED_VOCAB)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = torch.randn(PADDED_VOCAB, old[name].shape[1])
        rows[: len(old[name])] = old[name]
        model.state_dict()[name].copy_(rows)
    return model


def _save(model: Qwen3ForCausalLM, tokenizer, path: Path) -> None:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _row(domain: str, rng: random.Random) -> dict:
    if domain == "addition":
        a, b = rng.randrange(100), rng.randrange(100)
        question, answer = f"{a}+{b}=", str(a + b)[::-1]
    else:
        word = "".join(rng.choices(LETTERS, k=rng.randint(3, 7)))
        question, answer = f"{word}=", word[::-1]
    return {"data_source": domain, "prompt": [{"role": "user", "content": question}], "answer": answer}

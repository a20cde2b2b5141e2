"""Fixtures that many tests share: tiny models, a published one, this process as a rank, servers."""

import os
import subprocess
import sys
from pathlib import Path

# Read when torch, tokenizers and Hugging Face are imported. The models are tiny and test processes
# share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import random

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd import distributed
from opd.clients.protocols import TOKEN_VARIABLE
from opd.engines import vllm_process
from scripts.make_demo import make_tokenizer
from tests.support.launch import Models
from tests.support.models import DOMAINS, RealModel, Tiny, padded, random_model, row, save
from tests.support.processes import LAUNCH_VARIABLES, ROOT, worker_environment


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the tests marked `long`: hours")


# Folders whose files take minutes.
SLOW = {"whole_runs", "servers", "run", "scripts", "engines"}


def pytest_collection_modifyitems(config, items):
    """What is marked `long` is left out, and counted as deselected, unless `--all` is given.

    Slow folders come first, so that two workers end together.
    """
    items.sort(key=lambda item: item.path.parent.name not in SLOW)
    if not config.getoption("--all"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(autouse=True)
def token_of_servers():
    """Scripts that are run in this process make a token for their servers: the next test's servers
    must not have it.
    """
    before = os.environ.get(TOKEN_VARIABLE)
    yield
    os.environ.pop(TOKEN_VARIABLE, None)
    if before is not None:
        os.environ[TOKEN_VARIABLE] = before


@pytest.fixture(autouse=True)
def models_stay_tied():
    """While transformers 5.19 loads a model it takes `tie_weights` from all classes. Two threads
    that load at once give back the wrong one, and no later model of the process is tied.
    """
    yield
    assert PreTrainedModel.tie_weights.__name__ == "tie_weights", "models were loaded in threads"


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    for name in ("student", *DOMAINS):
        save(random_model(name, tokenizer), tokenizer, root / name)
    save(padded(Qwen3ForCausalLM.from_pretrained(root / "addition")), tokenizer, root / "padded")
    rng = random.Random(0)
    for split, count in (("train", 32), ("eval", 6)):
        rows = [row(domain, rng) for _ in range(count) for domain in DOMAINS]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ("student", *DOMAINS, "padded")
    return Tiny(
        **{name: root / name for name in names},
        train=root / "train.jsonl",
        eval=root / "eval.jsonl",
    )


@pytest.fixture(scope="session")
def tiny_tied(tmp_path_factory, tokenizer) -> Path:
    """A model whose output projection is its embedding."""
    path = tmp_path_factory.mktemp("tiny_tied")
    save(random_model("tied", tokenizer, tie_word_embeddings=True), tokenizer, path)
    return path


@pytest.fixture(scope="session")
def smollm2() -> RealModel:
    """Downloaded once per machine, into $OPD_CACHE or ~/.cache/opd.

    A test that needs it fails where it cannot be had.
    """
    cache = Path(os.environ.get("OPD_CACHE") or Path.home() / ".cache" / "opd")
    model = RealModel(cache / "smollm2", cache / "smollm2_20")
    script = [
        sys.executable,
        str(ROOT / "scripts" / "demos" / "get_smollm2.py"),
        "--output_dir",
        str(model.whole),
    ]
    done = subprocess.run(
        [*script, "--student_dir", str(model.student), "--num_layers", "20"],
        env=worker_environment(),
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return model


@pytest.fixture(scope="module")
def device():
    """This process as the only rank, for tests that need a process group; leaves the environment as
    it was.
    """
    from accelerate import PartialState

    before = {name: os.environ.get(name) for name in LAUNCH_VARIABLES}
    yield distributed.init()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    PartialState._reset_state()
    # vLLM and DeepSpeed remember the groups of the first module of tests that used them
    if state := sys.modules.get("vllm.distributed.parallel_state"):
        for name in ("_WORLD", "_NODE_COUNT", *vllm_process.GLOBALS):
            setattr(state, name, None)
    if "deepspeed" in sys.modules:
        from deepspeed import comm
        from deepspeed.utils import groups
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        comm.comm.cdb = groups._WORLD_GROUP = None
        # a student under ZeRO-3 that is not collected yet: models would be built in its shards
        unset_hf_deepspeed_config()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="module")
def served(tiny):
    """Teacher name -> its vLLM servers: two of addition, one of reversal."""
    from tests.support.servers import start_two_by_two

    more = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
    }
    wanted = [(getattr(tiny, name), name) for name in ("addition", "addition", "reversal")]
    servers = start_two_by_two(wanted, worker_environment(**more))
    yield {name: [server for server in servers if server.name == name] for name in DOMAINS}
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def models(tiny) -> Models:
    return Models(
        tiny.student,
        {domain: getattr(tiny, domain) for domain in tiny.domains},
        (str(tiny.train),),
        tiny.eval,
    )


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory) -> Models:
    """Random models over bytes, which read any text."""
    root = tmp_path_factory.mktemp("bytes")
    byte_tokens = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=byte_tokens, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        ByteLevel(add_prefix_space=False),
        ByteLevelDecoder(),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    )
    for seed, (name, layers) in enumerate((("student", 1), ("gsm8k", 2), ("humaneval", 1))):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            head_dim=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
        Qwen3ForCausalLM(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    teachers = {domain: root / domain for domain in ("gsm8k", "humaneval")}
    return Models(root / "student", teachers, (), root / "unused")


KEY_VARIABLE, KEY = "OPD_SERVER_TOKEN", "a-planted-canary-key-0123456789"


@pytest.fixture
def key(monkeypatch) -> str:
    """The servers' token and the trainer's key, in the environment of both."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    return KEY

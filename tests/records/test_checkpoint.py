"""Checkpoints: killed at every point, damaged in every file, resumed to the bit; content hashes;
the export.
"""

import ast
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from opd.inputs import content
from opd.records import changes, checkpoint, export
from opd.records.checkpoint import FAULT_POINTS
from opd.types import LoopState
from tests.support.processes import ROOT, worker_environment

WORKER = ROOT / "tests" / "support" / "workers" / "checkpoint_worker.py"
DEADLINE = 600  # seconds for one process; a healthy one needs a few
# The points that ranks other than 0 pass as well.
EVERY_RANK = (
    "begin",
    "tmp_made",
    "shards_written",
    "files_synced",
    "before_manifest",
    "before_retention",
)


# ---- Real DeepSpeed, real kills ------------------------------------------------------------------


@pytest.fixture(scope="module")
def serve():
    """Runs a job in fresh processes and returns what became of each rank."""
    process = subprocess.Popen(
        [sys.executable, str(WORKER), "serve"],
        env=worker_environment(),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )

    def run(run_dir: Path, num_steps: int = 3, **job) -> dict:
        process.stdin.write(
            json.dumps({"run_dir": str(run_dir), "num_steps": num_steps, **job}) + "\n"
        )
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        answer["stderr"] = "\n".join(answer["stderr"])
        return answer

    yield run
    process.stdin.close()
    assert process.wait(timeout=DEADLINE) == 0


@pytest.fixture(scope="module")
def undisturbed(serve, tmp_path_factory):
    """The result of rank 0 after `num_steps` steps in one go."""
    known: dict[tuple[int, int], dict] = {}

    def result(world_size: int, num_steps: int) -> dict:
        key = (world_size, num_steps)
        if key not in known:
            answer = serve(tmp_path_factory.mktemp("undisturbed"), num_steps, world_size=world_size)
            assert answer["statuses"] == [0] * world_size, answer["stderr"]
            known[key] = answer["results"][0]
        return known[key]

    return result


def names(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("world_size", [1, 2])
def test_2_steps_and_a_resume_equal_4_steps_bit_for_bit(world_size, serve, undisturbed, tmp_path):
    first = serve(tmp_path, 2, world_size=world_size)
    assert first["statuses"] == [0] * world_size, first["stderr"]
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        if world_size == 2
        else []
    )
    command = [
        sys.executable,
        *launcher,
        str(WORKER),
        json.dumps({"run_dir": str(tmp_path), "num_steps": 4}),
    ]
    resumed = subprocess.run(
        command, env=worker_environment(), text=True, capture_output=True, timeout=DEADLINE
    )
    assert resumed.returncode == 0, resumed.stderr
    # Two ranks write to one pipe: a line break may arrive after the other rank's line.
    result, _ = json.JSONDecoder().raw_decode(resumed.stdout.split("RESULT ", 1)[1])
    assert result == {**undisturbed(world_size, 4), "resumed": 2}
    assert result["hash"] != undisturbed(world_size, 2)["hash"]


def test_every_fault_point_of_the_source_is_enumerated():
    calls = [
        n
        for n in ast.walk(ast.parse(Path(checkpoint.__file__).read_text()))
        if isinstance(n, ast.Call)
    ]
    in_source = [c.args[0].value for c in calls if getattr(c.func, "id", "") == "fault_point"]
    assert sorted(in_source) == sorted(FAULT_POINTS)
    assert len(FAULT_POINTS) == 12


KILLS = [
    *((1, 0, point) for point in ("worker.first_shard", *FAULT_POINTS)),
    *((2, 1, f"save.{point}") for point in EVERY_RANK),
    *((2, 0, f"save.{point}") for point in ("shards_written", "manifest_half", "renamed")),
]


@pytest.mark.parametrize("world_size, rank, point", KILLS)
def test_a_kill_at_any_point_of_a_save_costs_at_most_that_save(
    world_size, rank, point, serve, undisturbed, tmp_path
):
    job = {"world_size": world_size, "keep": 1}
    killed = serve(tmp_path, **job, fault=f"{point}:kill", fault_rank=rank, strike_at=2)
    assert killed["statuses"][rank] == -9, killed["stderr"]
    assert 0 not in killed["statuses"]
    published = point in FAULT_POINTS[FAULT_POINTS.index("save.renamed") :]
    assert ("step_2" in names(tmp_path)) == published

    resumed = serve(tmp_path, **job)
    assert resumed["statuses"] == [0] * world_size, resumed["stderr"]
    assert resumed["results"][0] == {**undisturbed(world_size, 3), "resumed": 2 if published else 1}
    assert names(tmp_path) == ["step_3"]


@pytest.mark.parametrize("world_size, rank", [(1, 0), (2, 0), (2, 1)])
def test_a_full_disk_costs_that_save_only(world_size, rank, serve, undisturbed, tmp_path):
    answer = serve(tmp_path, world_size=world_size, strike_at=2, full_disk_rank=rank)
    assert answer["statuses"] == [0] * world_size, answer["stderr"]
    for result in answer["results"]:
        assert f"{tmp_path}/checkpoints/step_2 was not written" in result["full_disk_error"]
        assert f"failed on rank {rank}" in result["full_disk_error"]
    assert answer["results"][0]["after_full_disk"] == ["step_1"]
    assert answer["results"][0]["hash"] == undisturbed(world_size, 3)["hash"]
    assert names(tmp_path) == ["step_2", "step_3"]


@pytest.mark.parametrize("saved, started", [(1, 2), (2, 1)])
def test_another_number_of_ranks_is_refused(saved, started, serve, tmp_path):
    assert serve(tmp_path, 1, world_size=saved)["statuses"] == [0] * saved
    answer = serve(tmp_path, 2, world_size=started)
    assert answer["statuses"] == [1] * started
    path = tmp_path / "checkpoints" / "step_1"
    message = (
        f"ValueError: --resume: {path} was written by {saved} rank(s) and this run has {started}; "
    )
    assert answer["stderr"].count(message) == started
    assert names(tmp_path) == ["step_1"]


@pytest.mark.parametrize("saved, started", [(1, 2), (2, 1), (3, 2)])
def test_shards_are_divided_anew_for_another_number_of_ranks(saved, started, serve, tmp_path):
    """Masters, moments and parameters are whole and the same bit for bit, there and back."""
    there, back = tmp_path / "there", tmp_path / "back"
    first = serve(there, 2, world_size=saved, any_number=True)
    assert first["statuses"] == [0] * saved, first["stderr"]
    before = first["results"][0]
    moved = serve(there, 2, world_size=started, any_number=True, save_as=str(back))
    assert moved["statuses"] == [0] * started, moved["stderr"]
    assert {result["whole"] for result in moved["results"]} == {before["whole"]}
    assert moved["results"][0]["resumed"] == 2
    again = serve(back, 2, world_size=saved, any_number=True)["results"][0]
    assert again["resumed"] == 2 and again["whole"] == before["whole"]
    # three ranks pad their slices, and what is in a padding does not matter
    assert saved == 3 or again["hash"] == before["hash"]
    onward = serve(there, 3, world_size=started, any_number=True)
    assert onward["statuses"] == [0] * started, onward["stderr"]
    assert onward["results"][0]["whole"] != before["whole"]


@pytest.mark.parametrize("stage, dtype", [(3, "bfloat16"), (2, "bfloat16"), (0, "float32")])
def test_shards_hold_what_deepspeed_gathers(stage, dtype, serve, tmp_path):
    """Tied weights included, and rounded as DeepSpeed rounds its masters."""
    model, source = make_model(tied=True), tmp_path / "source"
    model.save_pretrained(source)
    answer = serve(tmp_path, shards_of=str(source), stage=stage, dtype=dtype, world_size=2)
    assert answer["statuses"] == [0, 0], answer["stderr"]
    for result in answer["results"]:
        assert result["equal"] == result["names"] and result["trained"] == len(result["names"])


@pytest.mark.parametrize("started", [1, 2])
def test_a_resumed_optimizer_has_what_the_flags_say_now(started, serve, tmp_path):
    """And not what they said when the checkpoint was written."""
    assert serve(tmp_path, 1)["statuses"] == [0]
    optim = {"weight_decay": 0.25, "adam_beta1": 0.5, "adam_eps": 1e-4}
    answer = serve(tmp_path, 2, world_size=started, any_number=True, optim=optim)
    assert answer["statuses"] == [0] * started, answer["stderr"]
    result = answer["results"][0]
    assert result["resumed"] == 1
    assert result["adam"] == [[0.25, 0.5, 0.95, 1e-4], [0.0, 0.5, 0.95, 1e-4]]


def test_a_damaged_shard_is_refused_before_deepspeed_sees_it(serve, undisturbed, tmp_path):
    assert serve(tmp_path, 2, world_size=2)["statuses"] == [0, 0]
    path = tmp_path / "checkpoints" / "step_2"
    listed = [entry["file"] for entry in json.loads((path / "manifest.json").read_text())["files"]]
    present = [
        str(p.relative_to(path))
        for p in path.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    ]
    assert sorted(listed) == sorted(present)  # the ranks' shares together
    (shard,) = path.rglob("*rank_1*optim*")
    flip(shard, shard.stat().st_size // 2)
    answer = serve(tmp_path, 3, world_size=2)
    assert answer["results"][0] == {**undisturbed(2, 3), "resumed": 1}
    assert f"skipped {path}: shards/{shard.name}: its hash does not match" in answer["stderr"]


# ---- What whole means: pure file work, one rank --------------------------------------------------


def flip(path: Path, index: int) -> None:
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)


def write(run_dir: Path, step: int, *, keep: int = 10, fingerprint: dict | None = None) -> Path:
    def save_shards(directory: Path) -> None:
        (directory / "shards").mkdir()
        (directory / "shards" / "model.pt").write_bytes(os.urandom(1000))
        (directory / "shards" / "optim.pt").write_bytes(os.urandom(3000))
        (directory / "empty").touch()

    state = LoopState(step, policy_version=step, tokens_seen=10 * step)
    return checkpoint.save(run_dir, state, save_shards, fingerprint or {"seed": 0}, keep=keep)


def test_a_checkpoint_lists_every_file_and_gives_the_state_back(tmp_path):
    path = write(tmp_path, 3)
    assert path == tmp_path / "checkpoints" / "step_3"
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["version"], manifest["step"], manifest["world_size"]) == (1, 3, 1)
    files = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {"manifest.json"}
    assert {entry["file"] for entry in manifest["files"]} == files
    for entry in manifest["files"]:
        content = (path / entry["file"]).read_bytes()
        assert (entry["size"], entry["sha256"]) == (
            len(content),
            hashlib.sha256(content).hexdigest(),
        )
    assert checkpoint.find(tmp_path, "auto") == path
    assert checkpoint.load_state(path) == LoopState(step=3, policy_version=3, tokens_seen=30)


FILES = ("manifest.json", "loop_state.json", "shards/model.pt", "shards/optim.pt")


@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_refused_and_the_older_one_is_used(name, tmp_path, capsys):
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    victim = newer / name
    whole = victim.read_bytes()
    for index in (*range(0, len(whole), 3 if name.endswith(".json") else 499), len(whole) - 1):
        flip(victim, index)
        assert checkpoint.find(tmp_path, "auto") == older, f"byte {index}"
        victim.write_bytes(whole)
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"):
        victim.write_bytes(damaged)
        assert checkpoint.find(tmp_path, "auto") == older
    capsys.readouterr()
    victim.unlink()
    assert checkpoint.find(tmp_path, "auto") == older
    assert (
        capsys.readouterr().err
        == f"warning: rank 0: checkpoint: skipped {newer}: {name}: missing\n"
    )
    with pytest.raises(
        ValueError, match=rf"--resume {newer}: not a whole checkpoint: {name}: missing; .*auto"
    ):
        checkpoint.find(tmp_path, str(newer))
    victim.write_bytes(whole)
    assert checkpoint.find(tmp_path, "auto") == newer


def test_find_without_a_whole_checkpoint(tmp_path, capsys):
    assert checkpoint.find(tmp_path / "none", "auto") is None
    assert capsys.readouterr().err == ""
    path = write(tmp_path, 1)
    assert checkpoint.find(tmp_path, "never") is None
    assert checkpoint.find(tmp_path / "another_run", str(path)) == path
    with pytest.raises(
        ValueError, match=r"--resume /nowhere: not a whole checkpoint: no such directory"
    ):
        checkpoint.find(tmp_path, "/nowhere")
    (path / "manifest.json").unlink()
    assert checkpoint.find(tmp_path, "auto") is None
    assert "skipped" in capsys.readouterr().err


def test_a_renamed_step_is_not_trusted(tmp_path, capsys):
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    newer.rename(newer.with_name("step_9"))
    assert checkpoint.find(tmp_path, "auto") == older
    assert "it is of step 2" in capsys.readouterr().err


def test_a_later_layout_is_not_read(tmp_path, capsys):
    path = write(tmp_path, 1)
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(checkpoint._manifest_text({**content, "version": 2}))
    assert checkpoint.find(tmp_path, "auto") is None
    assert "version 2, this program reads 1" in capsys.readouterr().err


@pytest.mark.parametrize("point", FAULT_POINTS[: FAULT_POINTS.index("save.renamed")])
def test_an_error_at_any_point_leaves_the_older_one_alone(point, tmp_path, monkeypatch):
    older = write(tmp_path, 1)
    monkeypatch.setenv("OPD_FAULT", f"{point}:raise")
    with pytest.raises(
        RuntimeError, match=rf"{tmp_path}/checkpoints/step_2 was not written.*injected at {point}"
    ):
        write(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step_1"]
    monkeypatch.delenv("OPD_FAULT")
    assert checkpoint.find(tmp_path, "auto") == older
    assert checkpoint.find(tmp_path, "auto") != write(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step_2"]


def test_retention_keeps_the_newest_whole_ones(tmp_path):
    for step in (2, 4, 6, 10):
        write(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step_10", "step_4", "step_6"]
    (tmp_path / "checkpoints" / "step_6" / "shards" / "model.pt").unlink()
    write(tmp_path, 12, keep=3)  # the damaged one does not count as one of three
    assert names(tmp_path) == ["step_10", "step_12", "step_4", "step_6"]
    write(tmp_path, 11, keep=1)  # nor do those ahead of the step that is saved
    assert names(tmp_path) == ["step_11", "step_12", "step_6"]


def test_a_step_that_exists_is_kept_if_whole_and_replaced_if_not(tmp_path, capsys):
    path = write(tmp_path, 1)
    whole = (path / "shards" / "model.pt").read_bytes()
    assert write(tmp_path, 1) == path
    assert (path / "shards" / "model.pt").read_bytes() == whole
    assert "exists already" in capsys.readouterr().err
    flip(path / "shards" / "model.pt", 5)
    assert write(tmp_path, 1) == path
    assert "damaged and will be replaced: shards/model.pt" in capsys.readouterr().err
    assert (path / "shards" / "model.pt").read_bytes() != whole
    assert checkpoint.find(tmp_path, "auto") == path
    assert names(tmp_path) == ["step_1"]


def test_leftovers_of_dead_runs_go_and_those_of_live_ones_stay(tmp_path):
    def save_shards(directory: Path) -> None:
        assert names(tmp_path) == [directory.name]
        # another process looks while this one saves
        assert checkpoint.find(tmp_path, "auto") is None
        assert names(tmp_path) == [directory.name]
        (directory / "file").write_text("x")

    checkpoints = tmp_path / "checkpoints"
    for leftover in (".tmp_step_7.dead", ".trash_step_1.dead"):
        (checkpoints / leftover).mkdir(parents=True)
        (checkpoints / leftover / "shard").touch()
    checkpoint.save(tmp_path, LoopState(step=8), save_shards, {}, keep=1)
    assert names(tmp_path) == ["step_8"]


def test_what_is_not_this_runs_past_is_set_aside(tmp_path, capsys):
    paths = {step: write(tmp_path, step) for step in (1, 2, 3)}
    checkpoint.set_aside_newer(tmp_path, paths[3])
    assert names(tmp_path) == ["step_1", "step_2", "step_3"]
    assert "moved" not in capsys.readouterr().err
    checkpoint.set_aside_newer(tmp_path, paths[1])
    assert names(tmp_path) == ["aside", "step_1"]
    assert capsys.readouterr().err.count("moved to") == 2
    assert checkpoint.find(tmp_path, "auto") == paths[1]
    elsewhere = write(tmp_path / "another_run", 5)
    checkpoint.set_aside_newer(tmp_path, elsewhere)
    assert names(tmp_path) == ["aside"]
    again = write(tmp_path, 1)
    assert again == paths[1]
    checkpoint.set_aside_newer(tmp_path, None)
    aside = sorted((tmp_path / "checkpoints" / "aside").iterdir())
    assert [p.name.split(".")[0] for p in aside] == ["step_1", "step_1", "step_2", "step_3"]
    assert all(checkpoint.find(tmp_path, str(p)) == p for p in aside)


def test_the_fingerprint_names_the_first_field_that_differs(tmp_path):
    math, code = "ab" * 32, "cd" * 32
    fingerprint = {
        "teachers": {"math": math, "code": code},
        "loss": {"clip": None, "k": 1},
        "data": [1, 2],
    }
    path = write(tmp_path, 1, fingerprint=fingerprint)
    changes.check_fingerprint(path, {**fingerprint, "data": (1, 2)})
    expected = {
        "`teachers.math` differs from the checkpoint: abababababab there, cdcdcdcdcdcd": {
            "teachers": {"math": code}
        },
        "`loss.clip` differs from the checkpoint: null there, 0.5 now": {
            "loss": {"clip": 0.5, "k": 2}
        },
        "`teachers.code` differs from the checkpoint: cdcdcdcdcdcd there, absent now": {
            "teachers": {"math": math}
        },
        "`lora` differs from the checkpoint: absent there, 8 now": {"lora": 8},
    }
    for message, change in expected.items():
        with pytest.raises(ValueError) as caught:
            changes.check_fingerprint(path, {**fingerprint, **change})
        assert message in str(caught.value) and "start anew in another --output_dir" in str(
            caught.value
        )
        assert "\n" not in str(caught.value)


# ---- Content hashes ------------------------------------------------------------------------------


def test_content_hash_follows_what_a_model_is(tmp_path):
    model = tmp_path / "model"
    (model / "runs").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "tokenizer.json").write_text("{}")
    before = content.content_hash(str(model))
    assert len(before) == 64
    for ignored in ("README.md", "runs/events.json", ".cache.json"):
        (model / ignored).write_text("something")
    assert content.content_hash(str(model)) == before
    seen = {before}
    for name in ("model.safetensors", "tokenizer.json", "config.json", "new.py"):
        (model / name).write_text("changed")
        seen.add(content.content_hash(str(model)))
    (model / "new.py").rename(model / "other.py")
    seen.add(content.content_hash(str(model)))
    assert len(seen) == 6
    assert content.content_hash(str(model.rename(tmp_path / "moved"))) in seen


def test_content_hash_of_data_and_of_nothing(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "rows.jsonl").write_text("1\n")
    assert (
        content.content_hash(str(tmp_path / "part" / "rows.jsonl"))
        == hashlib.sha256(b"1\n").hexdigest()
    )
    before = content.content_hash(str(tmp_path))
    (tmp_path / "part" / "rows.jsonl").write_text("2\n")
    assert content.content_hash(str(tmp_path)) != before
    (tmp_path / "nothing").mkdir()
    for wrong in ("nothing", "missing/deep/path"):
        with pytest.raises(ValueError, match=wrong):
            content.content_hash(str(tmp_path / wrong))


def test_content_hash_samples_large_files(tmp_path):
    size = (64 << 20) + 12345
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.truncate(size)
    seen = {content.content_hash(str(tmp_path))}
    for offset in (
        0,
        size - 1,
        (size - (1 << 20)) // 3 + 5,
    ):  # the first, the last and the 22nd block
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(b"x")
        seen.add(content.content_hash(str(tmp_path)))
    with open(path, "ab") as file:
        file.write(b"\0")
    seen.add(content.content_hash(str(tmp_path)))
    assert len(seen) == 5


def test_content_hash_of_a_hub_id_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was opened"))
    assert content.content_hash("someone/model") == "someone/model"
    commit = "0123456789" * 4
    repository = tmp_path / "models--someone--model"
    for file, text in (("refs/main", commit), (f"snapshots/{commit}/config.json", "{}")):
        (repository / file).parent.mkdir(parents=True)
        (repository / file).write_text(text)
    assert content.content_hash("someone/model") == f"someone/model@{commit}"


# ---- Export --------------------------------------------------------------------------------------


def make_model(tied: bool, seed: int = 0):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=tied,
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.5,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def make_tokenizer():
    words = {f"w{i}": i for i in range(38)} | {"<end>": 38, "<pad>": 39}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def greedy(model, prompt: list[int]) -> list[int]:
    prompt_BS = torch.tensor([prompt])
    return model.generate(prompt_BS, do_sample=False, max_new_tokens=8, pad_token_id=39)[
        0, len(prompt) :
    ].tolist()


def one_at_a_time(named_tensors):
    """Each tensor is gone when the next one is asked for, as when ZeRO-3 gathers bucket
    by bucket.
    """
    for name, tensor in named_tensors:
        scratch = tensor.detach().clone()
        yield name, scratch
        scratch.fill_(torch.nan)


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_loads_computes_the_same_and_stops_on_its_eos(tied, tmp_path):
    model, path = make_model(tied), tmp_path / "run" / "model"
    own = model.generation_config
    prompt = [3, 1, 4]
    text = greedy(model, prompt)
    # a token that greedy decoding reaches, but not at once
    end = next(t for t in text[1:] if t != text[0])
    generation_config = GenerationConfig(eos_token_id=[end, 38], pad_token_id=39)
    # both names of a tied weight
    named = one_at_a_time(model.named_parameters(remove_duplicate=False))
    export.export_huggingface(path, model, make_tokenizer(), named, generation_config)

    assert model.generation_config is own
    assert [p.name for p in path.parent.iterdir()] == ["model"]
    assert ("lm_head.weight" in load_file(path / "model.safetensors")) == (not tied)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    for (name, old), (_, new) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert torch.equal(old, new), name
    assert loaded.config.tie_word_embeddings == tied
    assert loaded.generation_config.eos_token_id == [end, 38]
    assert greedy(loaded, prompt) == text[: text.index(end) + 1]
    assert AutoTokenizer.from_pretrained(path)("w3 w1 <end>").input_ids == [3, 1, 38]


def test_an_export_gets_an_eos_and_drops_hints_that_cannot_be_written(tmp_path, capsys):
    model = make_model(tied=True)
    hints = GenerationConfig(pad_token_id=39)
    hints.temperature = 0.3  # without do_sample: transformers refuses to write it
    export.export_huggingface(
        tmp_path / "model", model, make_tokenizer(), model.named_parameters(), hints
    )
    stored = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (stored["eos_token_id"], stored["pad_token_id"], stored.get("temperature")) == (
        38,
        39,
        None,
    )
    assert hints.eos_token_id is None and hints.temperature == 0.3
    assert "keeps the token ids only" in capsys.readouterr().err


def test_a_failed_export_leaves_the_old_one_and_the_next_replaces_it(tmp_path):
    path, tokenizer, generation_config = (
        tmp_path / "model",
        make_tokenizer(),
        GenerationConfig(eos_token_id=38),
    )
    first, second = make_model(tied=True), make_model(tied=True, seed=1)
    export.export_huggingface(path, first, tokenizer, first.named_parameters(), generation_config)
    (path / "stale").touch()
    incomplete = list(second.named_parameters())[:-1]
    with pytest.raises(RuntimeError, match=r"export to .*model\.norm\.weight"):
        export.export_huggingface(path, second, tokenizer, incomplete, generation_config)
    assert (path / "stale").exists() and [p.name for p in tmp_path.iterdir()] == ["model"]
    export.export_huggingface(
        path, second, tokenizer, second.named_parameters(), generation_config, card="# Second\n"
    )
    assert (path / "README.md").read_text() == "# Second\n"
    assert not (path / "stale").exists() and [p.name for p in tmp_path.iterdir()] == ["model"]
    assert torch.equal(
        load_file(path / "model.safetensors")["model.embed_tokens.weight"], second.lm_head.weight
    )


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_from_under_zero_3_equals_the_model(tied, serve, tmp_path):
    model, source = make_model(tied), tmp_path / "source"
    export.export_huggingface(
        source, model, make_tokenizer(), model.named_parameters(), GenerationConfig(eos_token_id=38)
    )
    answer = serve(tmp_path, export_from=str(source), world_size=2)
    assert answer["results"] == [{"partitioned": True}] * 2, answer["stderr"]
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "model" / name).read_bytes() == (source / name).read_bytes(), name

"""Prompt sets, the prompts of a step, and routing."""

import collections
import json
import subprocess
import sys

import datasets
import pytest

from opd.config import TeacherSpec
from opd.inputs.order import prompt_batch
from opd.inputs.routing import routes
from tests.support.processes import ROOT
from tests.support.prompts import ids, load, make_tokenizer, row, write

# ---------------------------------------------------------------------------------------- rendering


def test_text_and_messages_render_alike_with_special_tokens_once(tmp_path):
    path = write(tmp_path / "a.jsonl", [row("1+1="), row([{"role": "user", "content": "1+1="}])])
    prompts = load(path).prompts
    assert prompts[0].token_ids == prompts[1].token_ids == ids("<bos><user>1+1=<assistant>")
    assert [p.prompt_id for p in prompts] == [0, 1]


def test_plain_text_without_a_template_begins_with_bos_and_does_not_end(tmp_path):
    path = write(tmp_path / "a.jsonl", [row("ab"), row("<bos>ab")])
    for prompt in load(path, tokenizer=make_tokenizer(None)).prompts:
        assert prompt.token_ids == ids("<bos>ab")


def test_messages_without_a_template_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [row([{"role": "user", "content": "a"}])])
    with pytest.raises(ValueError, match="line 1: column `prompt` holds messages"):
        load(path, tokenizer=make_tokenizer(None))


def test_responses_end_with_eos_and_are_cut(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(response="abc"), row(response="abcdef")])
    prompts = load(path, need_response=True, max_response_tokens=4).prompts
    assert prompts[0].target_ids == ids("abc<eos>")
    assert prompts[1].target_ids == ids("abcd")


def test_answers_and_domains_become_text(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(answer=72), row(domain=3, answer="x"), row()])
    prompts = load(path).prompts
    assert [p.answer for p in prompts] == ["72", "x", None]
    assert [p.domain for p in prompts] == ["math", "3", "math"]


@pytest.mark.parametrize("mode", ["drop", "truncate"])
def test_overlong_prompts_are_counted(tmp_path, mode):
    path = write(tmp_path / "a.jsonl", [row("a"), row("abcdefgh"), row("b", domain="code")])
    prompt_set = load(path, max_prompt_tokens=5, overlong_prompts=mode)
    assert prompt_set.overlong == {"math": 1}
    assert [p.prompt_id for p in prompt_set.prompts] == list(range(len(prompt_set.prompts)))
    if mode == "drop":
        assert prompt_set.counts == {"code": 1, "math": 1}
    else:
        assert prompt_set.prompts[1].token_ids == ids("efgh<assistant>")


def test_a_domain_that_loses_every_prompt_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [row("a"), row("abcdefgh", domain="code")])
    with pytest.raises(ValueError, match=r"--max_prompt_tokens 5 in code \(1 rows\).*truncate"):
        load(path, max_prompt_tokens=5)


# -------------------------------------------------------------------------------------------- files


def test_jsonl_json_parquet_and_directory_agree(tmp_path):
    # A column store gives every message every key: the null must not reach the template.
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b", "name": "c"}]
    rows = [
        row(messages, answer="1"),
        row([{"role": "user", "content": "z"}], domain="code", answer="2"),
    ]
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl = load(write(folder / "b.jsonl", rows))
    (folder / "dataset_info.json").write_text('{"about": "not a row"}')
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    for other in (folder, tmp_path / "a.json", tmp_path / "a.parquet"):
        assert load(str(other)).content_hash == jsonl.content_hash, other
    both = load(str(folder), str(tmp_path / "a.parquet"))
    assert both.counts == {"code": 2, "math": 2} and both.domains == ("code", "math")


def test_content_hash_sees_everything(tmp_path):
    base = [row("a", answer="1", response="x"), row("b", answer="2", response="y")]
    variants = [base, base[::-1]]
    for change in ({"prompt": "c"}, {"data_source": "code"}, {"answer": "3"}, {"response": "z"}):
        variants.append([{**base[0], **change}, base[1]])
    hashes = [
        load(write(tmp_path / "a.jsonl", rows), need_response=True).content_hash
        for rows in variants
    ]
    assert len(set(hashes)) == len(variants)
    assert load(write(tmp_path / "b.jsonl", base), need_response=True).content_hash == hashes[0]


BROKEN = {
    "line 2: not JSON": [row(), '{"prompt": "a"'],
    "line 3: expected an object": [row(), "", "[1]"],
    "line 2: column `prompt` is missing; the row has data_source, question": [
        row(),
        {"data_source": "m", "question": "a"},
    ],
    "line 1: column `data_source` is missing; the row has prompt": [{"prompt": "a"}],
    "line 2: column `data_source` is missing": [row(), {"prompt": "a"}],
    "line 1: column `data_source` is null": [row(domain=None)],
    "line 1: column `data_source` must name": [row(domain=" ")],
    "line 1: column `prompt` is null": [row(None)],
    "line 2: column `prompt`: the prompt is empty": [row(), row(" \t")],
    "line 1: column `prompt` must be text or": [row(5)],
    "line 1: column `prompt` must be text or a list": [row([])],
    "line 1: column `prompt`: every message needs": [row([{"role": "user"}])],
    "line 1: column `prompt`: the prompt is empty": [row([{"role": "user", "content": ""}])],
    "line 1: column `prompt` ends with an assistant": [
        row([{"role": "assistant", "content": "b"}])
    ],
    "line 1: column `prompt`: the chat template refuses it: no system": [
        row([{"role": "system", "content": "b"}])
    ],
    "empty, no rows": [],
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_rows_name_file_line_and_column(tmp_path, message):
    path = write(tmp_path / "a.jsonl", BROKEN[message])
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value).startswith(f"--data {path}") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_answer_or_response_is_refused_only_where_needed(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(answer="1", response="r"), row(response=" ")])
    assert len(load(path).prompts) == 2
    with pytest.raises(ValueError, match="line 2: column `answer` is missing"):
        load(path, need_answer=True)
    with pytest.raises(ValueError, match="line 2: column `response` must be the text"):
        load(path, need_response=True)


def test_missing_and_broken_files(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.parquet").write_text("PAR1 no")
    (tmp_path / "a.csv").write_text("prompt")
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a", "data_source": "m"}\n{"prompt": "\xff"}\n')
    cases = {
        "no.jsonl": "no such file",
        "empty": "holds no .jsonl",
        "a.parquet": "not a parquet file",
        "a.csv": "unknown file type '.csv'",
        "a.jsonl": "line 2: not JSON",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError) as caught:
            load(str(tmp_path / name))
        assert (
            message in str(caught.value)
            and name in str(caught.value)
            and "\n" not in str(caught.value)
        )
    with pytest.raises(ValueError, match="--data is required"):
        load()


def test_one_teacher_for_everything_needs_no_domain_column(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    assert load(path, default_domain="default").counts == {"default": 2}
    mixed = write(tmp_path / "b.jsonl", [{"prompt": "a"}, row("b")])
    with pytest.raises(ValueError, match="line 1: column `data_source` is missing"):
        load(mixed, default_domain="default")


# ---------------------------------------------------------------------------- the prompts of a step


@pytest.fixture(scope="module")
def prompt_set(tmp_path_factory):
    rows = [row(f"{i}", domain="abc"[i % 7 // 3]) for i in range(37)]  # a 17, b 15, c 5
    return load(write(tmp_path_factory.mktemp("data") / "a.jsonl", rows))


def batch(
    prompt_set, step, *, seed=0, prompts_per_step=8, domain_weights=None, rank=0, world_size=1
) -> list[int]:
    prompts = prompt_batch(
        prompt_set,
        step,
        seed=seed,
        prompts_per_step=prompts_per_step,
        domain_weights=domain_weights or {},
        rank=rank,
        world_size=world_size,
    )
    return [p.prompt_id for p in prompts]


WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_step_is_a_function_of_seed_and_step(prompt_set, weights):
    forward = [batch(prompt_set, s, domain_weights=weights) for s in range(20)]
    backward = [batch(prompt_set, s, domain_weights=weights) for s in reversed(range(20))]
    assert forward == backward[::-1]
    assert forward != [batch(prompt_set, s, seed=1, domain_weights=weights) for s in range(20)]


def test_another_process_picks_the_same_prompts(prompt_set, tmp_path):
    """A resume is another process: hashes of strings differ there, and nothing was picked before
    step 12.
    """
    path = write(tmp_path / "a.jsonl", [row(f"{i}", domain="abc"[i % 7 // 3]) for i in range(37)])
    code = (
        f"import tests.inputs.test_prompts as t\ns = t.load({path!r})\n"
        f"print(t.batch(s, 12), t.batch(s, 12, domain_weights={WEIGHTS!r}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert out.strip() == f"{batch(prompt_set, 12)} {batch(prompt_set, 12, domain_weights=WEIGHTS)}"


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_step_does_not_know_how_many_ranks_there_are(prompt_set, weights, world_size):
    for step in range(6):
        parts = [
            batch(prompt_set, step, domain_weights=weights, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        interleaved = [part[i] for i in range(8 // world_size) for part in parts]
        assert interleaved == batch(prompt_set, step, domain_weights=weights)


@pytest.mark.parametrize("prompts_per_step", [1, 8, 37, 100])
def test_epochs_drop_and_repeat_nothing(prompt_set, prompts_per_step):
    steps = range(37 * 4 // prompts_per_step + 1)
    walk = [i for s in steps for i in batch(prompt_set, s, prompts_per_step=prompts_per_step)]
    epochs = [walk[37 * e : 37 * (e + 1)] for e in range(len(walk) // 37)]
    assert len(epochs) >= 3
    for epoch in epochs:
        assert sorted(epoch) == list(range(37))
    assert epochs[0] != epochs[1] and epochs[0] != list(range(37))


@pytest.mark.parametrize("prompts_per_step", [1, 2, 7, 8])
@pytest.mark.parametrize(
    "weights",
    [WEIGHTS, {"a": 1, "b": 1, "c": 1}, {"a": 40, "b": 5, "c": 55}, {"a": 1e-3, "b": 0, "c": 7}],
)
def test_domain_counts_follow_the_weights_at_every_step(prompt_set, prompts_per_step, weights):
    seen, total = collections.Counter(), sum(weights.values())
    for step in range(200):
        ids = batch(prompt_set, step, prompts_per_step=prompts_per_step, domain_weights=weights)
        assert len(ids) == prompts_per_step
        seen.update(prompt_set.prompts[i].domain for i in ids)
        for domain, weight in weights.items():
            assert abs(seen[domain] - (step + 1) * prompts_per_step * weight / total) < 1 + 1e-9, (
                step,
                domain,
            )


def test_each_domain_walks_its_own_epochs(prompt_set):
    walk = [i for s in range(40) for i in batch(prompt_set, s, domain_weights=WEIGHTS)]
    for domain, size in prompt_set.counts.items():
        # Without repeats inside an epoch no row can be two ahead of another; a step's order is
        # shuffled, so count.
        ids = collections.Counter(i for i in walk if prompt_set.prompts[i].domain == domain)
        assert len(ids) == size and max(ids.values()) - min(ids.values()) <= 1, domain


@pytest.mark.parametrize(
    ("weights", "prompts_per_step"),
    [
        ([1.7**i for i in range(12)], 3),
        ([24, 1, 20, 18, 1], 2),  # largest remainder first: no valid step 16
        ([7, 7, 12, 8, 10], 1),  # heaviest first: no valid step 7
        ([1, 13, 37, 14, 5], 3),  # lightest first: no valid step 2
    ],
)
def test_many_uneven_domains(tmp_path, weights, prompts_per_step):
    shares = {f"d{i:02}": weight / sum(weights) for i, weight in enumerate(weights)}
    many = load(write(tmp_path / "a.jsonl", [row("a", domain=name) for name in shares]))
    given = dict(zip(shares, weights, strict=True))
    seen, total = collections.Counter(), 0
    for step in range(150):
        ids = batch(many, step, prompts_per_step=prompts_per_step, domain_weights=given)
        seen.update(many.prompts[i].domain for i in ids)
        total += prompts_per_step
        assert len(ids) == prompts_per_step
        assert all(abs(seen[name] - total * share) < 1 + 1e-9 for name, share in shares.items()), (
            step
        )


def test_bad_batches(prompt_set):
    with pytest.raises(ValueError, match="--prompts_per_step 8: must be a multiple of the 3 ranks"):
        batch(prompt_set, 0, world_size=3)
    for weights in ({"a": 1, "b": 1}, {"a": 1, "b": 1, "c": 1, "d": 1}, {"a": 1, "b": 1, "x": 1}):
        with pytest.raises(ValueError, match=r"--domain_weights.*each of a, b, c"):
            batch(prompt_set, 0, domain_weights=weights)
    with pytest.raises(ValueError, match="--domain_weights: at least one"):
        batch(prompt_set, 0, domain_weights={"a": 0, "b": 0, "c": 0})


# ------------------------------------------------------------------------------------------ routing


def teacher(name, *domains, weight=1.0) -> TeacherSpec:
    return TeacherSpec(name, f"models/{name}", domains or "*", weight)


def test_routes(prompt_set):
    one = (("t", 1.0),)
    assert routes((teacher("t"),), [prompt_set]) == {"a": one, "b": one, "c": one}
    table = routes(
        (teacher("x", "a"), teacher("y", "a", "b", weight=3), teacher("rest")), [prompt_set]
    )
    assert table == {"a": (("x", 0.25), ("y", 0.75)), "b": (("y", 1.0),), "c": (("rest", 1.0),)}
    with pytest.raises(ValueError, match=r"--teacher x: never used, .* or its weight is 0"):
        routes((teacher("x", "a", weight=0), teacher("y", "a", "b", "c")), [prompt_set])


def test_a_domain_only_in_the_held_out_set_needs_a_teacher_too(prompt_set, tmp_path):
    held_out = load(write(tmp_path / "e.jsonl", [row(domain="extra")]))
    with pytest.raises(
        ValueError,
        match=r"no teacher for the domains extra \(1 rows\); the teachers take x: a, b, c",
    ):
        routes((teacher("x", "a", "b", "c"),), [prompt_set, held_out])


def test_nothing_is_dropped_in_silence(prompt_set):
    with pytest.raises(ValueError, match=r"no teacher for the domains b \(15 rows\), c \(5 rows\)"):
        routes((teacher("x", "a"),), [prompt_set])
    with pytest.raises(
        ValueError, match=r"--teacher y: no row has the domain mth; the data has a \(17 rows\), b"
    ):
        routes((teacher("x"), teacher("y", "mth")), [prompt_set])
    with pytest.raises(ValueError, match="--teacher rest: never used"):
        routes((teacher("x", "a", "b", "c"), teacher("rest")), [prompt_set])


# ------------------------------------------------------------------------------------- prepare_data

SCRIPT = ROOT / "scripts" / "prepare_data.py"


def prepare(*argv) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, argv)], capture_output=True, text=True, timeout=120
    )


def test_prepare_gsm8k(tmp_path):
    rows = [
        {"question": f"what is {i} + 1000?", "answer": f"add\n#### {i + 1000:,}"} for i in range(60)
    ]
    source = write(tmp_path / "g.jsonl", rows)
    for order, name in ((rows, "one"), (rows[::-1], "two")):
        source = write(tmp_path / "g.jsonl", order)
        done = prepare(
            "gsm8k", "--source", source, "--output_dir", tmp_path / name, "--eval_fraction", 0.3
        )
        assert done.returncode == 0, done.stderr
    one, two = (
        {p: (tmp_path / n / f"{p}.jsonl").read_text().splitlines() for p in ("train", "eval")}
        for n in ("one", "two")
    )
    assert len(one["train"]) + len(one["eval"]) == 60 and 8 <= len(one["eval"]) <= 30
    assert {p: sorted(lines) for p, lines in one.items()} == {
        p: sorted(lines) for p, lines in two.items()
    }
    prompt = json.loads(one["train"][0])
    number = int(prompt["answer"].replace(",", ""))
    assert (
        prompt["data_source"] == "gsm8k"
        and f"what is {number - 1000} +" in prompt["prompt"][0]["content"]
    )
    assert prompt["response"] == f"add\n#### {number:,}"
    assert load(str(tmp_path / "one"), need_answer=True, need_response=True).counts == {"gsm8k": 60}


def test_prepare_humaneval(tmp_path):
    rows = [
        {"prompt": f"def f{i}():\n", "canonical_solution": f"    return {i}\n"} for i in range(20)
    ]
    done = prepare(
        "humaneval",
        "--source",
        write(tmp_path / "h.jsonl", rows),
        "--output_dir",
        tmp_path,
        "--eval_fraction",
        0.3,
    )
    assert done.returncode == 0, done.stderr
    prompt = json.loads((tmp_path / "eval.jsonl").read_text().splitlines()[0])
    name = prompt["answer"].split()[-1]
    assert (
        f"def f{name}()" in prompt["prompt"][0]["content"] and prompt["data_source"] == "humaneval"
    )


def test_prepare_says_what_is_wrong_in_one_line(tmp_path):
    source = write(tmp_path / "g.jsonl", [{"question": "a", "answer": "no marker"}])
    for argv, message in (
        (("gsm8k", "--source", source), "line 1: column `answer` has no final answer after ####"),
        (("humaneval", "--source", source), "line 1: column `prompt` is missing or empty"),
        (("gsm8k", "--source", tmp_path / "no.jsonl"), "no such file"),
        (("gsm8k", "--source", source, "--eval_fraction", "2"), "--eval_fraction 2.0"),
    ):
        done = prepare(*argv, "--output_dir", tmp_path / "out")
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()

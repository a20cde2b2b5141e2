#!/usr/bin/env bash
# The demo of scripts/quickstart.sh, asynchronously: rollout servers write the responses of coming steps while the trainer
# trains, log-prob servers say what the old policy makes of them, one of the two teachers is served. In the middle of the run
# one process of each role is killed in turn; servers are started again, and so is the trainer, which goes on from its last
# checkpoint. No GPU needed. KILL_AT="" kills nobody. Arguments are passed on to train_mopd.py.
set -euo pipefail
cd "$(dirname "$0")/../.."

bash scripts/setup.sh
export PATH="$(cd "${OPD_VENV:-.venv}" && pwd)/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # models this small lose more to thread barriers than they gain
export OPD_SERVER_TOKEN="${OPD_SERVER_TOKEN:-$(python -c 'import secrets; print(secrets.token_hex(16))')}"

KILL_AT="${KILL_AT-60:teacher 120:logprob 180:rollout 240:trainer}"
RUN=runs/async SERVERS=runs/async_servers WEIGHTS=runs/async_servers/weights
rm -rf "$RUN" "$SERVERS" # this run is about what happens in it: it starts afresh
mkdir -p "$SERVERS"
python scripts/make_demo.py --output_dir demo

LAUNCHERS=()
serve() { # ROLE MODEL [FLAGS]: a launcher of its own for each role; it prints the YAML lines that name its servers
    python -m opd.servers.launch "$1" "$2" --restart --log_dir "$SERVERS/$1" "${@:3}" >"$SERVERS/$1.yaml" 2>"$SERVERS/$1.log" &
    LAUNCHERS+=($!)
}
trap 'kill "${LAUNCHERS[@]}" "${TRAINER:-}" 2>/dev/null || true; wait' EXIT
serve teacher demo/teacher_addition --name addition --kv_cache_gib 0.05
serve logprob demo/student --weights_dir "$WEIGHTS"
serve rollout demo/student --weights_dir "$WEIGHTS" --kv_cache_gib 0.1 --max_model_len 28 \
    --replicas "${ROLLOUT_REPLICAS:-1}" -- --enforce_eager
for ROLE in teacher logprob rollout; do
    for _ in $(seq 600); do
        if grep -q urls "$SERVERS/$ROLE.yaml" || grep -q _servers "$SERVERS/$ROLE.yaml"; then continue 2; fi
        if ! kill -0 "${LAUNCHERS[@]}" 2>/dev/null; then break; fi
        sleep 1
    done
    cat "$SERVERS/$ROLE.log" >&2
    exit 1
done
python - "$SERVERS" <<'PY' # the demo's configuration, one teacher of it served, and the lines of the other servers
import sys, yaml
from pathlib import Path

servers = Path(sys.argv[1])
said = {role: yaml.safe_load((servers / f"{role}.yaml").read_text()) for role in ("teacher", "logprob", "rollout")}
config = yaml.safe_load(Path("scripts/quickstart.yaml").read_text())
served = said["teacher"]["teachers"][0]
config["teachers"] = [served if entry["name"] == served["name"] else entry for entry in config["teachers"]]
config |= said["logprob"] | said["rollout"]
# A server that was killed takes a while to come back, on two cores that are busy.
config |= {"mode": "async", "max_staleness": 1, "rollout_wait_s": 300.0, "teacher_wait_s": 300.0}
config |= {"old_logprobs": "server", "is_mode": "truncate", "save_every": 25}
(servers / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
PY

train() {
    deepspeed --num_gpus 1 train_mopd.py --config "$SERVERS/run.yaml" --output_dir "$RUN" "$@" &
    TRAINER=$!
}
train "$@"
for ENTRY in $KILL_AT; do
    STEP="${ENTRY%%:*}" ROLE="${ENTRY##*:}"
    until grep -q "^{\"step\": $STEP," "$RUN/metrics.jsonl" 2>/dev/null; do
        kill -0 "$TRAINER" 2>/dev/null || { wait "$TRAINER"; exit 1; }
        sleep 0.2
    done
    if [ "$ROLE" = trainer ]; then
        VICTIM="$(pgrep -P "$(pgrep -P "$TRAINER" | head -1)" -f train_mopd.py | head -1)"
        echo "--- step $STEP: killing the trainer, process $VICTIM, and starting it again"
        kill -9 "$VICTIM"
        wait "$TRAINER" || true
        train "$@"
    else
        VICTIM="$(grep -o 'process [0-9]*' "$SERVERS/$ROLE.log" | tail -1 | cut -d' ' -f2)"
        echo "--- step $STEP: killing a $ROLE server, process $VICTIM"
        kill -9 "$VICTIM"
    fi
done
wait "$TRAINER"

python -m opd.report "$RUN"
python - "$RUN" "$(wc -w <<<"$KILL_AT")" <<'PY'
import collections, json, sys
from pathlib import Path

run, kills = Path(sys.argv[1]), int(sys.argv[2])
rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
samples = [json.loads(line) for line in (run / "ledger_samples.jsonl").read_text().splitlines()]
steps = [row["step"] for row in rows]
lost = sorted(set(range(steps[-1] + 1)) - set(steps))
twice = [name for name, count in collections.Counter(row["id"] for row in samples).items() if count > 1]
lag = max(row["step"] - 1 - row["policy_version"] for row in samples)
idle = sorted(row["perf/trainer_idle"] for row in rows if row["step"] > 0)[len(rows) // 2]
print(f"{kills} processes killed; {len(samples)} samples, {len(twice)} of them twice; steps lost: {lost or 'none'}; "
      f"staleness at most {lag}; the trainer was idle for {idle:.0%} of a step (median)")
sys.exit(bool(lost or twice or lag > 1))
PY

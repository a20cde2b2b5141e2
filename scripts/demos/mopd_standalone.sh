#!/usr/bin/env bash
# The demo of scripts/quickstart.sh with one of its teachers behind two servers, one of which is killed in the middle of the
# run. No GPU needed. PROTOCOL=json takes vLLM servers, which send top-k instead of hidden states. Arguments are passed on to
# train_mopd.py.
set -euo pipefail
cd "$(dirname "$0")/../.."

bash scripts/setup.sh
export PATH="$(cd "${OPD_VENV:-.venv}" && pwd)/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # models this small lose more to thread barriers than they gain

PROTOCOL="${PROTOCOL:-binary}" KILL_AT="${KILL_AT:-150}"
RUN=runs/standalone SERVERS=runs/standalone_servers
rm -rf "$RUN" "$SERVERS" # this run is about what happens in it: it starts afresh
mkdir -p "$SERVERS"
python scripts/make_demo.py --output_dir demo

serve() { # one server; a launcher of its own, so that both may share the trainer's GPU
    local on_gpu=()
    # vLLM looks for free memory before it reads how little it may take
    if nvidia-smi -L >/dev/null 2>&1 && [ "$PROTOCOL" = json ]; then on_gpu=(-- --gpu-memory-utilization 0.05); fi
    exec python -m opd.servers.launch teacher demo/teacher_addition --name addition --protocol "$PROTOCOL" --kv_cache_gib 0.05 \
        --log_dir "$SERVERS/$1" "${on_gpu[@]}" >"$SERVERS/$1.yaml" 2>"$SERVERS/$1.log"
}
serve first & FIRST=$!
serve second & SECOND=$!
trap 'kill "$FIRST" "$SECOND" 2>/dev/null || true; wait' EXIT
for NAME in first second; do
    for _ in $(seq 600); do
        if grep -q urls "$SERVERS/$NAME.yaml" 2>/dev/null; then continue 2; fi
        kill -0 "$FIRST" 2>/dev/null && kill -0 "$SECOND" 2>/dev/null || break
        sleep 1
    done
    cat "$SERVERS/$NAME.log" >&2
    exit 1
done
VICTIM="$(grep -o 'process [0-9]*' "$SERVERS/first.log" | cut -d' ' -f2)"
python - "$SERVERS" <<'PY' # the demo's configuration, with one entry of it changed
import sys, yaml
from pathlib import Path

servers = Path(sys.argv[1])
config = yaml.safe_load(Path("scripts/quickstart.yaml").read_text())
entries = [yaml.safe_load((servers / f"{name}.yaml").read_text())["teachers"][0] for name in ("first", "second")]
served = {**entries[0], "urls": [url for entry in entries for url in entry["urls"]]}
config["teachers"] = [served if entry["name"] == served["name"] else entry for entry in config["teachers"]]
(servers / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
PY
grep -A 6 "name: addition" "$SERVERS/run.yaml"

SUPPORT=()
if [ "$PROTOCOL" = json ]; then SUPPORT=(--support auto --support_k 16); fi
deepspeed --num_gpus 1 train_mopd.py --config "$SERVERS/run.yaml" --output_dir "$RUN" "${SUPPORT[@]}" "$@" &
TRAINER=$!
until grep -q "^{\"step\": $KILL_AT," "$RUN/metrics.jsonl" 2>/dev/null; do
    kill -0 "$TRAINER" 2>/dev/null || { wait "$TRAINER"; exit 1; }
    sleep 0.2
done
echo "--- step $KILL_AT: killing the server with process $VICTIM"
kill -9 "$VICTIM"
wait "$TRAINER"

python -m opd.report "$RUN"
python - "$RUN/metrics.jsonl" <<'PY'
import json, sys

rows = [json.loads(line) for line in open(sys.argv[1])]
steps = [row["step"] for row in rows]
lost = sorted(set(range(steps[-1] + 1)) - set(steps))
out = [row["step"] for row in rows if row.get("teacher/ejections/addition")]
again = sum(row.get("teacher/failovers/addition", 0) for row in rows)
print(f"replicas left the rotation in steps {out}; {again:.0f} requests went elsewhere; steps lost: {lost or 'none'}")
sys.exit(not out or bool(lost))
PY

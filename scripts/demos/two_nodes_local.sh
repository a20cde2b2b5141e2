#!/usr/bin/env bash
# Two hosts on one machine: two Linux network namespaces with an address each, joined by one cable. A rank of train_mopd.py
# runs on each, and a teacher's server on the second. In the middle of step 2 the cable is pulled, and put back DOWN_S
# seconds later; the run must end as if nothing had been. Needs root and iproute2. Arguments are passed on to train_mopd.py.
#
#   MODELS   directory with student, teacher_addition, teacher_reversal and train.jsonl (default: the demo, made if need be)
#   RUN      output directory (default: runs/two_nodes)      DOWN_S   seconds without a cable (default: 6)
set -euo pipefail
cd "$(dirname "$0")/../.."

MODELS="${MODELS:-demo}" RUN="${RUN:-runs/two_nodes}" DOWN_S="${DOWN_S:-6}"
WAIT_S="${WAIT_S:-300}" # for the server to load, for a step, for the end of the run
HERE="opd-$$-a" THERE="opd-$$-b"
ADDRESS_HERE=192.0.2.1 ADDRESS_THERE=192.0.2.2 # reserved for documentation, and seen in these namespaces only

refuse() { echo "two_nodes_local.sh: $1" >&2; exit 2; }
[ "$(id -u)" = 0 ] || refuse "network namespaces need root"
command -v ip >/dev/null || refuse "the command ip is missing: install iproute2"

cleanup() {
    local status=$? name
    trap - EXIT
    for name in "$HERE" "$THERE"; do
        # whatever runs inside a namespace of ours was started here
        ip netns pids "$name" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
        ip netns del "$name" 2>/dev/null || true # its end of the cable goes with it, and so the other
    done
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

ip netns add "$HERE" 2>/dev/null || refuse "this machine allows no network namespaces (a container needs CAP_SYS_ADMIN)"
ip netns add "$THERE"
ip link add cable netns "$HERE" type veth peer name cable netns "$THERE"
ip -n "$HERE" address add "$ADDRESS_HERE/30" dev cable
ip -n "$THERE" address add "$ADDRESS_THERE/30" dev cable
for NAME in "$HERE" "$THERE"; do
    ip -n "$NAME" link set lo up
    ip -n "$NAME" link set cable up
done

bash scripts/setup.sh
export PATH="$(cd "${OPD_VENV:-.venv}" && pwd)/bin:$PATH"
export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export OPD_SERVER_TOKEN="${OPD_SERVER_TOKEN:-$(python -c 'import secrets; print(secrets.token_urlsafe(32))')}"
[ -e "$MODELS/train.jsonl" ] || python scripts/make_demo.py --output_dir "$MODELS"
rm -rf "$RUN" # this run is about what happens in it: it starts afresh
LOGS="$RUN.hosts" && rm -rf "$LOGS" && mkdir -p "$LOGS"

await() { # await SECONDS WHAT LOG PID COMMAND...: until the command succeeds while PID lives
    local until=$((SECONDS + $1)) what="$2" log="$3" pid="$4"
    shift 4
    until "$@" 2>/dev/null; do
        if [ "$SECONDS" -ge "$until" ] || ! kill -0 "$pid" 2>/dev/null; then
            tail -n 40 "$log" >&2
            echo "two_nodes_local.sh: $what did not come; the end of $log is above" >&2
            exit 1
        fi
        sleep 0.2
    done
}

ip netns exec "$THERE" python -m opd.servers.scoring_server --model "$MODELS/teacher_addition" --name addition \
    --host "$ADDRESS_THERE" --kv_cache_gib 0.05 >"$LOGS/server.log" 2>&1 & SERVER=$!
await "$WAIT_S" "the teacher's server" "$LOGS/server.log" "$SERVER" grep -q "^serving" "$LOGS/server.log"
URL="$(sed -n 's/^serving .* at //p' "$LOGS/server.log")"
echo "--- a teacher at $URL, a rank at $ADDRESS_HERE, a rank at $ADDRESS_THERE"

cat >"$LOGS/run.yaml" <<YAML
student_model: $MODELS/student
teachers:
  - {name: addition, backend: server, urls: ["$URL"], api_key_env: OPD_SERVER_TOKEN, domains: [addition]}
  - {name: reversal, model: $MODELS/teacher_reversal, domains: [reversal]}
data: [$MODELS/train.jsonl]
output_dir: $RUN
num_steps: 3
prompts_per_step: 8
micro_batch_size: 4
max_prompt_tokens: 16
max_response_tokens: 8
rollout_kv_cache_gib: 0.05
teacher_kv_cache_gib: 0.05
enforce_eager: true
YAML

rank() { # rank NAMESPACE NUMBER: both hold still for 3 s in step 2, so that the cable goes while a step is under way
    exec ip netns exec "$1" env GLOO_SOCKET_IFNAME=cable OPD_FAULT=rollout:delay=3@2 OPD_FAULT_RANK=all \
        torchrun --nnodes 2 --nproc-per-node 1 --node-rank "$2" --master-addr "$ADDRESS_HERE" --master-port 29500 \
        train_mopd.py --config "$LOGS/run.yaml" "${@:3}" >"$LOGS/rank_$2.log" 2>&1
}
rank "$HERE" 0 "$@" & FIRST=$!
rank "$THERE" 1 "$@" & SECOND=$!
await "$WAIT_S" "step 1" "$LOGS/rank_0.log" "$FIRST" grep -q '^{"step": 1,' "$RUN/metrics.jsonl"
echo "--- step 2 is under way: the cable is pulled for $DOWN_S s"
ip -n "$THERE" link set cable down
sleep "$DOWN_S"
ip -n "$THERE" link set cable up
echo "--- the cable is back"

ended() { ! kill -0 "$FIRST" 2>/dev/null && ! kill -0 "$SECOND" 2>/dev/null; }
await "$WAIT_S" "the end of the run" "$LOGS/rank_0.log" "$SERVER" ended
for RANK in "$FIRST" "$SECOND"; do
    wait "$RANK" || { tail -n 40 "$LOGS"/rank_*.log >&2; exit 1; }
done
python - "$RUN/metrics.jsonl" <<'PY'
import json, sys

rows = [json.loads(line) for line in open(sys.argv[1])]
assert [row["step"] for row in rows] == [1, 2, 3], f"steps {[row['step'] for row in rows]}"
again = sum(row.get("teacher/failovers/addition", 0) + row.get("teacher/retries/addition", 0) for row in rows)
seconds = ", ".join(f"{row['time/step']:.1f}" for row in rows)
print(f"3 steps on two hosts, {seconds} s; {again:.0f} requests asked again while the cable was out")
PY

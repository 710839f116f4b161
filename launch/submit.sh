#!/usr/bin/env bash
# Submits a training job to a Ray cluster and follows it; Ctrl-C stops the job, which saves a checkpoint first:
#   launch/submit.sh --dataset tinyimagenet --num-workers 8
# The cluster is the one that RAY_API_SERVER_ADDRESS names; RAY_AUTH_MODE=token sends the token of RAY_AUTH_TOKEN_PATH.
set -euo pipefail

: "${RAY_API_SERVER_ADDRESS:?set it to the dashboard of your cluster, e.g. http://127.0.0.1:8265}"
job="ali-$(date +%Y%m%d-%H%M%S)-$$"
submit=
stop() {
    trap '' INT TERM
    [ -n "$submit" ] || exit 130
    pause=1 patience=$((SECONDS + 120))
    # Ray refuses to stop a job it does not know yet, and forgets it for one without a process: so until the end is seen
    while kill -0 "$submit" 2>/dev/null; do
        if timeout 30 ray job stop --no-wait "$job" >/dev/null 2>&1; then
            pause=5 patience=$((SECONDS + 120))
        elif [ "$SECONDS" -gt "$patience" ]; then
            echo "error: Ray does not take the request to stop $job: try  ray job stop $job" >&2
            kill -TERM "$submit"
        fi
        for _ in $(seq "$((pause * 5))"); do
            kill -0 "$submit" 2>/dev/null || break
            sleep 0.2
        done
    done
    wait "$submit" 2>/dev/null || true
    exit 130
}
trap stop INT TERM
setsid ray job submit --log-color false --submission-id "$job" \
    --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}' \
    -- python -m ali_dist.launch "$@" &
submit=$!
wait "$submit"

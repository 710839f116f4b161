#!/usr/bin/env bash
# Runs a command against a Ray of its own on this machine, with token authentication, and stops that Ray afterwards:
#   launch/local.sh ray job submit -- python -m ali_dist.launch --dataset digits
#   launch/local.sh python -m ali_dist.launch --dataset digits
# Ray's files are in a temporary folder; after a failure it is kept and named. RAY_HEAD_FLAGS adds flags to `ray start`.
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: launch/local.sh COMMAND [ARGUMENT...]" >&2
    exit 2
fi
while read -r name; do # what the caller's shell says of another Ray must not reach this one
    [ "$name" = RAY_HEAD_FLAGS ] || unset "$name"
done < <(compgen -e RAY_)

folder=$(mktemp -d "${TMPDIR:-/tmp}/ali.XXXXXX") # short: Ray puts sockets below it, whose paths may have 107 bytes
python=$(command -v python || command -v python3)
read -r gcs dashboard client < <("$python" - <<'EOF'
import socket
sockets = [socket.socket() for _ in range(3)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))
EOF
)
(umask 077 && "$python" -c 'import secrets; print(secrets.token_hex(32))' >"$folder/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token"
export RAY_JOB_STOP_WAIT_TIME_S=60 # what a stopped job may take to save; Ray's own default is 3
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=60 # likewise on nodes that join and get SIGTERM
export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=3000 # a lost node is found in 5 to 20 s, not 15 to 65

head=
command=
# shellcheck disable=SC2329
finish() {
    status=$?
    trap '' INT TERM
    if [ -n "$head" ]; then
        kill -TERM "$head" 2>/dev/null || true
        for _ in $(seq 50); do # Ray would wait half a minute for actors that have no job any more
            pgrep -s "$head" >/dev/null || break
            sleep 0.1
        done
        pkill -KILL -s "$head" || true
        wait "$head" 2>/dev/null || true
    fi
    if [ "$status" -eq 0 ]; then
        rm -rf "$folder"
    else
        echo "Ray's logs are in $folder" >&2
    fi
    exit "$status"
}
trap finish EXIT
trap '[ -z "$command" ] || kill -TERM "$command" 2>/dev/null' INT TERM

# setsid: Ctrl-C in the terminal is for the command, which may want a moment of Ray still. Nothing trains when this Ray ends.
# shellcheck disable=SC2086
RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 setsid ray start --head --block --port="$gcs" --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 \
    --dashboard-port="$dashboard" --ray-client-server-port="$client" --dashboard-agent-listen-port=0 \
    --metrics-export-port=0 --temp-dir="$folder" --disable-usage-stats ${RAY_HEAD_FLAGS:-} >"$folder/head.log" 2>&1 &
head=$!
export RAY_API_SERVER_ADDRESS="http://127.0.0.1:$dashboard" RAY_ADDRESS="127.0.0.1:$gcs"
"$python" - "$RAY_API_SERVER_ADDRESS/api/jobs/" "$folder/token" "$head" <<'EOF' || { cat "$folder/head.log" >&2; exit 1; }
import os, sys, time, urllib.request
url, token, head = sys.argv[1], open(sys.argv[2]).read().strip(), int(sys.argv[3])
for _ in range(600):
    try:
        urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"}), timeout=5)
        break
    except OSError:
        os.kill(head, 0)
        time.sleep(0.1)
else:
    sys.exit("Ray did not start within a minute")
EOF

"$@" <&0 & # without <&0 a background command reads nothing
command=$!
while :; do # a signal ends `wait` early; the command decides when it is done
    if wait "$command"; then status=0; else status=$?; fi
    kill -0 "$command" 2>/dev/null || break
done
exit "$status"

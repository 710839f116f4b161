#!/usr/bin/env bash
# Starts one machine's part of a Ray cluster by hand, in the foreground, with token authentication:
#   launch/node.sh head                     on the first machine; further flags go to `ray start`
#   launch/node.sh worker HEAD_ADDRESS:6379 on each of the others, with the same token file
# The token is in $RAY_AUTH_TOKEN_PATH, by default ~/.ray/auth_token: the head makes it if there is none, the others need a
# copy. The environment that `launch/tls.sh` prints encrypts what Ray sends. SIGTERM ends the node, once what
# trains there has saved; a worker whose Ray ends by itself, as after it was cut off from the head for long, joins again.
set -euo pipefail

usage() {
    echo "usage: launch/node.sh head [FLAG...] | launch/node.sh worker HEAD_ADDRESS:PORT [FLAG...]" >&2
    exit 2
}
role=${1:-}
[ $# -gt 0 ] && shift
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
export RAY_JOB_STOP_WAIT_TIME_S=60 # what a stopped job may take to save; Ray's own default is 3
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-60}" # likewise after SIGTERM

case $role in
head)
    if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
        mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
        (umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
    fi
    export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=3000 # a lost node is found in 5 to 20 s, not 15 to 65
    set -- --head --dashboard-host=127.0.0.1 "$@"
    ;;
worker)
    [ $# -gt 0 ] || usage
    if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
        echo "error: no token in $RAY_AUTH_TOKEN_PATH: copy the head's file there" >&2
        exit 2
    fi
    address=$1
    shift
    set -- --address="$address" "$@"
    ;;
*) usage ;;
esac
chmod 600 "$RAY_AUTH_TOKEN_PATH"
start=(ray start --block --disable-usage-stats --dashboard-agent-listen-port=0 "$@")
[ "$role" = worker ] || exec "${start[@]}"

ended=
ray=
trap 'ended=yes; [ -z "$ray" ] || kill -TERM "$ray" 2>/dev/null || true' INT TERM
while :; do
    "${start[@]}" &
    ray=$!
    while :; do # a signal ends `wait` early
        if wait "$ray"; then status=0; else status=$?; fi
        kill -0 "$ray" 2>/dev/null || break
    done
    [ -z "$ended" ] || exit "$status"
    echo "Ray has ended here with status $status: this node joins again" >&2
    sleep 5 &
    wait $! || true
    [ -z "$ended" ] || exit "$status"
done

#!/usr/bin/env bash
#SBATCH --job-name=ali
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
# A Ray cluster over the job's nodes, and a training job on it; flags before the script's name replace those above:
#   sbatch --nodes=4 launch/slurm.sh --dataset imagenet64 --num-workers 32 --data /shared/data --storage /shared/runs
# Submit it from the project's folder with its environment active. Before the time limit the run saves and the job queues
# again, to continue. `scancel --batch --signal=INT JOB` saves and ends. $ALI_SCRATCH is a folder that all nodes see.
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "usage: sbatch [FLAG...] launch/slurm.sh --dataset NAME [FLAG of ali_dist.launch...]" >&2
    exit 2
fi
launch="$SLURM_SUBMIT_DIR/launch" # Slurm runs a copy of this file, elsewhere
scratch="${ALI_SCRATCH:-$HOME}/.ali-$SLURM_JOB_ID"
port=$((20000 + SLURM_JOB_ID % 3000 * 3)) # two jobs may share a machine
(umask 077 && mkdir -p "$scratch" && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$scratch/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$scratch/token"
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # these nodes end after their job, which the signals below have save

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
on_head=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head")
address=$("${on_head[@]}" sh -c 'hostname -I || hostname -i' | awk '{print $1}')
# shellcheck disable=SC2329
finish() {
    status=$?
    trap '' USR1 INT TERM
    rm -rf "$scratch" # first: Slurm kills what does not end in time
    # shellcheck disable=SC2046
    kill $(jobs -p) 2>/dev/null || true
    wait
    exit "$status"
}
trap finish EXIT

submit=
again=
requeue() { [ -z "$again" ] || scontrol requeue "$SLURM_JOB_ID"; }
# shellcheck disable=SC2329
stop() {
    if [ -z "$submit" ]; then # there is nothing to be saved yet
        requeue
        exit 130
    fi
    kill -TERM "$submit" 2>/dev/null || true
}
trap stop INT TERM
trap 'again=yes; stop' USR1
"${on_head[@]}" "$launch/node.sh" head --node-ip-address="$address" --port="$port" --dashboard-port=$((port + 1)) \
    --ray-client-server-port=$((port + 2)) &
ray=$!
export RAY_ADDRESS="$address:$port" RAY_API_SERVER_ADDRESS="http://127.0.0.1:$((port + 1))"
until ray job submit --no-wait -- true >/dev/null 2>&1; do # Ray takes jobs some seconds after its start
    kill -0 "$ray" # the head has ended: so does this script
    sleep 1
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --overlap --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
        "$launch/node.sh" worker "$RAY_ADDRESS" &
fi

"$launch/submit.sh" --wait-seconds 300 "$@" &
submit=$!
while :; do # a signal ends `wait` early; the training decides when it is done
    if wait "$submit"; then status=0; else status=$?; fi
    kill -0 "$submit" 2>/dev/null || break
done
requeue
exit "$status"

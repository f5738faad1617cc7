#!/usr/bin/env bash
#SBATCH --job-name=darwin
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
# A campaign in a Slurm allocation: a Ray cluster of the nodes that it has, and the driver beside the head.
# Usage: sbatch [OPTION]... slurm.sh CAMPAIGN.yaml [KEY=VALUE]...
#
# Five minutes before the time is over the driver saves its state, and the job is queued again; so is one whose
# first node is lost. It goes on from the campaign's store. Other nodes may be lost: the campaign goes on with the
# rest. Darwin must be on the PATH of all nodes, and the store and the campaign's files must mean the same there.
set -euo pipefail
if [ $# = 0 ]; then
    echo "usage: sbatch [OPTION]... slurm.sh CAMPAIGN.yaml [KEY=VALUE]..." >&2
    exit 2
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
# Others may have a job of theirs on the same machine.
port=$((20000 + SLURM_JOB_ID % 10000))
agent=$((port + 10000))

# Ray executes what its clients send: only who has this token is a client. Nobody else can read it.
folder=${DARWIN_SLURM_FOLDER:-$HOME/.darwin/slurm}/$SLURM_JOB_ID
mkdir -p "$folder"
chmod 700 "$folder"
trap 'rm -rf "$folder"' EXIT
(umask 077 && od --address-radix=n --format=x1 --read-bytes=32 /dev/urandom | tr -d ' \n' > "$folder/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token" RAY_USAGE_STATS_ENABLED=0
# A path of a socket must not be long, and the folder not one that others have, or could make before.
unguessed=$(od --address-radix=n --format=x4 --read-bytes=4 /dev/urandom | tr -d ' \n')
export RAY_TMPDIR=${RAY_TMPDIR:-/tmp/darwin-$SLURM_JOB_ID-$unguessed}

on() {
    local node=$1
    shift
    exec srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap "$@"
}

start=(ray start --block --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --disable-usage-stats
       --dashboard-agent-listen-port="$agent" --object-store-memory=134217728)
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
    start+=(--num-gpus="$SLURM_GPUS_ON_NODE")
fi

(on "$head" "${start[@]}" --head --port="$port" --include-dashboard=false) &
ray=$!
for attempt in {1..60}; do
    kill -0 "$ray" 2>/dev/null || { echo "Ray does not start on $head" >&2; exit 1; }
    if (on "$head" ray health-check --address "$head:$port") >/dev/null 2>&1; then break; fi
    if [ "$attempt" = 60 ]; then echo "Ray on $head does not answer" >&2; exit 1; fi
    sleep 1
done
for node in "${nodes[@]:1}"; do
    (on "$node" "${start[@]}" --address="$head:$port") &
done

(on "$head" darwin run "$@" address="$head:$port") &
driver=$!
again=no
trap 'again=yes; kill -TERM "$driver" 2>/dev/null || true' USR1
trap 'kill -TERM "$driver" 2>/dev/null || true' TERM INT
# `wait` also ends when a signal comes, or the head does.
code=0
while kill -0 "$driver" 2>/dev/null; do
    if ! kill -0 "$ray" 2>/dev/null; then
        echo "Ray has ended on $head: given again, the campaign goes on" >&2
        kill -TERM "$driver" 2>/dev/null || true
        wait "$driver" || true
        code=1
        break
    fi
    code=0
    wait -n "$driver" "$ray" || code=$?
done

# Slurm ends what is left, Ray's nodes, when this does.
if [ "$again" = yes ] && [ "$code" != 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

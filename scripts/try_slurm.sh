#!/bin/bash
# Run scripts/slurm.sh on a real Slurm: Debian's packages, two daemons on this host; the second machine fails in between.
#
#   sudo env PATH="$PATH" scripts/try_slurm.sh        # on a machine or in a container to be thrown away; ten minutes on two busy cores
#
# As root, with the project's environment activated. It installs Slurm and munge, and names two hosts in /etc/hosts.
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "error: Slurm's daemons need root" >&2; exit 1; }
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d /tmp/try_slurm.XXXXXX)
export SLURM_CONF=$work/slurm.conf PYTHONPATH=$root OMP_NUM_THREADS=1 DEBIAN_FRONTEND=noninteractive
apt-get update -qq && apt-get install -qq -y --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
grep -q 'slurm-one' /etc/hosts || echo '127.0.0.1 slurm-one slurm-two' >> /etc/hosts
cat > "$SLURM_CONF" <<END
ClusterName=try
SlurmctldHost=$(hostname)
SlurmUser=root
SlurmctldPort=17000
StateSaveLocation=$work
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/%n.pid
SlurmdSpoolDir=$work/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SelectType=select/linear
JobRequeue=1
MinJobAge=3600
SlurmdParameters=config_overrides
NodeName=slurm-one NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17001 CPUs=1 State=UNKNOWN
NodeName=slurm-two NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17002 CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
mkdir -p "$work/slurm-one" "$work/slurm-two" /run/munge
chown munge /run/munge
pgrep -x munged >/dev/null || runuser -u munge -- /usr/sbin/munged
daemons=()
trap 'scancel --partition all 2>/dev/null || true; sleep 5; kill -9 "${daemons[@]}" 2>/dev/null || true' EXIT
slurmctld -D >"$work/slurmctld.log" 2>&1 & daemons+=($!)
for node in slurm-one slurm-two; do slurmd -D -N $node >"$work/$node.log" 2>&1 & daemons+=($!); done
wait_for() { for _ in $(seq 900); do if eval "$1"; then return; fi; sleep 1; done; echo "error: never came: $1 (see $work)" >&2; tail -n 20 "$work"/*.log "$work"/project/slurm-*.out >&2; exit 1; }
wait_for '[ "$(sinfo -h -t idle -o %D)" = 2 ]'

python -c "from srl_pose.benchmarks.survive import make_project; make_project('$work/project', epochs=5)"
cd "$work/project"
export PYTHONPATH=$work/project PROCESSES_PER_NODE=1
job=$(sbatch --parsable --nodes 2 --cpus-per-task 1 scripts/slurm.sh tiny)
wait_for "grep -qs 'epoch 2/5' slurm-$job.out"
scontrol update nodename=slurm-two state=down reason=try
sleep 3
scontrol update nodename=slurm-two state=resume 2>/dev/null || true # it may have come back by itself
wait_for "grep -qs 'continuing at epoch' slurm-$job.out"
wait_for "[ -s outputs/tiny/tiny/runs/tiny-0/train.json ]"
grep -h 'continuing at epoch' "slurm-$job.out"
python -c "import json; t = json.load(open('outputs/tiny/tiny/runs/tiny-0/train.json')); assert t['processes'] == 2 and t['interruptions'] >= 1; print('trained on two machines, after', t['interruptions'], 'failure')"

cd / && rm -rf "$work"

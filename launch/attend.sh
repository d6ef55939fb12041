#!/usr/bin/env bash
# launch/attend.sh FILE COMMAND…: runs COMMAND, hands SIGTERM on to it, and leaves its exit code in
# FILE, %t in its name being the SLURM task. tpu_pod.sh and slurm.sbatch need each host's own code:
# ssh and srun tell one for all.
set -uo pipefail

file=${1//%t/${SLURM_PROCID:-0}} child='' signalled='' code=0
shift
trap 'signalled=1; [[ ! $child ]] || kill -TERM "$child" 2>/dev/null' TERM
"$@" &
child=$!
[[ ! $signalled ]] || kill -TERM "$child" 2>/dev/null # it came before there was a child
while kill -0 "$child" 2>/dev/null; do # a signal ends the wait, not the command
  wait "$child"
done
wait "$child" || code=$? # bash remembers it
echo "$code" >"$file.new" && mv "$file.new" "$file"
exit "$code"

#!/usr/bin/env bash
# launch/run_with_exit_code.sh FILE COMMAND…: runs COMMAND, leaves its process number in FILE.pid and its exit
# code in FILE, %t in the name being the SLURM task. tpu_pod.sh and slurm.sbatch need each host's own
# code: ssh and srun tell one for all.
#
# SIGTERM does not end it before COMMAND ends. SLURM signals only the process that it started, so
# there it is handed on, once; a machine that goes down signals every process itself.
set -uo pipefail

file=${1//%t/${SLURM_PROCID:-0}} child='' signalled='' code=0
shift
hand_on() {
  signalled=1
  [[ ! $child || ! ${SLURM_PROCID:-} ]] || kill -TERM "$child" 2>/dev/null
}
trap hand_on TERM
"$@" &
child=$!
[[ ! $signalled ]] || hand_on # it came before there was a child
echo "$child" >"$file.pid"
while kill -0 "$child" 2>/dev/null; do # a signal ends the wait, not the command
  wait "$child"
done
wait "$child" || code=$? # bash remembers it
echo "$code" >"$file.new" && mv "$file.new" "$file"
exit "$code"

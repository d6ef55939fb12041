# Sourced by tpu_pod.sh and slurm.sbatch: what follows after every host of a run has ended.
# shellcheck shell=bash

# Reads the hosts' exit codes from stdin, one a line, and prints one word:
#   finished  every host exited with 0
#   2, 3, 74  a user's mistake, training diverged, a full disk: running it again cannot help
#   again     saved after SIGTERM (75), a host stalled or was lost (76), or SIGTERM came while the
#             command was starting (143): the same command continues
#   crashed   anything else, also no code at all: worth a limited number of further attempts
verdict() {
  local code word=none
  while read -r code; do
    case $code in
      '') ;;
      0) [[ $word != none ]] || word=finished ;;
      2 | 3 | 74) echo "$code" && cat >/dev/null && return ;;
      75 | 76 | 143) [[ $word == crashed ]] || word=again ;;
      *) word=crashed ;;
    esac
  done
  [[ $word != none ]] || word=crashed
  echo "$word"
}

#!/usr/bin/env bash
# What tpu_pod.sh runs on every TPU worker. The checkout lies in ~/xllm_jax, the run's log, process
# number and exit code in ~/xllm_run. Training is detached: it survives the connection that began it.
set -euo pipefail

CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RUN=$HOME/xllm_run
NAME=$(hostname -s)

# setup bucket NAME | setup folder PATH
setup() {
  local folder=$2
  if [[ $1 == bucket ]]; then
    folder=$HOME/bucket
    mount_bucket "$2" "$folder"
  fi
  mkdir -p "$folder"/{bases,data,runs}
  for name in bases data runs; do ln -sfn "$folder/$name" "$CODE/$name"; done
  # The images of TPU VMs have Python 3.10; uv brings a newer one.
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  cd "$CODE"
  PATH=$HOME/.local/bin:$PATH
  uv venv --quiet --allow-existing --python 3.11 .venv
  uv pip install --quiet --python .venv/bin/python --constraint requirements.lock -e '.[tpu]'
  touch .venv/ready
  echo "$NAME is ready"
}

mount_bucket() {
  if ! command -v gcsfuse >/dev/null; then
    local list=/etc/apt/sources.list.d/gcsfuse.list key=/usr/share/keyrings/cloud.google.asc
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee "$list" >/dev/null
    sudo apt-get -qq update
    sudo apt-get -qq install -y gcsfuse
  fi
  mkdir -p "$2"
  mountpoint -q "$2" || gcsfuse --implicit-dirs "$1" "$2"
}

running() { [[ -s $RUN/pid ]] && kill -0 "$(<"$RUN/pid")" 2>/dev/null; }

start() {
  mkdir -p "$RUN"
  if running; then
    echo "$NAME trains already"
    return
  fi
  rm -f "$RUN/exit" "$RUN/exit.pid"
  cd "$CODE"
  echo "--- $(date -u '+%F %T') $NAME: launch/train.py --hosts=auto $*" >>"$RUN/log"
  setsid bash launch/run_with_exit_code.sh "$RUN/exit" .venv/bin/python launch/train.py --hosts=auto "$@" \
    >>"$RUN/log" 2>&1 </dev/null &
  echo $! >"$RUN/pid"
}

# Shows the end of the log and what is added, until training ends.
follow() {
  [[ -s $RUN/pid ]] || { echo "$NAME has not trained" && return; }
  tail -n 30 -F --pid="$(<"$RUN/pid")" "$RUN/log" 2>/dev/null | sed -u "s/^/[$NAME] /"
}

# One line: 'NAME bare', 'NAME idle', 'NAME running' or 'NAME exit CODE'.
report() {
  if [[ ! -e $CODE/.venv/ready ]]; then
    echo "$NAME bare"
  elif running; then
    echo "$NAME running"
  elif [[ -s $RUN/exit ]]; then
    echo "$NAME exit $(<"$RUN/exit")"
  elif [[ -s $RUN/pid ]]; then
    echo "$NAME exit 137" # it left no code: killed, or the machine started again
  else
    echo "$NAME idle"
  fi
}

# SIGTERM: training saves and exits with 75.
stop() {
  running || { echo "$NAME does not train" && return; }
  kill -TERM "$(<"$RUN/exit.pid")"
  tail -f --pid="$(<"$RUN/pid")" /dev/null
  report
}

"$@"

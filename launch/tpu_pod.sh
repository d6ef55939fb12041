#!/usr/bin/env bash
# Trains on Cloud TPU slices by queued resources; see usage below and docs/scale.md.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/launch/exit_codes.sh"

usage() {
  cat <<'TEXT'
launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- FLAGS OF launch/train.py]

Commands
  run      all of the following in turn, again after preemption, until training is done;
           may be stopped and started at any time, training goes on meanwhile
  create   ask for the slices and wait until they are active
  setup    copy this checkout to every worker and install it
  start    start training on every worker, detached
  follow   show every worker's log until training ends
  status   the queued resource's state and one line a worker
  stop     SIGTERM: every worker saves and ends with exit code 75
  delete   give the slices back

Options
  --type=TYPE        slice: v5e-16, v5p-32, v6e-8, v4-32         (create, run)
  --slices=N         how many of them; 1
  --spot --reserved  how they are paid; on demand by default
  --runtime=VERSION  TPU software; by TYPE
  --create-flag=F    one more flag for gcloud … queued-resources create; may be repeated
  --bucket=NAME      bucket with bases/, data/ and runs/, mounted by gcsfuse (setup, run)
  --folder=PATH      the same as a folder that every worker sees, in place of a bucket
  --source=URL[@REF] git repository to install in place of this checkout
  --project=PROJECT  gcloud's by default
  --retries=N        attempts after crashes; preemptions do not count; 5
  --poll=SECONDS     between two looks at the state; 30

Exit codes: launch/train.py's (0 done, 2 a user's mistake, 3 diverged); 1 crashed too often.
TEXT
}

say() { echo "$(date -u '+%F %T') $*" >&2; }

fail() {
  echo "$1" >&2
  exit "${2:-2}"
}

URL='' REF='' COMMAND='' NAME='' ZONE='' TYPE='' SLICES=1 PAID='' RUNTIME='' BUCKET='' FOLDER='' SOURCE=''
PROJECT='' RETRIES=5 POLL=30 CREATE=() FLAGS=()

parse() {
  COMMAND=${1:-}
  case $COMMAND in
    run | create | setup | start | follow | status | stop | delete) shift ;;
    '' | help | -h | --help) usage && exit 0 ;;
    *) fail "$COMMAND: unknown command. Choices: run create setup start follow status stop delete" ;;
  esac
  while (($#)); do
    case $1 in
      --name=?*) NAME=${1#*=} ;;
      --zone=?*) ZONE=${1#*=} ;;
      --type=?*) TYPE=${1#*=} ;;
      --slices=?*) SLICES=${1#*=} ;;
      --spot | --reserved) PAID=$1 ;;
      --runtime=?*) RUNTIME=${1#*=} ;;
      --create-flag=?*) CREATE+=("${1#*=}") ;;
      --bucket=?*) BUCKET=${1#*=} ;;
      --folder=?*) FOLDER=${1#*=} ;;
      --source=?*) SOURCE=${1#*=} ;;
      --project=?*) PROJECT=${1#*=} ;;
      --retries=?*) RETRIES=${1#*=} ;;
      --poll=?*) POLL=${1#*=} ;;
      --) shift && FLAGS=("$@") && break ;;
      *) fail "$1: unknown option, or one without its value. launch/tpu_pod.sh --help tells them" ;;
    esac
    shift
  done
  check
}

check() {
  [[ $NAME ]] || fail "--name: this option is required. Name of the queued resource"
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$ ]] ||
    fail "--name: $NAME is no name. Use small letters, digits and -, a letter first"
  [[ $ZONE ]] || fail "--zone: this option is required. Such as us-west4-a"
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] || fail "--slices: $SLICES is no positive number"
  [[ $RETRIES =~ ^[0-9]+$ ]] || fail "--retries: $RETRIES is no number"
  [[ $POLL =~ ^[0-9]+$ ]] || fail "--poll: $POLL is no number of seconds"
  case $COMMAND in run | create) check_type ;; esac
  case $COMMAND in run | setup) check_folder ;; esac
  case $COMMAND in run | start) check_flags ;; esac
  command -v gcloud >/dev/null || fail "gcloud: not found. Install the Google Cloud CLI"
}

check_type() {
  [[ $TYPE ]] || fail "--type: this option is required. Such as v5e-16"
  TYPE=${TYPE/#v5e-/v5litepod-} # the name that is rented
  [[ $RUNTIME ]] || case $TYPE in
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v4-* | v3-* | v2-*) RUNTIME=tpu-ubuntu2204-base ;;
    *) fail "--type: unknown slice $TYPE. Such as v5e-16, v5p-32, v6e-8, v4-32, or give --runtime" ;;
  esac
}

check_folder() {
  [[ $BUCKET || $FOLDER ]] ||
    fail "--bucket: give a bucket, or --folder=PATH. Checkpoints must outlive the workers"
  [[ ! ($BUCKET && $FOLDER) ]] || fail "--folder: give it or --bucket, not both"
  BUCKET=${BUCKET#gs://}
  [[ ! $BUCKET || $BUCKET =~ ^[a-z0-9][-a-z0-9_.]*$ ]] ||
    fail "--bucket: $BUCKET is no name of a bucket. bases/, data/ and runs/ lie at its top"
  split_source
  [[ $URL != -* && $URL != ext::* ]] || fail "--source: $URL is no address of a repository"
  [[ ! $SOURCE || $SOURCE != *@ ]] || fail "--source: nothing stands behind the @. Such as @main"
  [[ $REF != -* ]] || fail "--source: $REF is no branch, tag or commit"
}

check_flags() {
  local flag
  ((${#FLAGS[@]})) || fail "nothing to train. Add -- --config=configs/… --workdir=runs/…"
  for flag in "${FLAGS[@]}"; do
    [[ $flag != --*=gs://* ]] ||
      fail "${flag%%=*}: ${flag#*=} is no folder. The bucket is mounted: write runs/…, data/… or bases/…"
    [[ $flag != --hosts=* ]] || fail "--hosts: every worker gets --hosts=auto; leave it out"
  done
}

queued() {
  local verb=$1
  shift
  gcloud compute tpus queued-resources "$verb" "$@" \
    "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet
}

# Runs one shell command on all workers of all slices at once.
on_workers() { queued ssh "$NAME" --node=all --worker=all --command="$1"; }

# The resource's state, ABSENT when there is none, or UNKNOWN when gcloud cannot tell.
state() {
  local told
  if told=$(queued describe "$NAME" --format='value(state.state)' 2>&1); then
    echo "${told##*$'\n'}"
  elif [[ ${told,,} == *not*found* ]]; then
    echo ABSENT
  else
    say "${told##*$'\n'}"
    echo UNKNOWN
  fi
}

create() {
  local nodes=(--node-id="$NAME")
  ((SLICES == 1)) || nodes=(--node-count="$SLICES" --node-prefix="$NAME")
  say "asks for $SLICES x $TYPE ${PAID#--}"
  queued create "$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${nodes[@]}" \
    ${PAID:+"$PAID"} "${CREATE[@]}"
}

delete() { queued delete "$NAME" --force; }

# Returns when the slices are active; creates them first where they are not, and again where they
# were taken away. Never deletes what is active. Fails when gcloud refuses.
await() {
  local now last=''
  while true; do
    now=$(state)
    [[ $now == "$last" ]] || say "$NAME is $now"
    last=$now
    case $now in
      ACTIVE) return ;;
      ABSENT) create || return 1 ;;
      SUSPENDED | FAILED) delete || return 1 ;;
      *) sleep "$POLL" ;;
    esac
  done
}

# Packs the files that git follows, as they lie here, into $1.
pack() {
  local tree git=(git -C "$ROOT" -c user.name=xllm -c user.email=xllm@localhost)
  tree=$("${git[@]}" stash create 2>/dev/null) || fail "$ROOT: no git checkout. Give --source=URL"
  "${git[@]}" archive --format=tar.gz -o "$1" "${tree:-HEAD}"
}

# Takes --source apart into URL and REF: an @ before the path belongs to the user's name.
split_source() {
  local path=$SOURCE
  URL=$SOURCE REF=''
  case $SOURCE in
    *://*/*) path=${SOURCE#*://*/} ;;
    *://*) path='' ;;
    *:*) path=${SOURCE#*:} ;;
  esac
  [[ $path != *@* ]] || REF=${path#*@} URL=${SOURCE%"@${path#*@}"}
}

setup() {
  local kind=folder where=$FOLDER fetch
  [[ ! $BUCKET ]] || kind=bucket where=$BUCKET
  if [[ $SOURCE ]]; then
    split_source
    fetch="git clone --quiet -- $(printf %q "$URL") new"
    [[ ! $REF ]] || fetch+=" && git -C new checkout --quiet $(printf %q "$REF") --"
  else
    queued scp "$ARCHIVE" "$NAME:xllm_jax.tar.gz" --node=all --worker=all
    fetch='mkdir new && tar -xzf xllm_jax.tar.gz -C new'
  fi
  # The environment is kept; links to the shared folder are made again.
  on_workers "set -e; rm -rf new; $fetch; [ ! -d xllm_jax/.venv ] || mv xllm_jax/.venv new/; \
rm -rf xllm_jax; mv new xllm_jax; bash xllm_jax/launch/worker.sh setup $kind $(printf %q "$where")"
}

start() { on_workers "bash xllm_jax/launch/worker.sh start $(printf '%q ' "${FLAGS[@]}")"; }

follow() { on_workers "bash xllm_jax/launch/worker.sh follow"; }

# One line a worker. Fails when a worker cannot be reached.
report() {
  local script=xllm_jax/launch/worker.sh
  on_workers "if [ -e $script ]; then bash $script report; else echo a worker is bare; fi"
}

# Trains on active slices, from wherever the workers stand, and prints the verdict.
attempt() {
  local told
  told=$(report) || return 1
  if [[ $told == *' bare'* ]]; then
    setup >&2 || return 1
  fi
  if [[ $told != *' running'* ]]; then
    start >&2 || return 1
  fi
  follow >&2 || true # a lost connection ends it; training goes on
  told=$(report) || return 1
  while [[ $told == *' running'* ]]; do
    sleep "$POLL"
    follow >&2 || true
    told=$(report) || return 1
  done
  say "${told//$'\n'/, }"
  sed -n 's/.* exit //p' <<<"$told" | verdict
}

run() {
  local failures=0 word
  while true; do
    word=refused
    if await >&2; then
      word=$(attempt) || word=unreachable
    fi
    case $word in
      finished) say "training is finished; launch/tpu_pod.sh delete gives the slices back" && exit ;;
      2 | 3 | 74) fail "training ended with exit code $word, which another attempt cannot mend" "$word" ;;
      again) say "the same command continues" && continue ;;
    esac
    # Slices that were taken away are no failure of ours.
    if [[ $word == refused || $(state) == ACTIVE ]]; then
      ((++failures <= RETRIES)) || fail "$NAME: failed $failures times ($word), see above" 1
      say "$word: failure $failures of at most $RETRIES"
    fi
    sleep "$POLL"
  done
}

main() {
  parse "$@"
  ARCHIVE=$(mktemp -d)/xllm_jax.tar.gz
  trap 'rm -rf "$(dirname "$ARCHIVE")"' EXIT
  # Packed once: every attempt of this run trains the same code.
  case $COMMAND in run | setup) [[ $SOURCE ]] || pack "$ARCHIVE" ;; esac
  case $COMMAND in
    create) await || fail "$NAME: gcloud refused, see above" 1 ;;
    status) say "$NAME is $(state)" && report ;;
    stop) on_workers "bash xllm_jax/launch/worker.sh stop" ;;
    *) "$COMMAND" ;;
  esac
}

main "$@"

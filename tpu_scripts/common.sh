# shellcheck shell=bash
# Shared by the scripts of this folder; source it, do not run it.
#
# A script sets FLAGS (its own flags, a trailing = for one that takes a value), defines usage(), and calls parse_args "$@".
# That fills NAME, the OPT_* variables below and REST (what follows --). Messages go to stderr: under --dry-run stdout holds the
# gcloud calls and nothing else, one a line, quoted so that a shell runs them as they are.

# shellcheck disable=SC2034  # set here, read by the scripts
{
  SCRIPT=${0##*/}
  HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  REPO=$(dirname "$HERE")
  LOGS=${ATTNLAB_TPU_LOGS:-$REPO/runs/tpu} # this machine's copies of the workers' output (runs/ is git-ignored)

  NAME=""
  REST=()
  OPT_dry_run="" OPT_follow="" OPT_reserved="" OPT_spot="" OPT_stop="" OPT_wait="" OPT_yes=""
  OPT_extras="tpu,gcs" OPT_lines=50 OPT_max_restarts=20 OPT_poll=30 OPT_ref=HEAD OPT_run=train
  OPT_runtime="" OPT_slices="" OPT_type="" OPT_valid_until="" OPT_worker=""
  OPT_project=${ATTNLAB_TPU_PROJECT:-} OPT_zone=${ATTNLAB_TPU_ZONE:-}
}

COMMON_HELP="  --zone ZONE        zone of the TPU (default: \$ATTNLAB_TPU_ZONE)
  --project PROJECT  Google Cloud project (default: \$ATTNLAB_TPU_PROJECT, else gcloud's own)
  --dry-run          print the exact gcloud calls and run none of them
  --help             this text"
SLICES_HELP="  --slices K         the request holds K slices (default: what the request itself says)"

say() { printf '%s: %s\n' "$SCRIPT" "$*" >&2; }
# What was achieved; a dry run achieved nothing.
report() { [ -n "$OPT_dry_run" ] || say "$*"; }
die() {
  say "$*"
  exit 1
}
die_usage() {
  say "$* (see $SCRIPT --help)"
  exit 2
}

# --- arguments ---------------------------------------------------------------------------------------------------------------

set_opt() { printf -v "OPT_${1//-/_}" %s "$2"; }

parse_args() {
  local accepted=" zone= project= dry-run $FLAGS " flag value
  case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
  "" | --) die_usage "NAME of the queued resource is missing: give it first" ;;
  esac
  if [ "${1#-}" = "$1" ]; then
    NAME=$1
    shift
  fi
  while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      REST=("$@")
      break
      ;;
    --*) ;;
    *) die_usage "unexpected argument '$1': NAME comes first, then --flags" ;;
    esac
    flag=${1%%=*} && flag=${flag#--}
    [ "$flag" != node-count ] || flag=slices
    case "$accepted" in
    *" $flag= "*)
      case "$1" in
      *=*) value=${1#*=} ;;
      *)
        value=${2:-}
        case "$value" in --*) value="" ;; esac
        [ $# -lt 2 ] || shift
        ;;
      esac
      [ -n "$value" ] || die_usage "--$flag needs a value: --$flag VALUE"
      set_opt "$flag" "$value"
      ;;
    *" $flag "*)
      case "$1" in *=*) die_usage "--$flag takes no value: write --$flag" ;; esac
      set_opt "$flag" 1
      ;;
    *) die_usage "unknown flag '${1%%=*}': known are$(known_flags "$accepted")" ;;
    esac
    shift
  done
  [ -n "$NAME" ] || die_usage "NAME of the queued resource is missing: give it first"
  check_pattern NAME "$NAME" '^[a-z]([-a-z0-9]*[a-z0-9])?$' "small letters, digits and dashes, a letter first"
  check_pattern --run "$OPT_run" '^[A-Za-z0-9_][A-Za-z0-9_.-]*$' "letters, digits, dot, dash and underscore"
  check_pattern --slices "${OPT_slices:-1}" '^[1-9][0-9]*$' "a whole number from 1"
  check_pattern --poll "$OPT_poll" '^[0-9]+$' "whole seconds"
  check_pattern --lines "$OPT_lines" '^[0-9]+$' "a whole number"
  check_pattern --max-restarts "$OPT_max_restarts" '^[0-9]+$' "a whole number"
  check_pattern --worker "${OPT_worker:-all}" '^(all|[0-9]+)$' "a worker's number, from 0, or all"
  [ -z "$OPT_spot" ] || [ -z "$OPT_reserved" ] || die_usage "--spot and --reserved exclude each other: keep one"
  [ -n "$OPT_zone" ] || die_usage "no zone: pass --zone ZONE or set ATTNLAB_TPU_ZONE"
  WHERE=("--zone=$OPT_zone")
  [ -z "$OPT_project" ] || WHERE+=("--project=$OPT_project")
  [ -n "$OPT_dry_run" ] || command -v gcloud >/dev/null ||
    die "gcloud is not on PATH: install the Google Cloud CLI, then run 'gcloud auth login'"
}

known_flags() {
  local flag
  for flag in $1; do printf ' --%s' "${flag%=}"; done
}

check_pattern() { # WHAT VALUE REGEX RULE
  [[ $2 =~ $3 ]] || die_usage "$1 is '$2', but must be $4"
}

# The same flags again, for a script that calls another one.
pass_on() {
  PASSED=("${WHERE[@]}")
  [ -z "$OPT_dry_run" ] || PASSED+=(--dry-run)
}

# Words quoted for a shell, on one line.
quote() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# --- gcloud ------------------------------------------------------------------------------------------------------------------

gcloud_tpus() {
  if [ -n "$OPT_dry_run" ]; then
    printf '%s\n' "$(quote gcloud compute tpus "$@")"
  else
    gcloud compute tpus "$@"
  fi
}

# The runtime for an accelerator type, from https://cloud.google.com/tpu/docs/runtimes (JAX). It changes with new generations.
runtime_for() {
  case "$1" in
  v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
  v5litepod-*) echo v2-alpha-tpuv5-lite ;;
  v5p-*) echo v2-alpha-tpuv5 ;;
  v6e-*) echo v2-alpha-tpuv6e ;;
  v5e-*) die_usage "there is no type '$1': a v5e slice is called v5litepod-${1#*-}" ;;
  *) die_usage "no runtime is known for type '$1': pass --runtime (list them with: gcloud compute tpus tpu-vm versions list --zone=$OPT_zone)" ;;
  esac
}

# The naming trap: v5litepod-N and v6e-N count chips, older types and v5p-N count TensorCores, two to a chip.
describe_type() {
  local n=${1##*-}
  case "$1" in
  v5litepod-* | v6e-*) echo "$1 is $n chips (this type counts chips)" ;;
  v[234]-* | v5p-*) echo "$1 is $n TensorCores = $((n / 2)) chips (this type counts TensorCores)" ;;
  *) echo "$1" ;;
  esac
}

# One worker holds up to 8 chips of v5litepod and v6e, and 8 TensorCores of the others: either way N <= 8.
one_worker() { [ "$REQUEST_SLICES" = 1 ] && [[ $REQUEST_TYPE =~ -[1-8]$ ]]; }

# Sets REQUEST_STATE (MISSING when there is none), _TYPE, _RUNTIME, _SLICES, _SPOT, _RESERVED. Returns 1 when gcloud cannot say.
# spot is an empty message: base64 shows it ("e30=") where a plain field would print nothing.
# shellcheck disable=SC2034  # read by the scripts
describe_request() { # STATE-TO-ASSUME-IN-A-DRY-RUN
  local format='csv[no-heading,separator="|"](state.state,tpu.nodeSpec[0].node.acceleratorType,tpu.nodeSpec[0].node.runtimeVersion,tpu.nodeSpec[0].multisliceParams.nodeCount,spot.encode(base64),reservationName)'
  local call=(queued-resources describe "$NAME" "${WHERE[@]}" "--format=$format") errors out
  REQUEST_STATE=$1 REQUEST_TYPE=$OPT_type REQUEST_RUNTIME=$OPT_runtime REQUEST_SLICES=${OPT_slices:-1}
  REQUEST_SPOT=$OPT_spot REQUEST_RESERVED=$OPT_reserved
  if [ -n "$OPT_dry_run" ]; then
    gcloud_tpus "${call[@]}"
    return 0
  fi
  errors=$(mktemp)
  if out=$(gcloud_tpus "${call[@]}" 2>"$errors"); then
    IFS='|' read -r REQUEST_STATE REQUEST_TYPE REQUEST_RUNTIME REQUEST_SLICES REQUEST_SPOT REQUEST_RESERVED <<<"$out"
    REQUEST_SLICES=${REQUEST_SLICES:-1}
  elif grep -q NOT_FOUND "$errors"; then
    REQUEST_STATE=MISSING
  else
    cat "$errors" >&2
    rm -f "$errors"
    return 1
  fi
  rm -f "$errors"
}

is_lost() { case "$REQUEST_STATE" in SUSPENDING | SUSPENDED | FAILED | PREEMPTED) ;; *) return 1 ;; esac }

# For the scripts that talk to workers: the request must be ACTIVE; --slices may be left out.
require_active() {
  describe_request ACTIVE || die "cannot describe $NAME (gcloud's message is above)"
  case "$REQUEST_STATE" in
  ACTIVE) ;;
  MISSING) die "$NAME does not exist in $OPT_zone: create it with create.sh $NAME --type TYPE --wait" ;;
  *) die "$NAME is $REQUEST_STATE, not ACTIVE: wait for it with create.sh, or let watch.sh restart it" ;;
  esac
  REQUEST_SLICES=${OPT_slices:-$REQUEST_SLICES}
}

# The TPU nodes: NAME itself, or NAME-0 ... NAME-(K-1).
nodes() {
  local i
  if [ "$REQUEST_SLICES" = 1 ]; then
    echo "$NAME"
  else
    for ((i = 0; i < REQUEST_SLICES; i++)); do echo "$NAME-$i"; done
  fi
}

# gcloud tpus "$@" for each node, put for the word @NODE@ or @NODE@:PATH. All slices at the same time: a JAX program waits for all its
# workers. Non-zero if any fails.
each_node() {
  local node word call pids=() failed=0
  for node in $(nodes); do
    call=()
    for word in "$@"; do
      case "$word" in @NODE@ | @NODE@:*) word=$node${word#@NODE@} ;; esac
      call+=("$word")
    done
    if [ "$REQUEST_SLICES" = 1 ] || [ -n "$OPT_dry_run" ]; then
      gcloud_tpus "${call[@]}" || failed=$?
    else
      gcloud_tpus "${call[@]}" &
      pids+=($!)
    fi
  done
  for node in ${pids[@]+"${pids[@]}"}; do wait "$node" || failed=$?; done
  return "$failed"
}

# Runs one shell command on all workers of all slices, or on worker N of the first slice.
on_workers() { # all|N COMMAND
  if [ "$1" = all ]; then
    each_node tpu-vm ssh @NODE@ "${WHERE[@]}" --worker=all "--command=$2"
  else
    gcloud_tpus tpu-vm ssh "$(nodes | head -n 1)" "${WHERE[@]}" "--worker=$1" "--command=$2"
  fi
}

# COMMAND as the workers run it: in the checkout, with the venv first on PATH, every line marked with its worker and kept in
# ~/attnlab-logs/LOG.log. gcloud takes 255 for a broken connection and repeats the command, so a command's own 255 becomes 254.
logged() { # LOG COMMAND
  # shellcheck disable=SC2016  # expanded by the worker's shell
  printf '%s' 'set -o pipefail; mkdir -p ~/attnlab-logs; PATH=$HOME/attnlab-venv/bin:$PATH; cd ~/attnlab 2>/dev/null || cd; ' \
    "{ $2; }"' </dev/null 2>&1 | tee -a ~/attnlab-logs/'"$1"'.log | sed -u "s/^/[$(hostname)] /"; ' \
    'c=$?; [ $c -ne 255 ] || c=254; exit $c'
}

# on_workers, with the output also kept on this machine.
on_workers_logged() { # all|N LOG COMMAND
  local command
  command=$(logged "$2" "$3")
  if [ -n "$OPT_dry_run" ]; then
    on_workers "$1" "$command"
  else
    mkdir -p "$LOGS/$NAME"
    on_workers "$1" "$command" 2>&1 | tee -a "$LOGS/$NAME/$2.log"
  fi
}

# --- training on the workers ---------------------------------------------------------------------------------------------------
# Each worker keeps ~/attnlab-logs/RUN.log, RUN.pid and, once it is over, RUN.exit (the exit code).

# Prints one line a worker and run: attnlab-status HOST RUN running|died|none|exit CODE. died: no exit code and no process, so the
# worker was rebooted or its processes were killed together.
training_status() {
  # shellcheck disable=SC2016  # expanded by the worker's shell
  local command='mkdir -p ~/attnlab-logs; cd ~/attnlab-logs; [ -e '"$OPT_run"'.pid ] || echo "attnlab-status $(hostname) '"$OPT_run"' none"; for p in *.pid; do [ -e "$p" ] || continue; r=${p%.pid}; if [ -e "$r.exit" ]; then s="exit $(cat "$r.exit")"; elif ps -o args= -p "$(cat "$p")" | grep -q attnlab; then s=running; else s=died; fi; echo "attnlab-status $(hostname) $r $s"; done'
  on_workers all "$command"
}

# Starts it detached, in a session of its own. Once: gcloud repeats a command whose connection broke.
training_command() { # ARGS...
  local run="attnlab-logs/$OPT_run" wrapped
  # The trap keeps the wrapper alive through the SIGTERM of a pre-emption, so that the exit code is still written. A training that
  # saved on SIGTERM exits with 0 and says so in its log: 75 tells it apart from one that reached its end.
  wrapped="trap : TERM; PATH=\$HOME/attnlab-venv/bin:\$PATH; attnlab train${1+ $(quote "$@")}; code=\$?; if [ \$code = 0 ] && tail -n 5 ~/$run.log | grep -q '^SIGTERM: saved'; then code=75; fi; echo \$code >~/$run.tmp; mv ~/$run.tmp ~/$run.exit"
  # shellcheck disable=SC2016  # expanded by the worker's shell
  printf '%s' 'mkdir -p ~/attnlab-logs; cd ~/attnlab || { echo "no ~/attnlab on $(hostname): run setup.sh first" >&2; exit 1; }; ' \
    "if [ -e ~/$run.pid ] && [ ! -e ~/$run.exit ] && ps -o args= -p \"\$(cat ~/$run.pid)\" | grep -q attnlab; then echo \"\$(hostname): started already\"; " \
    "else rm -f ~/$run.exit; setsid nohup bash -c $(quote "$wrapped") >>~/$run.log 2>&1 </dev/null & echo \$! >~/$run.pid; echo \"\$(hostname): started\"; fi"
}

# SIGTERM to the training: it saves and stops.
stop_command() {
  # shellcheck disable=SC2016  # expanded by the worker's shell
  printf '%s' "cd ~/attnlab-logs && [ -e $OPT_run.pid ] && [ ! -e $OPT_run.exit ] && kill -TERM -- \"-\$(cat $OPT_run.pid)\"" \
    ' && echo "$(hostname): told to stop" || echo "$(hostname): nothing to stop"'
}

#!/usr/bin/env bash
# Keep a training running through pre-emptions.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
watch.sh NAME [flags] -- [attnlab train args]: bring the training up if it is not, and keep it up. When the request is SUSPENDED,
FAILED or PREEMPTED: delete it, create it again with the same settings, set up the same commit, and train with --resume. Ends with 0
when the training finished, and with the training's own code and last log lines when it failed. Stop watching with Ctrl-C: the training
goes on, and watch.sh can be started again at any time.

The RECIPE stands first after --; where a flag is first, quickstart is put before it: with a RECIPE, --resume also starts a run that was
lost before its first file. A --resume of your own is passed as written: the run in --out goes on under its own recipe. --overwrite
is refused: after a pre-emption nobody could tell the run that was to be replaced from the one that replaced it.

  watch.sh lab --type v5litepod-16 --zone us-west4-a --spot -- 350m --mesh fsdp=-1 --out gs://bucket/runs/350m

  --type TYPE        type to create (default: the existing request's)
  --runtime VERSION  runtime to create (default: the existing request's, else by type)
  --spot, --reserved, --slices K   as in create.sh (default: the existing request's)
  --valid-until DUR  as in create.sh (not taken from the existing request)
  --run RUN          name of the log files (default train)
  --max-restarts N   give up after N restarts (default 20)
  --poll SECONDS     time between looks (default 30)
$COMMON_HELP

Exit codes of a training: 0 finished; 75 (saved on SIGTERM) and 143 stopped by SIGTERM, so restart; any other failed, so stop.
EOF
}

FLAGS="type= runtime= spot reserved valid-until= slices= run= max-restarts= poll="
parse_args "$@"
for arg in ${REST[@]+"${REST[@]}"}; do
  [ "$arg" != --overwrite ] ||
    die_usage "--overwrite does not survive a restart: pass another --out, or start once with train.sh and then watch"
done
pass_on
commit=$(git -C "$REPO" rev-parse --verify --quiet HEAD) || die "no commit in $REPO: run watch.sh from a git checkout"
restarts=0
trouble=0 # consecutive failures to reach gcloud or the workers
TROUBLE_LIMIT=5

# The settings to create again, while the request still says them.
remember_settings() {
  [ "${OPT_type:-$REQUEST_TYPE}" = "$REQUEST_TYPE" ] ||
    die "$NAME exists already as $REQUEST_TYPE, not $OPT_type: choose another NAME, or delete.sh $NAME first"
  OPT_type=${OPT_type:-$REQUEST_TYPE}
  OPT_runtime=${OPT_runtime:-$REQUEST_RUNTIME}
  OPT_slices=${OPT_slices:-$REQUEST_SLICES}
  [ -n "$OPT_reserved" ] || OPT_spot=${OPT_spot:+1}${REQUEST_SPOT:+1}
  [ -n "$OPT_spot" ] || OPT_reserved=${OPT_reserved:+1}${REQUEST_RESERVED:+1}
}

create() {
  local flags=("${PASSED[@]}" "--type=$OPT_type")
  [ -z "$OPT_runtime" ] || flags+=("--runtime=$OPT_runtime")
  [ -z "$OPT_slices" ] || flags+=("--slices=$OPT_slices")
  [ -z "$OPT_spot" ] || flags+=(--spot)
  [ -z "$OPT_reserved" ] || flags+=(--reserved)
  [ -z "$OPT_valid_until" ] || flags+=("--valid-until=$OPT_valid_until")
  "$HERE/create.sh" "$NAME" "${flags[@]}"
}

count_restart() { # WHY
  restarts=$((restarts + 1))
  [ "$restarts" -le "$OPT_max_restarts" ] || die "$1, and --max-restarts $OPT_max_restarts is reached: giving up"
  say "$1: restart $restarts of at most $OPT_max_restarts"
}

recreate() {
  count_restart "$NAME is $REQUEST_STATE"
  "$HERE/delete.sh" "$NAME" "${PASSED[@]}" --yes || return 1
  create
}

setup() { "$HERE/setup.sh" "$NAME" "${PASSED[@]}" "--ref=$commit" "--slices=${OPT_slices:-1}"; }

train() {
  local args=(${REST[@]+"${REST[@]}"}) resume=1 arg
  for arg in ${REST[@]+"${REST[@]}"}; do
    [ "$arg" != --resume ] || resume=""
  done
  # From the first start on, so that a recipe elsewhere than first is refused then and not at a restart.
  case "${args[0]:-}" in "" | -*) [ -z "$resume" ] || args=(quickstart ${args[@]+"${args[@]}"}) ;; esac
  if [ "$restarts" -gt 0 ] && [ -n "$resume" ]; then args+=(--resume); fi
  local type_flag=()
  [ -z "$OPT_type" ] || type_flag=("--type=$OPT_type")
  "$HERE/train.sh" "$NAME" "${PASSED[@]}" "--run=$OPT_run" "--slices=${OPT_slices:-1}" \
    ${type_flag[@]+"${type_flag[@]}"} -- ${args[@]+"${args[@]}"}
}

# Reads the workers' status lines. Prints: unreachable|none|running|finished|stopping|stopped|mixed, or failed CODE.
summary() {
  awk -v run="$OPT_run" '
    $1 != "attnlab-status" || $3 != run {next}
    {n++}
    $4 == "running" {running++; next}
    $4 == "none" {none++; next}
    $4 == "died" || $5 == 75 || $5 == 143 {stopped++; next}
    $5 == "0" {done++; next}
    {code = $5 ~ /^[0-9]+$/ ? $5 : 1; failed++}
    END {
      if (!n) print "unreachable"
      else if (stopped) print (running ? "stopping" : "stopped")
      else if (failed) print "failed " code
      else if (none == n) print "none"
      else if (none) print "mixed"
      else if (running) print "running"
      else print "finished"
    }'
}

# A node can be gone before its request says so.
check_node() {
  local state
  state=$(gcloud_tpus tpu-vm describe "$(nodes | head -n 1)" "${WHERE[@]}" '--format=value(state)' 2>/dev/null) || return 0
  case "$state" in PREEMPTED | TERMINATED | STOPPED) REQUEST_STATE=PREEMPTED ;; esac
}

had_trouble() { # WHAT
  trouble=$((trouble + 1))
  [ "$trouble" -lt "$TROUBLE_LIMIT" ] || die "$1, $TROUBLE_LIMIT times in a row: giving up (the request is left as it is)"
  say "$1 ($trouble of $TROUBLE_LIMIT): trying again"
}

show_failure() { # CODE
  say "the training failed with code $1; its last lines:"
  on_workers all \
    "cd ~/attnlab-logs && [ \"\$(cat $OPT_run.exit 2>/dev/null || echo 0)\" = 0 ] || tail -n 20 $OPT_run.log | sed \"s/^/[\$(hostname)] /\"" >&2 || true
  say "the training failed with code $1: mend it and start again with watch.sh; $NAME still runs and costs (delete.sh $NAME)"
}

if [ -n "$OPT_dry_run" ]; then
  [ -n "$OPT_type" ] || die_usage "a dry run cannot ask for the existing request's type: pass --type TYPE"
  say "each look:"
  describe_request ACTIVE
  training_status
  say "when $NAME is SUSPENDED, FAILED or PREEMPTED:"
  REQUEST_STATE=SUSPENDED recreate
  say "then, once it is ACTIVE:"
  setup
  train
  exit 0
fi

errors=$(mktemp) # what gcloud says at each look, shown only when it fails
trap 'rm -f "$errors"' EXIT
last=""
doubt="" # a failure is believed when the request is still ACTIVE one look later: pre-emption makes workers fail too
while :; do
  if ! describe_request ACTIVE; then
    had_trouble "cannot describe $NAME"
    sleep "$OPT_poll"
    continue
  fi
  [ "$REQUEST_STATE" = MISSING ] || remember_settings
  [ "$REQUEST_STATE" = "$last" ] || say "$NAME is $REQUEST_STATE"
  last=$REQUEST_STATE
  if [ "$REQUEST_STATE" = ACTIVE ]; then
    training=$(training_status 2>"$errors" | summary) || training=unreachable
    if [ "$training" = unreachable ]; then
      tail -n 5 "$errors" >&2
      check_node
    fi
  fi
  case "$REQUEST_STATE" in
  MISSING)
    [ -n "$OPT_type" ] || die_usage "$NAME does not exist: pass --type TYPE so that watch.sh can create it"
    if create; then trouble=0; else had_trouble "cannot create $NAME"; fi
    ;;
  SUSPENDED | FAILED | PREEMPTED)
    doubt=""
    if recreate; then trouble=0; else had_trouble "cannot recreate $NAME"; fi
    ;;
  ACTIVE)
    [ "$training" = unreachable ] || trouble=0
    case "$training" in
    unreachable) had_trouble "cannot reach the workers of $NAME" ;;
    none)
      say "setting up and starting the training"
      if setup && train; then trouble=0; else had_trouble "cannot start the training"; fi
      ;;
    stopped)
      count_restart "the training was stopped (SIGTERM, or a worker was rebooted)"
      train || had_trouble "cannot restart the training"
      ;;
    mixed) die "the training runs on only some workers: end it (train.sh $NAME --run $OPT_run --stop), then watch.sh again" ;;
    failed\ *)
      if [ -n "$doubt" ]; then
        show_failure "${training#failed }"
        exit "${training#failed }"
      fi
      doubt=1
      ;;
    finished)
      say "the training finished; $NAME still runs and costs: delete.sh $NAME"
      exit 0
      ;;
    *) doubt="" ;; # running, stopping
    esac
    ;;
  esac
  sleep "$OPT_poll"
done

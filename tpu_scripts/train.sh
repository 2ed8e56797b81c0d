#!/usr/bin/env bash
# Start a training on all workers, detached.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
train.sh NAME [flags] -- [attnlab train args]: start 'attnlab train ...' on all workers and return. The workers find each other
(jax.distributed reads the TPU's own metadata): no addresses or ranks. Refuses while a training runs. On more than one worker --out
must be remote: a pod has no shared disk, so a local --out would leave each worker with its own part of a checkpoint.

  train.sh lab --zone us-west4-a -- 350m --mesh fsdp=-1 --out gs://bucket/runs/350m

Each worker keeps ~/attnlab-logs/RUN.log and, at the end, RUN.exit with the exit code (see logs.sh and watch.sh).

  --stop             send SIGTERM to the training instead: it saves and stops (end watch.sh first, it would restart it)
  --run RUN          name of the log files (default train)
  --type TYPE        with --dry-run: the accelerator type (default: what the request itself says)
$SLICES_HELP
$COMMON_HELP
EOF
}

FLAGS="stop run= type= slices="
parse_args "$@"

out=""
previous=""
for arg in ${REST[@]+"${REST[@]}"}; do
  case "$arg" in --out=*) out=${arg#*=} ;; esac
  [ "$previous" != --out ] || out=$arg
  previous=$arg
done

require_active
if [ -n "$OPT_stop" ]; then
  on_workers all "$(stop_command)"
  exit
fi
if ! one_worker && [[ $out != *://* ]]; then
  die_usage "--out is '${out:-missing}', but ${REQUEST_TYPE:-a pod} has more than one worker and no shared disk, so checkpoints would be torn apart: pass -- --out gs://BUCKET/PATH"
fi

status=$(training_status) || die "cannot ask the workers (gcloud's message is above)"
[ -z "$OPT_dry_run" ] || printf '%s\n' "$status"
running=$(printf '%s\n' "$status" | awk '$1 == "attnlab-status" && $4 == "running" {print $3 " on " $2}' | head -n 1)
[ -z "$running" ] || die "a training is running already ($running): follow it with logs.sh $NAME, or end it with train.sh $NAME --stop"
on_workers all "$(training_command ${REST[@]+"${REST[@]}"})" || die "the training did not start on every worker (code $?)"
report "training '$OPT_run' started on $NAME: logs.sh $NAME --run $OPT_run --follow; watch.sh $NAME restarts it after a pre-emption"

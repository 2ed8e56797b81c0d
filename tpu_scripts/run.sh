#!/usr/bin/env bash
# Run one command on all workers at the same time.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
run.sh NAME [flags] -- CMD [ARG...]: run CMD on all workers, in ~/attnlab with its venv. Arguments arrive as they are: no second
shell expands them (for a pipe or a variable of the worker write: -- bash -c '...'). Every line is marked with its worker and kept in
~/attnlab-logs/run.log there and runs/tpu/NAME/run.log here. Non-zero if any worker fails.

  run.sh lab --zone us-west4-a -- python -c 'import jax; print(jax.device_count())'

  --worker N         only worker N of the first slice (default all: JAX programs must run on all workers)
$SLICES_HELP
$COMMON_HELP
EOF
}

FLAGS="worker= slices="
parse_args "$@"
[ ${#REST[@]} -gt 0 ] || die_usage "no command: write -- CMD after the flags"
require_active
on_workers_logged "${OPT_worker:-all}" run "$(quote "${REST[@]}")" || {
  code=$?
  say "the command failed on a worker (code $code); the whole output is in $LOGS/$NAME/run.log"
  exit "$code"
}

#!/usr/bin/env bash
# Show the training's log.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
logs.sh NAME [flags]: the last lines of the training's log.

  logs.sh lab --zone us-west4-a --worker all --lines 20

  --worker N|all     whose log (default 0: the process that writes the metrics; a number means the first slice)
  --follow           keep printing what is added; Ctrl-C ends
  --lines N          how many lines (default 50)
  --run RUN          which log: train (default), setup, run, or the --run of train.sh
$SLICES_HELP
$COMMON_HELP
EOF
}

FLAGS="worker= follow lines= run= slices="
parse_args "$@"
[ ${#REST[@]} -eq 0 ] || die_usage "nothing may follow --"
require_active
file=attnlab-logs/$OPT_run.log
on_workers "${OPT_worker:-0}" "set -o pipefail; cd; [ -e $file ] || { echo \"no $file on \$(hostname): was '$OPT_run' started?\" >&2; exit 1; }; tail -n $OPT_lines${OPT_follow:+ -F} $file | sed -u \"s/^/[\$(hostname)] /\""

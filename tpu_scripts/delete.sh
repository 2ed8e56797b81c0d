#!/usr/bin/env bash
# Delete a queued resource and its TPUs.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
delete.sh NAME [flags]: delete the request and its TPUs (their disks too), which ends the bill. Nothing to delete is no error.

  delete.sh lab --zone us-west4-a --yes

  --yes              do not ask
$COMMON_HELP
EOF
}

FLAGS="yes"
parse_args "$@"
[ ${#REST[@]} -eq 0 ] || die_usage "nothing may follow --"
describe_request ACTIVE || die "cannot describe $NAME (gcloud's message is above)"
if [ "$REQUEST_STATE" = MISSING ]; then
  say "$NAME does not exist in $OPT_zone: nothing to delete"
  exit 0
fi
if [ -z "$OPT_yes$OPT_dry_run" ]; then
  printf 'Delete %s (%s, %s) and everything on its disks? [y/N] ' "$NAME" "$REQUEST_TYPE" "$REQUEST_STATE" >&2
  read -r answer || answer=""
  case "$answer" in y | Y | yes) ;; *) die "nothing deleted: answer y, or pass --yes" ;; esac
fi
gcloud_tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet || die "gcloud could not delete $NAME (its message is above)"
report "$NAME is deleted"

#!/usr/bin/env bash
# Create a queued resource: a request for a TPU slice, or for several.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
create.sh NAME --type TYPE [flags]: request a TPU (a queued resource). A request that exists with the same type is left as it is.

  create.sh lab --type v5litepod-16 --zone us-west4-a --spot --wait

  --type TYPE        accelerator type. v5litepod-N and v6e-N count chips; v4-N and v5p-N count TensorCores, two to a chip
  --runtime VERSION  runtime version (default: by type; current list: gcloud compute tpus tpu-vm versions list --zone=ZONE)
  --spot             spot capacity: cheaper, can be pre-empted (see watch.sh)
  --reserved         capacity from your reservation
  --valid-until DUR  give up when not provisioned within this time, for instance 6h
  --slices K         K slices of this type, called NAME-0 ... (also --node-count)
  --wait             wait until it is ACTIVE; non-zero if it ends in another state
  --poll SECONDS     with --wait: time between looks (default 30)
$COMMON_HELP
EOF
}

FLAGS="type= runtime= spot reserved valid-until= slices= wait poll="
parse_args "$@"
[ ${#REST[@]} -eq 0 ] || die_usage "nothing may follow --"
[ -n "$OPT_type" ] || die_usage "--type is missing: for instance --type v5litepod-16"
runtime=${OPT_runtime:-$(runtime_for "$OPT_type")}
slices=${OPT_slices:-1}

create() {
  local call=(queued-resources create "$NAME" "${WHERE[@]}" "--accelerator-type=$OPT_type" "--runtime-version=$runtime")
  if [ "$slices" = 1 ]; then
    call+=("--node-id=$NAME")
  else
    call+=("--node-count=$slices" "--node-prefix=$NAME")
  fi
  [ -z "$OPT_spot" ] || call+=(--spot)
  [ -z "$OPT_reserved" ] || call+=(--reserved)
  [ -z "$OPT_valid_until" ] || call+=("--valid-until-duration=$OPT_valid_until")
  call+=(--quiet)
  say "$(describe_type "$OPT_type"), slices: $slices, runtime: $runtime${OPT_runtime:- (picked by type; check the current list with: gcloud compute tpus tpu-vm versions list ${WHERE[*]})}"
  gcloud_tpus "${call[@]}" ||
    die "gcloud could not create $NAME (its message is above): check quota for $OPT_type in $OPT_zone, and the runtime version"
}

describe_request MISSING || die "cannot describe $NAME (gcloud's message is above)"
if [ "$REQUEST_STATE" = MISSING ]; then
  create
elif [ "$REQUEST_TYPE" != "$OPT_type" ] || [ "$REQUEST_SLICES" != "$slices" ]; then
  die "$NAME exists already as $REQUEST_TYPE, slices: $REQUEST_SLICES, not $OPT_type, slices: $slices: choose another NAME, or delete.sh $NAME first"
elif is_lost; then
  die "$NAME exists already but is $REQUEST_STATE: delete.sh $NAME first, or let watch.sh $NAME recreate it"
else
  say "$NAME exists already as $REQUEST_TYPE, slices: $REQUEST_SLICES: $REQUEST_STATE"
fi
[ -n "$OPT_wait" ] || exit 0

last=""
while :; do
  describe_request ACTIVE || die "cannot describe $NAME (gcloud's message is above)"
  [ "$REQUEST_STATE" = "$last" ] || say "$NAME is $REQUEST_STATE"
  last=$REQUEST_STATE
  [ "$REQUEST_STATE" != ACTIVE ] || exit 0
  case "$REQUEST_STATE" in
  DELETING | MISSING) die "$NAME is $REQUEST_STATE: someone deleted it" ;;
  esac
  ! is_lost || die "$NAME is $REQUEST_STATE and will not become ACTIVE: delete.sh $NAME, then create it again (other zone or type, or no --valid-until)"
  sleep "$OPT_poll"
done

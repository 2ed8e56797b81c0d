#!/usr/bin/env bash
# Copy the committed tree to all workers, install it in a venv, and check the installation.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
setup.sh NAME [flags]: copy this repository's HEAD to ~/attnlab on all workers, install it in ~/attnlab-venv, run 'attnlab check'
on all of them. Running it again updates the code (not while a training runs); the venv and your own files are kept.

  setup.sh lab --zone us-west4-a

  --ref REV          commit to install (default HEAD; uncommitted changes never travel)
  --extras LIST      extras to install (default tpu,gcs: gcs reads and writes gs:// paths)
$SLICES_HELP
$COMMON_HELP
EOF
}

FLAGS="ref= extras= slices="
parse_args "$@"
[ ${#REST[@]} -eq 0 ] || die_usage "nothing may follow --"
commit=$(git -C "$REPO" rev-parse --verify --quiet "$OPT_ref^{commit}") ||
  die "'$OPT_ref' is no commit of $REPO: setup.sh ships a commit, so run it from a git checkout"
changes=$(git -C "$REPO" status --porcelain)
[ -z "$changes" ] || say "warning: uncommitted changes are not copied (commit them first): $(printf '%s\n' "$changes" | wc -l | tr -d ' ') files"

tarball=$LOGS/attnlab-$(printf %.12s "$commit").tar.gz
if [ -z "$OPT_dry_run" ]; then
  mkdir -p "$LOGS"
  git -C "$REPO" archive --format=tar.gz --prefix=attnlab/ -o "$tarball" "$commit"
fi
require_active
each_node tpu-vm scp "$tarball" @NODE@:attnlab.tar.gz "${WHERE[@]}" --worker=all || die "copying to the workers failed (code $?)"

# The TPU images carry Python 3.10 and attnlab needs 3.11, so uv brings its own.
# Only the files of the setup before are removed: a run kept in ~/attnlab/runs stays.
install='cd && { [ ! -e attnlab.files ] || grep -v "/$" attnlab.files | tr "\n" "\0" | xargs -0 rm -f; }'
install+=' && tar xzf attnlab.tar.gz && tar tzf attnlab.tar.gz >attnlab.files'
install+=' && { [ -x attnlab-venv/bin/python ] || { python3 -m pip install --user -q -U uv && python3 -m uv venv -q --seed --python 3.12 attnlab-venv; }; }'
install+=" && cd attnlab && ../attnlab-venv/bin/python -m pip install -q -e $(quote ".[$OPT_extras]")"
on_workers_logged all setup "$install" || die "installing failed on a worker (code $?)"
on_workers_logged all setup "attnlab check" || die "'attnlab check' failed on a worker (code $?)"
report "$NAME runs $(printf %.12s "$commit") on all workers"

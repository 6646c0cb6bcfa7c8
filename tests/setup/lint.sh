#!/usr/bin/env bash
# Every check that reads the source without running it. `install.sh --lint`
# must have run before.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
linters=$("$here/install.sh" --cache)/linters/bin

step() {
    printf '\n==> %s\n' "$*" >&2
    "$@"
}

step cargo fmt --check
step cargo clippy --all-targets -- -D warnings
RUSTDOCFLAGS='-D warnings' step cargo doc --no-deps
# Not `advisories`: that check downloads a database from outside the package
# registries, and a run must not depend on what was published overnight.
step "$linters/cargo-deny" check bans licenses sources
mapfile -t scripts < <(git ls-files -- '*.sh' .ci/run)
step "$linters/shellcheck" "${scripts[@]}"
step "$linters/hadolint" docker/Dockerfile docker/postgres.Dockerfile
step "$linters/check-jsonschema" --builtin-schema vendor.compose-spec docker/compose.yaml

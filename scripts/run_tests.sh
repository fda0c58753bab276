#!/usr/bin/env bash
# Run the test suite: ./scripts/run_tests.sh [pytest arguments, paths from the repository's root]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

use_python test
cd "$repo_root"
exec "$python" -m pytest "$@"

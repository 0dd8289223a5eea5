#!/usr/bin/env bash
# Runs the whole test suite, making its environment where there is none. Arguments go to pytest.
set -euo pipefail
environment_extras=dev
source "$(dirname "$0")/../launch/environment.sh"
cd "$root"
# one thread a rank: distributed tests start several ranks on few cores
export OMP_NUM_THREADS=1
exec "$python" -m pytest "$@"

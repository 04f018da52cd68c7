#!/usr/bin/env bash
# Makes .venv, installs the pinned requirements, starts the server with the flags given.
# A second start installs nothing and asks no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

find_python() {
  for name in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10 python; do
    if [ -n "$name" ] && command -v "$name" >/dev/null 2>&1 &&
      "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "start.sh: Python 3.10 or newer is needed; name it with PYTHON=/path/to/python ./start.sh" >&2
  exit 2
}

wanted=$(cat requirements.txt)
if [ ! -x .venv/bin/python ]; then
  python=$(find_python)
  echo "Making .venv with $("$python" --version) …" >&2
  "$python" -m venv .venv
fi
if [ ! -f .venv/installed.txt ] || [ "$(cat .venv/installed.txt)" != "$wanted" ]; then
  echo "Installing the requirements; this happens once and takes some minutes …" >&2
  .venv/bin/python -m pip install --disable-pip-version-check -q -r requirements.txt
  printf '%s\n' "$wanted" >.venv/installed.txt
fi
[ "${1:-}" = "--install-only" ] && exit 0
exec .venv/bin/python server.py "$@"

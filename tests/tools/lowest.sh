#!/usr/bin/env bash
# Runs the tests with the lowest versions that the requirements allow, in an environment of its own:  bash tests/tools/lowest.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
"$environment/bin/pip" install -q uv
"$environment/bin/uv" pip install -q --python "$environment/bin/python" --resolution lowest-direct -r requirements-dev.txt
"$environment/bin/uv" pip freeze --python "$environment/bin/python" | grep -if <(sed -n 's/_/./g; s/^\([a-z.]*\).*/^\1=/p' requirements.txt requirements-dev.txt)
"$environment/bin/pytest" "$@"

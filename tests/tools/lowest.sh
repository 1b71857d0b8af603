#!/usr/bin/env bash
# Run the tests with the lowest versions that pyproject.toml allows, in an environment of their own.
#     bash tests/tools/lowest.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/../.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
"$environment/bin/pip" install -q uv
"$environment/bin/uv" pip install -q --python "$environment/bin/python" --resolution lowest-direct -e ".[dev]"
"$environment/bin/uv" pip freeze --python "$environment/bin/python"
"$environment/bin/pytest" "$@"

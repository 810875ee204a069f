#!/usr/bin/env bash
# Set up from nothing: install into .venv, then make a 3D asset with an embedded model, or run the tests.
#
#   bash quickstart.sh "a blue duck"    leaves the asset below ~/sjc_runs
#   bash quickstart.sh --tests          also installs what the tests need, and runs all checks and tests
#
# Every command is printed before it runs. Both lines can be repeated: what is installed is kept.
set -euo pipefail

run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

cd "$(dirname "${BASH_SOURCE[0]}")"
project=$PWD
python=$project/.venv/bin/python
prompt=${1:-a blue duck}

run python3 -m venv .venv
if [ "$prompt" = --tests ]; then
    run "$python" -m pip install -q -r requirements.txt -r requirements-dev.txt
    run "$python" -m ruff check
    run "$python" -m ruff format --check
    run "$python" -m mypy
    run "$python" -m pytest -n auto --dist loadfile
    exit
fi

run "$python" -m pip install -q -r requirements.txt
folder=$HOME/sjc_runs/${prompt//[^[:alnum:]]/_}
n=2
while [ -e "$folder/full_config.yml" ]; do  # an earlier run keeps its folder
    folder=$HOME/sjc_runs/${prompt//[^[:alnum:]]/_}_$n
    n=$((n + 1))
done
run mkdir -p "$folder"
run cd "$folder"
run "$python" "$project/run_sjc.py" --preset ideal --sd.prompt "$prompt"
run "$python" "$project/highres_final_vis.py"
run "$python" "$project/export_mesh.py"
run "$python" "$project/report.py"
echo "Look at $folder/report.html"

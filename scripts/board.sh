#!/bin/sh
# Opens TensorBoard on runs/, without runs/latest, which would show the newest run twice: sh scripts/board.sh [options]
# PYTHON=/path/to/python chooses the Python that has TensorBoard.
set -eu
spec=
for folder in runs/*/; do
    name=$(basename "$folder")
    case $name in
        '*' | latest) ;;
        *) spec=$spec${spec:+,}$name:$folder ;;
    esac
done
[ -n "$spec" ] || { echo "board: there are no runs yet; make one: make fit" >&2; exit 1; }
exec "${PYTHON:-.venv/bin/python}" -m tensorboard.main --logdir_spec "$spec" --host 127.0.0.1 "$@"

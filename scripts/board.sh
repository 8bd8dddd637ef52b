#!/bin/sh
# Opens TensorBoard on runs/ but not on runs/latest, which would show the newest run twice: sh scripts/board.sh [options]
# PYTHON=/path/to/python chooses a Python that has TensorBoard, RUNS=DIR/runs other runs.
set -eu
# A folder of links to the runs' folders: the PROJECTOR tab works with --logdir only, not with a list of folders.
links=${RUNS:-runs}/.board
mkdir -p "$links"
find "$links" -type l -exec rm -f {} +
for folder in "${RUNS:-runs}"/*/; do
    name=$(basename "$folder")
    case $name in
        '*' | latest) ;;
        *) ln -s "../$name" "$links/$name" ;;
    esac
done
[ -n "$(ls "$links")" ] || { echo "board: there are no runs yet; make one with: make fit" >&2; exit 1; }
exec "${PYTHON:-.venv/bin/python}" -m tensorboard.main --logdir "$links" --host 127.0.0.1 "$@"

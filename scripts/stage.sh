#!/bin/sh
# Run a stage's notebook: stage.sh NOTEBOOK EXECUTED [papermill options]. Its folder is made, and a failure says where the traceback is.
mkdir -p "$(dirname "$2")" && papermill --no-progress-bar --log-output "$@" || {
    echo "failed; the traceback is at the end of $2" >&2
    exit 1
}

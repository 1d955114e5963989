#!/bin/sh
# Run a stage's notebook: stage.sh NOTEBOOK EXECUTED [papermill options]. Its folder is made, and a failure says where to look.
mkdir -p "$(dirname "$2")" && rm -f "$2" || exit  # a notebook of an older run would be taken for this one's
papermill --no-progress-bar --log-output "$@" && exit
status=$?
if grep -qs '"output_type": "error"' "$2"; then echo "failed; the traceback is at the end of $2" >&2
elif [ ! -e "$2" ]; then echo "failed before the notebook began; the reason is above" >&2
elif [ "$status" -eq 138 ]; then  # so papermill says that the kernel is dead
    echo "failed without a traceback: the notebook's process was killed or crashed. If memory ran out, the log of the machine (dmesg), of the" >&2
    echo "container or of the scheduler says so. What it printed until then is above and in $2" >&2
else echo "stopped (status $status, above 128 a signal); what was printed until then is above and in $2" >&2
fi
exit 1

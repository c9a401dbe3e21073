#!/bin/sh
# night.sh JOB [OPTION...]: one `batchgen submit` for cron. Prints nothing while all is well; else the last lines of its log.
log=${BATCHGEN_LOG:-batchgen.log}
said=$(mktemp) || exit 1
trap 'rm -f "$said"' EXIT
batchgen submit "$@" --log plain >"$said" 2>&1
code=$?
cat "$said" >>"$log"
case $code in
0 | 75) exit 0 ;;  # done; or another run holds the output, or this one was asked to end: the next one goes on
*)
    echo "batchgen submit $* ended with exit code $code; the end of its log (all of it in $log):"
    tail -n 20 "$said"
    exit $code
    ;;
esac

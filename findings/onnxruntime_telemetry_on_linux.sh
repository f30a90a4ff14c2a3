#!/bin/sh
# onnxruntime 1.32.0 on Linux: importing it writes an identifier of the device and a database of events to be sent below
# ~/.cache/Microsoft/DeveloperTools/.onnxruntime, before anything was run. disable_telemetry_events() can only be called
# after the import, when the files are there. With ORT_DISABLE_TELEMETRY=1 in the environment nothing is written.
#
# Output seen: "plain import: deviceid onnxruntime.db; with ORT_DISABLE_TELEMETRY=1: nothing". Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 numpy==2.4.6
files() {
    mkdir "$folder/$1"
    env -u XDG_CACHE_HOME HOME="$folder/$1" ORT_DISABLE_TELEMETRY="$2" "$folder/venv/bin/python" -c "import onnxruntime"
    find "$folder/$1" -type f -name "[do]*" ! -name "*-shm" ! -name "*-wal" -exec basename {} \; | sort | xargs
}
plain=$(files plain "")
off=$(files off 1)
echo "plain import: $plain; with ORT_DISABLE_TELEMETRY=1: ${off:-nothing}"
[ "$plain" = "deviceid onnxruntime.db" ] && [ -z "$off" ]

#!/bin/sh
# mkdocs 1.6.1: `mkdocs build --strict --quiet` is not strict.
#
# --strict counts the warnings that pass through a handler of the logger "mkdocs"; --quiet raises that logger's level
# to ERROR, so none is counted: a site with a dead link builds, and the exit code is 0. In CI, where a silent build is
# wanted, the check is off without a word.
#
# Seen: "strict: exit code 1, strict and quiet: exit code 0".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "mkdocs==1.6.1" "click==8.3.1"
cd "$folder"
mkdir docs
printf 'site_name: a\n' > mkdocs.yml
printf '[a dead link](missing.md)\n' > docs/index.md
strict=0 quiet=0
venv/bin/mkdocs build --strict >log 2>&1 || strict=$?
venv/bin/mkdocs build --strict --quiet >log 2>&1 || quiet=$?
echo "strict: exit code $strict, strict and quiet: exit code $quiet"
[ "$strict" = 1 ] && [ "$quiet" = 0 ]

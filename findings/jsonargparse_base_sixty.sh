#!/bin/sh
# jsonargparse 4.53.0 with PyYAML 6.0.3: an option of type float | str that is given as START:END, such as 1:0, arrives
# as 60.0. Values of the command line are read as YAML 1.1, in which 1:0 is an integer to base 60, and the first type of
# the union takes it; so 0.5:1 stays text and 1:0.5 becomes 60.5. With the types the other way round (str | float) the
# text arrives as it was written. In a configuration file the number comes in either order, unless it is quoted.
# Output seen: "float | str: 60.0 '0.5:1' 60.5; str | float: '1:0'; file: 60.0". Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jsonargparse[signatures]==4.53.0' pyyaml==6.0.3
cat > "$folder/show.py" <<'EOF'
import pathlib
import sys
from typing import Union

from jsonargparse import ActionConfigFile, ArgumentParser

read = {}
for name, kind in (("float | str", Union[float, str]), ("str | float", Union[str, float])):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--weight", type=kind)
    read[name] = [parser.parse_args(["--weight", text]).weight for text in ("1:0", "0.5:1", "1:0.5")]
path = pathlib.Path(sys.argv[1])
path.write_text("weight: 1:0\n")
in_file = parser.parse_args(["--config", str(path)]).weight
numbers = " ".join(map(repr, read["float | str"]))
print(f"float | str: {numbers}; str | float: {read['str | float'][0]!r}; file: {in_file!r}")
EOF
seen=$("$folder/venv/bin/python" "$folder/show.py" "$folder/settings.yaml")
echo "$seen"
[ "$seen" = "float | str: 60.0 '0.5:1' 60.5; str | float: '1:0'; file: 60.0" ]

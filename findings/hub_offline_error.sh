#!/bin/sh
# huggingface_hub 2.4.0: what create_repo raises when the hub cannot be reached.
#
# Downloads wrap a missing network in the package's own errors, which are OSError. HfApi.create_repo, which every upload
# starts with, does not: the transport's ConnectError comes out as it is. It is neither an OSError nor a HfHubHTTPError
# nor a Python ConnectionError, so `except OSError` around an upload, which suffices for downloads, lets it through.
#
# Seen, with the endpoint set to a closed port of this machine:
#   create_repo: httpx2.ConnectError, OSError: False, HfHubHTTPError: False, ConnectionError: False
#   hf_hub_download: LocalEntryNotFoundError, OSError: True
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "huggingface_hub==2.4.0"
export HF_HOME="$folder/home" HF_ENDPOINT="http://127.0.0.1:9" HF_HUB_DISABLE_TELEMETRY=1
"$folder/venv/bin/python" - <<'PYTHON'
import sys

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError


def caught(call):
    try:
        call()
    except Exception as error:
        return error
    return None


upload = caught(lambda: HfApi(token="none").create_repo("someone/model"))
download = caught(lambda: hf_hub_download("someone/model", "config.json"))
kind = type(upload)
print(
    f"create_repo: {kind.__module__.partition('.')[0]}.{kind.__name__}, OSError: {isinstance(upload, OSError)},"
    f" HfHubHTTPError: {isinstance(upload, HfHubHTTPError)}, ConnectionError: {isinstance(upload, ConnectionError)}"
)
print(f"hf_hub_download: {type(download).__name__}, OSError: {isinstance(download, OSError)}")
as_seen = upload is not None and not isinstance(upload, (OSError, HfHubHTTPError)) and isinstance(download, OSError)
sys.exit(not as_seen)
PYTHON

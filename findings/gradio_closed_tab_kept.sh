#!/bin/sh
# Gradio 6.31.0: what a page showed a visitor stays in the server's memory after the tab is closed.
#
# The documentation says that Gradio deletes state after a user closes the tab, and it does, after an hour, with the
# values of gr.State. But the server also keeps the last value of every other component of each session (to restore
# pages from links), and these are never deleted: text, and pictures that are sent as HTML, stay until 10,000 later
# sessions push them out (launch(state_session_capacity=...)). A handler of Blocks.unload can remove the session.
#
# Seen: "gr.State after closing: deleted True; shown text after closing: kept True".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "gradio==6.31.0" "pillow==12.3.0" "pandas==3.1.1"
cat > "$folder/try.py" <<'PYTHON'
import os
import sys
import time

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_IS_E2E_TEST": "1"}  # the hour becomes a second
import gradio as gr
from gradio_client import Client

with gr.Blocks() as page:
    state, shown = gr.State(), gr.HTML()
    gr.Button().click(lambda: ("secret state", "<p>secret text</p>"), None, [state, shown], api_name="show")
_, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
client = Client(url, verbose=False)
client.predict(api_name="/show")
session = page.state_holder.session_data[client.session_hash]
client.close()
deadline = time.monotonic() + 30
while session.state_data and time.monotonic() < deadline:
    time.sleep(0.5)
    page.state_holder.delete_all_expired_state()  # what the server does each hour
deleted = not session.state_data
kept = "secret text" in str(page.state_holder.session_data[client.session_hash].config_values)
print(f"gr.State after closing: deleted {deleted}; shown text after closing: kept {kept}")
page.close(verbose=False)
sys.exit((deleted, kept) != (True, True))
PYTHON
"$folder/venv/bin/python" "$folder/try.py"

"""Open MLflow's page on the runs of this project.

python -m tools.ui          `make ui`: serves this folder's store on 127.0.0.1, for this machine alone

Where MLFLOW_TRACKING_URI names a server, its page is opened instead.
"""

import os
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from pathlib import Path
from urllib.parse import urlsplit

HOST, PORT = "127.0.0.1", 5000


def main() -> None:
    from mnist_vae.errors import UserError
    from mnist_vae.tracking.store import Store

    try:
        store = Store(Path.cwd())  # made where there is none, before MLflow's server would make one
    except UserError as error:
        sys.exit(f"ui: {error}")
    page = f"/#/experiments/{store.experiment}/runs"
    if store.uri.startswith("http"):
        parts = urlsplit(store.uri.rstrip("/"))
        address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() + page  # without a password
        print(f"The runs of this project: {address}", flush=True)
        webbrowser.open(address)
        return
    with socket.socket() as probe:
        if probe.connect_ex((HOST, PORT)) == 0:
            sys.exit(f"ui: something already serves http://{HOST}:{PORT}; open it, or end it first")
    address = f"http://{HOST}:{PORT}{page}"
    print(f"The runs of this project: {address}   (Ctrl-C ends the server)", flush=True)
    threading.Thread(target=open_when_ready, args=[address], daemon=True).start()
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--host", HOST, "--port", str(PORT)]
    try:
        sys.exit(subprocess.run([*command, "--backend-store-uri", store.uri], env=os.environ, check=False).returncode)
    except KeyboardInterrupt:
        sys.exit(130)


def open_when_ready(address: str) -> None:
    """Open a browser as soon as the server answers."""
    for _ in range(120):
        with socket.socket() as probe:
            if probe.connect_ex((HOST, PORT)) == 0:
                webbrowser.open(address)
                return
        time.sleep(0.5)


if __name__ == "__main__":
    main()

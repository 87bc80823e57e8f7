"""Starts the clients (clients.py) in a process of their own: no lock is shared with the server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CLIENTS = Path(__file__).with_name("clients.py")


def asked(port: int, clients: int, kinds: list[dict], numbers: range) -> dict:
    """What the clients found: see clients.py."""
    ends = [numbers.start, numbers.stop]
    job = {"port": port, "clients": clients, "kinds": kinds, "numbers": ends}
    done = subprocess.run(
        [sys.executable, str(CLIENTS)], input=json.dumps(job), stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuntimeError("the clients have failed")
    return json.loads(done.stdout)

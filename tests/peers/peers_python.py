"""Of a test that needs peers: runs it again in the Python that SHARDKIT_PEERS_PYTHON names; without one it is skipped, and says so."""
import os
import pathlib
import sys

PYTHON = os.environ.get("SHARDKIT_PEERS_PYTHON")
if PYTHON and pathlib.Path(sys.executable) != pathlib.Path(PYTHON):
    os.execv(PYTHON, [PYTHON, *sys.argv])
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # where "support" is


def skip(why):
    print(f"skipped: {why}")
    sys.exit(77)


def need(packages):
    """`packages`: of that Python, as the message names them."""
    if not PYTHON:
        skip(f"SHARDKIT_PEERS_PYTHON names no Python with {packages}")

"""Exports every ONNX file of a folder, each in a process of its own, and says how that ended.

``python export_each.py FOLDER TYPE`` prints a line of JSON for each: its name, seconds, the signal
that ended it (0: none), the name and words of an error of ours, or the traceback of any other, and
what a library said on stdout. The engines are imported once, then it forks: a process as a user
starts it takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import edgekit
from edgekit.errors import EdgekitError
from edgekit.exporters import fusion, onnx_quantizer, to_onnx  # noqa: F401

LIMIT_S = 60
MEMORY_BYTES = 8 << 30


def export(path: Path, kind: str) -> dict[str, str]:
    """How it ended."""
    said = io.StringIO()
    found = {}
    try:
        with contextlib.redirect_stdout(said):
            edgekit.export(
                path, format="onnx", type=kind, receipt=False, out=path.with_suffix(".out")
            )
    except EdgekitError as error:
        found = {"error": type(error).__name__, "message": error.message}
    except Exception:
        found = {"leak": traceback.format_exc()[-2000:]}
    return found | {"said": said.getvalue()}


def each(path: Path, kind: str) -> dict[str, object]:
    """The same in a child."""
    started_s = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        signal.alarm(LIMIT_S)  # a hang ends by SIGALRM
        os.write(writer, json.dumps(export(path, kind)).encode()[:60_000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    body: dict[str, object] = json.loads(said) if said else {}
    name, seconds = path.name, time.monotonic() - started_s
    return body | {"name": name, "seconds": seconds, "signal": -min(0, ended)}


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).glob("*.onnx")):
        print(json.dumps(each(path, sys.argv[2])), flush=True)

"""The command line: finds the verb, runs it, and turns errors and signals into exit codes.

Knows no verb's options and no model; each verb is one file here, imported only when it is used.
"""

from __future__ import annotations

import logging
import signal
import sys
from typing import Any, NoReturn

import click

from edgekit import __version__
from edgekit.cli.ending import ending
from edgekit.cli.lazy import LazyGroup

# One row a verb: its file in this folder, and its line in `edgekit --help` (a test compares the
# two, so that the help needs to import no verb).
VERBS = {
    "export": "Make a verified artifact from MODEL.",
    "run": "Answer PROMPT with ARTIFACT (an artifact's folder, a GGUF, an ONNX or a TFLite file).",
    "inspect": "Show what an artifact, a GGUF, an ONNX or a TFLite file holds; no weight is read.",
    "verify": "Check every byte of ARTIFACT against its manifest.",
    "eval": "Measure how well ARTIFACT predicts a text, alone or against a reference.",
    "bench": "Measure load times, speeds and memory of MODELs, and say what bounds them.",
    "plan": "Does MODEL fit a device, and how fast will it be? Needs neither of them.",
    "devices": "Boards: what they are, and which are yours.",
    "train": "Train a small model by RECIPE, into a folder that `edgekit export` takes.",
    "convert": "Turn a GGUF file into a Hugging Face folder.",
    "doctor": "Show what this machine offers, and what the engine makes of it.",
    "completion": "Print the completion script for a shell.",
}


@click.group(
    cls=LazyGroup,
    rows=VERBS,
    prefix="edgekit.cli.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("-v", "--verbose", count=True, help="Log to stderr; -vv logs the engine's words too.")
@click.version_option(__version__, prog_name="edgekit")
def cli(verbose: int) -> None:
    """From a trained model to a small, verified file that runs fast on your device."""
    _show_logs(verbose)


def _show_logs(verbose: int) -> None:
    """By default edgekit's own warnings and the errors of others; with -v more, and whose it is.

    The engine warns of what edgekit knows already: its words come with -v only.
    """
    if verbose:
        form = logging.Formatter("%(name)s: %(message)s")
        level = logging.INFO if verbose == 1 else logging.DEBUG
    else:
        form, level = _Plain(), logging.ERROR
    screen = logging.StreamHandler(sys.stderr)
    screen.setFormatter(form)
    logging.basicConfig(handlers=[screen], level=level, force=True)
    logging.getLogger("edgekit").setLevel(min(level, logging.WARNING))
    logging.getLogger("edgekit.llama").setLevel(level)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"


def _terminated(_signal: int, _frame: Any) -> NoReturn:
    # SystemExit runs every `finally`, so a half-made artifact is removed on the way out.
    raise SystemExit(128 + signal.SIGTERM)


def main() -> NoReturn:
    """The console script: exit codes of ``edgekit.errors``, 130 for Ctrl-C, 143 for SIGTERM."""
    signal.signal(signal.SIGTERM, _terminated)
    with ending():
        code = cli.main(prog_name="edgekit", standalone_mode=False)
    sys.exit(code if isinstance(code, int) else 0)

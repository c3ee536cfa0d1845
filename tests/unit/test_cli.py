"""The command line as a whole: help, completion, and how errors and signals end."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from edgekit.cli import VERBS
from edgekit.cli import cli as group
from edgekit.cli.devices import SUBCOMMANDS

CLI = Path(importlib.import_module("edgekit.cli").__file__ or "").parent


def test_every_command_is_listed_and_every_listed_verb_exists() -> None:
    files = {path.stem for path in CLI.glob("*.py") if "def command(" in path.read_text()}
    assert files == {*VERBS, *(f"devices_{name}" for name in SUBCOMMANDS)}


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_starts_with_its_line_in_the_list(verb: str) -> None:
    command = group.get_command(click.Context(group), verb)
    assert command is not None and command.help is not None
    assert command.help.strip().splitlines()[0] == VERBS[verb]


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_the_help_of_a_subcommand_starts_with_its_line_in_the_list(name: str) -> None:
    devices = group.get_command(click.Context(group), "devices")
    assert isinstance(devices, click.Group)
    command = devices.get_command(click.Context(devices), name)
    assert command is not None and command.help is not None
    assert command.help.strip().splitlines()[0] == SUBCOMMANDS[name]


def test_an_unknown_verb_is_a_usage_error(cli: Any) -> None:
    done = cli("exprot")
    assert done.code == 2
    assert "No such command 'exprot'" in done.stderr
    assert done.stdout == ""


def test_an_error_is_one_line_and_a_hint(cli: Any, tmp_path: Path) -> None:
    done = cli("verify", tmp_path)
    assert done.code == 5
    assert done.stdout == ""
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ") and "manifest.json" in error
    assert hint.startswith("hint: ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_accepts_its_completion_script(cli: Any, shell: str) -> None:
    script = cli("completion", shell)
    assert script.code == 0 and "_EDGEKIT_COMPLETE" in script.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script.stdout, text=True, check=True)


@pytest.mark.parametrize(
    ("shell", "env"),
    [
        ("bash", {"COMP_WORDS": "edgekit ex", "COMP_CWORD": "1"}),
        ("zsh", {"COMP_WORDS": "edgekit ex", "COMP_CWORD": "1"}),
        ("fish", {"COMP_WORDS": "edgekit ex", "COMP_CWORD": "ex"}),
    ],
)
def test_a_tab_completes_the_verb(cli: Any, shell: str, env: dict[str, str]) -> None:
    done = cli(**env, _EDGEKIT_COMPLETE=f"{shell}_complete")
    assert "export" in done.stdout and "verify" not in done.stdout


# A verb that waits, as an export would: the signal must run its clean-up.
_WAITING = """
import sys, time
import click
from edgekit import cli
@click.command()
def wait():
    try:
        print("ready", flush=True)
        time.sleep(30)
    finally:
        print("cleaned", flush=True)
cli.cli.get_command = lambda ctx, name: wait
sys.argv = ["edgekit", "wait"]
cli.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_cleans_up_and_names_itself(number: signal.Signals, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=5)
    assert out == "cleaned\n"
    assert process.returncode == code


# A verb that logs, as edgekit, the engine and somebody's library do.
_LOGGING = """
import logging, sys
import click
from edgekit import cli
@click.command()
def talk():
    for name in ("edgekit.hub", "edgekit.llama", "urllib3"):
        logging.getLogger(name).warning("careful")
        logging.getLogger(name).error("broken")
cli.cli.get_command = lambda ctx, name: talk
sys.argv = ["edgekit", *sys.argv[1:], "talk"]
cli.main()
"""


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ([], ["warning: careful", "error: broken", "error: broken", "error: broken"]),
        (
            ["-v"],
            [
                f"{name}: {word}"
                for name in ("edgekit.hub", "edgekit.llama", "urllib3")
                for word in ("careful", "broken")
            ],
        ),
    ],
)
def test_edgekit_s_own_warnings_are_shown_and_the_engine_s_when_asked_for(
    options: list[str], lines: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LOGGING, *options], capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines() == lines


def test_a_reader_that_leaves_hears_no_complaint() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "edgekit", "completion", "bash"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write_end)
    assert done.returncode == 1
    assert done.stderr == ""

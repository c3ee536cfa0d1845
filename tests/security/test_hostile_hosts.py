"""Hosts, users and device files that want to be options or commands: refused, and nothing runs."""

from __future__ import annotations

import json
import random
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgekit import device_config
from edgekit.device_config import Address, Device
from edgekit.errors import ConnectError, EdgekitError, UsageError
from edgekit.target import open_target, ssh_argv

GOLDEN = Path(__file__).parents[1] / "golden" / "ssh_arguments.txt"
GENERATED = GOLDEN.with_name("generated_hosts.txt")

GOOD = ["rpi5", "kitchen.local", "pi@kitchen.local", "a_b", "10.0.0.7", "pi@10.0.0.7", "fe80::1"]
GOOD += ["pi@2001:db8::7", "x", "my-user@host-1.example.org", "_pi@rpi", "1board", "a.b.c.d"]

BAD = [
    *("", "@", "pi@", "@host", "-oProxyCommand=touch x", "-F/tmp/x", "--", "-", "-l", "-1"),
    *(
        "pi@-oProxyCommand=id",
        "-oProxyCommand=id@host",
        "host;id",
        "host id",
        "host\nid",
        "ho$(id)st",
    ),
    *("`id`", "$HOME", "host|id", "host&", "host>x", "host<x", "'host'", '"host"', "ho\\st", "~"),
    *("*", "host?", "[host]", "{a,b}", "%h", "a%h", "pi%r@host", "fe80::1%eth0", "fe80::1%$(id)"),
    *(
        "ssh://host",
        "host:22",
        "host/../x",
        "a b@host",
        "pi;id@host",
        "pi@pi@host",
        "host\0",
        "höst",
    ),
    *("host\u202e", "a" * 300, "p" * 40 + "@host", "host.", "host-", ".host", "=host", "+", ","),
]


@pytest.mark.parametrize("text", BAD, ids=ascii)
def test_a_host_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        device_config.address(text)
    assert caught.value.message.isprintable()
    with pytest.raises(UsageError):
        device_config.find(text)


def test_the_arguments_of_ssh_are_those_of_the_golden_file() -> None:
    lines = []
    for text in GOOD:
        argv = ssh_argv(device_config.address(text))
        lines.append("\n".join(map(repr, argv)))
    assert "\n\n".join(lines) + "\n" == GOLDEN.read_text()


def _generated(count: int) -> list[str]:
    """Pieces of hosts, options, shells and templates, put together by dice."""
    dice = random.Random(4)
    pieces = ["pi", "host", "@", "-", "-o", "ProxyCommand=", "$(", ")", "`", ";", "|", "&", " "]
    pieces += ["\n", "\t", "\0", "%h", "%", "..", "/", ":", "::1", ".", "'", '"', "\\", "~", "*"]
    pieces += list(string.printable)
    return ["".join(dice.choices(pieces, k=dice.randrange(1, 9))) for _ in range(count)]


def test_a_thousand_generated_hosts_become_data_or_nothing() -> None:
    """The words that differ from one host to another are those of a golden file, to the letter."""
    constant = ssh_argv(Address("x"))[:-3]
    command = ssh_argv(Address("x"))[-1]
    lines, accepted = [], 0
    for text in _generated(1000):
        try:
            argv = ssh_argv(device_config.address(text))
        except UsageError:
            lines.append(f"{text!a} refused")
            continue
        accepted += 1
        words = argv[len(constant) : -1]
        assert argv == [*constant, *words, command]
        lines.append(f"{text!a} {words}")
        for word in words:
            assert set(word) <= set(string.ascii_letters + string.digits + "._-:")
            assert not word.startswith("-") or word in ("-l", "--")
    assert 0 < accepted < 500
    assert "\n".join(lines) + "\n" == GENERATED.read_text()


def test_a_thousand_generated_devices_are_kept_whole_or_refused_whole() -> None:
    """Names, hosts and profiles by dice, in the user's own file."""
    pieces = _generated(3000)
    device_config.path().parent.mkdir(parents=True)
    accepted = 0
    for name, host, profile in zip(*[iter(pieces)] * 3, strict=True):
        body = {"devices": {name: {"ssh": host, "profile": profile}}}
        device_config.path().write_text(json.dumps(body))  # every JSON is YAML
        try:
            (found,) = device_config.devices().values()
        except UsageError as error:
            assert error.message.isprintable()
            continue
        accepted += 1
        assert (found.name, str(found.address), found.profile) == (name, host, profile)
        assert ssh_argv(found.address or Address(""))[-2] == host.rpartition("@")[2]
    assert accepted < 100


def test_ssh_gets_these_arguments_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a program called ssh hears, word by word."""
    (tmp_path / "ssh").write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"with open({str(tmp_path / 'heard')!r}, 'a') as file:\n"
        "    print('ssh', *sys.argv[1:], sep='\\n', end='\\n\\n', file=file)\n"
    )
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for text in GOOD:
        with pytest.raises(ConnectError):
            open_target(text)
    heard = (tmp_path / "heard").read_text().strip("\n").split("\n\n")
    golden = GOLDEN.read_text().strip("\n").split("\n\n")
    assert [list(map(repr, one.split("\n"))) for one in heard] == [
        one.split("\n") for one in golden
    ]


def test_ssh_itself_takes_them_for_hosts_and_runs_nothing(tmp_path: Path) -> None:
    """`ssh -G` reads arguments and configuration as a connection would, and connects to nothing."""
    for text in GOOD:
        argv = ssh_argv(device_config.address(text))
        done = subprocess.run(
            [argv[0], "-G", "-F", "/dev/null", *argv[1:]],
            capture_output=True,
            text=True,
            check=True,
        )
        told = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
        user, _, host = text.rpartition("@")
        assert told["hostname"] == host
        assert told["stricthostkeychecking"] in ("true", "yes")
        assert told["batchmode"] == "yes"
        assert not user or told["user"] == user
        assert "proxycommand" not in told


_FILES = {
    "no mapping": "- a",
    "another key": "devices: {}\nrun: id\n",
    "an option for a host": "devices:\n  a: {ssh: -oProxyCommand=id}\n",
    "a command": "devices:\n  a: {ssh: host, command: id}\n",
    "a port as number": "devices:\n  a: {ssh: 22}\n",
    "a name that is a path": "devices:\n  ../a: {ssh: host}\n",
    "the name of this machine": "devices:\n  local: {ssh: host}\n",
    "a profile that is a path": "devices:\n  a: {ssh: host, profile: ../../x}\n",
    "no host": "devices:\n  a: {profile: rpi5}\n",
    "a list": "devices:\n  a: [host]\n",
    "an object": "devices: !!python/object/apply:os.system ['id']\n",
    "twice": "devices:\n  a: {ssh: b}\n  a: {ssh: c}\n",
    "not text": "devices:\n  1: {ssh: b}\n",
    "too many": "devices:\n" + "".join(f"  d{i}: {{ssh: h}}\n" for i in range(1001)),
}


@pytest.mark.parametrize("name", _FILES)
def test_a_spoilt_file_of_devices_is_refused_whole(name: str) -> None:
    device_config.path().parent.mkdir(parents=True)
    device_config.path().write_text(_FILES[name])
    with pytest.raises(UsageError, match=r"devices\.yaml"):
        device_config.devices()


def test_a_bomb_of_aliases_is_refused_at_once() -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    device_config.path().parent.mkdir(parents=True)
    device_config.path().write_text("\n".join(rows) + "\n")
    began = time.process_time()
    with pytest.raises(UsageError, match="aliases"):
        device_config.devices()
    assert time.process_time() - began < 0.1


def test_devices_are_kept_and_forgotten() -> None:
    device_config.add(Device("kitchen", Address("kitchen.local", "pi"), "rpi5"))
    device_config.add(Device("no", Address("10.0.0.7")))  # a word that YAML would take for false
    assert device_config.find("kitchen") == Device(
        "kitchen", Address("kitchen.local", "pi"), "rpi5"
    )
    assert set(device_config.devices()) == {"kitchen", "no"}
    assert device_config.path().stat().st_mode & 0o077 == 0
    device_config.remove("kitchen")
    with pytest.raises(EdgekitError, match="no device of yours"):
        device_config.remove("kitchen")


def test_a_command_line_with_a_hostile_device_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an ssh that would leave a trace."""
    (tmp_path / "ssh").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    code = (
        "import sys\nfrom edgekit.target import open_target\n"
        "from edgekit.errors import UsageError\n"
        "for line in sys.stdin.buffer.read().decode().split('\\x1e'):\n"
        "    try: open_target(line)\n    except UsageError: continue\n    raise SystemExit(line)\n"
    )
    subprocess.run([sys.executable, "-c", code], input="\x1e".join(BAD), text=True, check=True)
    assert not (tmp_path / "ran").exists()

"""A profile is plain data: whatever a stranger writes is read as that, or refused by name."""

from __future__ import annotations

import random
import time
from pathlib import Path

import profiles as sample
import pytest

from edgekit import _yaml, device
from edgekit.errors import EdgekitError, ProfileError

SOUND = _yaml.dump(sample.body())
_GENERATED = 1000


def _bomb(levels: int) -> str:
    """A billion laughs: each line names the one before ten times."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


BOMBS = {
    "aliases": _bomb(12),
    "an alias of itself": "a: &a [*a]",
    "merged aliases": "a: &a {x: 1}\nb: {<<: *a}",
    "deep lists": "[" * 20_000,
    "deep mappings": "{a: " * 8_000,
    "deep blocks": "\n".join(" " * i + "- " for i in range(200)),
    "many values": "[" + "1," * 16_000 + "]",
    "many keys": "\n".join(f"k{i}: 1" for i in range(3_000)),
    "a long text": "name: " + "x" * 32_000,
    "a large file": "# " + "x" * (1 << 20),
    "many comments": "#\n" * 16_000,
    "many documents": "---\na: 1\n" * 3_000,
    "a long number": "a: " + "9" * 30_000,
    "a sexagesimal number": "a: " + "1:" * 10_000 + "1",
    "a long escape": 'a: "' + "\\x41" * 8_000 + '"',
    "many tags": "a: " + "!!str " * 5_000 + "x",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_within_a_tenth_of_a_second(name: str) -> None:
    times = []
    for _ in range(3):  # of CPU time the best: a neighbour's burst is no fault of the parser
        began = time.process_time()
        with pytest.raises(ProfileError):
            device.parse(BOMBS[name], origin="bomb.yaml")
        times.append(time.process_time() - began)
    assert min(times) < 0.1


HANDMADE = {
    "runs a function": "!!python/object/apply:os.system ['touch hacked']",
    "makes an object": "name: !!python/object:edgekit.device.Figure {}",
    "names a module": "name: !!python/module:os",
    "a local tag": "name: !include /etc/passwd",
    "empty": "",
    "a list": "- 1",
    "a text": "hello",
    "a NUL": "name: a\0b",
    "not UTF-8": "name: \udcff",
    "tabs": "name:\tx\n\ttitle: y",
    "twice": "name: a\nname: b",
    "a number as key": "1: x",
    "a list as key": "? [a]\n: b",
    "null": "null",
    "an infinity": SOUND.replace("value: 1024", "value: .inf"),
    "not a number": SOUND.replace("value: 1024", "value: .nan"),
    "yes for a number": SOUND.replace("value: 1024", "value: yes"),
    "a date": SOUND.replace("value: 1024", "value: 2020-01-01"),
    "a huge number": SOUND.replace("value: 1024", "value: 1e300"),
    "a path for a name": SOUND.replace("name: tiny", "name: ../../../etc/passwd"),
    "an option for a name": SOUND.replace("name: tiny", "name: -oProxyCommand=touch"),
    "a shell in a name": SOUND.replace("name: tiny", "name: $(touch hacked)"),
    "an escape sequence": SOUND.replace("Tiny board", '"\\e]0;hacked\\a"'),
    "text from right to left": SOUND.replace("Tiny board", '"a\\u202eb"'),
    "a host": SOUND + "ssh: pi@kitchen.local\n",
    "a command": SOUND + "run: touch hacked\n",
    "a command where a figure belongs": SOUND.replace("value: 1024", 'value: "$(touch hacked)"'),
    "a list where a figure belongs": SOUND.replace("value: 1024", "value: [1024]"),
    "a figure of nothing": SOUND.replace("value: 1024", "value: null"),
    "a figure below zero": SOUND.replace("value: 1024", "value: -1"),
    "no memory at all": SOUND.replace("value: 1024", "value: 0"),
    "an octal that looks like a number": SOUND.replace("value: 1024", "value: 0o2000"),
    "a source of its own making": SOUND.replace("source: assumed", "source: certain", 1),
    "no source": SOUND.replace("source: assumed", "", 1),
    "a source without an end": SOUND.replace("from: ", "from: " + "x" * 500, 1),
    "a feature that no engine knows": SOUND.replace("NEON", "__import__"),
    "a name of another file": SOUND.replace("name: tiny", "name: rpi5/../tiny"),
    "a name with an end of line": SOUND.replace("name: tiny", 'name: "tiny\\n-o"'),
    "a name that is empty": SOUND.replace("name: tiny", 'name: ""'),
    "an architecture that wheels are not for": SOUND.replace(
        "architecture: aarch64", "architecture: vax"
    ),
    "two documents": SOUND + "---\n" + SOUND,
    "a directive": "%TAG ! tag:example.org,2000:\n---\n" + SOUND.replace(": tiny", ": !x tiny"),
}


@pytest.mark.parametrize("name", HANDMADE)
def test_what_is_no_profile_is_refused_and_nothing_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert HANDMADE[name] != SOUND
    with pytest.raises(ProfileError) as caught:
        device.parse(HANDMADE[name], origin="bad.yaml")
    assert str(caught.value).startswith("bad.yaml")
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../rpi5", "/etc/passwd", "rpi5/../rpi4", "-o", "", "a\0b", "*"])
def test_a_name_reaches_no_file_outside_the_folder(name: str, home: Path) -> None:
    (home / "config").mkdir()
    (home / "config/rpi9.yaml").write_text(SOUND)
    with pytest.raises(EdgekitError):
        device.load_profile(name)


def _spoil(text: str, dice: random.Random) -> str:
    """A few random wounds: cut, doubled, swapped or strange pieces."""
    strange = ("{", "]", "!!", "&a ", "*a", "\t", "\0", "é", "\u202e", "1e999", "-", "'", '"', "%")
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(text))
        end = min(len(text), at + dice.randint(1, 40))
        piece = dice.choice((text[at:end] * 2, "", dice.choice(strange), text[at:end][::-1]))
        text = text[:at] + piece + text[end:]
    return text


def test_a_spoilt_profile_is_a_profile_or_a_profile_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dice = random.Random(4)
    refused = 0
    for _ in range(_GENERATED):
        try:
            found = device.parse(_spoil(SOUND, dice), origin="spoilt.yaml")
        except ProfileError:
            refused += 1
        else:
            assert found.available_bytes > 0
    assert refused > _GENERATED / 2
    assert list(tmp_path.iterdir()) == []

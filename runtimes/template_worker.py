"""Renders one chat template in a process of its own, within bounds of time, memory and rights.

Must never see a prompt's tokens or the engine. A chat template is a program that came with the
model. Inside the process it meets jinja2's immutable sandbox; around it stand limits that hold
even where the sandbox fails or a template only burns resources: a clock that ends the process,
a fixed address space, no new files or sockets, no writing to disk. So ``range(10**9)``, nested
loops, string multiplication and runaway recursion need no rules of their own.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

TIMEOUT_S = 1.0
MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_TEXT_CHARACTERS = 1 << 24
_MEMORY_BYTES = 384 << 20


class _Refused(Exception):
    """The template itself called ``raise_exception``."""


def _environment() -> Any:
    """The names that chat templates on the hub rely on, as transformers offers them."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks training text; for us it is only its body."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 wants a plain set)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> NoReturn:
        raise _Refused(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
            """No template that means well reaches for such an attribute: end it at once."""
            raise jinja2.exceptions.SecurityError(f"it reaches for {attribute!r}")

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _answer(environment: Any, template: Any, request: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """The compiled template, and one of {"text"}, {"refused"}, {"unsafe"}, {"broken"}."""
    import jinja2

    try:
        if "template" in request:
            template = environment.from_string(request["template"])
        text = template.render(**request["variables"])
    except _Refused as error:
        return template, {"refused": str(error)}
    except (jinja2.exceptions.SecurityError, MemoryError, RecursionError) as error:
        return template, {"unsafe": str(error) or type(error).__name__}
    except Exception as error:  # a template can raise anything that Python can
        return template, {"broken": f"{type(error).__name__}: {error}"[:300]}
    if len(text) > MAX_TEXT_CHARACTERS:
        return template, {"unsafe": f"it makes {len(text)} characters"}
    return template, {"text": text}


def serve() -> None:
    """Answer one JSON line after the other, until stdin ends."""
    environment, template = _environment(), None
    # Import now what rendering and its errors need: from here on no file can be opened.
    _answer(environment, None, {"template": "{{ strftime_now('%Y').no.no }}", "variables": {}})
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_AS, used + _MEMORY_BYTES),
    ):
        resource.setrlimit(limit, (value, value))
    print('{"ready": true}', flush=True)
    for line in sys.stdin:
        # The kernel ends the process, whatever it is doing: no Python code has to run for that.
        signal.setitimer(signal.ITIMER_REAL, TIMEOUT_S)
        template, answer = _answer(environment, template, json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), flush=True)

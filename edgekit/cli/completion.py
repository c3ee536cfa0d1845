"""`edgekit completion`: the script that makes a shell complete verbs and options.

Knows the shells that click can serve; never edits anybody's shell configuration.
"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script for a shell.

    \b
    bash:  eval "$(edgekit completion bash)"                                  in ~/.bashrc
    zsh:   eval "$(edgekit completion zsh)"                                   in ~/.zshrc
    fish:  edgekit completion fish > ~/.config/fish/completions/edgekit.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click serves every shell in SHELLS"
    group = ctx.find_root().command
    click.echo(kind(group, {}, "edgekit", "_EDGEKIT_COMPLETE").source())

"""Shell completion."""

import click
from click.shell_completion import get_completion_class

_HOW = {
    "bash": 'eval "$(conpaas completion bash)"    # in ~/.bashrc',
    "zsh": 'eval "$(conpaas completion zsh)"    # in ~/.zshrc',
    "fish": "conpaas completion fish | source    # in ~/.config/fish/config.fish",
}


@click.command(epilog="  \n".join(["\b", *_HOW.values()]))
@click.argument("shell", type=click.Choice(list(_HOW)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete commands, services, roles, settings and versions."""
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"click knows no completion for {shell}")
    click.echo(kind(ctx.find_root().command, {}, "conpaas", "_CONPAAS_COMPLETE").source())

"""The program: lazy verbs from the registry, and the boundary where errors become one line and an exit code.

0    done
1    a check or a gate did not hold
2    bad input, a full disk, or too little memory
70   a bug of ours; HYPERSD_BENCH_DEBUG=1 shows the traceback
130  interrupted, and resumable
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence

import click

from hypersd_bench import registry
from hypersd_bench.cli.quiet import debugging, quiet_libraries
from hypersd_bench.cli.shadows import PACKAGES, refuse_shadows
from hypersd_bench.errors import HypersdBenchError, InputError, first_line, is_out_of_memory, unknown_name

PROGRAM = "hypersd-bench"
BUG, INTERRUPTED = 70, 130


class LazyGroup(click.Group):
    """The verbs of the registry; a verb's module is imported when it is called, never for ``--help``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the verbs in the registry's order."""
        return list(registry.rows("verb"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """Import a verb; an unknown one raises InputError with the nearest known."""
        verbs = registry.rows("verb")
        if cmd_name not in verbs:
            raise unknown_name("verb", cmd_name, verbs)
        command = registry.resolve("verb", cmd_name)
        assert isinstance(command, click.Command), f"the row of verb {cmd_name!r} does not point to a click command"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs with the registry's summaries, without importing them."""
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.summary) for name, verb in registry.rows("verb").items()])


@click.group(
    PROGRAM,
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    subcommand_metavar="VERB [ARGS]...",
    epilog="Start with: hypersd-bench demo",
)
@click.version_option(package_name=PROGRAM)
def program() -> None:
    """Distil few-step diffusion models, and compare them at 1 to 8 steps."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program on ``arguments`` (None: the process's); returns the exit code, and no exception leaves."""
    try:
        code = _run(arguments)
        sys.stdout.flush()  # here, where a closed pipe is caught
        return code
    except BrokenPipeError:  # the reader (head, less) has gone: nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except HypersdBenchError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("\ninterrupted; run the same command again to go on", err=True)
        return INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        return _fail(f"{error.format_message()}{_see_help(error)}", 2)
    except Exception as error:
        return _unexpected(error)


def _run(arguments: Sequence[str] | None) -> int:
    refuse_shadows()
    quiet_libraries()
    try:
        # not program.main(): it has its own answers to closed pipes and interrupts
        with program.make_context(PROGRAM, list(sys.argv[1:] if arguments is None else arguments)) as context:
            program.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("hypersd_bench", *PACKAGES):
            raise  # ours: a bug, not something to install
        raise InputError(f"the package {error.name!r} is not installed; run `make setup`, or pip install it") from error
    return 0


def _unexpected(error: Exception) -> int:
    """Report what nobody foresaw: a full disk and too little memory by their names, anything else as a bug."""
    if debugging():
        traceback.print_exc()
    if _is_disk_full(error):
        return _fail(f"the disk is full ({error}); free some space and run the same command again", 2)
    if is_out_of_memory(error):
        remedy = "end what else uses the device, lower --dtype or --batch-size, or use a device with more memory"
        return _fail(f"out of memory ({first_line(error)}); {remedy}", 2)
    hint = "this is a bug; set HYPERSD_BENCH_DEBUG=1 for the traceback"
    return _fail(f"{type(error).__name__}: {error} ({hint})", BUG)


def _is_disk_full(error: BaseException) -> bool:
    """Look for ENOSPC in an error and its causes; libraries in C++ and Rust only say it in words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    behind = error.__cause__ or error.__context__
    return "No space left on device" in str(error) or (behind is not None and _is_disk_full(behind))


def _see_help(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f" (see {context.command_path} --help)" if context else ""


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code

"""The `dpo` command: its verbs, and its exit codes. The work of a verb is in `workflows`.

Data goes to stdout, progress and errors to stderr. Exit codes: 0 done, 1 refused with a reason, 2 wrong usage, 3 a run
stopped itself, 4 another process of a run died, 130 interrupted, 143 after SIGTERM, 129 after SIGHUP, 141 when the
reader of our output is gone.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from typing import Annotated, Any, TextIO

import typer

from dpo_studio.cli import cache, data, judge
from dpo_studio.cli.chat import chat
from dpo_studio.cli.demo import demo
from dpo_studio.cli.eval import evaluate
from dpo_studio.cli.export import export
from dpo_studio.cli.generate import generate
from dpo_studio.cli.models import models
from dpo_studio.cli.quantize import quantize
from dpo_studio.cli.rounds import rounds
from dpo_studio.cli.schema import schema
from dpo_studio.cli.score import score
from dpo_studio.cli.studio import studio
from dpo_studio.cli.sweep import sweep
from dpo_studio.cli.train import train

__all__ = ["app", "main", "set_environment"]

app = typer.Typer(
    name="dpo",
    help="Direct Preference Optimization for the model and the machine you have.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
for _verb in (demo, train, rounds, sweep, score, generate, chat, quantize, export, models, studio):
    app.command()(_verb)
app.command("eval")(evaluate)
app.command()(schema)
for _verbs in (data.app, cache.app, judge.app):
    app.add_typer(_verbs)

INTERRUPTED = 128 + signal.SIGINT
UNREAD = 128 + signal.SIGPIPE
"""Exit code when the reader of our output is gone."""
_LESS_MEMORY = (
    "end what else is on the GPU (`nvidia-smi` shows it), ask for shorter pairs or answers, "
    "or choose a smaller or a GPTQ base"
)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from dpo_studio import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """The `dpo` command: errors become one message and an exit code, never a traceback."""
    from dpo_studio.errors import DPOStudioError

    set_environment()
    _open_closed_streams()
    _prepare_streams()
    signal.signal(signal.SIGTERM, _ended)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, _ended)
    try:
        _refuse_names_that_are_no_text(sys.argv[1:])
        _refuse_several_processes(sys.argv[1:])
        command = typer.main.get_command(app)
        if "--help" in sys.argv[2:]:  # of a verb
            _fill_in(command)
        outcome = command(prog_name="dpo", standalone_mode=False)
        if outcome == INTERRUPTED:  # typer hides a KeyboardInterrupt in what it returns
            raise KeyboardInterrupt
        sys.stdout.flush()  # here, where a closed pipe or a full disk can still be reported
    except DPOStudioError as error:
        _die(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _die("interrupted", INTERRUPTED)
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # typer's own answer to it is 1
            sys.exit(UNREAD)
        raise
    except BrokenPipeError:  # `dpo score ... | head`
        _nobody_reads(sys.stdout)
        sys.exit(UNREAD)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        hint = "\n  hint: free some space and run the same command" if error.errno == errno.ENOSPC else ""
        _die(f"{where}{error.strerror or error}{hint}", 1)
    except Exception as error:
        if _is_out_of_memory(error):
            said = " ".join(str(error).split()).split(". ")[:3]  # the rest is of torch's own settings
            _die(f"{'. '.join(said)}\n  hint: {_LESS_MEMORY}", 1)
        if not hasattr(error, "format_message"):
            raise
        _wrong_usage(error)


def _fill_in(command: Any) -> None:
    """List the judges, formats and losses that there are now in every help text that names them in braces."""
    from dpo_studio.evaluation.judges import judges_help
    from dpo_studio.objectives import objectives_help
    from dpo_studio.preferences.formats import formats_help

    lists = {"{judges}": judges_help(), "{formats}": formats_help(), "{objectives}": objectives_help()}
    commands = [command]
    while commands:
        command = commands.pop()
        commands.extend(getattr(command, "commands", {}).values())
        for param in command.params:
            for name, listed in lists.items():
                if name in (getattr(param, "help", None) or ""):
                    param.help = param.help.replace(name, listed)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU ran out of memory; if torch was not imported, nothing ran on a GPU."""
    return isinstance(error, getattr(sys.modules.get("torch"), "OutOfMemoryError", ()))


def set_environment() -> None:
    """Set environment variables that libraries read as they start, unless the user has set them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # OpenMP's threads spin while they wait, and next to another busy process every product then waits for a time slice:
    # ten times slower. Spinning 2,000 turns instead of 300,000 cost nothing on a quiet machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Rows of a GPU differ in length, and torch's blocks of fixed size fit none but their own: a small model's 964 MiB
    # took 1,264 of the card.
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _open_closed_streams() -> None:
    """A stream closed at the start (`>&-`) reads and shows nothing, and no file of ours gets its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123 - for as long as we run


def _refuse_names_that_are_no_text(arguments: list[str]) -> None:
    """A file's name may be any bytes; recipes, reports and cards are UTF-8, and could not say which file it was.

    Raises:
        UsageError: an argument is not text in this locale.
    """
    from dpo_studio.errors import UsageError
    from dpo_studio.reading import shown_path

    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            ascii_only = sys.getfilesystemencoding() != "utf-8"
            hint = "set LC_ALL=C.UTF-8" if ascii_only else "rename the file: its name is not UTF-8"
            raise UsageError(f"{shown_path(argument)} is not text in this locale", hint=hint)


def _refuse_several_processes(arguments: list[str]) -> None:
    """A launcher has started this process and others, and the verb would do the same in each of them.

    Raises:
        UsageError: it is none that several processes share.
    """
    from dpo_studio.errors import UsageError

    several = "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    if several and not {"train", "score", "--help", "--version"}.intersection(arguments[:1]):
        raise UsageError(
            "several processes were started, and `dpo train` and `dpo score` alone can use them",
            hint="start it with one process",
        )


def _prepare_streams() -> None:
    """A terminal that cannot show a character gets its number, never an exception."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _ended(number: int, frame: object) -> None:
    _print_error("error: terminated" if number == signal.SIGTERM else "error: the terminal has gone (SIGHUP)")
    sys.exit(128 + number)


def _print_error(line: str) -> None:
    """Print a last line on stderr, if it has a reader."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _nobody_reads(sys.stderr)


def _nobody_reads(stream: TextIO) -> None:
    """Discard the stream's buffer, or Python would fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _wrong_usage(error: Any) -> None:
    """An error in the command line; `dpo` alone is not one, and prints the help text."""
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)
        sys.exit(2)
    command = error.ctx.command_path if getattr(error, "ctx", None) is not None else "dpo"
    message = error.format_message().replace("Value error, ", "")  # pydantic's, of a choice that is none
    _die(f"{message}\n  hint: `{command} --help` lists what there is", 2)


def _die(message: str, code: int) -> None:
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # it is ending already: another Ctrl-C gives no message and no traceback
        signal.signal(number, lambda *_: os._exit(code))
    from dpo_studio.console.text import printable

    try:
        sys.stdout.flush()  # what is data goes first
    except OSError:
        _nobody_reads(sys.stdout)
    if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("LOCAL_RANK", "0") == "0":  # one of them says it
        _print_error(f"error: {printable(message)}")
    sys.exit(code)

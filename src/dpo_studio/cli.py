"""The command line. It routes and prints; what a verb does is in `workflows`, imported when the verb is used.

Data goes to stdout, progress and errors to stderr. Exit codes: 0 done, 1 refused with a reason, 2 wrong usage, 3 a run
stopped itself, 130 interrupted, 143 after SIGTERM, 129 after SIGHUP, 141 when nobody reads our output any more.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Optional, TextIO

import typer

from dpo_studio import cli_cache, cli_data, cli_eval, cli_judge, cli_talk
from dpo_studio.cli_choices import Bits, Dtype, Form, TooLong, Tracker
from dpo_studio.cli_source import (
    Format,
    Labels,
    Map,
    Overwrite,
    Revision,
    Rows,
    Source,
    Split,
    source_section,
    source_section_of,
)

app = typer.Typer(
    name="dpo",
    help="Direct Preference Optimization for the model and the machine you have.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(cli_data.app)
app.add_typer(cli_cache.app)
app.add_typer(cli_judge.app)

INTERRUPTED = 128 + signal.SIGINT
UNREAD = 128 + signal.SIGPIPE
"""A reader of our output went away."""
_LESS_MEMORY = (
    "end what else is on the GPU (`nvidia-smi` shows it), ask for shorter pairs or answers, "
    "or choose a smaller or a GPTQ base"
)
_LARGEST_PROMPT = 16 * 2**20
"""Bytes of a prompt from stdin: a row of data has no more."""
Overrides = Annotated[Optional[list[str]], typer.Option("--set", metavar="A.B=C", help="Override a recipe key.")]  # noqa: UP045 - typer reads it at run time
Anyway = Annotated[bool, typer.Option("--anyway", help="Train on pairs that make the run worthless, too.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token every time.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this share.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same answers.")]
GroupSize = Annotated[str, typer.Option(help="Inputs that share a scale; auto: the largest of 128, 64, 32 that fits.")]
CalibrationRows = Annotated[int, typer.Option("--rows", min=1, help="Prompts with chosen answers to calibrate on.")]
DescAct = Annotated[bool, typer.Option("--desc-act", help="Quantise the inputs that matter most first (act-order).")]


@app.command()
def demo(out: Annotated[Path, typer.Option(help="The run folder to make.")] = Path("runs/demo")) -> None:
    """The whole story on the bundled model and pairs, on a CPU, in minutes."""
    from dpo_studio.reports.text import percent
    from dpo_studio.workflows.demo import run_demo

    result = run_demo(out)
    if "win_rate" in result:
        low, high = result["win_rate_ci95"]
        interval = f"95 % interval {percent(low)} to {percent(high)}"
        print(f"win rate {percent(result['win_rate'])} ({interval}), {result['n']} comparisons")
    print(out / "report.html")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/demo.yaml.")],
    overrides: Overrides = None,
    tracker: Tracker = None,
    save_every: Annotated[Optional[str], typer.Option(help="Steps between checkpoints, or minutes: 10min.")] = None,  # noqa: UP045
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check recipe, data and model; train nothing.")] = False,
    anyway: Anyway = False,
    verify: Annotated[bool, typer.Option("--verify", help="Train a few steps twice; exit 3 if they differ.")] = False,
) -> None:
    """Train what a recipe says; the same command again continues an unfinished run."""
    from dpo_studio.config import load_recipe

    given = {"run.tracker": tracker, "training.save_every": save_every}
    changes = [*(overrides or []), *(f"{key}={value}" for key, value in given.items() if value)]
    load_recipe(recipe, changes)  # a slip in it is told of before torch is imported, which takes five seconds
    from dpo_studio.workflows.training import check_recipe, train_recipe

    if dry_run:
        check_recipe(recipe, changes, anyway=anyway)
        return
    if verify:
        from dpo_studio.workflows.verifying import verify_recipe

        verdict = verify_recipe(recipe, changes, anyway=anyway)
        print(verdict.text)
        sys.exit(0 if verdict.deterministic else 3)
    from dpo_studio.reports.text import percent

    result = train_recipe(recipe, changes, anyway=anyway)
    if "accuracy" in result:
        low, high = result["accuracy_ci95"]
        print(
            f"held-out accuracy {percent(result['accuracy'])} (95 % interval {percent(low)} to {percent(high)}), "
            f"before {percent(result['accuracy_before'])}, longer answer wins {percent(result['longer_wins'])}"
        )


@app.command()
def sweep(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/demo.yaml.")],
    overrides: Overrides = None,
    out: Annotated[Optional[Path], typer.Option(help="The sweep's folder; default: the run's, with -sweep.")] = None,  # noqa: UP045
    anyway: Anyway = False,
) -> None:
    """Train with every combination of `--set a.b=x,y,z`; runs share a reference, and one table and figure."""
    from dpo_studio.workflows.sweeping import run_sweep

    folder = run_sweep(recipe, overrides or [], out=out, anyway=anyway)
    print((folder / "sweep.md").read_text(encoding="utf-8"), end="")


@app.command()
def score(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN")],
    source: Source,
    out: Annotated[Optional[Path], typer.Option(help="Write the lines here instead of stdout.")] = None,  # noqa: UP045
    overwrite: Overwrite = False,
    beta: Annotated[Optional[float], typer.Option(help="Reward per nat; default: the run's, else 0.1.")] = None,  # noqa: UP045
    dtype: Dtype = None,
    max_length: Annotated[Optional[int], typer.Option(min=8, help="Longest prompt and answer, in tokens.")] = None,  # noqa: UP045
    too_long: TooLong = "drop",
    format_: Format = "auto",
    map_: Map = None,
    label: Labels = None,
    split: Split = None,
    rows: Rows = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="The summary on stderr as JSON.")] = False,
) -> None:
    """Log-probs of both answers under policy and reference, margins and accuracy, one JSON line a pair."""
    section = source_section(source, format_, map_, label, split, rows, revision)
    from dpo_studio.workflows.scoring import score_pairs, score_to_file

    settings: dict[str, Any] = {
        "beta": beta,
        "dtype": dtype,
        "max_length": max_length,
        "too_long": too_long,
    }
    if out is not None:
        summary = score_to_file(model, section, out, overwrite=overwrite, **settings)
    else:
        summary = score_pairs(model, section, sys.stdout, **settings)
    _summary(summary, as_json)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN")],
    prompt: Annotated[Optional[str], typer.Option(help="What to answer; - reads it from stdin.")] = None,  # noqa: UP045
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE", help="Many: one a line, or .jsonl with `prompt`. Answered in batches, as JSON Lines."
        ),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="With --prompts: write the lines here, not to stdout.")] = None,  # noqa: UP045
    overwrite: Overwrite = False,
    temperature: Temperature = 0.7,
    max_new_tokens: MaxNewTokens = 256,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    system: Annotated[Optional[str], typer.Option(help="A system turn before the prompt.")] = None,  # noqa: UP045
    base: Annotated[bool, typer.Option("--base", help="Answer with the reference instead of the tuned model.")] = False,
    both: Annotated[bool, typer.Option("--both", help="With --prompts: answers of both, a line each.")] = False,
    samples: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="With --prompts: so many answers to each prompt, a line each."),
    ] = None,
    dtype: Dtype = None,
) -> None:
    """Answer one prompt, streamed, or a file of them, with the model's chat template."""
    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("one of the two is wanted", param_hint="--prompt or --prompts")
    for option, given in (("--out", out is not None), ("--both", both), ("--samples", samples is not None)):
        if given and prompts is None:
            raise typer.BadParameter("goes with --prompts", param_hint=option)
    if base and both:
        raise typer.BadParameter("one of the two", param_hint="--base or --both")
    from dpo_studio.reading import input_text
    from dpo_studio.workflows.talking import Chat, Sampling, check_batched, read_prompts
    from dpo_studio.writing import check_outputs

    sampling = Sampling(temperature, max_new_tokens, top_p, seed)
    if prompts is not None:
        if out is not None:
            check_outputs({"--out": out}, reads=[prompts, model], overwrite=overwrite)
        check_batched(sampling, samples or 1)
        asked = read_prompts(prompts)
        lines, cut = cli_talk.answer_all(
            _load(model, dtype, with_reference=base or both),
            asked,
            sampling,
            system,
            sides=("base", "tuned") if both else ("base",) if base else ("tuned",),
            samples=samples,
        )
        cli_talk.write_lines(lines, out, overwrite=overwrite)
        if cut:
            print(f"{cut} of {len(lines)} answers {cli_talk.cut_note(max_new_tokens)}", file=sys.stderr)
        return
    text = input_text("-", what="prompt", limit=_LARGEST_PROMPT) if prompt == "-" else prompt or ""
    if not text.strip():
        raise typer.BadParameter("the prompt is empty", param_hint="--prompt")
    chat = Chat(_load(model, dtype, with_reference=base), sampling, system, tuned=not base)
    _print_stream(chat.say(text))
    if chat.cut:
        print(cli_talk.cut_note(max_new_tokens), file=sys.stderr)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN")],
    temperature: Temperature = 0.7,
    max_new_tokens: MaxNewTokens = 256,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    system: Annotated[Optional[str], typer.Option(help="A system turn before the conversation.")] = None,  # noqa: UP045
    dtype: Dtype = None,
) -> None:
    """Talk with a model. /base and /tuned switch between them, /new starts over, /help lists more, /quit ends."""
    from dpo_studio.workflows.talking import Chat, Sampling

    talk = Chat(_load(model, dtype), Sampling(temperature, max_new_tokens, top_p, seed), system)
    cli_talk.converse(talk, model, _print_stream)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A dense model: a folder, a Hub id or the bundled one.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    calibration: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Pairs whose prompts and chosen answers the integers are fitted to: your own."),
    ] = None,
    bits: Bits = 4,
    group_size: GroupSize = "auto",
    rows: CalibrationRows = 128,
    desc_act: DescAct = False,
    max_length: Annotated[int, typer.Option(min=8, help="Longest prompt and answer, in tokens.")] = 1024,
    format_: Format = "auto",
    map_: Map = None,
    label: Labels = None,
    split: Split = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a GPTQ model, calibrated on your own prompts and chosen answers."""
    size = _group(group_size)
    section = source_section_of("--calibration", calibration, format_, map_, label, split, None, revision)
    from dpo_studio.workflows.cards import perplexity_line
    from dpo_studio.workflows.quantizing import Calibration, Quantising, quantize_model

    chosen = Calibration(section, rows, max_length)
    result = quantize_model(
        model, out, calibration=chosen, settings=Quantising(bits, size, desc_act), overwrite=overwrite
    )
    if result["perplexity"] is not None:
        print(perplexity_line(result))
    print(out)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    to: Form,
    bits: Bits = 4,
    group_size: GroupSize = "auto",
    rows: CalibrationRows = 128,
    desc_act: DescAct = False,
    force: Annotated[bool, typer.Option("--force", help="Make it though it is too far from the run's model.")] = False,
    overwrite: Overwrite = False,
    dtype: Dtype = None,
) -> None:
    """Write the adapter, one merged model or one GPTQ folder; it is compared with the run's model first."""
    size = _group(group_size)
    from dpo_studio.workflows.exporting import Quantising, export_run

    settings = Quantising(bits, size, desc_act)
    export_run(run, out, to, settings=settings, rows=rows, force=force, overwrite=overwrite, dtype=dtype)
    print(out)


app.command("eval")(cli_eval.evaluate)


@app.command()
def schema() -> None:
    """The recipe's JSON Schema, for editors."""
    import json

    from dpo_studio.config import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
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
        outcome = app(prog_name="dpo", standalone_mode=False)
        if outcome == INTERRUPTED:  # typer hides a KeyboardInterrupt in what it returns
            raise KeyboardInterrupt
        sys.stdout.flush()  # here, where a closed pipe or a full disk can still be told of
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


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory did not suffice; where torch was not imported, nothing ran on a GPU."""
    return isinstance(error, getattr(sys.modules.get("torch"), "OutOfMemoryError", ()))


def set_environment() -> None:
    """What libraries read as they start, where the user has not said otherwise."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # OpenMP's threads spin while they wait, and beside another busy process every product then waits for a time slice:
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
            raise UsageError(f"{shown_path(argument)} is no text in this locale", hint=hint)


def _prepare_streams() -> None:
    """A terminal that cannot show a character gets its number, never an exception."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _ended(number: int, frame: object) -> None:
    _tell("error: terminated" if number == signal.SIGTERM else "error: the terminal has gone (SIGHUP)")
    sys.exit(128 + number)


def _tell(line: str) -> None:
    """A last line on stderr, if anybody still reads there."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _nobody_reads(sys.stderr)


def _nobody_reads(stream: TextIO) -> None:
    """What is left in the stream's buffer goes nowhere, or Python would fail once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _wrong_usage(error: Any) -> None:
    """A mistake in the command line; `dpo` alone is none, and is answered with the help text."""
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
    ):  # it is ending already: another Ctrl-C is no news, and no traceback
        signal.signal(number, lambda *_: os._exit(code))
    from dpo_studio.reports.text import printable

    try:
        sys.stdout.flush()  # what is data goes first
    except OSError:
        _nobody_reads(sys.stdout)
    _tell(f"error: {printable(message)}")
    sys.exit(code)


def _load(model: str, dtype: str | None, *, with_reference: bool = False) -> Any:
    from dpo_studio.reports.progress import Progress
    from dpo_studio.workflows.loading import load_any

    with Progress() as progress:
        return load_any(model, dtype=dtype, with_reference=with_reference, say=progress.say)


def _group(group_size: str) -> int | None:
    if group_size == "auto":
        return None
    if not group_size.isdecimal() or int(group_size) < 1:
        raise typer.BadParameter(f"{group_size!r} is neither auto nor a number", param_hint="--group-size")
    return int(group_size)


def _print_stream(pieces: Any) -> None:
    """Model text to a terminal: control characters made visible, so that no answer can rewrite the screen."""
    from dpo_studio.reports.text import printable

    if sys.stdout.isatty():
        pieces = cli_talk.wrapped(map(printable, pieces), shutil.get_terminal_size().columns)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _summary(summary: dict[str, Any], as_json: bool) -> None:
    import json

    if as_json:
        print(json.dumps(summary), file=sys.stderr)
        return
    from dpo_studio.reports.text import percent

    for name, value in summary.items():
        shown = value
        if name.startswith(("accuracy", "longer_wins")):  # shares: percent where people read, fractions in JSON
            shown = " to ".join(map(percent, value)) if isinstance(value, list) else percent(value)
        print(f"{name}: {shown}", file=sys.stderr)

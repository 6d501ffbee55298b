"""The command ``quantloom calibrate``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..formats.errors import UsageError
from . import console
from .options import TALKING, add_options

if TYPE_CHECKING:
    from .calibrate import Calibration

STOPPED = "stopped: what finished passes had found is kept; run the same command again, and it goes on from there"

_EPILOG = """\b
Examples:
  quantloom calibrate llama/ --random-tokens --out stats.zarr
  quantloom calibrate llama/ --text book.txt --tokens 65536 --out stats.zarr
  quantloom calibrate flux/transformer/ --random-tokens --tokens 131072 --device cuda
  quantloom calibrate llama/ --norm-prior --out prior.zarr
  quantloom calibrate --merge a.zarr --merge b.zarr --out both.zarr
"""

_OPTIONS = [
    click.option("--random-tokens", is_flag=True,
                 help="Run the model on random token ids (a diffusion model: on random latents, timesteps and text "
                 "embeddings). Needs no data and brings most of what text brings: recommended without text of the "
                 "model's own domain."),
    click.option("--text", metavar="FILE", help="Run the model on the first tokens of a text file."),
    click.option("--norm-prior", is_flag=True,
                 help="Run nothing: take what the norms before layers say of their inputs. Weaker than random tokens."),
    click.option("--merge", "stores", metavar="STORE", multiple=True,
                 help="Add up stores that were made apart. Give it twice or more, and no MODEL_DIR."),
    click.option("--out", default="stats.zarr", show_default=True, metavar="STORE",
                 help="Where statistics go. A store that exists is added to."),
    click.option("--tokens", type=int, default=32768, show_default=True, metavar="N", help="How many, in all."),
    click.option("--sequence-length", type=int, default=256, show_default=True, metavar="N",
                 help="Tokens in the longest sequences, fewer where the model takes fewer. Shorter ones, by powers of "
                 "two down to 16, get as many tokens: what a layer is given depends on how long a text is."),
    click.option("--batch-size", type=int, default=8, show_default=True, metavar="N",
                 help="Longest sequences that the model sees at a time."),
    click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of everything random."),
    click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="cpu, cuda or cuda:0."),
    click.option("--memory", metavar="SIZE",
                 help="For matrices of one pass, such as 8GB; fewer bytes, more passes. Default: half of what the "
                 "device has free."),
    click.option("--diagonal", is_flag=True,
                 help="Keep E[x^2] of every channel only: kilobytes instead of gigabytes, and rounding gains less."),
]  # fmt: skip


@click.command(epilog=_EPILOG, short_help="Measure what a model's layers are given.")
@click.argument("model_dir", required=False)
@add_options(_OPTIONS, TALKING)
def calibrate(model_dir: str | None, quiet: bool, verbose: int, as_json: bool, **options: Any) -> int:
    """Run the model in MODEL_DIR and write statistics of its layers' inputs to a store, for convert --statistics.

    MODEL_DIR is a local folder that transformers or diffusers can load; nothing is downloaded. A command that was
    stopped goes on where it stood when it is run again; other data for the same store adds up.
    """

    def action() -> int:
        console.setup_logging(-1 if quiet else verbose)
        made = _calibrated(model_dir, options, quiet or as_json)
        if as_json:
            console.print_json(made)
        elif not quiet:
            console.stdout().print(_words(made, model_dir), soft_wrap=True, markup=False)
        return 0

    return console.guarded(action, STOPPED)


def _calibrated(model_dir: str | None, options: dict[str, Any], silent: bool) -> dict[str, Any]:
    """What was made, as JSON."""
    from .calibrate_folder import Data, calibrate_folder, calibrate_norms, merge
    from .calibrate_progress import CalibrationDisplay
    from .token_batches import Amount

    out, stores = options["out"], options["stores"]
    given = [name for name in ("random_tokens", "text", "norm_prior") if options[name]]
    if stores:
        if model_dir or given:
            raise UsageError("--merge adds up stores that exist: leave MODEL_DIR and where its data comes from out")
        return merge(stores, out).describe()
    if not model_dir:
        raise UsageError("MODEL_DIR is missing: the folder of a model that transformers or diffusers can load")
    if len(given) != 1:
        what = "is missing" if not given else "was said twice"
        raise UsageError(f"where data comes from {what}: give one of --random-tokens (without data), --text FILE and "
                         "--norm-prior")  # fmt: skip
    if options["norm_prior"]:
        return calibrate_norms(model_dir, out).to_dict()
    amount = Amount(options["tokens"], options["sequence_length"], options["batch_size"])
    data = Data(amount, options["text"], options["seed"])
    watcher = None if silent else CalibrationDisplay(console.stderr())
    made: Calibration = calibrate_folder(
        model_dir, data, options["device"], out,
        memory=options["memory"], diagonal=options["diagonal"], progress=watcher,
    )  # fmt: skip
    return made.to_dict()


def _words(made: dict[str, Any], model_dir: str | None) -> str:
    """The report in lines, and what to do next."""
    diagonal = f", of {made['diagonal']} the diagonal only" if made["diagonal"] else ""
    tokens = f"{made['tokens']} tokens" if made["tokens"] > 1 else "weights of norms"
    notes = [f"note: {note}" for note in made.get("notes", [])]
    seconds = f" in {made['seconds']:.1f} s" if "seconds" in made else ""
    first = f"{Path(made['path']).name}: {made['layers']} layers with {made['inputs']} inputs{diagonal}, {tokens}"
    rounded = ["--format", "nvfp4", "--rounding", "calibrated", "--statistics", made["path"]]
    following = shlex.join(["quantloom", "convert", model_dir or "MODEL", "OUTPUT", *rounded])
    return "\n".join([*notes, first + seconds, *(f"  {run}" for run in made["runs"]), f"use it: {following}"])

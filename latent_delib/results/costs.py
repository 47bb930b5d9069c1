"""The table of all methods: what each costs in training, and what it gains."""

from contextlib import suppress
from pathlib import Path

from latent_delib.delib import cost
from latent_delib.delib.methods import METHODS
from latent_delib.errors import Outage, UserError
from latent_delib.job import build, parameters
from latent_delib.job import plan as planning
from latent_delib.nn.sizes import TransformerConfig
from latent_delib.results import tables
from latent_delib.results.entries import Entry, entries, is_control, labels
from latent_delib.results.runs import PERPLEXITY, Result, Runs
from latent_delib.results.table_format import Figure, Row, Table, score
from latent_delib.weights import folder, locate

AHEAD = [f"n = {n}" for n in (1, 4, 16, 32)]  # columns
COSTS = ["trained parameters", "steps", "GFLOP per step", "ms per step"]
WHOLE, TENTHS = "{:,.0f}", "{:,.1f}"


def table(found: Runs) -> Table:
    """Makes the table of all trained models: the costs of each, its changes, its scores.

    Controls are left out. GFLOP counts no repeated work. ms is the median step time of
    metrics.jsonl, on the machine that trained.
    """
    trained = [each for each in entries(found) if each.model == "augmented" or each.trained]
    ours = [entry for entry in trained if not is_control(entry)]
    benchmarks: dict[str, None] = {}
    rows: list[Row] = []
    used: list[Result] = []
    for entry, words in zip(ours, labels(ours)):
        benchmarks |= dict.fromkeys(entry.scores)
        rows.append(_row(entry, found, words))
        used += entry.results
    columns = ["what", "latents", "from", *COSTS, *AHEAD, *benchmarks]
    return tables.make_table("12_costs", "What every method costs and gains", columns, rows, used)


def _row(entry: Entry, found: Runs, words: str) -> Row:
    """Returns the line of one model, which is said in words."""
    row = tables.first_cells(entry, words)
    costs = training_costs(entry.result)
    if costs is not None:
        trained, flops = costs
        row["trained parameters"] = Figure(trained, WHOLE)
        row["GFLOP per step"] = Figure(flops / 1e9, TENTHS)
    if entry.result.step:
        row["steps"] = Figure(entry.result.step, WHOLE)
    for result in entry.results:
        seconds = found.step_seconds.get(_workdir(result.path.parent))
        if seconds is not None:
            row["ms per step"] = Figure(1000 * seconds, WHOLE)
        if result.path.name == PERPLEXITY:
            row |= tables.changes(result.data)
    for benchmark, (scored, _) in entry.scores.items():
        row[benchmark] = score(scored)
    return row


def _workdir(folder: Path) -> Path:
    """Returns the workdir of a result's folder, which may be WORKDIR/evaluations/STEP."""
    return folder.parents[1] if folder.parent.name == "evaluations" else folder


def architecture_of(result: Result) -> TransformerConfig | None:
    """Returns the architecture of a run's decoder; None where not known.

    Older files do not record it. It is then the config's, if complete, or that of the decoder's
    folder, if the folder still has the run's fingerprint.
    """
    record = result.record
    for fields in (record.architecture, record["decoder.architecture"]):
        with suppress(UserError):  # incomplete
            return TransformerConfig.from_dict(fields or {}, str(result.path))
    with suppress(UserError, Outage):  # no such folder here, or the Hub does not answer
        decoder = locate.find_decoder(record["decoder.path"])
        if folder.fingerprint(decoder) == record.fingerprint:
            return folder.read_config(decoder)
    return None


def training_costs(result: Result) -> tuple[int, float] | None:
    """Returns a run's trained parameters and its useful FLOPs per step.

    Returns None if its decoder's architecture or its method is not known.
    """
    record = result.record
    method = result.method
    decoder = architecture_of(result)
    if decoder is None or method["name"] not in METHODS:
        return None
    aug = build.augmentation(record, decoder)
    trained = parameters.trainable_shapes(aug, method.get("lora_rank", 0))
    counted = cost.step_flops(
        aug,
        record["train.batch_size"],
        record["data.seq_len"],
        method["num_traces"],
        method["num_ahead"],
    )
    return planning.count(trained), counted.useful

"""The generated parts of README.md and docs: each function makes one of them, in Markdown, from the results."""

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from records import OURS, PEERS, TWINS, Document, Record, against, by_case, commit_of, hardware, ratio

# Ours and what it is like for like with, by op, in the summary.
LIKE_FOR_LIKE = {
    "vector_quantize": ("ours", "eager"),
    "assign_codes": ("ours", "eager"),
    "weighted_info_nce": ("ours", "eager"),
    "vqgan": ("fp32", "taming"),
    "autoregressive": ("fp32", "taming"),
    "diffusion": ("fp32", "plain"),
}
OPS = ("vector_quantize", "assign_codes", "weighted_info_nce")
STEPS = {
    "vqgan": "VQ-GAN with discriminator",
    "autoregressive": "autoregressive prior",
    "diffusion": "diffusion prior",
}
NOTHING = "-"
TIMES = ("ours, ms", "ms")
"""Headings of absolute times."""

Rows = list[list[str]]


def table(head: list[str], rows: Rows) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def timed(document: Document, head: list[str], rows: Rows) -> str:
    """The table; absolute times only of a GPU, whose name says how fast it is: those of a CPU are its owner's alone."""
    kept = [k for k, name in enumerate(head) if name not in TIMES or document.on_gpu]
    return table([head[k] for k in kept], [[row[k] for k in kept] for row in rows])


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits and every digit before the point; a dash for nothing."""
    if value is None or math.isnan(value):
        return NOTHING
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(places, 0)}f}"


def percent(value: float | None, digits: int = 1) -> str:
    return NOTHING if value is None else f"{100 * value:.{digits}f} %"


def times(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.{1 if value < 100 else 0}f} x"


def told(status: str) -> str:
    """Why there is no time; a wrong result must not be overlooked."""
    return "WRONG" if status == "wrong" else status


def source(document: Document, page_depth: int) -> str:
    """Hardware, date, commits, and the file, linked from a page so many folders below the root."""
    commits = ("commits " if len(document.commits) > 1 else "commit ") + ", ".join(document.commits)
    link = "../" * page_depth + "bench/results/" + document.path.name
    told = [document.hardware, document.date, commits if document.commits else "", old_baselines(document)]
    return f"{'; '.join(part for part in told if part)} ([JSON]({link}))."


def old_baselines(document: Document) -> str:
    """Label results from before the baselines had the codebook gradient of ours."""
    runs = [*document.raw.get("cases", []), *(entry["extra_info"] for entry in document.raw.get("benchmarks", []))]
    if not document.of("vector_quantize") or any("codebook_grad" in run for run in runs):
        return ""
    noise = ", noise sampled for all rows" if document.on_gpu else ""
    return f'baselines of `vector_quantize`: "hard" codebook gradient (ours: "soft"){noise}'


def own(document: Document, op: str) -> str:
    """The competitor that is ours, as users get it."""
    mine = LIKE_FOR_LIKE[op][0]
    return document.ours if mine == "ours" else mine


def named(op: str) -> str:
    return f"`{op}`" if op in OPS else STEPS[op]


def rivals(op: str, case: dict[str, Record]) -> list[str]:
    """Whom ours is to be no worse than. Of a step the baseline alone: other modes are ours, or of another precision."""
    return [name for name in columns([case]) if op in OPS or name == LIKE_FOR_LIKE[op][1]]


def columns(cases: Iterable[dict[str, Record]]) -> list[str]:
    """The peers that take part in any of the cases."""
    names = dict.fromkeys(name for case in cases for name in case)
    return sorted(
        (name for name in names if name not in (*OURS, "matmul")),
        key=lambda name: PEERS.index(name) if name in PEERS else len(PEERS),
    )


# --------------------------------------------------------------------------------------------------------------- ops


def op_table(document: Document, op: str) -> str:
    """Every measured case of an op: times of ours, how many times as fast it is as each peer, memory, rates."""
    cases = by_case(document.of(op))
    peers, mine = columns(cases.values()), own(document, op)
    kinds = [name for name in ("eager", "compiled") if name in peers] + ["ours"]
    rates = any(record.share is not None for case in cases.values() for record in case.values())
    head = [f"`{op}`", "ours, ms", *(f"against {name}" for name in peers), *(f"MiB, {name}" for name in kinds)]
    head += ["TFLOP/s", "of the matmul rate"] if rates else []

    def row(case: dict[str, Record]) -> list[str]:
        ours, any_record = case.get(mine), next(iter(case.values()))
        cells = [f"{any_record.part}, {any_record.size}", number(ours.ms if ours else None)]
        for name in peers:
            status = case[name].status if name in case else "ok"
            cells.append(times(against(case, mine, name)) if status == "ok" else told(status))
        records = [ours if name == "ours" else case.get(name) for name in kinds]
        cells += [number(record.mib if record else None) for record in records]
        if rates:
            cells += [number(ours.tflops if ours else None), percent(ours.share if ours else None, 0)]
        return cells

    return timed(document, head, [row(case) for case in cases.values()])


def largest(cases: dict[tuple[Any, ...], dict[str, Record]], mine: str) -> list[dict[str, Record]]:
    """The case of each part with the most operations, among those where ours has a time."""
    found: dict[str, dict[str, Record]] = {}
    for case in cases.values():
        ours = case.get(mine)
        if ours is None or ours.ms is None or ours.part == "backward":  # forward and both say it
            continue
        best = found.get(ours.part)
        if best is None or (ours.flops or 0) > (best[mine].flops or 0):
            found[ours.part] = case
    return list(found.values())


def summary(document: Document, ops: Iterable[str] = LIKE_FOR_LIKE) -> str:
    """One row a part of each op, at its largest size, and one of each step."""
    rows: Rows = []
    for op in ops:
        mine, other = own(document, op), LIKE_FOR_LIKE[op][1]
        for case in largest(by_case(document.of(op)), mine):
            ours, baseline = case[mine], case.get(other)
            same_job = [name for name in rivals(op, case) if case[name].ms and name not in TWINS]
            peers = {name: against(case, mine, name) for name in same_job}
            closest = min(peers, key=lambda name: peers[name], default=other)
            rows.append(
                [
                    f"{named(op)}, {ours.part}, {ours.size}",
                    number(ours.ms),
                    f"{times(ratio(ours, baseline))} ({other})",
                    f"{times(against(case, mine, closest))} ({closest})",
                    number(baseline.mib if baseline else None),
                    number(ours.mib),
                ]
            )
    head = ["", "ours, ms", "as fast as the baseline", "as the closest peer measured", "MiB, baseline", "MiB, ours"]
    return timed(document, head, rows)


# ------------------------------------------------------------------------------------------------- steps and priors


def step_tables(document: Document, op: str) -> str:
    """The modes of each part: time, how many times as fast as the first of the others, memory."""
    tables = []
    for case in by_case(document.of(op)).values():
        baseline = case.get(LIKE_FOR_LIKE[op][1])
        first = next(iter(case.values()))
        head = [f"{first.part}, {first.size}", "ms", f"against {LIKE_FOR_LIKE[op][1]}", "MiB"]
        rows = [
            [
                name,
                number(record.ms) if record.status == "ok" else told(record.status),
                times(ratio(record, baseline)),
                number(record.mib),
            ]
            for name, record in case.items()
        ]
        tables.append(timed(document, head, rows))
    return "\n\n".join(tables)


def full(document: Document, depth: int) -> str:
    """Everything that a file holds."""
    parts = [source(document, depth)]
    parts += [op_table(document, op) for op in OPS if document.of(op)]
    parts += [
        f"**{STEPS[op][:1].upper()}{STEPS[op][1:]}**\n\n{step_tables(document, op)}" for op in STEPS if document.of(op)
    ]
    parts += [where_worse(document), not_measured(document)]
    return "\n\n".join(part for part in parts if part)


def where_worse(document: Document) -> str:
    """The cases in which a peer is faster than ours, or takes less memory: said, not to be looked for."""
    found = []
    for op in LIKE_FOR_LIKE:
        mine = own(document, op)
        for case in by_case(document.of(op)).values():
            for name in rivals(op, case):
                twin, peer, better = case.get(TWINS.get(name, mine), case.get(mine)), case[name], []
                if (speed := against(case, mine, name)) < 1:
                    better.append(f"is {1 / speed:.2f} x as fast")
                if twin and twin.mib and peer.mib is not None and peer.mib < twin.mib:
                    better.append(f"takes {number(peer.mib / twin.mib, 2)} of the memory")
                if better:
                    of_nearest = op == "vector_quantize" and TWINS.get(name) == "nearest"
                    ours = "`NearestQuantizer`" if of_nearest else named(op)
                    found.append(f"- {ours}, {peer.part}, {peer.size}: {name} {', '.join(better)}")
    where = " nowhere." if not found else "\n\n" + "\n".join(found)
    return f"Where ours is slower, or takes more memory, than a peer:{where}"


def not_measured(document: Document) -> str:
    """What the run of ``bench/gpu.py`` has no numbers of, and why."""
    by_reason: dict[str, list[str]] = {}
    for case, reason in document.raw.get("not_measured", {}).items():
        by_reason.setdefault(reason, []).append(case)
    found = [f"- {reason}: {'; '.join(cases)}" for reason, cases in by_reason.items()]
    for script, part in document.raw.get("parts", {}).items():
        if not part["measured"]:
            told = f", {part['told'][0]}" if part["told"] else ""
            found.append(f"- `{script}` {part['status']} after {part['seconds']:.0f} s{told}")
    return "Not measured:\n\n" + "\n".join(found) if found else ""


def targets(document: Document) -> str:
    """The targets of bench/gpu.py that were measured, met or missed."""
    rows = [
        [
            target["case"],
            target["what"],
            f"{'at most' if target['at_most'] else 'at least'} {target['target']:g}",
            number(target["measured"]),
            "met" if target["met"] else "**missed**",
        ]
        for target in document.raw.get("targets", [])
        if target["met"] is not None
    ]
    return table(["case", "target", "wanted", "measured", ""], rows) if rows else ""


# ------------------------------------------------------------------------------------------- results of another kind


STEP_COSTS = {
    "": "",
    "--amp": "fp32 master weights stay; fp16 on GPUs without bf16",
    "--activation-checkpointing": "one more forward pass of encoder and decoder; not a bit of the result",
    "--grad-accum-steps 2": "posterior, lambda and batch norm are of a part; `vq-vae` moves its codes once a part",
    "--activation-checkpointing --grad-accum-steps 2": "both",
}


def measured_on(raw: dict[str, Any], more: str = "") -> str:
    """Hardware, date and commit of results that ``machine`` describes, and what else there is to know."""
    commit = commit_of(raw["machine"]) or commit_of(raw)
    told = [hardware(raw["machine"]), raw.get("date", ""), f"commit {commit}", more, raw.get("note", "")]
    return "; ".join(part for part in told if part) + "."


def step_memory(raw: dict[str, Any]) -> str:
    names = {"": "(the scenes' model, fp32, with discriminator)", "--amp": "`--amp` (bf16)"}
    rows = [[names.get(flags, f"`{flags}`"), f"{mib}", STEP_COSTS[flags]] for flags, mib in raw["mib"].items()]
    head = ["what takes it away", "16 images of 128 px, MiB a step adds", "what it costs"]
    return f"{table(head, rows)}\n\n{measured_on(raw)}"


def main_job(raw: dict[str, Any]) -> str:
    first = next(iter(raw["runs"].values()))[0]

    def spread(runs: list[dict[str, Any]], name: str, form: Callable[[float], str]) -> str:
        values = [run[name] for run in runs]
        return f"{form(statistics.mean(values))} ± {form(statistics.stdev(values))}"

    rows = []
    for name, runs in raw["runs"].items():
        used = [spread(runs, "utilization", percent), spread(runs, "perplexity", lambda value: f"{value:.1f}")]
        quality = [
            spread(runs, "psnr", lambda value: f"{value:.1f}"),
            spread(runs, "ssim", lambda value: f"{value:.3f}"),
        ]
        rows.append([f"`{name}`", *used, *quality, spread(runs, "minutes", lambda value: f"{value:.1f}")])
    head = ["quantizer", "codebook utilization", f"perplexity of {first['codes']} codes", "PSNR, dB", "SSIM", "minutes"]
    return f"{table(head, rows)}\n\n{measured_on(raw)}"


def noise(raw: dict[str, Any]) -> str:
    """Table of the softmax and of sampled reconstructions, a row a run."""
    rows = []
    for run in raw["runs"]:
        softmax = run["softmax"]
        history = [" / ".join(form(record[name]) for record in softmax) for name, form in NOISE_HISTORY.items()]
        ratio = run["squared distance moved, over that of two random codes"]
        psnr = f"{run['PSNR of best codes']:.2f} / {run['PSNR of sampled codes']:.2f}"
        frechet = f"{run['Frechet distance of best codes']:.0f} / {run['Frechet distance of sampled codes']:.0f}"
        used = f"{percent(run['utilization'])}, {run['perplexity']:.0f}"
        sizes = [str(run["num_codes"]), str(run["code_dim"]), run["logits"], str(run["seed"])]
        rows.append([*sizes, *history, used, psnr, frechet, f"{ratio:.2f}"])
    head = ["N", "D", "logits", "seed", "entropy, nats", "largest p", "perturbed", "codes used, perplexity"]
    head += ["PSNR, dB, best / sampled", "FD, best / sampled", "distance moved"]
    first = raw["runs"][0]
    more = f"{first['steps']} steps of 16 images of {first['image size']} px"
    more += f"; FD: {first['features']}, {first['images']} images"
    return f"{table(head, rows)}\n\n{measured_on(raw, more)}"


NOISE_HISTORY: dict[str, Callable[[float], str]] = {
    "entropy": lambda value: f"{value:.1f}",
    "largest_p": lambda value: f"{value:.2f}",
    "perturbed": lambda value: percent(value, 0),
}


def priors_measured(raw: dict[str, Any], cells: str) -> str:
    """A table about priors, and where it was measured."""
    seed = raw["tokenizer"]["seed"]
    return f"{cells}\n\n{measured_on(raw, f'`train/vq.py --seed {seed}`')}"


def agreement(raw: dict[str, Any]) -> str:
    ar = raw["ar"]
    cells = [percent(ar[f"agreement of {what}"]) for what in ("scenes", "reconstructions", "samples")]
    head = ["scenes", "their reconstructions by the tokenizer", "samples of `train/ar.py`", "chance"]
    return priors_measured(raw, table(head, [[*cells, percent(ar["agreement by chance"])]]))


def turns(raw: dict[str, Any]) -> str:
    head = ["`vector_quantize`", "latents", "ours, ms", "as fast as eager", "as compiled", "MiB: ours, eager, compiled"]
    rows = [
        [
            entry["case"].removeprefix("forward+backward, ").removeprefix("trained-like, "),
            entry["latents"],
            f"{entry['ours, ms']:.3g}",
            *(f"{entry['times as fast as'][name]:.1f} x" for name in ("eager", "compiled")),
            ", ".join(f"{entry['MiB'][name]:.0f}" for name in ("ours", "eager", "compiled")),
        ]
        for entry in raw["turns"]
    ]
    where = f"{hardware(raw)}; {raw['date']}; commit {commit_of(raw) or 'unknown'}"
    return f"{table(head, rows)}\n\n{where}; forward plus backward."


def captions_heard(raw: dict[str, Any]) -> str:
    found = raw["diffusion"]["cross-entropy of masked tokens (nats)"]
    names = ("true captions", "no caption", "shuffled captions")
    shares = [share for share in found["share masked"] if share >= 0.5]
    rows = [
        ["all" if share == 1 else percent(share, 0), *(f"{found[name][i]:.2f}" for name in names)]
        for i, share in enumerate(shares)
    ]
    return priors_measured(raw, table(["masked", "true caption", "none", "shuffled captions"], rows))


def captions_obeyed(raw: dict[str, Any]) -> str:
    found = raw["diffusion"]
    images = ("scenes", "reconstructions", "samples", "the scenes of other captions")
    rows = [[what, *(percent(found[f"{what} of {shown}"]) for shown in images)] for what in ("layout", "classes")]
    names = ["scenes", "their reconstructions", "samples of `train/diffusion.py`", "scenes of other captions"]
    return priors_measured(raw, table([f"found, of {found['images of the agreement']}", *names], rows))


def swapped(raw: dict[str, Any]) -> str:
    names = {
        "taming": "taming-transformers `VectorQuantizer2`",
        "diffusers": "diffusers `VectorQuantizer`",
        "vector-quantize-pytorch": "vector-quantize-pytorch `VectorQuantize`, defaults",
        "IBQ": "IBQ's look-up, plain and fused",
    }
    rows = []
    for name, found in raw["quantizers"].items():
        sizes, mib = ", ".join(map(str, found["M, N, D"])), found["MiB"]
        speed = times(found["times as fast"])
        rows.append([names[name], sizes, speed, number(mib["library"]), number(mib["regvq_fast"])])
    head = ["quantizer", "M, N, D", "times as fast", "MiB of a step before", "after"]
    return f"{measured_on(raw | {'machine': raw})}\n\n{table(head, rows)}"


# What other files hold: section, file, function.
OTHERS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "main-job": ("cpu-main-job.json", main_job),
    "noise": ("cpu-noise.json", noise),
    "agreement": ("cpu-priors.json", agreement),
    "swapped": ("cpu-integrations.json", swapped),
    "turns": ("cpu-vector-quantize.json", turns),
    "step-memory": ("cpu-step.json", step_memory),
    "captions-heard": ("cpu-priors.json", captions_heard),
    "captions-obeyed": ("cpu-priors.json", captions_obeyed),
}

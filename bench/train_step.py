"""Whole training steps beside the peers on one GPU: interleaved blocks, several rounds, with their spread.

    python bench/train_step.py --works gpt2-124m,minimind-64m --name train_step_h100 --budget 560
    python bench/train_step.py --works llama-1b,llama-1b-8k --name train_step_h100 --add --budget 560
    python bench/train_step.py --works gpt2-124m --cases "ours fp8-delayed, head=fp8; compact bf16" --rounds 2
    python bench/train_step.py --check          # one step of every case at a tiny size, on any device; writes nothing

Works and cases: bench/step_cases.py. A step is forward, backward, clipping at 1.0 and AdamW, on tokens that are on the
device; its time is the mean by the wall clock over a block. --add keeps what the file holds and runs what is missing, beside
the first case and the best peer again, so that every ratio comes from one sitting. Compiling is done before timing. Peers
come from installed packages, or from wheels in runs/wheels (`pip download --no-deps torchao==0.17.0 liger-kernel==0.8.5`)
on a machine without a network.
Writes bench/results/NAME.json (or $OUT/NAME.json) after every round.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from blocks import ROOT, header
from fleet import Case, Fleet
from step_cases import CASES, OURS, WORKS, guessed_bytes, sized, why_not

sys.path.insert(0, str(ROOT))
GIB = 2**30


def device_memory() -> int | None:
    """Bytes of the GPU, None without one."""
    import torch

    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def make_fleet(work: str, names: list[str], a: argparse.Namespace, memory: int | None) -> Fleet:
    """The processes of one work."""
    cores = len(os.sched_getaffinity(0))
    parallel = a.parallel or (6 if memory else 1)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if parallel > 1:
        environment["FEWBITS_TURN"] = str(Path(tempfile.gettempdir()) / f"fewbits-turn-{os.getpid()}")
    if memory:
        threads = str(max(1, cores // min(parallel, len(names))))
        environment |= {"TORCHINDUCTOR_COMPILE_THREADS": threads, "OMP_NUM_THREADS": threads}

    def command(case: str) -> list[str]:
        order = {"work": work, "case": case, "tiny": a.tiny or a.check, "compile": a.compile}
        return [sys.executable, str(Path(__file__).parent / "step_worker.py"), json.dumps(order)]

    guess = 4 * GIB if a.tiny or a.check else None
    cases = {name: Case(name, guess or guessed_bytes(work, name)) for name in names}
    return Fleet(
        cases, command, environment, memory, parallel, warmup=1 if a.check else a.warmup, skip=a.skip, block_s=a.block_s
    )


def ours(case: str) -> bool:
    return case.startswith(OURS)


def latest(sittings: list[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Case -> (its row, its sitting): the newest that was timed, else the newest."""
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for sitting in sittings:
        for name, row in sitting["cases"].items():
            if row.get("blocks") or name not in found or not found[name][0].get("blocks"):
                found[name] = (row, sitting)
    return found


def middle(row: dict[str, Any]) -> float:
    """Median over the blocks of the mean step of each by the wall clock, ms: tokens over it are those of a second."""
    return statistics.median(block["wall_ms"] for block in row["blocks"])


def best_peer(cases: dict[str, dict[str, Any]]) -> str | None:
    """The fastest case of one sitting that is not ours."""
    timed = {name: middle(row) for name, row in cases.items() if row.get("blocks") and not ours(name)}
    return min(timed, key=lambda name: timed[name]) if timed else None


def ratio(row: dict[str, Any], base: dict[str, Any]) -> tuple[float, float, float] | None:
    """Speed against `base`: the geometric mean over the rounds both ran in, the least and the greatest."""
    from fewbits.lab.rows import geometric_mean

    own, other = ({block["round"]: block["wall_ms"] for block in r["blocks"]} for r in (row, base))
    values = [other[i] / own[i] for i in sorted(own.keys() & other.keys())]
    return (geometric_mean(values), min(values), max(values)) if values else None


def summaries(work: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """One row a case for the table and for readers of the file: numbers, and the ratio to the best peer of its sitting."""
    rows: dict[str, dict[str, Any]] = {}
    for name, (row, sitting) in latest(work["sittings"]).items():
        if not row.get("blocks"):
            shown = {key: row[key] for key in ("skipped", "error") if key in row}
            rows[name] = shown or {"skipped": "no block fitted into the time that was left"}
            continue
        ms, blocks = middle(row), [block["wall_ms"] for block in row["blocks"]]
        rows[name] = {
            "ms": round(ms, 3),
            "median_step_ms": round(statistics.median(block["ms"] for block in row["blocks"]), 3),
            "tokens_per_s": round(work["tokens"] / ms * 1e3),
            "spread": round((max(blocks) - min(blocks)) / ms, 4),
            "rounds": len(blocks),
            "peak_bytes": max(block.get("peak_bytes", 0) for block in row["blocks"]) or None,
            "loss": row.get("loss"),
            "ready_s": row["ready_s"],
            "sitting": work["sittings"].index(sitting),
        }
        peer = best_peer(sitting["cases"])
        against = ratio(row, sitting["cases"][peer]) if peer else None
        if against:
            rows[name] |= {"best_peer": peer, "ratio": round(against[0], 4)}
            rows[name]["ratio_range"] = [round(against[1], 4), round(against[2], 4)]
        if "error" in row:
            rows[name]["error"] = row["error"]
    return rows


def table(name: str, work: dict[str, Any]) -> str:
    """The rows of a work as text, the fastest first."""
    warmup = work["sittings"][-1]["warmup"]
    head = f"{name}  {work['shape']}  {work['sittings'][-1]['device']}, torch {work['sittings'][-1]['torch']}"
    lines = [
        head,
        f"{'':30s} {'tokens/s':>10s} {'ms':>9s} {'spread':>7s}  against the best peer   peak GiB   loss at step {warmup}",
    ]
    rows = work["rows"]
    for case in sorted(rows, key=lambda c: rows[c].get("ms", float("inf"))):
        row = rows[case]
        if "ms" not in row:
            kind = "skipped" if "skipped" in row else "error"
            lines.append(f"{case:30s} {kind}: {row[kind].strip().splitlines()[0][:140]}")
            continue
        against = "x{:.3f} ({:.3f} to {:.3f})".format(row["ratio"], *row["ratio_range"]) if "ratio" in row else "-"
        peak = f"{row['peak_bytes'] / GIB:8.1f}" if row["peak_bytes"] else "       -"
        lines.append(
            f"{case:30s} {row['tokens_per_s']:10,d} {row['ms']:9.2f} {row['spread']:7.1%}  {against:23s} {peak}   "
            f"{row['loss']:.4f}" + (" *" if row["sitting"] != len(work["sittings"]) - 1 else "")
        )
    if any(row.get("sitting", len(work["sittings"]) - 1) != len(work["sittings"]) - 1 for row in rows.values()):
        lines.append("* from an earlier sitting, against the best peer of that one")
    return "\n".join(lines)


def missing(work: dict[str, Any] | None, wanted: list[str]) -> list[str]:
    """The cases to run: all, or those without a time; then the first case and the best peer stand beside them again."""
    if work is None:
        return wanted
    found = latest(work["sittings"])
    left = [name for name in wanted if name not in found or not found[name][0].get("blocks")]
    if not left:
        return []
    peer = best_peer({name: row for name, (row, _) in found.items()})
    beside = [name for name in (wanted[0], peer) if name and name not in left]
    return [*dict.fromkeys(beside), *left]


def names_of(work: str, cases: str) -> list[str]:
    """The cases asked for; `;` between them where a precision contains commas."""
    from fewbits.lab.variants import split_values

    given = [re.sub(r"\s*,\s*", ", ", name) for name in split_values(cases)]  # as the default cases are spelled
    return given if cases else list(CASES[work])


class Results:
    """The file: works with their sittings; the rows are made anew at every save."""

    def __init__(self, path: Path, add: bool):
        self.path = path
        before = json.loads(path.read_text()) if add and path.exists() else {}
        self.works: dict[str, Any] = before.get("works", {})

    def sit(self, name: str, cases: dict[str, Case], config: dict[str, Any], tiny: bool = False) -> None:
        """A new sitting for a work; `update` fills it."""
        found = sized(WORKS[name], tiny)
        shape = f"B={found.batch} T={found.context}" + (" and a tiny model" if tiny else "")
        work = self.works.setdefault(name, {"shape": shape, "tokens": found.tokens, "sittings": []})
        work["sittings"].append({**header(), **config, "cases": {}})
        self.update(name, cases)

    def update(self, name: str, cases: dict[str, Case]) -> None:
        self.works[name]["sittings"][-1]["cases"] = {case.name: case.row() for case in cases.values()}
        for work in self.works.values():
            work["rows"] = summaries(work)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps({**header(), "works": self.works}, indent=1) + "\n")
        beside.replace(self.path)


def measure(a: argparse.Namespace) -> None:
    """Every work in turn, each with its share of the budget; what one leaves over goes to the next."""
    began, works = time.monotonic(), a.works.split(",")
    results = Results(Path(os.environ.get("OUT") or ROOT / "bench" / "results") / f"{a.name}.json", a.add)
    memory = device_memory()
    for index, name in enumerate(works):
        left = began + a.budget - time.monotonic()
        end = time.monotonic() + left / (len(works) - index)
        names = missing(results.works.get(name), names_of(name, a.cases))
        if not names:
            print(f"{name}: nothing is missing")
            continue
        fleet = make_fleet(name, names, a, memory)
        results.sit(name, fleet.cases, {"warmup": a.warmup, "rounds": a.rounds, "block_s": a.block_s}, a.tiny)
        fleet.changed = lambda n=name, f=fleet: results.update(n, f.cases)
        try:  # two rounds of everyone must fit behind the compiling, where time allows
            reserve = min(0.5 * (end - time.monotonic()), 2 * len(names) * (fleet.block_s + 1.5))
            fleet.prepare(end - reserve)
            fleet.rounds(a.rounds, end)
        finally:
            fleet.close()
            results.update(name, fleet.cases)
        print("\n" + table(name, results.works[name]) + "\n", flush=True)
    print("wrote", results.path, f"({time.monotonic() - began:.0f} s)")


def check(a: argparse.Namespace) -> None:
    """One step of every case of both families at a tiny size: ok, skipped or error, each with its reason."""
    began, memory, lines = time.monotonic(), device_memory(), []
    for name in a.works.split(","):
        fleet = make_fleet(name, names_of(name, a.cases), a, memory)
        try:
            fleet.prepare(began + a.budget)
        finally:
            fleet.close()
        for case in fleet.cases.values():
            said = case.trouble.get("skipped") or case.trouble.get("error") or f"loss {case.warm['loss']:.4f}"
            kind = next((k for k in ("skipped", "error") if k in case.trouble), "ok")
            lines.append(f"{name:14s} {case.name:28s} {kind:8s} {case.ready_s:5.1f} s  {said[:300]}")
            if "trace" in case.trouble and kind == "error":
                print(f"--- {name} {case.name}\n{case.trouble['trace']}")
    print("\n" + "\n".join(lines) + f"\n{time.monotonic() - began:.0f} s")
    if os.environ.get("OUT"):
        (Path(os.environ["OUT"]) / "train_step_check.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Checks or measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", default=None, help=f"of {', '.join(WORKS)}; default all (--check: one a family)")
    parser.add_argument("--cases", default="", help="default: those of the work; `;` between them if names have commas")
    parser.add_argument("--name", default="train_step")
    parser.add_argument("--add", action="store_true", help="keep what the file holds, run what is missing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=None, help="seconds; default 560, for --check 140")
    parser.add_argument("--parallel", type=int, default=0, help="processes that compile at once; 0: 6 on a GPU, else 1")
    parser.add_argument("--warmup", type=int, default=8, help="steps before the first block, compiling included")
    parser.add_argument("--skip", type=int, default=3, help="untimed steps at the beginning of a block")
    parser.add_argument("--block_s", type=float, default=1.5, help="seconds of timed steps in a block")
    parser.add_argument("--compile", choices=("auto", "true", "false"), default="auto", help="auto: on a GPU")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the bench itself")
    parser.add_argument("--check", action="store_true")
    a = parser.parse_args()
    a.works = a.works or ("gpt2-124m,llama-1b" if a.check else ",".join(WORKS))
    a.budget = a.budget or (140.0 if a.check else 560.0)
    if unknown := set(a.works.split(",")) - set(WORKS):
        parser.error(f"there is no work {sorted(unknown)[0]!r}; there are {', '.join(WORKS)}")
    for work in a.works.split(","):
        names = names_of(work, a.cases)
        if wrong := next(filter(None, map(why_not, names)), "" if names else f"--cases {a.cases!r} names no case"):
            parser.error(wrong)
    check(a) if a.check else measure(a)


if __name__ == "__main__":
    main()

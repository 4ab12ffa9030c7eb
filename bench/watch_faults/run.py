"""Whether the watch names planted faults in the right layer, and is silent in healthy trainings.

Two sets of trainings of 160 steps, each of 13 faults planted 8 times in a known layer of small models, and of 100
healthy trainings: those of zoo.py, with which thresholds were chosen (on other seeds, --shift 5000), and those of
held_out.py, with other models, data, optimizers, schedules and ways to plant. A fault counts as found if it is named
with a layer in which it was planted; what else is named as its consequence does not count. In a healthy training any
fault that is named is a false alarm.

    python bench/watch_faults/run.py [--set zoo|held-out] [--steps 160] [--shift 0] [--processes 1]
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import held_out
import torch
import zoo

import steelyard as sy
from steelyard.learn.intervals import wilson

HERE = Path(__file__).parent


def train(job: zoo.Job, steps: int) -> list[dict[str, Any]]:
    """The rows of the faults that were named."""
    dtype = next(job.model.parameters()).dtype
    with sy.watch(job.model, job.optimizer) as log:
        for step in range(steps):
            job.event(step)
            x, y = next(job.batches)
            job.optimizer.zero_grad()
            loss = job.loss(job.model(x.to(dtype) if x.is_floating_point() else x), y)
            loss.backward()
            job.optimizer.step()
            log.note(loss=loss)
        return [dict(row) for row in log.table("faults").rows]


def work(given: tuple[str, int, int, str, int, int]) -> list[tuple[str, str, bool, str]]:
    """Some trainings of one kind: for each the fault, what was trained, whether it was found, and what was named."""
    name, shift, steps, kind, first, last = given
    torch.set_num_threads(1)
    which: Any = {"zoo": zoo, "held-out": held_out}[name]
    which.SHIFT = shift
    found = []
    jobs = which.planted() if kind == "planted" else which.healthy()
    for job in itertools.islice(jobs, first, last):
        rows = train(job, steps)
        right = any(row["fault"] in job.fault.split("|") and row["where"] in job.where for row in rows)
        named = "; ".join(f"step {r['step']}: {r['fault']} in {r['where']}, {r['evidence']}" for r in rows[:4])
        found.append((job.fault, f"{job.about}; {', '.join(job.where[:3])}", right, named))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", choices=("zoo", "held-out"), default="zoo")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--shift", type=int, default=0, help="of the seeds")
    parser.add_argument("--only", choices=("planted", "healthy"))
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    sizes = {"planted": 8 * len(zoo.PLANTS), "healthy": 100}
    parts = [
        (given.set, given.shift, given.steps, kind, first, min(first + 8, size))
        for kind, size in sizes.items()
        for first in range(0, size, 8)
        if given.only in (None, kind)
    ]
    by_fault: dict[str, list[bool]] = {}
    alarms = []
    with ProcessPoolExecutor(given.processes) as pool:
        for fault, about, right, named in itertools.chain.from_iterable(pool.map(work, parts)):
            if not fault:
                alarms += [f"{about}: {named}"] if named else []
            else:
                by_fault.setdefault(fault.split("|")[0], []).append(right)
            if (fault and not right) or (not fault and named):
                print("MISSED" if fault else "FALSE ALARM", f"{fault}; {about}: {named or 'nothing'}", flush=True)
    every = [found for runs in by_fault.values() for found in runs]
    print({fault: f"{sum(runs)}/{len(runs)}" for fault, runs in by_fault.items()}, "false alarms", len(alarms))
    if given.only:
        return
    figures = {
        "found": sum(every),
        "planted": len(every),
        "found, share": sum(every) / len(every),
        "95 % interval": wilson(sum(every), len(every)),
        "by fault": {fault: f"{sum(runs)} of {len(runs)}" for fault, runs in by_fault.items()},
        "false alarms in 100 healthy trainings": len(alarms),
        "false alarms": alarms,
    }
    (HERE / "results").mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    result = {"date": datetime.date.today().isoformat(), "machine": machine, "set": given.set, "steps": given.steps}
    result |= {"shift": given.shift, "figures": figures}
    name = f"{result['date']}{'' if given.set == 'zoo' else '-held-out'}{f'-shift-{given.shift}' * bool(given.shift)}"
    (HERE / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

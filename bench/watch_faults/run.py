"""Whether the watch names planted faults in the right layer, and is silent in healthy trainings.

13 faults, each planted 8 times in a known layer of small models (other architectures, optimizers and seeds), and 100
healthy trainings of 13 models with 5 optimizers; 160 steps each. A fault counts as found if it is named with a layer
in which it was planted; what else is named as its consequence does not count. In a healthy training any fault that is
named is a false alarm. The models are in zoo.py; thresholds were chosen with other seeds (--shift 5000).

    python bench/watch_faults/run.py [--steps 160] [--shift 0] [--only FAULT]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

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
            loss = zoo.loss_of(job.model(x.to(dtype) if x.is_floating_point() else x), y)
            loss.backward()
            job.optimizer.step()
            log.note(loss=loss)
        return [dict(row) for row in log.table("faults").rows]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--shift", type=int, default=0, help="of the seeds")
    parser.add_argument("--only", help="one fault, or 'healthy'")
    given = parser.parse_args()
    torch.set_num_threads(1)
    zoo.SHIFT = given.shift
    start = time.process_time()
    by_fault: dict[str, list[bool]] = {}
    for job in zoo.planted():
        if given.only and given.only not in job.fault:
            continue
        rows = train(job, given.steps)
        names = job.fault.split("|")
        found = any(row["fault"] in names and row["where"] in job.where for row in rows)
        by_fault.setdefault(names[0].split(" ")[0] if len(names) > 1 else names[0], []).append(found)
        if not found:
            print(
                "MISSED",
                job.fault,
                job.where[:3],
                job.about,
                [(r["step"], r["fault"], r["where"], r["evidence"]) for r in rows][:4],
            )
    alarms = []
    for job in zoo.healthy() if given.only in (None, "healthy") else ():
        rows = train(job, given.steps)
        if rows:
            alarms.append(job.about)
            print("ALARM", job.about, [(r["step"], r["fault"], r["where"], r["evidence"]) for r in rows])
    every = [found for runs in by_fault.values() for found in runs]
    print({fault: f"{sum(runs)}/{len(runs)}" for fault, runs in by_fault.items()}, "false alarms", len(alarms))
    print("cpu seconds", time.process_time() - start)
    if given.only or given.shift:
        return
    figures = {
        "found": sum(every),
        "planted": len(every),
        "found, share": sum(every) / len(every),
        "95 % interval": wilson(sum(every), len(every)),
        "by fault": {fault: f"{sum(runs)} of {len(runs)}" for fault, runs in by_fault.items()},
        "false alarms in 100 healthy trainings": len(alarms),
        "false alarms": alarms,
        "processor seconds": round(time.process_time() - start),
    }
    (HERE / "results").mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    result = {"date": datetime.date.today().isoformat(), "machine": machine, "steps": given.steps, "figures": figures}
    (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

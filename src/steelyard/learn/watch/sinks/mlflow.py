"""MLflow: metrics by step, and faults as tags of the run. Needs ``mlflow`` or ``mlflow-skinny``."""

from __future__ import annotations

import re
from collections.abc import Mapping

from steelyard.learn.watch.sinks import Sink

_FORBIDDEN = re.compile(r"[^\w\-. ]")  # in the name of a metric


class MLflow(Sink):
    """The run that is current, which stays open, or a new one of an experiment, which is ended at the end."""

    def __init__(self, experiment: str = ""):
        import mlflow

        self._mlflow = mlflow
        self._own = mlflow.active_run() is None
        self._faults = 0
        if self._own:
            if experiment:
                mlflow.set_experiment(experiment)
            mlflow.start_run()

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """A metric for each number; in a store of files a slash would make a folder of the name of a metric."""
        named = {_FORBIDDEN.sub("_", name.replace("/", " of ")): value for name, value in values.items()}
        self._mlflow.log_metrics(named, step=step)

    def fault(self, step: int, text: str) -> None:
        """A tag: fault 1, fault 2, ..."""
        self._faults += 1
        self._mlflow.set_tag(f"fault {self._faults}", f"step {step}: {text}")

    def close(self) -> None:
        """End the run, if it was started here."""
        if self._own:
            self._mlflow.end_run()

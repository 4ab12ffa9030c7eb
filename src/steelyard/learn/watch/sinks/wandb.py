"""Weights & Biases: metrics over a step of their own, so that other logging keeps its steps. Needs ``wandb``."""

from __future__ import annotations

from collections.abc import Mapping

from steelyard.learn.watch.sinks import Sink


class WandB(Sink):
    """The run that is current, which stays open, or a new one of a project, which is finished at the end."""

    def __init__(self, project: str = "steelyard"):
        import wandb

        self._own = wandb.run is None
        self._run = wandb.init(project=project) if wandb.run is None else wandb.run
        self._run.define_metric("watch/step")
        self._run.define_metric("watch/*", step_metric="watch/step")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers under watch/."""
        self._run.log({"watch/step": step, **{f"watch/{name}": value for name, value in values.items()}})

    def fault(self, step: int, text: str) -> None:
        """An alert, which W&B sends on."""
        self._run.alert(title="training fault", text=f"step {step}: {text}")

    def close(self) -> None:
        """Finish the run, if it was started here."""
        if self._own:
            self._run.finish()

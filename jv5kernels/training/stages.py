"""One stage by Hugging Face's Trainer: its loop, schedule, checkpoints and resumption around an `Objective`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from jv5kernels.training.batches import Batches, tokens
from jv5kernels.training.objective import Objective

__all__ = ["moved", "run_stage", "seconds_a_step"]

CHECKPOINTS = 4
LOGGED = 60
WORKERS = 2
TIMED_STEPS = 6


class StageTrainer(Trainer):
    """Trainer whose dataset gives whole batches in order, and whose log has every loss by itself."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return SequentialSampler(self.batches)

    @property
    def batches(self) -> Batches:
        assert isinstance(self.train_dataset, Batches)
        return self.train_dataset

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        objective: Any = self.model
        if "loss" in logs:
            logs |= {name: float(value) for name, value in objective.latest.items()}
        super().log(logs, *args, **kwargs)


def run_stage(
    objective: Objective,
    batches: Batches,
    folder: Path,
    *,
    seed: int,
    device: str,
    progress: bool = True,
    resume: bool = True,
    keep_checkpoints: bool = True,
    stop_at: int | None = None,
) -> list[dict[str, float]]:
    """Trains an objective in place and returns the log: dicts with step, loss and each loss by itself.

    Args:
        folder: for checkpoints; a run that was stopped goes on from its last one.
        seed: of dropout; batches have their own.
        stop_at: stop after so many steps, as an interruption would.
    """
    stage = objective.stage
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=1,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, stage.steps // 20),
        weight_decay=0.01,
        max_grad_norm=1.0,
        adam_beta2=0.98,
        optim="adamw_torch_fused" if device == "cuda" else "adamw_torch",
        logging_steps=max(1, stage.steps // LOGGED),
        logging_nan_inf_filter=False,
        save_strategy="steps" if keep_checkpoints else "no",
        save_steps=max(1, stage.steps // CHECKPOINTS),
        save_total_limit=2,
        seed=seed,
        use_cpu=device == "cpu",
        report_to=[],
        disable_tqdm=not progress,
        remove_unused_columns=False,
        dataloader_num_workers=min(WORKERS, os.cpu_count() or 1) if device == "cuda" else 0,
        dataloader_pin_memory=device == "cuda",
        accelerator_config={"non_blocking": device == "cuda"},
    )
    # The losses go to the log that is returned; nothing is printed at each of them.
    trainer = StageTrainer(
        model=objective, args=arguments, train_dataset=batches, data_collator=_whole_batch
    )
    trainer.remove_callback(PrinterCallback)
    if stop_at is not None:
        trainer.add_callback(_stopper(stop_at))
    last = get_last_checkpoint(str(folder)) if resume and folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    if not all(torch.isfinite(p).all() for p in objective.parameters()):
        raise FloatingPointError(f"training in {folder} ended with weights that are not finite")
    return history


def _whole_batch(items: list[Any]) -> Any:
    return items[0]


def _stopper(step: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            if state.global_step >= step:
                control.should_training_stop = True
                control.should_save = True
            return control

    return Stop()


def seconds_a_step(objective: Objective, batches: Batches) -> tuple[float, float]:
    """Returns seconds and tokens of forward and backward of a step, over a few that leave the weights as they were."""
    device = objective.ids.device
    objective.train()

    def run(steps: range) -> tuple[float, int]:
        made = [batches[step] for step in steps]
        started = time.perf_counter()
        for batch in made:
            objective(**moved(batch, device))["loss"].backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started, sum(map(tokens, made))

    run(range(TIMED_STEPS))  # the same shapes, so that memory of these sizes has been taken
    seconds, count = run(range(TIMED_STEPS))
    objective.zero_grad(set_to_none=True)
    return seconds / TIMED_STEPS, count / TIMED_STEPS


def moved(value: Any, device: torch.device | str) -> Any:
    """Returns a batch with its tensors on a device."""
    from accelerate.utils import send_to_device

    return send_to_device(value, device)

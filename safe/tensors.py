"""Tensors are checked: what comes out of files before it is used, what is trained before it is kept."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is infinite or not a number."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming file and tensor, for tensors that are no floats or not finite."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} has numbers of type {tensor.dtype}, not floats; train again")
    if name := not_finite(tensors):
        raise ValueError(f"{path}: {name} has values that are not finite; train again")


# ---- The checkpoint of an unfinished training ---------------------------------------------------

CHECKPOINT = {"step", "parameters", "losses", "optimizer", "scaler"}
MOMENTS = {"step": False, "exp_avg": True, "exp_avg_sq": True}  # AdamW's; whether of a parameter's shape
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


def load_state(path: Path, parameters: Mapping[str, Tensor], steps: int) -> dict:
    """Reads a checkpoint of `train.py`, to the host, for these parameters and so many steps in all.

    Raises OSError, and ValueError naming the file, for one that is damaged, or of another training.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        problem = problem_of(state, parameters, steps)
    except (torch.OutOfMemoryError, MemoryError, OSError):
        raise
    except Exception:  # a damaged pickle can raise anything
        raise ValueError(f"{path}: damaged; delete it to begin anew") from None
    if problem:
        raise ValueError(f"{path}: damaged ({problem}); delete it to begin anew")
    return state


def problem_of(state: object, parameters: Mapping[str, Tensor], steps: int) -> str | None:
    """What is wrong with a checkpoint, in words. Raises anything for one that is built in another way."""
    if not isinstance(state, dict) or state.keys() != CHECKPOINT:
        return f"it does not hold {', '.join(sorted(CHECKPOINT))}"
    step, losses, scaler = state["step"], state["losses"], state["scaler"]
    if type(step) is not int or not 0 <= step <= steps:
        return f"its step is not one of 0 to {steps}"
    moments = state["optimizer"]["state"]  # empty where float16 gradients were too large in all steps
    shapes, tensors = {name: p.shape for name, p in parameters.items()}, dict(state["parameters"])
    for number, (name, parameter) in enumerate(parameters.items()) if moments else ():
        shapes |= {f"{kind} of {name}": parameter.shape if same else () for kind, same in MOMENTS.items()}
        tensors |= {f"{kind} of {name}": tensor for kind, tensor in moments[number].items()}
    if len(moments) not in (0, len(parameters)):
        return f"it has {len(moments)} states of the optimizer for {len(parameters)} parameters"
    for name in shapes.keys() | tensors.keys():
        tensor = tensors.get(name)
        if not isinstance(tensor, Tensor) or name not in shapes or tensor.shape != shapes[name]:
            return f"{name} does not belong to this model"
        if tensor.dtype != torch.float32:
            return f"{name} is of type {tensor.dtype}"
    if name := not_finite(tensors):
        return f"{name} is not finite"
    if not are_losses(losses, step):
        return f"its losses are not those of {step} steps"
    if scaler and (scaler.keys() != SCALER or not all(0 <= value < math.inf for value in scaler.values())):
        return "its gradient scaler has other numbers"
    return None


def are_losses(losses: list, step: int) -> bool:
    """Whether these are (step, timestep, loss) of the first `step` steps, with those on fixed noises between."""
    numbers = all(type(at) is int and type(loss) is float and math.isfinite(loss) for at, _, loss in losses)
    timesteps = {timestep for _, timestep, _ in losses if timestep != "fixed"}
    steps = [at for at, timestep, _ in losses if timestep != "fixed"]
    first = losses[0][:2] == (0, "fixed")
    return numbers and first and steps == [*range(1, step + 1)] and timesteps <= {*range(1000)}

"""What a worker's thread needs before it touches torch."""

from __future__ import annotations

from ..stages.work import Environment


def prepare_thread(environment: Environment) -> None:
    """Torch's threads for this task, so that workers times threads stay within the cores; no gradients; own CUDA stream."""
    import torch

    torch.set_grad_enabled(False)
    if environment.device == "cpu":
        if torch.get_num_threads() != environment.threads:
            torch.set_num_threads(environment.threads)
    elif torch.cuda.current_stream().cuda_stream == 0:
        torch.cuda.set_device(environment.device if ":" in environment.device else 0)
        torch.cuda.set_stream(torch.cuda.Stream())

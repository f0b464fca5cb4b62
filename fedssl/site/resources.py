"""What a run may use of a hospital's machine."""

from dataclasses import dataclass

_MB = 1_000_000


@dataclass(frozen=True)
class Resources:
    """What a run may use of the hospital's machine; None: no limit.

    Attributes:
        gpu: whether a GPU may be used.
        gpu_memory_share: of its memory, above 0 to 1.
        memory_gb: of the agent, in 10^9 bytes.
        threads: of the CPU.
        upload_mb_per_message: in 10^6 bytes.
        upload_mb_per_day: in 10^6 bytes, over 24 hours.
        download_mb_per_message: in 10^6 bytes.
    """

    gpu: bool = True
    gpu_memory_share: float | None = None
    memory_gb: float | None = None
    threads: int | None = None
    upload_mb_per_message: float | None = None
    upload_mb_per_day: float | None = None
    download_mb_per_message: float = 2000.0

    @property
    def download_bytes(self) -> int:
        """Most bytes of a message from the server."""
        return int(self.download_mb_per_message * _MB)


def apply_limits(resources: Resources) -> None:
    """Let the operating system and CUDA hold this process to its caps on memory."""
    import resource

    import torch

    if resources.memory_gb is not None:
        limit = int(resources.memory_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if resources.gpu_memory_share is not None and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(resources.gpu_memory_share)

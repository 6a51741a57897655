"""SGLang's profiler: PyTorch's profiler in the scheduler process, started and stopped by SGLang's own messages.

Owns the profile's options. SGLang's scheduler is blocked while it writes a trace, so the trace is kept small: a bounded
number of steps, no tensor shapes, and Python stacks only on request.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tandem.errors import ProfileFailed


async def start(manager: Any, directory: Path, device: str, *, steps_max: int, with_stack: bool) -> None:
    """Start recording through SGLang's TokenizerManager. See `Engine.start_profile`.

    Raises:
        ProfileFailed: SGLang refused; has its message.
    """
    from sglang.srt.managers.io_struct import ProfileReq

    request = ProfileReq(
        output_dir=str(directory),
        num_steps=steps_max,
        activities=["CPU", "GPU"] if device == "cuda" else ["CPU"],
        with_stack=with_stack,
        record_shapes=False,
    )
    try:
        await manager.start_profile(request)
    except RuntimeError as problem:
        raise ProfileFailed(f"SGLang refused to start the profile: {problem}") from None


async def stop(manager: Any, directory: Path) -> None:
    """Stop recording; on return, `directory` holds the trace of each rank.

    Raises:
        ProfileFailed: SGLang refused and has written no trace; has its message.
    """
    try:
        await manager.stop_profile()
    except RuntimeError as problem:
        # SGLang stops by itself after `steps_max` steps and then refuses the stop: no error if the trace was written.
        if not os.listdir(directory):
            raise ProfileFailed(f"SGLang refused to stop the profile and wrote no trace: {problem}") from None

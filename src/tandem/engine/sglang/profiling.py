"""SGLang's own profile: PyTorch's profiler in the scheduler's process, started and stopped over SGLang's own messages.

Owns what is asked of it. While SGLang writes a trace its scheduler does nothing else, so what is recorded is kept
small: a bounded number of steps, no shapes, and Python frames only when asked for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tandem.errors import ProfileFailed


async def start(manager: Any, directory: Path, device: str, *, steps_max: int, with_stack: bool) -> None:
    """Begin to record, through SGLang's TokenizerManager.

    Raises:
        ProfileFailed: SGLang refuses; its own words.
    """
    from sglang.srt.managers.io_struct import ProfileReq

    asked = ProfileReq(
        output_dir=str(directory),
        num_steps=steps_max,
        activities=["CPU", "GPU"] if device == "cuda" else ["CPU"],
        with_stack=with_stack,
        record_shapes=False,
    )
    try:
        await manager.start_profile(asked)
    except RuntimeError as problem:
        raise ProfileFailed(f"SGLang does not record: {problem}") from None


async def stop(manager: Any, directory: Path) -> None:
    """Stop recording; the trace of each rank is in the directory then.

    Raises:
        ProfileFailed: SGLang refuses; its own words.
    """
    try:
        await manager.stop_profile()
    except RuntimeError as problem:
        # It has stopped by itself where the steps asked for are done, and then refuses to stop again.
        if not os.listdir(directory):
            raise ProfileFailed(f"SGLang has no profile: {problem}") from None

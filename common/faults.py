"""What ends a run from outside, in one line each: no memory, no room, no permission, SIGTERM of a cluster, Ctrl-C."""
import contextlib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch

from common import dist
from common.config import comments_of, fail

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
AGAIN = "the same command goes on from the last checkpoint; what was finished is kept"


@contextlib.contextmanager
def explained(config: type | None = None) -> Iterator[None]:
    """
    Give one line with what to do for a fault from outside, and let a bug keep its traceback; decorates main.

    config: the script's settings; those whose comment says memory are named when memory runs out.
    """
    advice = "make room or change run=, then give the same command again: what was finished is kept"
    try:
        with stopped_by_sigterm():
            yield
    except KeyboardInterrupt:
        if dist.is_main():
            print(f"\nerror: stopped by Ctrl-C: {AGAIN}", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno == errno.ENOMEM:
            fail(no_memory(error, config))
        if error.errno not in NO_ROOM:
            raise
        fail(f"{error}: {advice}")
    except safetensors.SafetensorError as error:
        if not any(f"os error {code})" in str(error) for code in NO_ROOM):      # as its Rust library spells it
            raise
        fail(f"{error}: {advice}")
    except (MemoryError, torch.OutOfMemoryError) as error:
        fail(no_memory(error, config))
    except RuntimeError as error:
        if "allocate memory" not in str(error):                 # torch on a CPU raises no type of its own
            raise
        fail(no_memory(error, config))


def no_memory(error: BaseException, config: type | None) -> str:
    """The line that names the settings to lower."""
    names = memory_settings(config) if config else []
    what = " or ".join(names) if names else "lower what --help marks `memory`"
    return f"out of memory ({str(error)[:300]}): {what}, and give the same command again: what was finished is kept"


def memory_settings(config: type) -> list[str]:
    """What to do with a script's settings that cost nothing but memory or time, by the comments that --help shows."""
    source = Path(sys.modules[config.__module__].__file__).read_text(encoding="utf-8")
    meanings = comments_of(config, source).items()
    names = [name for name, meaning in meanings if re.search("memory (only|and speed)", meaning)]
    defaults = {name: vars(config)[name] for name in names}
    return [f"set {name}=true" if default is False else f"set {name}=1" if default == 0 else f"lower {name}"
            for name, default in defaults.items()]                  # workers=0 is one per core


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """
    End the process on SIGTERM with one line and status 143, as fast as SIGKILL would.

    A thread waits for the signal, as Python's own handlers wait for the main thread, which may hang in a collective
    whose other ranks are gone. Nothing is cleaned up: whatever is on the disk must stand SIGKILL anyway.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)     # the pipe gets the number of every handled signal
    pipe_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=wait_for_sigterm, args=(read,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe_before)
        signal.signal(signal.SIGTERM, before)
        os.close(write)
        thread.join()
        os.close(read)


def wait_for_sigterm(read: int) -> None:
    """Leave the process once the pipe says SIGTERM; return once it is closed."""
    while received := os.read(read, 1):
        if received[0] == signal.SIGTERM:
            if dist.is_main():
                os.write(2, f"\nerror: stopped by SIGTERM: {AGAIN}\n".encode())
            os._exit(128 + signal.SIGTERM)

"""Many small jobs over the CPU cores, kept as they finish: a killed run does only the rest."""
import contextlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from common import run
from common.config import fail


def start_pool(workers: int) -> ProcessPoolExecutor | None:
    """Worker processes (0: one per usable core), or None when one is asked for: then this process does the work."""
    usable = len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count()     # macOS lacks it
    workers = workers or usable
    spawn = multiprocessing.get_context("spawn")            # a fork of a process with threads may hang
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=end_with_parent) if workers > 1 else None


def end_with_parent() -> None:
    """In a worker: leave as soon as the main process is gone, also by SIGKILL, instead of waiting for jobs for ever."""
    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def run_jobs(pool: ProcessPoolExecutor | None, function: Callable[[dict], dict], jobs: list[dict], *,
             log: Path, unit: str = "", size: Callable[[dict], int] | None = None) -> dict[str, dict]:
    """
    {job["id"]: function(job)} for every job; results are JSON and are appended to `log` as they come. The
    function must depend on the job alone, and on files whose `stamp` is job["key"]; it may stop the run with run.fail,
    and what was finished is kept. size: how many of `unit` a job makes; then their number per second is printed.
    """
    keys, kept, done = {job["id"]: job.get("key") for job in jobs}, [], {}
    for line in log.read_bytes().splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):      # half a line of a killed run: done again
            record = json.loads(line)
            if record["key"] == keys.get(record["id"], record["key"]):  # those of other jobs stay
                done[record["id"]] = record["result"]
                kept.append(record)
    run.write_lines(log, kept)
    begun, left = time.time(), [job for job in jobs if job["id"] not in done]
    with open(log, "a", encoding="utf-8") as file, \
            tqdm(total=len(jobs), initial=len(jobs) - len(left), desc=log.stem, mininterval=1) as bar:
        for name, result in completed(pool, function, left):
            file.write(json.dumps({"id": name, "key": keys[name], "result": result}) + "\n")
            file.flush()
            done[name] = result
            bar.update()
    if left and size:
        print(f"{sum(map(size, left)) / (time.time() - begun):.0f} {unit} per second")
    return done


def stamp(paths: Iterable[str]) -> list:
    """[path, bytes, ns of the last change] of files: another one once a file was written again."""
    facts = [(path, os.stat(path) if os.path.exists(path) else None) for path in paths]   # perhaps a broken link
    return [[path, own and own.st_size, own and own.st_mtime_ns] for path, own in facts]


def completed(pool: ProcessPoolExecutor | None, function: Callable[[dict], dict],
              jobs: list[dict]) -> Iterator[tuple[str, dict]]:
    """Yield (job id, result) in the order in which they finish."""
    if pool is None:
        for job in jobs:
            yield job["id"], function(job)
        return
    futures = {pool.submit(function, job): job["id"] for job in jobs}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        fail("a worker process died, perhaps for want of memory: run again with workers=1")
    finally:
        for future in futures:
            future.cancel()                                 # after a failure: do not start the rest

"""What a run took is counted from where it began, with the processes that it waited for."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

from qcompress.types.run import Clock, start_clock

BUSY = "import time\nwhile time.process_time() < 0.5: pass"


def test_a_clock_counts_threads_of_this_process_and_processes_that_have_ended() -> None:
    clock = Clock()
    started = time.process_time()
    while time.process_time() < started + 0.2:
        pass
    assert 0.2 <= clock.cpu_seconds < 0.4
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", BUSY], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert child >= 0.5
    assert clock.cpu_seconds >= 0.2 + child
    assert clock.seconds >= clock.cpu_seconds / (os.cpu_count() or 1)


def test_a_run_in_a_process_that_is_no_command_counts_from_its_own_start() -> None:
    """This process has imported and tested for seconds."""
    assert start_clock().cpu_seconds < 0.1 < time.process_time()

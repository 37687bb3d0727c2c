"""Stop signals become a flag and leave no trace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from kestrel.train.signals import STOP_SIGNALS, StopFlag, held_stop_signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with StopFlag() as flag:
        assert not flag
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a second one changes nothing
        assert flag and flag.signal == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_a_flag_may_be_entered_again_inside() -> None:
    before = signal.getsignal(signal.SIGTERM)
    flag = StopFlag()
    with flag:
        with flag:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.signal == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_off_the_main_thread_the_flag_can_be_set() -> None:
    seen: list[bool] = []

    def work() -> None:
        with StopFlag() as flag:
            flag.set("test")
            seen.append(bool(flag))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


def test_held_signals_arrive_at_the_end_and_not_in_children() -> None:
    with StopFlag() as flag:
        with held_stop_signals():
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            assert not flag
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.4)"])
            child.terminate()
        assert flag.signal == "SIGUSR1"
    assert child.wait(10) == 0

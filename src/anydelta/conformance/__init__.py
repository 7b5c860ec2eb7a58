"""Checks that backends compute the gated delta rule: one list of cases, one way to compare, one way to run them.

cases.py     Case: a call described in one line, and the list that tests and CLI share
gates.py     decays as in models, for the cases and for the benchmarks
mixer.py     the same for the mixer: MixerCase, its list and its comparison
token_log.py  the same for the log form of StatePool: LogCase
compare.py   check(case, target): runs one case and compares it with the float64 oracle
run.py       run(cases, targets): results as records
support.py   support(backends): what each backend says it accepts, feature by feature
cli.py       `anydelta conform`
"""

from .cases import CASES, SHORT_CASES, Case
from .compare import Target, Verdict, check
from .mixer import MIXER_CASES, MixerCase
from .run import FAIL, NOT_SUPPORTED, OK, SKIPPED, Result, run, targets
from .token_log import LOG_CASES, LogCase

__all__ = [
    "CASES", "FAIL", "LOG_CASES", "MIXER_CASES", "NOT_SUPPORTED", "OK", "SHORT_CASES",
    "SKIPPED", "Case", "LogCase", "MixerCase",
    "Result", "Target", "Verdict", "check", "run", "targets",
]  # fmt: skip

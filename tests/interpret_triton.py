"""Runs conformance cases on the Triton kernels in Triton's interpreter; tests/test_triton.py starts it.

A process of its own, since Triton reads TRITON_INTERPRET when it is imported. Standard input holds a JSON list of
[line of a case, values that the launch is forced to]; with "gradients" among them the gradients are checked instead of
the results. Standard output gets one JSON line per case.

    echo '[["T=70", {"segments": 4}], ["T=70", {"gradients": 1}]]' | TRITON_INTERPRET=1 python tests/interpret_triton.py
"""

from __future__ import annotations

import json
import sys

from anydelta.backends.triton import config, launch
from anydelta.conformance import Case, Target
from anydelta.conformance.gradients import check_gradients
from anydelta.conformance.run import parse, run_one
from anydelta.core import plans


def main() -> None:
    ran: list[str] = []
    run = launch.KernelCall.run

    def note(self: launch.KernelCall) -> None:
        ran.append(self.kernel.fn.__name__)
        run(self)

    launch.KernelCall.run = note  # type: ignore[method-assign]
    for line, changes in json.load(sys.stdin):
        plans.forget()  # a plan remembers its launch
        ran.clear()
        target = Target("triton", framework="torch")
        gradients = changes.pop("gradients", False)
        with config.forced(**changes):
            if gradients:
                errors = check_gradients(Case.parse(line), target).errors
                status = "FAIL" if errors else "OK"
            else:
                result = run_one(parse(line), target)
                status, errors = result.status, list(result.reasons)
        print(json.dumps([status, errors, ran]), flush=True)


if __name__ == "__main__":
    main()

"""Threads: how many, whose, that results do not depend on them, and that a fork after use works.

Whatever could hang runs in a child process with a time limit. No test asserts a time.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import anydelta
from anydelta.backends.cpu import host as cpu
from anydelta.core import plans
from conftest import CPU_REASONS

pytestmark = pytest.mark.skipif(bool(CPU_REASONS), reason="; ".join(CPU_REASONS) or "runs")

LIMIT = 120
"""Seconds for a child, which imports torch on a machine that may be busy."""
linux = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="counts the entries of /proc/self/task"
)
forks = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)
openmp = pytest.mark.skipif(
    not CPU_REASONS and cpu._core.thread_provider(True) != "openmp", reason="torch brought no OpenMP runtime"
)


def arrays(T: int = 48, HV: int = 8, D: int = 64, *, kda: bool = True) -> dict[str, Any]:
    """Enough work for several threads: each takes 400e3 multiply-adds or more (host.cpp)."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    return dict(
        q=normal(1, T, HV, D),
        k=normal(1, T, HV, D) / np.float32(np.sqrt(D)),
        v=normal(1, T, HV, D),
        g=-np.abs(normal(*((1, T, HV, D) if kda else (1, T, HV)))) / 8,
        beta=1 / (1 + np.exp(-normal(1, T, HV))),
        initial_state=normal(1, HV, D, D),
    )


def tensors(**options: Any) -> dict[str, Any]:
    return {name: torch.from_numpy(x) for name, x in arrays(**options).items()}


def digest(*, framework: str, **options: Any) -> bytes:
    """Every bit of a result."""
    x = arrays(**options) if framework == "numpy" else tensors(**options)
    o, state = anydelta.gated_delta_rule(**x)
    return bytes(np.asarray(o).tobytes() + np.asarray(state).tobytes())


@pytest.fixture
def restored() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- how many
# ------------------------------------------------------------------------------------------------


def child(code: str, **env: str) -> str:
    """What a fresh interpreter prints; it can import this file."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=LIMIT, env=os.environ | {"PYTHONPATH": paths} | env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


NUMPY_ONLY = """
    import sys, os
    import numpy as np
    import anydelta
    from anydelta.backends.cpu import host as cpu
    rng = np.random.default_rng(0)
    x = lambda *s: rng.standard_normal(s, np.float32) / 8
    call = dict(q=x(1, 48, 8, 64), k=x(1, 48, 8, 64), v=x(1, 48, 8, 64), g=-abs(x(1, 48, 8)), beta=x(1, 48, 8))
    tasks = lambda: len(os.listdir("/proc/self/task"))
    start = tasks()
    for _ in range(3):
        anydelta.gated_delta_rule(**call)
    assert "torch" not in sys.modules
    print(tasks() - start, cpu.default_threads(), cpu._core.thread_provider(True))
"""


@linux
@pytest.mark.parametrize(("value", "threads"), [("1", 1), ("3", 3), ("4,2", 4)])
def test_numpy_respects_omp_num_threads(value: str, threads: int) -> None:
    """Without torch there is no OpenMP here: the pool is ours, and it holds the caller's thread too."""
    assert child(NUMPY_ONLY, OMP_NUM_THREADS=value) == f"{threads - 1} {threads} own"


@linux
@pytest.mark.parametrize("value", ["", "none", "0", "-2"])
def test_numpy_without_a_number_takes_the_cpus_of_the_process(value: str) -> None:
    cpus = len(os.sched_getaffinity(0))
    assert child(NUMPY_ONLY, OMP_NUM_THREADS=value) == f"{cpus - 1} {cpus} own"


@linux
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_torch_respects_set_num_threads(threads: int) -> None:
    """And brings no thread of its own beside those of torch's runtime."""
    printed = child(
        f"""
        import os
        import torch, anydelta
        from test_threads import tensors
        from anydelta.backends.cpu import host as cpu
        torch.set_num_threads({threads})
        x = tensors()
        tasks = lambda: len(os.listdir("/proc/self/task"))
        start = tasks()
        for _ in range(3):
            anydelta.gated_delta_rule(**x)
        op = tasks()
        a = torch.ones(600, 600)
        for _ in range(3):
            a @ a
            a.exp_().clamp_(max=1)
        both = tasks()
        print(cpu._core.thread_provider(True), op - start, both - op)
        """
    )
    provider, ours, theirs = printed.split()
    assert int(ours) == threads - 1
    if provider == "openmp":
        assert int(theirs) == 0  # torch's kernels took the same threads


@linux
def test_a_small_call_wakes_nobody() -> None:
    assert (
        child(
            """
        import os
        import torch, anydelta
        from test_threads import tensors
        torch.set_num_threads(4)
        x = tensors(T=1, HV=2, D=64)
        start = len(os.listdir("/proc/self/task"))
        for _ in range(3):
            anydelta.gated_delta_rule(**x)
        print(len(os.listdir("/proc/self/task")) - start)
        """
        )
        == "0"
    )


@openmp
def test_torch_tensors_run_on_torchs_threads() -> None:
    assert cpu._core.thread_provider(True) == "openmp"
    assert cpu._core.thread_provider(False) == "own"
    assert cpu.BACKEND.describe()["thread_provider"] == "openmp"


# ---- one result
# ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("shape", [(48, 8, 64), (200, 2, 128), (1, 64, 128), (5, 3, 96)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, int, int], monkeypatch: Any) -> None:
    options = dict(zip(("T", "HV", "D"), shape, strict=True))
    results = set()
    for threads in (1, 2, 3, 5, 8):
        torch.set_num_threads(threads)
        results.add(digest(framework="torch", **options))
        monkeypatch.setattr(cpu, "default_threads", lambda threads=threads: threads)
        plans.forget()  # plans hold what counts the threads
        results.add(digest(framework="numpy", **options))
    plans.forget()
    assert len(results) == 1


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_several_python_threads_at_once(framework: str) -> None:
    """The own pool serves one caller at a time, and the others work alone: every result is whole."""
    torch.set_num_threads(2)
    shapes = [dict(T=48), dict(T=33), dict(T=5, HV=4), dict(T=1, HV=32, D=128)]
    want = [digest(framework=framework, **s) for s in shapes]
    got: list[list[bytes]] = [[] for _ in range(8)]
    gate = threading.Barrier(len(got))

    def work(i: int) -> None:
        gate.wait(LIMIT)
        for _ in range(5):
            got[i].append(digest(framework=framework, **shapes[i % len(shapes)]))

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(got))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(LIMIT)
        assert not t.is_alive()
    for i, results in enumerate(got):
        assert results == [want[i % len(shapes)]] * 5


def test_calls_release_the_interpreter() -> None:
    """Another Python thread gets on while a call runs."""
    x = tensors(T=512, HV=32, D=128)
    ticks: list[int] = []
    running = threading.Event()

    def tick() -> None:
        while not running.wait(0.0005):
            ticks.append(1)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    before = len(ticks)
    while len(ticks) < before + 5:
        anydelta.gated_delta_rule(**x)
    running.set()
    thread.join(LIMIT)
    assert not thread.is_alive()


# ---- fork and spawn
# ------------------------------------------------------------------------------------------------


def answer(connection: Any, framework: str, threads: int) -> None:
    """In a child process."""
    torch.set_num_threads(threads)
    shared = os.path.exists("/proc/self/task") and len(os.listdir("/proc/self/task"))
    result = digest(framework=framework)
    connection.send((cpu._core.thread_provider(True), shared, result))
    connection.close()


def ask(method: str, framework: str, threads: int = 2) -> Any:
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(theirs, framework, threads), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(LIMIT), "the child hangs"
        return ours.recv()
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()


def use(both: bool = True) -> bytes:
    """Start every pool of this process; the result for comparison."""
    torch.set_num_threads(2)
    a = torch.ones(300, 300)
    (a @ a).exp_()
    want = digest(framework="torch")
    if both:
        cpu.default_threads.cache_clear()
        assert digest(framework="numpy") == want
    return want


@forks
@pytest.mark.usefixtures("restored")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_fork_after_use(framework: str) -> None:
    want = use()
    provider, threads, result = ask("fork", framework)
    assert result == want
    assert provider == "own"  # OpenMP's threads stayed in the parent
    assert threads in (1, False)
    assert digest(framework=framework) == want  # the parent goes on
    assert ask("fork", framework)[2] == want


@forks
@pytest.mark.usefixtures("restored")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork_while_another_thread_runs_the_operator() -> None:
    """The child inherits locked mutexes and a job in flight, and must need none of them."""
    want = use()
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            digest(framework="numpy")

    threads = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
    for t in threads:
        t.start()
    try:
        for _ in range(5):
            assert ask("fork", "numpy")[2] == want
    finally:
        stop.set()
        for t in threads:
            t.join(LIMIT)


def grandchild(connection: Any) -> None:
    digest(framework="torch")
    connection.send(ask("fork", "torch"))


@forks
@pytest.mark.usefixtures("restored")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_that_used_the_operator_forks_again() -> None:
    want = use()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=grandchild, args=(theirs,))
    process.start()
    try:
        assert ours.poll(LIMIT), "the child or its child hangs"
        assert ours.recv()[2] == want
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()


@pytest.mark.usefixtures("restored")
def test_spawn() -> None:
    assert ask("spawn", "torch")[2] == use()


class Dataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Items that need the operator."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[int, torch.Tensor]:
        torch.set_num_threads(2)  # DataLoader sets 1
        x = tensors(T=32 + i)
        return os.getpid(), anydelta.gated_delta_rule(**x)[0][0, -1]


@pytest.mark.usefixtures("restored")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader(method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    use()
    here = Dataset()
    loader = torch.utils.data.DataLoader(
        here, batch_size=2, num_workers=2, multiprocessing_context=method, timeout=LIMIT
    )
    makers, rows = zip(*loader, strict=True)
    assert os.getpid() not in torch.cat(makers).tolist()
    want = torch.stack([here[i][1] for i in range(len(here))])
    assert torch.equal(torch.cat(rows), want)
